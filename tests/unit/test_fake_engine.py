"""The fake engine as a core: its tokens, its pace, its ends and its faults. No clock but the one passed in."""

from __future__ import annotations

import pytest

from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Sampling
from llambo.worker.config import FakeFaults, FakeOptions, fake_options
from llambo.worker.engine.fake import POISON_INDEX, FakeEngine
from llambo.worker.engine.fake_model import START, logprob_of, piece_of, plain_token, wander_token
from llambo.worker.engine.protocol import ALIVE_MS, Output, Start

KEY = b"r" * 16 + b"dispatch"
PROMPT = b"three small words"


def start(key: bytes = KEY, **changes: object) -> Start:
    return Start(key, PROMPT, **{"max_tokens": 12, "seed": 7, **changes})  # type: ignore[arg-type]


def run(engine: FakeEngine, until_ms: int = 60_000) -> list[tuple[int, Output]]:
    """Step when the engine asks for it, until it has nothing to do; (when, output)."""
    outputs = []
    while (now := engine.next_wakeup_ms()) <= until_ms:
        outputs += [(now, output) for output in engine.step(now)]
    return outputs


def generate(options: FakeOptions, begin: Start) -> tuple[list[int], bytes, Output]:
    """All ids, the text and the last output of one sequence."""
    engine = FakeEngine(options)
    assert engine.start(begin, 0) is None
    outputs = [output for _, output in run(engine)]
    ids = [i for output in outputs for i in output.ids]
    return ids, b"".join(piece for output in outputs for piece in output.pieces), outputs[-1]


# --- tokens ------------------------------------------------------------------------------------------


def test_plain_tokens_are_the_ones_the_function_tells() -> None:
    ids, text, last = generate(FakeOptions(), start())
    assert ids == [plain_token(7, PROMPT, i) for i in range(12)]
    assert text == b"".join(map(piece_of, ids))
    assert (last.end, last.usage and last.usage.prompt_tokens) == ("length", 3)


def test_plain_does_not_depend_on_the_dispatch_and_wander_does() -> None:
    other = b"r" * 16 + b"DISPATCH"
    assert generate(FakeOptions(), start())[0] == generate(FakeOptions(), start(other))[0]
    wander = FakeOptions(style="wander")
    assert generate(wander, start())[0] != generate(wander, start(other))[0]


def test_logprobs_depend_on_the_token_and_its_place_alone() -> None:
    engine = FakeEngine(FakeOptions(burst=3))
    assert engine.start(start(logprobs=2, prefix=[5, 6, 7]), 0) is None
    outputs = [output for _, output in run(engine)]
    ids = [id for output in outputs for id in output.ids]
    logprobs = [logprob for output in outputs for logprob in output.logprobs or []]
    assert logprobs == [logprob_of(token, index, 2) for index, token in enumerate(ids, 3)]
    assert len(ids) == 9
    assert len(set(map(str, logprobs))) == 9
    # And a request that does not ask for them gets none
    assert engine.start(start(), 0) is None
    assert {output.logprobs for _, output in run(engine)} == {None}


def test_wander_tokens_follow_from_their_predecessor() -> None:
    ids, _, _ = generate(FakeOptions(style="wander"), start())
    before = [START, *ids]
    assert ids == [wander_token(b"dispatch", PROMPT, previous) for previous in before[:-1]]


@pytest.mark.parametrize("utf8_split", [False, True])
@pytest.mark.parametrize("style", ["plain", "wander"])
def test_a_continuation_begins_where_the_prefix_ends(style: str, utf8_split: bool) -> None:
    # Given the whole answer of a dispatch
    options = FakeOptions(style=style, utf8_split=utf8_split)  # type: ignore[arg-type]
    whole, _, _ = generate(options, start(max_tokens=40))
    # When an engine is started with any prefix of it
    for cut in range(41):
        rest, _, last = generate(options, start(max_tokens=40, prefix=whole[:cut]))
        # Then it makes the rest, and ends at the same total
        assert whole[:cut] + rest == whole
        assert last.end == "length"


@pytest.mark.parametrize("style", ["plain", "wander"])
def test_characters_are_cut_across_tokens_and_the_text_is_whole(style: str) -> None:
    options = FakeOptions(style=style, utf8_split=True)  # type: ignore[arg-type]
    ids, text, _ = generate(options, start(max_tokens=400))
    alone = [piece_of(i) for i in ids]
    assert any(len(piece.decode(errors="ignore").encode()) != len(piece) for piece in alone), "no character was cut"
    assert "\N{REPLACEMENT CHARACTER}" not in text.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")
    # A missing token is visible.
    middle = next(i for i, piece in enumerate(alone) if piece == b"\x9f\x98")
    with pytest.raises(UnicodeDecodeError):
        b"".join(alone[:middle] + alone[middle + 1 : middle + 2]).decode()


def test_text_reads_like_words() -> None:
    _, text, _ = generate(FakeOptions(), start())
    words = text.decode().split()
    assert len(words) == 12
    assert all(word.isalpha() for word in words)
    assert text.startswith(b" ")


# --- pace --------------------------------------------------------------------------------------------


def test_the_first_token_waits_and_the_others_keep_the_pace() -> None:
    engine = FakeEngine(FakeOptions(ttft_ms=100, tokens_per_s=50))
    engine.start(start(max_tokens=4), 1_000)
    assert [now for now, _ in run(engine)] == [1_100, 1_120, 1_140, 1_160]


def test_a_late_step_is_caught_up_one_chunk_a_step() -> None:
    engine = FakeEngine(FakeOptions(tokens_per_s=100))
    engine.start(start(max_tokens=100), 0)
    assert len(engine.step(55)) == 1
    assert [engine.next_wakeup_ms() <= 55 and len(engine.step(55)) for _ in range(5)] == [1] * 5
    assert engine.next_wakeup_ms() == 60


