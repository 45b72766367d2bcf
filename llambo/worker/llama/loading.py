"""From a model's name to an engine that is loaded and tested: what the engine child does before `Ready`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from llambo.mesh.service import host
from llambo.worker.engine.protocol import CANNOT_LOAD, Configure, Progress
from llambo.worker.llama import binding, dry_run, llama, sampling
from llambo.worker.llama.llama_engine import LlamaEngine, Setup
from llambo.worker.llama.llama_log import UnknownLog, read_log
from llambo.worker.llama.pooled_engine import PooledEngine
from llambo.worker.llama.prompt import BadPrompt
from llambo.worker.models import adapters, gguf, model_files
from llambo.worker.models.purpose import purpose_of

log = logging.getLogger("llambo.engine")

#: What a user can mend: its text says how.
UNUSABLE = (
    binding.LibraryError, model_files.NoSuchModel, gguf.BadModelFile, llama.LoadError, BadPrompt, OSError
)  # fmt: skip
#: What else a process may come to take after it was measured: prompts, grammars, rows of the vocabulary; and the agent.
GROWTH_BYTES = 32 * 1024 * 1024
#: Characters of the progress bar.
WIDTH = 30


def load(
    configure: Configure, send: Callable[[Progress], None], alive: Callable[[], None] = lambda: None
) -> LlamaEngine | PooledEngine:
    """If the model cannot be loaded, the reason is sent and the process exits. `alive`: to call in a long step."""
    try:
        return _load(configure, send, alive)
    except UNUSABLE as error:
        too_large = isinstance(error, (llama.NoMemory, model_files.TooLarge))
        send(Progress(problem=str(error)[:1000], out_of_memory=too_large))
        sys.exit(CANNOT_LOAD)


class ProgressBar:
    """Sends progress to the agent, and draws it if stderr is a terminal."""

    def __init__(self, send: Callable[[Progress], None], *, drawn: bool = True) -> None:
        self._send = send
        self._may_draw = drawn and sys.stderr.isatty()
        self._drawn = False

    def __call__(self, progress: Progress, percent: int = -1) -> None:
        """`percent`: how much is done of something that is not the loading of the model."""
        self._send(progress)
        if self._may_draw:
            percent = max(percent, progress.percent)
            if percent >= 0:
                done = percent * WIDTH // 100
                sys.stderr.write(f"\r[{'#' * done}{'.' * (WIDTH - done)}] {progress.note}")
            elif self._drawn:
                sys.stderr.write("\n")
            self._drawn = percent >= 0
            sys.stderr.flush()


def _most_memory(path: str, lines: list[str], file: gguf.ModelFile, setup: Setup) -> int:
    """What this process takes now, with what it may still come to take: weights that no token has needed yet, the
    buffers of a larger step than those of the self-test, the context for embeddings. 0: it is not known.

    llama.cpp fills its cache with zeros, so that is resident. If a version does not, the size in its log counts.
    `lines`: of that log.
    """
    llama.start_library().everything = None
    try:
        logged = read_log(lines, file.number("block_count", 1), cached=not setup.purpose.is_encoder)
    except UnknownLog as error:
        log.warning("what the model takes is not known: %s", error)
        return 0
    parts = {os.path.realpath(part) for part in model_files.parts(Path(path))}
    anonymous, mapped = host.own_memory(parts)
    return (
        max(anonymous, sum(logged.cache.values()))
        + sum(logged.buffers.values())
        + mapped
        + setup.embed_bytes
        + GROWTH_BYTES
    )


def _load(
    configure: Configure, send: Callable[[Progress], None], alive: Callable[[], None]
) -> LlamaEngine | PooledEngine:
    options, path = configure.llama, str(model_files.find(configure.model))
    library = llama.open_library(options.library)
    log.info("library: %s", library)
    send(Progress(f"looking at {path}"))
    file = gguf.read(path)
    purpose = purpose_of(file)
    if purpose.problem:
        raise llama.LoadError(f"{path} is {purpose.problem}")
    for adapter in options.adapters:  # before llama.cpp sees it: some of what may be wrong would end the process
        if problem := adapters.problem_of(adapter.path, path):
            raise llama.LoadError(f"the adapter {adapter.path} cannot be used with {path}: {problem}")
    bar = ProgressBar(send, drawn=not configure.hosted)
    # What is free on a GPU is true until the next worker of this machine allocates its model.
    shares_gpu = options.gpu_layers != 0 and library.supports_gpu
    with dry_run.taking_turns(bar) if shares_gpu else nullcontext():
        layout, placement, warning = dry_run.prepare(path, file, options, library)
        for text in filter(None, (warning, model_files.beyond_training(layout, file))) if configure.first else ():
            log.warning("%s", text)
        fingerprint = model_files.fingerprint(
            file,
            layout.context,
            options.kv_type,
            lambda percent: bar(Progress(f"computing the fingerprint: {percent} %"), percent),
        )
        log.info("%s: %s%s; %s", path, placement, f" ({placement.why})" if placement.why else "", layout)
        defaults, unusable = sampling.recommended(file.meta)
        if defaults:
            log.info("%s", sampling.describe(defaults))
        for text in unusable:
            log.info("ignored in the model file: %s", text)
        setup = Setup(
            name=configure.model_name,
            path=path,
            layout=layout,
            placement=placement,
            device_note="a GPU stays unused" if warning else str(placement) if shares_gpu else "",
            safe=configure.safe,
            fingerprint=fingerprint,
            defaults=defaults,
            embed_bytes=0 if placement.layers else model_files.embed_need(options, file, layout.context),
            purpose=purpose,
            adapters=options.adapters,
            measure=(lambda: 0) if placement.layers else lambda: _most_memory(path, lines, file, setup),
        )
        lines = llama.start_library().everything = []
        return LlamaEngine(setup, bar) if purpose.kind == "generate" else PooledEngine(setup, bar, alive)
