"""Hosts that get a large file from each other, with faults and without: figures, printed as one line of JSON.

    python -m tests.integration.share_figures --mib 2048 --hosts 8              killed, corrupt and slow ones among them
    python -m tests.integration.share_figures --mib 2048 --hosts 8 --speed      one has it; how fast the others get it
    ... --plain                                                                 without keys

The source outside the mesh is a server on loopback that sends `--outside-mib` MiB a second. All hosts are on this
machine, so the figures are those of its cores and its disk.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llambo.mesh.client.sync_client import SyncClient
from llambo.testing.mesh import Mesh, key_folder, key_of
from llambo.testing.processes import cpu_s
from tests.integration.hub import BLOCK, Hub, serving, sha256
from tests.integration.test_share import FILE, MIB, NAME, REPO, Site

#: Of one run.
DEADLINE_S = 900.0


def until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def wait(client: SyncClient, to: str, gone: str, deadline: float) -> int:
    """Until all have it. Returns the bytes that came from outside, as the hosts count them."""
    while True:
        reply = client.pull_model(NAME, to, poll=True)
        open_ = [host for host in reply.hosts if host.state != "here" and host.host != gone]
        assert not any(host.state == "failed" for host in open_), reply
        if not open_:
            return sum(host.outside for host in reply.hosts)
        assert time.monotonic() < deadline, reply
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--outside-mib", type=int, default=25)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    content = b"GGUF" + random.Random(2).randbytes(MIB) * given.mib
    hub = Hub(repos={REPO: {FILE: content}})
    began = time.monotonic()

    def keep_to_speed() -> None:
        time.sleep(max(0.0, began + hub.sent / (given.outside_mib * MIB) - time.monotonic()))

    with tempfile.TemporaryDirectory() as folder, serving(hub):
        path = Path(folder)
        keys = None if given.plain else key_folder(path / "keys")
        with Mesh(0, keys=keys, broker="process") as mesh:
            site = Site(mesh, hub, path, sha256(content))
            names = [f"h{number}" for number in range(given.hosts)]
            faults = {} if given.speed else {"h0": "corrupt", "h1": "1"}
            for name in names:
                site.start(name, faults.get(name, ""))
            site.ready()
            key = key_of(keys, "ops", "admin") if keys else ""
            deadline = time.monotonic() + DEADLINE_S
            with SyncClient(mesh.address, key=key) as client:
                if given.speed:
                    client.pull_model(NAME, names[0])
                    wait(client, names[0], "", deadline)
                    started = time.monotonic()
                    client.pull_model(NAME)
                    outside, killed = wait(client, "all", "", deadline), ""
                else:
                    hub.after_block = keep_to_speed
                    began = started = time.monotonic()
                    client.pull_model(NAME)
                    until(lambda: hub.sent > len(content) // 2, deadline)
                    reply = client.pull_model(NAME, poll=True)
                    killed = max(reply.hosts, key=lambda host: host.outside).host
                    site.hosts[killed].kill()
                    outside = wait(client, "all", killed, deadline)
                took_s = time.monotonic() - started
            left = [name for name in names if name != killed]
            assert all(site.has_it(name) for name in left), "a file is wrong"
            used = sum(cpu_s(process.pid) for name, process in site.hosts.items() if name != killed)
    receivers = len(left) - (1 if given.speed else 0)
    print(json.dumps({
        "mib": given.mib, "hosts": given.hosts, "keys": not given.plain, "killed": killed, "with it": len(left),
        "sent by the server, of one file": round(hub.sent / len(content), 3),
        "outside by the hosts that are left": round(outside / len(content), 3), "seconds": round(took_s, 1),
        "MB/s of all that got it": round(receivers * len(content) / took_s / 1e6),
        "cpu seconds of the hosts": round(used, 1), "block": BLOCK,
        "cpu seconds here": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
