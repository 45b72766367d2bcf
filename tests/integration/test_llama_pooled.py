"""Models that embed or rerank, on llama.cpp: a tiny BERT with random weights, against the same computed in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from bench import tiny_model
from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Task
from llambo.worker.config import LlamaOptions
from llambo.worker.engine.protocol import Configure, Output, Progress, Refused, Start
from llambo.worker.llama import llama
from llambo.worker.llama.embedder import Embedder
from llambo.worker.llama.loading import load
from llambo.worker.llama.pooled_engine import PooledEngine
from llambo.worker.models import gguf, model_files
from llambo.worker.models.purpose import RERANK_TEMPLATE, purpose_of
from tests import bert
from tests.integration.test_llama_tasks import outputs_of

SLOTS = 4
CONTEXT = bert.TINY.context
TEXTS = [
    "the cat sits on the mat.",
    "a",
    "parliament raised the rate of bonds, again and again and again.",
    "zz top 42",
]
QUERY, DOCUMENTS = "where do cats sleep?", ["on a mat", "bonds fell", "cats, as a rule, sleep where it is warm."]

Load = Callable[..., PooledEngine]


@pytest.fixture(scope="module")
def weights() -> bert.Weights:
    return bert.random_weights(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def loaded(folder: Path, content: bytes, name: str = "tiny") -> PooledEngine:
    path = folder / f"{name}.gguf"
    path.write_bytes(content)
    options = LlamaOptions(slots=SLOTS, threads=1, batch=64)
    engine = load(Configure("llama", str(path), llama=options, safe=True), lambda _: None)
    assert isinstance(engine, PooledEngine)
    return engine


def why_not(folder: Path, content: bytes) -> str:
    """The reason with which it is not loaded."""
    path, said = folder / "refused.gguf", []
    path.write_bytes(content)

    def listen(progress: Progress) -> None:
        said.append(progress.problem)

    with pytest.raises(SystemExit):
        load(Configure("llama", str(path), llama=LlamaOptions(threads=1), safe=True), listen)
    return said[-1]


@pytest.fixture(scope="module")
def engine(folder: Path, weights: bert.Weights) -> PooledEngine:
    return loaded(folder, bert.file_of(weights, pooling=1))


@pytest.fixture(scope="module")
def reranker(folder: Path) -> PooledEngine:
    return loaded(folder, bert.file_of(bert.random_weights(2, classes=1), pooling=4), "rank")


def task(kind: Task, data: Any, number: int = 1, **options: Any) -> Start:
    body = msgspec.msgpack.encode(data)
    return Start(bytes([number]) * 24, body, limits.RESULT_PIECES, 0, task=kind, options=tasks.TaskOptions(**options))


def result(engine: PooledEngine, start: Start, kind: Any) -> Any:
    output = outputs_of(engine, start)[start.key]
    assert output.end == "stop", output
    return msgspec.msgpack.decode(b"".join(output.pieces), type=kind)


def vectors_in(pieces: list[bytes]) -> Any:
    return np.array(tasks.vectors_of(msgspec.msgpack.decode(b"".join(pieces), type=tasks.EmbedResult)))


def embedded(engine: PooledEngine, texts: list[str], **options: Any) -> Any:
    found = result(engine, task("embed", texts, **options), tasks.EmbedResult)
    return np.array(tasks.vectors_of(found)), found


def ranked(engine: PooledEngine, *documents: str, raw: bool = False) -> tasks.RerankResult:
    found = result(engine, task("rerank", tasks.RerankInput(QUERY, list(documents)), raw=raw), tasks.RerankResult)
    assert isinstance(found, tasks.RerankResult)
    return found


def refused(engine: PooledEngine, start: Start) -> tuple[Code, str]:
    found = engine.start(start, 0)
    assert isinstance(found, Refused) and found.final, found
    return found.error.code, found.error.text


# --- embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "cls"), (0, "mean")])
def test_vectors_are_those_of_the_model(folder: Path, weights: bert.Weights, number: int, pooling: str) -> None:
    engine = loaded(folder, bert.file_of(weights, pooling=number), f"pooling-{number}")
    found, reply = embedded(engine, TEXTS * 20)
    assert (reply.pooling, reply.size, reply.normalized) == (pooling, bert.TINY.width, True)
    assert reply.tokens == [len(bert.framed(bert.ids_of(text))) for text in TEXTS] * 20
    for at, text in enumerate(TEXTS):
        wanted = bert.pooled(bert.forward(weights, bert.TINY, bert.framed(bert.ids_of(text))), pooling)
        # In whatever company: some share a step, some have one for themselves
        assert (found[at :: len(TEXTS)] @ wanted > 0.999).all()
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    # And they are not all the same
    assert (found[0] @ found[2]) < 0.99


def test_what_the_model_is(engine: PooledEngine) -> None:
    ready = engine.ready()
    (info,) = ready.models
    assert (info.name, info.kind, info.context_tokens, ready.slots) == ("tiny", "embed", CONTEXT, SLOTS)
    found = result(engine, task("model_info", b""), dict[str, Any])
    assert (found["kind"], found["pooling"], found["architecture"]) == ("embed", "mean", "bert")
    assert (found["embedding_size"], found["context_tokens"]) == (bert.TINY.width, CONTEXT)


def test_a_text_of_the_whole_context_fits_and_a_longer_one_is_refused_with_both_numbers(
    engine: PooledEngine, weights: bert.Weights
) -> None:
    text = "a " * (CONTEXT - 2)
    found, reply = embedded(engine, ["x", text, "y"])
    assert reply.tokens == [3, CONTEXT, 3]
    wanted = bert.pooled(bert.forward(weights, bert.TINY, bert.framed(bert.ids_of(text))), "mean")
    assert found[1] @ wanted > 0.999
    code, said = refused(engine, task("embed", ["x", text + "a"]))
    assert code is Code.TOO_LONG and f"text 1 has {CONTEXT + 1} tokens; the context has {CONTEXT}" in said
    assert refused(engine, task("embed", ["x", ""])) == (Code.BAD_REQUEST, "text 1 is empty")


def test_a_long_step_shows_that_it_goes_on(folder: Path, weights: bert.Weights) -> None:
    path = folder / "slow.gguf"
    path.write_bytes(bert.file_of(weights, pooling=1))
    options, calls = LlamaOptions(slots=SLOTS, threads=1), []
    layout = model_files.layout(options, gguf.read(str(path)), 2**40, 1)
    purpose = purpose_of(gguf.read(str(path)))
    embedder = Embedder(llama.Model(str(path), safe=True), layout, CONTEXT, purpose, lambda: calls.append(1))
    found = embedder.embed([bert.CLS, 9, bert.SEP], range(3), [0] * 3)
    assert found.shape == (1, bert.TINY.width) and len(calls) > 10


def test_it_pools_as_its_file_says_and_not_otherwise(engine: PooledEngine) -> None:
    code, said = refused(engine, task("embed", ["x"], pooling="last"))
    assert code is Code.BAD_REQUEST and "pools by 'mean', as its file says, and not by 'last'" in said
    assert embedded(engine, ["x"], pooling="mean")[1].pooling == "mean"


@pytest.mark.parametrize("kind", ["generate", "rerank"])
def test_it_refuses_what_it_is_not_for(engine: PooledEngine, kind: Task) -> None:
    code, said = refused(engine, task(kind, "hello"))
    assert code is Code.BAD_REQUEST and "kind 'embed'" in said and kind in said


def test_tasks_share_slots_and_steps_and_one_that_is_cancelled_leaves_nothing(engine: PooledEngine) -> None:
    starts = [task("embed", TEXTS * 5, number) for number in range(1, SLOTS + 1)]
    alone = outputs_of(engine, starts[0])[starts[0].key].pieces
    for start in starts:
        assert engine.start(start, 0) is None
    busy = engine.start(task("embed", ["x"], 9), 0)
    assert isinstance(busy, Refused) and not busy.final and busy.error.code is Code.BUSY
    engine.step(0)
    engine.stop(starts[1].key)
    found: dict[bytes, Output] = {}
    while engine.next_wakeup_ms() == 0:
        found |= {output.key: output for output in engine.step(0)}
    assert set(found) == {start.key for start in starts} - {starts[1].key}
    for output in found.values():
        assert (vectors_in(output.pieces) * vectors_in(alone)).sum(axis=1).min() > 0.9999


def test_a_model_without_a_cache_tokenizes_and_back(engine: PooledEngine) -> None:
    found = result(engine, Start(bytes([1]) * 24, b"a cat", 9, 0, task="tokenize"), tasks.TokenizeResult)
    assert found.ids == bert.framed(bert.ids_of("a cat"))
    assert result(engine, task("detokenize", found.ids), tasks.DetokenizeResult).text.strip() == b"a cat"


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_causal_model_with_pooling_gives_the_vector_of_its_last_token(
    folder: Path, flash_attn: Literal["on", "off"]
) -> None:
    """As Qwen3's do. A text takes several steps, and has the vector that a model that generates would give it."""
    path, file = folder / f"causal-{flash_attn}.gguf", tiny_model.build()
    options = LlamaOptions(slots=2, context=256, threads=1, kv_type="f32", flash_attn=flash_attn)
    texts = [f"{word} " * count for word, count in (("one", 1), ("two", 30), ("three", 24))]
    path.write_bytes(file.encode())
    generating: Any = load(Configure("llama", str(path), llama=options, safe=True), lambda _: None)
    wanted, _ = embedded(generating, texts, pooling="last")
    file.entries.append(tiny_model.Entry(b"llama.pooling_type", tiny_model.U32, 3))
    path.write_bytes(file.encode())
    pooled = load(Configure("llama", str(path), llama=options, safe=True), lambda _: None)
    assert isinstance(pooled, PooledEngine)
    found, reply = embedded(pooled, texts)
    assert reply.pooling == "last" and max(reply.tokens) > 128
    assert ((found * wanted).sum(axis=1) > 0.999).all()


