"""Tasks on a real model, by hand: tokens, embeddings against another binding of llama.cpp, and what they disturb."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from llambo.mesh.service import host
from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Task
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions
from llambo.worker.engine.protocol import Configure, Output, Refused, Start
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.llama.pooled_engine import PooledEngine
from llambo.worker.models import model_files
from tests.integration.test_llama_engine import CONTEXT, SLOTS, ask, engine, load_generating, loaded, reported, run

__all__ = ["engine", "loaded", "reported"]  # fixtures
TEXTS = [
    "The cat sits on the mat.",
    "A kitten rests on a rug.",
    "Parliament raised the interest rate of bonds.",
    "é 漢字 \N{GRINNING FACE}",
    "one two three four five six seven eight nine ten " * 6,
    "x",
]


def task(kind: Task, data: Any = b"", number: int = 1, pieces: int = limits.RESULT_PIECES, **options: Any) -> Start:
    body = data if isinstance(data, bytes) else msgspec.msgpack.encode(data)
    return Start(bytes([number]) * 24, body, pieces, 0, task=kind, options=tasks.TaskOptions(**options))


def outputs_of(engine: LlamaEngine | PooledEngine, *starts: Start) -> dict[bytes, Output]:
    for start in starts:
        assert engine.start(start, 0) is None
    found: dict[bytes, Output] = {}
    for _ in range(10_000):
        for output in engine.step(0):
            if output.end is not None:
                found[output.key] = output
        if len(found) == len(starts):
            return found
    raise AssertionError("it goes on for ever")


def result(engine: LlamaEngine, start: Start, kind: Any) -> Any:
    output = outputs_of(engine, start)[start.key]
    assert (output.end, output.ids) == ("stop", [0] * len(output.pieces))
    assert all(0 < len(piece) <= limits.RESULT_PIECE_BYTES for piece in output.pieces)
    return msgspec.msgpack.decode(b"".join(output.pieces), type=kind)


def refused(engine: LlamaEngine, start: Start) -> tuple[Code, str]:
    found = engine.start(start, 0)
    assert isinstance(found, Refused) and found.final
    return found.error.code, found.error.text


def vectors(engine: LlamaEngine, texts: list[str], **options: Any) -> Any:
    return np.array(tasks.vectors_of(result(engine, task("embed", texts, **options), tasks.EmbedResult)))


#: Embeddings of texts, pooled and normalised by llama.cpp itself, each text in one step.
REFERENCE = """
import json, llama_cpp, sys
path, texts = json.load(sys.stdin)
llama = llama_cpp.Llama(
    path, embedding=True, pooling_type=1, n_ctx=256, n_batch=256, n_ubatch=256, n_threads=1, n_threads_batch=1,
    verbose=False,
)
print(json.dumps([[llama.embed(text, normalize=normalize) for text in texts] for normalize in (True, False)]))
"""


@pytest.fixture(scope="module")
def reference() -> Any:
    """By another binding, in a process of its own: it loads a library of its own."""
    given = json.dumps([str(model_files.find("smollm2")), TEXTS])
    child = subprocess.run(
        [sys.executable, "-c", REFERENCE], input=given, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert child.returncode == 0, child.stderr
    return np.array(json.loads(child.stdout))


def test_tokens_and_back(engine: LlamaEngine) -> None:
    for text in TEXTS:
        found = result(engine, task("tokenize", text.encode()), tasks.TokenizeResult)
        assert len(found.ids) == len(found.pieces) > 0
        assert b"".join(found.pieces) == text.encode()
        assert result(engine, task("detokenize", found.ids), tasks.DetokenizeResult).text == text.encode()


def test_control_tokens_are_meant_and_shown_only_if_asked_for(engine: LlamaEngine) -> None:
    text = b"<|im_start|>"
    assert len(result(engine, task("tokenize", text), tasks.TokenizeResult).ids) > 1
    (id,) = result(engine, task("tokenize", text, special=True), tasks.TokenizeResult).ids
    assert result(engine, task("detokenize", [id]), tasks.DetokenizeResult).text == b""
    assert result(engine, task("detokenize", [id], special=True), tasks.DetokenizeResult).text == text


def test_a_prompt_in_its_template_has_as_many_tokens_as_its_answer_says(engine: LlamaEngine) -> None:
    found = result(engine, task("tokenize", b"Hello", form="user", system="Be brief."), tasks.TokenizeResult)
    start = ask(prompt="Hello", tokens=1)
    start = msgspec.structs.replace(start, sampling=msgspec.structs.replace(start.sampling, system="Be brief."))
    (answer,) = run(engine, start)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(found.ids)


@pytest.mark.needs("llama-native")
def test_embeddings_are_those_of_llama_cpp(engine: LlamaEngine, reference: Any) -> None:
    found, (wanted, wanted_raw) = vectors(engine, TEXTS), reference
    assert found.shape == wanted.shape
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    # By angle: sums of halves round differently in another order.
    assert ((found * wanted).sum(axis=1) > 0.999).all()
    raw = vectors(engine, TEXTS[:3], normalized=False)
    assert np.allclose(np.linalg.norm(raw, axis=1), np.linalg.norm(wanted_raw[:3], axis=1), rtol=0.02)
    # And what is alike is near
    assert found[0] @ found[1] > found[0] @ found[2]


def test_texts_in_one_batch_do_not_know_of_each_other(engine: LlamaEngine) -> None:
    together = vectors(engine, TEXTS * 2)
    for number, text in enumerate(TEXTS):
        (alone,) = vectors(engine, [text])
        assert (together[number :: len(TEXTS)] @ alone > 0.999).all()


def test_the_last_token_instead_of_the_mean(engine: LlamaEngine) -> None:
    mean, last = vectors(engine, TEXTS[:2]), vectors(engine, TEXTS[:2], pooling="last")
    assert ((mean * last).sum(axis=1) < 0.99).all()


def test_answers_do_not_change_while_embeddings_are_made(engine: LlamaEngine) -> None:
    starts = [ask(number, f"Tell me about the number {number}.", 12) for number in range(1, SLOTS)]
    quiet = [one.ids for one in run(engine, *starts)]
    engine.forget()
    cells = [engine.cells(slot) for slot in range(SLOTS)]
    for start in starts:
        assert engine.start(start, 0) is None
    assert engine.start(task("embed", TEXTS, 9), 0) is None
    ids: dict[bytes, list[int]] = {start.key: [] for start in starts}
    order: list[bytes] = []
    for _ in range(10_000):
        for output in engine.step(0):
            if output.key in ids:
                ids[output.key] += output.ids
            if output.end is not None:
                order.append(output.key)
        if len(order) == SLOTS:
            break
    assert list(ids.values()) == quiet
    engine.forget()
    assert [engine.cells(slot) for slot in range(SLOTS)] == cells


def test_a_cancel_in_the_middle_leaves_nothing(engine: LlamaEngine) -> None:
    for steps in range(4):
        assert engine.start(task("embed", TEXTS * 10), 0) is None
        for _ in range(steps):
            assert engine.step(0) == []
        engine.stop(bytes([1]) * 24)
        assert engine.next_wakeup_ms() > 2**60
    (found,) = vectors(engine, ["x"])
    (again,) = vectors(engine, ["x"])
    assert found @ again > 0.999


def test_a_deadline_ends_embeddings(engine: LlamaEngine) -> None:
    start = msgspec.structs.replace(task("embed", TEXTS * 10), deadline_ms=100)
    assert engine.start(start, 0) is None
    assert engine.step(50) == []
    (output,) = engine.step(100)
    assert (output.end, output.pieces) == ("deadline", [])


def test_what_cannot_be_done_is_refused_with_its_numbers(engine: LlamaEngine) -> None:
    code, text = refused(engine, task("embed", ["short", "word " * CONTEXT]))
    assert code is Code.TOO_LONG and f"text 1 has {CONTEXT + 1} tokens" in text and f"has {CONTEXT}" in text
    assert refused(engine, task("embed", ["a", ""])) == (Code.BAD_REQUEST, "text 1 is empty")
    code, text = refused(engine, task("embed", ["a"] * 20, pieces=1))
    assert code is Code.TOO_LONG and "20 embeddings of 576 numbers" in text and "16384" in text
    code, text = refused(engine, task("detokenize", [5, 10**6]))
    assert code is Code.BAD_REQUEST and "no token 1000000" in text and "49152" in text
    assert refused(engine, task("detokenize", ["five"]))[0] is Code.BAD_REQUEST
    assert refused(engine, task("embed", b"\xc1"))[0] is Code.BAD_REQUEST
    assert refused(engine, task("embed", []))[0] is Code.BAD_REQUEST
    assert refused(engine, task("tokenize", b"word " * 4000, pieces=1))[0] is Code.TOO_LONG
    assert refused(engine, task("tokenize", b"no messages", form="messages"))[0] is Code.BAD_REQUEST


def test_without_memory_for_embeddings_there_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_generating(
        Configure("llama", "smollm2", llama=LlamaOptions(slots=1, context=256, threads=1)), lambda _: None
    )
    monkeypatch.setattr(host, "free_memory_bytes", lambda: 1)
    code, text = refused(small, task("embed", ["hello"]))
    assert code is Code.BUSY and "0 MiB are free" in text and "--ctx" in text
    # And answers go on
    assert run(small, ask(tokens=4))[0].end is not None


def test_what_a_model_is(engine: LlamaEngine) -> None:
    info = result(engine, task("model_info"), dict[str, Any])
    assert (info["model"], info["architecture"], info["vocabulary"]) == ("smollm2", "llama", 49_152)
    assert (info["embedding_size"], info["layers"], info["context_tokens"]) == (576, 30, CONTEXT)
    assert info["parameters"] > 10**8
    assert info["description"] == "llama 135M Q4_1"
    assert info["sampling"]["temperature"] == 0.8
    assert info["sampling_from_model"] == []
    assert "<|im_start|>" in info["chat_template"]
