"""What a model is for: what the broker refuses because of it, and what it chooses where no model is named."""

from __future__ import annotations

from typing import Any

import pytest

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity
from tests.unit.broker_bench import Bench, Client, Worker

RESULT: dict[str, Any] = {"max_tokens": 3}


def mixed() -> tuple[Bench, dict[str, Worker], Client]:
    bench = Bench()
    workers = {
        "talk": bench.worker("a", model="talk", kind="generate"),
        "vec": bench.worker("b", model="vec", kind="embed"),
        "rank": bench.worker("c", model="rank", kind="rerank"),
    }
    return bench, workers, bench.client()


def refused(client: Client) -> m.Problem:
    assert client.problems, "it was not refused"
    return client.problems[-1]


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        ("vec", "generate", ("'vec' embeds texts", "does not generate text", "models that do: talk")),
        ("rank", "generate", ("'rank' reranks documents", "models that do: talk")),
        ("rank", "embed", ("'rank' reranks documents", "does not embed texts", "models that do: talk, vec")),
        ("talk", "rerank", ("'talk' generates text", "does not rerank documents", "models that do: rank")),
        ("vec", "rerank", ("'vec' embeds texts", "models that do: rank")),
    ],
)
def test_what_a_model_is_not_for_is_refused_with_the_names_of_others(
    model: str, task: m.Task, words: tuple[str, ...]
) -> None:
    _, workers, client = mixed()
    client.submit(1, model=model, task=task, **RESULT)
    error = refused(client).error
    assert error.code is Code.BAD_REQUEST and error.hint
    assert all(word in error.text for word in words), error.text
    assert not any(worker.dispatches for worker in workers.values())


@pytest.mark.parametrize("task", ["tokenize", "detokenize", "model_info"])
@pytest.mark.parametrize("model", ["talk", "vec", "rank"])
def test_what_every_model_can_do_is_not_refused(model: str, task: m.Task) -> None:
    _, workers, client = mixed()
    client.submit(1, model=model, task=task, **RESULT)
    assert [given.task for given in workers[model].dispatches] == [task]


@pytest.mark.parametrize(
    ("task", "model"), [("generate", "talk"), ("embed", "vec"), ("rerank", "rank"), ("tokenize", "talk")]
)
def test_without_a_name_the_one_model_is_meant_that_is_made_for_it(task: m.Task, model: str) -> None:
    _, workers, client = mixed()
    client.submit(1, task=task, **RESULT)
    assert [given.task for given in workers[model].dispatches] == [task]


def test_without_a_name_and_a_model_for_it_the_refusal_says_what_there_is() -> None:
    bench = Bench()
    bench.worker("a", model="talk", kind="generate")
    client = bench.client()
    client.submit(1, task="rerank", **RESULT)
    error = refused(client).error
    assert (
        error.code is Code.BAD_REQUEST and "no model that is served can rerank documents; there is: talk" in error.text
    )
    # A model that generates also embeds, if there is none for that
    client.submit(2, task="embed", **RESULT)
    assert len(client.problems) == 1
    bench.worker("b", model="other", kind="generate")
    client.submit(3, task="embed", **RESULT)
    assert refused(client).error.code is Code.MODEL_REQUIRED
    bench.worker("c", model="vec-1", kind="embed")
    bench.worker("d", model="vec-2", kind="embed")
    client.submit(4, task="embed", **RESULT)
    assert refused(client).error.text.endswith("name one of: vec-1, vec-2")


def test_in_a_class_the_model_is_meant_that_can_do_it() -> None:
    bench = Bench()
    talk = bench.worker("a", model="talk@gpu", kind="generate")
    vec = bench.worker("b", model="vec@gpu", kind="embed")
    client = bench.client()
    client.submit(1, model="@gpu")
    client.submit(2, model="@gpu", task="embed", **RESULT)
    assert [given.model for given in (*talk.dispatches, *vec.dispatches)] == ["talk@gpu", "vec@gpu"]
    client.submit(3, model="@gpu", task="rerank", **RESULT)
    assert "there is: talk@gpu, vec@gpu" in refused(client).error.text


def test_an_older_worker_generates_and_embeds() -> None:
    bench = Bench()
    worker, client = bench.worker(model="m"), bench.client()
    client.submit(1, model="m")
    client.submit(2, model="m", task="embed", **RESULT)
    client.submit(3, model="m", task="rerank", **RESULT)
    assert [given.task for given in worker.dispatches] == ["generate", "embed"]
    assert "'m' generates text" in refused(client).error.text


def test_what_is_asked_of_a_model_that_is_being_loaded_waits_until_its_kind_is_known() -> None:
    bench = Bench()
    worker, client = bench.worker(model="rank", state="starting"), bench.client()
    text = client.submit(1, model="rank")
    ranking = client.submit(2, model="rank", task="rerank", **RESULT)
    assert client.problems == [] and client.ends == []
    worker.beat(models=[m.ModelInfo("rank", "f", kind="rerank")], slots=2)
    assert [(end.id, end.reason) for end in client.ends] == [(text, "error")]
    error = client.ends[0].error
    assert error is not None and error.code is Code.BAD_REQUEST and "'rank' reranks documents" in error.text
    assert [(given.id, given.task) for given in worker.dispatches] == [(ranking, "rerank")]


def test_an_older_worker_that_has_loaded_its_model_is_given_no_task_that_it_does_not_know() -> None:
    bench = Bench()
    worker, client = bench.worker(model="m", state="starting"), bench.client()
    ranking = client.submit(1, model="m", task="rerank", **RESULT)
    # It says no more of its model than before
    worker.beat()
    assert [(end.id, end.reason) for end in client.ends] == [(ranking, "error")]
    assert worker.dispatches == []


def test_of_a_model_that_a_host_has_the_kind_is_known_before_it_is_loaded() -> None:
    bench = Bench()
    bench.host("box", m.HostedModel("vec", "embed"), m.HostedModel("rank", "rerank"))
    talk, client = bench.worker("a", model="talk", kind="generate"), bench.client()
    client.submit(1, model="vec")
    assert "'vec' embeds texts" in refused(client).error.text and "models that do: talk" in refused(client).error.text
    client.submit(2, model="talk", task="rerank", **RESULT)
    assert "models that do: rank" in refused(client).error.text
    client.submit(3, task="embed", **RESULT)
    client.submit(4, task="rerank", **RESULT)
    assert len(client.problems) == 2 and talk.dispatches == []
    assert [request.model for request in bench.state.requests.values()] == ["vec", "rank"]


def test_no_name_is_listed_that_an_identity_may_not_use() -> None:
    bench = Bench()
    bench.keys(Identity("w", "worker"), Identity("alice", "client", models=("vec",)))
    bench.worker("w-1", model="talk", kind="generate", user="w")
    bench.worker("w-2", model="vec", kind="embed", user="w")
    client = bench.client(user="alice")
    client.submit(1, model="vec")
    text = refused(client).error.text
    assert "talk" not in text and "no model that is served does" in text


def test_the_kind_is_forgotten_with_the_model_and_shown_while_it_is_there() -> None:
    bench = Bench()
    worker, client = bench.worker(model="rank", kind="rerank", state="starting"), bench.client()
    assert bench.state.models.kinds == {"rank": "rerank"}
    worker.send(m.Goodbye())
    assert bench.state.models.kinds == {}
    client.submit(1, model="rank")
    assert refused(client).error.code is Code.NO_WORKER
