"""The provider `systemd`: nodes are instances of `llambo-worker@.service`, on this machine or, by ssh, on another one.

    DIR/worker-tiny-0001.env    what it is told, and in its first line what it was begun with
    DIR/worker-tiny-0001.key    its key, if the mesh has keys

DIR is where the units look (`llambo systemd install` has put them there): /etc/llambo, or a user's ~/.config/llambo.
The service manager does the rest: it begins them again when they die or the host is booted, it watches them, and it is
the one who knows what runs. Files are written whole, readable by nobody else from their first moment, and each by a
shell on the host itself, so that nothing secret stands in a command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from llambo.fleet.model import Host
from llambo.fleet.process import Failed, Record
from llambo.mesh.errors import Code, LlamboError

#: What is asked quickly is answered within this.
ASK_S = 20.0
#: No password is asked for: who keeps a fleet is let in by a key.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
MARK = "# llambo fleet"

#: $1: system or user. Afterwards `ctl` is its systemctl, and $dir where its files are.
_BEGIN = """
set -eu
if [ "$1" = user ]; then
    dir=${XDG_CONFIG_HOME:-$HOME/.config}/llambo
    ctl() { systemctl --user "$@"; }
else
    dir=/etc/llambo
    ctl() { systemctl "$@"; }
fi
"""
_LIST = (
    _BEGIN
    + """
for file in "$dir"/worker-*.env; do
    if [ -f "$file" ]; then head -n 1 "$file"; fi
done
echo
ctl show --property=Id,ActiveState,SubState,Result,ExecMainStatus,MainPID 'llambo-worker@*.service'
"""
)
#: $2: name of the file. What comes on stdin is in it, all of it or nothing.
_PUT = (
    _BEGIN
    + """
umask 077
mkdir -p "$dir"
draft="$dir/.$2.$$"
cat > "$draft"
mv "$draft" "$dir/$2"
"""
)
#: $2: the unit, $3: its share of the processor.
_START = (
    _BEGIN
    + """
ctl enable --quiet --now "$2"
if [ "$3" != 100 ]; then ctl set-property "$2" "CPUWeight=$3"; fi
"""
)
#: $2: the unit, $3: its name. A unit that has not failed has nothing to reset.
_END = (
    _BEGIN
    + """
ctl disable --quiet --now "$2"
rm -f "$dir/worker-$3.env" "$dir/worker-$3.key"
ctl reset-failed "$2" 2>/dev/null || true
"""
)
_WORDS = (
    _BEGIN
    + """
if [ "$1" = user ]; then unit=--user-unit; else unit=--unit; fi
journalctl "$unit=$2" --lines=20 --output=cat --no-pager
"""
)


@dataclass(frozen=True, slots=True)
class Unit:
    """How the service manager sees it."""

    alive: bool
    pid: int = 0
    how: str = ""


class Units:
    """One host."""

    def __init__(self, fleet: str, host: Host) -> None:
        self.host = host
        self._first = f"{MARK} {fleet}: "
        self._records: dict[str, Record] = {}
        self._units: dict[str, Unit] = {}
        self._words: dict[str, str] = {}
        #: Why it cannot be reached; then what was known of it last is all there is.
        self.problem = ""

    async def refresh(self) -> None:
        """Ask the host what there is."""
        try:
            said = await self._run(_LIST, within_s=ASK_S)
        except LlamboError as error:
            self.problem = f"{self.host.name} cannot be asked: {error.text}"
            return
        self.problem = ""
        files, _, shown = said.partition("\n\n") if not said.startswith("\n") else ("", "", said)
        found = [
            msgspec.json.decode(line.removeprefix(self._first), type=Record)
            for line in files.splitlines()
            if line.startswith(self._first)
        ]
        self._records = {record.name: record for record in found}
        self._units = dict(_unit(block) for block in shown.split("\n\n") if "Id=" in block)

    def records(self) -> list[Record]:
        return list(self._records.values())

    def pid(self, name: str) -> int | None:
        """None: the manager has given it up, or nobody has begun it since the host was booted."""
        unit = self._units.get(name)
        return unit.pid if unit is not None and unit.alive else None

    def how_it_ended(self, name: str) -> str:
        unit = self._units.get(name)
        return unit.how if unit is not None else "ended"

    def words(self, name: str) -> str:
        """The end of what it said, as far as it was fetched."""
        return self._words.get(name, "")

    async def fetch_words(self, name: str) -> str:
        try:
            self._words[name] = await self._run(_WORDS, _unit_name(name), within_s=ASK_S)
        except LlamboError as error:
            self._words[name] = f"(its journal cannot be read: {error.text})"
        return self._words[name]

    async def spawn(
        self, record: Record, environ: Mapping[str, str], key: str, cpu_weight: int, within_s: float
    ) -> str:
        """Returns when the manager has heard from it that it is ready."""
        name = record.name
        if key:
            await self._run(_PUT, f"worker-{name}.key", stdin=key, within_s=ASK_S)
        await self._put(record, environ)
        try:
            await self._run(_START, _unit_name(name), str(cpu_weight), within_s=within_s)
        except LlamboError as error:
            words = await self.fetch_words(name)
            await self.end(name, ASK_S)
            raise Failed(name, f"did not start: {error.text}", words) from error
        self._records[name] = record
        self._units[name] = Unit(True)
        return name

    async def _put(self, record: Record, environ: Mapping[str, str]) -> None:
        lines = [self._first + msgspec.json.encode(record).decode(), *(f"{k}={_quoted(v)}" for k, v in environ.items())]
        await self._run(_PUT, f"worker-{record.name}.env", stdin="\n".join(lines) + "\n", within_s=ASK_S)

    async def end(self, name: str, within_s: float) -> None:
        """SIGTERM lets it finish; the unit says how long the manager waits until it insists."""
        await self._run(_END, _unit_name(name), name, within_s=within_s + ASK_S)
        self._records.pop(name, None)
        self._units.pop(name, None)

    # --- inside ----------------------------------------------------------------------------------------

    async def _run(self, script: str, *words: str, stdin: str = "", within_s: float) -> str:
        """What it printed. Raises LlamboError with what it complained about."""
        command = ["sh", "-c", script, "llambo", "user" if self.host.user else "system", *words]
        if self.host.address:
            command = [*SSH, self.host.address, shlex.join(command)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(within_s):
                out, complaint = await process.communicate(stdin.encode())
        except TimeoutError as error:
            raise LlamboError(Code.TIMEOUT, f"no answer within {within_s:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            told = complaint.decode("utf-8", "replace").strip().splitlines()
            raise LlamboError(Code.INTERNAL, told[-1] if told else f"it ended with status {process.returncode}")
        return out.decode("utf-8", "replace")


def _unit_name(name: str) -> str:
    return f"llambo-worker@{name}.service"


def _unit(block: str) -> tuple[str, Unit]:
    """A name, and how it is, of what `systemctl show` says."""
    told = dict(line.partition("=")[::2] for line in block.splitlines())
    name = told["Id"].removeprefix("llambo-worker@").removesuffix(".service")
    # One that is about to be begun again is the manager's affair.
    alive = told.get("ActiveState") in ("active", "activating", "reloading", "deactivating")
    how = f"ended: {told.get('Result', '')}, status {told.get('ExecMainStatus', '')}"
    return name, Unit(alive, int(told.get("MainPID") or 0), how)


def _quoted(value: str) -> str:
    """As EnvironmentFile= reads it."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`") + '"'
