"""The system's random bytes, fetched by the page: a system call for each dispatch is a tenth of its cost."""

from __future__ import annotations

import os
from collections.abc import Callable

#: Random bytes fetched at a time.
CHANCE_BYTES = 4_096


def chance() -> Callable[[int], bytes]:
    page, at = b"", 0

    def draw(count: int) -> bytes:
        nonlocal page, at
        if at + count > len(page):
            page, at = os.urandom(CHANCE_BYTES), 0
        at += count
        return page[at - count : at]

    return draw
