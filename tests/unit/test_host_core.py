"""The host core: events in, actions out. The invariants are checked after every event."""

from __future__ import annotations

import random
from typing import Any, TypeVar

import pytest

from llambo.mesh.link.link_core import CloseLink, OpenTokens, Send
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.worker.agent import events as e
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.config import RAM, HostConfig
from llambo.worker.host import hosted_model
from llambo.worker.host.host_core import WISH_BEATS, HostCore, check_host
from llambo.worker.host.host_events import (
    HostAction,
    HostEvent,
    ModelsFound,
    StartWorker,
    StopWorker,
    StoredModel,
    UnloadWorker,
    WorkerChanged,
    WorkerEnded,
)
from llambo.worker.host.loading_core import STAY_LOADS

T = TypeVar("T")
YOUNG_MS = 30_000
ABC = {"a": 40, "b": 40, "c": 40}


class Rig:
    """A host with a clock, joined to each of its brokers. The budget is 100 bytes, unless a test says otherwise."""

    def __init__(self, models: dict[str, int] | None = None, brokers: int = 1, **config: Any) -> None:
        config = {"budget": {RAM: 100}, "min_loaded_ms": YOUNG_MS, **config}
        addresses = tuple(f"tcp://b{number}:7330" for number in range(brokers))
        self.core = HostCore(HostConfig(name="box", brokers=addresses, **config), ProcessIdentity(b"incarnat"))
        self.now = 1_000_000
        self.actions: list[HostAction] = []
        self.echo = True
        self.beat_ms = 200
        self.find({} if models is None else models)
        for number in range(brokers):
            self.join(number)

    def find(self, models: dict[str, int]) -> Rig:
        return self.on(ModelsFound([StoredModel(name, needs={RAM: size}) for name, size in models.items()]))

    def on(self, event: HostEvent) -> Rig:
        self.actions += self.core.handle(event, self.now)
        if not self.core.exited:
            check_host(self.core)
        return self

    def join(self, broker: int) -> Rig:
        welcome = m.Welcome(b"session%d" % broker, 7332, broker=f"b{broker}")
        return self.receive(welcome, broker=broker, session=NO_SESSION)

    def receive(self, message: m.Message, broker: int = 0, session: bytes | None = None) -> Rig:
        session = b"session%d" % broker if session is None else session
        return self.on(e.ControlArrived(broker, session, [(message, b"")]))

    def place(self, *load: str, evict: tuple[str, ...] = (), broker: int = 0) -> Rig:
        return self.receive(m.PlaceModels(1, list(load), list(evict)), broker)

    def hold(self, model: str, holder: str, **fields: Any) -> Rig:
        return self.receive(m.Hold(1, model, holder, **fields))

    def wait(self, ms: int, silent: tuple[int, ...] = ()) -> Rig:
        """Let time pass. Brokers send heartbeats; the core is called when it asks for it."""
        until = self.now + ms
        beat_at = self.now
        while (at := min(max(self.now, self.core.next_wakeup_ms()), beat_at)) <= until:
            self.now = max(self.now, at)
            if self.now >= beat_at:
                beat_at += self.beat_ms
                for number in self.core.links:
                    if number not in silent:
                        echo = self.core.revision if self.echo else 0
                        self.receive(m.BrokerHeartbeat(1, echo, seq=7), number)
            self.on(e.Ticked())
            assert self.core.next_wakeup_ms() > self.now, "the core asks for one call after another"
        self.now = until
        return self

    def ready(self, *models: str) -> Rig:
        """The workers of these models are ready."""
        for model in models:
            self.on(WorkerChanged(model, ready=True))
        return self

    def slowly(self, model: str, ms: int = YOUNG_MS) -> Rig:
        """It is loaded in so long."""
        return self.place(model).wait(ms).ready(model)

    def busy(self, model: str, active: int = 1) -> Rig:
        return self.on(WorkerChanged(model, ready=True, active=active))

    def load(self, *models: str) -> Rig:
        """Load them, one after the other, and let them grow old."""
        for model in models:
            self.place(model).ready(model)
        return self.place().wait(YOUNG_MS).clear()

    def clear(self) -> Rig:
        self.actions = []
        return self

    def clear_after(self) -> list[HostAction]:
        actions, self.actions = self.actions, []
        return actions

    def take(self, kind: type[T]) -> list[T]:
        """The actions of one kind so far; all others are dropped."""
        found: list[T] = [action for action in self.actions if isinstance(action, kind)]
        self.actions = []
        return found

    @property
    def started(self) -> list[str]:
        return [action.model for action in self.take(StartWorker)]

    @property
    def unloaded(self) -> list[str]:
        return [action.model for action in self.take(UnloadWorker)]

    def sent(self, kind: type[T], broker: int = 0) -> list[T]:
        return [send.message for send in self.take(Send) if send.link == broker and isinstance(send.message, kind)]

    def states(self) -> dict[str, str]:
        return {model.name: model.state for model in self.core.loading.hosted(self.now)}

    def model(self, name: str) -> m.HostedModel:
        return next(model for model in self.core.loading.hosted(self.now) if model.name == name)

    @property
    def used(self) -> int:
        return self.core.loading.memory()[RAM].used


