"""Several processes that work as one: who they are, and how they tell each other numbers, facts and errors.

All processes run the same program. Where they divide work, each does its part, and what comes of it goes to all, so
that they hold the same state again; where only one may act, as on files, `World.on_first` lets the first one act and
tells the others the outcome. An error is part of every outcome: what one raises, all raise, so that none waits for one
that is gone, and the one that speaks to the user has something to say.

Tensors travel as their bytes, plain values as JSON; nothing is pickled. Sums of floats depend on their order, so
`World.summed` adds in an order that does not depend on how many processes there are:

    S = (((c_0 + c_1) + c_2) + ...) + c_{K-1},     c_k made by process k mod N,

the same bits for every N, when each c_k is. One process alone does the same sums, and has no process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compress.errors import CompressError, OtherProcessError, UsageError, error_of
from compress.launch import Launch, launch

TIMEOUT = timedelta(days=2)
"""How long a process waits for the others: as long as the first may evaluate or export alone. A process that dies ends
the waiting at once, by its closed connections or by the launcher."""
MESSAGE_BYTES = 1 << 29
"""Bytes that are broadcast at once."""

T = TypeVar("T")
Json = Any
"""Whatever `json.loads` can return."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)
"""Whether the first process is at work while the others wait."""


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`. All methods but `mine` are collective: every process calls
    them, in the same order. Where size is 1 they cost nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def mine(self, items: int) -> range:
        """Which of so many items are this process's: every `size`-th, from `rank` on."""
        return range(self.rank, items, self.size)

    def together(self, work: Callable[[], T]) -> T:
        """Every process does its own `work`; this one's result. What one raises all raise: the error of the lowest
        rank, an `OtherProcessError` for what is no `CompressError` there."""
        if self.size == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            rank, first = _first_error(self.gather(_plain(error)))
            if rank == self.rank and not isinstance(error, OSError | CompressError):
                raise
            raise first from error
        heard = self.gather(None)
        if any(heard):
            raise _first_error(heard)[1]
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """The first process does `work`, and all get its plain result (tuples become lists) or raise its error. Within
        `work` the `world()` is that process alone."""
        if self.size == 1:
            return work()

        def alone() -> T | None:
            if not self.first:
                return None
            before = _alone.set(True)
            try:
                return work()
            finally:
                _alone.reset(before)

        return self.gather(self.together(alone))[0]

    def tensors_of_first(self, work: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """The tensors that `work` of the first process makes, by their names, on `device`. Errors as in `on_first`."""
        made: dict[str, Tensor] = {}

        def described() -> dict[str, Any]:
            made.update((name, tensor.detach().to(device)) for name, tensor in work().items())
            return {name: [_name(tensor.dtype), list(tensor.shape)] for name, tensor in made.items()}

        for name, (dtype, shape) in self.on_first(described).items():
            if name not in made:
                made[name] = torch.empty(shape, dtype=_DTYPES[dtype], device=device)
            self.broadcast([made[name]])
        return made

    def gather(self, value: Json) -> list[Json]:
        """The plain `value` of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(one) for one in self._all_gather(torch.tensor([text.numel()]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: text.numel()] = text
        found = self._all_gather(padded)
        return [json.loads(one[:size].numpy().tobytes()) for one, size in zip(found, lengths, strict=True)]

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, in the order of ranks, on this one's device; dtypes and shapes may differ."""
        if self.size == 1:
            return [tensor]
        facts = self.gather([_name(tensor.dtype), list(tensor.shape)])
        made = [torch.empty(shape, dtype=_DTYPES[dtype], device=tensor.device) for dtype, shape in facts]
        made[self.rank] = tensor
        for source, one in enumerate(made):
            self.broadcast([one], source)
        return made

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` by those of the process `source`, which have the same shapes and dtypes."""
        if self.size == 1:
            return
        for tensor in tensors:
            if not tensor.numel():
                continue
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(_wire(tensor.device))
            for piece in flat.split(MESSAGE_BYTES):
                with _others_may_end():
                    dist.broadcast(piece, source)
            if self.rank != source:
                tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def summed(self, parts: Iterator[Tensor | None], number: int, device: torch.device) -> Tensor | None:
        """The sum of `number` tensors float64 [n] in the order of their numbers, on every process; None when there is
        none. `parts` makes those that are `mine` of them, one at a time, on `device`, and None for one that adds
        nothing. The first is overwritten.

        Each process adds up one slice of all, so none waits for another's sums, and gets the others' at the end.
        """
        if self.size == 1:
            total: Tensor | None = None
            for part in parts:
                if part is not None:
                    total = part if total is None else total.add_(part)
            return total
        wire = _wire(device)
        own, length = torch.empty(0), 0
        for _ in range(0, number, self.size):
            made = self.together(lambda: next(parts, None))
            lengths = self.gather(0 if made is None else made.numel())
            if any(lengths):
                fresh, length = length == 0, max(lengths)
                flat = torch.empty(0, dtype=torch.float64, device=wire) if made is None else made.to(wire)
                pieces = self._slices(flat, lengths)
                own = pieces.pop(0).clone() if fresh else own
                for piece in pieces:
                    own.add_(piece)
        if not length:
            return None
        total = torch.empty(length, dtype=torch.float64, device=wire)
        for source, part in enumerate(total.tensor_split(self.size)):
            if source == self.rank:
                part.copy_(own)
            self.broadcast([part], source)
        return total.to(device)

    def _slices(self, flat: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """This process's slice of the tensor of every process that has one; `lengths` are 0 for those without."""
        sizes = [len(part) for part in torch.empty(max(lengths), device="meta").tensor_split(self.size)]
        sent = sizes if flat.numel() else [0] * self.size
        received = [sizes[self.rank] if length else 0 for length in lengths]
        found = torch.empty(sum(received), dtype=flat.dtype, device=flat.device)
        with _others_may_end():
            dist.all_to_all_single(found, flat, received, sent)
        return list(found.split([size for size in received if size])) or [found]

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        """That of every process, of one shape and dtype, on the CPU."""
        sent = tensor.to(_wire(tensor.device))
        found = [torch.empty_like(sent) for _ in range(self.size)]
        with _others_may_end():
            dist.all_gather(found, sent)
        return [one.cpu() for one in found]


