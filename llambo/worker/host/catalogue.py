"""Which models a host can load, and the memory that each takes.

What is named in `--models` is a folder, or whatever `--model` takes: a file, a name of llambo.toml, `hf:`, a package;
or `all`, which is what `llambo models` lists of this machine, so that a model can be asked for once it is downloaded;
with the fake engine `NAME[+ADAPTER...][:MIB][:KIND][:MSms]`, a model without a file. A file of a folder is called what
the file is called, without `.gguf`; of two files with the same name the second one has the name of its folder before
its own. Adapters among the files are served with the models that they belong to.

The number of slots and the context are chosen here, as for a model that has the whole budget, and the engine gets them
as they are. So a model takes the same memory whatever is loaded beside it, and its answers can move between hosts with
the same budget. Where there is a GPU llama.cpp measures it (`llama/dry_run.py`), elsewhere the header of the file has
the sizes. A file is looked at again when it has changed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llambo.mesh.service import host
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.messages import Kind
from llambo.mesh.wire.naming import PLUS
from llambo.worker.config import RAM, Adapter, WorkerConfig, mesh_name, shown_name
from llambo.worker.host.host_events import StoredModel
from llambo.worker.llama import dry_run
from llambo.worker.models import adapters, gguf, model_files, placement
from llambo.worker.models.purpose import purpose_of
from llambo.worker.store import refs

log = logging.getLogger(__name__)

MIB = 1024 * 1024
#: Every model of this machine. A folder of that name is `./all`.
ALL = "all"
#: What of the free memory stays free, if no budget is configured: the larger of both.
MARGIN_BYTES, MARGIN_SHARE = placement.MARGIN_BYTES, placement.MARGIN_SHARE
_FAKE = re.compile(r"(?P<name>[^:]+)(?::(?P<mib>\d+))?(?::(?P<kind>generate|embed|rerank))?(?::(?P<ms>\d+)ms)?")


#: Path, size and time of a file.
_Key = tuple[str, int, int]


class BadName(Exception):
    """A name in `--models` that cannot be understood; the text says why."""


@dataclass(frozen=True, slots=True)
class Servable:
    """A model, and how its worker is configured."""

    stored: StoredModel
    config: WorkerConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory of this host for models: the budget, and what was free on each GPU when that was fixed."""

    budget: dict[str, int]
    free: dict[str, int]
    #: There are GPUs, which layers are to be put on.
    gpus: bool = False


def capacity(template: WorkerConfig, memory_bytes: int) -> Capacity:
    """`memory_bytes`: of the host; 0: what is free now, but for a margin. Raises DryRunError."""
    if not memory_bytes:
        free = host.free_memory_bytes()
        memory_bytes = max(0, free - max(MARGIN_BYTES, int(free * MARGIN_SHARE)))
    if template.engine != "llama" or template.llama.gpu_layers == 0:
        return Capacity({RAM: memory_bytes}, {RAM: memory_bytes})
    devices = dry_run.find_placement("", template.llama).devices
    wish = placement.Wish(None, 1, device_limit=template.llama.gpu_bytes)
    budget = {each.name: placement.room(each, wish) for each in devices if not each.integrated}
    there = {each.name: each.free_bytes for each in devices}
    return Capacity({RAM: memory_bytes} | budget, {RAM: memory_bytes} | there, bool(devices))


