"""With a valid key and the ids, sessions, topics, names and routes of others: nothing comes of it.

The victim's stream runs through all of this and is compared with the truth. The attacker's sockets are raw.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.testing.mesh import Mesh, key_folder, key_of, truth
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.raw_peer import RawPeer
from llambo.worker.config import FakeOptions
from tests.integration.healthy import Healthy

#: How often reading a foreign stream is tried, in each of two ways.
ATTEMPTS = int(os.environ.get("ATTEMPTS", "40"))
#: Time for three beats: what a subscription brings has come by then.
BEATS_MS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return key_folder(tmp_path_factory.mktemp("mesh") / "keys", alice="client", eve="client", boss="admin")


@pytest.fixture(scope="module")
def mesh(folder: Folder) -> Iterator[Mesh]:
    with Mesh(workers=1, fake=FakeOptions(slots=8, tokens_per_s=500), check=True, keys=folder) as mesh:
        yield mesh


@pytest.fixture
def alice(mesh: Mesh, folder: Folder) -> Iterator[Healthy]:
    with Healthy(mesh, key=key_of(folder, "alice")) as stream:
        yield stream


@pytest.fixture
def eve(mesh: Mesh, folder: Folder, alice: Healthy) -> Iterator[RawPeer]:
    with RawPeer(mesh.port, key=key_of(folder, "eve")) as peer:
        peer.join_as_client()
        yield peer


def alices(mesh: Mesh) -> tuple[bytes, bytes, bytes, bytes]:
    """Request, session, topic and route of the victim: more than an attacker can know."""

    def ask(core: object) -> tuple[bytes, bytes, bytes, bytes]:
        state = core.state  # type: ignore[attr-defined]
        client = next(one for one in state.registry.clients.values() if one.identity.name == "alice" and one.following)
        return next(iter(client.following)), client.session, client.topic, client.link.route

    return mesh.look(ask)


def heard_bytes(socket: zmq.Socket[bytes], until_ms: int = BEATS_MS) -> list[bytes]:
    frames, deadline = [], time.monotonic() + until_ms / 1_000
    while socket.poll(max(0, int((deadline - time.monotonic()) * 1_000))):
        frames.append(socket.recv())
    return frames


# --- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("say", "code"),
    [
        (m.Attach, Code.UNKNOWN_REQUEST),
        (m.Cancel, Code.UNKNOWN_REQUEST),
        (lambda id: m.Replay(id, 0), Code.UNKNOWN_REQUEST),
        (lambda id: m.InferenceRequest(id, max_tokens=5), Code.BAD_REQUEST),
        (lambda id: m.InferenceRequest(id, max_tokens=5, resume=True), Code.BAD_REQUEST),
    ],
    ids=["attach", "cancel", "replay", "submit again", "resume"],
)
def test_a_foreign_request(mesh: Mesh, eve: RawPeer, say: object, code: Code) -> None:
    message = say(alices(mesh)[0])  # type: ignore[operator]
    eve.send_messages(message, blobs=[b"prompt"] if isinstance(message, m.InferenceRequest) else [])
    assert eve.expect(m.Problem, id=message.id).error.code is code
    assert not [message for _, message in eve.received if isinstance(message, m.Page | m.End | m.Accepted)]


def test_a_foreign_request_is_as_unknown_as_none(mesh: Mesh, eve: RawPeer) -> None:
    """The same words for an id that exists and for one that does not."""
    there, nowhere = alices(mesh)[0], secrets.token_bytes(16)
    texts = []
    for id in (there, nowhere):
        eve.send_messages(m.Cancel(id))
        texts.append(eve.expect(m.Problem, id=id).error.text.replace(id.hex(), "ID"))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("what", ["why", "find"])
def test_a_foreign_story(mesh: Mesh, eve: RawPeer, what: str) -> None:
    eve.send_messages(m.Query(7, what, alices(mesh)[0].hex()))
    assert eve.expect(m.Problem, query=7).error.code is Code.UNKNOWN_REQUEST


@pytest.mark.parametrize("message", [m.Query(8, "events", ""), m.DrainWorker(8, "w0")], ids=["events", "drain"])
def test_what_only_an_admin_may(eve: RawPeer, message: m.Message) -> None:
    eve.send_messages(message)
    assert eve.expect(m.Problem, query=8).error.code is Code.FORBIDDEN


def test_a_list_holds_what_is_ones_own(mesh: Mesh, folder: Folder, alice: Healthy) -> None:
    listed = {}
    for name in ("alice", "eve", "boss"):
        with SyncClient(mesh.address, key=key_of(folder, name)) as client:
            listed[name] = len(client.requests())
    assert listed == {"alice": 1, "eve": 0, "boss": 1}


def test_an_admin_sees_and_cancels_everything(mesh: Mesh, folder: Folder) -> None:
    with (
        SyncClient(mesh.address, key=key_of(folder, "alice")) as alice,
        SyncClient(mesh.address, key=key_of(folder, "boss")) as boss,
    ):
        id = alice.submit("work", max_tokens=50_000)
        assert boss.why(id).state in ("waiting", "dispatched", "running")
        assert boss.events() != []
        with boss.attach(id) as stream:
            piece = stream.next_piece()
            assert piece is not None and piece.index == 0
        boss.cancel(id)
        assert alice.attach(id).result().reason == "cancelled"


# --- sessions, topics, routes ------------------------------------------------------------------------------


def test_a_stolen_session(mesh: Mesh, eve: RawPeer) -> None:
    id, session, _, _ = alices(mesh)
    eve.send_messages(m.Cancel(id), session=session)
    assert eve.expect(m.Problem).error.code is Code.UNKNOWN_SESSION


def test_foreign_topics_and_filters(mesh: Mesh, eve: RawPeer) -> None:
    topic = alices(mesh)[2]
    socket = eve.tokens_out()
    for wanted in (b"", topic[:1], topic[:15], topic, topic + b"T", b"T", b"B", secrets.token_bytes(16)):
        socket.send(b"\x01" + wanted)
    assert heard_bytes(socket) == []
    socket.send(b"\x01" + eve.topic)
    assert socket.poll(int(TIMEOUT_S * 1_000)), "not even its own"
    assert {frame[:16] for frame in heard_bytes(socket)} == {eve.topic}


def test_many_tries_to_read_a_stream(mesh: Mesh, folder: Folder, eve: RawPeer) -> None:
    """By a SUB with the victim's topic, and by two XSUBs, one of which sends junk to shift the other's grant."""
    topic, stolen = alices(mesh)[2], 0
    with zmq.Context() as context:
        for _ in range(ATTEMPTS):
            sub = sockets.token(context, zmq.SUB, curve=key_of(folder, "eve"))
            junk, thief = (sockets.token(context, zmq.XSUB, curve=key_of(folder, "eve")) for _ in range(2))
            try:
                for socket in (sub, junk, thief):
                    socket.connect(f"tcp://127.0.0.1:{mesh.port + sockets.TOKENS_OUT_OFFSET}")
                sub.subscribe(topic)
                for frame in (b"\x02junk", b"\x01" + topic, b"\x02", b"\x01"):
                    assert junk.poll(int(TIMEOUT_S * 1_000), zmq.POLLOUT)
                    junk.send(frame)
                    thief.send(b"\x01" + topic)
                # Its own beat, by control, says that the broker has gone on since.
                eve.send_messages(m.Query(9, "status", ""))
                eve.expect(m.Result, query=9)
                stolen += sum(len(frame) for socket in (sub, junk, thief) for frame in heard_bytes(socket, 20))
            finally:
                for socket in (sub, junk, thief):
                    socket.close(linger=0)
    print(f"\n{2 * ATTEMPTS} tries with a valid key of another client: {stolen} foreign bytes")
    assert stolen == 0


def test_a_route_that_was_another_peers(mesh: Mesh, folder: Folder) -> None:
    """A peer may choose its routing id. With the id of a client that has just gone, it gets no answer data."""
    id = secrets.token_bytes(16)
    with RawPeer(mesh.port, key=key_of(folder, "alice")) as victim:
        victim.join_as_client()
        victim.send_messages(m.InferenceRequest(id, max_tokens=300, stream=False), blobs=[b"prompt"])
        victim.expect(m.Accepted)
        route = mesh.look(lambda core: core.state.registry.clients[victim.session].link.route)
    with zmq.Context() as context, sockets.control(context, zmq.DEALER, curve=key_of(folder, "eve")) as thief:
        thief.setsockopt(zmq.ROUTING_ID, route)
        thief.connect(f"tcp://127.0.0.1:{mesh.port}")
        # When the answer is there, while the broker still takes the thief for its client
        mesh.until(lambda core: core.state.archive.get(id), "the answer is there")
        received: list[m.Message] = []
        while thief.poll(BEATS_MS) and len(received) < 100:
            received += [message for message, _ in codec.to_client.decode(thief.recv_multipart()).messages]
            if any(isinstance(message, m.End) for message in received):
                break
        # Then it may hear that there is one, and not what it says
        assert any(isinstance(message, m.End | m.BrokerHeartbeat) for message in received), "it did not get that route"
        assert not [message for message in received if isinstance(message, m.Page | m.Result | m.Welcome)]
        # And to join from there gives a new session
        thief.send_multipart([codec.MAGIC + codec.NO_SESSION, msgspec.msgpack.encode([m.ClientHello()])])
        mesh.until(lambda core: core.state.registry.clients.by_route[route].identity.name == "eve", "it has joined")
        mesh.until(lambda core: victim.session not in core.state.registry.clients, "the victim's session is over")


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"), [("w0", Code.FORBIDDEN), ("eves", Code.FORBIDDEN), ("", Code.BAD_MESSAGE)],
    ids=["another's", "one that begins like its own", "none"],
)  # fmt: skip
def test_a_worker_is_called_what_its_key_is_called(mesh: Mesh, folder: Folder, name: str, code: Code) -> None:
    with RawPeer(mesh.port, 1, key=key_of(folder, "eve-worker", "worker")) as peer:
        peer.send_messages(m.WorkerHello(name, b"i", [m.ModelInfo("fake")], 1))
        assert peer.expect(m.Problem).error.code is code


def test_a_name_that_two_keys_may_have_is_the_first_ones(mesh: Mesh, folder: Folder) -> None:
    with RawPeer(mesh.port, 1, key=key_of(folder, "box", "worker")) as first:
        first.join_as_worker("box-1", "other")
        with RawPeer(mesh.port, 1, key=key_of(folder, "box-1", "worker")) as second:
            second.send_messages(m.WorkerHello("box-1", b"i", [m.ModelInfo("other")], 1))
            assert second.expect(m.Problem).error.code is Code.NAME_TAKEN
        first.send_messages(m.Goodbye())


def test_a_worker_that_speaks_for_another(mesh: Mesh, folder: Folder, alice: Healthy) -> None:
    """It has a valid key and the ids of another's run: its END, its page and its chunks change nothing."""

    def run(core: object) -> bytes:
        return bytes(next(iter(core.state.running)))  # type: ignore[attr-defined]

    with RawPeer(mesh.port, 1, key=key_of(folder, "liar", "worker")) as liar:
        liar._base = mesh.port
        liar.join_as_worker("liar", "other")
        key = mesh.look(run)
        liar.send_messages(m.End(key[:16], 0, "stop", key[16:]))
        liar.send_messages(m.Page(key[:16], 0, 1, 1, [tokens.encode_chunk(key, 0, [1], [b"x"], 0)], key[16:]))
        liar.send_messages(m.EngineLost([key], "boom", [0]))
        liar.send_messages(m.Reject(key[:16], key[16:], LlamboError(Code.BAD_REQUEST, "no").info(), True))
        liar.send_messages(m.Goodbye())
        mesh.until(lambda core: "liar" not in core.state.registry.worker_names, "all of that is read")


