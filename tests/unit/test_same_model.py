"""Workers that serve one model with other files or settings cannot continue each other's answers: it is reported."""

from __future__ import annotations

import pytest

from llambo.broker.report import queries
from llambo.cli.kit.tables import request_note, variants_of, warn_of_variants
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import ANYONE
from llambo.mesh.wire.naming import fingerprint, how_to_match, what_differs, what_it_is
from tests.unit.broker_bench import Bench, Client, Worker, request_id


def of_file(ctx: int = 4096, kv_type: str = "f16", weights: str = "3f2a91bc" * 4) -> str:
    return fingerprint("llama", 7, ctx, kv_type, weights, "0badcafe")


@pytest.mark.parametrize(
    ("one", "other", "differs", "remedy"),
    [
        (of_file(2048), of_file(4096), ["ctx 2048", "ctx 4096"], "--ctx 2048"),
        (of_file(4096, "q8_0"), of_file(4096), ["kv_type q8_0", "kv_type f16"], "--kv-type q8_0"),
        (of_file(4096, "q8_0"), of_file(2048), ["ctx 4096, kv_type q8_0", "ctx 2048, kv_type f16"],
         "--ctx 2048 --kv-type f16"),
        (of_file(weights="77" * 16), of_file(), ["file 77777777", "file 3f2a91bc"], "the same model file"),
        ("fake-plain-64-0", "fake-text-64-0", ["model fake-plain-64-0", "model fake-text-64-0"], "the same settings"),
        ("of another make", of_file(), ["model of another make", f"model {of_file()}"], "the same settings"),
    ],
)  # fmt: skip
def test_what_differs_between_two_models_of_a_name(one: str, other: str, differs: list[str], remedy: str) -> None:
    assert what_differs([one, other]) == differs
    assert how_to_match([one, other]) == remedy


def test_an_architecture_with_a_dash_in_its_name() -> None:
    assert what_it_is(fingerprint("nomic-bert", 1, 512, "f16", "ab" * 16, "cd" * 4)) == "ctx 512, kv_type f16"


def differing(bench: Bench) -> list[str]:
    return [entry.text for entry in bench.state.journal.entries if entry.kind == "worker differs"]


def test_a_worker_that_differs_is_reported_when_it_joins() -> None:
    bench = Bench()
    bench.worker("a", fingerprint=of_file(4096))
    bench.worker("c", fingerprint=of_file(4096))
    assert differing(bench) == []
    bench.worker("b", fingerprint=of_file(2048))
    text = (
        "worker b serves m with ctx 2048, a with ctx 4096: their answers cannot move to each other; "
        "start both with --ctx 2048"
    )
    assert differing(bench) == [text]
    assert [(entry.warning, entry.worker) for entry in bench.state.journal.entries][-1] == (True, "b")
    # ... once, and not with each heartbeat
    bench.pass_time(500)
    assert differing(bench) == [text]


def test_one_that_loads_is_compared_when_it_is_known_what_it_serves() -> None:
    bench = Bench()
    bench.worker("a", fingerprint=of_file(4096))
    late = bench.worker("b", state="starting")
    assert differing(bench) == []
    late.beat(models=[m.ModelInfo("m", of_file(2048)), m.ModelInfo("m@tiny", of_file(2048))], slots=2)
    assert len(differing(bench)) == 1


def interrupted() -> tuple[Bench, Worker, Client]:
    """The answer of a worker that is lost; another has the model with a larger context."""
    bench = Bench(hold_ms=2_000)
    first, client = bench.worker("a", fingerprint=of_file(2048)), bench.client()
    client.submit(1)
    first.publish(first.chunk(0, 5, 6))
    other = bench.worker("b", fingerprint=of_file(4096))
    first.send(m.Goodbye())
    return bench, other, client


def steps(bench: Bench, number: int = 1) -> list[tuple[str, str]]:
    return [(what, detail) for _, what, detail in queries.story(bench.state, request_id(number))]


def test_an_answer_that_waits_for_the_same_model_says_so() -> None:
    bench, other, client = interrupted()
    wanted = "a worker with ctx 2048; b has ctx 4096"
    # Its story says at once what is missing
    assert steps(bench)[-2:] == [("lost", "worker a: left: goodbye"), ("waits", f"for {wanted}")]
    # ... so does the listing, and it counts as one that waits for its model
    (row,) = queries.requests(bench.state, "", bench.now_ms, ANYONE)
    assert (row.state, request_note(row)) == ("waiting", f"waits for {wanted}")
    (model,) = queries.status(bench.state, "", bench.now_ms, ANYONE).models
    assert model.waiting == 1
    # ... and its error names it, with the command that helps: to start any worker would not
    for _ in range(40):
        bench.pass_time(100)
        other.beat()
        client.send(m.ClientHeartbeat())
    error = client.ends[0].error
    assert error is not None and error.code is Code.NO_WORKER
    assert error.text == f"no worker can continue this answer of 'm': for 2000 ms it waited for {wanted}"
    assert "`llambo-worker --ctx 2048 --kv-type f16`" in LlamboError.of(error).hint


def test_the_reason_is_renewed_when_the_others_leave() -> None:
    bench, other, _ = interrupted()
    other.send(m.Goodbye())
    assert steps(bench)[-1] == ("waits", "for a worker with ctx 2048, kv_type f16; no worker serves m")
    bench.worker("c", fingerprint=of_file(2048))
    assert steps(bench)[-1][0] == "dispatched"
    (row,) = queries.requests(bench.state, "", bench.now_ms, ANYONE)
    assert row.waits_for == ""


def test_one_that_waits_for_its_turn_waits_for_no_other_worker() -> None:
    bench = Bench()
    bench.worker("a", slots=1, fingerprint=of_file())
    client = bench.client()
    client.submit(1)
    client.submit(2)
    waits = [row.waits_for for row in queries.requests(bench.state, "", bench.now_ms, ANYONE)]
    assert waits == ["", ""] and "waits" not in dict(steps(bench, 2))


def test_listings_say_who_cannot_continue_whose_answers(capsys: pytest.CaptureFixture[str]) -> None:
    bench, _, _ = interrupted()
    (alike,) = queries.models(bench.state, "", bench.now_ms, ANYONE)
    assert alike.variants == []
    bench.worker("a", incarnation=b"2", fingerprint=of_file(2048))
    bench.worker("c", fingerprint=of_file(2048))
    (model,) = queries.models(bench.state, "", bench.now_ms, ANYONE)
    rows = queries.workers(bench.state, "", bench.now_ms, ANYONE)
    assert variants_of(rows) == {"m": model.variants}
    warn_of_variants({model.model: model.variants, "alike": []})
    assert capsys.readouterr().err.splitlines() == [
        "llambo: answers of m cannot move between a, c (ctx 2048) and b (ctx 4096)",
        "  start all of them with --ctx 2048",
    ]
