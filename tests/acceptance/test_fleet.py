"""`llambo fleet`, as an operator runs it: from nothing to a mesh, changes, faults, and to nothing again."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llambo.cli.kit.failure import Exit
from llambo.testing.commands import LLAMBO, Commands, Done, by_hand, command
from llambo.testing.processes import TIMEOUT_S, wait_until_gone

FILE = """
[hosts.here]
memory = "4GiB"
cores = 8

[broker]
port = 0

[classes.tiny]
engine = "fake"
memory = "100MiB"
cores = 0.5
min = 2
max = 6

[classes.medium]
engine = "fake"
model = "other"
ctx = 1024
slots = 8
memory = "100MiB"
min = 1
"""


class Site:
    """A fleet.toml and its folder of state; the commands are run on them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.file, self.state = folder / "fleet.toml", folder / "state"
        self.write(FILE)

    def write(self, text: str) -> None:
        self.file.write_text(text, encoding="utf-8")

    def flags(self) -> list[str]:
        return ["--file", str(self.file), "--state", str(self.state)]

    def fleet(self, *words: str) -> Done:
        return Commands("tcp://127.0.0.1:1").llambo("fleet", *words, *self.flags(), timeout_s=60)

    def ok(self, *words: str) -> Done:
        done = self.fleet(*words)
        assert done.code == 0, done.story
        return done

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["node"]: node for node in self.ok("status", "--json").json()["nodes"]}

    def mesh(self) -> Commands:
        return Commands(self.ok("status", "--json").json()["broker"])

    def processes(self) -> list[int]:
        """All that run with a lock of this fleet."""
        mark = str(self.state).encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                except (FileNotFoundError, ProcessLookupError):
                    continue  # gone meanwhile
                found += [int(folder.name)] if b"--hold" in words and mark in b"".join(words) else []
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    here = Site(tmp_path)
    try:
        yield here
    finally:
        end_all(here)


def end_all(here: Site) -> None:
    for pid in here.processes():
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid, 20)


def did(done: Done) -> list[tuple[str, str]]:
    return [(step["do"], step["name"]) for step in done.json()["steps"]]


def test_from_nothing_to_a_mesh_and_only_the_difference_after_that(site: Site) -> None:
    everything = [("spawn", name) for name in ("broker", "tiny-0001", "tiny-0002", "medium-0001")]
    assert did(site.ok("plan", "--json")) == everything and not site.processes(), "a plan does nothing"
    assert did(site.ok("apply", "--json")) == everything
    before = site.nodes()
    assert {node["state"] for node in before.values()} == {"ready"}
    assert sorted(node["pid"] for node in before.values()) == sorted(site.processes())
    mesh = site.mesh()
    assert mesh.ok("send", "--model", "other", "--max-tokens", "3", "hello").out
    assert mesh.ok("workers", "--json").json()[0]["class"] == "medium"

    # Again: nothing
    assert did(site.ok("apply", "--json")) == []
    assert "nothing to do" in site.ok("apply").out
    assert site.nodes() == before

    # Another file: the difference, and nothing else is touched
    site.write(FILE.replace("slots = 8", "slots = 3").replace("min = 2", "min = 3"))
    difference = [("spawn", "tiny-0003"), ("replace", "medium-0001")]
    assert did(site.ok("plan", "--json")) == difference
    assert did(site.ok("apply", "--json")) == difference
    after = site.nodes()
    assert {name for name in before if before[name]["pid"] != after[name]["pid"]} == {"medium-0001"}
    assert after["medium-0001"]["slots"] == 3 and after["medium-0001"]["state"] == "ready"

    # A wanted number, within bounds, is set and stays in force
    assert did(site.ok("scale", "--json", "tiny=5")) == [("spawn", "tiny-0004"), ("spawn", "tiny-0005")]
    assert did(site.ok("spawn", "--json", "--class", "tiny")) == [("spawn", "tiny-0006")]
    refused = site.fleet("scale", "tiny=7")
    assert refused.code == 2 and f"7 is not from 3 to 6, the bounds of tiny in {site.file}:9" in refused.err
    assert [do for do, _ in did(site.ok("scale", "--json", "tiny=3"))] == ["retire"] * 3
    assert did(site.ok("apply", "--json")) == []

    assert len(site.ok("down", "--json").json()["ended"]) == 5
    assert not site.processes() and "nothing runs" in site.ok("status").err


