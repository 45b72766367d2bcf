"""A thread that brings the files of one model to this host: from other hosts, or from its source if a broker says so.

The broker's order may change at any time: hosts come and go, and the one that was to download from outside may be lost,
so that this one goes on for it from where it is.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.service import clock
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.agent.agent import Waker
from llambo.worker.models import model_files
from llambo.worker.share import share_messages as s
from llambo.worker.share.fetch_core import (
    CREDITS,
    STUCK_MS,
    AskForChunk,
    AskForSums,
    DropHost,
    FetchAction,
    FetchCore,
    WriteChunk,
)
from llambo.worker.share.share_server import Stock, sums_of
from llambo.worker.store import chunk_sums, part_file, pull, refs
from llambo.worker.store.chunk_sums import CHUNK_BYTES
from llambo.worker.store.part_file import Blob, PartFile, WrongBytes

log = logging.getLogger(__name__)

#: How often progress is reported.
REPORT_MS = 250
#: How often an order is looked at while hosts are waited for, and how often they are asked for a description.
TURN_MS = 100
ASK_MS = 1_000
#: A connection that does not come about in this time is opened anew: one that is not let in is not tried again by
#: libzmq, and the grant may come a moment later.
CONNECT_MS = 1_000
Report = Callable[["ModelFetch", m.HostedFile], None]


class _OrderChanged(Exception):
    """A download from outside stops here: others have the file, or it is not wanted any more."""


class _NotWanted(Exception):
    pass


@dataclass(slots=True)
class _Progress:
    """The state of the whole model, for the broker."""

    done: int = 0
    size: int = 0
    outside: int = 0
    note: str = ""
    reported_at: int = 0


@dataclass(slots=True)
class _Connection:
    socket: zmq.Socket[bytes]
    opened_at: int


class ModelFetch:
    """`report` is called in the thread, the last time with one of the states absent, here or failed."""

    def __init__(self, order: m.FileOrder, key: PeerKey | None, library: Stock, report: Report) -> None:
        self._order = order
        #: Of the order that is carried out: one that comes meanwhile and has a later number is another try.
        self._attempt = order.attempt
        self._key = key
        self._library = library
        self._report = report
        self._lock = threading.Lock()
        self._waker = Waker()
        self._stopped = False
        self._now = _Progress()
        #: Those that have sent what cannot be read, which is logged once.
        self._unreadable: set[str] = set()
        #: The hosts that have sent wrong bytes, of each file.
        self._dropped: dict[str, set[str]] = {}
        self._context: zmq.Context[Any] = zmq.Context()
        self._hosts: dict[m.FileSource, _Connection] = {}
        self._thread = threading.Thread(target=self._run, name=f"fetch {order.ref}"[:60], daemon=True)
        self._thread.start()

    def update(self, order: m.FileOrder) -> None:
        with self._lock:
            self._order = order
        self._waker.send(0)

    def stop(self) -> None:
        """What has arrived stays, and the next fetch goes on from there."""
        self._stopped = True
        self._waker.send(0)

    # --- in the thread ---

    def _run(self) -> None:
        try:
            self._tell(self._fetch(), force=True)
        except _NotWanted:
            self._tell("absent", force=True)
        except refs.StoreError as error:
            self._now.note = f"{error}; {error.hint}" if error.hint else str(error)
            self._tell("failed", force=True)
        except Exception as error:
            log.exception("%s cannot be fetched", self._order.ref)
            self._now.note = repr(error)
            self._tell("failed", force=True)
        finally:
            self._context.destroy(linger=0)
            self._waker.close()

    def _fetch(self) -> m.FileState:
        text = self._order.ref
        ref = refs.parse(text)
        if ref is None:
            raise refs.StoreError(f"{text} is not the name of a model at a source", "hf:ORG/REPO, ollama:NAME, https:")
        if (made := pull.here(ref)) is not None:
            return self._done(text, made)
        if not self._order.want:
            return "absent"
        made = self._describe(ref)
        self._library.add(text, made)
        self._now.size = made.size
        part_file.check_room(made.blobs, made.folder)
        for blob in made.blobs:
            self._fetch_file(blob, made)
        pull.publish(made, ref)
        if any(not blob.sha256 for blob in made.blobs):
            made = pull.here(ref) or made
        return self._done(text, made)

    def _done(self, text: str, made: pull.Download) -> m.FileState:
        for blob in made.blobs:  # those of a file that was here are computed now, and not while a host waits for them
            if blob.sha256 and blob.is_here() and not sums_of(blob):
                raise refs.StoreError(f"{blob.path} is not what its name says", f"llambo rm {text}")
        self._library.add(text, made)
        self._now.done = self._now.size = made.size
        return "here"

    def _look(self) -> m.FileOrder:
        if self._stopped:
            raise _NotWanted
        with self._lock:
            return self._order

    # --- what it consists of ---

    def _describe(self, ref: refs.Ref) -> pull.Download:
        """By its source, or by the first host that answers. It is stuck when those that there are do not answer."""
        asked_at: dict[m.FileSource, int] = {}
        asked: list[m.FileSource] | None = None
        since = 0
        while True:
            order = self._look()
            if order.outside:
                return pull.plan(ref, self)
            if order.sources != asked:
                asked, since = order.sources, clock.now_ms()
            self._connect(order)
            for source in self._hosts:
                recently = clock.now_ms() - asked_at.get(source, -ASK_MS) < ASK_MS
                if not recently and self._send(source, s.AskModel(source.ticket)):
                    asked_at[source] = clock.now_ms()
            self._tell("stuck" if clock.now_ms() - since >= STUCK_MS else "waiting")
            for source, answer, _ in self._answers():
                if isinstance(answer, s.ModelFiles):
                    model = answer.model
                    facts = [pull.FileFacts(each.path, each.size, each.sha256) for each in model.files]
                    try:
                        made = pull.described(ref, facts, model.commit, model.manifest)
                    except refs.StoreError as error:
                        self._cannot_read(source, error)
                        continue
                    return made

    def _fetch_file(self, blob: Blob, made: pull.Download) -> None:
        """Raises StoreError. Wrong bytes of hosts are no reason to: it begins anew without those that are to blame."""
        while True:
            before = self._now.done
            bring = _Bring(self, blob, made)
            try:
                part_file.fetch(blob, bring.run, self)
                return
            except WrongBytes as error:
                chunk_sums.forget(blob.path)
                if not bring.blame():
                    raise
                self.note(str(error))
                self._now.done = before

    # --- a watcher of `part_file` ---

    def note(self, text: str) -> None:
        log.info("%s", text)

    def moved(self, size: int) -> None:
        self._now.done += size
        self._tell("fetching")

    @staticmethod
    def verified(path: Path, found: str) -> None:
        """Its worker need not read all of it again."""
        model_files.remember_digest(str(path), found)

    def _tell(self, state: m.FileState, *, force: bool = False) -> None:
        now, at = self._now, clock.now_ms()
        if force or at - now.reported_at >= REPORT_MS:
            now.reported_at = at
            attempt, ref = self._attempt, self._order.ref
            wrong = sorted(set().union(*self._dropped.values()))[: limits.SOURCES_PER_FILE]
            file = m.HostedFile(ref, state, now.done, now.size, now.outside, now.note[:256], attempt, wrong)
            self._report(self, file)

    # --- other hosts ---

    def _connect(self, order: m.FileOrder) -> None:
        wanted = dict.fromkeys(order.sources)
        for source in self._hosts.keys() - wanted:
            self._hosts.pop(source).socket.close(linger=0)
        self._hosts = {source: self._hosts.get(source) or self._open(source) for source in wanted}

    def _open(self, source: m.FileSource) -> _Connection:
        curve = replace(self._key, broker=source.key) if self._key is not None else None
        socket = sockets.make(self._context, zmq.DEALER, hwm=CREDITS + 2, max_frame=s.FRAME_BYTES, curve=curve)
        socket.connect(source.address)
        return _Connection(socket, clock.now_ms())

    def _send(self, source: m.FileSource, question: s.FileMessage) -> bool:
        """False: it is not connected, and has to be asked again."""
        there = self._hosts[source]
        try:
            there.socket.send(s.encode(question), zmq.DONTWAIT)
        except zmq.Again:
            if clock.now_ms() - there.opened_at >= CONNECT_MS:
                there.socket.close(linger=0)
                self._hosts[source] = self._open(source)
            return False
        return True

    def _answers(self) -> list[tuple[m.FileSource, Any, bytes]]:
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        for there in self._hosts.values():
            poller.register(there.socket, zmq.POLLIN)
        ready = dict(poller.poll(TURN_MS))
        self._waker.receive()
        found = []
        for source, there in self._hosts.items():
            if there.socket in ready:
                frames = there.socket.recv_multipart(zmq.DONTWAIT)
                try:
                    found.append((source, s.decode_answer(frames[0]), frames[1] if len(frames) > 1 else b""))
                except UNDECODABLE as error:
                    self._cannot_read(source, error)
        return found

    def _cannot_read(self, source: m.FileSource, error: Exception) -> None:
        level = logging.DEBUG if source.host in self._unreadable else logging.WARNING
        self._unreadable.add(source.host)
        log.log(level, "%s sends what cannot be read: %s", source.host, error)


class _Bring:
    """The bytes of one file."""

    def __init__(self, fetch: ModelFetch, blob: Blob, made: pull.Download) -> None:
        self._fetch = fetch
        self._blob = blob
        self._made = made
        self._early: dict[int, bytes] = {}
        self._core: FetchCore | None = None

    def blame(self) -> bool:
        """The whole file is wrong. Whether hosts are to blame for it, which are not asked again."""
        if self._core is None or not self._core.vouchers:
            return False
        self._core.on_wrong_file()
        self._fetch._dropped[self._blob.sha256] = self._core.dropped
        return True

    def run(self, part: PartFile) -> None:
        blob, fetch = self._blob, self._fetch
        while part.size < blob.size:
            if fetch._look().outside:
                self._from_outside(part)
            else:
                self._from_hosts(part)
        if blob.sha256:
            chunk_sums.keep(blob.sha256, chunk_sums.of_part(blob.part))

    def _from_outside(self, part: PartFile) -> None:
        try:
            part_file.download(part, self._blob, self._made.web, _Outside(self._fetch))
        except _OrderChanged:
            return

    def _from_hosts(self, part: PartFile) -> None:
        """Until it is whole, or the order is another one."""
        fetch, blob = self._fetch, self._blob
        chunks = -(-blob.size // CHUNK_BYTES)
        core = FetchCore(chunks, clock.now_ms(), part.size // CHUNK_BYTES, fetch._dropped.get(blob.sha256, ()))
        if self._core is not None:
            core.go_on_from(self._core)
        self._core, self._early = core, {}
        order = None
        while part.size < blob.size:
            now = fetch._look()
            if now.outside:
                return
            if now is not order:
                order = now
                fetch._connect(order)
                self._perform(core, core.on_hosts([each.host for each in order.sources], clock.now_ms()), part)
            self._perform(core, core.on_time(clock.now_ms()), part)
            fetch._tell("stuck" if core.is_stuck(clock.now_ms()) else "fetching")
            for source, answer, data in fetch._answers():
                self._perform(core, self._take(core, source.host, answer, data), part)

    def _take(self, core: FetchCore, host: str, answer: object, data: bytes) -> list[FetchAction]:
        now_ms = clock.now_ms()
        match answer:
            case s.Sums(sha, first, sums) if sha == self._blob.sha256:
                size = s.SUM_BYTES
                return core.on_sums(host, first, [sums[at : at + size] for at in range(0, len(sums), size)], now_ms)
            case s.Chunk(sha, number) if sha == self._blob.sha256:
                whole = len(data) == min(CHUNK_BYTES, self._blob.size - number * CHUNK_BYTES)
                keep, actions = core.on_chunk(host, number, sha256(data).digest() if whole else b"", now_ms)
                if keep:
                    self._early[number] = data
                return actions
            case s.NotGiven(text):
                log.debug("%s refuses: %s", host, text)
                return core.on_refused(host, now_ms)
            case _:
                return []

    def _perform(self, core: FetchCore, actions: list[FetchAction], part: PartFile) -> None:
        fetch, sha, left = self._fetch, self._blob.sha256, deque(actions)
        by_name = {source.host: source for source in fetch._hosts}
        while left:
            match left.popleft():
                case AskForSums(host, first):
                    sent = fetch._send(by_name[host], s.AskSums(by_name[host].ticket, sha, first))
                    left += [] if sent else core.on_refused(host, clock.now_ms())
                case AskForChunk(host, number):
                    sent = fetch._send(by_name[host], s.AskChunk(by_name[host].ticket, sha, number))
                    left += [] if sent else core.on_refused(host, clock.now_ms())
                case DropHost(host, why):
                    log.warning("%s gives wrong bytes of %s: %s", host, self._blob.name, why)
                    fetch._dropped.setdefault(sha, set()).add(host)
                case WriteChunk(number):
                    data, before = self._early.pop(number), part.size
                    # What came from outside may end within a chunk.
                    part.write(data[part.size - number * CHUNK_BYTES :])
                    part_file.check_begin(part, self._blob, "")
                    fetch.moved(part.size - before)


class _Outside:
    """The watcher of a download from outside."""

    def __init__(self, fetch: ModelFetch) -> None:
        self._fetch = fetch

    def note(self, text: str) -> None:
        self._fetch.note(text)
        self._check()

    def moved(self, size: int) -> None:
        self._fetch._now.outside += size
        self._fetch.moved(size)
        self._check()

    def verified(self, path: Path, found: str) -> None:
        self._fetch.verified(path, found)

    def _check(self) -> None:
        if not self._fetch._look().outside:
            raise _OrderChanged
