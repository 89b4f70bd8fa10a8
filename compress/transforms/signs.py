"""The signs of a mixing: where they come from, how they are stored, and which sides of a matrix have them.

    bit i of n = bit i % 256 of SHA-256("<seed>/<name>/<i // 256>"), counted from the least significant of byte 0;
    sign i = -1 where the bit is 1, else +1

so a name and a seed give the same signs on every machine and with every version of torch. An artifact stores the bits
themselves, eight to a byte, the least significant first, and its reader needs no random numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.transforms.mixing import mix, unmix

MIXINGS: Final = ("none", "input", "output", "both")
"""Which sides of a matrix W [o, n] are mixed: n is the input side, o the output side."""

DIGEST_BITS = 256


def random_signs(n: int, seed: int, name: str) -> Tensor:
    """+1 and -1 as int8 [n], from `seed` and `name` alone."""
    blocks = -(-n // DIGEST_BITS)
    digests = b"".join(hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest() for block in range(blocks))
    return unpack_signs(torch.frombuffer(bytearray(digests or b"\0"), dtype=torch.uint8), n)


def pack_signs(signs: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] of signs [n]: bit i % 8 of byte i // 8 is 1 where sign i is -1. Unused bits are 0."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -signs.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return (bits << places).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """The signs int8 [n] that `pack_signs` packed, on the same device."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> places & 1).flatten()[:n]
    return 1 - 2 * bits.to(torch.int8)


def sign_bytes(n: int) -> int:
    """Bytes of n packed signs."""
    return -(-n // 8)


@dataclass(frozen=True)
class Signs:
    """The signs of a matrix W [o, n], int8 [n] and [o]; None for a side that is not mixed.

    W' = Qo^T W Qi is what is rounded, and y = Qo (W' (Qi^T x)) what W x was.
    """

    input: Tensor | None = None
    output: Tensor | None = None

    @property
    def mixing(self) -> str:
        """One of `MIXINGS`."""
        if self.input is None:
            return "none" if self.output is None else "output"
        return "input" if self.output is None else "both"

    def mix_inputs(self, x: Tensor) -> Tensor:
        """Qi^T x of each row x of [..., n]; x itself where the input side is not mixed."""
        return x if self.input is None else mix(x, self.input)

    def unmix_outputs(self, y: Tensor) -> Tensor:
        """Qo y' of each row y' of [..., o]; y' itself where the output side is not mixed."""
        return y if self.output is None else unmix(y, self.output)

    def to(self, device: torch.device) -> Signs:
        """The same on another device."""
        sides = (side if side is None else side.to(device) for side in (self.input, self.output))
        return Signs(*sides)


def mixed_sides(mixing: str) -> tuple[bool, bool]:
    """Whether the input and the output side are mixed. Raises `CodecError` for a word that is not in `MIXINGS`."""
    if mixing not in MIXINGS:
        raise CodecError(f"There is no mixing '{mixing}'.", remedy=f"Sides are {', '.join(MIXINGS)}.")
    return mixing in ("input", "both"), mixing in ("output", "both")


def matrix_signs(mixing: str, shape: tuple[int, int], seed: int, name: str, group: str) -> Signs:
    """The signs of a matrix `name` of this shape. Those of the input belong to its `group`, the matrices that read the
    same activations, so that an engine can mix them once; those of the output are its own."""
    rows, columns = shape
    inputs, outputs = mixed_sides(mixing)
    return Signs(
        random_signs(columns, seed, f"{group}.input") if inputs else None,
        random_signs(rows, seed, f"{name}.output") if outputs else None,
    )
