"""What each identity uses: counted through every state of a request, and refused with a reason and a retry time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llambo.broker.events import ToWorker
from llambo.broker.records.accounts import Account
from llambo.broker.records.transcript import reservation
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from tests.unit.broker_bench import Bench, Client, Worker, request_id

BOSS = Identity("boss", "admin")
GPU = Identity("w", "worker")
#: The size of a request of the bench: ten tokens, and a prompt of five bytes.
SIZE = reservation(10) + 5


class Keyed:
    """A broker with keys: one worker and a client called alice."""

    def __init__(self, slots: int = 1, **limits: Any) -> None:
        self.bench = Bench(marks_key=b"of all brokers")
        self.others: list[Identity] = [BOSS, GPU, Identity("bob", "client")]
        self.allow(**limits)
        self.worker = self.bench.worker(slots=slots, user="w")
        self.alice = self.bench.client(b"a", user="alice")

    def allow(self, **limits: Any) -> None:
        self.bench.keys(Identity("alice", "client", **limits), *self.others)

    def client(self, name: str) -> Client:
        return self.bench.client(name.encode(), user=name)

    @property
    def account(self) -> Account:
        return self.bench.state.access.accounts.by_name["alice"]

    @property
    def counts(self) -> tuple[int, int]:
        return self.account.in_flight, self.account.queued

    def end(self, worker: Worker, number: int = -1) -> None:
        worker.publish(worker.chunk(0, *range(10), number=number))
        worker.end(10, number=number)

    def refused(self) -> ErrorInfo:
        """The error of the last event."""
        return self.alice.received_last(m.Problem)[-1].error


def elsewhere(number: int) -> dict[str, Any]:
    """The fields of a request that another broker has admitted, as its client says and proves."""
    former = Keyed()
    former.alice.submit(number)
    accepted = former.alice.received(m.Accepted)[-1]
    assert len(accepted.proof) == 16
    return {"model": accepted.model, "resume": True, "proof": accepted.proof}


def test_what_is_counted_from_admission_to_end() -> None:
    mesh = Keyed(slots=1)
    for number in (1, 2, 3):
        mesh.alice.submit(number)
    assert mesh.counts == (1, 2)
    assert mesh.account.bytes == 3 * SIZE
    mesh.end(mesh.worker)
    assert mesh.counts == (1, 1)
    mesh.alice.send(m.Cancel(request_id(3)))
    mesh.worker.send(m.Accept(request_id(2), mesh.worker.dispatches[-1].dispatch))
    assert mesh.counts == (1, 0)
    mesh.end(mesh.worker)
    assert mesh.counts == (0, 0)
    assert (mesh.account.bytes, mesh.account.submitted, mesh.account.tokens) == (0, 3, 20)


def test_a_request_that_moves_is_counted_once_and_not_refused() -> None:
    mesh = Keyed(slots=1, max_queued=1, max_in_flight=1, per_minute=2)
    mesh.alice.submit(1)
    mesh.alice.submit(2)
    mesh.worker.send(m.Goodbye())
    assert mesh.counts == (0, 2)  # one more than may wait
    other = mesh.bench.worker("w-2", slots=4, user="w")
    assert [d.id for d in other.dispatches] == [request_id(1)]
    assert mesh.counts == (1, 1)
    assert mesh.alice.ends == []
    mesh.end(other)
    assert [d.id for d in other.dispatches] == [request_id(1), request_id(2)]


def test_a_request_over_the_running_limit_waits_and_does_not_stop_other_identities() -> None:
    mesh = Keyed(slots=4, max_in_flight=1)
    bob = mesh.client("bob")
    mesh.alice.submit(1)
    mesh.alice.submit(2)
    bob.submit(3)
    bob.submit(4)
    assert [d.id for d in mesh.worker.dispatches] == [request_id(n) for n in (1, 3, 4)]
    assert mesh.counts == (1, 1)
    assert mesh.alice.problems == []
    mesh.end(mesh.worker, number=0)
    assert mesh.worker.dispatches[-1].id == request_id(2)


def test_who_was_held_back_goes_on_another_model_too() -> None:
    mesh = Keyed(slots=1, max_in_flight=1)
    other = mesh.bench.worker("w-2", model="other", user="w")
    mesh.alice.submit(1, model="m")
    mesh.alice.submit(2, model="other")
    assert other.dispatches == []
    mesh.end(mesh.worker)
    assert [d.id for d in other.dispatches] == [request_id(2)]


def test_a_higher_limit_lets_go_at_once() -> None:
    mesh = Keyed(slots=4, max_in_flight=1)
    for number in (1, 2, 3, 4):
        mesh.alice.submit(number)
    assert mesh.counts == (1, 3)
    mesh.allow(max_in_flight=2)
    assert mesh.counts == (2, 2)
    mesh.allow(max_in_flight=1)  # what runs is kept
    assert mesh.counts == (2, 2)
    mesh.end(mesh.worker, number=0)
    assert mesh.counts == (1, 2)
    mesh.allow()
    assert mesh.counts == (3, 0)


def test_what_an_emptied_worker_gives_back_is_not_held_back() -> None:
    mesh = Keyed(slots=1, max_in_flight=1)
    boss = mesh.client("boss")
    mesh.alice.submit(1)
    mesh.alice.submit(2)
    other = mesh.bench.worker("w-2", slots=2, user="w")
    boss.send(m.DrainWorker(1, "w", move=True))
    assert [d.id for d in other.dispatches] == [request_id(1)]
    assert mesh.counts == (1, 1)


# --- refusals ----------------------------------------------------------------------------------------------


def test_too_many_waiting() -> None:
    mesh = Keyed(slots=1, max_queued=2)
    for number in range(4):
        mesh.alice.submit(number)
    assert mesh.refused() == ErrorInfo(Code.OVER_LIMIT, "alice has 2 requests waiting, at most 2 may", 1_000)
    mesh.client("bob").submit(9)  # other identities are not affected
    assert mesh.bench.state.requests.keys() == {request_id(n) for n in (0, 1, 2, 9)}
    assert dict(mesh.account.refused) == {"max_queued": 1}
    assert mesh.bench.state.counters.requests.refused == 1


def test_the_retry_time_comes_from_its_own_pace() -> None:
    mesh = Keyed(slots=1, max_queued=2)
    mesh.bench.pass_time(1_000)
    number = 0
    for _ in range(20):  # two end in each second
        mesh.alice.submit(number := number + 1)
        mesh.bench.pass_time(450)
        mesh.worker.beat()
        mesh.end(mesh.worker)
        mesh.alice.send(m.EndAck([request_id(number)]))
        mesh.bench.pass_time(50)
        mesh.worker.beat()
    for _ in range(4):
        mesh.alice.submit(number := number + 1)
    assert mesh.refused().retry_after_ms == pytest.approx(500, rel=0.25)


def test_too_many_bytes() -> None:
    mesh = Keyed(slots=1, max_bytes=3 * SIZE - 1)
    for number in range(3):
        mesh.alice.submit(number)
    text = f"prompts and answers of alice take {2 * SIZE} bytes, this one {SIZE} more; {3 * SIZE - 1} are allowed"
    assert mesh.refused() == ErrorInfo(Code.OVER_LIMIT, text, 1_000)
    mesh.end(mesh.worker)
    mesh.alice.submit(2)
    assert request_id(2) in mesh.bench.state.requests


def test_more_bytes_than_it_may_ever_have() -> None:
    mesh = Keyed(max_bytes=2_000)
    mesh.alice.submit(1, prompt=b"x" * 1_000)
    size = reservation(10) + 1_000
    text = f"a prompt of 1000 bytes and room for its answer are {size} bytes, alice may have 2000: lower max_tokens"
    assert mesh.refused() == ErrorInfo(Code.TOO_LONG, text)


def test_too_many_in_a_minute_and_the_next_at_the_time_that_was_given() -> None:
    mesh = Keyed(slots=100, per_minute=7)
    for number in range(8):
        mesh.alice.submit(number)
    error = mesh.refused()
    assert (error.code, error.text) == (Code.OVER_LIMIT, "alice may begin 7 requests in a minute")
    assert error.retry_after_ms == 8_571  # a seventh of a minute
    mesh.bench.now_ms += error.retry_after_ms - 1
    mesh.alice.submit(8)
    assert mesh.refused().retry_after_ms == 1
    mesh.bench.now_ms += 1
    mesh.alice.submit(9)
    assert mesh.account.submitted == 8
    assert dict(mesh.account.refused) == {"per_minute": 2}  # and refusals cost nothing


def test_a_minute_is_not_saved_up_for_longer() -> None:
    account = Account("alice", Identity("alice", "client", per_minute=60))
    for now_ms in (0, 3_600_000):
        for _ in range(60):
            assert account.refusal(1, 1, False, now_ms) is None
            account.pay(now_ms)
        assert account.refusal(1, 1, False, now_ms) is not None


@pytest.mark.parametrize("per_minute", [1, 7, 59, 1_000, 99_999])
def test_as_many_as_are_allowed_are_let_in_at_once(per_minute: int) -> None:
    """Long after the boot, when a float has few digits left behind the point."""
    account = Account("alice", Identity("alice", "client", per_minute=per_minute))
    now_ms, taken = 10**11 + 7, 0
    while taken <= per_minute and account.refusal(1, 1, False, now_ms) is None:
        account.pay(now_ms)
        taken += 1
    assert taken == per_minute


def test_a_priority_it_may_not_have() -> None:
    mesh = Keyed(slots=4, priority_max="normal")
    for number, priority in enumerate(("interactive", "normal", "batch")):
        mesh.alice.submit(number, priority=priority)
    (problem,) = mesh.alice.problems
    text = "alice may not ask for priority 'interactive'; the best it may have is 'normal'"
    assert (problem.id, problem.error) == (request_id(0), ErrorInfo(Code.FORBIDDEN, text))
    assert dict(mesh.account.refused) == {"priority_max": 1}


def test_a_model_it_may_not_use_and_whether_it_exists() -> None:
    """The answer is the same whether the request exists or not."""
    mesh = Keyed(models=("tiny*", "m"))
    mesh.bench.worker("w-2", model="secret", user="w")
    texts = []
    for number, model in enumerate(("secret", "wrong")):
        mesh.alice.submit(number, model=model)
        assert mesh.refused().code is Code.FORBIDDEN
        texts.append(mesh.refused().text.replace(model, "MODEL"))
    assert texts[0] == texts[1] == "alice may not use the model 'MODEL'; it may use: m"


def test_of_several_models_the_one_that_it_may_use_is_meant() -> None:
    mesh = Keyed(models=("m", "tiny*"))
    mesh.bench.worker("w-2", model="secret", user="w")
    mesh.alice.submit(1)
    assert mesh.alice.received(m.Accepted)[-1].model == "m"
    mesh.bench.worker("w-3", model="tiny-2", user="w")
    mesh.alice.submit(2)
    assert mesh.refused() == ErrorInfo(Code.MODEL_REQUIRED, "several models are served, name one of: m, tiny-2")
    mesh.alice.submit(3, model="tiny-9")
    assert mesh.refused() == ErrorInfo(Code.UNKNOWN_MODEL, "no worker serves 'tiny-9'; there is: m, tiny-2")


def test_if_it_may_use_none_of_what_is_served_there_is_none_for_it() -> None:
    mesh = Keyed(models=("tiny*",))
    mesh.alice.submit(1)
    assert mesh.refused() == ErrorInfo(Code.NO_WORKER, "no worker serves a model that alice may use", 1_000)


def test_a_repeated_submit_is_no_new_request() -> None:
    mesh = Keyed(slots=1, max_queued=1, per_minute=2, priority_max="normal")
    mesh.alice.submit(1)
    mesh.alice.submit(2)
    mesh.allow(max_queued=1, per_minute=1, priority_max="batch", models=("other",))
    mesh.alice.submit(2)  # as after a connection that was cut
    assert mesh.alice.problems == []
    assert mesh.account.submitted == 2


# --- what was admitted elsewhere ---------------------------------------------------------------------------


def test_what_another_broker_had_admitted_is_counted_and_not_refused() -> None:
    mesh = Keyed(slots=1, max_queued=1, per_minute=2, max_in_flight=1)
    for number in range(5):
        mesh.alice.submit(number, **elsewhere(number))
    assert mesh.alice.problems == []
    assert mesh.counts == (0, 5)
    mesh.bench.pass_time(1_000)  # they are not announced
    mesh.worker.beat()
    assert mesh.counts == (1, 4)
    mesh.alice.submit(9)
    assert mesh.refused().text == "alice has 4 requests waiting, at most 1 may"
    mesh.allow(per_minute=2)
    mesh.alice.submit(9)  # three too many were admitted: that is no debt
    assert mesh.refused().text == "alice may begin 2 requests in a minute"
    assert mesh.refused().retry_after_ms <= 30_000


def test_requests_of_other_brokers_get_at_most_twice_its_limit_of_bytes() -> None:
    mesh = Keyed(slots=1, max_bytes=3 * SIZE)
    for number in range(10):
        mesh.alice.submit(number, **elsewhere(number))
    assert mesh.account.bytes == 6 * SIZE
    assert mesh.refused().code is Code.OVER_LIMIT


def test_a_claim_without_a_proof_is_a_new_request() -> None:
    """As of a client that knows no proofs, or has none: it is served like any other."""
    mesh = Keyed(slots=1, max_queued=1, max_bytes=3 * SIZE, per_minute=3)
    mesh.alice.submit(1, resume=True)
    assert mesh.alice.problems == [] and mesh.counts == (0, 1)
    mesh.alice.submit(2, resume=True)
    assert mesh.refused().text == "alice has 1 request waiting, at most 1 may"
    mesh.allow(max_bytes=SIZE)
    mesh.alice.submit(3, resume=True)
    assert mesh.refused().text.startswith("prompts and answers of alice take")
    mesh.allow(per_minute=1)
    mesh.alice.submit(4, resume=True)
    assert mesh.refused().text == "alice may begin 1 request in a minute"


@pytest.mark.parametrize(
    "change",
    [
        {"number": 2}, {"prompt": b"other"}, {"max_tokens": 11}, {"seed": 1}, {"priority": "interactive"},
        {"detached": True}, {"stream": False}, {"logprobs": 3}, {"sampling": msgspec.Raw(b"\x81\xa1a\x01")},
        {"model": "n"}, {"proof": bytes(16)}, {"proof": b""}, {"resume": False}, {"number": 1},
    ],
    ids=lambda change: "-".join(f"{name}={str(value)[:12]}" for name, value in change.items()),
)  # fmt: skip
def test_a_proof_is_for_one_request_as_it_was_admitted(change: dict[str, Any]) -> None:
    mesh = Keyed(slots=1, per_minute=1)
    mesh.bench.worker("w-2", model="n", slots=1, user="w")
    mesh.alice.submit(9, model="m")  # that was its one in a minute
    mesh.alice.submit(**{"number": 1, "model": "m", **elsewhere(1), **change})
    refused = [problem.error.code for problem in mesh.alice.problems]
    assert refused == ([] if change == {"number": 1} else [Code.OVER_LIMIT])


def test_a_proof_is_of_no_use_to_others() -> None:
    mesh = Keyed(slots=1)
    mesh.bench.keys(Identity("bob", "client", per_minute=1), GPU)
    bob = mesh.bench.client(b"b", user="bob")
    bob.submit(9)
    bob.submit(1, **elsewhere(1))
    assert [problem.error.code for problem in bob.problems] == [Code.OVER_LIMIT]


def test_a_full_queue_is_no_reason_to_refuse_what_is_proved() -> None:
    bench = Bench(marks_key=b"of all brokers", queue_requests=1)
    bench.keys(Identity("alice", "client"), GPU)
    bench.worker(slots=1, user="w")
    alice = bench.client(b"a", user="alice")
    for number in (7, 8):
        alice.submit(number)
    alice.submit(1, resume=True)
    assert [problem.error.code for problem in alice.problems] == [Code.BUSY]
    alice.submit(1, **elsewhere(1))
    assert len(alice.problems) == 1 and len(alice.received(m.Accepted)) == 3


@pytest.mark.parametrize(
    ("name", "says"), [("box2", "as in --name w-box2"), ("w-x", "start this one with --name w-x-2")]
)
def test_a_worker_is_told_which_names_its_key_allows(name: str, says: str) -> None:
    bench = Bench()
    bench.keys(GPU, Identity("alice", "client"))
    bench.worker("w-x", user=GPU.name)
    bench.worker(name, incarnation=b"other", user=GPU.name)
    problems = [action.message for action in bench.last if isinstance(action, ToWorker)]
    assert [says in problem.error.text for problem in problems if isinstance(problem, m.Problem)] == [True]


def test_a_claim_gives_no_rights() -> None:
    mesh = Keyed(models=("tiny",), priority_max="batch")
    mesh.alice.submit(1, resume=True, model="m", priority="batch")
    assert mesh.refused().code is Code.FORBIDDEN
    mesh.alice.submit(2, resume=True, model="tiny", priority="normal")
    assert mesh.refused().code is Code.FORBIDDEN


def test_a_run_that_comes_home_is_charged_to_its_owner() -> None:
    mesh, former = Keyed(slots=2, max_queued=1, max_bytes=SIZE, per_minute=1, max_in_flight=1), Keyed(slots=2)
    for number in (1, 2):
        former.alice.submit(number, detached=True)
        mesh.worker.send(m.Orphan(former.worker.dispatches[-1], home=True), blob=b"hello")
    assert mesh.counts == (2, 0)  # one more than may run
    assert mesh.account.bytes == 2 * SIZE
    mesh.alice.submit(3, max_tokens=1)
    assert mesh.refused().code is Code.OVER_LIMIT


# --- what each may see --------------------------------------------------------------------------------------


def status(bench: Bench, client: Client) -> Any:
    client.send(m.Query(1, "status"))
    return msgspec.msgpack.decode(client.received(m.Result)[-1].data)


def test_an_admin_sees_all_identities_and_a_client_its_own() -> None:
    mesh = Keyed(slots=1, max_queued=1, models=("m",))
    mesh.bench.worker("w-2", model="secret", user="w")
    bob, boss = mesh.client("bob"), mesh.client("boss")
    for number in range(3):
        mesh.alice.submit(number)
    bob.submit(4, model="secret")
    own = status(mesh.bench, mesh.alice)
    (row,) = own["identities"]
    assert row | {"identity": "alice", "in_flight": 1, "queued": 1, "refused_for": {"max_queued": 1}} == row
    assert (row["max_queued"], row["bytes"], row["role"]) == (1, 2 * SIZE, "client")
    assert [model["model"] for model in own["models"]] == ["m"]
    assert [one["identity"] for one in status(mesh.bench, bob)["identities"]] == ["bob"]
    all_of_them = status(mesh.bench, boss)
    assert [one["identity"] for one in all_of_them["identities"]] == ["alice", "bob", "boss"]
    assert len(all_of_them["models"]) == 2


def test_models_that_one_may_not_use_are_not_listed_for_workers() -> None:
    mesh = Keyed(models=("m",))
    mesh.bench.worker("w-2", model="secret", user="w")
    mesh.alice.send(m.Query(1, "workers"))
    workers = msgspec.msgpack.decode(mesh.alice.received(m.Result)[-1].data)
    assert [worker["models"] for worker in workers] == [["m"], []]


def test_without_keys_there_are_no_identities() -> None:
    bench = Bench()
    client = bench.client()
    client.submit(1)
    assert status(bench, client)["identities"] == []


# --- names that go -----------------------------------------------------------------------------------------


def test_a_name_that_is_gone_is_held_to_its_limits_until_nothing_of_it_is_left() -> None:
    mesh = Keyed(slots=4, max_in_flight=1)
    for number in (1, 2):
        mesh.alice.submit(number, detached=True)
    mesh.bench.keys(*mesh.others)
    mesh.bench.pass_time(1_000)
    mesh.worker.beat()
    assert mesh.counts == (1, 1)
    for number in (0, 1):
        mesh.end(mesh.worker, number)
    mesh.bench.pass_time(1_000)
    assert "alice" not in mesh.bench.state.access.accounts.by_name


def test_after_a_restart_no_identity_can_fill_the_waiting_list() -> None:
    bench = Bench(startup_grace_ms=5_000)
    bench.keys(Identity("alice", "client", max_queued=2), Identity("bob", "client"))
    alice, bob = bench.client(b"a", user="alice"), bench.client(b"b", user="bob")
    for number in range(3):
        alice.submit(number)
    bob.submit(9)
    (problem,) = alice.problems
    assert (problem.id, problem.error.code, problem.error.retry_after_ms) == (request_id(2), Code.OVER_LIMIT, 1_000)
    assert bob.problems == []
    assert bench.state.access.accounts.by_name["alice"].queued == 0  # nothing is adopted yet
