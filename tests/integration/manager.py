"""A real service manager for tests: `systemd --user` in namespaces of its own, and a journal that we can read.

It needs root and a kernel that lets root make namespaces. Everything below hangs on one process: when that is killed
(by `close`, or with us) the kernel ends the manager and all its services with it, and mounts and network go with them.
The machine's own /run, /tmp and control groups are not touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llambo.testing.processes import children, wait_until_gone

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = "/lib/systemd/systemd"
TRY_S = 60
#: No wait takes longer, however busy the machine is.
LIMIT_S = 60.0
#: What is new, from what it is made, and that it ends with us.
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--propagation", "private", "--"]
#: $1: our folder, seen as /run/rig inside. $2...: folders that have to be seen, though they are below /tmp. $GROUP: a
#: control group for all of it. $THEN: what is run in the end, as the first process.
INSIDE = """
set -eu
rig=$1; shift
mount -t proc proc /proc
ip link set lo up
# As systemd does when it boots: with the kernel's 10 a busy journal refuses entries.
echo 512 > /proc/sys/net/unix/max_dgram_qlen
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/rig /mnt/tmp
chmod 1777 /mnt/tmp
mount --bind "$rig" /mnt/rig
for kept in "$@"; do
    mkdir -p "/mnt$kept"
    mount --bind "$kept" "/mnt$kept"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/rig /run/systemd/system /run/manager /run/systemd/inaccessible/dir
