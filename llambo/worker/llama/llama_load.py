"""From a model's name to an engine that is loaded and tested: what the engine child does before `Ready`."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable

from llambo.mesh.service import host
from llambo.worker.engine.protocol import CANNOT_LOAD, Configure, Progress
from llambo.worker.llama import llama, sampling_defaults
from llambo.worker.llama.llama_engine import LlamaEngine, Setup
from llambo.worker.models import gguf, model_files
from llambo.worker.prompt.template import BadPrompt

log = logging.getLogger("llambo.engine")

#: Characters of the progress bar.
WIDTH = 30
#: By the number in the file of an embedding model. Other numbers are treated as `mean`.
POOLINGS = {1: "mean", 3: "last"}


def load(configure: Configure, send: Callable[[Progress], None]) -> LlamaEngine:
    """If the model cannot be loaded, the reason is sent and the process exits."""
    try:
        return _load(configure, send)
    except (model_files.NoSuchModel, gguf.BadModelFile, llama.LoadError, BadPrompt, OSError) as error:
        send(Progress(problem=str(error)[:1000]))
        sys.exit(CANNOT_LOAD)


class ProgressBar:
    """Sends progress to the agent, and draws it if stderr is a terminal."""

    def __init__(self, send: Callable[[Progress], None]) -> None:
        self._send = send
        self._drawn = False

    def __call__(self, progress: Progress) -> None:
        self._send(progress)
        if sys.stderr.isatty():
            percent = re.search(r"(\d+) %$", progress.note)
            if percent:
                done = int(percent[1]) * WIDTH // 100
                sys.stderr.write(f"\r[{'#' * done}{'.' * (WIDTH - done)}] {progress.note}")
            elif self._drawn:
                sys.stderr.write("\n")
            self._drawn = bool(percent)
            sys.stderr.flush()


def _load(configure: Configure, send: Callable[[Progress], None]) -> LlamaEngine:
    options, path = configure.llama, str(model_files.find(configure.model))
    send(Progress(f"looking at {path}"))
    file = gguf.read(path)
    layout = model_files.layout(options, file, host.free_memory_bytes(), host.physical_cores())
    bar = ProgressBar(send)
    fingerprint = model_files.fingerprint(
        file, layout.context, options.kv_type, lambda percent: bar(Progress(f"computing the fingerprint: {percent} %"))
    )
    log.info(
        "%s: %d slots of %d tokens, %d threads, %d tokens in a step, %s cache, flash attention %s, %d layers on a GPU; "
        "needs %d MiB of %d",
        path, layout.slots, layout.context, layout.threads, layout.batch, options.kv_type, options.flash_attn,
        options.gpu_layers, layout.need_bytes // model_files.MIB, layout.free_bytes // model_files.MIB,
    )  # fmt: skip
    defaults, unusable = sampling_defaults.recommended(file.meta)
    log.info("%s", sampling_defaults.describe(defaults))
    for text in unusable:
        log.info("ignored in the model file: %s", text)
    shape = llama.Shape(
        slots=layout.slots,
        context=layout.context,
        batch=layout.batch,
        threads=layout.threads,
        kv_type=options.kv_type,
        flash_attn=options.flash_attn,
    )
    setup = Setup(
        name=model_files.name_of(configure.model),
        path=path,
        shape=shape,
        gpu_layers=options.gpu_layers,
        safe=configure.safe,
        fingerprint=fingerprint,
        defaults=defaults,
        embed_bytes=0 if options.gpu_layers else model_files.embed_need(options, file, layout.context),
        pooling=POOLINGS.get(file.number("pooling_type"), "mean"),
    )
    return LlamaEngine(setup, bar)
