"""Models of all kinds in one mesh of fake engines: reranking by client, command and HTTP, and what each refuses."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.messages import Kind
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions, WorkerConfig
from tests.integration.gateway_process import GatewayProcess, chat

if TYPE_CHECKING:  # importing the package takes a second, and each test process collects this file
    import openai

QUERY = "where do cats sleep"
DOCUMENTS = ["bonds fell again", "cats sleep on mats", "a cat"]
KINDS: dict[str, Kind] = {"talk": "generate", "vec": "embed", "rank": "rerank"}
PATHS = ("/v1/rerank", "/v1/reranking", "/v2/rerank", "/rerank", "/reranking")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(0, worker=WorkerConfig(), check=True) as mesh:
        for model, kind in KINDS.items():
            fake = FakeOptions(slots=4, kind=kind, embedding_size=16, context_tokens=1_000)
            mesh.worker_config = replace(mesh.worker_config, model=model, fake=fake)
            mesh.spawn(model)
        for process in mesh.workers:
            process.first_line()
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address) as gateway:
        yield gateway


# --- the client ----------------------------------------------------------------------------------------------


def test_documents_come_back_by_their_scores(mesh: Mesh) -> None:
    with SyncClient(mesh.address) as client:
        found = client.rerank(QUERY, DOCUMENTS)
        scores = [each.score for each in found.results]
        assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
        assert found.results[0].index == 1
        assert [DOCUMENTS[each.index] for each in found.results] == [each.document for each in found.results]
        assert found.tokens == [len(QUERY + document) for document in DOCUMENTS]
        assert (found.model, found.fake) == ("rank", True)
        raw = client.rerank(QUERY, DOCUMENTS, raw=True, top_n=2)
        assert [each.index for each in raw.results] == [each.index for each in found.results[:2]]
        assert [1 / (1 + math.exp(-each.score)) for each in raw.results] == pytest.approx(scores[:2])
        many = client.rerank("cats", [f"document {number}" for number in range(limits.RERANK_DOCUMENTS)], top_n=1)
        assert len(many.tokens) == limits.RERANK_DOCUMENTS


def test_without_a_name_each_task_finds_its_model(mesh: Mesh) -> None:
    with SyncClient(mesh.address) as client:
        assert client.generate("hello", max_tokens=2).fake
        vectors = client.embed(["a", "b"])
        assert (vectors.model, vectors.fake, len(vectors.vectors[0])) == ("vec", True, 16)
        rows = {row.model: row.kind for row in client.models()}
    assert rows == KINDS


def test_what_cannot_be_is_refused_by_client_broker_or_worker(mesh: Mesh) -> None:
    with SyncClient(mesh.address) as client:
        for wrong in (
            lambda: client.rerank("", ["x"]),
            lambda: client.rerank("x", []),
            lambda: client.rerank("x", ["x"] * (limits.RERANK_DOCUMENTS + 1)),
            lambda: client.rerank("x", [5]),  # type: ignore[list-item]
            lambda: client.rerank("x", ["x"], model="vec"),
            lambda: client.generate("hello", model="vec"),
            lambda: client.embed("x", model="rank"),
            lambda: client.embed("x", dimensions=17),
        ):
            with pytest.raises(LlamboError) as refused:
                wrong()
            assert refused.value.code is Code.BAD_REQUEST, refused.value
        with pytest.raises(LlamboError) as long:
            client.rerank(QUERY, ["short", "x" * 1_000])
        assert long.value.code is Code.TOO_LONG
        assert "document 1" in long.value.text and "1019 tokens" in long.value.text and "1000" in long.value.text
        with pytest.raises(LlamboError, match="models that do: talk"):
            client.generate("hello", model="rank")


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_shows_a_table_and_json(mesh: Mesh, tmp_path: Path) -> None:
    shown = mesh.commands.ok("rerank", QUERY, *DOCUMENTS)
    lines = shown.out.splitlines()
    assert lines[0].split() == ["SCORE", "INDEX", "DOCUMENT"] and len(lines) == 4
    assert lines[1].split(maxsplit=2)[1:] == ["1", DOCUMENTS[1]]
    assert "rank is a fake model; its scores are made up" in shown.err
    assert "vec is a fake model; its vectors are made up" in mesh.commands.ok("embed", "x").err
    listed = "\n".join([*DOCUMENTS, "", "  "])
    by_stdin = mesh.commands.ok("rerank", "--json", "--top", "2", QUERY, stdin=listed).json()
    assert by_stdin["results"][0]["index"] == 1 and len(by_stdin["results"]) == 2
    assert (by_stdin["model"], by_stdin["fake"]) == ("rank", True)
    file = tmp_path / "documents.txt"
    file.write_text(listed, encoding="utf-8")
    by_file = mesh.commands.ok("rerank", "--json", "--top", "2", QUERY, "--file", str(file)).json()
    assert by_file == by_stdin
    assert mesh.commands.llambo("rerank", QUERY, "x", "--file", str(file)).code == 2
    assert "there are no documents" in mesh.commands.llambo("rerank", QUERY, stdin=" \n").err
    other = mesh.commands.llambo("rerank", "--model", "talk", QUERY, "x")
    assert "'talk' generates text" in other.err and "models that do: rank" in other.err
    kinds = {line.split()[0]: line.split() for line in mesh.commands.ok("models").out.splitlines() if line}
    assert all(kind in kinds[model] for model, kind in KINDS.items())


# --- HTTP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_one_reply_serves_the_clients_of_jina_cohere_and_llama_cpp(gateway: GatewayProcess, path: str) -> None:
    body = {"model": "rank", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
    status, reply, headers = gateway.ask("POST", path, body)
    assert (status, headers["x-llambo-engine"], reply["llambo"]) == (200, "fake", {"fake": True})
    assert (reply["model"], reply["object"]) == ("rank", "list")
    assert [sorted(each) for each in reply["results"]] == [["index", "relevance_score"]] * 2
    scores = [each["relevance_score"] for each in reply["results"]]
    assert reply["results"][0]["index"] == 1 and 1 >= scores[0] > scores[1] >= 0
    tokens = sum(len(QUERY + document) for document in DOCUMENTS)
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert reply["id"] and reply["meta"]["billed_units"] == {"search_units": 1}


def test_documents_may_be_objects_and_come_back_if_asked_for(gateway: GatewayProcess) -> None:
    documents = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]
    reply = gateway.post("/v1/rerank", {"query": QUERY, "documents": documents, "return_documents": True})
    for each in reply["results"]:
        assert each["document"] == {"text": DOCUMENTS[each["index"]]}


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_the_dialect_of_text_embeddings_inference(gateway: GatewayProcess, path: str) -> None:
    found = gateway.post(path, {"query": QUERY, "texts": DOCUMENTS})
    assert [sorted(each) for each in found] == [["index", "score"]] * 3
    assert found[0]["index"] == 1 and 0 <= found[-1]["score"] <= found[0]["score"] <= 1
    raw = gateway.post(path, {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "return_text": True})
    assert [each["index"] for each in raw] == [each["index"] for each in found]
    assert raw[0]["score"] == pytest.approx(math.log(found[0]["score"] / (1 - found[0]["score"])))
    assert raw[0]["text"] == DOCUMENTS[1]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"documents": ["x"]}, "query"),
        ({"query": "", "documents": ["x"]}, "query"),
        ({"query": "x"}, "documents"),
        ({"query": "x", "documents": []}, "documents"),
        ({"query": "x", "texts": []}, "texts"),
        ({"query": "x", "documents": ["x"], "texts": ["x"]}, "texts"),
        ({"query": "x", "documents": ["x", {"title": "y"}]}, "documents[1].text"),
        ({"query": "x", "documents": [5]}, "documents[0]"),
        ({"query": "x", "documents": ["x"], "top_n": 0}, "top_n"),
        ({"query": "x", "documents": ["x"] * (limits.RERANK_DOCUMENTS + 1)}, "documents"),
    ],
)
def test_what_is_wrong_is_named(gateway: GatewayProcess, body: dict[str, Any], field: str) -> None:
    status, reply, _ = gateway.ask("POST", "/v1/rerank", body)
    error = reply["error"]
    # msgspec says of a field that is missing only in the text which it is
    assert status == 400 and (error["param"] == field or f"`{field}`" in error["message"]), reply


def test_what_a_model_is_not_for_is_refused_over_http(gateway: GatewayProcess) -> None:
    for path, body, words in (
        ("/v1/chat/completions", chat(model="vec"), "models that do: talk"),
        ("/v1/embeddings", {"model": "rank", "input": "x"}, "models that do: talk, vec"),
        ("/v1/rerank", {"model": "talk", "query": "x", "documents": ["x"]}, "models that do: rank"),
    ):
        status, reply, _ = gateway.ask("POST", path, body)
        assert status == 400 and words in reply["error"]["message"], reply
    kinds = {row["id"]: row["llambo"]["kind"] for row in gateway.get("/v1/models")["data"]}
    assert kinds == KINDS


def test_vectors_can_be_shortened_and_packed(gateway: GatewayProcess) -> None:
    whole = gateway.post("/v1/embeddings", {"input": ["one", "two"]})
    short = gateway.post("/v1/embeddings", {"input": ["one", "two"], "dimensions": 4})
    packed = gateway.post("/v1/embeddings", {"input": ["one", "two"], "dimensions": 4, "encoding_format": "base64"})
    assert whole["model"] == "vec" and whole["llambo"] == {"fake": True}
    for all_of_it, first, bytes_of_it in zip(whole["data"], short["data"], packed["data"], strict=True):
        vector = first["embedding"]
        length = sum(value**2 for value in all_of_it["embedding"][:4]) ** 0.5
        assert vector == pytest.approx([value / length for value in all_of_it["embedding"][:4]])
        assert sum(value**2 for value in vector) == pytest.approx(1)
        assert struct.unpack("<4f", base64.b64decode(bytes_of_it["embedding"])) == pytest.approx(vector)
    status, reply, _ = gateway.ask("POST", "/v1/embeddings", {"input": "one", "dimensions": 17})
    assert (status, reply["error"]["param"]) == (400, "dimensions") and "16 numbers, not 17" in reply["error"][
        "message"
    ]


def test_the_client_of_openai(gateway: GatewayProcess) -> None:
    import openai

    client: openai.OpenAI
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        found = client.embeddings.create(model="vec", input=["a cat", "a kitten"], dimensions=8)
        assert [len(each.embedding) for each in found.data] == [8, 8]
        with pytest.raises(openai.BadRequestError, match="embeds texts"):
            client.chat.completions.create(model="vec", messages=[{"role": "user", "content": "hello"}])
