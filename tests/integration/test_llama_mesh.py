"""SmolLM2 through a whole mesh: answers, and answers whose workers and engines are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llambo import Client
from llambo.broker.core import BrokerCore
from llambo.broker.report import queries
from llambo.mesh.client.client import Answer, Options, Piece
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import ANYONE
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.agent.agent import EngineProcess
from llambo.worker.config import LlamaOptions, WorkerConfig
from llambo.worker.engine import protocol as proto
from llambo.worker.models import model_files

LLAMA = LlamaOptions(slots=8, context=1024, threads=1, batch=128)
WORKER = WorkerConfig(engine="llama", model="smollm2", llama=LLAMA)
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
#: Rounds of eight streams with a kill in each: KILLS=50 in the environment for more of them.
KILLS = int(os.environ.get("KILLS", "3"))
#: Of each stream.
TOKENS = 32


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


async def test_a_chat_gets_a_sensible_answer(mesh: Mesh) -> None:
    async with mesh.client() as client:
        answer = await client.generate("What is the capital of France? Answer in one word.", temperature=0.0)
    assert "Paris" in answer.text
    assert answer.reason == "stop"
    assert answer.usage.prompt_tokens > 10


async def test_a_prompt_and_a_conversation_go_through_the_chat_template(mesh: Mesh) -> None:
    prompt, messages = "Write a poem about the sea.", [{"role": "user", "content": "Write a poem about the sea."}]
    async with mesh.client() as client:
        found = [await client.generate(asked, temperature=0.0, max_tokens=8) for asked in (prompt, messages)]
        found.append(await client.chat(messages, temperature=0.0, max_tokens=8))
        templated = await client.tokenize(messages)
        plain = await client.generate(prompt, temperature=0.0, max_tokens=8, form="text")
        # Without the template the model ends 15 of these at once.
        tried = await asyncio.gather(*[client.generate(prompt, seed=seed, max_tokens=1) for seed in range(25)])
    assert {answer.text for answer in found} == {found[0].text}
    assert {answer.usage.prompt_tokens for answer in found} == {len(templated.ids)}
    assert plain.usage.prompt_tokens < len(templated.ids)
    assert [answer.text for answer in tried if not answer.text] == []


async def test_a_tool_is_called(mesh: Mesh) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": city}}]
    messages = [{"role": "user", "content": "Is it raining in Oslo?"}]
    async with mesh.client() as client:
        answer = await client.chat(messages, tools=tools, tool_choice="weather", temperature=0.0, max_tokens=64)
        (call,) = answer.tool_calls
        assert call.name == "weather" and set(json.loads(call.arguments)) == {"city"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        again = await client.chat([*messages, answer.message, result], tools=tools, tool_choice="none", max_tokens=8)
    assert again.text and again.tool_calls == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_tokens": 1024}, Code.TOO_LONG),
        ({"sampling": {"grammar": "nonsense"}}, Code.BAD_REQUEST),
        ({"form": "messages"}, Code.BAD_REQUEST),
    ],
)
async def test_what_the_engine_refuses_for_good_is_not_tried_again(mesh: Mesh, options: Options, code: Code) -> None:
    moved = mesh.counter("moved")
    async with mesh.client() as client:
        with pytest.raises(LlamboError) as refused:
            await client.generate("Hello", **options)
    assert refused.value.code is code
    assert mesh.counter("moved") == moved


@dataclass
class Watched:
    """One stream of the mix, as two readers saw it: the client that submitted it, and another that attached later."""

    number: int
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    answer: Answer | None = None
    other: Answer | None = None

    def see(self, piece: Piece) -> None:
        assert piece.index == len(self.ids), f"index {piece.index} after {len(self.ids)} tokens"
        self.ids += piece.ids
        self.pieces.append(piece.text)

    def check(self) -> Answer:
        """It ended normally, nothing that was shown was taken back, and both readers saw the same."""
        answer = self.answer
        assert answer is not None and answer.reason in ("stop", "length"), answer
        assert ("".join(self.pieces), self.ids) == (answer.text, answer.ids)
        assert self.other is None or (self.other.text, self.other.ids) == (answer.text, answer.ids)
        if "json_schema" in (MIX[self.number].get("sampling") or {}) and answer.reason == "stop":
            assert set(json.loads(answer.text)) == {"name"}
        return answer


async def watch(client: Client, other: Client, number: int, tokens: int) -> Watched:
    watched = Watched(number)
    options: Options = {"form": "user", "seed": number, "max_tokens": tokens, **MIX[number]}
    stream = client.stream(f"Tell me about the number {number}.", **options)
    follower: asyncio.Task[Answer] | None = None
    async for piece in stream:
        watched.see(piece)
        if follower is None:
            follower = asyncio.create_task(follow(other, stream.id))
    watched.answer = stream.answer
    watched.other = await follower if follower is not None else None
    return watched


async def follow(client: Client, id: str) -> Answer:
    async with await client.attach(id) as stream:
        return await stream.result()


def kill(mesh: Mesh, turn: int) -> None:
    """Kill the worker with the most streams, or, in odd turns, its engine."""
    busy = mesh.look(lambda core: {w.name: len(w.claims) for w in core.state.registry.workers.values()})
    victim = max((worker for worker in mesh.workers if worker.running), key=lambda worker: busy.get(worker.name, 0))
    if turn % 2:
        os.kill(victim.children()[0], signal.SIGKILL)
    else:
        victim.send(signal.SIGKILL)
        victim.end()
        mesh.workers.remove(victim)
        victim.close()
        mesh.spawn(f"turn{turn}")


def tokens_so_far(core: BrokerCore) -> int:
    """Tokens of answers that have ended, and of those under way."""
    return core.state.counters.tokens.tokens + sum(r.transcript.next_index for r in core.state.requests.values())


async def disturbed(mesh: Mesh, client: Client, other: Client, turn: int) -> list[Answer]:
    asking = [asyncio.create_task(watch(client, other, number, TOKENS)) for number in range(len(MIX))]
    tokens = mesh.look(tokens_so_far)
    # Anywhere from the first tokens to shortly before the last ones.
    after = random.Random(turn).randrange(1, 170)
    await mesh.aside(lambda core: tokens_so_far(core) > tokens + after, f"{after} tokens")
    kill(mesh, turn)
    done = [(await task).check() for task in asking]
    await mesh.aside(
        lambda core: sum(w.dispatchable for w in core.state.registry.workers.values()) == 2, "two workers ready"
    )
    return done


def test_kills_of_engines_and_agents_change_no_text(mesh: Mesh) -> None:
    """Every stream ends normally, and what was delivered never changes; that the rest is the same is likely."""

    async def scenario() -> tuple[list[Answer], list[list[Answer]]]:
        async with mesh.client() as client, mesh.client() as other:
            quiet = await answers(client, TOKENS)
            return quiet, [await disturbed(mesh, client, other, turn) for turn in range(KILLS)]

    quiet, rounds = mesh.run(scenario(), timeout_s=max(3, KILLS) * TIMEOUT_S)
    asked = KILLS * len(MIX)
    moves = sum(answer.moves for done in rounds for answer in done)
    moved = sum(answer.moves > 0 for done in rounds for answer in done)
    stopped = sum(answer.reason == "stop" for done in rounds for answer in done)
    same = sum(one.ids == whole.ids for done in rounds for one, whole in zip(done, quiet, strict=True))
    same_moved = sum(
        one.ids == whole.ids for done in rounds for one, whole in zip(done, quiet, strict=True) if one.moves
    )
    assert moves >= KILLS
    print(
        f"{KILLS} kills, {asked} answers, {stopped} of them by stop; {moved} moved ({moves} moves); "
        f"as if undisturbed: {same} of {asked}, of those that moved {same_moved} of {moved}"
    )
    # On one machine, with one thread each, nearly all are
    assert same > 0.5 * asked


async def test_an_engine_that_dies_while_it_loads_is_started_with_safe_settings_and_serves() -> None:
    """As where the fast instructions of a machine are forbidden: the first engine dies before it is ready."""
    with Mesh(0, worker=WORKER, check=True) as mesh:
        # Given a worker whose engine loads the model
        # (a frozen one, or it might be ready before the broker has looked twice)
        worker = mesh.spawn("careful")
        mesh.until(lambda core: core.state.registry.workers and worker.children(), "a worker and its engine")
        engine = worker.children()[0]
        os.kill(engine, signal.SIGSTOP)
        assert mesh.look(lambda core: queries.status(core.state, "", 0, ANYONE).ready) == 0

        # When a request comes, and the engine dies of a segmentation fault
        async with mesh.client() as client:
            asking = asyncio.create_task(client.generate("Hello", model="smollm2", max_tokens=4))
            await mesh.aside(lambda core: core.state.queue.count, "a request that waits")
            os.kill(engine, signal.SIGSEGV)
            os.kill(engine, signal.SIGCONT)
            answer = await asking
        # Then the next one is careful, and the request that waited is answered
        assert (answer.worker, len(answer.ids)) == ("careful", 4)
        (note,) = mesh.look(lambda core: [w.last.note for w in core.state.registry.workers.values()])
        assert note.endswith("safe settings")
        assert "SIGSEGV while loading; trying again with safe settings" in worker.log()


def listen(child: EngineProcess) -> list[proto.ToAgent]:
    received: list[proto.ToAgent] = []
    while True:
        child.push()
        readable, _, _ = select.select([child], [], [], TIMEOUT_S)
        assert readable, f"nothing within {TIMEOUT_S} s after {received[-3:]}"
        messages = child.read()
        if messages is None:
            return received
        received += messages


def whole_model() -> bytes:
    return model_files.find("smollm2").read_bytes()


@pytest.mark.parametrize("kind", ["cut", "empty", "no model", "no context"])
def test_a_model_that_cannot_be_loaded_is_named_and_ends_the_engine_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    content = whole_model()
    path.write_bytes({"cut": content[:50_000_000], "empty": b"", "no model": b"x" * 1000}.get(kind, content))
    llama = LlamaOptions(context=16 * 2**20) if kind == "no context" else LLAMA
    child = EngineProcess(proto.Configure("llama", str(path), llama=llama))
    try:
        last = listen(child)[-1]
    finally:
        how = child.reap()
    assert isinstance(last, proto.Progress)
    assert last.problem.startswith(str(path))
    assert how == ("the engine exited with status 3", False)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_model_ends_the_engine_or_serves(tmp_path: Path, seed: int) -> None:
    """Damage in the head of a real file: the engine may say why, may even die of it; it may not hang.

    For long, and on the rest of a file: bench.damage.
    """
    chance = random.Random(seed)
    content = bytearray(whole_model())
    for _ in range(20):
        content[chance.randrange(4, 1_700_000)] ^= 1 << chance.randrange(8)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    child = EngineProcess(proto.Configure("llama", str(path), llama=LLAMA))
    child.order(proto.Shutdown())
    try:
        received = listen(child)
    finally:
        child.reap()
    assert received
