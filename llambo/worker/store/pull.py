"""Bring a model to this host: what a name stands for at its source, the download, and its place in a cache."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Meta

from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.store import caches, refs
from llambo.worker.store.caches import OllamaManifest, Size
from llambo.worker.store.chunk_sums import digest
from llambo.worker.store.part_file import Blob, Watcher, cannot_write, check_room, download, fetch, sync_folder
from llambo.worker.store.refs import HubRef, OllamaRef, Ref, StoreError, UrlRef, is_loopback, shown
from llambo.worker.store.web import Web, persevere

HUB = "https://huggingface.co"
OLLAMA_ACCEPT = "application/vnd.docker.distribution.manifest.v2+json"
#: Pages of the list of files of a repository.
PAGES = 50
T = TypeVar("T")
_YES = ("1", "on", "yes", "true")


class FileFacts(NamedTuple):
    """A file of a model, as its source or another host describes it. Without a sha256 the source has none."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Download:
    """What has to be downloaded for a model, and what gives it its name then."""

    web: Web
    blobs: list[Blob]
    folder: Path
    publish: Callable[[], None]
    #: With these a host without access to the source can store the model under its name.
    commit: str = ""
    manifest: bytes = b""

    @property
    def facts(self) -> list[FileFacts]:
        return [FileFacts(blob.name, blob.size, blob.sha256) for blob in self.blobs]

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.blobs)

    @property
    def missing(self) -> int:
        return sum(blob.missing for blob in self.blobs)


def plan(ref: Ref, watcher: Watcher) -> Download:
    """Ask the source. Raises StoreError, also if the disk is too small."""
    if _is_set("HF_HUB_OFFLINE"):
        if path := caches.find(ref):
            return Download(Web(""), [], path.parent, lambda: None)
        raise StoreError(f"{ref} is not downloaded: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    match ref:
        case HubRef():
            made = _hub(ref, watcher)
        case OllamaRef():
            made = _ollama(ref, watcher)
        case UrlRef():
            made = _url(ref, watcher)
    check_room(made.blobs, made.folder)
    return made


def carry_out(made: Download, ref: Ref, watcher: Watcher) -> Path:
    for blob in made.blobs:
        fetch(blob, partial(download, blob=blob, web=made.web, watcher=watcher), watcher)
    return publish(made, ref)


def publish(made: Download, ref: Ref) -> Path:
    """Its files are here: give the model its name. Returns the file to load."""
    try:
        made.publish()
    except OSError as error:
        raise cannot_write(error, made.folder) from error
    path = caches.find(ref)
    if path is None:
        raise StoreError(
            f"{ref} was downloaded to {made.folder}, and is not there any more", "run the same command again"
        )
    return path


def described(ref: Ref, facts: list[FileFacts], commit: str, manifest: bytes) -> Download:
    """As `plan`, by what another host has stated. Raises StoreError if it is not what the name says."""
    match ref:
        case HubRef():
            made = _hub_made(ref, commit, facts)
        case OllamaRef():
            made = _ollama_made(ref, manifest, caches.ollama_folder())
        case UrlRef():
            made = _url_made(ref, [(each, "") for each in facts])
    if made.facts != facts or any(not refs.SHA256.fullmatch(each.sha256) for each in facts):
        raise StoreError(f"another host describes {ref} as something else than its name says")
    return made


def here(ref: Ref) -> Download | None:
    """As `described`, of a model that is here; None if it is not, or not as our downloads and those of others are."""
    try:
        made = _here(ref)
    except (OSError, StoreError):
        return None
    return made if made and all(blob.sha256 and blob.is_here() for blob in made.blobs) else None


def _here(ref: Ref) -> Download | None:
    match ref:
        case HubRef():
            if (found := caches.snapshot(ref)) is None:
                return None
            snapshot, names = found
            paths = [(name, (snapshot / name).resolve()) for name in names]
            return _hub_made(ref, snapshot.name, [FileFacts(name, p.stat().st_size, p.name) for name, p in paths])
        case OllamaRef():
            for folder in (caches.ollama_folder(), caches.OLLAMA_SERVICE):
                if (path := caches.manifest_path(ref, folder)).is_file():
                    return _ollama_made(ref, path.read_bytes(), folder)
            return None
        case UrlRef():
            files = [(part, caches.url_file(part)) for part in ref.parts()]
            facts = [FileFacts(part.file, path.stat().st_size, part.sha256 or digest(path)) for part, path in files]
            return _url_made(ref, [(each, "") for each in facts])


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _YES


# --- Hugging Face ----------------------------------------------------------------------------------------------


class _Lfs(msgspec.Struct, frozen=True):
    oid: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: Size


class _Entry(msgspec.Struct, frozen=True):
    path: str
    type: str = "file"
    lfs: _Lfs | None = None


class _Revision(msgspec.Struct, frozen=True):
    sha: Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]


