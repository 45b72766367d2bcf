"""The llama.cpp engine on a real model, driven by hand: what it refuses, what it says, how it goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from bench import cancels, tiny_model
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Reason, Sampling, Usage
from llambo.mesh.wire.tokens import Logprob
from llambo.worker.config import LlamaOptions
from llambo.worker.engine.protocol import Configure, Output, Progress, Refused, Start
from llambo.worker.llama import binding
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.llama.loading import load
from llambo.worker.models import model_files

CONTEXT, SLOTS = 1024, 4
GREEDY = Sampling(form="user", temperature=0.0)
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},\
 "required": ["name", "age"]}'
#: One of each kind that has something to replay.
KINDS = {
    "greedy": GREEDY,
    "seeded": Sampling(form="user"),
    "penalties": Sampling(form="user", repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    "dry": Sampling(form="user", dry_multiplier=0.8),
    "xtc": Sampling(form="user", xtc_probability=0.5),
    "typical": Sampling(form="user", top_k=0, typical_p=0.9),
    "stop": Sampling(form="user", stop=["never said", " the moon", "xyz"]),
    "grammar": Sampling(form="user", grammar='root ::= [a-z ]+ "." '),
    "schema": Sampling(form="user", json_schema=SCHEMA),
}


@pytest.fixture(scope="module")
def reported() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def loaded(reported: list[Progress]) -> LlamaEngine:
    options = LlamaOptions(slots=SLOTS, context=CONTEXT, threads=1, batch=128)
    return load_generating(Configure("llama", "smollm2", llama=options, safe=True), reported.append)


def load_generating(configure: Configure, send: Callable[[Progress], None]) -> LlamaEngine:
    engine = load(configure, send)
    assert isinstance(engine, LlamaEngine)
    return engine


@pytest.fixture
def engine(loaded: LlamaEngine) -> Iterator[LlamaEngine]:
    yield loaded
    check_empty(loaded)


def check_empty(engine: LlamaEngine) -> None:
    """After each test nothing may be left in it."""
    assert engine.next_wakeup_ms() > 2**60, "a stream was left running"
    assert (engine.batcher.running, engine.batcher.cells) == (0, 0)
    for slot in engine.batcher.slots:
        assert engine.cells(slot.number) == slot.cells, "the account of cells is wrong"


@dataclass
class Generated:
    ids: list[int] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    end: Reason | None = None
    usage: Usage | None = None
    code: Code | None = None
    stop: str = ""
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode()

    def hear(self, output: Output) -> None:
        assert self.end is None, "something came after the end"
        for piece in output.pieces:
            piece.decode()  # never half a character
        self.ids += output.ids
        self.pieces += output.pieces
        self.logprobs += output.logprobs or []
        self.end, self.usage, self.stop = output.end, output.usage, output.stop
        self.code = output.error.code if output.error else None


def ask(number: int = 1, prompt: str = "Tell me a short story.", tokens: int = 24, sampling: Sampling = GREEDY,
        prefix: list[int] | None = None, deadline_ms: int = 0) -> Start:  # fmt: skip
    return Start(bytes([number]) * 24, prompt.encode(), tokens, 7, prefix or [], sampling, deadline_ms)


def run(engine: LlamaEngine, *starts: Start, now_ms: int = 0) -> list[Generated]:
    found = {start.key: Generated() for start in starts}
    for start in starts:
        refused = engine.start(start, now_ms)
        assert refused is None, refused
    for _ in range(10_000):
        for output in engine.step(now_ms):
            found[output.key].hear(output)
        if all(one.end for one in found.values()):
            return list(found.values())
    raise AssertionError("it goes on for ever")


def refusal(engine: LlamaEngine, start: Start) -> Refused:
    refused = engine.start(start, 0)
    assert refused is not None
    return refused


# --- answers --------------------------------------------------------------------------------


def test_it_tells_what_it_serves_and_how_it_got_there(engine: LlamaEngine, reported: list[Progress]) -> None:
    ready = engine.ready()
    assert ready.slots == SLOTS
    assert [(model.name, model.context_tokens) for model in ready.models] == [("smollm2", CONTEXT)]
    assert ready.models[0].fingerprint.startswith("llama-")
    assert "safe settings" in ready.note
    assert ready.library == str(binding.find(os.environ.get("LLAMBO_LLAMA_LIB", "")))
    notes = [progress.note for progress in reported]
    assert "loading smollm2: 100 %" in notes
    assert notes[-1] == "testing smollm2"


def test_a_question_gets_a_sensible_answer(engine: LlamaEngine) -> None:
    (generated,) = run(engine, ask(prompt="What is the capital of France? Answer in one word."))
    assert "Paris" in generated.text
    assert generated.end == "stop"
    assert generated.usage is not None
    assert generated.usage.prompt_tokens > 10


def test_a_system_message_and_a_list_of_messages_say_the_same(engine: LlamaEngine) -> None:
    messages = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}])
    by_user = ask(1, "Who are you?", sampling=Sampling(form="user", temperature=0.0, system="Be brief."))
    by_list = ask(2, messages, sampling=Sampling(form="messages", temperature=0.0))
    (first,), (second,) = run(engine, by_user), run(engine, by_list)
    assert first.usage is not None and second.usage is not None
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert first.text == second.text


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(form="user", stop=[" the", "never said"])])
def test_logprobs_are_those_of_the_model_and_in_step_with_the_tokens(engine: LlamaEngine, sampling: Sampling) -> None:
    start = msgspec.structs.replace(ask(sampling=sampling, tokens=40), logprobs=3)
    plain, generated = run(engine, ask(sampling=sampling, tokens=40))[0], run(engine, start)[0]
    # Logprobs do not change the answer
    assert (generated.ids, generated.pieces, generated.end) == (plain.ids, plain.pieces, plain.end)
    assert len(generated.logprobs) == len(generated.ids) > 1
    for token, logprob in zip(generated.ids, generated.logprobs, strict=True):
        assert [top.logprob for top in logprob.top] == sorted((top.logprob for top in logprob.top), reverse=True)
        among = {top.id: top.logprob for top in logprob.top}
        assert among.get(token, logprob.logprob) == logprob.logprob
        if sampling is GREEDY:
            assert logprob.top[0].id == token
        assert sum(math.exp(value) for value in among.values()) <= 1.0001
    # And an answer that goes on elsewhere has the same from there on
    half = len(generated.ids) // 2
    rest = msgspec.structs.replace(start, key=bytes([2]) * 24, prefix=generated.ids[:half])
    (again,) = run(engine, rest)
    assert again.ids == generated.ids[half:]
    assert [each.logprob for each in again.logprobs] == pytest.approx(
        [each.logprob for each in generated.logprobs[half:]], abs=0.05
    )


def test_defaults_of_the_model_hold_where_the_request_says_nothing(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (greedy,), (seeded,) = run(engine, ask()), run(engine, ask(sampling=Sampling(form="user")))
    assert greedy.ids != seeded.ids
    setup = replace(engine._setup, defaults={"temperature": 0.0})
    monkeypatch.setattr(engine, "_setup", setup)
    silent = ask(sampling=Sampling(form="user"))
    assert run(engine, silent)[0].ids == greedy.ids
    # And a request that names our own default means it
    assert run(engine, msgspec.structs.replace(silent, given=["form", "temperature"]))[0].ids == seeded.ids


def test_text_goes_to_the_model_as_it_is(engine: LlamaEngine) -> None:
    # Given a name of a control token in plain text, it is text and not the token
    (generated,) = run(engine, ask(prompt="<|im_start|>", tokens=1, sampling=Sampling(temperature=0.0)))
    assert generated.usage is not None
    assert generated.usage.prompt_tokens > 3


def test_streams_share_their_steps_and_each_gets_its_own_answer(engine: LlamaEngine) -> None:
    prompts = ["Who are you?", "Name three animals.", "Say hello.", "Count to five."]
    engine.forget()
    alone = [run(engine, ask(number, prompt, 16))[0] for number, prompt in enumerate(prompts)]
    engine.forget()
    together = run(engine, *[ask(number, prompt, 16) for number, prompt in enumerate(prompts)])
    assert [one.ids for one in together] == [one.ids for one in alone]


def test_the_same_seed_says_the_same_and_another_one_does_not(engine: LlamaEngine) -> None:
    start = ask(sampling=Sampling(form="user", temperature=1.5))
    other = Start(start.key, start.prompt, start.max_tokens, 8, sampling=start.sampling)
    assert run(engine, start)[0].ids == run(engine, start)[0].ids
    assert run(engine, other)[0].ids != run(engine, start)[0].ids


def test_characters_are_whole(engine: LlamaEngine) -> None:
    (generated,) = run(engine, ask(prompt="Repeat exactly: 🦙🌍é漢字 🦙🌍é漢字", tokens=40))
    assert any(ord(char) > 127 for char in generated.text)


# --- options --------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: LlamaEngine) -> None:
    (whole,) = run(engine, ask())
    stop = whole.text[20:26]
    (generated,) = run(engine, ask(sampling=Sampling(form="user", temperature=0.0, stop=["never said", stop])))
    assert (generated.end, generated.stop) == ("stop", stop)
    assert generated.text == whole.text[: whole.text.index(stop)]


def test_a_json_schema_is_kept(engine: LlamaEngine) -> None:
    (generated,) = run(engine, ask(prompt="Invent a person.", tokens=80, sampling=KINDS["schema"]))
    assert generated.end == "stop"
    assert set(json.loads(generated.text)) == {"name", "age"}


def test_a_grammar_is_kept_greedily_too(engine: LlamaEngine) -> None:
    sampling = Sampling(form="user", temperature=0.0, grammar='root ::= ("yes" | "no") "!"')
    (generated,) = run(engine, ask(prompt="Is the sky blue?", sampling=sampling))
    assert generated.text in ("yes!", "no!")
    assert generated.end == "stop"


def test_a_bias_forces_and_forbids(engine: LlamaEngine) -> None:
    (whole,) = run(engine, ask(tokens=3))
    first = whole.ids[0]
    (generated,) = run(
        engine, ask(tokens=3, sampling=Sampling(form="user", temperature=0.0, logit_bias={first: -1000.0}))
    )
    assert first not in generated.ids
    (generated,) = run(engine, ask(tokens=3, sampling=Sampling(form="user", logit_bias={first: 1000.0})))
    assert generated.ids == [first] * 3


def test_ignore_eos_runs_to_the_limit(engine: LlamaEngine) -> None:
    sampling = Sampling(form="user", temperature=0.0, ignore_eos=True)
    (generated,) = run(
        engine, ask(prompt="Answer in one word: what is the capital of France?", tokens=60, sampling=sampling)
    )
    assert (generated.end, len(generated.ids)) == ("length", 60)


def test_penalties_keep_it_from_repeating_itself(engine: LlamaEngine) -> None:
    plain = Sampling(temperature=0.0, ignore_eos=True)
    strict = Sampling(temperature=0.0, ignore_eos=True, repeat_penalty=1.5, penalty_last_n=-1)
    (first,), (second,) = (
        run(engine, ask(prompt="la la la la la la la la", sampling=s, tokens=30)) for s in (plain, strict)
    )
    assert len(set(second.ids)) > len(set(first.ids))


def test_mirostat_talks(engine: LlamaEngine) -> None:
    (generated,) = run(engine, ask(sampling=Sampling(form="user", mirostat=2)))
    assert generated.ids


# --- going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_answer_goes_on_where_it_was(engine: LlamaEngine, kind: str) -> None:
    """As if it had never moved. That its tokens are equal, too, is true of one thread on one machine."""
    sampling = KINDS[kind]
    (whole,) = run(engine, ask(tokens=32, sampling=sampling))
    for cut, tokens in ((1, 9), (5, 13), (len(whole.ids) - 1, 32)):
        (rest,) = run(engine, ask(tokens=tokens, sampling=sampling, prefix=whole.ids[:cut]))
        assert rest.usage is not None and rest.usage.cached_tokens <= rest.usage.prompt_tokens
        assert whole.ids[:cut] + rest.ids == whole.ids[:tokens]
        assert b"".join(whole.pieces[:tokens]).startswith(b"".join(whole.pieces[:cut] + rest.pieces))
    assert (rest.end, b"".join(whole.pieces[:cut] + rest.pieces)) == (whole.end, b"".join(whole.pieces))


def test_a_transcript_that_the_grammar_refuses_is_an_error(engine: LlamaEngine) -> None:
    (generated,) = run(engine, ask(tokens=4))
    refused = refusal(engine, ask(sampling=Sampling(form="user", grammar='root ::= "xyz"'), prefix=generated.ids))
    assert refused.final
    assert refused.error.code is Code.BAD_REQUEST


def test_the_second_turn_of_a_chat_is_not_computed_again(engine: LlamaEngine) -> None:
    text = "The llama is an animal of the Andes, and this is a long text about it. " * 6
    first, second = run(engine, ask(1, text, 8))[0], run(engine, ask(2, text + "And so on.", 8))[0]
    assert first.usage is not None and second.usage is not None
    assert second.usage.cached_tokens > 0.9 * first.usage.prompt_tokens


def test_the_prefix_of_a_running_stream_is_used(engine: LlamaEngine) -> None:
    text = "Another llama walks over the hills and thinks about the world. " * 6
    first = ask(1, text, 200, Sampling(temperature=0.0, ignore_eos=True))
    assert engine.start(first, 0) is None
    while not engine.step(0):
        pass
    second = ask(2, text + "Yes?", 4, Sampling(temperature=0.0, ignore_eos=True))
    assert engine.start(second, 0) is None
    found = {first.key: Generated(), second.key: Generated()}
    while found[second.key].end is None:
        for output in engine.step(0):
            found[output.key].hear(output)
    engine.stop(first.key)
    usage = found[second.key].usage
    assert usage is not None
    assert usage.cached_tokens > 0.9 * usage.prompt_tokens
    # ... and what was copied is right: without any cache it says the same
    engine.forget()
    assert run(engine, second)[0].ids == found[second.key].ids


# --- limits --------------------------------------------------------------------------------


def test_too_long_is_refused_with_the_numbers(engine: LlamaEngine) -> None:
    refused = refusal(engine, ask(tokens=CONTEXT))
    assert (refused.error.code, refused.final) == (Code.TOO_LONG, True)
    assert f"max_tokens {CONTEXT} exceed the context of {CONTEXT}" in refused.error.text


def test_the_last_cell_can_be_used() -> None:
    # A small context is soon full.
    small = load_generating(
        Configure("llama", "smollm2", llama=LlamaOptions(slots=2, context=128, threads=1, batch=64)), print
    )
    start = ask(prompt="la " * 80, tokens=2, sampling=Sampling(temperature=0.0, ignore_eos=True))
    prompt = run(small, start)[0].usage
    assert prompt is not None
    room = 128 - prompt.prompt_tokens
    assert 0 < room < 100
    (generated,) = run(small, Start(start.key, start.prompt, room, 7, sampling=start.sampling))
    assert (generated.end, len(generated.ids)) == ("length", room)
    check_empty(small)


def test_a_context_smaller_than_a_step(tmp_path: Path) -> None:
    """llama.cpp gives a sequence more cells than were asked for, and aborts on a step of more tokens than that."""
    (tmp_path / "tiny.gguf").write_bytes(tiny_model.whole())
    options = LlamaOptions(slots=1, context=64, threads=1, batch=512)
    tiny = load_generating(Configure("llama", str(tmp_path / "tiny.gguf"), llama=options), lambda progress: None)
    outputs: list[Output] = []  # (its tokens are bytes at random, and not text)
    start = ask(prompt="qzx " * 40, tokens=3, sampling=Sampling(temperature=0.0, ignore_eos=True))
    assert tiny.start(start, 0) is None
    for _ in range(20):
        outputs += tiny.step(0)
    assert (outputs[-1].end, sum(len(output.ids) for output in outputs)) == ("length", 3)
    check_empty(tiny)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(grammar="this is no grammar"),
        Sampling(grammar='root ::= "a" unknown'),
        Sampling(grammar="root ::= root"),
        Sampling(grammar="root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
        Sampling(grammar='root ::= (("a"{1,2000}){1,2000}){1,2000}'),
        Sampling(json_schema="{"),
        Sampling(json_schema='{"$ref": "http://example.com/x"}'),
        Sampling(json_schema='{"items":' * 200 + "{}" + "}" * 200),
        Sampling(grammar='root ::= "a"', json_schema="{}"),
        Sampling(form="messages"),
    ],
    ids=[
        "nonsense",
        "unknown rule",
        "left recursion",
        "depth",
        "repetition",
        "no JSON",
        "remote",
        "deep",
        "both",
        "text",
    ],
)
def test_what_makes_no_sense_is_refused_for_good(engine: LlamaEngine, sampling: Sampling) -> None:
    refused = refusal(engine, ask(sampling=sampling))
    assert (refused.error.code, refused.final) == (Code.BAD_REQUEST, True)
    assert refused.error.text


def test_an_empty_prompt_is_refused(engine: LlamaEngine) -> None:
    assert refusal(engine, ask(prompt="", sampling=Sampling())).error.code is Code.BAD_REQUEST


def test_more_than_there_are_slots_is_refused_for_now(engine: LlamaEngine) -> None:
    for number in range(SLOTS):
        assert engine.start(ask(number), 0) is None
    refused = refusal(engine, ask(SLOTS))
    assert (refused.error.code, refused.final) == (Code.BUSY, False)
    for number in range(SLOTS):
        engine.stop(ask(number).key)


def test_a_deadline_ends_it_with_what_there_is(engine: LlamaEngine) -> None:
    start = ask(tokens=200, sampling=Sampling(temperature=0.0, ignore_eos=True), deadline_ms=1_000)
    assert engine.start(start, 0) is None
    generated = Generated()
    for now_ms in range(0, 2_000, 100):
        for output in engine.step(now_ms):
            generated.hear(output)
        if generated.end:
            break
    assert generated.end == "deadline"
    assert 0 < len(generated.ids) < 20


def test_a_cancel_in_the_middle_of_a_long_prompt_is_heard(engine: LlamaEngine) -> None:
    start = ask(prompt="word " * 900, tokens=8)
    assert engine.start(start, 0) is None
    assert engine.step(0) == []
    engine.stop(start.key)
    assert engine.step(0) == []


def test_models_that_are_not_there_are_named() -> None:
    with pytest.raises(model_files.NoSuchModel, match="names are: smollm2"):
        model_files.find("/nowhere/x.gguf")


def test_requests_that_are_stopped_anywhere_leave_nothing(engine: LlamaEngine) -> None:
    """After each cancel and deadline llama.cpp's own cache is compared with our account. For long: bench.cancels."""
    engine.forget()
    before = cancels.answer(engine)
    storm = cancels.storm(engine, 10, seed=1)
    assert storm.ended.total() >= 10
    assert {"in its answer", "by its deadline"} <= set(storm.ended)
    assert cancels.answer(engine) == before


def test_a_hopelessly_long_prompt_is_not_even_counted(engine: LlamaEngine) -> None:
    refused = refusal(engine, ask(prompt="x" * 3_000_000))
    assert refused.error.code is Code.TOO_LONG
    assert "a prompt of 3000" in refused.error.text