def test_what_has_died_is_begun_again_and_what_fails_is_reported(site: Site) -> None:
    site.ok("apply")
    os.kill(pid := site.nodes()["tiny-0002"]["pid"], signal.SIGKILL)
    wait_until_gone(pid, 20)
    assert site.nodes()["tiny-0002"]["state"] == "ended"
    again = site.ok("apply", "--json")
    assert did(again) == [("spawn", "tiny-0002")] and again.json()["ended"][0]["name"] == "tiny-0002"
    assert site.nodes()["tiny-0002"]["state"] == "ready"

    # A class that cannot run: the reason is printed, and the other classes are not affected
    site.write(FILE + '[classes.bad]\nmodel = "/nowhere/x.gguf"\nengine = "llama"\nmemory = "1MiB"\nmin = 1\n')
    failed = site.fleet("apply")
    assert failed.code == 1 and "bad-0001 ended with status" in failed.out and "/nowhere/x.gguf" in failed.out
    assert {name for name, node in site.nodes().items() if node["state"] == "ready"} >= {"tiny-0001", "tiny-0002"}
    assert "/nowhere/x.gguf" in site.ok("logs", "bad-0001").out

    # More than there is room for is refused, with the numbers
    site.write(FILE.replace("min = 2\nmax = 6", "min = 2\nmax = 100"))
    full = site.fleet("spawn", "--count", "20", "--class", "tiny")
    assert full.code == 1 and "tiny needs 100 MiB and 0.5 cores; here has 0 cores left of 8" in full.out, full.story
    site.ok("down")


