"""Which models a host can load, and the memory that each takes.

What is named in `--models` is a folder, or whatever `--model` takes: a file, a name of llambo.toml, `hf:`, a package;
with the fake engine `NAME[:MIB][:KIND][:MSms]`, a model without a file. A file of a folder is called what the file is
called, without `.gguf`. Of two files with the same name the second one has the name of its folder before its own.

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

from llambo.mesh.service import host
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.messages import Kind
from llambo.worker.config import RAM, WorkerConfig, mesh_name, shown_name
from llambo.worker.host.host_events import StoredModel
from llambo.worker.llama import dry_run
from llambo.worker.models import gguf, model_files, placement
from llambo.worker.models.purpose import purpose_of
from llambo.worker.store import refs

log = logging.getLogger(__name__)

MIB = 1024 * 1024
#: What of the free memory stays free, if no budget is configured: the larger of both.
MARGIN_BYTES, MARGIN_SHARE = placement.MARGIN_BYTES, placement.MARGIN_SHARE
_FAKE = re.compile(r"(?P<name>[^:]+)(?::(?P<mib>\d+))?(?::(?P<kind>generate|embed|rerank))?(?::(?P<ms>\d+)ms)?")


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
    """`named`: as in `--models`. `scan` may take seconds, and is called by one thread."""

    def __init__(
        self,
        named: tuple[str, ...],
        template: WorkerConfig,
        room: Capacity,
        aliases: Mapping[str, str] = model_files.NO_ALIASES,
    ) -> None:
        self._named = named
        self._aliases = aliases
        self._template = template
        self._room = room
        #: What was not found in the last scan, and what was left out of it: it is logged once.
        self._missing: set[str] = set()
        self._left_out: set[str] = set()
        #: What is known of each file, by its path, size and time.
        self._known: dict[tuple[str, int, int], Servable | None] = {}

    @property
    def missing_refs(self) -> tuple[str, ...]:
        """What was not found in the last scan, and can be downloaded."""
        found = (self._aliases.get(name, name) for name in self._named if name in self._missing)
        return tuple(name for name in found if refs.is_ref(name))

    def scan(self) -> dict[str, Servable]:
        """By the name in the mesh. Raises BadName."""
        if self._template.engine == "fake":
            models = [fake_model(name, self._template) for name in self._named]
            return {each.stored.name: each for each in models}
        found: dict[str, Servable] = {}
        known: dict[tuple[str, int, int], Servable | None] = {}
        left_out: list[str] = []
        for name, path in self._files():
            try:
                info = path.stat()
            except OSError:  # it was removed a moment ago
                continue
            key = (str(path), info.st_size, info.st_mtime_ns)
            known[key] = self._known[key] if key in self._known else self._look_at(path)
            servable = known[key]
            if servable is None:
                continue
            unique = name if name not in found else shown_name(f"{path.parent.name}/{name}")
            if unique in found:
                left_out.append(f"{path} is not served: there are other models called {name} and {unique}")
            elif len(found) >= limits.MODELS_PER_HOST:
                left_out.append(f"{path} is not served: a host has at most {limits.MODELS_PER_HOST} models")
                break
            else:
                found[unique] = _called(servable, unique)
        for text in left_out:
            if text not in self._left_out:
                log.warning("%s", printable(text))
        self._known, self._left_out = known, set(left_out)
        return found

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
        if is_folder(named, self._aliases):
            for path in _in_folder(named):
                yield mesh_name(str(path)), path
        else:
            found = model_files.resolve(named, self._aliases)
            yield found.served_as, found.path

    def _look_at(self, path: Path) -> Servable | None:
        """None: it is no model of its own."""
        config = replace(self._template, model=str(path))
        if not _is_text(str(path)):  # it could not be sent to an engine
            return Servable(StoredModel("", refusal="the name of its file is not UTF-8; rename it"), config)
        try:
            file = gguf.read(str(path))
            if model_files.part_of_another(file):
                return None
            if self._room.gpus:
                return self._measure(config, file)
            return self._estimate(config, file)
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
    fake = replace(template.fake, memory_bytes=size, load_ms=int(parts["ms"] or template.fake.load_ms), kind=kind)
    config = replace(template, model=parts["name"], fake=fake)
    stored = StoredModel("", kind, {RAM: size})
    return _called(Servable(stored, config), mesh_name(parts["name"]))


def is_folder(named: str, aliases: Mapping[str, str]) -> bool:
    return named not in aliases and named not in model_files.PACKAGED and Path(named).expanduser().is_dir()


def check_names(
    names: tuple[str, ...], template: WorkerConfig, aliases: Mapping[str, str] = model_files.NO_ALIASES
) -> None:
    """What is wrong at the start is a mistake. Raises BadName and NoSuchModel."""
    for name in names:
        if template.engine == "fake":
            fake_model(name, template)
        elif not is_folder(name, aliases) and not _is_downloadable(aliases.get(name, name)):
            model_files.resolve(name, aliases)


def _is_downloadable(name: str) -> bool:
    """The mesh brings it: a broker decides which host downloads it. Raises NoSuchModel."""
    try:
        return refs.parse(name) is not None
    except refs.StoreError as error:
        raise model_files.NoSuchModel(str(error), error.hint) from error


def has_model(names: tuple[str, ...], aliases: Mapping[str, str] = model_files.NO_ALIASES) -> bool:
    """Of names that were checked: whether one of them is more than a folder without models."""
    return any(not is_folder(name, aliases) or any(_in_folder(name)) for name in names)


def _in_folder(folder: str) -> Iterator[Path]:
    return (path for path in model_files.below(Path(folder).expanduser()) if refs.is_model(path.name))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _called(servable: Servable, name: str) -> Servable:
    stored = servable.stored
    return Servable(
        StoredModel(name, stored.kind, stored.needs, printable(stored.refusal)[:256]),
        replace(servable.config, served_as=name),
    )
