"""An exported file against its model: the same inputs through ONNX Runtime and through torch, in float32.

For each input the error is max |logits_ort - logits_torch| / max |logits_torch| over the real (not padded) positions.
The inputs of a decoder are those in which exports go wrong: a prefill (past length 0), single tokens after it, several
tokens after a past, and a batch whose rows are padded on the left; torch runs them with the cache that the model
itself makes. The inputs of an encoder are single texts and a batch padded on the right, those of an image model one
image and three, of normal noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import ExportError
from compress.evaluation.generate import MODEL_FILE, OnnxDecoder, TorchDecoder, positions_of
from compress.evaluation.ort import open_session
from compress.exporters.interface import ANY_SIZES, EncoderInterface, ImageInterface, Interface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
SEED = 0
PREFILL, STEPS, CHUNK = 7, 3, 4
"""Tokens of the prompt, single-token steps after it, tokens of the last piece."""
# left padding of each row of the batches that a decoder is run with
DECODER_BATCHES = {"batch 1": (0,), "batch 2, left padding": (0, 3)}
# lengths of the texts in the batches that an encoder is run with
ENCODER_BATCHES = {"one token": (1,), "one text": (9,), "batch 3, right padding": (12, 5, 1)}

# images in the batches that an image model is run with
IMAGE_BATCHES = {"one image": 1, "batch 3": 3}


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|; NaN when either has one."""
    return float((found - reference).abs().max() / reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def verify(model: PreTrainedModel, folder: Path, interface: Interface) -> dict[str, float]:
    """The error of the export in `folder` for each input. Raises `ExportError` above `TOLERANCE`."""
    if isinstance(interface, EncoderInterface):
        return verify_encoder(model, folder / MODEL_FILE, interface)
    if isinstance(interface, ImageInterface):
        return verify_images(model, folder / MODEL_FILE, interface)
    return verify_decoder(model, folder)


def verify_decoder(model: PreTrainedModel, folder: Path) -> dict[str, float]:
    """The error of the decoder in `folder` for each input. Raises `ExportError` above `TOLERANCE`."""
    exported, original = OnnxDecoder(folder), TorchDecoder(model)
    generator = torch.Generator().manual_seed(SEED)
    pieces = [("prefill", PREFILL), *((f"step {i}", 1) for i in range(1, STEPS + 1)), (f"{CHUNK} tokens", CHUNK)]
    errors = {}
    for batch, padding in DECODER_BATCHES.items():
        total = sum(length for _, length in pieces)
        ids = torch.randint(original.vocab_size, (len(padding), total), generator=generator)
        mask = (torch.arange(total) >= torch.tensor(padding)[:, None]).long()
        positions = positions_of(mask)
        exported_cache, original_cache, end = None, None, 0
        for name, length in pieces:
            part, end = slice(end, end + length), end + length
            fresh, seen, places = (piece.contiguous() for piece in (ids[:, part], mask[:, :end], positions[:, part]))
            found, exported_cache = exported.step(fresh, seen, places, exported_cache)
            reference, original_cache = original.step(fresh, seen, places, original_cache)
            real = mask[:, part].bool()
            errors[f"{batch}: {name}"] = relative_error(found[real], reference[real])
    return _within_tolerance(errors)


@torch.no_grad()
def verify_encoder(model: PreTrainedModel, path: Path, interface: EncoderInterface) -> dict[str, float]:
    """The error of the encoder in the file `path` for each input. Raises `ExportError` above `TOLERANCE`."""
    session = open_session(path, threads=torch.get_num_threads())
    generator = torch.Generator().manual_seed(SEED)
    errors = {}
    for name, lengths in ENCODER_BATCHES.items():
        shape = (len(lengths), max(lengths))
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        inputs = {
            "input_ids": torch.randint(interface.vocab_size, shape, generator=generator),
            "attention_mask": mask.long(),
            "token_type_ids": torch.randint(interface.token_types, shape, generator=generator),
        }
        inputs = {key: inputs[key] for key in interface.input_names}
        found = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
        reference = model(**inputs)[interface.output]
        whole = reference.ndim == 2  # one row of logits for a text
        errors[name] = relative_error(found, reference) if whole else relative_error(found[mask], reference[mask])
    return _within_tolerance(errors)


@torch.no_grad()
def verify_images(model: PreTrainedModel, path: Path, interface: ImageInterface) -> dict[str, float]:
    """The error of the image model in the file `path` for each input. Raises `ExportError` above `TOLERANCE`."""
    session = open_session(path, threads=torch.get_num_threads())
    generator = torch.Generator().manual_seed(SEED)
    errors = {}
    for (name, count), size in zip(IMAGE_BATCHES.items(), ANY_SIZES, strict=True):
        images = torch.randn(count, interface.channels, *(interface.size or size), generator=generator)
        (found,) = session.run(None, {"pixel_values": images.numpy()})
        errors[name] = relative_error(torch.from_numpy(found), model(pixel_values=images)[interface.output])
    return _within_tolerance(errors)


def _within_tolerance(errors: dict[str, float]) -> dict[str, float]:
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ExportError(
                f"The exported model does not agree with the original: relative error {error:.2g} of its output "
                f"({name}), allowed is {TOLERANCE:g}.",
                remedy="Nothing was written. Please report the model and the versions of torch and onnxruntime.",
            )
    return errors
