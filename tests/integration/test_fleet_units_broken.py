"""What becomes of a node when ssh breaks off, or the manager refuses, in the middle of something.

In place of both are doubles in PATH. `ssh` runs its command here; it fails for as long as there is a file `cut`,
and if that has text, only for what contains it. It hangs while there is a pipe `hang`. `systemctl` refuses while there
is a file `refuse`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from llambo.fleet.model import Fleet, Host, NodeFailed, NodeRecord
from llambo.fleet.providers.providers import Providers
from llambo.fleet.providers.units import Units

SSH = """#!/bin/sh
for last in "$@"; do :; done
if [ -p "$DOUBLES/hang" ]; then read -r word < "$DOUBLES/hang"; fi
if [ -e "$DOUBLES/cut" ] && printf %s "$last" | grep -qF -- "$(cat "$DOUBLES/cut")"; then
    echo 'ssh: connect to host far port 22: No route to host' >&2
    exit 255
fi
exec sh -c "$last"
"""
SYSTEMCTL = """#!/bin/sh
case "$*" in
    *disable*) if [ -e "$DOUBLES/refuse" ]; then echo 'Job canceled.' >&2; exit 1; fi ;;
    *--value*) echo 100 ;;
    *"show --property=Id"*) printf 'Id=llambo-worker@tiny-0001.service\\nActiveState=active\\nMainPID=17\\n' ;;
esac
"""
RECORD = NodeRecord(name="tiny-0001", node_class="tiny", host="far", fingerprint="f", memory_bytes=1, cores=1.0,
                    slots=4, begun_ms=1)  # fmt: skip


class Far:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("ssh", SSH), ("systemctl", SYSTEMCTL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def units(self) -> Units:
        """A provider as the next command makes it, with the records of its folder."""
        host = Host(name="far", provider="systemd", address="far", user=True)
        return Units("rig", host, self.folder / "state")

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "etc/llambo").glob("*")}

    def spawn(self, units: Units) -> str:
        async def work() -> str:
            await units.refresh()
            return await units.spawn(RECORD, {"LLAMBO_CLASS": "tiny"}, "llambo-key-1.abc\n", 100, 20)

        return asyncio.run(work())


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    monkeypatch.setenv("DOUBLES", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "etc"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Far(tmp_path)


def test_a_worker_of_a_user_gets_the_path_of_its_key(far: Far) -> None:
    far.spawn(far.units())
    assert far.files() == {"worker-tiny-0001.env", "worker-tiny-0001.key"}
    text = (far.folder / "etc/llambo/worker-tiny-0001.env").read_text()
    assert f'LLAMBO_KEY="{far.folder}/etc/llambo/worker-tiny-0001.key"' in text.splitlines()
    assert "llambo-key-1." not in text
    assert not list((far.folder / "state").rglob("*.key"))


def test_a_node_whose_start_was_cut_off_keeps_its_name(far: Far) -> None:
    (far.folder / "cut").write_text("enable --quiet --now")
    with pytest.raises(NodeFailed, match=r"tiny-0001 may or may not have started on far: .*No route to host"):
        far.spawn(far.units())
    # The next command does not reach the host, and has the record all the same.
    (far.folder / "cut").write_text("")
    later = far.units()
    asyncio.run(later.refresh())
    assert (later.records(), later.pid("tiny-0001")) == ([RECORD], 0)
    assert "No route to host" in later.problem
    # When the host is back, it is as the host says.
    (far.folder / "cut").unlink()
    asyncio.run(later.refresh())
    assert (later.records(), later.pid("tiny-0001"), later.problem) == ([RECORD], 17, "")


def test_one_that_could_not_be_ended_is_still_there_and_is_ended_the_next_time(far: Far) -> None:
    far.spawn(far.units())
    for obstacle, why in (("refuse", "Job canceled"), ("cut", "No route to host")):
        (far.folder / obstacle).write_text("")
        units = far.units()
        with pytest.raises(NodeFailed, match=f"tiny-0001 could not be ended on far: .*{why}"):
            asyncio.run(units.end("tiny-0001", 1))
        assert units.records() == far.units().records() == [RECORD]
        assert "worker-tiny-0001.env" in far.files()
        (far.folder / obstacle).unlink()
    asyncio.run(far.units().end("tiny-0001", 1))
    assert (far.files(), far.units().records()) == (set(), [])


async def test_a_host_that_hangs_delays_no_refresh_and_its_answer_counts_when_it_comes(far: Far) -> None:
    await asyncio.to_thread(far.spawn, far.units())
    host = Host(name="far", provider="systemd", address="far", user=True)
    providers = Providers(Fleet(name="rig", hosts={"far": host}), far.folder / "state")
    await providers.refresh(0)  # the first time all are waited for
    assert providers.pid("tiny-0001") == 17
    os.mkfifo(far.folder / "hang")
    (far.folder / "cut").write_text("")
    for _ in range(2):
        await providers.refresh(0.01)
        assert (providers.pid("tiny-0001"), providers.problems()) == (17, {})
    async with asyncio.timeout(30):
        await asyncio.to_thread((far.folder / "hang").write_text, "on\n")
        await providers.refresh()
    assert "No route to host" in providers.problems()["far"]
    assert [record.name for record in providers.records()] == ["tiny-0001"]


def test_a_damaged_file_is_reported_and_nothing_is_taken_for_gone(far: Far) -> None:
    far.spawn(far.units())
    (far.folder / "etc/llambo/worker-tiny-0001.env").write_text("# llambo fleet rig: {spoilt\n")
    units = far.units()
    asyncio.run(units.refresh())
    assert "cannot be read" in units.problem
    assert units.records() == [RECORD]