# --- keys that end -------------------------------------------------------------------------------------------


def test_a_key_that_is_revoked_in_session(mesh: Mesh, folder: Folder) -> None:
    """Within a moment: it gets an error, no message is acted on, no token is sent, the next handshake is denied."""
    with RawPeer(mesh.port, key=key_of(folder, "mallory")) as peer:
        peer.join_as_client()
        socket = peer.tokens_out()
        socket.send(b"\x01" + peer.topic)
        id = secrets.token_bytes(16)
        peer.send_messages(m.InferenceRequest(id, max_tokens=100_000), blobs=[b"prompt"])
        assert socket.poll(int(TIMEOUT_S * 1_000)), "no token"
        began = time.monotonic()
        folder.revoke("mallory")
        assert peer.expect(m.Problem, id=b"").error.code is Code.UNAUTHORIZED
        took_ms = (time.monotonic() - began) * 1_000
        heard_bytes(socket, 100)  # what was on its way
        assert heard_bytes(socket) == []
        peer.send_messages(m.InferenceRequest(secrets.token_bytes(16), max_tokens=1), blobs=[b"prompt"])
        assert peer.expect(m.Problem).error.code is Code.UNKNOWN_SESSION
        peer.send_messages(m.ClientHello(), session=bytes(8))
        assert peer.expect(m.Problem).error.code is Code.UNAUTHORIZED
        assert mesh.look(lambda core: id not in core.state.requests)
    print(f"\nrevoked, and the error came after {took_ms:.0f} ms")


