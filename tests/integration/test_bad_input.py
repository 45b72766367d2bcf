"""Nonsense on the control planes: answered with a clear error, counted, and of no harm to the stream beside it."""

from __future__ import annotations

import random
import secrets
from typing import Any

import msgspec
import pytest

from llambo.mesh.link import sockets
from llambo.mesh.wire import codec, limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.testing.mesh import Mesh
from llambo.testing.raw_peer import RawPeer, inference_request
from tests.integration.healthy import Healthy

ID = bytes(range(16))


def test_what_the_healthy_stream_of_these_tests_does_undisturbed(healthy: Healthy) -> None:
    assert healthy.ids


# --- requests ------------------------------------------------------------------------------------------


def ask(peer: RawPeer, prompt: bytes = b"hello", **changes: Any) -> m.Problem:
    fields = inference_request(**changes)
    peer.send_map(fields, prompt)
    return peer.expect(m.Problem, id=fields["id"])


def test_an_unknown_model_is_named_with_those_there_are(steady_mesh: Mesh, raw_client: RawPeer) -> None:
    refused = steady_mesh.counter("refused")
    problem = ask(raw_client, model="gpt-17")
    assert problem.error.code is Code.UNKNOWN_MODEL
    assert "'gpt-17'" in problem.error.text
    assert "fake" in problem.error.text
    assert steady_mesh.counter("refused") == refused + 1


def test_an_empty_prompt_and_one_that_is_too_long(steady_mesh: Mesh, raw_client: RawPeer) -> None:
    refused = steady_mesh.counter("refused")
    assert ask(raw_client, b"").error.code is Code.BAD_REQUEST
    problem = ask(raw_client, b"x" * (limits.PROMPT_BYTES + 1))
    assert problem.error.code is Code.TOO_LONG
    assert str(limits.PROMPT_BYTES) in problem.error.text
    assert steady_mesh.counter("refused") == refused + 2


def test_a_request_this_broker_should_know_from_before(raw_client: RawPeer) -> None:
    assert ask(raw_client, have=5).error.code is Code.UNKNOWN_REQUEST


BAD_FIELDS = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": limits.MAX_TOKENS + 1},
    {"max_tokens": "many"},
    {"max_tokens": 2**63},
    {"max_tokens": 1.5},
    {"model": 7},
    {"model": "x" * (limits.NAME_CHARS + 1)},
    {"stream": "yes"},
    {"priority": "urgent"},
    {"deadline_ms": -1},
    {"deadline_ms": 1.5},
    {"detached": 1},
    {"seed": -1},
    {"seed": 2**63},
    {"have": -1},
    {"have": 2**40},
]


@pytest.mark.parametrize("change", BAD_FIELDS, ids=repr)
def test_a_field_of_a_wrong_kind(steady_mesh: Mesh, raw_client: RawPeer, change: dict[str, Any]) -> None:
    problems = steady_mesh.counter("problems")
    problem = ask(raw_client, **change)
    assert problem.error.code is Code.BAD_MESSAGE
    assert f"$.{next(iter(change))}" in problem.error.text
    assert steady_mesh.counter("problems") > problems


@pytest.mark.parametrize("id", [b"short", bytes(17), "text", 5, None], ids=repr)
def test_an_id_that_is_none(raw_client: RawPeer, id: object) -> None:
    raw_client.send_map(inference_request(id=id), b"hello")
    problem = raw_client.expect(m.Problem)
    assert problem.error.code is Code.BAD_MESSAGE
    assert "$.id" in problem.error.text


@pytest.mark.parametrize(
    ("sampling", "named"),
    [({"temperature": "hot"}, "temperature"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 17}, "stop"), ([1], "array")],
    ids=repr,
)
def test_sampling_that_no_engine_can_do(raw_client: RawPeer, sampling: object, named: str) -> None:
    fields = inference_request(sampling=sampling)
    raw_client.send_map(fields, b"hello")
    end = raw_client.expect(m.End, id=fields["id"])
    assert (end.reason, end.count) == ("error", 0)
    assert end.error is not None
    assert end.error.code is Code.BAD_REQUEST
    assert named in end.error.text
    raw_client.send_messages(m.EndAck([end.id]))


def test_sampling_options_of_a_megabyte(raw_client: RawPeer) -> None:
    assert ask(raw_client, sampling={"stop": ["x" * limits.SAMPLING_BYTES]}).error.code is Code.BAD_REQUEST


@pytest.mark.parametrize(
    "message",
    [m.Attach(ID), m.Cancel(ID), m.Replay(ID, 0)],
    ids=lambda message: type(message).__name__,
)
def test_a_request_that_is_unknown(raw_client: RawPeer, message: m.Message) -> None:
    raw_client.send_messages(message)
    assert raw_client.expect(m.Problem, id=ID).error.code is Code.UNKNOWN_REQUEST


