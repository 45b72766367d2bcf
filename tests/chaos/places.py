"""Networks of our own, where the machine allows: one for the whole harness, and one for each worker that needs it.

None of them has a name. A network namespace without a name lives as long as a process in it, and with it go its
interfaces: nothing can be left behind, however a run ends, and nothing can leave the machine. The harness starts
itself again inside the first one (`enter`). A `Namespace` holds one for a worker and is joined to the harness's by a
pair of virtual interfaces, whose one end can be taken down.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

#: Where brokers listen inside. One address that all can reach leaves the others, at the same ports, to proxies.
BROKERS = "10.77.255.1"
#: In the environment of a harness that is inside already.
INSIDE = "CHAOS_INSIDE"
TRY_S = 20


def ways() -> list[list[str]]:
    """How a process can be put into a fresh network: as root, or as root of a user namespace."""
    return [["unshare", "--net", "--"], ["unshare", "--user", "--map-root-user", "--net", "--"]]


def way_in() -> list[str] | None:
    """The first way that works here, a pair of interfaces included. None: this machine does not allow it."""
    trial = "ip link set lo up && ip link add try0 type veth peer name try1 && ip link del try0"
    for way in ways():
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([*way, "sh", "-c", trial], check=False, capture_output=True, timeout=TRY_S)
            if done.returncode == 0:
                return way
    return None


def enter(way: list[str], arguments: list[str]) -> None:
    """Does not return: this process goes on inside, under the same process id."""
    os.environ[INSIDE] = "1"
    os.execvp(way[0], [*way, sys.executable, "-m", "tests.chaos", *arguments])


def is_inside() -> bool:
    return os.environ.get(INSIDE) == "1"


def settle() -> None:
    """Inside: what there is from the beginning."""
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{BROKERS}/32", "dev", "lo")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=TRY_S)


class Namespace:
    """A network for one worker. `cat` keeps it: it ends when our end of its pipe is closed, by us or by our death."""

    def __init__(self, number: int) -> None:
        here, there = f"10.77.{number}.1", f"10.77.{number}.2"
        self._interface = f"chaos{number}"
        self._cat = subprocess.Popen(["unshare", "--net", "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._cat.stdin is not None and self._cat.stdout is not None
        # What it says back it says from inside.
        self._cat.stdin.write(b"there?\n")
        self._cat.stdin.flush()
        assert self._cat.stdout.readline() == b"there?\n", "cat does not answer"
        inside = self._interface + "i"
        ip("link", "add", self._interface, "type", "veth", "peer", "name", inside, "netns", str(self._cat.pid))
        ip("addr", "add", f"{here}/24", "dev", self._interface)
        ip("link", "set", self._interface, "up")
        orders = (f"addr add {there}/24 dev {inside}", f"link set {inside} up", f"route add {BROKERS} via {here}")
        for words in (*orders, "link set lo up"):
            subprocess.run([*self.prefix, "ip", *words.split()], check=True, capture_output=True, timeout=TRY_S)

    @property
    def prefix(self) -> list[str]:
        """What a command begins with to run in there. It replaces itself, so the process id stays."""
        return ["nsenter", f"--net=/proc/{self._cat.pid}/ns/net", "--"]

    def link(self, up: bool) -> None:
        ip("link", "set", self._interface, "up" if up else "down")

    def close(self) -> None:
        assert self._cat.stdin is not None and self._cat.stdout is not None
        self._cat.stdin.close()
        self._cat.wait(TRY_S)
        self._cat.stdout.close()
