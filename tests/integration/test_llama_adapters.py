"""Adapters (LoRA) of a real model: streams of several in one engine, and files that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench import lora, tiny_model
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Sampling
from llambo.worker.config import Adapter, LlamaOptions
from llambo.worker.engine.protocol import CANNOT_LOAD, Configure, Progress, Start
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.llama.loading import load
from llambo.worker.models import model_files
from tests.integration.test_llama_engine import Generated, ask, check_empty, load_generating, run

OPTIONS = LlamaOptions(slots=6, context=512, threads=1, batch=128)
ADAPTERS = ("pirate", "poet")
MODELS = ("smollm2", *(f"smollm2+{name}" for name in ADAPTERS))
#: Two tokens whose log probabilities differ by less are equally likely, but for rounding.
TIE = 0.1
PROMPTS = ("Tell me a short story.", "Name three animals.")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    folder, base = tmp_path_factory.mktemp("adapters"), model_files.find("smollm2")
    return tuple(
        Adapter(name, str(lora.write(folder / f"{name}.gguf", base, seed))) for seed, name in enumerate(ADAPTERS)
    )


@pytest.fixture(scope="module")
def loaded(files: tuple[Adapter, ...]) -> LlamaEngine:
    options = replace(OPTIONS, adapters=files)
    return load_generating(Configure("llama", "smollm2", llama=options, safe=True), lambda progress: None)


@pytest.fixture
def engine(loaded: LlamaEngine) -> Iterator[LlamaEngine]:
    loaded.forget()
    yield loaded
    check_empty(loaded)


def of(model: str, start: Start) -> Start:
    return msgspec.structs.replace(start, model=model, logprobs=2)


def check_same(one: Generated, other: Generated) -> None:
    """The same tokens, unless at the first that differs two were equally likely: the last digits of a number depend on
    what else is in its step, also without adapters.
    """
    differs = next((at for at, ids in enumerate(zip(one.ids, other.ids, strict=False)) if ids[0] != ids[1]), None)
    if differs is not None:
        first, second = one.logprobs[differs].top
        assert {first.id, second.id} == {one.ids[differs], other.ids[differs]}, (one.text, other.text)
        assert first.logprob - second.logprob < TIE, (one.text, other.text)


def asks() -> list[Start]:
    """Each model with each prompt."""
    pairs = [(model, prompt) for prompt in PROMPTS for model in MODELS]
    return [of(model, ask(number, prompt, 10)) for number, (model, prompt) in enumerate(pairs, 1)]


def alone(engine: LlamaEngine, start: Start) -> Generated:
    engine.forget()
    (generated,) = run(engine, start)
    return generated


def test_each_adapter_is_a_model_with_a_fingerprint_of_its_own(engine: LlamaEngine) -> None:
    ready = engine.ready()
    assert tuple(model.name for model in ready.models) == MODELS
    assert len({model.fingerprint for model in ready.models}) == len(MODELS)
    assert {model.context_tokens for model in ready.models} == {OPTIONS.context}
    assert engine.start(msgspec.structs.replace(ask(), task="model_info", max_tokens=256), 0) is None
    (info,) = engine.step(0)
    assert msgspec.msgpack.decode(b"".join(info.pieces))["adapters"] == list(ADAPTERS)


def test_streams_of_several_adapters_get_the_answers_that_they_get_alone(engine: LlamaEngine) -> None:
    single = [alone(engine, start) for start in asks()]
    for first in range(0, len(single), len(MODELS)):
        assert len({generated.text for generated in single[first : first + len(MODELS)]}) == len(MODELS)
    engine.forget()
    together = run(engine, *asks())
    for one, other in zip(single, together, strict=True):
        check_same(one, other)


def test_the_base_is_what_it_is_without_adapters(engine: LlamaEngine) -> None:
    plain = load_generating(Configure("llama", "smollm2", llama=OPTIONS, safe=True), lambda progress: None)
    assert plain.ready().models[0].fingerprint == engine.ready().models[0].fingerprint
    start = of("smollm2", ask(1, PROMPTS[0], 8))
    check_same(run(plain, start)[0], alone(engine, start))


def test_no_stream_waits_for_those_of_another_adapter(engine: LlamaEngine) -> None:
    """Every step gives each of them its token."""
    endless = Sampling(form="user", temperature=0.0, ignore_eos=True)
    starts = [of(MODELS[at % 3], ask(at + 1, PROMPTS[0], 400, endless)) for at in range(5)]
    for start in starts:
        assert engine.start(start, 0) is None
    streams = engine._streams
    for _ in range(1_000):
        if all(stream.first for stream in streams.values()):
            break
        engine.step(0)  # until all prompts are decoded
    before = {key: stream.index for key, stream in streams.items()}
    for _ in range(10):
        engine.step(0)
    after = {key: stream.index for key, stream in streams.items()}
    for start in starts:
        engine.stop(start.key)
    assert after == {key: index + 10 for key, index in before.items()}


def test_a_cached_prefix_is_never_that_of_another_adapter(engine: LlamaEngine) -> None:
    text = "The llama is an animal of the Andes, and this is a long text about it. " * 4
    for model in MODELS:
        start = of(model, ask(1, text, 4))
        first, again = run(engine, start)[0], run(engine, start)[0]
        assert first.usage is not None and again.usage is not None
        assert first.usage.cached_tokens == 0, f"{model} reused what another one has computed"
        assert again.usage.cached_tokens > 0.9 * again.usage.prompt_tokens
        check_same(first, again)


def test_a_continued_answer_goes_on_with_its_adapter(engine: LlamaEngine) -> None:
    start = of("smollm2+pirate", ask(1, tokens=16))
    whole = alone(engine, start)
    engine.forget()
    (rest,) = run(engine, msgspec.structs.replace(start, prefix=whole.ids[:9]))
    rest.ids, rest.logprobs = whole.ids[:9] + rest.ids, whole.logprobs[:9] + rest.logprobs
    check_same(whole, rest)


def test_an_adapter_that_is_not_loaded_is_refused_and_embeddings_have_none(engine: LlamaEngine) -> None:
    unknown = engine.start(of("smollm2+priest", ask()), 0)
    assert unknown is not None and not unknown.final
    assert (unknown.error.code, "pirate, poet" in unknown.error.text) == (Code.UNKNOWN_MODEL, True)
    embeds = engine.start(msgspec.structs.replace(of("smollm2+poet", ask()), task="embed"), 0)
    assert embeds is not None and embeds.final
    assert "without adapters" in embeds.error.text


# --- files ---


def refused(base: str, path: Path) -> str:
    """Why the engine does not load."""
    sent: list[Progress] = []
    options = replace(OPTIONS, adapters=(Adapter("x", str(path)),))
    with pytest.raises(SystemExit) as ended:
        load(Configure("llama", base, llama=options, safe=True), sent.append)
    assert ended.value.code == CANNOT_LOAD
    return sent[-1].problem


def test_a_file_that_does_not_fit_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    base = tmp_path / "tiny.gguf"
    base.write_bytes(tiny_model.whole())
    path = tmp_path / "x.gguf"
    # Of another model
    lora.write(path, model_files.find("smollm2"), 1)
    assert re.search(r"adapter .*x.gguf cannot be used with .*tiny.gguf: .*another model", refused(str(base), path))
    # Truncated
    path.write_bytes(lora.write(path, base, 1).read_bytes()[:-100])
    assert "is cut off" in refused(str(base), path)
    # Numbers that are none, which would spoil the cells of a slot
    file = lora.file_for(base, 1)
    file.data[:64] = np.full(16, np.nan, "<f4").tobytes()
    path.write_bytes(file.encode())
    assert "not a number" in refused(str(base), path)
    # And the whole one is loaded
    lora.write(path, base, 1)
    options = replace(OPTIONS, adapters=(Adapter("x", str(path)),))
    engine = load_generating(Configure("llama", str(base), llama=options, safe=True), lambda progress: None)
    assert [model.name for model in engine.ready().models] == ["tiny", "tiny+x"]