def test_questions_that_cannot_be_answered(raw_client: RawPeer) -> None:
    asked = [
        (m.Query(1, "the weather"), Code.BAD_REQUEST),
        (m.Query(2, "why", "not hex"), Code.BAD_REQUEST),
        (m.Query(3, "why", "abcdef"), Code.UNKNOWN_REQUEST),
        (m.DrainWorker(4, "no-such-worker"), Code.UNKNOWN_WORKER),
    ]
    for query, (message, code) in enumerate(asked, 1):
        raw_client.send_messages(message)
        assert raw_client.expect(m.Problem, query=query).error.code is code


def test_acknowledgements_of_what_never_was(raw_client: RawPeer) -> None:
    raw_client.send_messages(m.EndAck([secrets.token_bytes(n % 40) for n in range(1_000)]))
    raw_client.send_messages(m.Query(9, "status"))
    raw_client.expect(m.Result, query=9)


# --- frames, versions, types -----------------------------------------------------------------------------


def broken(session: bytes) -> dict[str, tuple[list[bytes], Code]]:
    header, body = codec.MAGIC + session, msgspec.msgpack.encode([m.ClientHeartbeat()])
    request = msgspec.msgpack.encode([inference_request()])
    nested = b"\x91" * 100_000
    many = msgspec.msgpack.encode([m.ClientHeartbeat()] * (limits.BUNDLE_MESSAGES + 1))
    return {
        "framing version": ([b"llb\x02" + session, body], Code.BAD_VERSION),
        "no body": ([header], Code.BAD_MESSAGE),
        "an empty frame": ([b""], Code.BAD_MESSAGE),
        "another's header": ([b"GET / HTTP/1.1", body], Code.BAD_MESSAGE),
        "a short header": ([header[:-1], body], Code.BAD_MESSAGE),
        "a frame too many": ([header, body, b"extra"], Code.BAD_MESSAGE),
        "a thousand frames too many": ([header, body, *[b"extra"] * 1_000], Code.BAD_MESSAGE),
        "a request without a prompt": ([header, request], Code.BAD_MESSAGE),
        "a request with two prompts": ([header, request, b"one", b"two"], Code.BAD_MESSAGE),
        "no msgpack": ([header, b"\xc1"], Code.BAD_MESSAGE),
        "half a body": ([header, body[:-3]], Code.BAD_MESSAGE),
        "no array": ([header, b"\x80"], Code.BAD_MESSAGE),
        "not messages": ([header, msgspec.msgpack.encode([1, "x", None])], Code.BAD_MESSAGE),
        "bad UTF-8": ([header, body.replace(b"type", b"\xff\xff\xff\xff")], Code.BAD_MESSAGE),
        "a tower": ([header, nested], Code.BAD_MESSAGE),
        "a crowd": ([header, many], Code.BAD_MESSAGE),
        "a body too long": ([header, b"\xc6" + bytes(limits.CONTROL_BODY_BYTES)], Code.BAD_MESSAGE),
        "an unknown type": ([header, msgspec.msgpack.encode([{"type": "make_tea"}])], Code.UNKNOWN_TYPE),
        "a worker's words": ([header, msgspec.msgpack.encode([m.Accept(ID, bytes(8))])], Code.UNKNOWN_TYPE),
        "no type": ([header, msgspec.msgpack.encode([{"id": ID}])], Code.BAD_MESSAGE),
    }


@pytest.mark.parametrize("what", broken(codec.NO_SESSION))
def test_a_message_that_is_none(steady_mesh: Mesh, raw_client: RawPeer, what: str) -> None:
    problems = steady_mesh.counter("problems")
    frames, code = broken(raw_client.session)[what]
    raw_client.send(*frames)
    assert raw_client.expect(m.Problem).error.code is code
    assert steady_mesh.counter("problems") > problems


def test_good_messages_beside_a_bad_one_are_heard(raw_client: RawPeer) -> None:
    body = msgspec.msgpack.encode([{"type": "make_tea"}, m.Query(5, "status"), {"type": "query", "query": "six"}])
    raw_client.send(codec.MAGIC + raw_client.session, body)
    raw_client.expect(m.Result, query=5)


@pytest.mark.parametrize("versions", [[2, 3], [0, 0]], ids=repr)
@pytest.mark.parametrize("role", ["client", "worker"])
def test_a_hello_of_an_unknown_version(steady_mesh: Mesh, healthy: Healthy, role: str, versions: list[int]) -> None:
    worker = {"name": "v", "incarnation": b"i", "models": [], "slots": 1} if role == "worker" else {}
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET if role == "worker" else 0) as peer:
        peer.send_map({"type": f"{role}_hello", "versions": versions, **worker})
        error = peer.expect(m.Problem).error
        assert error.code is Code.BAD_VERSION
        assert "1 to 1 here" in error.text


@pytest.mark.parametrize("offset", [0, sockets.WORKER_OFFSET], ids=["client", "worker"])
def test_an_unknown_session_gets_its_error_under_its_id(steady_mesh: Mesh, healthy: Healthy, offset: int) -> None:
    unknown = steady_mesh.counter("unknown_sessions")
    with RawPeer(steady_mesh.port, offset) as peer:
        peer.send_messages(m.WorkerHeartbeat() if offset else m.ClientHeartbeat(), session=b"whoisit?")
        assert peer.expect(m.Problem).error.code is Code.UNKNOWN_SESSION
        assert peer.received[-1][0] == b"whoisit?"
    assert steady_mesh.counter("unknown_sessions") == unknown + 1


