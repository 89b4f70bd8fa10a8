"""How fast a model generates: tokens a second while decoding, in torch or in ONNX Runtime, measured alike.

One repeat runs the prompt (not timed), then `new_tokens` greedy steps of one token each for every row of the batch:

    tokens_per_second = batch * new_tokens / (seconds of the steps).

The first `warmup` repeats are thrown away (memory is allocated, packed weights are decoded, kernels are chosen); the
figure is the median of the rest, because a rival for the processor makes single repeats slow and none fast.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UsageError
from compress.evaluation.generate import Decoder, OnnxDecoder, TorchDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Throughput:
    """Decoding speed, and what it was measured with. `seconds` has one entry for each repeat that counts."""

    tokens_per_second: float
    seconds: tuple[float, ...]
    runtime: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": list(self.seconds)}


def tokens_per_second(
    model: PreTrainedModel | OnnxDecoder,
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 64,
    batch: int = 1,
    warmup: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> Throughput:
    """Measure decoding speed of `model` after random prompts. Raises `UsageError` for a count below one."""
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}.", remedy="Give at least 1.")
    decoder = model if isinstance(model, OnnxDecoder) else TorchDecoder(model)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(decoder.vocab_size, (batch, prompt_tokens), generator=generator)
    seconds = [_decode(decoder, prompt, new_tokens) for _ in range(warmup + repeats)][warmup:]
    return Throughput(
        tokens_per_second=batch * new_tokens / statistics.median(seconds),
        seconds=tuple(seconds),
        runtime=decoder.runtime,
        threads=decoder.threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )


def _decode(decoder: Decoder, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds of `new_tokens` greedy steps after `prompt`."""
    batch, length = prompt.shape
    mask = torch.ones(batch, length + new_tokens, dtype=torch.int64)
    positions = torch.arange(length + new_tokens).expand(batch, -1)
    logits, cache = decoder.step(prompt, mask[:, :length].contiguous(), positions[:, :length].contiguous(), None)
    started = time.perf_counter()
    for end in range(length + 1, length + new_tokens + 1):
        fresh = logits[:, -1].argmax(-1, keepdim=True)
        logits, cache = decoder.step(fresh, mask[:, :end].contiguous(), positions[:, end - 1 : end].contiguous(), cache)
    return time.perf_counter() - started
