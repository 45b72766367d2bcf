"""Adapters (LoRA): which model a file belongs to, by its header, and which a worker of a model gets.

llama.cpp ends the process where a value of the metadata has another type than it expects, so this is checked here
first. It would also find most of the rest, but only when the model is loaded: a folder is looked through before that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.naming import PLUS, is_adapter_name, with_adapter
from llambo.worker.config import Adapter, mesh_name
from llambo.worker.models import gguf
from llambo.worker.models.gguf import BadModelFile, ModelFile
from llambo.worker.models.model_files import NoSuchModel, find, parts
from llambo.worker.models.purpose import purpose_of

log = logging.getLogger(__name__)

_A, _B = ".lora_a", ".lora_b"
#: Keys that llama.cpp reads, and the kinds of their values.
_KINDS = {"general.type": gguf.STRING, "adapter.type": gguf.STRING, "adapter.lora.alpha": gguf.F32}


class BadAdapter(Exception):
    """An adapter that cannot be used as it was named; the text says why."""


def named(text: str) -> tuple[Adapter, ...]:
    """`NAME=FILE,NAME=FILE`, as `--lora` has them. Raises BadAdapter."""
    found: dict[str, Adapter] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, path = part.partition("=")
        name = name if equals else mesh_name(part)
        path = path if equals else part
        if not is_adapter_name(name) or not path:
            raise BadAdapter(f"{part!r} is not NAME=FILE, with a name that has no space, +, @, comma, colon or slash")
        if name in found:
            raise BadAdapter(f"two adapters are called {name!r}")
        found[name] = Adapter(name, path)
    if len(found) > limits.ADAPTERS:
        raise BadAdapter(f"{len(found)} adapters, and a worker has at most {limits.ADAPTERS}")
    return tuple(found.values())


def of_model(served_as: str, given: Iterable[Adapter], aliases: Mapping[str, str]) -> tuple[Adapter, ...]:
    """Those that are given, and those of llambo.toml: `"smollm2+pirate" = "FILE"`. Raises BadAdapter, NoSuchModel."""
    found = {each.name: Adapter(each.name, str(_file(each.path))) for each in given}
    for alias, target in aliases.items():
        model, plus, name = alias.rpartition(PLUS)
        if plus and model == served_as and name not in found:
            if not is_adapter_name(name):
                raise BadAdapter(f"{alias!r} in llambo.toml does not end in the name of an adapter")
            found[name] = Adapter(name, str(_file(target)))
    if len(found) > limits.ADAPTERS:
        raise BadAdapter(f"{served_as} has {len(found)} adapters, and a worker has at most {limits.ADAPTERS}")
    for name in found:
        if len(with_adapter(served_as, name)) > limits.NAME_CHARS:
            raise BadAdapter(
                f"the name {with_adapter(served_as, name)!r} is longer than {limits.NAME_CHARS} characters"
            )
    return tuple(found.values())


def _file(path: str) -> Path:
    try:
        return find(path)
    except NoSuchModel as error:
        raise NoSuchModel(f"adapter {path}: {error}", error.hint, malformed=error.malformed) from error


def problem_of(path: str, base: str) -> str:
    """Why this adapter cannot be used with this model; empty if it can, as far as the headers show it."""
    try:
        return misfit(gguf.read(path), gguf.read(base), shapes_of(base))
    except (BadModelFile, OSError) as error:
        return str(error)


def shapes_of(base: str) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a model, which may be in several files."""
    return {name: each.shape for part in parts(Path(base)) for name, each in gguf.read(str(part)).shapes.items()}


