"""Files of models between real hosts: one download from outside, the rest from each other, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import NoReturn

import pytest
import zmq

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.messages import FileGrant, FileOrder, FileSource, HostedFile
from llambo.testing.mesh import Mesh, key_folder, key_of
from llambo.testing.processes import TIMEOUT_S, Process
from llambo.worker.host import model_host
from llambo.worker.share import model_fetch
from llambo.worker.share import share_messages as s
from llambo.worker.share.model_fetch import ModelFetch
from llambo.worker.share.share_server import ShareServer, Stock
from llambo.worker.store import pull
from tests.integration.bad_host import FAULT
from tests.integration.hub import Hub, serving, sha256

MIB = 1024 * 1024
REPO, FILE = "org/big-GGUF", "big-Q4_K_M.gguf"
NAME = f"hf:{REPO}"
CONTENT = b"GGUF" + random.Random(1).randbytes(30 * MIB + 12345)
SHA256 = sha256(CONTENT)
BAD = "tests.integration.bad_host"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(repos={REPO: {FILE: CONTENT}})) as hub:
        yield hub


class Site:
    """A mesh with keys, and hosts that each have a home of their own."""

    def __init__(self, mesh: Mesh, hub: Hub, folder: Path, sha: str = SHA256) -> None:
        self.mesh, self.hub, self.folder, self.sha = mesh, hub, folder, sha
        self.hosts: dict[str, Process] = {}

    def start(self, name: str, fault: str = "", *words: str) -> Process:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "HF_HOME": str(home / "hf"),
               "HF_ENDPOINT": self.hub.url, "HF_HUB_CACHE": str(home / "hub"), FAULT: fault}  # fmt: skip
        module = BAD if fault else "llambo.cli.services.worker"
        words = words or ("--share", "tcp://127.0.0.1:0")
        self.hosts[name] = self.mesh.spawn_host(name, "a", *words, env=env, module=module)
        return self.hosts[name]

    def ready(self) -> None:
        for process in self.hosts.values():
            process.line("is ready")

    def blob(self, name: str) -> Path:
        return self.folder / name / "hub" / "models--org--big-GGUF" / "blobs" / self.sha

    def has_it(self, name: str) -> bool:
        blob = self.blob(name)
        link = next((blob.parent.parent / "snapshots").glob(f"*/{FILE}"), None)
        return link is not None and sha256(link.read_bytes()) == blob.name

    def written(self, name: str) -> int:
        blob = self.blob(name)
        part = blob.with_name(f"{blob.name}.part")
        return next((each.stat().st_size for each in (blob, part) if each.is_file()), 0)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}; written: { ({n: self.written(n) for n in self.hosts}) }"
            time.sleep(0.02)


@pytest.fixture
def keys(tmp_path: Path) -> Folder:
    return key_folder(tmp_path / "keys")


@pytest.fixture
def site(hub: Hub, tmp_path: Path, keys: Folder) -> Iterator[Site]:
    with Mesh(0, keys=keys, broker="process") as mesh:
        yield Site(mesh, hub, tmp_path)


def test_one_downloads_it_and_the_rest_get_it_from_each_other_whatever_goes_wrong(
    site: Site, hub: Hub, keys: Folder
) -> None:
    """The one that downloads is killed in the middle, another one gives wrong bytes, and one is slow."""
    # Given five hosts, and a source that is not faster than they are
    for name, fault in (("h1", ""), ("h2", ""), ("h3", ""), ("a-liar", "corrupt"), ("b-slow", "0.5")):
        site.start(name, fault)
    site.ready()
    goes_on = Event()
    # Slow, and not silent: a host reports how far it is with what arrives.
    hub.after_block = lambda: goes_on.wait(0.3) if hub.sent > 16 * MIB else None
    admin = key_of(keys, "ops", "admin")

    with SyncClient(site.mesh.address, key=admin) as client:
        # When an admin wants all of them to have it
        client.pull_model(NAME)
        downloader = ""

        def in_the_middle() -> bool:
            nonlocal downloader
            reply = client.pull_model(NAME, poll=True)
            downloader = next((host.host for host in reply.hosts if host.outside), "")
            others = [host for host in reply.hosts if host.host[0] == "h" and host.host != downloader]
            return bool(downloader) and all(host.bytes >= 8 * MIB for host in others)

        site.until(in_the_middle, "no host has some of it from another")
        site.hosts[downloader].kill()
        goes_on.set()
        left = [name for name in site.hosts if name != downloader]

        # Then all that are left have it, and about as many bytes came from outside as the file has
        site.until(lambda: all(site.has_it(name) for name in left), "not all have it")
        extra = hub.sent - len(CONTENT)
        assert extra < 10 * MIB, f"{extra} bytes too many came from outside"

        def missing() -> set[str]:
            return {host.host for host in client.pull_model(NAME, poll=True).hosts if host.state != "here"}

        site.until(lambda: missing() <= {downloader}, "not all have reported it")


class _Broken(Stock):
    def find(self, ref: str) -> pull.Download | None:
        raise RuntimeError("the fault of this test")


def test_a_question_whose_answer_fails_is_refused_and_the_next_one_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticket = bytes(16)
    server = ShareServer("tcp://127.0.0.1:0", None, _Broken(), lambda: pytest.fail("its thread has ended"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    asking = context.socket(zmq.DEALER)
    asking.rcvtimeo = asking.sndtimeo = int(TIMEOUT_S * 1_000)
    try:
        server.grant((FileGrant(ticket, NAME),))
        asking.connect(f"tcp://127.0.0.1:{server.port}")
        texts = []
        for each in (ticket, b"another ticket..", ticket):
            asking.send(s.encode(s.AskModel(each)))
            answer = s.decode_answer(asking.recv())
            assert isinstance(answer, s.NotGiven)
            texts.append(answer.text)
        assert texts == ["it cannot be given", "no broker has granted this", "it cannot be given"]
        assert "RuntimeError: the fault of this test" in caplog.text
    finally:
        server.close()
        context.destroy(linger=0)


SHA = "0" * 64
LINK = f"https://files.invalid/a.gguf#sha256={SHA}"
Reply = Callable[[s.FileMessage], list[bytes]]


class _Source(Thread):
    """A fake host that answers as a test says."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(daemon=True)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._reply = reply
        self.start()

    def run(self) -> None:
        try:
            while True:
                route, question = self._socket.recv_multipart()
                if answer := self._reply(s.decode_question(question)):
                    self._socket.send_multipart([route, *answer])
        except zmq.ContextTerminated:
            self._socket.close(linger=0)

    def close(self) -> None:
        self._context.term()
        self.join(TIMEOUT_S)


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply, str], HostedFile]]:
    """Fetches LINK from a fake host, until a report of it has this state."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model_fetch, "STUCK_MS", 300)
    begun: list[_Source | ModelFetch] = []

    def follow(reply: Reply, state: str) -> HostedFile:
        source = _Source(reply)
        reports: SimpleQueue[HostedFile] = SimpleQueue()
        order = FileOrder(LINK, True, False, [FileSource("bad", f"tcp://127.0.0.1:{source.port}", bytes(16))], 1)
        begun.extend([fetch := ModelFetch(order, None, Stock(), lambda _, file: reports.put(file)), source])
        seen: list[HostedFile] = []
        while not seen or seen[-1].state != state:
            assert not seen or seen[-1].state not in ("failed", "absent"), seen
            seen.append(reports.get(timeout=TIMEOUT_S))
        fetch.stop()
        return seen[-1]

    yield follow
    for each in begun:
        each.stop() if isinstance(each, ModelFetch) else each.close()


def _described(*sizes: int) -> list[bytes]:
    files = [s.SharedFile("a.gguf", size, SHA) for size in sizes]
    return [s.encode(s.ModelFiles(s.SharedModel(LINK, files)))]


def test_a_fetch_whose_source_does_not_describe_it_is_stuck(followed: Callable[[Reply, str], HostedFile]) -> None:
    followed(lambda _: [], "stuck")


def test_a_wrong_description_is_no_end_of_a_fetch(followed: Callable[[Reply, str], HostedFile]) -> None:
    followed(lambda _: _described(100, 100), "stuck")


def test_a_chunk_that_is_too_short_is_wrong(followed: Callable[[Reply, str], HostedFile]) -> None:
    data = b"GGUF"

    def reply(question: s.FileMessage) -> list[bytes]:
        match question:
            case s.AskModel():
                return _described(100)
            case s.AskSums(_, _, first):
                return [s.encode(s.Sums(SHA, first, hashlib.sha256(data).digest() if first == 0 else b""))]
            case s.AskChunk(_, _, number):
                return [s.encode(s.Chunk(SHA, number)), data]
        raise AssertionError(question)

    assert followed(reply, "stuck").wrong == ["bad"]


def test_without_a_network_others_are_sent_to_the_name_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of the system call, since a test has no machine without routes."""

    class NoRoute(socket.socket):
        def connect(self, _: object) -> NoReturn:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    assert model_host.reachable("0.0.0.0", 7341, "tcp://192.0.2.1:7330") == f"tcp://{socket.gethostname()}:7341"
