"""`python -m bench` runs what needs no model, `python -m bench NAME [options]` one of all."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("requests", "latency", "tokens", "keys", "overload", "kills", "thousand")
#: On a real model; `beside` also builds and installs other servers.
WITH_MODEL = ("adapters", "engine", "beside", "hops", "newcomer", "turns", "gateway")


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] not in NAMES + WITH_MODEL:
        print(f"usage: python -m bench [{'|'.join(NAMES + WITH_MODEL)}] [options]; without a name {len(NAMES)} run")
        return 2
    status = 0
    for name in arguments[:1] or NAMES:
        status = max(status, import_module(f"bench.{name}").main(arguments[1:]))
        print(flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