# --- reranking -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model_from_0_to_1(folder: Path, reranker: PooledEngine) -> None:
    weights = bert.random_weights(2, classes=1)
    raw, scores = ranked(reranker, *DOCUMENTS, raw=True), ranked(reranker, *DOCUMENTS)
    pairs = [bert.framed(bert.ids_of(QUERY), bert.ids_of(document)) for document in DOCUMENTS]
    wanted = [float(bert.classified(weights, bert.forward(weights, bert.TINY, pair))[0]) for pair in pairs]
    assert raw.tokens == scores.tokens == [len(pair) for pair in pairs]
    assert raw.scores == pytest.approx(wanted, abs=0.02)
    assert max(wanted) - min(wanted) > 0.1
    assert scores.scores == pytest.approx([1 / (1 + np.exp(-score)) for score in raw.scores], abs=1e-6)


def test_a_document_that_is_too_long_with_the_query_is_refused_with_both_numbers(reranker: PooledEngine) -> None:
    data = tasks.RerankInput(QUERY, ["x", "a " * CONTEXT])
    code, said = refused(reranker, task("rerank", data))
    tokens = len(bert.ids_of(QUERY)) + CONTEXT + 3
    assert code is Code.TOO_LONG and f"document 1 has {tokens} tokens with the query" in said and f"{CONTEXT}" in said