# --- Loading. ---


def test_what_a_broker_wants_is_loaded_and_reported() -> None:
    rig = Rig(ABC)
    assert rig.states() == {"a": "stored", "b": "stored", "c": "stored"}
    assert rig.place("a").take(StartWorker) == [StartWorker("a", "box-a")]
    rig.on(WorkerChanged("a", ready=False, percent=41))
    assert rig.model("a").percent == 41 and rig.model("a").worker == "box-a" and rig.used == 40
    rig.wait(3_000).ready("a")
    assert rig.states()["a"] == "ready"
    assert rig.model("a").loads == 1 and rig.model("a").load_ms == 3_000


def test_a_model_is_loaded_once_however_many_ask() -> None:
    rig = Rig(ABC, brokers=2)
    rig.place("a").place("a", broker=1).hold("a", "x").place("a")
    assert rig.started == ["a"]
    assert rig.ready("a").place("a").place("a", broker=1).started == []


def test_the_budget_is_never_exceeded() -> None:
    rig = Rig(ABC)
    assert rig.place("a", "b", "c").started == ["a", "b"]
    assert rig.ready("a", "b").wait(1_000).started == [] and rig.used == 80


def test_each_kind_of_memory_has_a_budget() -> None:
    rig = Rig(budget={RAM: 100, "CUDA0": 50}, helper_percent=0)
    on_gpu = [StoredModel(name, needs={RAM: 10, "CUDA0": 30}) for name in ("a", "b")]
    rig.on(ModelsFound([*on_gpu, StoredModel("c", needs={RAM: 80})]))
    assert rig.place("a", "b", "c").started == ["a", "c"]
    assert rig.core.loading.memory() == {RAM: m.Memory(100, 90), "CUDA0": m.Memory(50, 30)}


def test_what_a_model_needs_is_corrected_by_what_its_engine_takes() -> None:
    rig = Rig(ABC).place("a", "b").ready("b")
    rig.on(WorkerChanged("a", ready=True, memory_bytes=20))
    assert rig.model("a").needs == {RAM: 20} and rig.used == 60
    assert rig.place("c").started == ["a", "b", "c"], "now there is room for the third"
    # It stays known while the model is not loaded.
    rig.ready("c").wait(YOUNG_MS).hold("a", "", undo=True).on(WorkerEnded("a"))
    assert rig.states()["a"] == "stored" and rig.model("a").needs == {RAM: 20}
    assert rig.clear().place("a").started == ["a"] and rig.used == 100
    # Another file of that name has another size.
    rig.find(ABC | {"a": 50})
    assert rig.model("a").needs == {RAM: 50}


