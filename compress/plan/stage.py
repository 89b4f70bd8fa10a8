"""One stage of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it reads (None: random weights), where its result appears (None: in the report alone), what it
    will do, and an estimate of its memory in bytes, the program itself left out."""

    name: str
    source: str | None
    out: str | None
    text: str
    memory_bytes: int | None = None
    notes: tuple[str, ...] = ()