def test_a_reranker_refuses_what_it_is_not_for(reranker: PooledEngine) -> None:
    assert reranker.ready().models[0].kind == "rerank"
    for kind in ("generate", "embed"):
        code, said = refused(reranker, task(kind, ["x"]))
        assert code is Code.BAD_REQUEST and "kind 'rerank'" in said
    code, said = refused(reranker, task("rerank", {"query": "", "documents": ["x"]}))
    assert code is Code.BAD_REQUEST and "cannot be read" in said


def test_a_prompt_in_the_file_is_used_as_it_is(folder: Path) -> None:
    weights = bert.random_weights(2, classes=1)
    prompt = "[CLS] q {query} d {document} [SEP]"
    engine = loaded(folder, bert.file_of(weights, pooling=4, more={RERANK_TEMPLATE: prompt}), "prompt")
    # A query cannot put the document in a second place
    found = result(
        engine, task("rerank", tasks.RerankInput("{document}", ["a cat"]), raw=True), tasks.RerankResult
    )  # fmt: skip
    pair = [bert.CLS, *bert.ids_of("q {document} d a cat"), bert.SEP]
    assert found.tokens == [len(pair)]
    wanted = bert.classified(weights, bert.forward(weights, bert.TINY, pair))[0]
    assert found.scores == pytest.approx([wanted], abs=0.02)


def test_a_file_that_cannot_rerank_is_refused_with_the_reason(folder: Path, weights: bert.Weights) -> None:
    assert "without a classifier" in why_not(folder, bert.file_of(weights, pooling=4))
    emotions = bert.file_of(bert.random_weights(2, classes=3), pooling=4, labels=["joy", "anger", "fear"])
    assert "3 classes (joy, anger, fear)" in why_not(folder, emotions)
    prompt = bert.file_of(bert.random_weights(2, classes=1), pooling=4, more={RERANK_TEMPLATE: "{query}"})
    assert "no {document}" in why_not(folder, prompt)


def test_weights_that_are_no_numbers_are_found_while_loading(folder: Path, weights: bert.Weights) -> None:
    broken = {**weights, "token_embd_norm.weight": np.full(bert.TINY.width, np.nan, np.float32)}
    assert "made no numbers" in why_not(folder, bert.file_of(broken, pooling=1))
