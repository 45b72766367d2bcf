"""Every promise of time, held against what the history says. Pure, like the checker beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.chaos.checker import Wrong
from tests.chaos.history import Line

#: What a machine that is full of processes may add to each time, before the promise counts as broken.
SLACK_MS = 700
#: A worker is ready again so long after its link is whole, and so long after its broker is back.
HEALED_MS = 5_000
BACK_MS = 3_000
#: Faults after which a worker has to be back among the ready within `HEALED_MS`.
HEALING = {"stop", "link", "cut", "hold", "halfopen", "delay", "throttle"}
#: Faults that have to be noticed by the lease, if they last longer than it.
SILENT = {"stop", "link"}

LATE = "late"


@dataclass
class Times:
    """What was measured, in ms, by what; and what was too late."""

    measured: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    skipped: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: list[Wrong] = field(default_factory=list)
    #: Counters of the brokers, all their lives added up.
    counters: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    #: Requests dispatched, by broker.
    shares: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    #: Which varieties there were of a fault.
    varieties: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def judge(lines: Iterable[Line], *, lease_ms: int, stall_ms: int) -> Times:
    by = defaultdict(list)
    for line in lines:
        by[line["e"]].append(line)
    for happened in by.values():
        happened.sort(key=lambda line: line["t"])
    times = Times()
    _count(times, by["fault"], by["skipped"])
    _detected(times, by, lease_ms)
    _healed(times, by)
    _hung(times, by, stall_ms)
    _came_back(times, by)
    _who_is_there(times, by["workers"])
    _left_over(times, by)
    _counters(times, by["status"])
    return times


def _count(times: Times, faults: list[Line], skipped: list[Line]) -> None:
    dropped = {line["n"] for line in skipped}
    for fault in faults:
        if fault["n"] not in dropped:
            times.faults[fault["kind"]] += 1
            if fault.get("what"):
                times.varieties[f"{fault['kind']} {fault['what']}"] += 1
    for line in skipped:
        times.skipped[line["kind"]] += 1


def _until_next(fault: Line, faults: list[Line]) -> int:
    """When the next fault of its victim, or of the broker that would have to notice, begins."""
    later = [
        other["t"]
        for other in faults
        if other["t"] > fault["t"] and (other["whom"] == fault["whom"] or other["kind"] in ("broker", "rolling"))
    ]
    return min(later, default=2**62)


def _of(lines: list[Line], number: int) -> Line | None:
    return next((line for line in lines if line["n"] == number), None)


def _detected(times: Times, by: dict[str, list[Line]], lease_ms: int) -> None:
    """A worker that says nothing any more is given up by the end of its lease."""
    for fault in by["fault"]:
        if fault["kind"] not in SILENT or fault["length"] < lease_ms + SLACK_MS:
            continue
        limit = fault["t"] + lease_ms + SLACK_MS
        if _until_next(fault, by["fault"]) < limit or _disturbed(by, fault["t"], limit):
            continue
        lost = [line["t"] for line in by["event"] if line["kind"] == "worker lost"
                and line["text"].startswith(f"{fault['whom']}:") and fault["t"] <= line["t"]]  # fmt: skip
        if lost and lost[0] <= limit:
            times.measured[f"{fault['kind']} noticed"].append(lost[0] - fault["t"])
        else:
            text = f"{fault['kind']} of {fault['whom']} was not noticed within {lease_ms} + {SLACK_MS} ms"
            times.wrong.append(Wrong(LATE, text, fault["t"]))


def _disturbed(by: dict[str, list[Line]], begin: int, end: int) -> bool:
    """A broker that was suspended extends all leases by that time, and one that came back knows no worker yet."""
    stood = any(line["kind"] == "stood still" and begin <= line["t"] <= end + 2_000 for line in by["event"])
    return stood or any(
        fault["kind"] == "broker" and begin - 3_000 <= fault["t"] <= end for fault in by["fault"]
    )  # fmt: skip


def _healed(times: Times, by: dict[str, list[Line]]) -> None:
    """After the fault is over the worker is among the ready within five seconds, as each broker sees it."""
    for healed in by["healed"]:
        fault = _of(by["fault"], healed["n"])
        if fault is None or fault["kind"] not in HEALING:
            continue
        over = healed["t"]
        limit = over + HEALED_MS + SLACK_MS
        if _until_next(fault, by["fault"]) < limit or _disturbed(by, over, limit):
            continue
        seen = defaultdict(list)
        for line in by["workers"]:
            if over <= line["t"]:
                seen[line["broker"]].append(line)
        for broker, views in seen.items():
            ready = [view["t"] for view in views if fault["whom"] in view["ready"]]
            if ready and ready[0] <= limit:
                times.measured[f"{fault['kind']} healed"].append(ready[0] - over)
            elif views[-1]["t"] > limit:
                text = f"{fault['whom']} is not back at {broker} {HEALED_MS} ms after {fault['kind']} was over"
                times.wrong.append(Wrong(LATE, text, over))


def _hung(times: Times, by: dict[str, list[Line]], stall_ms: int) -> None:
    """The agent kills an engine that makes no progress; an idle one owes none."""
    for fault in by["fault"]:
        if fault["kind"] != "hang" or not fault.get("busy") or _of(by["skipped"], fault["n"]):
            continue
        gone = _of(by["gone"], fault["n"])
        if gone is None or gone["t"] - fault["t"] > stall_ms + SLACK_MS:
            text = f"the engine of {fault['whom']} hung and was not killed within {stall_ms} + {SLACK_MS} ms"
            times.wrong.append(Wrong(LATE, text, fault["t"]))
        else:
            times.measured["hang noticed"].append(gone["t"] - fault["t"])


def _came_back(times: Times, by: dict[str, list[Line]]) -> None:
    for line in by["back"]:
        if line["ms"] is None or line["ms"] > BACK_MS + SLACK_MS:
            missing = ", ".join(line["missing"])
            text = f"{missing or 'a worker'} not at {line['broker']} {BACK_MS} ms after it was back"
            times.wrong.append(Wrong(LATE, text, line["t"]))
        else:
            times.measured["workers back"].append(line["ms"])
    for line in by["emptied"]:
        times.measured[f"{line['how']} emptied"].append(line["ms"])
        if line["code"]:
            text = f"{line['whom']} ended with status {line['code']} when it was stopped"
            times.wrong.append(Wrong(LATE, text, line["t"]))


def _who_is_there(times: Times, views: list[Line]) -> None:
    for view in views:
        names = view["names"]
        if len(names) != len(set(names)):
            times.wrong.append(Wrong("double", f"{view['broker']} lists a worker twice: {names}", view["t"]))


def _left_over(times: Times, by: dict[str, list[Line]]) -> None:
    """At the end no request waits or runs, and no process is left."""
    for line in by["last"]:
        for what in ("running", "waiting", "busy"):
            if line[what]:
                times.wrong.append(
                    Wrong("left over", f"{line['broker']}: {what} is {line[what]} at the end", line["t"])
                )
        for text in line.get("left", ()):
            times.wrong.append(Wrong("left over", f"{line['broker']}: {text}", line["t"]))
        if line["ready"] < line["workers_wanted"]:
            text = f"{line['broker']}: {line['ready']} of {line['workers_wanted']} workers are ready at the end"
            times.wrong.append(Wrong("left over", text, line["t"]))
    for line in by["orphan"]:
        times.wrong.append(
            Wrong("left over", f"process {line['pid']} of {line['whom']} outlived its parent", line["t"])
        )
    for line in by["broken"]:
        times.wrong.append(Wrong("broken", f"{line['whom']}: {line['text']}", line["t"]))


def _counters(times: Times, statuses: list[Line]) -> None:
    """Each life of a broker counts from zero; within one the numbers only grow."""
    lives: dict[tuple[str, int], dict[str, int]] = {}
    for line in statuses:
        lives[line["broker"], line["pid"]] = line["counters"]
    for (broker, _), counters in lives.items():
        times.shares[broker] += counters.get("dispatched", 0)
        for name, value in counters.items():
            times.counters[name] += value