def test_a_frame_over_the_limit_costs_the_connection_and_no_more(steady_mesh: Mesh, raw_client: RawPeer) -> None:
    raw_client.disconnected_by(codec.MAGIC + raw_client.session, bytes(limits.CONTROL_FRAME_BYTES + 1))
    # The session survives it, as it survives any lost connection
    raw_client.send_messages(m.Query(7, "status"))
    raw_client.expect(m.Result, query=7)


def test_five_thousand_messages_of_garbage(steady_mesh: Mesh, raw_client: RawPeer) -> None:
    chance, problems = random.Random(5), steady_mesh.counter("problems")
    good = codec.encode(raw_client.session, [(m.Query(1, "status"), None)])
    for number in range(5_000):
        frames = [chance.randbytes(chance.randrange(60)) for _ in range(chance.randrange(1, 4))]
        if number % 2:  # almost right: one byte of a good message is another
            body = bytearray(good[1])
            body[chance.randrange(len(body))] = chance.randrange(256)
            frames = [good[0], bytes(body)]
        raw_client.send(*frames)
    raw_client.send_messages(m.Query(8, "status"))
    raw_client.expect(m.Result, query=8)
    assert steady_mesh.counter("problems") >= problems + 2_500


# --- workers that are none -------------------------------------------------------------------------------


def test_a_worker_under_a_name_that_is_taken(steady_mesh: Mesh, healthy: Healthy) -> None:
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET) as peer:
        peer.send_messages(m.WorkerHello("w0", b"other", [m.ModelInfo("fake")], 4))
        error = peer.expect(m.Problem).error
        assert error.code is Code.NAME_TAKEN
        assert "w0" in error.text


@pytest.mark.parametrize(
    "change",
    [{"name": ""}, {"name": "x" * 129}, {"slots": 0}, {"slots": 10**6}, {"models": [{"name": ""}]}, {"models": "all"},
     {"models": [{"name": "m"}] * 33}, {"incarnation": 5}, {"pid": -1}, {"host": None}],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_worker_that_cannot_be(steady_mesh: Mesh, healthy: Healthy, change: dict[str, Any]) -> None:
    hello = {"type": "worker_hello", "name": "bad", "incarnation": b"i", "models": [{"name": "m"}], "slots": 1}
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET) as peer:
        peer.send_map({**hello, **change})
        assert peer.expect(m.Problem).error.code is Code.BAD_MESSAGE
    assert steady_mesh.look(lambda core: len(core.state.registry.workers)) == 1


def test_a_worker_that_meddles_with_the_runs_of_another(steady_mesh: Mesh, healthy: Healthy) -> None:
    key = steady_mesh.look(lambda core: next(iter(core.state.running)))
    id, dispatch = key[:16], key[16:]
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET) as peer:
        # Given another worker that knows a foreign dispatch, which it should not
        peer.join_as_worker()
        # When it says all that could end, move or change it
        peer.send_messages(
            m.Accept(id, dispatch),
            m.Reject(id, dispatch, ErrorInfo(Code.INTERNAL, "no"), final=True),
            m.End(id, 1, "stop", dispatch),
            m.End(bytes(16), 1, "stop", bytes(8)),
            m.EngineLost([key, bytes(24)], "boom"),
            m.Page(id, 0, 1, 10**6, [b"Tjunk"], dispatch),
            m.WorkerHeartbeat(seq=2**53, claims={key: 10**6, bytes(24): 5}),
        )
        # Then it gets a CANCEL for each, and nothing else
        peer.expect(m.Cancel, id=id)
        peer.expect(m.Cancel, id=bytes(16))
        peer.send_messages(m.Goodbye())
        steady_mesh.until(lambda core: len(core.state.registry.workers) == 1, "the meddler gone")


def test_a_claim_of_what_cannot_be_a_run(steady_mesh: Mesh, healthy: Healthy) -> None:
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET) as peer:
        peer.join_as_worker()
        peer.send_messages(m.WorkerHeartbeat(claims={b"junk": 1}))
        assert "`bytes`" in peer.expect(m.Problem).error.text
        peer.send_messages(m.Goodbye())
        steady_mesh.until(lambda core: len(core.state.registry.workers) == 1, "the worker gone")


def test_a_worker_that_lies_about_itself_is_given_nothing(steady_mesh: Mesh, healthy: Healthy) -> None:
    with RawPeer(steady_mesh.port, sockets.WORKER_OFFSET) as peer:
        # It claims to be ready and to serve the model, but its token plane has never been seen to work.
        peer.join_as_worker("liar", model="fake")
        peer.send_messages(m.WorkerHeartbeat(beat=5))
        peer.expect(m.BrokerHeartbeat)
        peer.expect(m.BrokerHeartbeat)
        assert not any(isinstance(message, m.Dispatch) for _, message in peer.received)
        peer.send_messages(m.Goodbye())
        steady_mesh.until(lambda core: len(core.state.registry.workers) == 1, "the liar gone")
