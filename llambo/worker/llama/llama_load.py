"""From a model's name to an engine that has proved itself: what happens in the engine child before READY."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable

from llambo.mesh.service import host
from llambo.worker.engine.protocol import CANNOT_LOAD, Configure, Progress
from llambo.worker.llama import defaults, llama
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.models import gguf, model_files
from llambo.worker.prompt.template import BadPrompt

log = logging.getLogger("llambo.engine")

#: Characters of the progress bar.
WIDTH = 30
#: By the number that a model made for embeddings has in its file. Others are not known here.
POOLINGS = {1: "mean", 3: "last"}


def load(configure: Configure, say: Callable[[Progress], None]) -> LlamaEngine:
    """What is wrong with the model is said, and ends this process: there is nothing else it could do."""
    try:
        return _load(configure, say)
    except (model_files.NoSuchModel, gguf.BadModelFile, llama.LoadError, BadPrompt, OSError) as error:
        say(Progress(problem=str(error)[:1000]))
        sys.exit(CANNOT_LOAD)


class Bar:
    """Progress for the agent, and for a person if one is looking."""

    def __init__(self, say: Callable[[Progress], None]) -> None:
        self._say = say
        self._drawn = False

    def __call__(self, progress: Progress) -> None:
        self._say(progress)
        if sys.stderr.isatty():
            percent = re.search(r"(\d+) %$", progress.note)
            if percent:
                done = int(percent[1]) * WIDTH // 100
                sys.stderr.write(f"\r[{'#' * done}{'.' * (WIDTH - done)}] {progress.note}")
            elif self._drawn:
                sys.stderr.write("\n")
            self._drawn = bool(percent)
            sys.stderr.flush()


def _load(configure: Configure, say: Callable[[Progress], None]) -> LlamaEngine:
    options, path = configure.llama, str(model_files.find(configure.model))
    say(Progress(f"looking at {path}"))
    file = gguf.read(path)
    layout = model_files.layout(options, file, host.free_memory_bytes(), host.physical_cores())
    bar = Bar(say)
    fingerprint = model_files.fingerprint(
        file, layout.context, options.kv_type, lambda percent: bar(Progress(f"computing the fingerprint: {percent} %"))
    )
    log.info(
        "%s: %d slots of %d tokens, %d threads, %d tokens in a step, %s cache, flash attention %s, %d layers on a GPU; "
        "needs %d MiB of %d",
        path, layout.slots, layout.context, layout.threads, layout.batch, options.kv_type, options.flash_attn,
        options.gpu_layers, layout.need_bytes // model_files.MIB, layout.free_bytes // model_files.MIB,
    )  # fmt: skip
    recommended, complaints = defaults.of_model(file.meta)
    log.info("%s", defaults.told(recommended))
    for complaint in complaints:
        log.info("not taken from the model: %s", complaint)
    shape = llama.Shape(
        layout.slots, layout.context, layout.batch, layout.threads, options.kv_type, options.flash_attn
    )  # fmt: skip
    return LlamaEngine(
        model_files.name_of(configure.model), path, shape,
        gpu_layers=options.gpu_layers, safe=configure.safe, fingerprint=fingerprint, defaults=recommended,
        embed_bytes=0 if options.gpu_layers else model_files.embed_need(options, file, layout.context),
        pooling=POOLINGS.get(file.number("pooling_type"), "mean"), say=bar,
    )  # fmt: skip