def test_a_worker_whose_key_is_revoked(mesh: Mesh, folder: Folder) -> None:
    with RawPeer(mesh.port, 1, key=key_of(folder, "turncoat", "worker")) as peer:
        peer.join_as_worker("turncoat", "other")
        folder.revoke("turncoat")
        mesh.until(lambda core: "turncoat" not in core.state.registry.worker_names, "it is gone")
        peer.send_messages(m.WorkerHeartbeat(beat=1))
        mesh.until(lambda core: core.state.counters.peers.unknown_sessions, "its message was not accepted")


def test_a_key_that_expires_in_session(mesh: Mesh, folder: Folder) -> None:
    folder.add(Identity("viewer", "client"), int(time.time()), int(time.time()) + 2)
    with RawPeer(mesh.port, key=folder.export("viewer")) as peer:
        peer.join_as_client()
        assert peer.expect(m.Problem).error.code is Code.UNAUTHORIZED


def test_a_rotated_key_and_its_successor(mesh: Mesh, folder: Folder) -> None:
    """While the old one is valid both are the same identity: one sees the other's requests."""
    old = key_of(folder, "carol")
    new = folder.rotate("carol", int(time.time()), grace_s=3_600)
    assert old.pair.public != new.pair.public
    with SyncClient(mesh.address, key=old) as before, SyncClient(mesh.address, key=new) as after:
        id = before.submit("mine", max_tokens=20, seed=3)
        assert after.attach(id).result().ids == truth("mine", 3, 20)


def test_a_library_client_learns_why_it_is_out(mesh: Mesh, folder: Folder) -> None:
    with SyncClient(mesh.address, key=key_of(folder, "dave")) as client:
        stream = client.stream("long", max_tokens=100_000)
        assert stream.next_piece() is not None
        folder.revoke("dave")
        with pytest.raises(LlamboError, match="not valid any more") as raised:
            stream.result()
        assert raised.value.code is Code.UNAUTHORIZED
