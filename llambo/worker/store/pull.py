"""Bring a model to this host: what a name stands for at its source, the download, and its place in a cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Meta

from llambo.worker.store import caches, refs
from llambo.worker.store.caches import OllamaManifest, Size
from llambo.worker.store.part_file import Blob, Watcher, cannot_write, check_room, fetch, sync_folder
from llambo.worker.store.refs import HubRef, OllamaRef, Ref, StoreError, UrlRef, is_loopback, shown
from llambo.worker.store.web import Web, persevere

HUB = "https://huggingface.co"
OLLAMA_ACCEPT = "application/vnd.docker.distribution.manifest.v2+json"
#: Pages of the list of files of a repository.
PAGES = 50
T = TypeVar("T")
_YES = ("1", "on", "yes", "true")


@dataclass(frozen=True, slots=True)
class Download:
    """What has to be downloaded for a model, and what gives it its name then."""

    web: Web
    blobs: list[Blob]
    folder: Path
    publish: Callable[[], None]

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
        fetch(blob, made.web, watcher)
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
    endpoint = _endpoint()
    web = Web(shown(f"{endpoint}/{ref.repo}"), token=hub_token(), token_for=endpoint)
    api = f"{endpoint}/api/models/{ref.repo}"
    commit = _ask(web, f"{api}/revision/main", _Revision, watcher)[0].sha
    entries: dict[str, _Entry] = {}
    url = f"{api}/tree/{commit}?recursive=true"
    for _ in range(PAGES):
        page, _, url = _ask(web, url, list[_Entry], watcher)
        entries |= {each.path: each for each in page if each.type == "file" and refs.is_safe_path(each.path)}
        if not url:
            break
    names = refs.choose(entries, ref)
    blobs = [_hub_blob(endpoint, ref, commit, entries[name]) for name in names]
    folder = caches.repo_folder(ref.repo)
    return Download(web, blobs, folder, lambda: _publish(folder, commit, dict(zip(names, blobs, strict=True))))


def _hub_blob(endpoint: str, ref: HubRef, commit: str, entry: _Entry) -> Blob:
    if entry.lfs is None:
        raise StoreError(f"{ref.repo}/{entry.path} has no checksum at the server", "choose another file or repository")
    url = f"{endpoint}/{ref.repo}/resolve/{commit}/{quote(entry.path)}"
    folder, sha256 = caches.repo_folder(ref.repo), entry.lfs.oid
    lock = folder.parent / ".locks" / folder.name / f"{sha256}.lock"
    return Blob(entry.path, url, entry.lfs.size, folder / "blobs" / sha256, lock, sha256)


def _publish(folder: Path, commit: str, blobs: dict[str, Blob]) -> None:
    """The name of the last file is made last, so that a model in several files is whole from the start."""
    for name, blob in reversed(blobs.items()):
        link = folder / "snapshots" / commit / name
        if link.exists() and link.samefile(blob.path):
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{link.name[:200]}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(blob.path, link.parent))
        new.replace(link)
    main = folder / "refs" / "main"
    if not main.is_file() or main.read_bytes() != commit.encode():
        main.parent.mkdir(exist_ok=True)
        _write(main, commit.encode())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)
    sync_folder(path.parent)


def _ask(web: Web, url: str, kind: type[T], watcher: Watcher, accept: str = "application/json") -> tuple[T, bytes, str]:
    return persevere(partial(web.answer, url, kind, accept), lambda: 0, watcher.note)


# --- Ollama's registry -------------------------------------------------------------------------------------------


def _ollama(ref: OllamaRef, watcher: Watcher) -> Download:
    host, own = ref.registry.partition(":")[0], ref.registry == refs.OLLAMA_REGISTRY
    api = f"{'http' if is_loopback(host) else 'https'}://{ref.registry}/v2/{ref.namespace}/{ref.name}"
    web = Web(f"https://ollama.com/{ref.namespace}/{ref.name}" if own else api)
    manifest, content, _ = _ask(web, f"{api}/manifests/{ref.tag}", OllamaManifest, watcher, OLLAMA_ACCEPT)
    if manifest.model is None:
        raise StoreError(f"{ref} is not a model in one GGUF file, which is what llama.cpp loads", f"see {web.page}")
    folder = caches.ollama_folder()
    blobs = [
        Blob(str(ref), f"{api}/blobs/{layer.digest}", layer.size, caches.ollama_blob(folder, layer),
             caches.own_folder() / ".locks" / f"{layer.sha256}.lock", layer.sha256, is_model=layer is manifest.model)
        for layer in manifest.all()
    ]  # fmt: skip
    path = caches.manifest_path(ref, folder)

    def publish() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)

    return Download(web, blobs, folder, publish)


# --- a URL -------------------------------------------------------------------------------------------------------


def _url(ref: UrlRef, watcher: Watcher) -> Download:
    parts = urlsplit(ref.url)
    web = Web(f"{parts.scheme}://{parts.netloc}/")
    blobs = []
    for part in ref.parts():
        url, path = part.url, caches.url_file(part)
        size, version = persevere(partial(web.size_and_version, url), lambda: 0, watcher.note)
        lock = caches.own_folder() / ".locks" / f"{path.parent.name}.lock"
        blobs.append(Blob(part.file, url, size, path, lock, part.sha256, version))
    folder = caches.url_file(ref).parent
    return Download(web, blobs, folder, lambda: _write(folder / "url", f"{ref}\n".encode()))