def test_a_model_that_needs_more_than_was_expected_counts_within_the_budget() -> None:
    rig = Rig({"a": 40, "b": 50}).place("a", "b").ready("b")
    rig.on(WorkerChanged("a", ready=True, memory_bytes=60))
    assert rig.used == 100 and rig.model("a").needs == {RAM: 60}
    assert [log.text for log in rig.take(e.Log) if log.warning] == ["a needs 0 MiB of ram, more than was expected"]
    # More than the budget is no reason not to load again what could be loaded.
    rig.on(WorkerEnded("b")).on(WorkerChanged("a", ready=False)).on(WorkerChanged("a", ready=True, memory_bytes=101))
    assert rig.model("a").needs == {RAM: 60}


def test_memory_is_free_when_the_engine_is_gone_and_not_before() -> None:
    rig = Rig(ABC).load("a", "b")
    rig.place("c", evict=("a",))
    assert rig.unloaded == ["a"] and rig.used == 80
    assert rig.states() == {"a": "unloading", "b": "ready", "c": "stored"}
    rig.wait(1_000)
    assert not rig.take(StartWorker)
    rig.place("c", evict=("a",)).on(WorkerEnded("a"))
    assert rig.started == ["c"] and rig.used == 80


def test_at_most_so_many_models_are_loaded() -> None:
    names = [f"m{number}" for number in range(limits.LOADED_PER_HOST + 1)]
    rig = Rig(dict.fromkeys(names, 1)).place(*names)
    assert rig.started == names[:-1]


def test_a_model_that_is_larger_than_the_budget_is_refused_with_the_numbers() -> None:
    rig = Rig({"a": 101, "b": 40}).place("a", "b")
    assert rig.started == ["b"]
    assert rig.model("a").state == "failed" and "it needs" in rig.model("a").note and rig.model("a").retry_ms == 0


def test_a_model_that_cannot_be_loaded_is_not_tried() -> None:
    rig = Rig()
    rig.on(ModelsFound([StoredModel("a", refusal="it is damaged")])).place("a").hold("a", "x")
    assert rig.started == [] and rig.model("a").note == "it is damaged"


# --- Evicting. ---


def test_only_as_much_is_evicted_as_is_needed_and_in_the_order_of_the_broker() -> None:
    rig = Rig({"a": 30, "b": 30, "c": 30, "d": 40}).load("a", "b", "c")
    assert rig.place("d", evict=("b", "a", "c")).unloaded == ["b"]


def test_nothing_is_evicted_if_the_model_would_not_fit_then() -> None:
    rig = Rig({"a": 40, "b": 40, "d": 90}).load("a", "b").busy("b")
    assert rig.place("d", evict=("a", "b")).unloaded == []
    # The last one becomes idle.
    assert rig.ready("b").unloaded == ["a", "b"]


def test_a_model_that_two_brokers_name_counts_once() -> None:
    rig = Rig({"a": 30, "b": 30, "d": 90}, brokers=2).load("a", "b").busy("b")
    assert rig.place("d", evict=("a",)).place("d", evict=("a",), broker=1).unloaded == []


def test_what_no_broker_names_is_not_evicted() -> None:
    rig = Rig(ABC).load("a", "b")
    assert rig.place("c").unloaded == [] and rig.wait(1_000).unloaded == []


def test_a_busy_model_is_not_evicted() -> None:
    rig = Rig(ABC).load("a", "b").busy("a")
    assert rig.place("c", evict=("a",)).unloaded == []
    assert rig.ready("a").unloaded == ["a"]


def test_a_worker_that_is_busy_after_all_refuses_and_stays() -> None:
    rig = Rig(ABC).load("a", "b").place("c", evict=("a", "b"))
    assert rig.unloaded == ["a"]
    rig.on(WorkerChanged("a", ready=True, active=1, refusals=1))
    assert rig.states()["a"] == "ready"
    assert rig.unloaded == ["b"]