class Catalogue:
    """`named`: as in `--models`. `folder`: of models, beside the usual ones, for `ALL`. `scan` may take seconds, and is
    called by one thread."""

    def __init__(
        self,
        named: tuple[str, ...],
        template: WorkerConfig,
        room: Capacity,
        aliases: Mapping[str, str] = model_files.NO_ALIASES,
        folder: str = "",
    ) -> None:
        self._named = named
        self._folder = folder
        self._aliases = aliases
        self._template = template
        self._room = room
        #: What was not found in the last scan, and what was left out of it: it is logged once.
        self._missing: set[str] = set()
        self._left_out: set[str] = set()
        self._matches = adapters.Matches(aliases)
        #: Of files that this scan has read.
        self._headers: dict[_Key, gguf.ModelFile] = {}
        #: What is known of each file, by its path, size and time; of a model also by its name and its adapters.
        self._what: dict[_Key, Literal["model", "adapter", "part"]] = {}
        self._known: dict[tuple[str, tuple[_Key, tuple[Adapter, ...]]], Servable] = {}

    @property
    def missing_refs(self) -> tuple[str, ...]:
        """What was not found in the last scan, and can be downloaded."""
        found = (self._aliases.get(name, name) for name in self._named if name in self._missing)
        return tuple(name for name in found if refs.is_ref(name))

    def scan(self) -> dict[str, Servable]:
        """By the name in the mesh. Raises BadName."""
        if self._template.engine == "fake":
            fakes = [fake_model(name, self._template) for name in self._named]
            return {each.stored.name: each for each in fakes}
        models, adapter_files = self._sorted()
        matched = self._matches.find({name: str(path) for name, (path, _) in models.items()}, adapter_files)
        known = {}
        for name, (path, key) in models.items():
            mine = key, matched[name]
            known[name, mine] = self._known.get((name, mine)) or _called(self._look_at(path, key, matched[name]), name)
        self._known = known
        self._headers.clear()
        return {name: servable for (name, _), servable in known.items()}

    def _sorted(self) -> tuple[dict[str, tuple[Path, _Key]], dict[str, str]]:
        """The files of models, and those of adapters, by their names."""
        models: dict[str, tuple[Path, _Key]] = {}
        adapter_files: dict[str, str] = {}
        left_out: list[str] = []
        for name, path in self._files():
            try:
                info = path.stat()
            except OSError:  # it was removed a moment ago
                continue
            key = (str(path), info.st_size, info.st_mtime_ns)
            what = self._what_it_is(path, key)
            if what == "adapter" and _is_text(str(path)):
                adapter_files.setdefault(name, str(path))
            if what != "model":
                continue
            unique = name if name not in models else shown_name(f"{path.parent.name}/{name}")
            if unique in models:
                left_out.append(f"{path} is not served: there are other models called {name} and {unique}")
            elif len(models) >= limits.MODELS_PER_HOST:
                left_out.append(f"{path} is not served: a host has at most {limits.MODELS_PER_HOST} models")
                break
            else:
                models[unique] = path, key
        for text in left_out:
            if text not in self._left_out:
                log.warning("%s", printable(text))
        self._left_out = set(left_out)
        return models, adapter_files

    def _what_it_is(self, path: Path, key: _Key) -> Literal["model", "adapter", "part"]:
        if key not in self._what:
            try:
                file = self._headers[key] = gguf.read(str(path))
                part = bool(model_files.part_of_another(file))
                self._what[key] = "adapter" if file.is_adapter else "part" if part else "model"
            except (gguf.BadModelFile, OSError):
                self._what[key] = "model"  # which cannot be loaded
        return self._what[key]

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Each file once, in the order of the names."""
        seen = set()
        for named in self._named:
            try:
                models = list(self._named_by(named))
            except model_files.NoSuchModel as error:
                if named not in self._missing:
                    log.warning("%s", error)
                    self._missing.add(named)
                continue
            self._missing.discard(named)
            for name, path in models:
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    yield name, path

    def _named_by(self, named: str) -> Iterator[tuple[str, Path]]:
        """Raises NoSuchModel."""
        if is_all(named, self._aliases):
            yield from model_files.served_names(self._folder, self._aliases)
        elif is_folder(named, self._aliases):
            for path in _in_folder(named):
                yield mesh_name(str(path)), path
        else:
            found = model_files.resolve(named, self._aliases)
            yield found.served_as, found.path

    def _look_at(self, path: Path, key: _Key, its: tuple[Adapter, ...]) -> Servable:
        config = replace(self._template, model=str(path), llama=replace(self._template.llama, adapters=its))
        if not _is_text(str(path)):  # it could not be sent to an engine
            return Servable(StoredModel("", refusal="the name of its file is not UTF-8; rename it"), config)
        try:
            file = self._headers.get(key) or gguf.read(str(path))
            return self._measure(config, file) if self._room.gpus else self._estimate(config, file)
        except (gguf.BadModelFile, dry_run.DryRunError, OSError) as error:
            return Servable(StoredModel("", refusal=str(error)), config)

    def _estimate(self, config: WorkerConfig, file: gguf.ModelFile) -> Servable:
        """By the header of the file. Raises TooLarge."""
        options, cores = config.llama, host.physical_cores()
        wanted = model_files.unchecked_layout(options, file, 0, cores)
        purpose = purpose_of(file)
        # Of a model that generates, the context for embeddings is created when the first one is requested. Other parts
        # of the model are not in the size of the first file.
        more = model_files.embed_need(options, file, wanted.context) if purpose.kind == "generate" else 0
        more += sum(part.stat().st_size for part in model_files.parts(Path(config.model))[1:])
        layout = model_files.layout(options, file, self._room.budget[RAM] - more, cores)
        fixed = replace(options, slots=layout.slots, context=layout.context, fewer_slots=False)
        needs = {RAM: layout.need_bytes + more}
        return Servable(StoredModel("", purpose.kind, needs, purpose.problem), replace(config, llama=fixed))

    def _measure(self, config: WorkerConfig, file: gguf.ModelFile) -> Servable:
        """By llama.cpp, with all devices as free as they were at the start. Raises DryRunError."""
        purpose = purpose_of(file)
        answer = dry_run.find_placement(config.model, config.llama, self._room.free)
        if answer.placement is None:
            reason = answer.problem or "the GPU is gone"
            return Servable(StoredModel("", purpose.kind, refusal=reason), config)
        chosen, budget = answer.placement, self._room.budget
        needs = {RAM: chosen.host_bytes}
        needs |= {share.name: share.used_bytes for share in chosen.shares if share.name in budget}
        more = model_files.adapter_bytes(config.llama)  # each layer has its part where the layer is
        needs = {name: size + more for name, size in needs.items()}
        layers = config.llama.gpu_layers if chosen.host_experts else chosen.layers
        fixed = replace(config.llama, slots=chosen.slots, context=answer.context, fewer_slots=False, gpu_layers=layers)
        return Servable(StoredModel("", purpose.kind, needs, purpose.problem), replace(config, llama=fixed))


def fake_model(text: str, template: WorkerConfig) -> Servable:
    """Raises BadName."""
    parts = _FAKE.fullmatch(text)
    if parts is None:
        raise BadName(f"{text!r} is not NAME, NAME:MIB, or NAME:MIB:KIND:MSms")
    size = int(parts["mib"] or 0) * MIB
    kinds: dict[str, Kind] = {"generate": "generate", "embed": "embed", "rerank": "rerank"}
    kind = kinds[parts["kind"]] if parts["kind"] else template.fake.kind
    model, *names = parts["name"].split(PLUS)
    fake = replace(
        template.fake, memory_bytes=size, load_ms=int(parts["ms"] or template.fake.load_ms), kind=kind,
        adapters=tuple(Adapter(name, name) for name in names),
    )  # fmt: skip
    config = replace(template, model=model, fake=fake)
    return _called(Servable(StoredModel("", kind, {RAM: size}), config), mesh_name(model))


def is_all(named: str, aliases: Mapping[str, str]) -> bool:
    return named == ALL and named not in aliases


def is_folder(named: str, aliases: Mapping[str, str]) -> bool:
    return named not in aliases and named not in model_files.PACKAGED and Path(named).expanduser().is_dir()


def check_names(
    names: tuple[str, ...], template: WorkerConfig, aliases: Mapping[str, str] = model_files.NO_ALIASES
) -> None:
    """What is wrong at the start is a mistake. Raises BadName and NoSuchModel."""
    for name in names:
        if template.engine == "fake":
            fake_model(name, template)
        elif is_all(name, aliases) or is_folder(name, aliases):
            continue
        elif not _is_downloadable(aliases.get(name, name)):
            model_files.resolve(name, aliases)


def _is_downloadable(name: str) -> bool:
    """The mesh brings it: a broker decides which host downloads it. Raises NoSuchModel."""
    try:
        return refs.parse(name) is not None
    except refs.StoreError as error:
        raise model_files.NoSuchModel(str(error), error.hint, malformed=error.malformed) from error


def has_model(names: tuple[str, ...], aliases: Mapping[str, str] = model_files.NO_ALIASES, folder: str = "") -> bool:
    """Of names that were checked: whether one of them is more than a folder, or a machine, without models."""

    def is_there(name: str) -> bool:
        if is_all(name, aliases):
            return any(model_files.served_names(folder, aliases))
        return not is_folder(name, aliases) or any(_in_folder(name))

    return any(map(is_there, names))


def _in_folder(folder: str) -> Iterator[Path]:
    return (path for path in model_files.below(Path(folder).expanduser()) if refs.is_model(path.name))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _called(servable: Servable, name: str) -> Servable:
    stored, config = servable.stored, replace(servable.config, served_as=name)
    its = tuple(adapter.name for adapter in config.adapters)
    return Servable(StoredModel(name, stored.kind, stored.needs, printable(stored.refusal)[:256], its), config)