def works_alone() -> bool:
    """Whether this is the first process while the others wait for it (`World.on_first`)."""
    return _alone.get()


def world() -> World:
    """The processes of the present process group of torch.distributed; this one alone where there is none, or where it
    works for all (`World.on_first`)."""
    if not works_alone() and dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(device: str = "cpu") -> Iterator[World]:
    """Within this, the processes that a launcher such as `torchrun` started are one `World`: gloo between CPUs, and on
    `device` "cuda" NCCL too, with the GPU of this process's local number as the current one. Where there is a process
    group already, that one is used and left as it is.

    Raises `UsageError` for a `device` that all processes would share, or one that this machine does not have.
    An error of a later process that the others know nothing of leaves as an `OtherProcessError`.
    """
    ours = launch()
    begins = ours.size > 1 and not dist.is_initialized()
    if begins:
        _begin(ours, torch.device(device))
    found = world()
    try:
        yield found
        if begins:
            found.gather(None)  # nobody leaves while others are still reading from it
    except CompressError as error:
        if found.first or error.agreed:
            raise
        raise OtherProcessError(_where(found.rank, found.size, error.message), remedy=error.remedy) from error
    finally:
        if begins:
            dist.destroy_process_group()


def _begin(ours: Launch, device: torch.device) -> None:
    backend = "gloo"
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"All {ours.size} processes would work on '{device}'.", remedy="Use --device cuda: each takes its own."
            )
        if ours.local >= torch.cuda.device_count():
            raise UsageError(
                f"Process {ours.local} of this machine has no GPU: there are {torch.cuda.device_count()}.",
                remedy="Start no more processes than there are GPUs (--nproc-per-node).",
            )
        torch.cuda.set_device(ours.local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)


@contextmanager
def _others_may_end() -> Iterator[None]:
    """Turns what a backend says when another process is gone into an error that a user understands."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            f"Another process of this run has ended: {error}",
            remedy="What it printed says why; the same command takes the run up again.",
        ) from error


def _wire(device: torch.device) -> torch.device:
    """Where tensors of `device` must lie to be sent."""
    backends = dist.get_backend_config()
    if device.type == "cuda" and "cuda:nccl" in backends:
        return device
    return torch.device("cpu") if "cpu:" in backends else torch.device("cuda", torch.cuda.current_device())


def _where(rank: int, size: int, message: str) -> str:
    return f"Process {rank} of {size} (counted from 0): {message}"


def _plain(error: Exception) -> list[str]:
    """Kind, message and remedy of an error, as `_error` reads them."""
    if isinstance(error, CompressError):
        return [type(error).__name__, error.message, error.remedy]
    if isinstance(error, OSError):
        place = f"'{error.filename}': " if error.filename is not None else ""
        return [
            "WorkspaceError",
            f"{place}{error.strerror or error}.",
            "Check the path, your rights and the free space.",
        ]
    return ["OtherProcessError", f"{type(error).__name__}: {error}", "It printed where that happened."]


def _first_error(heard: Sequence[Sequence[str] | None]) -> tuple[int, CompressError]:
    """The rank and the error of the lowest rank that has one."""
    rank, told = next((rank, told) for rank, told in enumerate(heard) if told is not None)
    kind, message, remedy = told
    if kind == "OtherProcessError":
        message = _where(rank, len(heard), message)
    error = error_of(kind, message, remedy)
    error.agreed = True
    return rank, error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
