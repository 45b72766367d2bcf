"""Which model is loaded where, and what is unloaded for it: the decision alone."""

from __future__ import annotations

from typing import Any

from llambo.broker.placement.decide import Asked, Decision, HostView, decide
from llambo.broker.records.hosts import Wishes
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m


def model(name: str, state: m.HostedState = "stored", size: int = 40, **fields: Any) -> m.HostedModel:
    return m.HostedModel(name, state=state, needs={"ram": size}, **fields)


def host(name: str, *models: m.HostedModel, ram: int = 100, helpers: int = 0, **fields: Any) -> HostView:
    """Loaded models are idle, those that are named first for longest, unless the fields say otherwise."""
    used = sum(each.needs["ram"] for each in models if each.state in ("loading", "ready", "unloading"))
    busy = fields.pop("in_use", ())
    ready = [each.name for each in models if each.state == "ready" and each.name not in busy]
    fields.setdefault("idle_since", {each: number for number, each in enumerate(ready)})
    named = {each.name: each for each in models}
    return HostView(name, named, {"ram": m.Memory(ram, used, helpers)}, in_use=frozenset(busy), **fields)


def wishes(decision: Decision) -> dict[str, Wishes]:
    return {name: wish for name, wish in decision.wishes.items() if wish != Wishes()}


def test_nothing_is_done_where_a_copy_is_on_its_way() -> None:
    for state in ("loading", "ready"):
        decision = decide([Asked("a")], [host("h", model("a", state)), host("i", model("a"))])
        assert not wishes(decision)
        assert "h" in decision.waits["a"].note


def test_it_is_loaded_where_there_is_room() -> None:
    full = host("full", model("a"), model("b", "ready", 80))
    decision = decide([Asked("a")], [full, host("roomy", model("a"))])
    assert wishes(decision) == {"roomy": Wishes(("a",))}


def test_of_two_hosts_with_room_the_faster_one_is_chosen() -> None:
    hosts = [host("fast", model("a", load_ms=1_000)), host("a-slow", model("a", load_ms=9_000))]
    assert wishes(decide([Asked("a")], hosts)) == {"fast": Wishes(("a",))}


def test_a_model_with_a_twin_goes_first() -> None:
    hosts = [
        host("h", model("a"), model("old", "ready", 50), model("twin", "ready", 50)),
        host("i", model("twin", "ready", 100)),
    ]
    assert wishes(decide([Asked("a")], hosts)) == {"h": Wishes(("a",), ("twin",))}


def test_then_the_one_that_is_idle_for_longest() -> None:
    here = host("h", model("a"), model("old", "ready", 50), model("new", "ready", 50))
    there = host("i", model("a"), model("x", "ready", 90), idle_since={"x": 7})
    assert wishes(decide([Asked("a")], [here, there])) == {"h": Wishes(("a",), ("old",))}


def test_no_more_is_unloaded_than_is_needed() -> None:
    here = host("h", model("a", size=60), model("b", "ready", 10), model("c", "ready", 60), model("d", "ready", 30))
    assert wishes(decide([Asked("a")], [here])) == {"h": Wishes(("a",), ("c",))}


def test_what_is_in_use_pinned_held_or_asked_for_stays() -> None:
    hosts = [
        host("h", model("a"), model("b", "ready", 80), in_use=["b"]),
        host("i", model("a"), model("c", "ready", 80, pinned=True)),
        host("j", model("a"), model("d", "ready", 80, holders=["x"])),
        host("k", model("a"), model("e", "ready", 80)),
    ]
    decision = decide([Asked("a"), Asked("e", served=True)], hosts)
    assert not wishes(decision)
    assert "in use or held" in decision.waits["a"].note


def test_a_model_that_has_waited_long_has_its_turn() -> None:
    here = host("h", model("a"), model("b", "ready", 80), in_use=["b"])
    decision = decide([Asked("a", due=True)], [here])
    assert wishes(decision) == {"h": Wishes(("a",), ("b",))}
    assert decision.yields == {"h": ["b"]}
    # Also when requests for the other one wait by now.
    idle = host("h", model("a"), model("b", "ready", 80))
    assert wishes(decide([Asked("a", due=True), Asked("b", served=True)], [idle])) == {"h": Wishes(("a",), ("b",))}


def test_who_asked_first_comes_first() -> None:
    here = host("h", model("a", size=60), model("b", size=60))
    decision = decide([Asked("a", since=2), Asked("b", since=1)], [here])
    assert wishes(decision) == {"h": Wishes(("b",))}
    assert set(decision.waits) == {"a", "b"}
    assert decision.hopeless == []