@pytest.mark.parametrize("pin", [False, True])
def test_a_model_that_is_held_or_pinned_is_not_evicted(pin: bool) -> None:
    rig = Rig(ABC).load("a", "b").hold("a", "x", pin=pin)
    assert rig.place("c", evict=("a",)).unloaded == []
    assert rig.model("a").holders == ["x"] and rig.model("a").pinned is pin
    assert rig.hold("a", "x", undo=True).place("c", evict=("a",)).unloaded == ["a"]


def test_a_model_that_was_loaded_a_moment_ago_is_not_evicted() -> None:
    rig = Rig(ABC).slowly("b").slowly("a").clear()
    for _ in range(YOUNG_MS // 1_000 - 1):
        assert rig.place("c", evict=("a",)).wait(1_000).unloaded == []
    assert rig.place("c", evict=("a",)).wait(1_000).unloaded == ["a"]


def test_a_model_that_is_loaded_in_a_moment_is_protected_for_a_moment() -> None:
    rig = Rig(ABC).slowly("b").slowly("a", 2_000).clear()
    assert rig.place("c", evict=("a",)).wait(2_000 * STAY_LOADS - 1).unloaded == []
    assert rig.place("c", evict=("a",)).wait(1).unloaded == ["a"]


@pytest.mark.parametrize(("load_s", "fewest", "most"), [(1, 60, 100), (2, 30, 50), (10, 14, 16)])
def test_models_do_not_take_turns_faster_than_the_shortest_stay(load_s: int, fewest: int, most: int) -> None:
    """Two brokers want different models, of which one fits, for ten minutes. A sixth of these is the time of loads."""
    rig = Rig({"a": 60, "b": 60}, brokers=2)
    loads, ready_at = [], {0: ""}
    for second in range(600):
        rig.place("a", evict=("b",)).place("b", evict=("a",), broker=1).wait(1_000)
        if model := ready_at.pop(second, ""):
            rig.ready(model)
        while actions := rig.clear_after():
            for action in actions:
                if isinstance(action, StartWorker):
                    loads.append(action.model)
                    ready_at[second + load_s] = action.model
                elif isinstance(action, UnloadWorker):
                    rig.on(WorkerEnded(action.model))
    assert fewest <= len(loads) <= most and set(loads) == {"a", "b"}


def test_memory_that_is_freed_for_one_model_is_not_taken_by_the_next() -> None:
    rig = Rig({"a": 90, "d": 90, "e": 5}).load("a")
    rig.place("d", "e", evict=("a",))
    assert rig.started == ["e"], "beside both there is room for it"
    rig = Rig({"a": 45, "b": 45, "d": 90, "e": 50}).load("a", "b")
    for ended, started in (("", []), ("a", []), ("b", ["d"])):
        rig.place("d", "e", evict=("a", "b"))
        assert rig.on(WorkerEnded(ended) if ended else e.Ticked()).started == started


def test_a_model_that_waits_delays_no_smaller_one() -> None:
    rig = Rig({"a": 40, "big": 90, "c": 40}).load("a").busy("a")
    assert rig.place("big", "c", evict=("a",)).started == ["c"]


# --- Helpers. ---


def helpers(share: int, size: int) -> Rig:
    rig = Rig(helper_percent=share)
    rig.on(ModelsFound([
        StoredModel("embedder", "embed", {RAM: size}), StoredModel("reranker", "rerank", {RAM: size}),
        StoredModel("a", needs={RAM: 90}), StoredModel("embedder-2", "embed", {RAM: 90}),
    ]))  # fmt: skip
    return rig.load("embedder", "reranker")


def test_helpers_within_their_share_are_not_evicted_for_a_model_that_generates() -> None:
    rig = helpers(share=20, size=10).place("a", evict=("embedder", "reranker"))
    assert rig.unloaded == []


def test_helpers_beyond_their_share_are_evicted() -> None:
    rig = helpers(share=20, size=11).place("a", evict=("embedder", "reranker"))
    assert rig.unloaded == ["embedder", "reranker"]


def test_a_helper_is_evicted_for_another() -> None:
    rig = helpers(share=20, size=10).place("embedder-2", evict=("embedder", "reranker"))
    assert rig.unloaded == ["embedder"]


# --- Loads that fail. ---


def test_a_load_that_fails_is_tried_again_after_a_pause_that_doubles() -> None:
    rig = Rig(ABC)
    for pause_ms in (5_000, 10_000, 20_000):
        assert rig.place("a").started == ["a"]
        rig.on(WorkerEnded("a", "the file is damaged"))
        failed = rig.model("a")
        assert (failed.state, failed.note, failed.retry_ms) == ("failed", "the file is damaged", pause_ms)
        assert rig.place("a").wait(pause_ms - 1).started == []
        rig.wait(1)
    rig.place("a").ready("a").on(WorkerEnded("a", "again"))
    assert rig.model("a").retry_ms == 5_000, "it was ready in between"


def test_a_load_that_fails_delays_no_other() -> None:
    rig = Rig(ABC).place("a", "b").on(WorkerEnded("a", "it is damaged"))
    assert rig.place("a", "c").started == ["a", "b", "c"]
    assert rig.used == 80


def test_a_failed_model_that_is_held_is_tried_again_by_itself() -> None:
    rig = Rig(ABC).hold("a", "x").on(WorkerEnded("a", "no")).clear()
    assert rig.wait(4_999).started == [] and rig.wait(1).started == ["a"]


def test_after_an_out_of_memory_it_is_tried_once_more_with_everything_idle_gone() -> None:
    rig = Rig({"a": 20, "b": 20, "c": 20, "d": 20}).load("a", "b", "c").busy("b").place("d").clear()
    # The broker does not repeat its wish for a model that is loading.
    rig.place().on(WorkerEnded("d", "out of memory", out_of_memory=True))
    assert rig.unloaded == ["a", "c"] and rig.states()["d"] == "loading"
    assert rig.wait(3_000).started == []
    assert rig.on(WorkerEnded("a")).started == []
    assert rig.on(WorkerEnded("c")).started == ["d"]
    rig.on(WorkerEnded("d", "out of memory", out_of_memory=True))
    assert rig.model("d").state == "failed" and rig.model("d").retry_ms == 10_000
    # Once: what is loaded in the meantime is not unloaded for the next attempt.
    rig.place("a").ready("a").place().wait(YOUNG_MS).clear()
    assert rig.place("d").started == ["d"]
    rig.on(WorkerEnded("d", "out of memory", out_of_memory=True))
    assert rig.unloaded == [] and rig.model("d").state == "failed"


def test_after_an_out_of_memory_it_waits_until_young_models_may_go() -> None:
    rig = Rig(ABC).slowly("a").place("b").on(WorkerEnded("b", "out of memory", out_of_memory=True)).clear()
    assert rig.wait(YOUNG_MS - 1).unloaded == []
    rig.clear().wait(1)
    assert rig.unloaded == ["a"]
    assert rig.on(WorkerEnded("a")).started == ["b"]


def test_after_an_out_of_memory_with_nothing_to_unload_it_fails() -> None:
    rig = Rig(ABC).load("a").busy("a").place("b").on(WorkerEnded("b", "out of memory", out_of_memory=True))
    assert rig.model("b").state == "failed" and rig.model("b").retry_ms == 5_000


def test_an_engine_that_starts_again_is_reported_as_loading_and_can_be_evicted() -> None:
    rig = Rig(ABC).load("a", "b").on(WorkerChanged("a", ready=False, percent=7))
    assert rig.states()["a"] == "loading" and rig.used == 80
    assert rig.place("c", evict=("a",)).unloaded == ["a"]


# --- Wishes. ---


def test_a_wish_counts_until_the_next_one() -> None:
    rig = Rig(ABC).load("a", "b").busy("a").place("c", evict=("a",)).place()
    assert rig.ready("a").unloaded == []


def test_a_wish_that_is_not_repeated_ends() -> None:
    rig = Rig(ABC).load("a", "b").busy("a").place("c", evict=("a",)).wait(WISH_BEATS * 200)
    assert rig.ready("a").unloaded == []


def test_the_wishes_of_a_broker_that_is_lost_end() -> None:
    rig = Rig(ABC, brokers=2).load("a", "b").busy("a").place("c", evict=("a",), broker=1)
    rig.receive(m.Goodbye("stopping"), 1)
    assert rig.ready("a").unloaded == []


def test_the_first_wish_of_each_broker_comes_before_any_second_one() -> None:
    rig = Rig(dict.fromkeys("abcd", 50), brokers=2)
    rig.busy("a").place("a", "b")
    assert rig.started == ["a", "b"]
    rig = Rig({"full": 100, "a": 50, "b": 50, "c": 50}, brokers=2).load("full").busy("full")
    rig.place("a", "b").place("c", broker=1).clear()
    assert rig.on(WorkerEnded("full")).started == ["a", "c"]


# --- Holders. ---


def test_a_held_model_is_loaded_when_it_fits_and_evicts_nothing() -> None:
    rig = Rig(ABC).load("a", "b").hold("c", "x")
    assert (rig.started, rig.states()["c"]) == ([], "stored")
    rig.wait(1_000)
    assert rig.hold("a", "", undo=True).on(WorkerEnded("a")).started == ["c"]


def test_a_holder_counts_for_its_time_and_can_renew_it() -> None:
    rig = Rig(ABC).load("a", "b").hold("a", "x", ttl_ms=10_000).wait(9_000).hold("a", "x", ttl_ms=10_000).wait(9_999)
    assert rig.model("a").holders == ["x"]
    assert rig.wait(1).model("a").holders == []


def test_a_holder_gives_back_its_own_and_no_other() -> None:
    rig = Rig(ABC).hold("a", "x").hold("a", "y", pin=True).hold("a", "x", undo=True)
    assert rig.model("a").holders == ["y"] and rig.model("a").pinned


def test_an_operator_can_unload_a_model_that_is_held_as_soon_as_it_is_idle() -> None:
    rig = Rig(ABC).hold("a", "x", pin=True).ready("a").busy("a").hold("a", "", undo=True)
    assert rig.unloaded == [] and rig.model("a").holders == []
    assert rig.ready("a").unloaded == ["a"], "although it was loaded a moment ago"
    assert rig.on(WorkerEnded("a")).started == [] and rig.states()["a"] == "stored"


def test_the_number_of_holders_is_limited() -> None:
    rig = Rig(ABC)
    for number in range(limits.HOLDERS_PER_MODEL + 1):
        rig.hold("a", f"x{number}")
    assert len(rig.model("a").holders) == limits.HOLDERS_PER_MODEL


def test_holders_outlive_their_broker() -> None:
    rig = Rig(ABC).hold("a", "x").receive(m.Goodbye("stopping"))
    assert rig.model("a").holders == ["x"]


# --- The ttl of models. ---


def test_an_idle_model_is_unloaded_after_its_ttl_counted_from_its_last_use() -> None:
    rig = Rig(ABC, model_ttl_ms=60_000).place("a").ready("a").place().clear()
    rig.wait(50_000).busy("a").wait(70_000).ready("a")
    assert rig.wait(59_999).unloaded == []
    assert rig.wait(1).unloaded == ["a"]


def test_the_ttl_counts_from_the_last_holder_and_not_for_a_held_model() -> None:
    rig = Rig(ABC, model_ttl_ms=60_000).hold("a", "x").ready("a").clear().wait(100_000)
    assert rig.hold("a", "x", undo=True).wait(59_999).unloaded == []
    assert rig.wait(1).unloaded == ["a"]


def test_without_a_ttl_an_idle_model_stays() -> None:
    assert Rig(ABC).load("a").wait(1_000_000).unloaded == []


# --- The catalogue. ---


def test_models_come_and_go_while_the_host_runs() -> None:
    rig = Rig(ABC).load("a").find({"b": 40, "d": 40})
    assert set(rig.states()) == {"a", "b", "d"}, "a loaded one stays until it is unloaded"
    rig.hold("a", "", undo=True).on(WorkerEnded("a"))
    assert set(rig.states()) == {"b", "d"}
    assert rig.place("a", "d").started == ["d"]


def test_workers_have_names_that_the_key_of_the_host_allows_and_each_its_own() -> None:
    rig = Rig({"x/y z": 1, "x y z": 1, "q" * limits.NAME_CHARS: 1}).place("x/y z", "x y z", "q" * limits.NAME_CHARS)
    names = [action.worker for action in rig.take(StartWorker)]
    assert names[:2] == ["box-x-y-z", "box-x-y-z-2"] and len(names[2]) <= limits.NAME_CHARS
    assert all(name.startswith("box-") for name in names)


# --- Brokers. ---


def test_it_joins_without_a_token_plane_and_reports_until_that_is_echoed() -> None:
    rig = Rig(ABC)
    assert rig.core.links[0].up and not [action for action in rig.actions if isinstance(action, OpenTokens)]
    assert len(rig.take(e.NotifyReady)) == 1
    rig.echo = False
    reports = rig.wait(1_000).sent(m.HostHeartbeat)
    assert len(reports) >= 5 and all(len(report.models) == 3 and report.memory for report in reports)
    assert all(report.seq == 7 for report in reports[1:])
    rig.echo = True
    assert all(not report.models for report in rig.wait(1_000).sent(m.HostHeartbeat)[1:])
    # A change is reported at once.
    assert rig.place("a").wait(0).sent(m.HostHeartbeat)[0].models[0].state == "loading"


def test_a_new_session_gets_the_report_again() -> None:
    rig = Rig(ABC).wait(1_000)
    rig.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "a new broker"))).wait(100, silent=(0,)).clear()
    rig.join(0)
    assert rig.sent(m.HostHeartbeat)[0].models


