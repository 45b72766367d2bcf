"""What a run found, as text and as numbers that can be added up over runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.chaos import checker, promises
from tests.chaos.checker import SORTS, Streams, Wrong
from tests.chaos.history import Line
from tests.chaos.http_check import ERROR, FINDINGS, WHOLE, HttpStreams
from tests.chaos.plan import Plan
from tests.chaos.promises import Times

#: A process has settled after this long; its growth is measured from then on, if it lives as long again.
WARM_MS = 20_000
STORY_LINES = 80
#: A silence of this length within an answer is part of its story.
GAP_MS = 500

Totals = dict[str, Any]


def totals(plan: Plan, streams: Streams, others: list[Wrong], times: Times, seconds: float) -> Totals:
    """Numbers and lists of numbers only, so that runs can be put together. `others`: findings about no answer."""
    sorts: dict[str, int] = defaultdict(int)
    for wrong in [*streams.wrong, *others]:
        sorts[wrong.sort] += 1
    moved, still = checker.stalls(streams)
    return {
        "runs": 1,
        "seconds": round(seconds),
        "streams": len(streams.requests),
        "tokens": streams.tokens,
        "orphaned": streams.orphaned,
        "foreseen errors": streams.foreseen,
        "forgotten results": streams.forgotten,
        **{f"poison {n} engines": streams.deaths.count(n) for n in sorted(set(streams.deaths))},
        **{f"fault {kind}": count for kind, count in times.faults.items()},
        **{f"skipped {kind}": count for kind, count in times.skipped.items()},
        **{f"variety {kind}": count for kind, count in times.varieties.items()},
        **{f"wrong {sort}": sorts.get(sort, 0) for sort in sorted({*SORTS, *sorts})},
        **{f"broker {name}": value for name, value in times.counters.items()},
        **{f"share {name}": value for name, value in times.shares.items()},
        **{f"ended {name}": value for name, value in checker.shares(streams).items()},
        **{f"ms {what}": values for what, values in times.measured.items()},
        "ms stall of a stream that moved": moved,
        "ms stall of one that did not": still,
        "ms silence when a broker ended": checker.silences(streams),
    }


def http_totals(found: HttpStreams) -> Totals:
    """Empty where there is no gateway."""
    if not found.outcomes:
        return {}
    outcomes = {outcome: found.outcomes[outcome] for outcome in (WHOLE, ERROR, *FINDINGS)}
    return {
        **{f"http {outcome}": count for outcome, count in outcomes.items()},
        **{f"retryable {code}": count for code, count in sorted(found.errors.items())},
        **{f"stream {kind}": count for kind, count in sorted(found.kinds.items())},
    }


def add(runs: Iterable[Totals]) -> Totals:
    total: Totals = {}
    for run in runs:
        for name, value in run.items():
            total[name] = total[name] + value if name in total else value
    return total


def quantile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0


#: Counters of the brokers that tell about faults; the others are in the totals.
FAULT_COUNTERS = ("moved", "adopted", "stale_chunks", "duplicate_chunks", "gaps", "repaired", "replays_served",
                  "engine_deaths", "suspected", "convicted", "ejected", "retries_denied", "workers_lost",
                  "clients_lost", "unknown_sessions", "refused", "failed", "attached")  # fmt: skip


def summary(total: Totals) -> list[str]:
    """The report."""
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in total.items():
        group, _, rest = name.partition(" ")
        groups[group if rest else ""][rest or group] = value
    lines = [f"{total['runs']} run(s), {total['seconds']} s: {total['streams']} requests, {total['tokens']} tokens"]
    lines.append("faults: " + (_pairs(groups["fault"]) or "none"))
    if groups["variety"]:
        lines.append("  of these " + _pairs(groups["variety"]))
    if groups["skipped"]:
        lines.append("  skipped, because the victim was not there: " + _pairs(groups["skipped"]))
    lines.append("wrong: " + _pairs(groups["wrong"]))
    allowed = {name: total[name] for name in ("orphaned", "foreseen errors", "forgotten results") if total[name]}
    if allowed:
        lines.append("  allowed: " + _pairs(allowed))
    if groups["poison"]:
        lines.append("  requests that killed so many engines: " + _pairs(groups["poison"]))
    if groups["http"]:
        lines.append(f"over HTTP: {sum(groups['http'].values())} streams: " + _pairs(groups["http"]))
        lines.append("  errors, named as retryable: " + (_pairs(groups["retryable"]) or "none"))
        lines.append("  " + _pairs(groups["stream"]))
    if groups["refused"]:
        lines.append("  refused with a cause: " + _pairs(groups["refused"]))
    if groups["resident"]:
        lines.append("most MiB of models resident at a time, and looks at it: " + _pairs(groups["resident"]))
    counters = {name: groups["broker"][name] for name in FAULT_COUNTERS if name in groups["broker"]}
    lines.append("brokers: " + _pairs(counters))
    if len(groups["share"]) > 1:
        lines.append("  dispatched by each: " + _pairs(groups["share"]))
    if len(groups["ended"]) > 1:
        counts = list(groups["ended"].values())
        spread = f"most to least {max(counts) / min(counts):.2f}"
        lines.append(f"  answers by worker: {_pairs(groups['ended'])} ({spread})")
    for what, values in sorted(groups["ms"].items()):
        if values:
            line = f"{quantile(values, 0.5)} ms, p99 {quantile(values, 0.99)} ms, most {max(values)} ms"
            lines.append(f"{what}: {len(values)} times, median {line}")
    return lines


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# --- growth ------------------------------------------------------------------------------------------


def slopes(lines: Iterable[Line]) -> list[str]:
    """Memory and descriptors of each process that lived long enough: where it began, and how it grew."""
    lives: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in lines:
        if line["e"] == "size":
            lives[line["whom"], line["pid"]].append(line)
    longest: dict[str, list[Line]] = {}
    for (whom, _), life in lives.items():
        if len(life) > len(longest.get(whom, [])):
            longest[whom] = life
    found = []
    for whom, life in sorted(longest.items()):
        late = [line for line in life if line["t"] - life[0]["t"] >= WARM_MS]
        if len(late) < 3 or late[-1]["t"] - late[0]["t"] < WARM_MS:
            continue
        rss, fds = (slope([(line["t"], line[what]) for line in late]) * 60_000 for what in ("rss", "fds"))
        found.append(f"{whom}: {late[0]['rss'] // 1024} KiB {rss / 1024:+.0f} KiB/min, {late[0]['fds']} descriptors "
                     f"{fds:+.2f}/min, in {(late[-1]['t'] - late[0]['t']) // 1000} s")  # fmt: skip
    return found


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares."""
    count = len(points)
    mid_x, mid_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mid_x) ** 2 for x, _ in points)
    return sum((x - mid_x) * (y - mid_y) for x, y in points) / spread if spread else 0.0


