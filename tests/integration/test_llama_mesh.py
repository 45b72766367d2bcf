"""SmolLM2 through a whole mesh: answers, and answers whose workers and engines are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llambo import Client
from llambo.mesh.client import Answer, Options
from llambo.mesh.errors import Code, LlamboError
from llambo.worker import engine_proto as proto
from llambo.worker import models
from llambo.worker.config import WorkerConfig
from llambo.worker.engine_process import EngineProcess
from llambo.worker.knobs import LlamaKnobs
from tests.integration.harness import TIMEOUT_S, Mesh

KNOBS = LlamaKnobs(slots=8, context=1024, threads=1, batch=128)
WORKER = WorkerConfig(engine="llama", model="smollm2", llama=KNOBS)
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}'
#: Eight streams of different kinds.
MIX: list[Options] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.2, "sampling": {"repeat_penalty": 1.2}},
    {"temperature": 0.8, "sampling": {"dry_multiplier": 0.8}},
    {"temperature": 0.8, "sampling": {"json_schema": SCHEMA}},
    {"temperature": 0.0, "sampling": {"json_schema": SCHEMA}},
    {"temperature": 0.8, "stop": ["never said"]},
    {"temperature": 0.0, "system": "Be brief."},
]
KILLS = 6


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(2, worker=WORKER, check=True) as mesh:
        yield mesh


async def answers(client: Client, tokens: int) -> list[Answer]:
    async def one(number: int) -> Answer:
        options: Options = {"form": "user", "seed": number, "max_tokens": tokens, **MIX[number]}
        async with client.stream(f"Tell me about the number {number}.", **options) as stream:
            return await stream.result()

    return await asyncio.gather(*[one(number) for number in range(len(MIX))])


def test_a_chat_gets_a_sensible_answer(mesh: Mesh) -> None:
    async def scenario() -> Answer:
        async with mesh.client() as client:
            return await client.generate(
                "What is the capital of France? Answer in one word.", form="user", temperature=0.0
            )

    answer = mesh.run(scenario())
    assert "Paris" in answer.text
    assert answer.reason == "stop"
    assert answer.usage.prompt_tokens > 10


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_tokens": 1024}, Code.TOO_LONG),
        ({"sampling": {"grammar": "nonsense"}}, Code.BAD_REQUEST),
        ({"form": "messages"}, Code.BAD_REQUEST),
    ],
)
def test_what_the_engine_refuses_for_good_is_not_tried_again(mesh: Mesh, options: Options, code: Code) -> None:
    async def scenario() -> None:
        async with mesh.client() as client:
            await client.generate("Hello", **options)

    moved = mesh.counter("moved")
    with pytest.raises(LlamboError) as refused:
        mesh.run(scenario())
    assert refused.value.code is code
    assert mesh.counter("moved") == moved


def test_kills_of_engines_and_agents_change_no_text(mesh: Mesh) -> None:
    """Every stream ends normally, and what was delivered never changes; that the rest is the same is likely."""
    chance = random.Random(5)

    async def disturbed(client: Client) -> list[Answer]:
        asking = asyncio.create_task(answers(client, 48))
        tokens = mesh.counter("tokens")
        await mesh.aside(lambda core: core.state.counters.tokens > tokens + 100, "100 tokens")
        # The worker with the most streams loses its engine, or its life.
        victim = next(worker for worker in mesh.workers if worker.running)
        if chance.random() < 0.5:
            os.kill(victim.children()[0], signal.SIGKILL)
        else:
            victim.send(signal.SIGKILL)
            victim.wait()
            mesh.spawn(f"{victim.name}x")
        done = await asking
        await mesh.aside(
            lambda core: sum(w.dispatchable for w in core.state.registry.workers.values()) == 2, "two workers ready"
        )
        return done

    async def scenario() -> tuple[list[Answer], list[list[Answer]]]:
        async with mesh.client() as client:
            quiet = await answers(client, 48)
            return quiet, [await disturbed(client) for _ in range(KILLS)]

    quiet, rounds = mesh.run(scenario(), timeout_s=6 * TIMEOUT_S)
    moves = same = 0
    for done in rounds:
        for number, (one, whole) in enumerate(zip(done, quiet, strict=True)):
            assert one.reason in ("stop", "length")
            moves += one.moves
            same += one.ids == whole.ids
            if "json_schema" in (MIX[number].get("sampling") or {}) and one.reason == "stop":
                assert set(json.loads(one.text)) == {"name"}
    assert moves >= KILLS
    print(f"{KILLS} kills, {moves} moves, {same} of {KILLS * len(MIX)} answers as if undisturbed")
    # On one machine, with one thread each, nearly all are
    assert same > 0.5 * KILLS * len(MIX)


def listen(child: EngineProcess) -> list[proto.ToAgent]:
    said: list[proto.ToAgent] = []
    while True:
        child.push()
        readable, _, _ = select.select([child], [], [], TIMEOUT_S)
        assert readable, f"nothing within {TIMEOUT_S} s after {said[-3:]}"
        messages = child.read()
        if messages is None:
            return said
        said += messages


def whole_model() -> bytes:
    return models.find("smollm2").read_bytes()


@pytest.mark.parametrize("kind", ["cut", "empty", "no model", "no context"])
def test_a_model_that_cannot_be_loaded_is_named_and_ends_the_engine_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    content = whole_model()
    path.write_bytes({"cut": content[:50_000_000], "empty": b"", "no model": b"x" * 1000}.get(kind, content))
    knobs = LlamaKnobs(context=16 * 2**20) if kind == "no context" else KNOBS
    child = EngineProcess(proto.Configure("llama", str(path), llama=knobs))
    try:
        last = listen(child)[-1]
    finally:
        how = child.reap()
    assert isinstance(last, proto.Progress)
    assert last.problem.startswith(str(path))
    assert how == "the engine exited with status 3"


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_model_ends_the_engine_or_serves(tmp_path: Path, seed: int) -> None:
    """Damage in the head of a real file: the engine may say why, may even die of it; it may not hang."""
    chance = random.Random(seed)
    content = bytearray(whole_model())
    for _ in range(20):
        content[chance.randrange(4, 1_700_000)] ^= 1 << chance.randrange(8)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    child = EngineProcess(proto.Configure("llama", str(path), llama=KNOBS))
    child.order(proto.Shutdown())
    try:
        said = listen(child)
    finally:
        child.reap()
    assert said
