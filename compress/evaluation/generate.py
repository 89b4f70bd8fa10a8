"""Text from a model: in torch through `model.generate`, in ONNX Runtime through a session with a KV cache.

A causal model run one token at a time keeps the keys and values of all earlier tokens, so each step costs one token:

    logits_t, cache_t = model(token_t, cache_{t-1}),      token_{t+1} = argmax logits_t      (greedy).

`TorchDecoder` and `OnnxDecoder` offer that step under one signature, so that the two can be compared and timed alike.
Greedy means greedy here: whatever `generation_config.json` says about penalties or sampling is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.evaluation.ort import CPU, open_session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FILE = "model.onnx"
PAST = "past_key_values."


class Decoder(Protocol):
    """A causal model that can be run step by step."""

    @property
    def runtime(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, T, V] of the new tokens `ids` [B, T] and the cache that includes them.

        `mask` [B, P + T] is 1 at real tokens, P being the length of `cache` (None: 0); `positions` [B, T].
        """
        ...


@contextmanager
def _plain_generation(model: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """The model with a generation config of `settings` and nothing else: `generate` fills every setting that it is not
    given from the model's own config, where None cannot override."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = before


def _run_generate(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None, stop: Sequence[int], pad: int, **settings: Any
) -> Tensor:
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    with _plain_generation(model, eos_token_id=list(stop) or None, pad_token_id=pad, **settings), torch.no_grad():
        generated: Tensor = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
    return generated


def generate_greedy(
    model: PreTrainedModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> Tensor:
    """`ids` [B, T] continued with the most likely tokens: [B, T + n], n <= `max_new_tokens`.

    A row ends at its first token of `stop` and is then filled with `pad`; n is smaller when all rows end earlier.
    `attention_mask` [B, T] is 0 at padding, which must be on the left.
    """
    return _run_generate(model, ids, attention_mask, stop, pad, max_new_tokens=max_new_tokens, do_sample=False)


def generate_sampled(
    model: PreTrainedModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> Tensor:
    """`ids` [B, T] continued with tokens drawn from softmax(logits / temperature), cut to the most likely tokens that
    make up `top_p`. The same `seed` gives the same tokens; torch's global random state is left as it was."""
    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _run_generate(model, ids, attention_mask, stop, pad, max_new_tokens=max_new_tokens, **settings)


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token in its text, [B, T], when `mask` is 0 at padding on the left; padding has position 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def decode_greedy(
    decoder: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> Tensor:
    """What `generate_greedy` returns, step by step with `decoder`."""
    if ids.shape[1] == 0:
        raise UsageError("There is no token to start from.", remedy="Give at least one token id.")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    positions, cache, fresh = positions_of(mask), None, ids
    running = torch.ones(len(ids), dtype=torch.bool)
    stops = torch.tensor(list(stop), dtype=ids.dtype)
    for _ in range(max_new_tokens):
        logits, cache = decoder.step(fresh, mask, positions, cache)
        fresh = torch.where(running, logits[:, -1].argmax(-1), pad)[:, None]
        ids = torch.cat([ids, fresh], 1)
        mask = torch.cat([mask, torch.ones_like(fresh)], 1)
        positions = positions[:, -1:] + 1
        running &= ~torch.isin(fresh[:, 0], stops)
        if not running.any():
            break
    return ids


class TorchDecoder:
    """A transformers model, step by step."""

    runtime = "torch"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        ids, mask, positions = (tensor.to(self._model.device) for tensor in (ids, mask, positions))
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits, output.past_key_values


class OnnxDecoder:
    """An exported decoder in ONNX Runtime. The cache stays inside ONNX Runtime between steps, uncopied.

    `folder` holds `model.onnx`; `threads` None takes as many as torch uses, so that both can be compared. `provider`
    is the one that runs: ONNX Runtime's silent fallback to another is an error (see `open_session`).
    """

    runtime = "onnxruntime"

    def __init__(self, folder: Path, *, provider: str = CPU, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self.provider = provider
        self._session = open_session(folder / MODEL_FILE, provider, self.threads)
        self._empty = {
            entry.name: (entry.shape[1], entry.shape[3])
            for entry in self._session.get_inputs()
            if entry.name.startswith(PAST)
        }
        if not self._empty:
            raise UsageError(f"'{folder}' holds no decoder with a KV cache.", remedy="Export a causal model.")
        outputs = self._session.get_outputs()
        self._outputs = [entry.name for entry in outputs]
        self.vocab_size = int(outputs[0].shape[2])

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        import numpy
        from onnxruntime import OrtValue

        if cache is None:
            cache = {
                name: OrtValue.ortvalue_from_numpy(numpy.zeros((len(ids), heads, 0, width), numpy.float32))
                for name, (heads, width) in self._empty.items()
            }
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: OrtValue.ortvalue_from_numpy(value.numpy()) for name, value in named.items()}
        logits, *presents = self._session.run_with_ort_values(self._outputs, {**feeds, **cache})
        return torch.from_numpy(logits.numpy()), dict(zip(self._empty, presents, strict=True))

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        stop: Sequence[int] = (),
        pad: int = 0,
    ) -> Tensor:
        """`ids` [B, T] continued greedily; see `generate_greedy`."""
        return decode_greedy(self, ids, max_new_tokens, attention_mask=attention_mask, stop=stop, pad=pad)
