"""`python -m bench` runs everything, `python -m bench NAME [options]` one of it."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("requests", "latency", "tokens", "overload", "kills")


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] not in NAMES:
        print(f"usage: python -m bench [{'|'.join(NAMES)}] [options]; without a name everything runs")
        return 2
    status = 0
    for name in arguments[:1] or NAMES:
        status = max(status, import_module(f"bench.{name}").main(arguments[1:]))
        print(flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
