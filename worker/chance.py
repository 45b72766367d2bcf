"""Chance as a function: the same seed, index and token give the same number, on any worker.

An answer that moves to another worker brings no random state along, only its seed and its tokens. So nothing is
drawn from a generator. Each candidate token gets a number of its own from a hash of (seed, index, token), shaped so
that the token with the largest sum of logit and number is chosen as often as its probability says (the Gumbel
trick). Because a token keeps its number whatever the others do, two workers whose logits differ in the last digit
choose alike unless two candidates are nearly equal; with one draw for all, every shift of the order would matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
#: What a number is for, so that two uses at one index are independent.
TOKEN, XTC = 1, 2


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def base(seed: int, index: int, purpose: int) -> int:
    return _mix((_mix((seed + _GOLDEN) & _MASK) + index * _GOLDEN + purpose) & _MASK)


def uniform(seed: int, index: int, purpose: int) -> float:
    """In [0, 1)."""
    return (base(seed, index, purpose) >> 11) / 2**53


def gumbel(seed: int, index: int, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """One number for each token."""
    value = tokens.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(base(seed, index, TOKEN))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    share = ((value >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    numbers: NDArray[np.float64] = -np.log(-np.log(share))
    return numbers