_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_token() -> str:
    """From the places where huggingface_hub looks; empty if there is none."""
    if _is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return ""
    named = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    path = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or str(caches.hub_home() / "token"))).expanduser()
    try:
        return (named or path.read_text(encoding="utf-8")).strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"the token of Hugging Face in {path} cannot be read", "hf auth login, or set HF_TOKEN"
        ) from error


def _endpoint() -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    if urlsplit(endpoint).scheme not in ("https", "http") or not urlsplit(endpoint).hostname:
        raise StoreError(f"HF_ENDPOINT is {endpoint!r}, which is not a URL", f"such as {HUB}")
    return endpoint


def _hub(ref: HubRef, watcher: Watcher) -> Download:
    web, endpoint = _hub_web(ref)
    api = f"{endpoint}/api/models/{ref.repo}"
    commit = _ask(web, f"{api}/revision/main", _Revision, watcher)[0].sha
    entries: dict[str, _Entry] = {}
    url = f"{api}/tree/{commit}?recursive=true"
    for _ in range(PAGES):
        page, _, url = _ask(web, url, list[_Entry], watcher)
        entries |= {each.path: each for each in page if each.type == "file" and refs.is_safe_path(each.path)}
        if not url:
            break
    facts = []
    for name in refs.choose(entries, ref):
        if (lfs := entries[name].lfs) is None:
            raise StoreError(f"{ref.repo}/{name} has no checksum at the server", "choose another file or repository")
        facts.append(FileFacts(name, lfs.size, lfs.oid))
    return _hub_made(ref, commit, facts)


def _hub_web(ref: HubRef) -> tuple[Web, str]:
    endpoint = _endpoint()
    return Web(shown(f"{endpoint}/{ref.repo}"), token=hub_token(), token_for=endpoint), endpoint


def _hub_made(ref: HubRef, commit: str, facts: list[FileFacts]) -> Download:
    """Raises StoreError if these are not the files of the model."""
    web, endpoint = _hub_web(ref)
    names = refs.choose([each.path for each in facts if refs.is_safe_path(each.path)], ref)
    if names != [each.path for each in facts] or not _COMMIT.fullmatch(commit):
        raise StoreError(f"{ref}: these are not its files")
    folder = caches.repo_folder(ref.repo)
    locks = folder.parent / ".locks" / folder.name
    blobs = [
        Blob(each.path, f"{endpoint}/{ref.repo}/resolve/{commit}/{quote(each.path)}", each.size,
             folder / "blobs" / each.sha256, locks / f"{each.sha256}.lock", each.sha256)
        for each in facts
    ]  # fmt: skip

    def publish() -> None:
        _publish(folder, commit, dict(zip(names, blobs, strict=True)))

    return Download(web, blobs, folder, publish, commit)


def _publish(folder: Path, commit: str, blobs: dict[str, Blob]) -> None:
    """The name of the last file is made last, so that a model in several files is whole from the start."""
    for name, blob in reversed(blobs.items()):
        link = folder / "snapshots" / commit / name
        if link.exists() and link.samefile(blob.path):
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name[:200]}.{_mine()}")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(blob.path, link.parent))
        new.replace(link)
    main = folder / "refs" / "main"
    if not main.is_file() or main.read_bytes() != commit.encode():
        main.parent.mkdir(exist_ok=True)
        _write(main, commit.encode())