: > /run/systemd/inaccessible/reg
mkfifo /run/systemd/inaccessible/fifo
chmod 0 /run/systemd/inaccessible/*
mount --bind /mnt/rig /run/rig
mount --rbind /mnt/tmp /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
[ "$(stat --file-system --format %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$GROUP"
echo 0 > "/sys/fs/cgroup/$GROUP/cgroup.procs"
exec unshare --cgroup -- sh -c 'umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "$@"' sh $THEN
"""
#: Afterwards, when no process is in it any more.
TIDY = 'mount -t cgroup2 cgroup2 /mnt; find "/mnt/$GROUP" -depth -type d -exec rmdir {} +'
#: Targets that a user's manager expects, and that are otherwise in its own folder.
TARGETS = ("default", "basic", "sockets", "timers", "paths", "shutdown", "exit", "network-online")

Entry = dict[str, Any]


@cache
def hindrance() -> str:
    """Why there can be no manager here; empty: there can."""
    if os.geteuid() != 0:
        return "it takes root"
    try:
        environ = {**os.environ, "GROUP": f"test-{os.getpid()}-trial", "THEN": "true"}
        done = subprocess.run(
            [*UNSHARE, "sh", "-c", INSIDE, "sh", str(ROOT)],
            check=False, capture_output=True, text=True, timeout=TRY_S, env=environ,
        )  # fmt: skip
        _tidy(environ)
    except subprocess.TimeoutExpired:
        return f"namespaces took longer than {TRY_S} s"
    return done.stderr.strip() if done.returncode else ""


def _tidy(environ: dict[str, str]) -> None:
    subprocess.run(["unshare", "--mount", "--", "sh", "-c", TIDY], check=False, capture_output=True, timeout=TRY_S,
                   env=environ)  # fmt: skip


class Manager:
    """`rig` is a folder of ours; inside it is /run/rig, and also where settings are (`/run/rig/etc`)."""

    def __init__(self, rig: Path, units: str, booted: str = "Startup finished") -> None:
        """`units`: where they are, as seen from inside. `booted`: the line that is logged when it can be used."""
        self.entries: list[Entry] = []
        self._rig = rig
        self._news = threading.Condition()
        self._over = False
        base = rig / "base"
        base.mkdir(exist_ok=True)  # it may be the second time that this host is switched on
        for name in TARGETS:
            (base / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
        self._environ = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("LLAMBO_", "LISTEN_", "NOTIFY_"))
            },
            "HOME": "/run/rig",
            "XDG_RUNTIME_DIR": "/run/manager",
            "XDG_CONFIG_HOME": "/run/rig/etc",
            "XDG_CACHE_HOME": "/run/rig/cache",
            "SYSTEMD_UNIT_PATH": f"{units}:/run/rig/base",
            "GROUP": f"test-{os.getpid()}-{rig.name}",
            "THEN": f"{sys.executable} {Path(__file__).with_name('mini_journal.py')}",
            "NO_COLOR": "1",
        }
        self._process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", INSIDE, "sh", str(rig), *_below_tmp()],
            env=self._environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        try:
            self.wait(lambda entry: "listening" in entry)
            (self.first,) = children(self._process.pid)
            self._systemd = subprocess.Popen(
                [*self._way_in(), "sh", "-c", 'echo 0 > /sys/fs/cgroup/cgroup.procs; exec "$@"', "sh",
                 SYSTEMD, "--user", "--unit=default.target", "--log-target=journal", "--log-level=debug"],
                env=self._environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.wait(lambda entry: booted in entry.get("MESSAGE", ""))
        except BaseException:
            self.close()
            raise

    def _way_in(self) -> list[str]:
        return ["nsenter", f"--target={self.first}", "--mount", "--pid", "--net", "--cgroup", "--"]

    def close(self) -> None:
        """The first process of its namespace is killed, and so all of them."""
        self._process.kill()
        self._process.wait(LIMIT_S)
        self._listener.join(LIMIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        if hasattr(self, "first"):
            wait_until_gone(self.first, LIMIT_S)
        if hasattr(self, "_systemd"):
            self._systemd.wait(LIMIT_S)
        _tidy(self._environ)

    # --- what is done inside -------------------------------------------------------------------------

    def begin(self, *command: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._way_in(), *command], env={**self._environ, **environ}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str, fails: bool = False, **environ: str) -> str:
        """What it printed. It has to end well, or, with `fails`, not well."""
        process = self.begin(*command, **environ)
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{' '.join(command)} took too long: {out}{err}\n{self.story()}") from None
        assert bool(process.returncode) is fails, (
            f"{' '.join(command)}: {process.returncode}: {out}{err}\n{self.story()}"
        )
        return out + err if fails else out

    def systemctl(self, *words: str, fails: bool = False) -> str:
        return self.run("systemctl", "--user", *words, fails=fails)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.systemctl("show", unit, *(f"--property={name}" for name in names)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    # --- what it says --------------------------------------------------------------------------------

    def mark(self) -> int:
        """What comes after this is new."""
        with self._news:
            return len(self.entries)

    def wait(self, wanted: Callable[[Entry], bool], since: int = 0) -> int:
        """The number of the first entry that is wanted."""
        deadline = time.monotonic() + LIMIT_S
        with self._news:
            while True:
                for number in range(since, len(self.entries)):
                    if wanted(self.entries[number]):
                        return number
                since = max(since, len(self.entries))
                came = self._news.wait(deadline - time.monotonic())
                assert came and not self._over, f"it did not come\n{self.story()}"

    def logged(self, text: str, since: int = 0) -> int:
        return self.wait(lambda entry: text in entry.get("MESSAGE", ""), since)

    def notified(self, word: str, units: Sequence[str], since: int = 0) -> tuple[str, int]:
        """Wait until one of these services sends this to the manager. Which one, and the number of the entry."""
        number = self.wait(
            lambda entry: (
                entry.get("USER_UNIT") in units
                and "Got notification message" in entry["MESSAGE"]
                and word in entry["MESSAGE"]
            ),
            since,
        )
        return self.entries[number]["USER_UNIT"], number

    def _listen(self) -> None:
        """In a thread of its own, so that `journalctl` never waits while a test does something else."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.entries.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def story(self) -> str:
        return "\n".join(
            f"{entry.get('SYSLOG_IDENTIFIER', '?')}: {entry.get('MESSAGE', entry)}"
            for entry in [entry for entry in self.entries if entry.get("PRIORITY") != "7"][-80:]
        )


def _below_tmp() -> list[str]:
    """What these tests are made of and would not be seen."""
    needed = {str(ROOT), str(Path(sys.prefix).resolve()), str(Path(sys.base_prefix).resolve())}
    return sorted(path for path in needed if path.startswith("/tmp/"))
