"""A broker or a worker from a configuration: `python -m llambo.testing.node broker|worker JSON [PARENT]`.

It writes one line when it is ready: its port, or "ready". With PARENT it ends when that process ends.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from llambo.mesh.service.host import end_with_parent


class BrokerOptions(msgspec.Struct):
    config: msgspec.Raw
    host: str = "127.0.0.1"
    port: int = 0
    token_hwm: int = 0
    #: The folder of the keyring; without one every peer is accepted.
    keys: str = ""


def run_broker_node(text: str) -> int:
    from llambo.broker import server  # a worker need not load the broker
    from llambo.broker.config import BrokerConfig
    from llambo.mesh.link import sockets
    from llambo.mesh.security.keyring import Folder

    options = msgspec.json.decode(text, type=BrokerOptions)
    return server.run_broker(
        msgspec.json.decode(options.config, type=BrokerConfig),
        options.host,
        options.port,
        lambda port: print(port, flush=True),
        token_hwm=options.token_hwm or sockets.TOKEN_HWM,
        keys=Folder(Path(options.keys)) if options.keys else None,
    )


def run_worker_node(text: str) -> int:
    from llambo.worker.agent.agent import run_worker  # a broker need not load the worker
    from llambo.worker.config import WorkerConfig

    return run_worker(msgspec.json.decode(text, type=WorkerConfig), lambda: print("ready", flush=True))


def main(kind: str, options: str, parent: str = "") -> int:
    if parent:
        end_with_parent(int(parent))
    logging.basicConfig(level=logging.INFO, format="%(created)f %(message)s")
    return {"broker": run_broker_node, "worker": run_worker_node}[kind](options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
