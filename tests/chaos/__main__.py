"""Real brokers, workers and clients as processes; faults by a schedule that its seed decides; a history of all that
was seen; and a checker that reads it afterwards. If anything is wrong it tells the story of the first finding, and
the exit status is 1.

    python -m tests.chaos                                   a minute of everything
    python -m tests.chaos --faults kill=30,stop --seed 7    only these; so many a minute
    python -m tests.chaos --preset kills                    what is counted together, for as long as that takes
    python -m tests.chaos --list                            what there is
    python -m tests.chaos --preset links --plan             the schedule, without doing it

With `--totals FILE` the numbers of a run are added to a file, and `--sum FILE` prints them all together: runs of
different seeds may share a count. The history (kept with `--keep FOLDER`) is one line of JSON for each
observation; `--read FOLDER` judges it once more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.chaos import places, report
from tests.chaos.plan import PRESETS, TARGETS, USUAL, Plan, parse_faults, schedule
from tests.chaos.run import append_totals, disturb, examine

#: Of one sort of finding, as many are shown.
SHOWN = 20


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--preset", choices=PRESETS, help="settings that other options override")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--minutes", type=float, default=None, help="how long faults go on")
    made.add_argument("--faults", metavar="KIND[=PER-MINUTE],...", help="only these")
    made.add_argument("--without", metavar="KIND,...", default="", help="not these")
    for name in ("brokers", "gateways", "workers", "clients", "streams", "slots", "lease_ms", "stall_ms",
                 "drain_ms"):  # fmt: skip
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    made.add_argument("--tokens-per-s", type=float, default=None)
    made.add_argument("--engine", choices=("fake", "llama"), default=None)
    made.add_argument("--style", choices=("plain", "wander"), default=None)
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the history and the logs there")
    made.add_argument("--totals", type=Path, metavar="FILE", help="add this run's numbers to a file")
    made.add_argument("--sum", type=Path, metavar="FILE", help="run nothing; print all that is in such a file")
    made.add_argument("--read", type=Path, metavar="FOLDER", help="run nothing; judge a stored history")
    made.add_argument("--plan", action="store_true", help="run nothing; print the schedule")
    made.add_argument("--list", action="store_true", help="run nothing; print faults and presets")
    made.add_argument("--story", action="store_true", help="print the story also where nothing is wrong with an answer")
    return made


def plan_of(options: argparse.Namespace) -> Plan:
    chosen: dict[str, Any] = dict(PRESETS[options.preset or "mixed"])
    if options.preset is None:
        chosen["minutes"] = 1.0
    for name in ("seed", "minutes", "brokers", "gateways", "workers", "clients", "streams", "slots", "lease_ms",
                 "stall_ms", "drain_ms", "tokens_per_s", "engine", "style"):  # fmt: skip
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    if options.faults is not None:
        chosen["faults"] = parse_faults(options.faults)
    dropped = set(filter(None, options.without.split(",")))
    chosen["faults"] = {kind: rate for kind, rate in chosen["faults"].items() if kind not in dropped}
    return Plan(**chosen)


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        print("faults, how often a minute, whom: " + "; ".join(f"{k} {USUAL[k]:g} {TARGETS[k]}" for k in TARGETS))
        print("\n".join(f"--preset {name}: {what}" for name, what in PRESETS.items()))
        return 0
    if options.sum:
        print("\n".join(report.summary(report.add(report.read_totals(options.sum)))))
        return 0
    if options.read:
        plan = json.loads((options.read / "harness.jsonl").open().readline())
        names = Plan.__dataclass_fields__
        return conclude(Plan(**{name: plan[name] for name in names}), options.read, 0.0, options)
    plan = plan_of(options)
    if options.plan:
        print("\n".join(json.dumps(asdict(fault)) for fault in schedule(plan)))
        return 0
    if not places.is_inside():
        way = places.way_in()
        if way is not None:
            places.enter(way, arguments)
        print("chaos: this machine allows no network namespaces; links cannot be taken down", file=sys.stderr)
        faults = {kind: rate for kind, rate in plan.faults.items() if kind != "link"}
        plan = replace(plan, faults=faults, places="mixed" if plan.places == "far" else plan.places)
    else:
        places.settle()
    return carry_out(plan, options)


def carry_out(plan: Plan, options: argparse.Namespace) -> int:
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    asyncio.run(disturb(plan, folder))
    status = conclude(plan, folder, time.monotonic() - begun, options)
    if options.keep is None and status == 0:
        shutil.rmtree(folder)
    else:
        print(f"history and logs: {folder}")
    return status


def conclude(plan: Plan, folder: Path, seconds: float, options: argparse.Namespace) -> int:
    totals, wrong, growth, story = examine(plan, folder, seconds)
    print("\n".join(report.summary(totals)))
    if growth:
        print("growth:\n" + "\n".join(f"  {line}" for line in growth))
    if options.totals:
        append_totals(options.totals, totals)
    for finding in wrong[:SHOWN]:
        print(f"! {finding.sort}: {finding.text}" + (f" [{finding.id[:8]}]" if finding.id else ""))
    if story:
        print("\n".join(story))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
