"""Names of models that are downloaded, and which files of a repository are the model.

    hf:org/repo[:quant | /file]     a repository of Hugging Face
    ollama:name[:tag]               a model of Ollama's registry; ollama:host/namespace/name:tag of another one
    https://host/x.gguf[#sha256=…]  a file

Everything here is pure. Names and paths may come from a server, so none of them can lead out of a cache's folder.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

#: A model in several files is loaded by the name of the first.
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
SHA256 = re.compile(r"[0-9a-f]{64}")
#: Without a quantisation in the name: these, in this order, and then the first file. As in llama.cpp.
USUAL_QUANTS = ("Q4_K_M", "Q8_0")
#: What the names of files contain that accompany a model: a projector for pictures, statistics, drafts.
COMPANIONS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
#: The hosts of Hugging Face. A URL of a file there is the name of a repository and a file.
HUB_HOSTS = ("huggingface.co", "hf.co")
OLLAMA_REGISTRY, OLLAMA_NAMESPACE = "registry.ollama.ai", "library"
#: Files that an error lists at most.
LISTED = 12
PATH_CHARS = 1_024
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?")
_HUB_FILE = re.compile(r"/([^/]+/[^/]+)/(?:resolve|blob)/main/(.+\.gguf)", re.IGNORECASE)


class StoreError(Exception):
    """A name is wrong, or a file cannot be had or stored. `hint`: what to do. `status`: of an HTTP answer, or 0.

    `malformed`: it is no name of any model.
    """

    def __init__(self, text: str, hint: str = "", status: int = 0, *, malformed: bool = False) -> None:
        super().__init__(text)
        self.hint = hint
        self.status = status
        self.malformed = malformed


@dataclass(frozen=True, slots=True)
class HubRef:
    repo: str
    quant: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"/{self.file}" if self.file else f":{self.quant}" if self.quant else "")


@dataclass(frozen=True, slots=True)
class OllamaRef:
    name: str
    tag: str = "latest"
    namespace: str = OLLAMA_NAMESPACE
    registry: str = OLLAMA_REGISTRY

    @property
    def served_as(self) -> str:
        """The name in the mesh: as in Ollama, without a tag that is the default."""
        return self.name if self.tag == "latest" else f"{self.name}:{self.tag}"

    def __str__(self) -> str:
        other = self.registry != OLLAMA_REGISTRY
        space = f"{self.namespace}/" if other or self.namespace != OLLAMA_NAMESPACE else ""
        return f"ollama:{f'{self.registry}/' if other else ''}{space}{self.served_as}"


@dataclass(frozen=True, slots=True)
class UrlRef:
    url: str
    #: What the file has to be, if the name says so.
    sha256: str = ""

    @property
    def file(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def parts(self) -> list[UrlRef]:
        """All files of the model; the name is that of the first."""
        found = PART.search(urlsplit(self.url).path)
        if found is None:
            return [self]
        numbers = range(1, int(found[2]) + 1)
        return [UrlRef(self.url.replace(found[0], f"-{number:05}-of-{found[2]}.gguf")) for number in numbers]

    def __str__(self) -> str:
        return f"{self.url}#sha256={self.sha256}" if self.sha256 else self.url


Ref = HubRef | OllamaRef | UrlRef


def is_ref(text: str) -> bool:
    return text.startswith(("hf:", "ollama:", "https:", "http:"))


def parse(text: str) -> Ref | None:
    """None for a path, an alias or the name of a package. Raises StoreError."""
    if not is_ref(text):
        return None
    try:
        return _parsed(text)
    except StoreError as error:
        error.malformed = True
        raise


def _parsed(text: str) -> Ref:
    scheme, _, rest = text.partition(":")
    if len(text) > PATH_CHARS or not text.isprintable():
        raise StoreError(f"a name of {len(text)} characters, or with control characters, is no name of a model")
    if scheme == "hf":
        return _hub(text, rest)
    return _ollama(text, rest) if scheme == "ollama" else _url(text)


def _hub(text: str, rest: str) -> HubRef:
    usage = "hf:ORG/REPO, hf:ORG/REPO:Q4_K_M or hf:ORG/REPO/FILE.gguf"
    org, _, more = rest.partition("/")
    name, slash, file = more.partition("/")
    name, _, quant = name.partition(":")
    if not (_is_word(org) and _is_word(name)) or (quant and (slash or not _is_word(quant))):
        raise StoreError(f"{text} is not the name of a model of Hugging Face", usage)
    # The folder of a repository is called models--ORG--REPO.
    if "--" in org or "--" in name or more.endswith((":", "/")):
        raise StoreError(f"{text} is not the name of a model of Hugging Face", usage)
    if file and not (is_safe_path(file) and file.lower().endswith(".gguf")):
        raise StoreError(f"{text} does not name a GGUF file", usage)
    return HubRef(f"{org}/{name}", quant, file)


def _ollama(text: str, rest: str) -> OllamaRef:
    *places, last = rest.split("/")
    name, colon, tag = last.partition(":")
    tag = tag if colon else "latest"
    namespace = places.pop() if places else OLLAMA_NAMESPACE
    registry = places.pop() if places else OLLAMA_REGISTRY
    if places or not (_HOST.fullmatch(registry) and all(map(_is_word, (namespace, name, tag)))):
        raise StoreError(f"{text} is not the name of a model of Ollama", "ollama:NAME, ollama:NAME:TAG")
    return OllamaRef(name, tag, namespace, registry)


def _url(text: str) -> HubRef | UrlRef:
    url, _, fragment = text.partition("#")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise StoreError(f"{url} is not a URL: {error}") from error
    if not host or parts.username is not None or port == 0:
        raise StoreError("a URL of a model has a host, and no user or password in it")
    if host in HUB_HOSTS and (found := _HUB_FILE.fullmatch(unquote(parts.path))):
        return _as_hub(found[1], found[2])
    sha256 = fragment.removeprefix("sha256=").lower()
    if fragment and not SHA256.fullmatch(sha256):
        raise StoreError(f"#{fragment} is not a checksum", "#sha256= and 64 hexadecimal digits")
    ref = UrlRef(url, sha256)
    if sha256 and len(ref.parts()) > 1:
        raise StoreError(f"{shown(url)} is one of several files, and a checksum is that of one", "leave it away")
    if not (is_safe_path(ref.file) and ref.file.endswith(".gguf")):
        raise StoreError(f"{shown(url)} does not end in the name of a GGUF file", "https://HOST/PATH/NAME.gguf")
    if parts.scheme == "http" and not sha256 and not is_loopback(host):
        raise StoreError(f"{shown(url)} could be changed on its way", "use https, or add #sha256=…, its checksum")
    return ref


def _as_hub(repo: str, file: str) -> HubRef:
    return _hub(text := f"hf:{repo}/{file}", text.removeprefix("hf:"))


def _is_word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None and ".." not in text


def is_safe_path(path: str) -> bool:
    """A path below a folder, that stays below it."""
    names = path.split("/")
    fits = len(path) <= PATH_CHARS and path.isprintable() and "\\" not in path
    return fits and all(name not in ("", ".", "..") and len(name.encode()) <= 255 for name in names)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(url: str) -> str:
    """A URL for a message: without a query, which may be a secret, and without a user."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# --- which files are the model ---------------------------------------------------------------------------


