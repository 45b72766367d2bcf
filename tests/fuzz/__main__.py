"""Hostile input by the million: `python -m tests.fuzz COMMAND --help`.

decoders    mutated messages through every decoder and every core
coverage    the same targets, guided by what they cover (needs atheris: pip install -e '.[fuzz]')
live        mutated messages through a live broker, worker and client
sessions    hostile connections to a live broker
bombs       what only a limit of memory and a restart contain
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from tests.fuzz import bombs, decoders, live, sessions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("decoders")
    command.add_argument("--count", type=int, default=10_000_000, help="messages for all targets together")
    command.add_argument("--each", type=int, default=0, help="messages for each target, in place of --count")
    command.add_argument("--target", action="append", default=[], choices=decoders.names(), metavar="NAME")
    command.add_argument("--seed", default="1")
    command.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument("--minutes", type=float, default=0)
    command = commands.add_parser("coverage")
    command.add_argument("--target", required=True)
    command.add_argument("--seconds", type=int, default=60)
    command.add_argument("--keep", action="store_true", help="put what was new into the corpus")
    command = commands.add_parser("live")
    command.add_argument("--count", type=int, default=1_000_000)
    command.add_argument("--role", action="append", default=[], choices=list(live.ROLES))
    command.add_argument("--seed", default="1")
    command = commands.add_parser("sessions")
    command.add_argument("--count", type=int, default=10_000)
    command.add_argument("--idle", type=int, default=1_000)
    command.add_argument("--seed", default="1")
    command = commands.add_parser("bombs")
    command.add_argument("--limit-mib", type=int, default=1_024, help="RLIMIT_AS of the broker; 0: none")
    command.add_argument("--seconds", type=float, default=bombs.BOMB_S)
    command.add_argument("--keys", action="store_true", help="the broker has keys, and members have one")
    command.add_argument("--bomb", action="append", default=[], choices=list(bombs.BOMBS), metavar="NAME")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.disable(logging.WARNING)  # what goes wrong here is meant to
    match options.command:
        case "decoders":
            chosen = options.target or decoders.names()
            each = options.each or -(-options.count // len(chosen))
            return decoders.main(chosen, each, options.seed, options.jobs, options.minutes)
        case "coverage":
            from tests.fuzz import coverage

            return coverage.main(options.target, options.seconds, keep=options.keep)
        case "live":
            return live.main(options.role or list(live.ROLES), options.count, options.seed)
        case "sessions":
            return sessions.main(options.count, options.idle, options.seed)
        case _:
            return bombs.main(options.bomb, options.limit_mib, options.seconds, keyed=options.keys)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
