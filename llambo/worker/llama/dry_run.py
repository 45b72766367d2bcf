"""What a model needs on the devices of this machine, measured by llama.cpp itself, and the placement that follows.

    prepare    in the engine child: layout and placement; `find_placement` asks a child process for the latter
    main       that child: `python -m llambo.worker.llama.dry_run`, a question on stdin, the answer on stdout

With `no_alloc` llama.cpp goes through the whole loading of a model and of a context without allocating them, and logs
the sizes of the KV cache and of the buffers of a step. They are in no function of its C interface, so the log is read;
weights are added up from the header of the file. If the log does not say what is expected, that is an error and not a
guess. It takes some tenths of a second. In a child, because llama.cpp ends the process where it finds a contradiction,
and because a driver keeps memory for a process that has looked at its devices.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from llambo.mesh.service import host
from llambo.worker.config import RAM, LlamaOptions
from llambo.worker.engine.protocol import Progress
from llambo.worker.llama import binding, llama
from llambo.worker.llama.embedder import Embedder
from llambo.worker.llama.llama import LlamaContext
from llambo.worker.llama.llama_log import Measured, read_log
from llambo.worker.models import gguf, gpus, model_files, placement
from llambo.worker.models.model_files import Layout
from llambo.worker.models.placement import ComputeDevice, DoesNotFit, Placement, Share, Sizes, Wish, Work
from llambo.worker.models.purpose import Purpose, purpose_of

log = logging.getLogger("llambo.engine")

#: The name of the socket that the engine has whose turn it is; how often and how many times the others wait for it.
TURN, WAIT_S, WAITS = "\0llambo-gpu-loading", 10.0, 60
#: Placements that are measured at most: buffers differ a little from one to the next.
ROUNDS = 4
#: How long the child may take. A header is read from a slow disk, and a driver may have to start.
CHILD_S = 100.0
#: The part of the weights by which the header of the file and llama.cpp may differ: alignment.
TOLERANCE = 0.02


class DryRunError(Exception):
    """It could not be measured; the text says why."""


class Question(msgspec.Struct, frozen=True):
    """Without a `path`: which devices are there."""

    path: str
    options: LlamaOptions
    #: What is free, by name of the device; others, and all if it is empty, as they are now.
    free: dict[str, int] = {}


class Answer(msgspec.Struct, frozen=True):
    """With a `problem` the model cannot be loaded with these options, and it says why.

    `too_large`: it does not fit.
    """

    problem: str = ""
    too_large: bool = False
    #: None: the library lists no GPU.
    placement: Placement | None = None
    #: Tokens of a slot.
    context: int = 0
    devices: list[ComputeDevice] = []


def prepare(
    path: str, file: gguf.ModelFile, options: LlamaOptions, library: binding.Library
) -> tuple[Layout, Placement, str]:
    """How the model is loaded on this machine, and what to say about a GPU that is not used.

    Raises LoadError and BadModelFile if it does not fit.
    """
    wanted, warning = options.gpu_layers, ""
    if wanted != 0 and library.supports_gpu:
        try:
            found = find_placement(path, options)
        except DryRunError as error:
            if wanted != "auto":
                raise llama.LoadError(f"{error}; --gpu-layers 0 uses the CPU alone") from error
            found, warning = Answer(), f"no GPU is used, because {error}; --gpu-layers NUMBER insists on one"
        if found.problem:
            raise (llama.NoMemory if found.too_large else llama.LoadError)(found.problem)
        if found.placement is not None:
            layout = model_files.unchecked_layout(options, file, host.free_memory_bytes(), host.physical_cores())
            slots, need = found.placement.slots, found.placement.host_bytes
            return replace(layout, slots=slots, context=found.context, need_bytes=need), found.placement, warning
    if wanted != 0 and not warning:
        warning = str(gpus.advice(gpus.gpus(), library.backends()) or "")
        if wanted != "auto":
            raise llama.LoadError(gpus.without_devices(wanted, gpus.gpus(), library.backends()))
    layout = model_files.layout(options, file, host.free_memory_bytes(), host.physical_cores())
    return layout, placement.CPU, warning


@contextmanager
def taking_turns(send: Callable[[Progress], None]) -> Iterator[None]:
    """One engine of this machine at a time. The others measure what is free when this one has allocated its part.

    A name of an abstract socket belongs to one process, and is free when that process closes it or ends.
    """
    with socket.socket(socket.AF_UNIX) as mine:
        for _ in range(WAITS):
            try:
                mine.bind(TURN)
                mine.listen()
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    log.warning("other workers may load at the same time: %s", error)
                    break
            send(Progress("waiting for another worker of this machine, which is loading its model"))
            # The connection is never accepted. It ends when its other end does.
            with socket.socket(socket.AF_UNIX) as other, suppress(OSError):
                other.settimeout(WAIT_S)
                other.connect(TURN)
                other.recv(1)
        else:
            log.warning("another worker of this machine is loading its model for a long time; no longer waiting for it")
        yield


def find_placement(path: str, options: LlamaOptions, free: dict[str, int] | None = None) -> Answer:
    """Raises DryRunError. The rest is as in `Question`."""
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    question = msgspec.json.encode(Question(path, options, free or {}))
    try:
        child = subprocess.run(command, input=question, capture_output=True, timeout=CHILD_S, check=False)
        # The answer is the last line: a driver may have written to stdout as well.
        return msgspec.json.decode(child.stdout.rpartition(b"\n")[2], type=Answer)
    except subprocess.TimeoutExpired as error:
        raise DryRunError(f"the dry run took more than {CHILD_S:g} s") from error
    except msgspec.DecodeError as error:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DryRunError(f"the dry run {host.exit_text(child.returncode)}: {last}") from error


# --- in the child ---


def answer(question: Question) -> Answer:
    options = question.options
    library = llama.open_library(options.library)
    # Where the matrices of adapters go follows from the layers, so there has to be room for them everywhere.
    more = model_files.adapter_bytes(options)
    devices = [
        replace(device, free_bytes=max(0, question.free.get(device.name, device.free_bytes) - more))
        for device in placement.usable(_devices(library))
    ]
    if not devices or not question.path:
        return Answer(devices=devices)
    parts = [gguf.read(str(part)) for part in model_files.parts(Path(question.path))]
    sizes = placement.sizes_of(parts)
    free_bytes = max(0, (question.free.get(RAM, 0) or host.free_memory_bytes()) - more)
    layout = model_files.unchecked_layout(options, parts[0], free_bytes, host.physical_cores())
    problem = ""
    while True:
        try:
            found = _place(question, layout, devices, sizes, purpose_of(parts[0]))
        except DoesNotFit as error:
            problem = problem or str(error)
            smaller = layout.context // 2
            if not error.host or options.context or smaller < model_files.MIN_CONTEXT:
                return Answer(f"{question.path} does not fit: {problem}", too_large=True)
            layout = replace(layout, context=smaller)
        else:
            return Answer(placement=found, context=layout.context, devices=devices)


def _devices(library: binding.Library) -> list[ComputeDevice]:
    return [
        ComputeDevice(each.name, each.description, each.free_bytes, each.total_bytes, each.kind == "igpu", each.address)
        for each in library.devices()
        if each.kind in ("gpu", "igpu")
    ]


def _place(
    question: Question, layout: Layout, devices: list[ComputeDevice], sizes: Sizes, purpose: Purpose
) -> Placement:
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
        measured = _measure(question.path, replace(layout, slots=plan.slots), plan, sizes, purpose)
        sizes = sizes.with_cache(plan.slots, measured.cache)
        now = measured.work(names)
        work = Work(max(work.device, now.device), max(work.host, now.host))
        chosen = placement.choose(wish, devices, sizes, work)
        if chosen.same_place(plan):
            return chosen
        plan = chosen
    return plan


def _measure(path: str, layout: Layout, plan: Placement, sizes: Sizes, purpose: Purpose) -> Measured:
    lines = llama.start_library().everything = []
    model = llama.Model(path, plan, dry=True)
    context: LlamaContext
    if purpose.kind == "generate":
        context = llama.Decoder(model, layout)
    else:
        context = Embedder(model, layout, layout.context, purpose)
    size = int(llama.lib.llama_model_size(model.handle))
    llama.lib.llama_free(context.handle)
    llama.lib.llama_model_free(model.handle)
    if abs(size - sizes.weights) > TOLERANCE * size:
        raise DryRunError(f"by its header the model has {sizes.weights} bytes of weights, by llama.cpp {size}")
    return read_log(lines, len(sizes.layers), cached=not purpose.is_encoder)


def main() -> None:
    host.end_with_parent(int(sys.argv[1]))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        result = answer(question)
    except (llama.LoadError, binding.LibraryError, gguf.BadModelFile, OSError) as error:
        result = Answer(str(error))
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(result))


if __name__ == "__main__":
    main()