def misfit(file: ModelFile, base: ModelFile, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if not file.is_adapter:
        return "it is no adapter (general.type)"
    for key, kind in _KINDS.items():
        if file.kinds.get(key, kind) != kind:
            return f"it is damaged: {key} has a value of another type"
    if (name := file.meta.get("adapter.type")) != "lora":
        return f"it is an adapter of type {name!r}, and only lora is supported"
    if "adapter.alora.invocation_tokens" in file.meta:
        return "it is an activated LoRA, which works from certain tokens on; that is not supported"
    if purpose_of(base).kind != "generate":
        return "the model does not generate text"
    if file.architecture != base.architecture:
        return f"it is for models of the architecture {file.architecture}, and this one is {base.architecture}"
    return _misfit_of_tensors(file, shapes)


def _misfit_of_tensors(file: ModelFile, shapes: Mapping[str, tuple[int, ...]]) -> str:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in file.shapes.items():
        suffix = name[-len(_A) :]
        if suffix in (_A, _B):
            if len(tensor.shape) != 2 or not gguf.is_number(tensor.kind):
                return f"{name} is no matrix of numbers"
            pairs.setdefault(name.removesuffix(suffix), {})[suffix] = tensor.shape
        elif not name.endswith("_norm.weight"):
            return f"{name} is no tensor of a LoRA"
    if not pairs:
        return "it has no tensors"
    for name, pair in pairs.items():
        if len(pair) < 2:
            return f"one of both matrices for {name} is missing"
        if name not in shapes:
            return f"it changes {name}, which the model does not have: it is for another model"
        a, b, whole = pair[_A], pair[_B], shapes[name][:2]
        # The embeddings of tokens are looked up, not multiplied, so both matrices are transposed.
        wanted = (b[1], a[1]) if name.endswith("token_embd.weight") else (a[0], b[1])
        inner = (a[0], b[0]) if name.endswith("token_embd.weight") else (a[1], b[0])
        if inner[0] != inner[1] or wanted != whole:
            return f"its matrices for {name} are {a} and {b}, and that of the model is {whole}: it is for another model"
    return ""


class _Match(NamedTuple):
    problem: str
    #: The adapter says that it was made for this model.
    named: bool = False


class Matches:
    """Which adapters a host serves with which models.

    One of a folder belongs to the models that it fits. If it says which one it was made for (`general.base_model`), and
    that is among them, only to this one. Each pair of files is compared once, and each warning is logged once.
    """

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._known: dict[tuple[tuple[str, int, int], tuple[str, int, int]], _Match] = {}
        self._warned: set[str] = set()

    def find(self, models: Mapping[str, str], files: Mapping[str, str]) -> dict[str, tuple[Adapter, ...]]:
        """`models`, `files`: the path of each model and adapter, by its name."""
        found: dict[str, dict[str, str]] = {model: {} for model in models}
        for name, path in files.items():
            pairs = {model: self._match(path, base) for model, base in models.items()}
            fitting = [model for model, match in pairs.items() if not match.problem]
            for model in [model for model in fitting if pairs[model].named] or fitting:
                self._add(found[model], model, name, path)
            if not fitting:
                reasons = {match.problem for match in pairs.values()}
                why = reasons.pop() if len(reasons) == 1 else "it fits none of the models"
                self._warn(f"the adapter {path} is not served: {why}")
        for alias, target in self._aliases.items():
            model, plus, name = alias.rpartition(PLUS)
            if not plus or model not in models:
                continue
            try:
                path = str(_file(target))
            except NoSuchModel as error:
                self._warn(str(error))
                continue
            if problem := self._match(path, models[model]).problem:
                self._warn(f"the adapter {alias} is not served: {problem}")
            else:
                self._add(found[model], model, name, path)
        return {model: tuple(Adapter(*each) for each in sorted(its.items())) for model, its in found.items()}

    def _add(self, its: dict[str, str], model: str, name: str, path: str) -> None:
        if not is_adapter_name(name) or len(with_adapter(model, name)) > limits.NAME_CHARS:
            self._warn(f"the adapter {path} is not served: {with_adapter(model, name)!r} is not a name for it")
        elif name not in its and len(its) >= limits.ADAPTERS:
            self._warn(f"the adapter {path} is not served: a model has at most {limits.ADAPTERS}")
        else:
            its[name] = path

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", printable(text))

    def _match(self, path: str, base: str) -> _Match:
        try:
            key = _key(path), _key(base)
            if key not in self._known:
                self._known[key] = _compare(path, base)
            return self._known[key]
        except OSError as error:  # it was removed a moment ago
            return _Match(str(error))


def _key(path: str) -> tuple[str, int, int]:
    info = Path(path).stat()
    return path, info.st_size, info.st_mtime_ns


def _compare(path: str, base: str) -> _Match:
    try:
        file, model = gguf.read(path), gguf.read(base)
        problem = misfit(file, model, shapes_of(base))
    except BadModelFile as error:
        return _Match(str(error))
    own = {mesh_name(base), str(model.meta.get("general.name", ""))} - {""}
    made_for = {
        str(file.meta.get(f"general.base_model.0.{key}", "")).rpartition("/")[2] for key in ("name", "repo_url")
    }
    return _Match(problem, bool(own & made_for))
