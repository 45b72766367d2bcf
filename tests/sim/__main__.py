"""`python -m tests.sim --seeds 1000`: run the simulator, print what it found, exit 1 if anything is wrong."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

from tests.sim import mutants


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--check-every", type=int, default=1, help="check the broker's invariants after every nth event"
    )
    parser.add_argument("--brokers", type=int, default=0, help="so many in each run, and not as the seed says")
    parser.add_argument("--hosts", action="store_true", help="worlds with hosts, which load models on demand")
    parser.add_argument("--without", metavar="GUARD", help="take one guard out and stop at the first seed that notices")
    parser.add_argument("--guards", action="store_true", help="list the guards")
    parser.add_argument("--story", action="store_true", help="print more stories than the first three")
    args = parser.parse_args()
    if args.guards:
        print("\n".join(mutants.GUARDS))
        return 0
    if args.without:
        mutants.install(args.without)
        args.hosts = args.hosts or mutants.GUARDS[args.without].hosts
    seeds = range(args.first, args.first + args.seeds)
    return _run(seeds, args)


def _reports(seeds: Iterable[int], jobs: int, check_every: int, brokers: int, hosts: bool) -> Iterator[object]:
    from tests.sim.runner import run_seed

    run = partial(run_seed, hosts=hosts)
    work = ((seed, check_every, brokers) for seed in seeds)
    if jobs == 1:
        yield from (run(item) for item in work)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, work, chunksize=20)


def _run(seeds: range, args: argparse.Namespace) -> int:
    from tests.sim.runner import Tally

    started = time.perf_counter()
    tally = Tally()
    for report in _reports(seeds, args.jobs, args.check_every, args.brokers, args.hosts):
        tally.add(report)  # type: ignore[arg-type]
        if args.without and tally.bad:
            break
        if tally.runs % 5_000 == 0:
            print(f"{tally.runs} runs, {len(tally.bad)} bad", file=sys.stderr, flush=True)
    for bad in islice(tally.bad, 20 if args.story else 3):
        print(f"seed {bad.seed}: " + "; ".join(bad.wrong[:5]))
        print("\n".join("    " + line for line in bad.story[:60]))
    print(tally.summary(time.perf_counter() - started))
    if args.without:
        caught = f"caught by seed {tally.bad[0].seed}" if tally.bad else "NOT CAUGHT"
        print(f"without {args.without}: {caught}")
        return 0 if tally.bad else 1
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