def test_an_apply_that_is_killed_is_gone_on_with_and_two_are_not_at_work_at_once(site: Site) -> None:
    site.write(FILE.replace('engine = "fake"', 'engine = "fake"\nfake.load_ms = 1500'))
    with command(LLAMBO, "fleet", "apply", *site.flags()) as applying:
        applying.line("broker is ready")
        refused = site.fleet("apply")
        assert refused.code == 5 and "another `llambo fleet` is at work" in refused.err, refused.story
        applying.send(signal.SIGKILL)
        applying.end()
    site.ok("apply")
    nodes = site.nodes()
    assert sorted(nodes) == ["broker", "medium-0001", "tiny-0001", "tiny-0002"]
    assert sorted(node["pid"] for node in nodes.values()) == sorted(site.processes()), "each of them once"
    # Only a lock that a live process holds excludes others: a killed process leaves none.
    with (site.state / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    site.ok("down")


RUN = """
[hosts.here]
memory = "4GiB"
cores = 8

[broker]
port = 0

[scale]
grow_after_ms = 1000
wait_ms = 500
shrink_after_ms = 2000
shrink_pause_ms = 1000
idle_ms = 2000

[classes.tiny]
engine = "fake"
memory = "100MiB"
cores = 0.5
slots = 2
max = 4
min = 1
fake.tokens_per_s = 50

[classes.bad]
engine = "llama"
model = "/nowhere/x.gguf"
memory = "100MiB"
min = 1
"""


def test_an_orchestrator_scales_backs_off_and_is_succeeded(site: Site) -> None:
    site.write(RUN)
    with command(LLAMBO, "fleet", "run", *site.flags()) as running:
        running.line("tiny-0001 is ready")
        mesh = site.mesh()
        with ExitStack() as all_of_them:
            words = ("send", "--max-tokens", "200")
            asking = [all_of_them.enter_context(mesh.start(*words, f"number {number}")) for number in range(8)]
            running.line(r"tiny: scaling up from 1 to (3|4): ")
            running.line(r"tiny-000[234] is ready")
            for one in asking:
                assert one.end() == 0, one.story("it failed")
        running.line(r"tiny: scaling down from \d to 1: at most \d+ % of \d+ slots wanted in 2 s, less than 20 %")
        running.line("tiny-000[1234] has left")

        # A class that cannot run is tried less and less often, its error is printed, and others are not affected.
        running.line("bad keeps failing on here, 3 times in a row; again in 4 s", 40)
        shown = site.ok("status")
        assert "bad keeps failing on here: " in shown.out and "there is no file /nowhere/x.gguf" in shown.out, (
            shown.story
        )

        # No other command changes the fleet meanwhile; a wanted number is passed to the orchestrator.
        for word in ("apply", "down"):
            said = site.fleet(word).err
            assert "`llambo fleet run` keeps this fleet as it is, pid" in said and "end it first" in said
        assert "passed on to the orchestrator" in site.ok("scale", "tiny=2").out
        running.line("tiny: an operator wants 2")
        site.write(RUN.replace("max = 4", "max = "))
        running.line(r"the changed file is not used: .*fleet.toml is not TOML")
        site.write(RUN)
        running.send(signal.SIGKILL)
        running.end()

    before = set(site.processes())
    with command(LLAMBO, "fleet", "run", *site.flags()) as running:
        running.line("runs fleet, as in")
        running.line("bad keeps failing on here, 3 times in a row", 40)
        nodes = site.nodes()
        assert {node["pid"] for name, node in nodes.items() if name[:3] != "bad"} <= before, (
            "all of them are the old ones"
        )
        assert len(nodes) == len({node["pid"] for node in nodes.values()})
        running.send(signal.SIGTERM)
        running.line("stopped; the broker and the workers keep running: `llambo fleet down --file")
        assert running.end() == 0
    assert site.nodes()["broker"]["state"] == "ready" and site.ok("status", "--json").json()["orchestrator"] is None
    site.ok("down")


FAR = """
[hosts.here]
memory = "4GiB"
cores = 8
[classes.tiny]
engine = "fake"
memory = "100MiB"
min = 0
max = 2
[classes.tiny.scale]
idle_ms = 600000
"""


def test_two_orchestrators_and_a_class_that_begins_with_none(tmp_path: Path) -> None:
    """Each has a folder of its own, as on two machines; only the lease in the broker excludes the second."""
    first, second = Site(tmp_path / "a"), Site(tmp_path / "b")
    with by_hand() as (mesh, _, _), ExitStack() as both:
        words = ["--broker", mesh.address, "fleet", "run"]
        for site in (first, second):
            site.write(FAR)
        leader = both.enter_context(command(LLAMBO, *words, *first.flags()))
        leader.line("leads from now on")
        other = both.enter_context(command(LLAMBO, *words, *second.flags()))
        other.line("stands by: fleet .* has the lease")

        # No worker serves it, and it is not refused: it waits for the worker that is started for it.
        answer = mesh.ok("send", "--class", "tiny", "--max-tokens", "3", "hello")
        assert answer.out.strip()
        leader.line("tiny: scaling up from 0 to 1")
        # Its events are sent with its lease, which it renews every second.
        deadline = time.monotonic() + TIMEOUT_S
        while "scaling up" not in (events := mesh.ok("events").out):
            assert time.monotonic() < deadline, events
        assert first.processes() and not second.processes()

        # The one that stands by takes over when the other one is gone, at the latest when its lease is over.
        leader.send(signal.SIGKILL)
        leader.end()
        other.line("leads from now on")
        assert not second.processes(), "its worker is there, and serves"
        for pid in first.processes():
            os.kill(pid, signal.SIGKILL)


def test_a_wrong_file_is_reported_with_its_line(site: Site) -> None:
    site.write("[classes.tiny]\nmemry = 3\n")
    done = site.fleet("plan")
    problem = "fleet.toml:2: unknown key 'memry' in [classes.tiny]; did you mean memory?"
    assert done.code == 2 and problem in done.err, done.story


SEVERAL = """
[hosts.here]
memory = "4GiB"
cores = 8

[fleet]
settle_ms = 100

[broker]
port = 0

[classes.several]
engine = "fake"
models = ["a:40", "b:40", "c:40"]
memory = "100MiB"
min_loaded_ms = 0
slots = 2
min = 1
max = 2
[classes.several.fake]
tokens_per_s = 50
"""


def test_nodes_with_several_models_are_updated_and_nothing_is_lost(site: Site) -> None:
    site.write(SEVERAL)
    assert did(site.ok("apply", "--json")) == [("spawn", "broker"), ("spawn", "several-0001")]
    mesh = site.mesh()
    nothing = site.fleet("drain", "several-0001")
    assert nothing.code == Exit.ERROR and "several-0001 has no model loaded" in nothing.err, nothing.story
    for model in "abc":
        assert mesh.llambo("send", "--model", model, "--max-tokens", "2", "hi").code == 0
    node = site.nodes()["several-0001"]
    assert (node["state"], node["note"]) == ("ready", "2 of 3 models loaded")
    assert did(site.ok("apply", "--json")) == [], "what runs is left as it is"
    # When its settings change while it answers
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(mesh.llambo, "send", "--model", "a", "--max-tokens", "150", "--json", "hi", timeout_s=60)
        deadline = time.monotonic() + TIMEOUT_S
        while not any(row["state"] == "running" for row in mesh.ok("requests", "--json").json()):
            assert time.monotonic() < deadline and not answer.done(), "the request does not run"
        site.write(SEVERAL.replace("slots = 2", "slots = 3"))
        assert did(site.ok("apply", "--json")) == [("replace", "several-0001")]
        end = answer.result().lines()[-1]
    assert end["type"] == "end" and end["tokens"] == 150, end
    after = site.nodes()["several-0001"]
    assert after["pid"] != node["pid"] and after["state"] == "ready"
    assert after["note"] == "1 of 3 models loaded", "the one that has shown that it works"
    assert mesh.llambo("send", "--model", "c", "--max-tokens", "2", "hi").code == 0
    drained = site.ok("drain", "several-0001")
    assert "several-0001-c" in drained.out and "several-0001 still loads other models" in drained.out, drained.story
    assert site.nodes()["several-0001"]["state"] == "draining"
    assert did(site.ok("apply", "--json")) == [("resume", "several-0001")]
    assert site.nodes()["several-0001"]["state"] == "ready"
