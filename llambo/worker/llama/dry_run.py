"""What a model needs on the devices of this machine, measured by llama.cpp itself, and the placement that follows.

    find_placement    in the engine child: asks a child process and returns its answer
    main              that child: `python -m llambo.worker.llama.dry_run`, a question on stdin, the answer on stdout

With `no_alloc` llama.cpp goes through the whole loading of a model and of a context without allocating them, and logs
the sizes of the KV cache and of the buffers of a step. They are in no function of its C interface, so the log is read;
weights are added up from the header of the file. If the log does not say what is expected, that is an error and not a
guess. It takes some tenths of a second. In a child, because llama.cpp ends the process where it finds a contradiction,
and because a driver keeps memory for a process that has looked at its devices.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from llambo.mesh.service import host
from llambo.worker.config import LlamaOptions
from llambo.worker.llama import binding, llama
from llambo.worker.models import gguf, model_files, placement
from llambo.worker.models.placement import Device, DoesNotFit, Placement, Share, Sizes, Wish, Work

#: Placements that are measured at most: buffers differ a little from one to the next.
ROUNDS = 4
#: How long the child may take. A header is read from a slow disk, and a driver may have to start.
CHILD_S = 100.0
#: The part of the weights by which the header of the file and llama.cpp may differ: alignment.
TOLERANCE = 0.02

_LAYER = re.compile(r"layer +(\d+): dev = ")
_CACHE = re.compile(r"(?<!buffer )size = +([\d.]+) MiB")
_BUFFER = re.compile(r"(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")


class DryRunError(Exception):
    """It could not be measured; the text says why."""


class Question(msgspec.Struct, frozen=True):
    path: str
    options: LlamaOptions


class Answer(msgspec.Struct, frozen=True):
    """With a `problem` the model cannot be loaded with these options, and it says why."""

    problem: str = ""
    #: None: the library lists no GPU.
    placement: Placement | None = None
    #: Tokens of a slot.
    context: int = 0
    backends: list[str] = []


def find_placement(path: str, options: LlamaOptions) -> Answer:
    """Raises DryRunError."""
    command = [sys.executable, "-m", __name__]
    question = msgspec.json.encode(Question(path, options))
    try:
        child = subprocess.run(command, input=question, capture_output=True, timeout=CHILD_S, check=False)
        return msgspec.json.decode(child.stdout, type=Answer)
    except subprocess.TimeoutExpired as error:
        raise DryRunError(f"the dry run took more than {CHILD_S:g} s") from error
    except msgspec.DecodeError as error:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DryRunError(f"the dry run {host.exit_text(child.returncode)}: {last}") from error


# --- in the child ---


@dataclass(slots=True)
class Measured:
    """What the log of one dry run says. Bytes."""

    #: By layer, for all slots.
    cache: dict[int, int] = field(default_factory=dict)
    #: By buffer type: `CPU`, `CUDA0`, `CUDA_Host`.
    buffers: dict[str, int] = field(default_factory=dict)

    def work(self, devices: Iterable[str]) -> Work:
        """A buffer type belongs to the device whose name it has; all others are in the memory of the host."""
        names = set(devices)
        on_devices = [size for name, size in self.buffers.items() if name in names]
        return Work(max(on_devices, default=0), sum(self.buffers.values()) - sum(on_devices))


def read_log(lines: Iterable[str], blocks: int) -> Measured:
    """Raises DryRunError if it has no sizes."""
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
    if not measured.buffers:
        raise DryRunError("the log of llama.cpp does not say how large its buffers are")
    return measured


def _bytes(mib: str) -> int:
    return int(float(mib) * placement.MIB)


def answer(question: Question) -> Answer:
    options = question.options
    library = llama.open_library(options.library)
    devices = placement.usable(_devices(library))
    if not devices:
        return Answer(backends=library.backends())
    parts = [gguf.read(str(part)) for part in model_files.parts(Path(question.path))]
    sizes = placement.sizes_of(parts)
    layout = model_files.unchecked_layout(options, parts[0], host.free_memory_bytes(), host.physical_cores())
    problem = ""
    while True:
        try:
            found = _place(question, layout, devices, sizes)
        except DoesNotFit as error:
            problem = problem or str(error)
            smaller = layout.context // 2
            if not error.host or options.context or smaller < model_files.MIN_CONTEXT:
                return Answer(f"{question.path} does not fit: {problem}")
            layout = replace(layout, context=smaller)
        else:
            return Answer(placement=found, context=layout.context)


def _devices(library: binding.Library) -> list[Device]:
    return [
        Device(each.name, each.description, each.free_bytes, each.total_bytes, each.kind == "igpu", each.address)
        for each in library.devices()
        if each.kind in ("gpu", "igpu")
    ]


def _place(question: Question, layout: model_files.Layout, devices: list[Device], sizes: Sizes) -> Placement:
    options = question.options
    wish = Wish(
        layers=None if options.gpu_layers == "auto" else options.gpu_layers,
        slots=options.slots,
        fewer_slots=options.fewer_slots,
        host_free=layout.free_bytes,
        device_limit=options.gpu_bytes,
    )
    names, work = [device.name for device in devices], Work()
    plan = Placement((Share(names[0], sizes.all_layers, 0, 0),), sizes.all_layers, options.slots)
    for _ in range(ROUNDS):
        measured = _measure(question.path, replace(layout, slots=plan.slots), plan, sizes)
        sizes = sizes.with_cache(plan.slots, measured.cache)
        now = measured.work(names)
        work = Work(max(work.device, now.device), max(work.host, now.host))
        chosen = placement.choose(wish, devices, sizes, work)
        if chosen.same_place(plan):
            return chosen
        plan = chosen
    return plan


def _measure(path: str, layout: model_files.Layout, plan: Placement, sizes: Sizes) -> Measured:
    with llama.logged() as lines:
        model = llama.Model(path, plan, safe=False, dry=True)
        decoder = llama.Decoder(model, layout)
        decoder.close()
        size = model.weight_bytes
        model.close()
    if abs(size - sizes.weights) > TOLERANCE * size:
        raise DryRunError(f"by its header the model has {sizes.weights} bytes of weights, by llama.cpp {size}")
    return read_log(lines, len(sizes.layers))


def main() -> None:
    host.end_with_parent_now()
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        result = answer(question)
    except (llama.LoadError, binding.LibraryError, gguf.BadModelFile, OSError) as error:
        result = Answer(str(error))
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