def is_model(path: str) -> bool:
    """And not what accompanies one."""
    name = path.rpartition("/")[2]
    return name.lower().endswith(".gguf") and not any(word in name for word in COMPANIONS)


def choose(paths: Iterable[str], ref: HubRef) -> list[str]:
    """All files of the model that `ref` names, the first one first. Raises StoreError."""
    known = sorted(path for path in paths if path.lower().endswith(".gguf"))
    models = [path for path in known if is_model(path)]
    firsts = [path for path in models if (part := PART.search(path)) is None or int(part[1]) == 1]
    if ref.file:
        chosen = [path for path in known if path.lower() == ref.file.lower()]
    else:
        quants = (ref.quant,) if ref.quant else USUAL_QUANTS
        patterns = [re.compile(f"{re.escape(quant)}[.-]", re.IGNORECASE) for quant in quants]
        chosen = [path for pattern in patterns for path in firsts if pattern.search(path)]
        chosen += [] if ref.quant else firsts
    if not chosen:
        more = f" and {len(firsts) - LISTED} more" if len(firsts) > LISTED else ""
        there = f"there are: {', '.join(firsts[:LISTED])}{more}" if firsts else "it has no GGUF file that is a model"
        hint = "name one of them: hf:ORG/REPO/FILE" if firsts else "look for a repository with GGUF in its name"
        raise StoreError(f"{ref}: no file of that name; {there}" if ref.file or ref.quant else f"{ref}: {there}", hint)
    return _all_parts(chosen[0], set(known), ref)


def _all_parts(path: str, known: set[str], ref: HubRef) -> list[str]:
    part = PART.search(path)
    if part is None:
        return [path]
    names = [f"{path[: part.start()]}-{number:05}-of-{part[2]}.gguf" for number in range(1, int(part[2]) + 1)]
    if missing := [name for name in names if name not in known]:
        raise StoreError(f"{ref}: {len(missing)} of {len(names)} parts are missing, such as {missing[0]}")
    return names
