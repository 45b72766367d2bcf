"""Tasks: requests that make a result and no stream. Their rules in the broker, the worker core and the fake engine."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest

from llambo.mesh.client.task_results import Collector, Ranking, ranking_of
from llambo.mesh.link.link_core import Publish, Send
from llambo.mesh.wire import limits, tasks, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError
from llambo.worker.agent import events as e
from llambo.worker.config import FakeOptions
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake import FakeEngine
from llambo.worker.engine.fake_model import ranking
from llambo.worker.engine.protocol import Output, Start
from tests.unit.broker_bench import Bench, Worker, request_id, small_mesh
from tests.unit.test_fake_engine import run
from tests.unit.test_worker_core import dispatch, joined, key_of, replayed

PIECES = [b"a" * 5, b"b" * 7, b"c"]
EMBED: dict[str, Any] = {"task": "embed", "max_tokens": 3}


def part(worker: Worker, first: int, until: int, flags: int = 0) -> bytes:
    return tokens.encode_chunk(worker.key(), first, [0] * (until - first), PIECES[first:until], flags)


def page(worker: Worker, first: int, until: int, total: int = 3) -> m.Page:
    given = worker.dispatches[-1]
    flags = tokens.FINAL | tokens.STOPPED if until == 3 else 0
    return m.Page(given.id, first, until, total, [part(worker, first, until, flags)], given.dispatch)


# --- the broker --------------------------------------------------------------------------------------


def test_a_result_comes_whole_with_the_end_and_nothing_of_it_before() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    # Given a client that asks for a stream of it nevertheless
    id = client.submit(1, stream=True, **EMBED)
    assert worker.dispatches[0].task == "embed"
    worker.send(page(worker, 0, 2))
    client.send(m.Replay(id, 0))
    other.send(m.Replay(id, 0))
    assert [p.chunks for who in (client, other) for p in who.received(m.Page)] == [[], []]
    assert client.ends == []
    # When the rest is here
    worker.send(page(worker, 2, 3))
    worker.end(3, reason="stop")
    # Then it is sent to the client that asked, on the control plane
    assert [(end.count, end.reason) for end in client.ends] == [(3, "stop")]
    assert [piece for frame in client.received(m.Page)[-1].chunks for piece in pieces_in(frame)] == PIECES
    assert client.streamed() == []
    assert bench.state.counters.tokens.tokens == 0
    client.send(m.EndAck([id]))
    assert (bench.state.archive.owed_bytes, bench.state.reserved) == (0, 0)


def pieces_in(frame: bytes) -> list[bytes]:
    found = tokens.decode_chunk(frame)
    assert found is not None
    return found.body.pieces


def test_a_result_is_begun_again_by_the_next_worker_and_not_continued() -> None:
    bench = Bench()
    first, client = bench.worker("a"), bench.client()
    client.submit(1, **EMBED)
    first.send(page(first, 0, 2))
    second = bench.worker("b")
    first.send(m.Goodbye())
    assert second.dispatches[0].prefix == []
    second.send(page(second, 0, 3))
    second.end(3, reason="stop")
    assert [(end.count, end.moves) for end in client.ends] == [(3, 1)]
    assert tokens.ids_of(client.received(m.Page)[-1].chunks) == [0, 0, 0]


def test_a_result_that_is_here_needs_no_other_worker_if_only_the_end_was_lost() -> None:
    bench = Bench()
    worker, client = bench.worker("a"), bench.client()
    client.submit(1, **EMBED)
    worker.send(page(worker, 0, 3))
    worker.send(m.Goodbye())
    assert [(end.count, end.reason) for end in client.ends] == [(3, "stop")]


@pytest.mark.parametrize("how", ["cancel", "error"])
def test_of_a_task_that_does_not_end_well_nothing_is_delivered(how: str) -> None:
    _, worker, client = small_mesh()
    id = client.submit(1, **EMBED)
    worker.send(page(worker, 0, 2))
    if how == "cancel":
        client.send(m.Cancel(id))
    else:
        given = worker.dispatches[0]
        error = ErrorInfo(Code.TOO_LONG, "no")
        worker.send(m.End(given.id, 2, "error", given.dispatch, error=error))
    assert [(end.count, end.reason) for end in client.ends] == [(0, "cancelled" if how == "cancel" else "error")]
    assert client.received(m.Page) == []


def test_attaching_to_a_task_is_refused_because_it_makes_no_stream() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    id = client.submit(1, detached=True, **EMBED)
    other.send(m.Attach(id))
    worker.send(page(worker, 0, 3))
    worker.end(3, reason="stop")
    other.send(m.Attach(id))
    assert [(p.error.code, p.id) for p in other.problems] == [(Code.BAD_REQUEST, id)] * 2
    # While its own client, back on another link, sends the same request again and gets it
    back = bench.client(b"c")
    back.submit(1, have=1, **EMBED)
    assert [(p.first, p.next) for p in back.received(m.Page)] == [(1, 3)]


def test_room_is_set_aside_for_a_result_and_more_is_refused() -> None:
    _, worker, client = small_mesh()
    client.submit(1, task="embed", max_tokens=limits.RESULT_PIECES + 1)
    assert [p.error.code for p in client.problems] == [Code.TOO_LONG]
    client.submit(2, b"", task="model_info", max_tokens=4)
    assert worker.dispatches[-1].task == "model_info"
    most = tokens.encode_chunk(worker.key(), 0, [0] * 4, [bytes(limits.RESULT_PIECE_BYTES)] * 4)
    given = worker.dispatches[-1]
    worker.send(m.Page(given.id, 0, 4, 4, [most], given.dispatch), m.End(given.id, 4, "stop", given.dispatch))
    assert [(end.id, end.error) for end in client.ends] == [(request_id(2), None)]


# --- the worker --------------------------------------------------------------------------------------


def task_dispatch(**fields: Any) -> m.Dispatch:
    return msgspec.structs.replace(dispatch(1, **fields), task="embed")


def test_a_result_goes_on_control_its_page_before_its_end() -> None:
    rig = joined().receive(task_dispatch(sampling=msgspec.Raw(b"\x81\xaanormalized\xc2")), b"texts")
    (order,) = rig.take(e.StartRun)
    assert (order.start.task, order.start.options) == ("embed", tasks.TaskOptions(normalized=False))
    rig.on(proto.Step([Output(key_of(1), [0] * 3, PIECES, "stop")]))
    assert [type(send.message) for send in rig.actions if isinstance(send, Send)] == [m.Page, m.End]
    assert not [frame for publish in rig.take(Publish) for frame in publish.frames if frame[:1] == tokens.CHUNK]
    # And it is kept until the END is acknowledged
    assert tokens.ids_of(replayed(rig, 1).chunks) == [0, 0]
    rig.wait(600)
    assert [type(send.message) for send in rig.take(Send) if isinstance(send.message, m.Page | m.End)] == [m.End]


def test_the_largest_result_takes_several_pages() -> None:
    rig = joined().receive(task_dispatch(max_tokens=limits.RESULT_PIECES), b"texts")
    pieces = [bytes([number % 256]) * limits.RESULT_PIECE_BYTES for number in range(limits.RESULT_PIECES)]
    rig.on(proto.Step([Output(key_of(1), [0] * len(pieces), pieces, "stop")]))
    (first,) = rig.sent(m.Page)
    found = [piece for frame in first.chunks for piece in pieces_in(frame)]
    while len(found) < len(pieces):
        rig.actions = []
        got = replayed(rig, len(found))
        assert 0 < sum(map(len, got.chunks)) <= limits.PAGE_BYTES
        found += [piece for frame in got.chunks for piece in pieces_in(frame)]
    assert found == pieces


def test_task_options_that_are_none_are_refused() -> None:
    rig = joined().receive(task_dispatch(sampling=msgspec.Raw(b"\x81\xa7pooling\xa3max")), b"texts")
    (reject,) = rig.sent(m.Reject)
    assert (reject.error.code, reject.final) == (Code.BAD_REQUEST, True)


# --- the fake engine ---------------------------------------------------------------------------------


def fake(kind: m.Task, data: bytes, options: FakeOptions | None = None, **fields: Any) -> Any:
    engine = FakeEngine(options or FakeOptions())
    start = Start(b"k" * 24, data, fields.pop("pieces", limits.RESULT_PIECES), 0, task=kind, **fields)
    refused = engine.start(start, 0)
    if refused is not None:
        assert refused.final
        return refused.error
    outputs = [output for _, output in run(engine)]
    assert outputs[-1].end == "stop"
    return msgspec.msgpack.decode(b"".join(piece for output in outputs for piece in output.pieces))


def test_the_fake_engine_knows_its_tokens() -> None:
    text = "Grüße 漢".encode()
    tokenized = fake("tokenize", text)
    assert b"".join(tokenized["pieces"]) == text
    assert fake("detokenize", msgspec.msgpack.encode(tokenized["ids"])) == {"text": text}
    assert fake("detokenize", b"junk").code is Code.BAD_REQUEST
    assert fake("model_info", b"")["engine"] == "fake"


def test_the_fake_engine_embeds_texts_alike_unless_it_wanders() -> None:
    data = msgspec.msgpack.encode(["one", "two", "one"])
    found = msgspec.convert(fake("embed", data), tasks.EmbedResult)
    one, two, again = tasks.vectors_of(found)
    assert one == again != two
    assert sum(value * value for value in one) == pytest.approx(1)
    wandering = msgspec.convert(fake("embed", data, FakeOptions(style="wander")), tasks.EmbedResult)
    assert tasks.vectors_of(wandering)[0] != one


def rerank_input(query: str, *documents: str) -> bytes:
    return msgspec.msgpack.encode(tasks.RerankInput(query, list(documents)))


def test_the_fake_engine_ranks_by_words_alike_unless_it_wanders() -> None:
    data = rerank_input("where do cats sleep", "bonds fell", "cats sleep on mats", "a cat", "cats sleep on mats")
    reranks = FakeOptions(kind="rerank")
    bonds, mats, cat, again = fake("rerank", data, reranks)["scores"]
    assert 0 < max(bonds, cat) < mats == again < 1 and bonds != cat
    assert fake("rerank", data, FakeOptions(kind="rerank", style="wander"))["scores"] != [bonds, mats, cat, again]
    start = Start(b"k" * 24, data, 1, 0, task="rerank", options=tasks.TaskOptions(raw=True))
    raw = ranking(b"", start, reranks).scores
    assert [1 / (1 + math.exp(-score)) for score in raw] == pytest.approx([bonds, mats, cat, again])


def test_the_fake_engine_does_what_its_kind_does() -> None:
    data = rerank_input("a", "b")
    assert fake("rerank", data).code is Code.BAD_REQUEST
    for kind in ("embed", "rerank"):
        options = FakeOptions(kind=kind)
        assert fake("generate", b"hello", options).code is Code.BAD_REQUEST
        assert fake("model_info", b"", options)["kind"] == FakeEngine(options).ready().models[0].kind == kind
    assert "document 1 with the query has 6 tokens" in fake(
        "rerank", rerank_input("ab", "cd", "cdef"), FakeOptions(kind="rerank", context_tokens=5)
    ).text  # fmt: skip
    assert fake("rerank", b"junk", FakeOptions(kind="rerank")).code is Code.BAD_REQUEST


def test_the_fake_engine_refuses_with_numbers() -> None:
    data = msgspec.msgpack.encode(["x" * 30])
    error = fake("embed", data, FakeOptions(context_tokens=20))
    assert error.code is Code.TOO_LONG and "30 tokens" in error.text and "20" in error.text
    assert fake("tokenize", bytes(50_000), pieces=1).code is Code.TOO_LONG
    assert fake("embed", msgspec.msgpack.encode([])).code is Code.BAD_REQUEST


# --- what travels ------------------------------------------------------------------------------------


def test_vectors_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 numbers for 2 vectors of 2"):
        tasks.vectors_of(tasks.EmbedResult(2, "mean", True, [1, 1], bytes(12)))
    with pytest.raises(ValueError, match="multiple of item size"):
        tasks.vectors_of(tasks.EmbedResult(2, "mean", True, [1], bytes(7)))


def test_room_is_asked_for_by_what_goes_in() -> None:
    assert tasks.most_pieces("tokenize", 1, 100) == 2
    assert tasks.most_pieces("embed", 3, 100) == 8
    assert tasks.most_pieces("embed", 2_000, 100) == limits.RESULT_PIECES
    assert tasks.most_pieces("tokenize", 1, 4 * 2**20) == limits.RESULT_PIECES
    assert tasks.most_pieces("rerank", limits.RERANK_DOCUMENTS, 4 * 2**20) == 4
    most = tasks.RerankResult([1 / 3] * limits.RERANK_DOCUMENTS, [2**16] * limits.RERANK_DOCUMENTS)
    assert len(tasks.pieces_of(msgspec.msgpack.encode(most))) <= 4


def test_a_shortened_vector_has_its_length_again() -> None:
    assert tasks.shortened([3.0, 4.0, 12.0], 2, normalized=True) == [0.6, 0.8]
    assert tasks.shortened([3.0, 4.0, 12.0], 2, normalized=False) == [3.0, 4.0]
    assert tasks.shortened([0.0, 0.0, 1.0], 2, normalized=True) == [0.0, 0.0]


def test_documents_are_ranked_by_score_and_equal_ones_stay_in_order() -> None:
    async def ranked() -> Ranking:
        found = tasks.RerankResult([0.5, 0.9, 0.5, 0.1], [1, 2, 3, 4])
        return ranking_of(found, ["a", "b", "c", "d"], 3, Collector())

    ranking = asyncio.run(ranked())
    assert [(each.index, each.score, each.document) for each in ranking.results] == [
        (1, 0.9, "b"), (0, 0.5, "a"), (2, 0.5, "c"),
    ]  # fmt: skip
    assert ranking.tokens == [1, 2, 3, 4]


def test_scores_that_are_not_one_for_each_document_are_an_error() -> None:
    async def ranked() -> Ranking:
        return ranking_of(tasks.RerankResult([0.5], [1]), ["a", "b"], None, Collector())

    with pytest.raises(LlamboError, match="1 scores for 2 documents"):
        asyncio.run(ranked())


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (m.End(request_id(1), 0, "error", error=ErrorInfo(Code.TOO_LONG, "no")), Code.TOO_LONG),
        (m.End(request_id(1), 0, "deadline", error=ErrorInfo(Code.DEADLINE, "late")), Code.DEADLINE),
        (m.End(request_id(1), 0, "cancelled"), Code.CANCELLED),
    ],
)
def test_clients_that_wait_for_a_result_get_the_reason_for_its_absence(end: m.End, code: Code) -> None:
    async def wait() -> None:
        collector = Collector()
        collector._deliver([0], [b"part"], ())
        collector._set_end(end)
        await collector.result

    with pytest.raises(LlamboError) as failed:
        asyncio.run(wait())
    assert failed.value.code is code
