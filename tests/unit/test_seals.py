"""What workers bring back is believed only as far as a broker of this mesh has sealed it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llambo.broker.config import BrokerConfig
from llambo.broker.records import seals
from llambo.broker.records.transcript import reservation
from llambo.broker.requests import recovery
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity, Role
from tests.unit.broker_bench import Bench, Client, Worker, request_id

#: Of the marks of this mesh.
KEY = b"only brokers have this"
WORKERS = (Identity("w", "worker"), Identity("evil", "worker"))
OWNERS = (Identity("alice", "client"), Identity("mallory", "client"))
ROLES: tuple[tuple[str, Role], ...] = (("alice", "client"), ("w", "worker"))
#: The size of a request of the bench: ten tokens, and a prompt of five bytes.
SIZE = reservation(10) + 5


def broker(*identities: Identity, key: bytes = KEY) -> Bench:
    bench = Bench(marks_key=key)
    bench.keys(*WORKERS, *(identities or OWNERS))
    return bench


def forged(number: int, **fields: Any) -> m.Orphan:
    """A run that no broker has dispatched."""
    fields = {"owner": "alice", "detached": True, **fields}
    return m.Orphan(m.Dispatch(request_id(number), b"\0\0\0\x01evil", 1, "m", 10, 0, **fields), home=True)


def dispatched(worker: str = "w", key: bytes = KEY, **fields: Any) -> m.Dispatch:
    """What a broker gives to a worker of this name for a request of alice; that broker is gone afterwards."""
    bench = broker(key=key)
    there = bench.worker(worker, user=worker.split("-")[0])
    bench.client(b"a", user="alice").submit(1, **fields)
    return there.dispatches[-1]


def bring(worker: Worker, work: m.Dispatch, ids: list[int] | None = None, *, prompt: bytes = b"hello") -> bool:
    """Announce it as a worker does that knows nothing of seals but to hand them back. True: it is adopted."""
    chunks = [tokens.encode_chunk(work.id + work.dispatch, 0, ids, [b"x"] * len(ids), 0)] if ids else []
    blob, prompt_bytes = transfer.pack(prompt, chunks)
    brought = msgspec.structs.replace(work, prefix=[], prompt_bytes=prompt_bytes)
    before = len(worker.received(m.Adopt))
    worker.send(m.Orphan(brought, home=True), blob=blob)
    return len(worker.received(m.Adopt)) > before


def listed(client: Client) -> list[Any]:
    client.send(m.Query(1, "requests"))
    return list(msgspec.msgpack.decode(client.received(m.Result)[-1].data))


def test_a_run_that_was_never_dispatched_is_not_taken_in() -> None:
    bench = broker()
    worker, evil = bench.worker("w", user="w"), bench.worker("evil", user="evil")
    alice = bench.client(b"a", user="alice")
    evil.send(forged(1, priority="interactive"), blob=b"hello")
    evil.send(m.Goodbye("left"))
    assert evil.received(m.Adopt) == [] and worker.dispatches == []
    assert listed(alice) == [] and bench.state.requests == {}


def test_forged_runs_take_nothing_from_the_limits_of_their_owner() -> None:
    bench = broker(Identity("alice", "client", max_bytes=2 * SIZE, max_in_flight=2))
    worker, evil = bench.worker("w", user="w"), bench.worker("evil", user="evil")
    alice = bench.client(b"a", user="alice")
    for number in range(2, 42):
        evil.send(forged(number), blob=b"hello")
    alice.submit(1)
    assert alice.problems == [] and len(worker.dispatches + evil.dispatches) == 1


def test_a_forged_run_of_another_owner_does_not_refuse_the_owner() -> None:
    bench = broker()
    bench.worker("w", user="w")
    evil = bench.worker("evil", model="other", user="evil")
    alice = bench.client(b"a", user="alice")
    evil.send(forged(1, owner="mallory", detached=False), blob=b"hello")
    alice.submit(1, model="m", resume=True)
    assert alice.problems == [] and len(alice.received(m.Accepted)) == 1


# --- what was dispatched comes back ------------------------------------------------------------------------


FULL: dict[str, Any] = {
    "detached": True, "deadline_ms": 5_000, "priority": "normal", "seed": 7, "logprobs": 2,
    "sampling": msgspec.Raw(msgspec.msgpack.encode({"stop": ["x"]})),
}  # fmt: skip


@pytest.mark.parametrize("fields", [{"detached": True}, FULL], ids=["plain", "full"])
def test_what_a_broker_has_dispatched_is_taken_in_by_the_next(fields: dict[str, Any]) -> None:
    bench = broker()
    work = dispatched(**fields)
    assert bring(bench.worker("w", user="w"), work, [1, 2])
    (request,) = bench.state.requests.values()
    assert (request.owner, request.seed, request.asked.detached) == ("alice", work.seed, True)
    assert (request.asked.priority, request.asked.logprobs, request.asked.sampling) == (
        work.priority,
        work.logprobs,
        work.sampling,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"id": request_id(2)}, {"dispatch": b"\0\0\0\x02evil"}, {"owner": "mallory"}, {"model": "other"},
        {"max_tokens": 9_000}, {"seed": 8}, {"priority": "interactive"}, {"stream": False}, {"logprobs": 20},
        {"task": "embed"}, {"sampling": msgspec.Raw(b"\x80")}, {"deadline_ms": 5_001}, {"deadline_ms": 0},
        {"seal": b""}, {"seal": bytes(24)}, {"seal": b"\0" * 64},
    ],
    ids=lambda change: "-".join(f"{name}={str(value)[:12]}" for name, value in change.items()),
)  # fmt: skip
def test_what_a_worker_has_changed_is_not(change: dict[str, Any]) -> None:
    bench, work = broker(), dispatched(**FULL)
    worker = bench.worker("w", user="w")
    assert not bring(worker, msgspec.structs.replace(work, **change), [1])
    assert bench.state.requests == {} and len(bench.state.recovery.orphans) == 0
    assert [cancel.id for cancel in worker.received(m.Cancel)] == [change.get("id", work.id)]
    assert bring(worker, work, [1])  # as it was, it is taken in all the same


def test_what_is_taken_in_has_the_proof_that_its_client_had() -> None:
    former, bench = broker(), broker()
    before, worker = former.worker("w", user="w"), bench.worker("w", user="w")
    proofs = []
    for there in (former, bench):
        alice = there.client(b"a", user="alice")
        if there is former:
            alice.submit(1, detached=True, logprobs=1)
            assert bring(worker, before.dispatches[-1], [1])
        else:
            alice.send(m.Attach(request_id(1)))
        proofs.append(alice.received(m.Accepted)[-1].proof)
    assert proofs[0] and proofs[0] == proofs[1]


def test_a_run_that_is_not_detached_does_not_become_it() -> None:
    bench, work = broker(), dispatched()
    assert not bring(bench.worker("w", user="w"), msgspec.structs.replace(work, detached=True))


def test_neither_is_another_prompt() -> None:
    bench, work = broker(), dispatched(detached=True)
    assert not bring(bench.worker("w", user="w"), work, prompt=b"something else")


def test_time_that_has_passed_is_no_change() -> None:
    bench, work = broker(), dispatched(**FULL)
    assert bring(bench.worker("w", user="w"), msgspec.structs.replace(work, deadline_ms=1), [1])


@pytest.mark.parametrize("thief", ["evil", "w-2"])
def test_a_seal_is_of_no_use_to_another_worker(thief: str) -> None:
    bench, work = broker(), dispatched(detached=True)
    assert not bring(bench.worker(thief, user=thief.split("-")[0]), work)


def test_a_seal_of_another_mesh_is_none() -> None:
    bench, work = broker(), dispatched(detached=True, key=b"another mesh")
    assert not bring(bench.worker("w", user="w"), work)


def test_a_run_of_a_model_that_its_worker_does_not_serve_is_not_taken_in() -> None:
    bench, work = broker(), dispatched(detached=True)
    assert not bring(bench.worker("w", model="other", user="w"), work)


@pytest.mark.parametrize("sealed", [True, False])
def test_tokens_for_a_client_that_resumes_come_only_from_who_was_given_the_run(sealed: bool) -> None:
    """A worker without the seal knows the id, the prompt and the tokens: and would answer with its own."""
    bench, work = broker(), dispatched()
    worker = bench.worker("w", user="w")
    alice = bench.client(b"a", user="alice")
    assert not bring(worker, work if sealed else msgspec.structs.replace(work, seal=b""), [1, 2, 3])
    alice.submit(1, model="m", resume=True)
    assert len(worker.received(m.Adopt)) == sealed
    bench.pass_time(1_000)
    worker.beat(claims={work.id + work.dispatch: 3} if sealed else {})
    assert len(worker.dispatches) == (not sealed)
    assert alice.problems == []


def test_without_keys_nothing_is_sealed_and_everything_believed() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(9)
    assert worker.dispatches[-1].seal == b""
    worker.send(forged(1, owner=""), blob=b"hello")
    assert len(worker.received(m.Adopt)) == 1


# --- and is held to what its owner may have now -----------------------------------------------------------


@pytest.mark.parametrize(
    "identity",
    [
        Identity("bob", "client"),
        Identity("alice", "client", priority_max="batch"),
        Identity("alice", "client", models=("other",)),
        Identity("alice", "client", max_bytes=SIZE // 2),
    ],
    ids=["revoked", "priority", "model", "bytes"],
)
def test_what_the_owner_may_not_have_now_is_left_to_its_worker(identity: Identity) -> None:
    bench, work = broker(identity), dispatched(detached=True)
    worker = bench.worker("w", user="w")
    assert not bring(worker, work, [1]) and bench.state.requests == {}
    assert worker.received(m.Cancel) == []
    assert [event.kind for event in bench.state.journal.entries][-1] == "orphan left"


@pytest.mark.parametrize("limits", [{"max_bytes": SIZE}, {"max_in_flight": 1}], ids=["bytes", "in flight"])
def test_of_all_brokers_it_gets_at_most_twice_its_limits(limits: Any) -> None:
    former, bench = broker(), broker(Identity("alice", "client", **limits))
    before, worker = former.worker("w", slots=8, user="w"), bench.worker("w", slots=8, user="w")
    alice = former.client(b"a", user="alice")
    for number in range(5):
        alice.submit(number, detached=True)
    assert [bring(worker, work) for work in before.dispatches] == [True, True, False, False, False]


def test_long_after_its_start_a_broker_takes_in_nothing_without_its_client() -> None:
    """What it dispatched it knows then. A worker could bring what has ended long ago, or lives at another broker."""
    bench, work = broker(), dispatched(detached=True)
    bench.pass_time(recovery.COMING_HOME_MS)
    worker = bench.worker("w", user="w")
    assert not bring(worker, work, [1, 2])
    assert bench.state.requests == {} and worker.received(m.Cancel) == []
    bench.client(b"a", user="alice").send(m.Attach(work.id))
    assert len(worker.received(m.Adopt)) == 1


# --- two owners and one id -----------------------------------------------------------------------------------


def test_the_runs_of_two_owners_under_one_id_are_two_requests() -> None:
    bench, work = broker(), dispatched()
    other = broker()
    other.state.random_bytes(1)
    there = other.worker("w", user="w")
    other.client(b"m", user="mallory").submit(1)
    (theirs,) = there.dispatches
    worker = bench.worker("w", user="w")
    bring(worker, theirs, [7])
    bring(worker, work, [1])
    alice = bench.client(b"a", user="alice")
    alice.submit(1, model="m", resume=True)
    assert [adopt.dispatch for adopt in worker.received(m.Adopt)] == [work.dispatch]
    # The other run is not stopped for that.
    assert worker.received(m.Cancel) == []


# --- who tries is seen ----------------------------------------------------------------------------------------


def refusals(bench: Bench) -> dict[str, dict[str, int]]:
    boss = bench.client(b"boss", user="boss")
    boss.send(m.Query(1, "status"))
    rows = msgspec.msgpack.decode(boss.received(m.Result)[-1].data)["identities"]
    return {row["identity"]: row["refused_for"] for row in rows if row.get("refused")}


def test_what_is_refused_for_its_sender_is_counted_under_the_name() -> None:
    bench = broker(*OWNERS, Identity("boss", "admin"))
    evil = bench.worker("evil", user="evil")
    alice, mallory = bench.client(b"a", user="alice"), bench.client(b"m", user="mallory")
    id = alice.submit(1)
    mallory.send(m.Attach(id), m.Cancel(id), m.Replay(id, 0), m.InferenceRequest(id, max_tokens=5))
    mallory.send(m.DrainWorker(7, "w"), m.Query(8, "events"))
    evil.send(forged(2), blob=b"hello")
    assert [problem.error.code for problem in mallory.problems] == [
        *3 * [Code.UNKNOWN_REQUEST], Code.BAD_REQUEST, *2 * [Code.FORBIDDEN],
    ]  # fmt: skip
    assert refusals(bench) == {"mallory": {"forbidden": 6}, "evil": {"forbidden": 1}}


# --- a model that never was -------------------------------------------------------------------------------------


def models(client: Client) -> list[str]:
    client.send(m.Query(3, "models"))
    return [row["model"] for row in msgspec.msgpack.decode(client.received(m.Result)[-1].data)]


@pytest.mark.parametrize("hold_ms", [500, 30_000])
def test_a_name_that_no_worker_has_served_is_not_listed_and_not_waited_for_longer_than_others(hold_ms: int) -> None:
    bench = Bench(marks_key=KEY, hold_ms=hold_ms)
    bench.keys(*WORKERS, *OWNERS)
    alice, mallory = bench.client(b"a", user="alice"), bench.client(b"m", user="mallory")
    mallory.submit(1, model="write to mallory", resume=True)
    assert len(mallory.received(m.Accepted)) == 1
    assert models(alice) == []
    worker = bench.worker("w", user="w")
    bench.pass_time(1_500)
    worker.beat()
    mallory.submit(2, model="write to mallory", resume=True)
    assert models(alice) == ["m"] and models(mallory) == ["m"]
    alice.submit(3, model="what")
    assert alice.problems[-1].error.text == "no worker serves 'what'; there is: m"
    for _ in range(3 + hold_ms // 1_000):
        bench.pass_time(1_000)
        worker.beat()
        mallory.send(m.ClientHeartbeat())
    ends = {end.id: end.error.code for end in mallory.ends if end.error}
    assert ends == dict.fromkeys((request_id(1), request_id(2)), Code.NO_WORKER)
    bench.pass_time(1_000)
    assert list(bench.state.models.unserved_since) == ["m"]


def test_a_model_whose_worker_left_is_listed_while_requests_wait_for_it() -> None:
    bench = broker()
    worker, alice = bench.worker("w", user="w"), bench.client(b"a", user="alice")
    worker.send(m.Goodbye())
    alice.submit(1, model="m", resume=True)
    assert models(alice) == ["m"]


# --- the key of the marks ---------------------------------------------------------------------------------------


def test_all_brokers_of_a_mesh_derive_one_key_and_no_other_peer_has_what_it_is_made_of(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://a:7330,tcp://b:7330")
    peers = [folder.add(Identity(name, role), 1) for name, role in ROLES]
    shutil.copytree(tmp_path / "keys", tmp_path / "copy")
    ours = seals.key_from(folder.broker().secret)
    assert ours == seals.key_from(Folder(tmp_path / "copy").broker().secret)
    assert all(folder.broker().secret not in keys.to_line(peer) + peer.broker for peer in peers)
    known = [text for peer in peers for text in (peer.broker, peer.pair.public, peer.pair.secret)]
    assert ours not in [seals.key_from(text) for text in known]
    assert repr(ours) not in repr(BrokerConfig(marks_key=ours))
