"""The thread that gives files to other hosts: one socket, and nothing without a grant of a broker.

With keys its connections are encrypted, and only those of keys with a grant are let in. A question without a valid
ticket gets a refusal. To a host that does not read its answers nothing more is sent: it asks again.

A question that cannot be answered is refused, whatever the reason. If the thread itself fails, its host has to end:
brokers know from its hello that it shares, and would go on to send other hosts to it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from llambo.mesh.link import sockets
from llambo.mesh.security import zap
from llambo.mesh.wire.errors import Code, LlamboError, printable
from llambo.mesh.wire.identity import PeerKey
from llambo.mesh.wire.messages import FileGrant
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.agent.agent import Waker
from llambo.worker.share import share_messages as s
from llambo.worker.share.fetch_core import CREDITS
from llambo.worker.share.grants import Grants
from llambo.worker.store import chunk_sums, pull, refs
from llambo.worker.store.chunk_sums import CHUNK_BYTES
from llambo.worker.store.part_file import Blob

log = logging.getLogger(__name__)

#: Answers that wait for one host, which has no more credits than that.
HWM = CREDITS + 1
QUESTION_BYTES = 4_096
#: Questions answered before others get a turn.
DRAIN = 64
DOMAIN = "llambo.share"


class Stock:
    """The models that can be given away: those that are here, and what there is of those that are being fetched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, pull.Download] = {}

    def add(self, ref: str, made: pull.Download) -> None:
        with self._lock:
            self._known[ref] = made

    def find(self, ref: str) -> pull.Download | None:
        with self._lock:
            known = self._known.get(ref)
        if known is None and (parsed := refs.parse(ref)) is not None and (known := pull.here(parsed)) is not None:
            self.add(ref, known)
        return known


class ShareServer:
    """`address`: as in --share. `on_failure` is called in the thread, which ends then: `failure` says why.

    Raises LlamboError if it cannot listen there.
    """

    def __init__(self, address: str, key: PeerKey | None, library: Stock, on_failure: Callable[[], None]) -> None:
        host, port = sockets.split(address)
        self._library = library
        self._on_failure = on_failure
        self.failure = ""
        self._grants = Grants()
        self._lock = threading.Lock()
        self._news: tuple[FileGrant, ...] | None = None
        self._waker = Waker()
        self._stopped = False
        self._keys = key is not None
        self._context: zmq.Context[Any] = zmq.Context()
        self._zap: zmq.Socket[bytes] | None = None
        curve = None
        if key is not None:
            self._zap = self._context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(sockets.ZAP_ENDPOINT)
            curve = sockets.CurveServer(key.pair, DOMAIN)
        self._socket = sockets.make(self._context, zmq.ROUTER, hwm=HWM, max_frame=QUESTION_BYTES, curve=curve)
        try:
            self._socket.bind(sockets.endpoint(host, port) if port else f"{sockets.endpoint(host, 0)[:-2]}:*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._waker.close()
            text = f"files cannot be shared at {address}: {error.strerror}"
            raise LlamboError(Code.BAD_SETTING, text, hint="--share tcp://0.0.0.0:0   any free port") from error
        self.host = host
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._thread = threading.Thread(target=self._run, name="share", daemon=True)
        self._thread.start()

    def grant(self, granted: tuple[FileGrant, ...]) -> None:
        """What may be fetched from now on."""
        with self._lock:
            self._news = granted
        self._waker.send(0)

    def close(self) -> None:
        self._stopped = True
        self._waker.send(0)
        self._thread.join()
        self._waker.close()

    # --- in the thread ---

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._socket, self._zap, self._waker.fileno()):
            if each is not None:
                poller.register(each, zmq.POLLIN)
        try:
            while not self._stopped:
                poller.poll()
                self._waker.receive()
                with self._lock:
                    news, self._news = self._news, None
                if news is not None:
                    self._grants.replace(news)
                if self._zap is not None:
                    self._let_in(self._zap)
                self._answer_all()
        except Exception as error:
            log.exception("the thread that gives files to other hosts has failed")
            self.failure = f"files cannot be given to other hosts any more: {type(error).__name__}: {error}"
            self._on_failure()
        finally:
            self._context.destroy(linger=0)

    def _let_in(self, zap_socket: zmq.Socket[bytes]) -> None:
        for _ in range(DRAIN):
            try:
                question = zap_socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            public = zap.public_key(question)
            known = zap.is_curve(question) and public and self._grants.admits(public)
            zap_socket.send_multipart(zap.reply(question, public, "" if known else "no grant for this key"))

    def _answer_all(self) -> None:
        for _ in range(DRAIN):
            try:
                frames = sockets.receive(self._socket)
            except zmq.Again:
                return
            key = str(frames[0].get("User-Id")) if self._keys else ""
            answer = self._answer(frames[-1].bytes, key)
            try:
                self._socket.send_multipart([frames[0].bytes, *answer], zmq.DONTWAIT, copy=False)
            except zmq.Again:
                pass  # it does not read
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise

    def _answer(self, frame: bytes, key: str) -> list[bytes]:
        try:
            asked = s.decode_question(frame)
        except UNDECODABLE as error:
            return [s.encode(s.NotGiven(printable(str(error))[:256]))]
        ref = self._grants.ref_for(asked.ticket, key)
        if ref is None:
            return [s.encode(s.NotGiven("no broker has granted this"))]
        try:
            made = self._library.find(ref)
            if made is None:
                return [s.encode(s.NotGiven("this model is not here"))]
            return self._about(made, ref, asked)
        except (OSError, refs.StoreError, msgspec.ValidationError) as error:
            log.warning("%s cannot be given to another host: %s", ref, error)
            return [s.encode(s.NotGiven("its files cannot be read"))]
        except Exception:  # other hosts do not lose this one because of one model, or of one question
            log.exception("%s cannot be given to another host", ref)
            return [s.encode(s.NotGiven("it cannot be given"))]

    def _about(self, made: pull.Download, ref: str, asked: s.AskModel | s.AskSums | s.AskChunk) -> list[bytes]:
        if isinstance(asked, s.AskModel):
            files = [s.SharedFile(*each) for each in made.facts]
            if any(not each.sha256 for each in files):
                return [s.encode(s.NotGiven("its sha256 is not known before it is whole"))]
            return [s.encode(s.ModelFiles(s.SharedModel(ref, files, made.commit, made.manifest)))]
        blob = next((each for each in made.blobs if each.sha256 == asked.sha256), None)
        if blob is None:
            return [s.encode(s.NotGiven("this file is not one of the model"))]
        if isinstance(asked, s.AskSums):
            sums = sums_of(blob)[asked.first : asked.first + s.SUMS]
            return [s.encode(s.Sums(asked.sha256, asked.first, b"".join(sums)))]
        data = self.chunk(blob, asked.number)
        if not data:
            return [s.encode(s.NotGiven("this chunk is not here"))]
        return [s.encode(s.Chunk(asked.sha256, asked.number)), data]

    @staticmethod
    def chunk(blob: Blob, number: int) -> bytes:
        """Its bytes; empty if it is not here. The host that asks checks them."""
        if blob.is_here():
            return _read(blob.path, number)
        if number < len(chunk_sums.of_part(blob.part)):
            return _read(blob.part if blob.part.is_file() else blob.path, number)
        return b""


def sums_of(blob: Blob) -> list[bytes]:
    """Of the chunks that are here."""
    return chunk_sums.of_file(blob.path, blob.sha256) if blob.is_here() else chunk_sums.of_part(blob.part)


def _read(path: Path, number: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, CHUNK_BYTES, number * CHUNK_BYTES)
    finally:
        os.close(descriptor)
