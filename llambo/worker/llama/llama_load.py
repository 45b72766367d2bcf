"""From a model's name to an engine that has proved itself: what happens in the engine child before READY."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from llambo.mesh.service import host
from llambo.worker.engine.engine_log import tell
from llambo.worker.engine.protocol import CANNOT_LOAD, Configure, Progress
from llambo.worker.llama import defaults, llama
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.models import gguf, models
from llambo.worker.prompt.template import BadPrompt

#: Characters of the progress bar.
WIDTH = 30
#: By the number that a model made for embeddings has in its file. Others are not known here.
POOLINGS = {1: "mean", 3: "last"}


def load(configure: Configure, say: Callable[[Progress], None]) -> LlamaEngine:
    """What is wrong with the model is said, and ends this process: there is nothing else it could do."""
    try:
        return _load(configure, say)
    except (models.NoSuchModel, gguf.BadModelFile, llama.LoadError, BadPrompt, OSError) as error:
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
    knobs, path = configure.llama, str(models.find(configure.model))
    say(Progress(f"looking at {path}"))
    file = gguf.read(path)
    layout = models.layout(knobs, file, host.free_memory_bytes(), host.physical_cores())
    bar = Bar(say)
    fingerprint = models.fingerprint(
        file, layout.context, knobs.kv_type, lambda percent: bar(Progress(f"computing the fingerprint: {percent} %"))
    )
    tell(
        f"{path}: {layout.slots} slots of {layout.context} tokens, {layout.threads} threads, {layout.batch} tokens in "
        f"a step, {knobs.kv_type} cache, flash attention {knobs.flash_attn}, {knobs.gpu_layers} layers on a GPU; "
        f"needs {layout.need_bytes // models.MIB} MiB of {layout.free_bytes // models.MIB}"
    )
    recommended, complaints = defaults.of_model(file.meta)
    tell(defaults.told(recommended))
    for complaint in complaints:
        tell(f"not taken from the model: {complaint}")
    shape = llama.Shape(
        layout.slots, layout.context, layout.batch, layout.threads, knobs.kv_type, knobs.flash_attn
    )  # fmt: skip
    return LlamaEngine(
        models.name_of(configure.model), path, shape,
        gpu_layers=knobs.gpu_layers, safe=configure.safe, fingerprint=fingerprint, defaults=recommended,
        embed_bytes=0 if knobs.gpu_layers else models.embed_need(knobs, file, layout.context),
        pooling=POOLINGS.get(file.number("pooling_type"), "mean"), say=bar,
    )  # fmt: skip
