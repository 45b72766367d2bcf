"""A little of what `python -m tests.fuzz` does by the million, and what it has found."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llambo.mesh.wire import codec, limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from tests.fuzz import cores, corpus, strategies, target, targets
from tests.unit import samples
from tests.unit.broker_bench import small_mesh

TARGETS = {each.name: each for each in targets.every()}
MUTANTS = 1_500
SHOTS = 2_500
#: The same examples in each run: the commands search for new ones.
STEADY = settings(derandomize=True, database=None, max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TARGETS)
def test_good_input_is_no_finding(name: str) -> None:
    for frames in TARGETS[name].seeds:
        TARGETS[name].run(list(frames))


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_taken_or_refused(name: str) -> None:
    done, error, frames = targets.mutants(TARGETS[name], f"unit {name}", MUTANTS)
    assert error is None, f"mutant {done}: {frames!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_taken_or_refused(name: str) -> None:
    for frames in corpus.read(name):
        TARGETS[name].run(frames)


def test_the_corpus_is_small_and_is_of_targets_that_there_are() -> None:
    files = sorted(corpus.FOLDER.iterdir())
    assert {file.stem for file in files} <= set(TARGETS)
    assert sum(file.stat().st_size for file in files) < 2**20
    assert all(corpus.read(name) for name in TARGETS)


@pytest.mark.parametrize("name", cores.CORES)
@pytest.mark.parametrize("seed", range(2))
def test_a_core_under_fire_stands(name: str, seed: int) -> None:
    shots, finding = cores.fire(name, f"unit {seed}", SHOTS)
    assert not finding, f"after {shots} shots: {finding}"


@pytest.mark.parametrize("direction", samples.CODECS)
def test_whatever_hypothesis_makes_is_taken_or_refused(direction: str) -> None:
    run = TARGETS[f"codec-{direction}"].run

    @STEADY
    @given(strategies.bundles(direction))
    def check(frames: list[bytes]) -> None:
        run(frames)

    check()


def test_chunks_that_hypothesis_makes_are_taken_or_refused() -> None:
    @STEADY
    @given(st.lists(strategies.CHUNKS, min_size=1, max_size=4))
    def check(frames: list[bytes]) -> None:
        for name in ("token-frames", "stream"):
            TARGETS[name].run(frames)

    check()


@pytest.mark.parametrize("frames", [[b"a"], [b"", b"x"], [b"a", b"bb", b""], [bytes([n]) for n in range(16)]])
def test_an_input_of_the_corpus_is_read_as_it_was_written(frames: list[bytes]) -> None:
    assert corpus.split(corpus.join(frames)) == frames


def test_a_finding_is_reported() -> None:
    def refuse(frames: list[bytes]) -> None:
        raise KeyError(frames[0][:1])

    broken = target.Target("broken", [[b"seed"]], refuse, lambda mutator, frames: frames)
    done, error, frames = targets.mutants(broken, "1", 10)
    assert (done, repr(error), frames) == (0, "KeyError(b's')", [b"seed"])


# --- found by it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held", [[b"junk"], [b""], [samples.CHUNK], [tokens.encode_chunk(samples.KEY, 0, [1], [b"x"])[:-1]]]
)
@pytest.mark.parametrize("when", ["unknown", "live", "ended"])
def test_an_attach_that_holds_no_tokens_but_junk(when: str, held: list[bytes]) -> None:
    # Given a request, a live one or one that has ended, with a token
    _, worker, client = small_mesh()
    id = client.submit(1, max_tokens=2) if when != "unknown" else bytes(16)
    if when != "unknown":
        worker.publish(worker.chunk(0, 7))
    if when == "ended":
        worker.publish(worker.chunk(1, 8, flags=tokens.FINAL))
        worker.end(2)
    # When a client attaches and claims to hold chunks that cannot exist
    client.send(m.Attach(id, 1, held))
    # Then it is refused
    assert client.problems[-1].error.code is Code.BAD_REQUEST
    assert client.problems[-1].id == id


def test_a_request_that_waits_is_found_in_the_queue_when_a_client_brings_tokens() -> None:
    # Given a request that waits, of a model that its client had at another broker
    _, worker, client = small_mesh(slots=1)
    client.submit(1)
    id = client.submit(2, max_tokens=3, fingerprint="f")
    # When a client attaches that has tokens of it: it waits for this very model from now on
    client.send(m.Attach(id, 1, [tokens.encode_chunk(id + worker.key()[16:], 0, [7], [b"x"], 0)]))
    assert client.problems == []
    # Then it can be taken out of the queue, and it was in there once
    client.send(m.Cancel(id))
    assert [end.count for end in client.ends if end.id == id] == [1]
    worker.end(0)
    assert len(worker.dispatches) == 1


def test_an_engine_lost_that_names_a_run_twice() -> None:
    # Given a request with all its tokens, whose END has not come
    _, worker, client = small_mesh()
    client.submit(1, max_tokens=1)
    worker.publish(worker.chunk(0, 7, flags=tokens.FINAL))
    # When its engine is lost, and it is named twice
    worker.send(m.EngineLost([worker.key(), worker.key()], "boom"))
    # Then it has ended, once
    assert len(client.ends) == 1


@pytest.mark.parametrize("port", [-7333, 0, 65_536, 2**31])
@pytest.mark.parametrize("decoder", [codec.to_client, codec.to_worker])
def test_a_welcome_to_a_port_that_is_none(decoder: codec.Codec[m.Message], port: int) -> None:
    bundle = decoder.decode(codec.encode(codec.NO_SESSION, [(m.Welcome(samples.SESSION, port), None)]))
    assert not bundle.messages
    assert "$.token_port" in bundle.problems[0].error.text


@pytest.mark.parametrize("session", [b"", b"short", bytes(limits.SESSION_ID_BYTES + 1)])
def test_a_welcome_with_a_session_that_is_none(session: bytes) -> None:
    bundle = codec.to_client.decode(codec.encode(codec.NO_SESSION, [(m.Welcome(session, 7333), None)]))
    assert not bundle.messages