def test_messages_of_an_earlier_session_are_ignored() -> None:
    rig = Rig(ABC).receive(m.PlaceModels(1, ["a"]), session=b"earlier!")
    assert rig.started == []


# --- Stopping. ---


def test_a_host_that_stops_leaves_at_once_and_ends_with_its_last_worker() -> None:
    rig = Rig(ABC).load("a", "b").busy("a").place("c", evict=("b",)).clear().on(e.StopRequested())
    assert [action.model for action in rig.actions if isinstance(action, StopWorker)] == ["a", "b"]
    assert [action for action in rig.actions if isinstance(action, CloseLink)]
    assert not rig.clear().on(WorkerEnded("b")).actions, "nothing is loaded any more"
    rig.on(e.StopRequested())
    assert [action.model for action in rig.take(StopWorker)] == ["a"], "the second time at once"
    assert rig.on(WorkerEnded("a")).take(e.Exit) and rig.core.exited


def test_every_step_of_a_model_has_a_reason() -> None:
    states = set(hosted_model.MODEL_STEPS)
    for steps in hosted_model.MODEL_STEPS.values():
        assert set(steps) <= states and all(steps.values())


# --- Anything at any time. ---


class Workers:
    """Workers that take time to load and to end, are busy now and then, and fail. What is true is here."""

    def __init__(self, rig: Rig, chance: random.Random) -> None:
        self.rig = rig
        self.chance = chance
        #: Of each worker: its state, when that changes, how many runs it has, and its refusals.
        self.alive: dict[str, list[Any]] = {}
        self.began: dict[str, int] = {}
        #: From then on it may be unloaded.
        self.old_at: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def follow(self) -> None:
        """Do what the core has ordered, and check that it may be ordered."""
        rig, now = self.rig, self.rig.now
        for action in rig.clear_after():
            if isinstance(action, StartWorker):
                assert action.model not in self.alive, f"{action.model} is loaded twice"
                self.began[action.model] = now
                self.alive[action.model] = ["loading", now + self.chance.randrange(20_000), 0, 0]
                taken = sum(self.sizes[name] for name in self.alive)
                assert taken <= 100, f"{taken} of 100 bytes are taken"
            elif isinstance(action, UnloadWorker):
                worker = self.alive[action.model]
                held = rig.core.loading.models[action.model].holders
                assert not held, f"{action.model} is held by {held} and unloaded"
                assert now >= self.old_at[action.model], f"{action.model} is unloaded too soon"
                if worker[2]:
                    worker[3] += 1
                    self.tell(action.model)
                else:
                    worker[:2] = "ending", now + self.chance.randrange(5_000)

    def tell(self, model: str) -> None:
        state, _, active, refusals = self.alive[model]
        self.rig.on(WorkerChanged(model, state == "ready", active, 50, refusals))

    def live(self, *, faults: bool) -> None:
        """One step of each worker. Some of what happens is reported a moment later."""
        for model, worker in list(self.alive.items()):
            state, at, active, _ = worker
            if state == "loading" and self.rig.now >= at:
                if faults and self.chance.random() < 0.3:
                    del self.alive[model]
                    self.rig.on(WorkerEnded(model, "it failed", out_of_memory=self.chance.random() < 0.5))
                else:
                    worker[0] = "ready"
                    took_ms = self.rig.now - self.began[model]
                    self.old_at[model] = self.rig.now + min(YOUNG_MS, STAY_LOADS * took_ms)
                    self.tell(model)
            elif state == "ending" and self.rig.now >= at:
                del self.alive[model]
                self.rig.on(WorkerEnded(model))
            elif state == "ready":
                worker[2] = self.chance.choice([active, 0, 1]) if faults else 0
                if self.chance.random() < 0.7 or not faults:
                    self.tell(model)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_the_rules_hold_and_in_the_end_what_is_wanted_is_loaded(seed: int) -> None:
    chance = random.Random(seed)
    sizes = {name: chance.choice([10, 30, 50, 90]) for name in "abcdef"}
    rig = Rig(sizes, brokers=2)
    rig.beat_ms = 1_000
    workers = Workers(rig, chance)
    workers.sizes = sizes
    names = list(sizes)
    for _ in range(200):
        what = chance.random()
        if what < 0.4:
            load, evict = chance.sample(names, chance.randrange(3)), chance.sample(names, chance.randrange(6))
            rig.place(*load, evict=tuple(evict), broker=chance.randrange(2))
        elif what < 0.5:
            pin, undo = chance.random() < 0.3, chance.random() < 0.6
            rig.hold(chance.choice(names), chance.choice("xy"), ttl_ms=chance.choice([0, 20_000]), pin=pin, undo=undo)
        workers.follow()
        workers.live(faults=True)
        workers.follow()
        rig.wait(chance.randrange(4_000))
        workers.follow()
    # Then faults stop, all holders give back, and one broker wants one model.
    for name in names:
        for holder in "xy":
            rig.hold(name, holder, undo=True)
    rig.place(broker=1)
    wanted = chance.choice(names)
    for _ in range(500):
        rig.place(wanted, evict=tuple(names))
        workers.follow()
        workers.live(faults=False)
        workers.follow()
        rig.wait(1_000)
        if rig.states()[wanted] == "ready":
            return
    raise AssertionError(f"{wanted} was not loaded: {rig.states()}")
