"""What a target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz.mutator import Mutator

Frames = list[bytes]
Run = Callable[[Frames], None]
Mutate = Callable[[Mutator, Frames], Frames]


@dataclass(frozen=True, slots=True)
class Target:
    """`run` raises if there is a finding. `seeds` are good, and `mutate` makes something else of one of them."""

    name: str
    seeds: Sequence[Frames]
    run: Run
    mutate: Mutate


def plain(mutator: Mutator, frames: Frames) -> Frames:
    """One frame, changed here and there."""
    return [mutator.mangled(frames[0])]