# --- stories -----------------------------------------------------------------------------------------


def story(wrong: Wrong, lines: list[Line], whys: dict[str, list[dict[str, Any]]]) -> list[str]:
    """All that is known about what went wrong first: its client, the faults of that time, the broker's own words."""
    printed = [f"{wrong.sort}: {wrong.text}"]
    if wrong.id:
        mine = [line for line in lines if line.get("id") == wrong.id and line["e"] != "why"]
        begin, end = mine[0]["t"] if mine else wrong.at_ms, max([wrong.at_ms, *(line["t"] for line in mine)])
        printed[0] += f" [request {wrong.id[:8]}]"
    else:
        mine, begin, end = [], wrong.at_ms - 5_000, wrong.at_ms + 8_000
    around = [line for line in lines if begin - 1_000 <= line["t"] <= end + 1_000
              and line["e"] in ("fault", "healed", "gone", "skipped", "event", "begun", "ended", "back")]  # fmt: skip
    for line in sorted([*_shortened(mine), *around], key=lambda line: line["t"])[:STORY_LINES]:
        printed.append(f"  {line['t'] - begin:>7} ms  {line['who']:<8} {line['e']:<8} {_facts(line)}")
    for broker, entries in whys.items():
        printed.append(f"  what {broker} knows of it:")
        printed += [f"    {entry['at_ms']:>7} ms  {entry['what']}: {entry['detail']}" for entry in entries]
    return printed


def _shortened(lines: list[Line]) -> list[Line]:
    """Chunks that go on where the last one ended, by the same dispatch, say nothing new."""
    shown: list[Line] = []
    before: Line | None = None
    for line in lines:
        usual = (
            line["e"] == "chunk"
            and before is not None
            and before["e"] == "chunk"
            and line["i"] == before["i"] + len(before["ids"])
            and {dispatch for dispatch, _ in line["d"]} == {dispatch for dispatch, _ in before["d"]}
            and line["t"] - before["t"] < GAP_MS
        )
        if not usual:
            if before is not None and before not in shown:
                shown.append(before)
            shown.append(line)
        before = line
    return shown


def _facts(line: Line) -> str:
    facts = {name: value for name, value in line.items() if name not in ("t", "who", "e", "id")}
    if line["e"] == "chunk":
        made = ", ".join(f"{count} by {dispatch}" for dispatch, count in line["d"])
        return f"token {line['i']} and on: {made or 'none'}"
    return json.dumps(facts)[:220]


def read_totals(path: Path) -> list[Totals]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


__all__ = ["add", "promises", "slopes", "story", "summary", "totals"]