def _mine() -> str:
    """Of this thread: a host fetches two models at a time."""
    return f"{os.getpid()}.{threading.get_ident()}"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    new = path.with_name(f".{path.name}.{_mine()}")
    new.write_bytes(content)
    new.replace(path)
    sync_folder(path.parent)


def _ask(web: Web, url: str, kind: type[T], watcher: Watcher, accept: str = "application/json") -> tuple[T, bytes, str]:
    return persevere(partial(web.answer, url, kind, accept), lambda: 0, watcher.note)


# --- Ollama's registry -------------------------------------------------------------------------------------------


def _ollama(ref: OllamaRef, watcher: Watcher) -> Download:
    web, api = _ollama_web(ref)
    _, content, _ = _ask(web, f"{api}/manifests/{ref.tag}", OllamaManifest, watcher, OLLAMA_ACCEPT)
    return _ollama_made(ref, content, caches.ollama_folder())


def _ollama_web(ref: OllamaRef) -> tuple[Web, str]:
    host, own = ref.registry.partition(":")[0], ref.registry == refs.OLLAMA_REGISTRY
    api = f"{'http' if is_loopback(host) else 'https'}://{ref.registry}/v2/{ref.namespace}/{ref.name}"
    return Web(f"https://ollama.com/{ref.namespace}/{ref.name}" if own else api), api


def _ollama_made(ref: OllamaRef, content: bytes, folder: Path) -> Download:
    web, api = _ollama_web(ref)
    try:
        manifest = msgspec.json.decode(content, type=OllamaManifest)
    except UNDECODABLE as error:
        raise StoreError(f"{ref}: its manifest cannot be read: {error}") from error
    if manifest.model is None:
        raise StoreError(f"{ref} is not a model in one GGUF file, which is what llama.cpp loads", f"see {web.page}")
    blobs = [
        Blob(str(ref), f"{api}/blobs/{layer.digest}", layer.size, caches.ollama_blob(folder, layer),
             caches.own_folder() / ".locks" / f"{layer.sha256}.lock", layer.sha256, is_model=layer is manifest.model)
        for layer in manifest.all()
    ]  # fmt: skip
    path = caches.manifest_path(ref, folder)

    def publish() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)

    return Download(web, blobs, folder, publish, manifest=content)


# --- a URL -------------------------------------------------------------------------------------------------------


def _url(ref: UrlRef, watcher: Watcher) -> Download:
    web, found = _url_web(ref), []
    for part in ref.parts():
        size, version = persevere(partial(web.size_and_version, part.url), lambda: 0, watcher.note)
        found.append((FileFacts(part.file, size, part.sha256), version))
    return _url_made(ref, found)


def _url_web(ref: UrlRef) -> Web:
    parts = urlsplit(ref.url)
    return Web(f"{parts.scheme}://{parts.netloc}/")


def _url_made(ref: UrlRef, found: list[tuple[FileFacts, str]]) -> Download:
    """`found`: what is known of each file, and what identifies this state of it at its source."""
    parts, blobs = ref.parts(), []
    if len(parts) != len(found):
        raise StoreError(f"{ref}: {len(parts)} files, and not {len(found)}")
    for part, (facts, version) in zip(parts, found, strict=True):
        if part.sha256 not in ("", facts.sha256) or part.file != facts.path:
            raise StoreError(f"{ref}: these are not its files")
        path = caches.url_file(part)
        lock = caches.own_folder() / ".locks" / f"{path.parent.name}.lock"
        blobs.append(Blob(part.file, part.url, facts.size, path, lock, facts.sha256, version))
    folder = caches.url_file(ref).parent
    return Download(_url_web(ref), blobs, folder, lambda: _write(folder / "url", f"{ref}\n".encode()))
