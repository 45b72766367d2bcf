"""The models on this host: in packages, the working folder, a configured folder, and caches.

Only the header of each file is read. Whether a model can be loaded is reported as far as the header shows it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llambo.mesh.service import host
from llambo.worker.engine.engine_options import LlamaOptions
from llambo.worker.models import gguf, model_files
from llambo.worker.models.gguf import BadModelFile, ModelFile

#: Files that are read at most: a folder with more is not a folder of models.
FILES = 500
#: How deep a folder of models is searched. In a Hugging Face cache, files are four levels down.
DEPTH = 6
#: Names of `general.file_type`, as in llama.cpp.
QUANTISATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
#: Architectures of files that accompany a model and do not generate text.
HELPERS = {"clip": "a picture encoder, part of another model", "adapter": "an adapter, part of another model"}
#: A model in several files is loaded by the name of the first.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


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


def on_this_host(folder: str = "", options: LlamaOptions | None = None) -> list[Found]:
    """Each file once, even if it is reachable in several ways."""
    seen: set[str] = set()
    found = []
    free_bytes, cores = host.free_memory_bytes(), host.physical_cores()
    for model, path, where in _candidates(folder):
        real = os.path.realpath(path)
        if real not in seen and len(seen) < FILES:
            seen.add(real)
            found.append(look_at(model, path, where, options or LlamaOptions(), free_bytes, cores))
    return found


def look_at(model: str, path: Path, where: str, options: LlamaOptions, free_bytes: int, cores: int) -> Found:
    size = 0
    try:
        size = path.stat().st_size
        file = gguf.read(str(path))
    except (BadModelFile, OSError) as error:
        return Found(model, str(path), where, size, problem=_without_path(str(error), str(path)))
    problem = "" if model_files.installed() else "llama.cpp is not installed: pip install 'llambo[llama]'"
    problem = problem or HELPERS.get(str(file.meta.get("general.type", ""))) or HELPERS.get(file.architecture) or ""
    try:
        model_files.layout(options, file, free_bytes, cores)
    except BadModelFile as error:
        problem = problem or _without_path(str(error), str(path))
    return Found(
        model, str(path), where, _all_parts(path, file), file.architecture, _quantisation(file), file.trained_context,
        problem,
    )  # fmt: skip


def _without_path(text: str, path: str) -> str:
    """The path is shown in a column of its own."""
    return f"it{text.removeprefix(path)}" if text.startswith(f"{path} ") else text


def _quantisation(file: ModelFile) -> str:
    number = file.meta.get("general.file_type")
    return QUANTISATIONS.get(number, f"type {number}") if isinstance(number, int) else ""


def _all_parts(path: Path, file: ModelFile) -> int:
    part = _PART.search(path.name)
    if part is None:
        return file.size_bytes
    others = path.parent.glob(f"{path.name[: part.start()]}-*-of-{part[2]}.gguf")
    return sum(other.stat().st_size for other in others)


def _candidates(folder: str) -> Iterator[tuple[str, Path, str]]:
    for name in model_files.PACKAGED:
        path = model_files.packaged(name)
        if path is not None:
            yield name, path, "package"
    for top, where, depth in _folders(folder):
        for path in _files(top, depth):
            part = _PART.search(path.name)
            if part is None or part[1] == "00001":
                yield str(path), path, where


def _folders(folder: str) -> list[tuple[Path, str, int]]:
    """Folders, their names for people, and how deep they are searched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    llama_cpp = Path(os.environ.get("LLAMA_CACHE") or cache / "llama.cpp").expanduser()
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE") or hub).expanduser()
    named = [(Path(folder).expanduser(), "models folder", DEPTH)] if folder else []
    return [
        *named, (Path(), "working folder", 1), (llama_cpp, "llama.cpp cache", 2), (hub, "Hugging Face cache", DEPTH)
    ]  # fmt: skip


def _files(top: Path, depth: int) -> Iterator[Path]:
    """GGUF files below this folder, sorted. Unreadable folders and files are skipped."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(folders) if len(Path(folder).relative_to(top).parts) < depth - 1 else []
        for name in sorted(files):
            path = Path(folder, name)
            if name.lower().endswith(".gguf") and path.is_file():
                yield path
