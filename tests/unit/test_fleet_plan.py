"""Plans: what there is becomes what is wanted, in steps that may be repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.fleet.decide.plan import Placement, Plan, StepKind, Wanted, imagine, make, size
from llambo.fleet.model import Fleet, HostFacts, Node, NodeClass, NodeState, World

GIB, MIB = 1 << 30, 1 << 20
BOX, SHED = HostFacts(8 * GIB, 4), HostFacts(2 * GIB, 8)


def a_class(name: str = "tiny", **more: Any) -> NodeClass:
    fields: dict[str, Any] = {"memory_bytes": 600 * MIB, "cores": 0.5, "hosts": ("box", "shed"), "max": 100} | more
    return NodeClass(name=name, **fields)


def a_fleet(*classes: NodeClass, broker: NodeClass | None = None) -> Fleet:
    return Fleet(classes={one.name: one for one in classes}, broker=broker)


def a_node(name: str, kept: NodeClass, host: str = "box", **more: Any) -> Node:
    fields: dict[str, Any] = {
        "fingerprint": kept.fingerprint(), "memory_bytes": kept.memory_bytes, "cores": kept.cores, "slots": kept.slots,
    }  # fmt: skip
    return Node(name=name, node_class=kept.name, host=host, **fields | more)


def a_world(*nodes: Node, **hosts: HostFacts) -> World:
    return World(nodes, hosts or {"box": BOX, "shed": SHED})


def steps(plan: Plan) -> list[tuple[str, str, str]]:
    return [(step.kind.value, step.name, step.host) for step in plan.steps]


def counts(**wanted: int) -> Wanted:
    return Wanted(counts=wanted)


# --- more ----------------------------------------------------------------------------------------------


def test_from_nothing_the_broker_is_first_and_the_emptier_host_takes_more() -> None:
    tiny, broker = a_class(min=3), NodeClass(name="broker", memory_bytes=256 * MIB, hosts=("box",), min=1, cores=0)
    fleet = a_fleet(tiny, broker=broker)
    plan = make(fleet, a_world())
    assert steps(plan) == [
        ("spawn", "broker", "box"), ("spawn", "tiny-0001", "box"), ("spawn", "tiny-0002", "box"),
        ("spawn", "tiny-0003", "shed"),
    ]  # fmt: skip
    assert plan.steps[1].fingerprint == tiny.fingerprint() and plan.steps[1].why == "number 1 of 3"


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    tiny = a_class(min=3, memory_bytes=3000 * MIB, cores=2)
    plan = make(a_fleet(tiny), a_world())
    assert len(plan.steps) == 2
    (refused,) = plan.refusals
    assert (refused.node_class, refused.count) == ("tiny", 1)
    assert refused.why == "tiny needs 2.9 GiB and 2 cores; box has 2.1 GiB left of 8 GiB; shed has 2 GiB left of 2 GiB"


def test_a_machine_with_few_cores_is_told_that_workers_may_share_them() -> None:
    spec = a_class(cores=1.0, hosts=("box",))
    room = Placement({"box": HostFacts(20 * GIB, 1.0)})
    assert room.place(spec, 2, {}, {}) == ["box"]
    assert room.why_not(spec, {}, {}).endswith("; if workers may share cores, set cores = 0.5 in [classes.tiny]")


def test_cores_are_refused_as_memory_is_and_a_host_may_be_away() -> None:
    tiny = a_class(min=9, cores=3)
    plan = make(a_fleet(tiny), a_world(box=BOX, shed=replace(SHED, away="ssh: no route to host")))
    assert steps(plan) == [("spawn", "tiny-0001", "box")]
    assert plan.refusals[0].count == 8
    assert plan.refusals[0].why == (
        "tiny needs 600 MiB and 3 cores; box has 1 cores left of 4; shed is away: ssh: no route to host"
    )


def test_the_least_of_every_class_comes_before_more_of_any() -> None:
    first, second = a_class("first", min=1, cores=1), a_class("second", min=2, cores=1)
    plan = make(a_fleet(first, second), a_world(box=BOX), counts(first=9, second=2))
    assert [step.node_class for step in plan.steps] == ["first", "second", "second", "first"]
    assert plan.refusals[0].count == 7


def test_one_that_drains_is_taken_back_before_another_is_begun() -> None:
    tiny = a_class()
    nodes = [a_node(f"tiny-000{number}", tiny, state=NodeState.DRAINING, busy=number) for number in (1, 2, 3)]
    plan = make(a_fleet(tiny), a_world(*nodes), counts(tiny=2))
    assert steps(plan) == [
        ("resume", "tiny-0003", "box"),
        ("resume", "tiny-0002", "box"),
        ("retire", "tiny-0001", "box"),
    ]


def test_a_name_is_used_once() -> None:
    tiny = a_class()
    nodes = [a_node("tiny-0001", tiny), a_node("tiny-0003", tiny, state=NodeState.DRAINING, fingerprint="old")]
    plan = make(a_fleet(tiny), a_world(*nodes), counts(tiny=3))
    assert [step.name for step in plan.steps if step.kind is StepKind.SPAWN] == ["tiny-0002", "tiny-0004"]


# --- fewer ---------------------------------------------------------------------------------------------


def test_those_go_that_are_missed_least() -> None:
    tiny = a_class()
    nodes = [
        a_node("tiny-0001", tiny, busy=4),
        a_node("tiny-0002", tiny, busy=1),
        a_node("tiny-0003", tiny, busy=0, begun_ms=1),
        a_node("tiny-0004", tiny, busy=0, begun_ms=9),
        a_node("tiny-0005", tiny, state=NodeState.STARTING),
        a_node("tiny-0006", tiny, busy=4, fingerprint="old"),
    ]
    names = ["tiny-0006", "tiny-0005", "tiny-0004", "tiny-0003", "tiny-0002", "tiny-0001"]
    for count in range(5, -1, -1):
        plan = make(a_fleet(tiny), a_world(*nodes), counts(tiny=count))
        assert [step.name for step in plan.steps if step.kind is StepKind.RETIRE] == names[: 6 - count]
    why = {step.name: step.why for step in plan.steps}
    assert why["tiny-0002"] == "6 tiny, 0 wanted; it is the idlest, 1 of 1 slots busy"
    assert why["tiny-0005"] == "6 tiny, 0 wanted; it is not ready yet"


def test_what_the_file_knows_no_more_goes() -> None:
    tiny, old = a_class(hosts=("box",)), a_class("old")
    nodes = [a_node("old-0001", old), a_node("tiny-0001", tiny, host="shed"), a_node("tiny-0002", tiny)]
    plan = make(a_fleet(tiny), a_world(*nodes))
    assert steps(plan) == [
        ("spawn", "tiny-0003", "box"), ("retire", "old-0001", "box"), ("retire", "tiny-0001", "shed"),
    ]  # fmt: skip
    assert [step.why for step in plan.steps[1:]] == [
        "there is no class old in the file any more", "tiny is not for shed any more",
    ]  # fmt: skip


def test_one_that_keeps_failing_makes_room_at_once_and_says_why() -> None:
    tiny = a_class(memory_bytes=6 * GIB, hosts=("box",))
    failed = a_node("tiny-0001", tiny, state=NodeState.FAILED, note="killed by SIGSEGV")
    plan = make(a_fleet(tiny), a_world(failed), counts(tiny=1))
    assert steps(plan) == [("retire", "tiny-0001", "box"), ("spawn", "tiny-0002", "box")]
    assert plan.steps[0].why == "it keeps failing: killed by SIGSEGV"


def test_nothing_is_done_on_a_host_that_is_away() -> None:
    tiny = a_class()
    away = replace(BOX, away="no route")
    plan = make(a_fleet(tiny), a_world(a_node("tiny-0001", tiny), box=away), counts(tiny=0))
    assert not plan and plan.refusals[0].why.startswith("tiny-0001 cannot be ended, box is away: no route; 1 tiny")


# --- others --------------------------------------------------------------------------------------------


def test_only_those_are_replaced_whose_settings_are_others() -> None:
    tiny, medium = a_class(), a_class("medium")
    nodes = [a_node("tiny-0001", tiny, fingerprint="old"), a_node("tiny-0002", tiny), a_node("medium-0001", medium)]
    plan = make(a_fleet(tiny, medium), a_world(*nodes))
    assert steps(plan) == [("replace", "tiny-0001", "box")]
    assert plan.steps[0].fingerprint == tiny.fingerprint()
    again = make(a_fleet(tiny, medium), a_world(*nodes), Wanted(fingerprints={"medium": "v2", "tiny": "old"}))
    assert steps(again) == [("replace", "tiny-0002", "box"), ("replace", "medium-0001", "box")]


def test_one_that_would_not_fit_any_more_keeps_its_old_settings() -> None:
    before, tiny = a_class(cores=1), a_class(cores=3)
    nodes = [a_node("tiny-0001", before), a_node("tiny-0002", before)]
    plan = make(a_fleet(tiny), a_world(*nodes, box=BOX))
    assert steps(plan) == [("replace", "tiny-0001", "box")]
    assert plan.refusals[0].why == (
        "tiny-0002 keeps its old settings: tiny needs 600 MiB and 3 cores; box has 0 cores left of 4"
    )


def test_what_has_room_only_after_others_have_gone_comes_last() -> None:
    old, tiny = a_class("old", cores=4, hosts=("box",)), a_class(cores=4, min=1, hosts=("box",))
    plan = make(a_fleet(tiny), a_world(a_node("old-0001", old)))
    assert steps(plan) == [("retire", "old-0001", "box"), ("spawn", "tiny-0001", "box")]


def test_where_it_fails_none_is_begun_and_later_one_is_tried() -> None:
    tiny = a_class(hosts=("box",))
    barred = Wanted(counts={"tiny": 5}, blocked={("tiny", "box"): "3 have failed in a row, again in 4 s"})
    plan = make(a_fleet(tiny), a_world(), barred)
    assert not plan and plan.refusals[0].why.endswith("; box: 3 have failed in a row, again in 4 s")
    probed = Wanted(counts={"tiny": 5}, probing={("tiny", "box"): "3 have failed in a row"})
    plan = make(a_fleet(tiny), a_world(), probed)
    assert steps(plan) == [("spawn", "tiny-0001", "box")] and plan.refusals[0].count == 4
    starting = a_node("tiny-0001", tiny, state=NodeState.STARTING)
    plan = make(a_fleet(tiny), a_world(starting), probed)
    assert not plan and "tiny-0001 is tried first: 3 have failed in a row" in plan.refusals[0].why


# --- always --------------------------------------------------------------------------------------------

HOSTS = ("box", "shed", "attic")
CLASSES = st.builds(
    lambda name, memory, cores, least, more, hosts, slots: NodeClass(
        name=name, memory_bytes=memory * 256 * MIB, cores=cores / 4, min=least, max=least + more, hosts=tuple(hosts),
        slots=slots,
    ),
    st.sampled_from(["tiny", "medium", "large"]), st.integers(1, 8), st.integers(0, 8), st.integers(0, 4),
    st.integers(0, 6), st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True), st.integers(1, 4),
)  # fmt: skip
FACTS = st.builds(
    HostFacts, st.integers(0, 24).map(lambda n: n * 256 * MIB), st.integers(0, 8).map(float),
    st.sampled_from(["", "", "", "no route"]),
)  # fmt: skip


@st.composite
def cases(draw: Any) -> tuple[Fleet, World, Wanted]:
    classes = {one.name: one for one in draw(st.lists(CLASSES, min_size=1, max_size=3))}
    fleet = Fleet(classes=classes)
    hosts = {name: draw(FACTS) for name in HOSTS}
    nodes = []
    for number in range(draw(st.integers(0, 10))):
        name = draw(st.sampled_from(["tiny", "medium", "large", "gone"]))
        kept = classes.get(name) or NodeClass(name=name, memory_bytes=512 * MIB, hosts=HOSTS)
        mark, memory = draw(st.sampled_from([kept.fingerprint(), "old"])), draw(st.sampled_from([1, 2]))
        node = Node(
            name=f"{name}-{number:04}", node_class=name, host=draw(st.sampled_from(HOSTS)), fingerprint=mark,
            state=draw(st.sampled_from(NodeState)), busy=draw(st.integers(0, 4)),
            memory_bytes=kept.memory_bytes // memory, cores=draw(st.sampled_from([kept.cores, 1.0])),
        )  # fmt: skip
        nodes.append(node)
    wanted = {name: draw(st.integers(one.min, one.max)) for name, one in classes.items() if draw(st.booleans())}
    barred = {(name, host): "failed" for name in classes for host in HOSTS if draw(st.integers(0, 9)) == 0}
    return fleet, World(tuple(nodes), hosts), Wanted(counts=wanted, blocked=barred)


STEADY = settings(derandomize=True, database=None, max_examples=250)


@STEADY
@given(cases())
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(case: tuple[Fleet, World, Wanted]) -> None:
    fleet, world, wanted = case
    plan = make(fleet, world, wanted)
    after = imagine(world, plan.steps, fleet)
    again = make(fleet, after, wanted)
    assert not again, f"{plan}\n{again}"
    kept = {name: sum(one.counts for one in after.of(name)) for name in fleet.classes}
    refused = {name: sum(one.count for one in again.refusals if one.node_class == name) for name in kept}
    for name, count in wanted.counts.items():
        assert kept[name] == count or refused[name], (
            f"{name}: {kept[name]}, {count} wanted, and nothing is reported of it"
        )


@STEADY
@given(cases(), st.integers(0, 30))
def test_a_plan_that_was_broken_off_is_gone_on_with(case: tuple[Fleet, World, Wanted], done: int) -> None:
    fleet, world, wanted = case
    part = imagine(world, make(fleet, world, wanted).steps[:done], fleet)
    end = imagine(part, make(fleet, part, wanted).steps, fleet)
    assert not make(fleet, end, wanted)


@STEADY
@given(cases())
def test_no_step_asks_for_more_than_a_host_has(case: tuple[Fleet, World, Wanted]) -> None:
    fleet, world, wanted = case
    for step in make(fleet, world, wanted).steps:
        before = world
        world = imagine(world, [step], fleet)
        if step.kind in (StepKind.SPAWN, StepKind.REPLACE):
            assert step.host in fleet.classes[step.node_class].hosts and not world.hosts[step.host].away
            assert (step.node_class, step.host) not in wanted.blocked or step.kind is StepKind.REPLACE
            needed, facts = fleet.classes[step.node_class], world.hosts[step.host]
            memory, cores = taken(world, step.host)
            assert memory <= facts.memory_bytes, step
            # A node that needs no cores may go to a host whose cores are all taken, or more than that.
            assert cores <= (facts.cores if needed.cores else taken(before, step.host)[1]) + 1e-6, step


def taken(world: World, host: str) -> tuple[int, float]:
    here = [node for node in world.nodes if node.host == host]
    return sum(node.memory_bytes for node in here), sum(node.cores for node in here)


@STEADY
@given(cases())
def test_how_many_fit_is_how_many_are_placed(case: tuple[Fleet, World, Wanted]) -> None:
    fleet, world, _ = case
    for kept in fleet.classes.values():
        room = Placement(world.hosts, world.nodes)
        fit = room.fit(kept, 1_000)
        assert len(room.place(kept, 1_000, {}, {})) == fit
        assert room.fit(kept, 1_000) == 0


def test_sizes_are_printed_with_units() -> None:
    assert [size(count) for count in (0, 4096, 412 * MIB, 8 * GIB, 2355 * MIB)] == [
        "0 KiB", "4 KiB", "412 MiB", "8 GiB", "2.3 GiB",
    ]  # fmt: skip