def test_bursts_and_jitter_are_uneven_but_always_the_same() -> None:
    options = FakeOptions(burst=4, jitter_ms=30, tokens_per_s=100)

    def shape() -> list[tuple[int, int]]:
        engine = FakeEngine(options)
        engine.start(start(max_tokens=50), 0)
        return [(now, len(output.ids)) for now, output in run(engine)]

    assert shape() == shape()
    assert {count for _, count in shape()[:-1]} == {1, 2, 3, 4}


def test_a_waiting_engine_says_that_it_is_alive() -> None:
    engine = FakeEngine(FakeOptions(ttft_ms=10_000))
    engine.start(start(), 0)
    assert engine.next_wakeup_ms() == ALIVE_MS
    assert engine.step(ALIVE_MS) == []
    assert engine.next_wakeup_ms() == 2 * ALIVE_MS


def test_an_idle_engine_sleeps() -> None:
    engine = FakeEngine(FakeOptions())
    assert engine.next_wakeup_ms() > 10**15
    engine.start(start(), 0)
    engine.stop(KEY)
    assert engine.next_wakeup_ms() > 10**15
    assert engine.step(5) == []


def test_all_sequences_advance_in_one_step() -> None:
    engine = FakeEngine(FakeOptions(slots=3))
    keys = [bytes([i]) * 24 for i in range(3)]
    for key in keys:
        engine.start(start(key), 0)
    assert [output.key for output in engine.step(0)] == keys


# --- ends and refusals -------------------------------------------------------------------------------


def test_an_answer_may_end_by_itself_at_the_same_place_every_time() -> None:
    options = FakeOptions(answer_tokens=10)
    ids, _, last = generate(options, start(max_tokens=1_000))
    assert (last.end, 1 <= len(ids) <= 19) == ("stop", True)
    rest, _, again = generate(options, start(b"s" * 24, max_tokens=1_000, prefix=ids[:-1]))
    assert (ids[:-1] + rest, again.end) == (ids, "stop")


def test_a_complete_prefix_ends_at_once() -> None:
    ids, text, last = generate(FakeOptions(), start(max_tokens=2, prefix=[4, 8]))
    assert (ids, text, last.end) == ([], b"", "length")


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_a_stop_string_ends_before_the_token_that_completes_it(cut: int) -> None:
    whole, _, _ = generate(FakeOptions(), start())
    stop = (piece_of(whole[5])[-2:] + piece_of(whole[6])).decode()
    ids, _, last = generate(FakeOptions(), start(prefix=whole[:cut], sampling=Sampling(stop=["no such", stop])))
    assert (whole[:cut] + ids, last.end, last.stop) == (whole[:6], "stop", stop)


def test_a_deadline_stops_the_decode() -> None:
    _, _, last = generate(FakeOptions(tokens_per_s=10), start(deadline_ms=350))
    assert (last.end, last.ids) == ("deadline", [])


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers() -> None:
    refused = FakeEngine(FakeOptions(context_tokens=14)).start(start(), 0)
    assert refused is not None
    assert (refused.error.code, refused.final) == (Code.TOO_LONG, True)
    assert "3 prompt tokens + max_tokens 12 exceed the context of 14" in refused.error.text
    assert FakeEngine(FakeOptions(context_tokens=15)).start(start(), 0) is None


def test_more_than_the_slots_is_refused_for_now() -> None:
    engine = FakeEngine(FakeOptions(slots=1))
    engine.start(start(), 0)
    refused = engine.start(start(b"t" * 24), 0)
    assert refused is not None
    assert (refused.error.code, refused.final) == (Code.BUSY, False)
    engine.stop(KEY)
    assert engine.start(start(b"t" * 24), 0) is None


# --- faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_a_fault_happens_after_its_token_and_nothing_follows(fault: str) -> None:
    options = fake_options(slots=2, **{f"{fault}_at": 5})
    engine = FakeEngine(options)
    engine.start(start(), 0)
    engine.start(start(b"t" * 24), 0)
    assert sum(len(output.ids) for _, output in run(engine)) == 5
    assert engine.fault == fault


def test_poison_kills_every_engine_at_the_same_token_and_other_requests_do_not() -> None:
    options = FakeOptions(burst=4, slots=2, faults=FakeFaults(poison="arsenic"))
    for prefix in ([], list(range(POISON_INDEX))):
        engine = FakeEngine(options)
        engine.start(Start(KEY, b"tea with arsenic", max_tokens=12, seed=7, prefix=prefix), 0)
        assert sum(len(output.ids) for _, output in run(engine)) == POISON_INDEX - len(prefix)
        assert engine.fault == "crash"
    harmless = FakeEngine(options)
    harmless.start(start(), 0)
    run(harmless)
    assert harmless.fault is None


def test_slowness_begins_at_its_token() -> None:
    engine = FakeEngine(FakeOptions(tokens_per_s=100, faults=FakeFaults(slow_at=3, slow_factor=10)))
    engine.start(start(max_tokens=5), 0)
    assert [now for now, _ in run(engine)] == [0, 10, 20, 120, 220]


def test_fingerprints_differ_where_streams_cannot_be_continued() -> None:
    ready = FakeEngine(FakeOptions(slots=9), "m").ready()
    assert (ready.slots, ready.models[0].name) == (9, "m")
    same = FakeEngine(FakeOptions(ttft_ms=5)).ready().models[0].fingerprint
    assert ready.models[0].fingerprint == same
    assert FakeEngine(FakeOptions(style="wander")).ready().models[0].fingerprint != same
