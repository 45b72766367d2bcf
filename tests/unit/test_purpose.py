"""What a model is for, by the header of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llambo.mesh.wire.messages import Kind
from llambo.worker.config import LlamaOptions
from llambo.worker.models import gguf, model_files
from llambo.worker.models.gguf import ModelFile
from llambo.worker.models.purpose import RERANK_TEMPLATE, purpose_of
from tests import bert

CLASSIFIER = (("cls.output.weight", 100),)
PROMPT = {RERANK_TEMPLATE: "{query} {document}"}


def file(architecture: str, tensors: tuple[tuple[str, int], ...] = (), **more: Any) -> ModelFile:
    """`more`: keys of the architecture, with `__` for a point."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return ModelFile("x.gguf", 10**6, {"general.architecture": architecture, **own}, len(tensors), tensors)


@pytest.mark.parametrize(
    ("given", "kind", "pooling", "whole"),
    [
        (file("llama"), "generate", "mean", False),
        (file("llama", pooling_type=0), "generate", "mean", False),
        (file("bert", pooling_type=1), "embed", "mean", True),
        (file("bert", pooling_type=2), "embed", "cls", True),
        (file("nomic-bert", pooling_type=1), "embed", "mean", True),
        # An encoder that says nothing of pooling still cannot generate
        (file("modern-bert"), "embed", "mean", True),
        (file("bert", pooling_type=0), "embed", "mean", True),
        (file("gemma-embedding", pooling_type=1), "embed", "mean", True),
        # Each token sees those before it: the last of several steps has seen all
        (file("qwen3", pooling_type=3), "embed", "last", False),
        (file("qwen3", pooling_type=3, attention__causal=False), "embed", "last", True),
        (file("llama", pooling_type=1), "embed", "mean", True),
        (file("bert", CLASSIFIER, pooling_type=4), "rerank", "rank", True),
        (file("jina-bert-v2", (("cls.weight", 100),), pooling_type=4), "rerank", "rank", True),
        # Not a number
        (file("llama", pooling_type="mean"), "generate", "mean", False),
    ],
)
def test_a_header_says_what_a_model_is_for(given: ModelFile, kind: Kind, pooling: str, whole: bool) -> None:
    found = purpose_of(given)
    assert (found.kind, found.pooling, found.whole, found.problem) == (kind, pooling, whole, "")


def with_prompt(given: ModelFile) -> ModelFile:
    return ModelFile(given.path, given.size_bytes, {**given.meta, **PROMPT}, given.tensors, given.tensor_sizes)


def test_a_reranker_of_yes_and_no() -> None:
    given = file("qwen3", CLASSIFIER, pooling_type=4, classifier__output_labels=["yes", "no"])
    found = purpose_of(with_prompt(given))
    assert (found.kind, found.yes_or_no, found.whole, found.problem) == ("rerank", True, False, "")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        # As converters wrote it before they knew rerankers
        (file("qwen3", CLASSIFIER, pooling_type=4, classifier__output_labels=["yes", "no"]), RERANK_TEMPLATE),
        (with_prompt(file("qwen3", pooling_type=4)), "without a classifier"),
        (file("bert", pooling_type=4), "without a classifier"),
        (
            file("bert", CLASSIFIER, pooling_type=4, classifier__output_labels=["joy", "anger", "fear"]),
            "joy, anger, fear",
        ),
        (file("bert", pooling_type=7), "number 7, is not known"),
    ],
)
def test_one_that_cannot_do_what_it_is_for_has_a_reason(given: ModelFile, reason: str) -> None:
    assert reason in purpose_of(given).problem


def test_the_list_of_this_host_shows_the_kind_and_the_reason(tmp_path: Path) -> None:
    found = {}
    for name, pooling in (("embed", 1), ("rerank", 4)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(bert.file_of(bert.random_weights(1), pooling=pooling))
        found[name] = model_files.look_at(name, path, "", LlamaOptions(), 2**40, 2)
    assert (found["embed"].kind, found["embed"].problem) == ("embed", "")
    assert found["rerank"].kind == "rerank" and "without a classifier" in found["rerank"].problem


def test_an_encoder_has_no_more_context_than_it_was_trained_for_and_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(bert.file_of(bert.random_weights(1), pooling=1))
    read = gguf.read(str(path))
    assert read.vocabulary == len(bert.TINY.vocabulary)
    layout = model_files.layout(LlamaOptions(context=4096), read, 2**40, 2)
    assert layout.context == bert.TINY.context
    step = 4 * bert.TINY.context * read.vocabulary
    assert layout.need_bytes == read.size_bytes + model_files.WORK_BYTES + step


def test_an_embedding_model_that_does_not_fit_says_what_it_needs() -> None:
    given = ModelFile("x.gguf", 10**6, file("bert", pooling_type=1, context_length=8192).meta, 0, (), 250_000)
    assert model_files.layout(LlamaOptions(), given, 2**40, 2).context == model_files.WHOLE_CONTEXT
    # It is made smaller where that is allowed, and refused where it is not
    assert model_files.layout(LlamaOptions(), given, 2**30, 2).context == 512
    with pytest.raises(gguf.BadModelFile, match=r"7885 MiB to work in; 1024 MiB are free; --ctx 768 would fit"):
        model_files.layout(LlamaOptions(context=8000), given, 2**30, 2)
