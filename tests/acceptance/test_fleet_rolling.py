"""Rolling updates of a fleet under load: good ones, a bad one that stops in the middle, and back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llambo.mesh.client.client import Client
from llambo.testing.commands import LLAMBO, command
from llambo.testing.processes import Process
from tests.acceptance.test_fleet import Site, end_all

FILE = """
[fleet]
settle_ms = 300

[hosts.here]
memory = "4GiB"
cores = 8

[broker]
port = 0

[classes.tiny]
engine = "fake"
memory = "100MiB"
cores = 0.5
slots = 2
min = 8
fake.tokens_per_s = 100
"""
#: So many requests are there at any time, and each has so many tokens.
STREAMS, TOKENS = 4, 60


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    here = Site(tmp_path)
    here.write(FILE)
    try:
        yield here
    finally:
        end_all(here)


class Load:
    """Sends requests until it is stopped. An error of any request ends the test."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.done = 0
        self.moves = 0
        self.failed: list[str] = []
        self._stop = asyncio.Event()

    async def run(self) -> None:
        async with Client(self.address, name="load") as client:
            await asyncio.gather(*[self._ask(client, number) for number in range(STREAMS)])

    async def _ask(self, client: Client, number: int) -> None:
        while not self._stop.is_set():
            answer = await client.generate(f"{number} asks", max_tokens=TOKENS, seed=self.done)
            if answer.reason != "length" or len(answer.ids) != TOKENS:
                self.failed.append(f"{answer.reason}, {len(answer.ids)} tokens of {answer.worker}")
            self.done += 1
            self.moves += answer.moves

    async def end(self, task: asyncio.Task[None]) -> None:
        self._stop.set()
        async with asyncio.timeout(30):
            await task


def versions(site: Site) -> dict[str, bool]:
    """Of each worker: whether it has what is in force."""
    nodes = site.ok("status", "--json").json()["nodes"]
    return {node["node"]: node["current"] for node in nodes if node["class"] == "tiny" and node["state"] == "ready"}


def test_the_fourth_of_eight_is_bad_under_load_and_it_goes_back(site: Site, tmp_path: Path) -> None:
    site.ok("apply")
    (tmp_path / "weights").touch()
    asyncio.run(_fourth_of_eight(site, site.nodes(), tmp_path / "weights"))
    site.ok("down")


async def _fourth_of_eight(site: Site, old: dict[str, dict[str, Any]], weights: Path) -> None:
    load = Load((await asyncio.to_thread(site.mesh)).address)
    task = asyncio.create_task(load.run())

    # Another version: it needs a file, which is there for three of them.
    site.write(FILE + f'fake.load_file = "{weights}"\n')

    def update() -> Process:
        with command(LLAMBO, "fleet", "apply", *site.flags()) as applying:
            applying.line("tiny-0003 is replaced, 3 of 8", 40)
            weights.unlink()
            assert applying.end(40) == 1, applying.story("it should have failed")
        return applying

    applying = await asyncio.to_thread(update)
    story = applying.story("the update")
    for text in (
        "tiny-0004 is bad: ended with status 1; no further worker is replaced",
        "the update has stopped, tiny: 3 of 8 replaced, 4 left as they were",
        f"there is no file {weights}",
    ):
        assert any(text in line for line in applying.out), story

    new = await asyncio.to_thread(site.nodes)
    serving = {name for name, node in new.items() if name != "broker" and node["state"] == "ready"}
    assert serving == {f"tiny-{number:04}" for number in (1, 2, 3, 5, 6, 7, 8)}, "seven serve"
    changed = {name for name in serving if new[name]["pid"] != old[name]["pid"]}
    assert changed == {"tiny-0001", "tiny-0002", "tiny-0003"}, "no other was replaced"
    status = await asyncio.to_thread(site.ok, "status")
    assert "tiny: its update has stopped: tiny-0004: ended with status 1" in status.out, status.story

    # A second apply changes nothing: the bad step is not tried again.
    again = await asyncio.to_thread(site.fleet, "apply")
    assert again.code == 1 and "4 tiny are left as they were: an earlier step has failed" in again.out, again.story
    assert {name: node["pid"] for name, node in (await asyncio.to_thread(site.nodes)).items()} == {
        name: node["pid"] for name, node in new.items()
    }

    back = await asyncio.to_thread(site.ok, "rollback")
    assert "1 spawned, 3 replaced" in back.out, back.story
    assert await asyncio.to_thread(versions, site) == {f"tiny-{number:04}": True for number in range(1, 9)}
    now = await asyncio.to_thread(site.nodes)
    assert all(now[f"tiny-{number:04}"]["pid"] == old[f"tiny-{number:04}"]["pid"] for number in range(5, 9))
    # The file says the bad settings still, and is not believed until it says others.
    again = await asyncio.to_thread(site.ok, "apply")
    assert "nothing to do" in again.out, again.story

    done = load.done
    await load.end(task)
    assert not load.failed and done > 0 and load.moves > 0, (load.failed, done, load.moves)
    print(f"{load.done} requests, {load.moves} moves, {len(load.failed)} failed")


def test_an_orchestrator_restarts_updates_and_takes_back(site: Site, tmp_path: Path) -> None:
    small = FILE.replace("min = 8", "min = 3")
    site.write(small)
    with command(LLAMBO, "fleet", "run", *site.flags()) as running:
        for number in (1, 2, 3):
            running.line(f"tiny-000{number} is ready")
        first = site.nodes()
        assert "passed on to the orchestrator" in site.ok("rolling-restart", "--class", "tiny").out
        running.line("tiny: 3 of 3 replaced", 40)
        second = site.nodes()
        assert all(first[name]["pid"] != second[name]["pid"] for name in first if name != "broker")

        # One that is bad from the first on: two serve with the old settings, and the third is begun with them again.
        site.write(small + f'fake.load_file = "{tmp_path / "nothing"}"\n')
        running.line("tiny: 0 of 3 replaced, 2 left as they were: tiny-0001: ended with status 1", 40)
        running.line("tiny-0001 is ready", nth=3)  # it was begun, and begun again, before
        site.ok("rollback")
        third = site.nodes()
        assert {third[name]["pid"] == second[name]["pid"] for name in ("tiny-0002", "tiny-0003")} == {True}
        assert versions(site) == {"tiny-0001": True, "tiny-0002": True, "tiny-0003": True}
        running.send(signal.SIGTERM)
        assert running.end() == 0
    site.ok("down")


def test_a_node_is_drained_and_works_again(site: Site) -> None:
    site.write(FILE.replace("min = 8", "min = 2"))
    site.ok("apply")
    assert site.ok("drain", "tiny-0002", "--json").json()["draining"]
    assert site.nodes()["tiny-0002"]["state"] == "draining"
    assert "works again" in site.ok("drain", "tiny-0002", "--undo").out
    assert site.nodes()["tiny-0002"]["state"] == "ready"
    unknown = site.fleet("drain", "tiny-0007")
    assert unknown.code == 1 and "there is no worker 'tiny-0007' in this fleet" in unknown.err
    site.ok("down")
