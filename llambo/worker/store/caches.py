"""Where downloaded models are: the caches of Hugging Face and Ollama, which other programs share, and one of our own.

models--ORG--REPO/{blobs/SHA256, snapshots/COMMIT/PATH -> ../../blobs/SHA256, refs/main}      Hugging Face
manifests/REGISTRY/NAMESPACE/NAME/TAG, blobs/sha256-SHA256                                    Ollama
URL-HASH/{NAME.gguf, url}                                                                     ours, for https:
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.store import refs
from llambo.worker.store.refs import HubRef, OllamaRef, Ref, StoreError, UrlRef

#: The place of its models, for people.
OLLAMA = "Ollama"
OLLAMA_MODEL = "application/vnd.ollama.image.model"
#: Where Ollama keeps its models when it runs as a service.
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")
MANIFEST_BYTES = 1024 * 1024
#: Of a file.
Size = Annotated[int, Meta(ge=0, lt=2**50)]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def hub_home() -> Path:
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or str(_cache() / "huggingface"))).expanduser()


def hub_folder() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(named)).expanduser() if named else hub_home() / "hub"


def ollama_folder() -> Path:
    return Path(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models").expanduser()


def own_folder() -> Path:
    return _cache() / "llambo" / "models"


def repo_folder(repo: str) -> Path:
    return hub_folder() / f"models--{repo.replace('/', '--')}"


def url_file(ref: UrlRef) -> Path:
    """With a checksum in its name it is another file than without: that one was not compared with it."""
    first = str(ref.parts()[0])
    return own_folder() / hashlib.sha256(first.encode()).hexdigest()[:32] / ref.file


# --- what Ollama writes --------------------------------------------------------------------------------------


class OllamaLayer(msgspec.Struct, frozen=True):
    mediaType: str  # noqa: N815  # as in the file
    digest: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
    size: Size

    @property
    def sha256(self) -> str:
        return self.digest.removeprefix("sha256:")


class OllamaManifest(msgspec.Struct, frozen=True):
    layers: list[OllamaLayer]
    config: OllamaLayer | None = None

    def all(self) -> list[OllamaLayer]:
        return [*self.layers, *([self.config] if self.config else [])]

    @property
    def model(self) -> OllamaLayer | None:
        return next((layer for layer in self.layers if layer.mediaType == OLLAMA_MODEL), None)


def manifest_path(ref: OllamaRef, folder: Path) -> Path:
    return folder / "manifests" / ref.registry / ref.namespace / ref.name / ref.tag


def read_manifest(path: Path) -> OllamaManifest | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MANIFEST_BYTES), type=OllamaManifest)
    except (OSError, *UNDECODABLE):
        return None


def _manifests(folder: Path) -> Iterator[tuple[OllamaRef, Path]]:
    top = folder / "manifests"
    for path in sorted(top.glob("*/*/*/*")):
        registry, namespace, name, tag = path.relative_to(top).parts
        yield OllamaRef(name, tag, namespace, registry), path


# --- finding ---------------------------------------------------------------------------------------------------


def find(ref: Ref) -> Path | None:
    """The file to load; None if the model, or a part of it, is not on this host."""
    match ref:
        case HubRef():
            return next((snapshot / name for snapshot, (name, *_) in _snapshots(ref)), None)
        case OllamaRef():
            return next(filter(None, (_ollama_file(ref, each) for each in (ollama_folder(), OLLAMA_SERVICE))), None)
        case UrlRef():
            return url_file(ref) if all(os.path.isfile(url_file(part)) for part in ref.parts()) else None


def snapshot(ref: HubRef) -> tuple[Path, list[str]] | None:
    """The folder of the model that `find` finds, and its files."""
    return next(_snapshots(ref), None)


def _snapshots(ref: HubRef) -> Iterator[tuple[Path, list[str]]]:
    """Those that have the model, and its files: that of the main branch, then the newest."""
    folder = repo_folder(ref.repo)
    try:
        main = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        main = ""
    found = sorted((folder / "snapshots").glob("*"), key=lambda each: (each.name == main, each.lstat().st_mtime_ns))
    for snapshot in reversed(found):
        files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if os.path.isfile(path)]
        try:
            yield snapshot, refs.choose(files, ref)
        except StoreError:
            continue


def _ollama_file(ref: OllamaRef, folder: Path) -> Path | None:
    manifest = read_manifest(manifest_path(ref, folder))
    if manifest is None or manifest.model is None:
        return None
    path = ollama_blob(folder, manifest.model)
    return path if os.path.isfile(path) and path.stat().st_size == manifest.model.size else None


def ollama_blob(folder: Path, layer: OllamaLayer) -> Path:
    return folder / "blobs" / f"sha256-{layer.sha256}"


def listed() -> Iterator[tuple[Ref, Path, str]]:
    """The name, the file and the place of each model in a cache. Of a repository every file and state is listed."""
    for snapshot in sorted(hub_folder().glob("models--*--*/snapshots/*")):
        _, org, name = snapshot.parts[-3].split("--", 2)
        for path in sorted(snapshot.rglob("*.gguf")):
            if os.path.isfile(path):
                yield HubRef(f"{org}/{name}", file=str(path.relative_to(snapshot))), path, "Hugging Face cache"
    for folder in (ollama_folder(), OLLAMA_SERVICE):
        for ollama, _ in _manifests(folder):
            if blob := _ollama_file(ollama, folder):
                yield ollama, blob, OLLAMA
    for note in sorted(own_folder().glob("*/url")):
        try:
            ref = refs.parse(note.read_text(encoding="utf-8").strip())
        except (OSError, ValueError, StoreError):
            continue
        if isinstance(ref, UrlRef) and (file := find(ref)):
            yield ref, file, "downloads"


def ref_of(file: Path) -> Ref | None:
    """The name of a file that is in a cache."""
    return next((ref for ref, path, _ in listed() if path.samefile(file)), None)


# --- removing ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Removal:
    """What `remove` would delete: first the names, so that no program finds a model without its file."""

    names: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    #: Files that stay, because another model has them too.
    shared: list[Path] = field(default_factory=list)
    #: Folders that go if nothing is left in them.
    folders: list[Path] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(path.lstat().st_size for path in self.files)


def removal(ref: Ref) -> Removal:
    """Of the model with this name, in all its states, and of what is left of downloads of it."""
    match ref:
        case HubRef():
            return _hub_removal(ref)
        case OllamaRef():
            return _ollama_removal(ref, ollama_folder())
        case UrlRef():
            folder = url_file(ref).parent
            return Removal(files=sorted(folder.glob("*")), folders=[folder])


def _hub_removal(ref: HubRef) -> Removal:
    folder = repo_folder(ref.repo)
    everything = {path: _blob(path) for path in (folder / "snapshots").rglob("*") if not path.is_dir()}
    wanted = {name for _, names in _snapshots(ref) for name in names}
    gone = {path: blob for path, blob in everything.items() if _in_snapshot(path, folder)[1] in wanted}
    stays = everything.keys() - gone.keys()
    used, commits = {everything[path] for path in stays}, {_in_snapshot(path, folder)[0] for path in stays}
    blobs = {blob for blob in gone.values() if blob.parent == folder / "blobs" and os.path.lexists(blob)}
    found = Removal([*gone], sorted(blobs - used), sorted(blobs & used))
    found.names += [path for path in (folder / "refs").rglob("*") if path.is_file() and path.read_text() not in commits]
    if not stays:
        # Parts of downloads have the name of the blob to be, which tells nothing of the model.
        found.files += sorted((folder / "blobs").glob("*.part*"))
        found.names += sorted((folder / "trees").glob("*.json"))
    below = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    found.folders = [*sorted(below, key=lambda path: -len(path.parts)), folder]
    return found


def _in_snapshot(path: Path, folder: Path) -> tuple[str, str]:
    """The commit and the name of a file."""
    _, commit, *names = path.relative_to(folder).parts
    return commit, "/".join(names)


def _blob(path: Path) -> Path:
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def _ollama_removal(ref: OllamaRef, folder: Path) -> Removal:
    path = manifest_path(ref, folder)
    manifest = read_manifest(path)
    if manifest is None:
        return Removal()
    others = [read_manifest(each) for _, each in _manifests(folder) if each != path]
    # What a manifest that cannot be read refers to is unknown.
    used = {layer.digest for other in others for layer in (other or manifest).all()}
    blobs = {layer.digest: ollama_blob(folder, layer) for layer in manifest.all()}
    found = Removal([path], folders=[path.parent])
    for digest, blob in blobs.items():
        if blob.is_file():
            (found.shared if digest in used else found.files).append(blob)
    return found


def remove(found: Removal) -> None:
    for path in found.names:
        path.unlink(missing_ok=True)
    for path in found.files:
        path.unlink(missing_ok=True)
    for folder in found.folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