def test_a_second_copy_gets_only_free_room() -> None:
    copy = host("h", model("a", "ready"), in_use=["a"])
    taken = host("i", model("a"), model("b", "ready", 80))
    assert not wishes(decide([Asked("a", served=True)], [copy, taken]))
    free = host("j", model("a"))
    decision = decide([Asked("a", served=True)], [copy, taken, free])
    assert wishes(decision) == {"j": Wishes(("a",))}
    assert decision.waits == {}
    # And none before models of which there is no copy.
    both = [copy, host("j", model("a", size=60), model("c", size=60))]
    assert wishes(decide([Asked("a", since=1, served=True), Asked("c", since=2)], both)) == {"j": Wishes(("c",))}


def test_a_wish_stays_where_it_was_unless_another_host_is_better() -> None:
    was = host("z", model("a"), model("b", "ready", 80), wished=frozenset({"a"}))
    equal = host("h", model("a"), model("c", "ready", 80), idle_since={"c": -1})
    assert wishes(decide([Asked("a")], [equal, was])) == {"z": Wishes(("a",), ("b",))}
    better = host("i", model("a"))
    assert wishes(decide([Asked("a")], [was, better])) == {"i": Wishes(("a",))}


def test_memory_that_is_about_to_be_free_counts() -> None:
    here = host("h", model("a"), model("b", "unloading", 80), model("c", "ready", 20))
    assert wishes(decide([Asked("a")], [here])) == {"h": Wishes(("a",))}


def test_helpers_have_a_share_of_the_memory() -> None:
    small = host("h", model("a", size=80), model("e", "ready", 30, kind="embed"), helpers=40)
    decision = decide([Asked("a")], [small])
    assert not wishes(decision)
    assert decision.hopeless == []
    large = host("h", model("a", size=80), model("e", "ready", 50, kind="embed"), helpers=40)
    assert wishes(decide([Asked("a")], [large])) == {"h": Wishes(("a",), ("e",))}
    other = host("h", model("r", size=80, kind="rerank"), model("e", "ready", 30, kind="embed"), helpers=40)
    assert wishes(decide([Asked("r")], [other])) == {"h": Wishes(("r",), ("e",))}


def test_a_device_that_a_host_does_not_have() -> None:
    gpu = m.HostedModel("a", needs={"ram": 10, "CUDA0": 50})
    without = HostView("h", {"a": gpu}, {"ram": m.Memory(100)})
    assert [asked.name for asked in decide([Asked("a")], [without]).hopeless] == ["a"]
    with_it = HostView("i", {"a": gpu}, {"ram": m.Memory(100), "CUDA0": m.Memory(60)})
    assert wishes(decide([Asked("a")], [without, with_it])) == {"i": Wishes(("a",))}


def test_the_number_of_loaded_models_is_limited() -> None:
    loaded = [model(f"x{number}", "ready", 0) for number in range(limits.LOADED_PER_HOST)]
    here = host("h", model("a"), *loaded)
    assert wishes(decide([Asked("a")], [here])) == {"h": Wishes(("a",), ("x0",))}


def test_what_failed_everywhere_is_hopeless_and_delays_no_other() -> None:
    here = host("h", model("a", "failed"), model("b"), failed=frozenset({"a"}))
    decision = decide([Asked("a", since=1), Asked("b", since=2)], [here])
    assert [asked.name for asked in decision.hopeless] == ["a"]
    assert wishes(decision) == {"h": Wishes(("b",))}
    there = host("i", model("a"))
    assert wishes(decide([Asked("a")], [here, there])) == {"i": Wishes(("a",))}


def test_a_key_has_nothing_unloaded_that_it_may_not_use() -> None:
    here = host("h", model("a"), model("b", "ready", 80))
    decision = decide([Asked("a", may_evict=lambda name: name == "a")], [here])
    assert not wishes(decision)
    assert decision.hopeless == []


def test_a_model_that_is_held_at_one_host() -> None:
    hosts = [host("h", model("a", "ready")), host("i", model("a"), model("b", "ready", 80))]
    asked = Asked("a", waiting=False, at="i")
    decision = decide([asked], hosts)
    assert wishes(decision) == {"i": Wishes(("a",), ("b",))}
    assert decision.places == {asked: "i"}
    anywhere = Asked("a", waiting=False)
    assert decide([anywhere], hosts).places == {anywhere: "h"}
