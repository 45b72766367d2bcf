"""HTTP for downloads, with the standard library: ranges, redirects, limits, other tries, and errors with a hint.

What a server sends is checked before it is used: lengths, ranges and names; bodies are read up to what was announced.
A token goes to the host that it is for and to no other, also not by a redirect, and is in no message.
"""

from __future__ import annotations

import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec

import llambo
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.timers import backoff_ms
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.store.refs import StoreError, is_loopback, shown

#: Without a byte for so long a connection counts as broken.
TIMEOUT_S = 30.0
#: So does one that brings less than `SLOW_BYTES` in `SLOW_S`.
SLOW_S, SLOW_BYTES = 60.0, 64 * 1024
#: Tries in a row without `PROGRESS_BYTES` more, and the pauses between them: the first and the longest.
TRIES = 6
PROGRESS_BYTES = 64 * 1024
PAUSE_MS = (500, 8_000)
#: A server that asks to wait longer is not waited for.
LONGEST_WAIT_S = 60
REDIRECTS = 5
#: The longest answer of an API.
ANSWER_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
_AGAIN = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class BrokenTransfer(Exception):
    """Another try may succeed. `wait_s`: what the server asks for."""

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class Web:
    """One source. `page` is where a person reads about what it has, and asks for access."""

    def __init__(self, page: str, *, token: str = "", token_for: str = "") -> None:
        """`token_for`: a URL of the host that gets the token."""
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise StoreError("the token for Hugging Face contains characters that no token has", "hf auth login")
        self.page = page
        self._token = token
        self._origin = _origin(token_for) if token and _is_private(token_for) else None
        self._refused = "the token is not accepted" if self._origin else "a token is sent over https only"
        # By whether the host is this machine: what is sent there in plain text must not go to a proxy.
        self._openers = {False: _opener(urllib.request.ProxyHandler()), True: _opener()}

    def open(self, url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        """The answer to a GET, after redirects. Raises StoreError, or BrokenTransfer if another try may help."""
        first = url
        for _ in range(REDIRECTS + 1):
            try:
                return self._get(url, headers or {})
            except urllib.error.HTTPError as error:
                error.close()
                status, answered = error.code, error.headers
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _connection_error(url, error) from None
            if status not in (301, 302, 303, 307, 308) or "Location" not in answered:
                raise self._refusal(url, status, answered.get("Retry-After", ""))
            url = _target(url, answered["Location"])
        raise StoreError(f"{shown(first)} leads from one address to another, more than {REDIRECTS} times")

    def _get(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        # The schemes that are opened are those of the handlers: no files.
        request = urllib.request.Request(url, headers={  # noqa: S310
            "User-Agent": f"llambo/{llambo.__version__}", "Accept-Encoding": "identity", **headers
        })  # fmt: skip
        if self._origin is not None and _origin(url) == self._origin:
            request.add_header("Authorization", f"Bearer {self._token}")
        answer = self._openers[is_loopback(urlsplit(url).hostname or "")].open(request, timeout=TIMEOUT_S)
        assert isinstance(answer, http.client.HTTPResponse)
        return answer

    def _refusal(self, url: str, status: int, retry_after: str) -> StoreError | BrokenTransfer:
        text = f"{shown(url)} answers {status}"
        if status in _AGAIN:
            wait_s = float(retry_after) if re.fullmatch(r"\d{1,6}", retry_after) else 0.0
            what = " (too many requests)" if status == 429 else ""
            return BrokenTransfer(f"{_host(url)} answers {status}{what}", wait_s)
        if status in (401, 403) and self._token:
            return StoreError(f"{text}: {self._refused}", f"see whether it may read {self.page}", status)
        if status in (401, 403):
            why = "there is no such model, or it is private, or its terms have to be accepted"
            return StoreError(f"{text}: {why}", f"see {self.page}; then set HF_TOKEN, or `hf auth login`", status)
        if status == 404:
            return StoreError(f"{text}: there is no such model or file", f"see {self.page} for its right name", status)
        return StoreError(text, f"see {self.page}", status)

    # --- what is read ------------------------------------------------------------------------------------

    def answer(self, url: str, kind: type[T], accept: str = "application/json") -> tuple[T, bytes, str]:
        """An answer of an API: decoded, as it came, and the URL of its next page."""
        with self.open(url, {"Accept": accept}) as response:
            content = b""
            for block in _blocks(response):
                content += block
                if len(content) > ANSWER_BYTES:
                    raise StoreError(f"{shown(url)} sends more than {ANSWER_BYTES} bytes as an answer")
            following = re.search(r'<([^>]{1,4000})>;\s*rel="next"', response.headers.get("Link", ""))
        try:
            decoded = msgspec.json.decode(content, type=kind)
        except UNDECODABLE as error:
            raise StoreError(f"{shown(url)} sends an answer that cannot be read: {printable(str(error))}") from error
        after = urljoin(url, following[1]) if following else ""
        if after and _origin(after) != _origin(url):
            raise StoreError(f"{shown(url)} has a next page at another host")
        return decoded, content, after

    def size_and_version(self, url: str) -> tuple[int, str]:
        """Those of a file. The version is empty if the server names none."""
        with self.open(url, {"Range": "bytes=0-0"}) as response:
            found = _RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
            text = found[2] if found else response.headers.get("Content-Length", "")
            if not re.fullmatch(r"\d{1,18}", text) or (response.status == 206 and not found):
                raise StoreError(f"{shown(url)}: the server does not tell how long the file is")
            return int(text), _version(response)

    def body(self, url: str, start: int, size: int, version: str = "") -> Iterator[bytes]:
        """The bytes of a file of this size, from `start` on. Without ranges, those before are skipped."""
        with self.open(url, {"Range": f"bytes={start}-"}) as response:
            skip = self._check(response, url, start, size, version)
            left = size - start
            for block in _blocks(response):
                skipped = min(skip, len(block))
                skip -= skipped
                wanted = block[skipped : skipped + left]
                left -= len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return
        raise BrokenTransfer(f"{_host(url)}: the connection was cut")

    def _check(self, response: http.client.HTTPResponse, url: str, start: int, size: int, version: str) -> int:
        """How many bytes come before `start`. Raises StoreError if it is not the file that was announced."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise StoreError(f"{shown(url)}: the server sends the file in a form that was not asked for")
        if version and _version(response) not in ("", version):
            raise StoreError(f"{shown(url)} has changed while it was downloaded", "run the same command again")
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if response.status == 206 and (not found or int(found[1]) != start):
            raise StoreError(f"{shown(url)}: the server sends another part of the file than was asked for")
        total = found[2] if response.status == 206 and found else headers.get("Content-Length", str(size))
        if total not in ("*", str(size)):
            text = f"{shown(url)}: the file was announced with {size} bytes, and the server has {printable(total)}"
            raise StoreError(text, "try again later; with HF_ENDPOINT set, try without it")
        return 0 if response.status == 206 else start


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    began, count = time.monotonic(), 0
    while True:
        try:
            block = response.read1(BLOCK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _connection_error(response.url, error) from None
        if not block:
            return
        count += len(block)
        if (now := time.monotonic()) - began > SLOW_S:
            if count < SLOW_BYTES:
                raise BrokenTransfer(f"{_host(response.url)} sends less than 1 KiB a second")
            began, count = now, 0
        yield block


def persevere(
    work: Callable[[], T], received: Callable[[], int], note: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> T:  # fmt: skip
    """Do `work`, again and again while it breaks. `received`: bytes so far; tries that bring some are not counted."""
    failures = 0
    while True:
        before = received()
        try:
            return work()
        except BrokenTransfer as error:
            failures = 1 if received() - before >= PROGRESS_BYTES else failures + 1
            if failures >= TRIES or error.wait_s > LONGEST_WAIT_S:
                wait = f"; it asks to wait {error.wait_s:.0f} s" if error.wait_s else ""
                hint = "try again later: the same command goes on where this one stopped"
                raise StoreError(f"{error}{wait}; {failures} tries have failed", hint) from None
            wait_s = max(0.05, error.wait_s, backoff_ms(failures, *PAUSE_MS) / 1_000)
            note(f"{error}; another try" + (f" in {wait_s:g} s" if wait_s >= 0.5 else ""))
        pause(wait_s)


def _opener(*more: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """For http and https. It follows no redirect, because a redirect may have a body without end."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        *more,
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _connection_error(url: str, error: Exception) -> StoreError | BrokenTransfer:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        hint = "see whether the clock is right; behind a proxy that decrypts, set SSL_CERT_FILE to its certificate"
        return StoreError(f"{shown(url)}: its certificate is not valid: {reason.verify_message}", hint)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return BrokenTransfer(f"{_host(url)}: {printable(text)[:200]}")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _target(url: str, location: str) -> str:
    """Where a redirect leads. From https it may lead to https only, and never to a file of this machine."""
    try:
        target = urljoin(url, location)
        if urlsplit(target).scheme in ("https", urlsplit(url).scheme) and _origin(target)[1]:
            return target
        where = shown(target)
    except ValueError:
        where = location[:200]
    raise StoreError(f"{shown(url)} leads to {printable(where)}, where no model is downloaded from")


def _is_private(url: str) -> bool:
    """Bytes that are sent there cannot be read on their way."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def _version(response: http.client.HTTPResponse) -> str:
    tag = response.headers.get("ETag", "")
    return "" if tag.startswith("W/") or len(tag) > 200 else tag
