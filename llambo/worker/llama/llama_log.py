"""What llama.cpp logs: why a model does not load, and in a dry run the sizes of its cache and buffers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from llambo.worker.models.placement import MIB, Work

#: From ggml.h. A line of the last level continues the one before.
WARNING, ERROR, CONTINUED = 3, 4, 5
#: Warnings and errors that are kept as reasons.
REASONS = 8

_LAYER = re.compile(r"layer +(\d+): dev = ")
_CACHE = re.compile(r"(?<!buffer )size = +([\d.]+) MiB")
_BUFFER = re.compile(r"(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")


class UnknownLog(Exception):
    """The log does not say what it should; the text says what is missing."""


class LlamaLog:
    """The last warnings and errors: they explain why a model did not load."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        #: If it is a list, every line is added to it.
        self.everything: list[str] | None = None
        self._level = 0

    def on_line(self, level: int, text: bytes, _: object) -> None:
        self._level = level if level < CONTINUED else self._level
        line = text.decode(errors="replace").strip()
        if self._level in (WARNING, ERROR):
            self.lines = [*self.lines[1 - REASONS :], line]
        if self.everything is not None:
            self.everything.append(line)

    def reason(self) -> str:
        return "; ".join(line for line in self.lines if line) or "llama.cpp gave no reason"


@dataclass(slots=True)
class Measured:
    """Bytes."""

    #: By layer, for all slots.
    cache: dict[int, int] = field(default_factory=dict)
    #: By buffer type: `CPU`, `CUDA0`, `CUDA_Host`.
    buffers: dict[str, int] = field(default_factory=dict)

    def work(self, devices: Iterable[str]) -> Work:
        """A buffer type belongs to the device whose name it has; all others are in the memory of the host."""
        names = set(devices)
        on_devices = [size for name, size in self.buffers.items() if name in names]
        return Work(max(on_devices, default=0), sum(self.buffers.values()) - sum(on_devices))


def read_log(lines: Iterable[str], blocks: int, *, cached: bool = True) -> Measured:
    """`blocks`: of the model, for a cache that does not list its layers; `cached`: it has one. Raises UnknownLog."""
    measured = Measured()
    layers: list[int] = []
    for line in lines:
        if found := _LAYER.search(line):
            layers.append(int(found[1]))
        elif found := _BUFFER.search(line):
            measured.buffers[found[1]] = measured.buffers.get(found[1], 0) + _bytes(found[2])
        elif found := _CACHE.search(line):
            # A model may have several caches. Each lists its layers, which are alike, and then its size.
            layers = layers or list(range(blocks))
            for layer in layers:
                measured.cache[layer] = measured.cache.get(layer, 0) + _bytes(found[1]) // len(layers)
            layers = []
    if not measured.buffers or (cached and not measured.cache):
        what = "cache" if measured.buffers else "buffers"
        raise UnknownLog(f"the log of this llama.cpp does not show the size of its {what}")
    return measured


def _bytes(mib: str) -> int:
    return int(float(mib) * MIB)
