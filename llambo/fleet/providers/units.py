"""The provider `systemd`: nodes are instances of `llambo-worker@.service`, on this machine or, by ssh, on another one.

    DIR/worker-tiny-0001.env    what it is told, and in its first line what it was begun with
    DIR/worker-tiny-0001.key    its key, if the mesh has keys

DIR is where the units look (`llambo systemd install` has put them there): /etc/llambo, or a user's ~/.config/llambo.
The service manager does the rest: it begins them again when they die or the host is booted, it watches them, and it is
the one who knows what runs. Files are written whole, readable by nobody else from their first moment, and each by a
shell on the host itself, so that nothing secret stands in a command line.

    FOLDER/hosts/box.json       here, with whoever keeps the fleet: what a host has said last, and what was begun since

That is for the time when a host is away: what it had is not taken for gone, and no name is given a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llambo.fleet.model import Host
from llambo.fleet.providers.process import Failed, Record
from llambo.mesh.security.keys import KEY_ENV
from llambo.mesh.wire.errors import Code, LlamboError

#: What is asked quickly is answered within this.
ASK_S = 20.0
#: No password is asked for: who keeps a fleet is let in by a key.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=5", "ServerAliveCountMax=3")
SSH = ("ssh", *(word for option in _OPTIONS for word in ("-o", option)))
#: With this status ssh says that it was ssh that failed, and not what was to be run.
SSH_FAILED = 255
#: What only somebody with a terminal can mend.
_TO_SETTLE = ("verification failed", "Permission denied", "Too many authentication failures")
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
printf '%s\n' "$dir"
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
if ! ctl cat "$2" > /dev/null 2>&1; then
    echo "there are no units of llambo: llambo systemd install, and daemon-reload" >&2
    exit 1
fi
ctl enable --quiet llambo.target
ctl enable --quiet --now "$2"
if [ "$(ctl show --property=CPUWeight --value "$2")" != "$3" ]; then ctl set-property "$2" "CPUWeight=$3"; fi
"""
)
#: $2: the unit, $3: its name. All of it can be done again if it was broken off. Units may have been taken away
#: meanwhile, and one that has not failed has nothing to reset.
_END = (
    _BEGIN
    + """
if ctl cat "$2" > /dev/null 2>&1; then
    ctl disable --quiet --now "$2"
elif ctl is-active --quiet "$2"; then
    ctl stop "$2"
fi
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


class Away(LlamboError):
    """The host was not reached, or not to the end: what has become of it there is not known."""


@dataclass(frozen=True, slots=True)
class Unit:
    """How the service manager sees it."""

    alive: bool
    pid: int = 0
    how: str = ""
    #: It is not ready yet, for the first time or once more.
    starting: bool = False


class Units:
    """One host."""

    def __init__(self, fleet: str, host: Host, folder: Path) -> None:
        self.host = host
        self._first = f"{MARK} {fleet}: "
        self._memory = folder / "hosts" / f"{host.name}.json"
        self._remembered = self._recall()
        self._records = {record.name: record for record in self._remembered}
        #: Until it has been asked, they live for all we know.
        self._units: dict[str, Unit] = dict.fromkeys(self._records, Unit(True))
        #: Where its files are.
        self._dir = ""
        self._words: dict[str, str] = {}
        #: Those that something is being done to.
        self._changing: Counter[str] = Counter()
        #: Those that something was done to since it was asked last.
        self._touched: set[str] = set()
        #: Whether it was, to the end, whatever has come of it.
        self.asked = False
        #: Why it cannot be reached; then what was known of it last is all there is.
        self.problem = ""

    async def refresh(self) -> None:
        """Ask the host what there is."""
        self._touched = set(self._changing)
        try:
            said = await self._run(_LIST, within_s=ASK_S)
        except LlamboError as error:
            self.asked = True
            self.problem = f"it cannot be asked: {error.text}"
            return
        self.asked = True
        files, _, shown = said.partition("\n\n")
        self._dir, *lines = files.splitlines()
        try:
            found = [
                msgspec.json.decode(line.removeprefix(self._first), type=Record)
                for line in lines
                if line.startswith(self._first)
            ]
        except msgspec.MsgspecError as error:
            self.problem = f"a file of a worker in {self._dir} cannot be read: {error}"
            return
        self.problem = ""
        # What was begun while it was asked is not in its answer, and what was ended meanwhile still is.
        ours = self._touched
        self._records = {record.name: record for record in found if record.name not in ours} | {
            name: record for name, record in self._records.items() if name in ours
        }
        told = dict(_unit(block) for block in shown.split("\n\n") if "Id=" in block)
        self._units = {name: unit for name, unit in told.items() if name not in ours} | {
            name: unit for name, unit in self._units.items() if name in ours
        }
        self._remember()

    def records(self) -> list[Record]:
        return list(self._records.values())

    def pid(self, name: str) -> int | None:
        """None: the manager has given it up, or nobody has begun it since the host was booted."""
        unit = self._units.get(name)
        return unit.pid if unit is not None and unit.alive else None

    def starting(self, name: str) -> bool:
        unit = self._units.get(name)
        return unit is not None and unit.starting

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
        # Before anything is done there: whatever becomes of it, the name has been given.
        self._records[name] = record
        self._units[name] = Unit(True)
        self._remember()
        with self._at_work_on(name):
            try:
                await self._put(record, environ, key)
                await self._run(_START, _unit_name(name), str(cpu_weight), within_s=within_s)
            except Away as error:
                raise Failed(name, f"may or may not have started on {self.host.name}: {error.text}", "") from error
            except LlamboError as error:
                words, how = await self.fetch_words(name), f"did not start on {self.host.name}: {error.text}"
                try:
                    await self.end(name, ASK_S)
                except Failed as left:
                    how += f"; then it {left.how}"
                raise Failed(name, how, words) from error
        return name

    async def _put(self, record: Record, environ: Mapping[str, str], key: str) -> None:
        told = dict(environ)
        if key:
            file = f"worker-{record.name}.key"
            await self._run(_PUT, file, stdin=key, within_s=ASK_S)
            if self.host.user:
                # The manager of the machine passes it on as a credential; that of a user may not.
                told[KEY_ENV] = f"{self._dir}/{file}"
        lines = [self._first + msgspec.json.encode(record).decode(), *(f"{k}={_quoted(v)}" for k, v in told.items())]
        await self._run(_PUT, f"worker-{record.name}.env", stdin="\n".join(lines) + "\n", within_s=ASK_S)

    async def end(self, name: str, within_s: float) -> None:
        """SIGTERM lets it finish; the unit says how long the manager waits until it insists. Failed: it is still known,
        and can be ended again."""
        with self._at_work_on(name):
            try:
                await self._run(_END, _unit_name(name), name, within_s=within_s + ASK_S)
            except LlamboError as error:
                raise Failed(name, f"could not be ended on {self.host.name}: {error.text}", "") from error
            self._records.pop(name, None)
            self._units.pop(name, None)
            self._remember()

    # --- inside ----------------------------------------------------------------------------------------

    def _recall(self) -> list[Record]:
        try:
            return msgspec.json.decode(self._memory.read_bytes(), type=list[Record])
        except FileNotFoundError:
            return []
        except msgspec.MsgspecError as error:
            raise LlamboError(Code.INTERNAL, f"{self._memory} cannot be read: {error}") from error

    def _remember(self) -> None:
        known = self.records()
        if known == self._remembered:
            return
        self._memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._memory.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(known))
        draft.replace(self._memory)
        self._remembered = known

    @contextlib.contextmanager
    def _at_work_on(self, name: str) -> Iterator[None]:
        self._changing[name] += 1
        self._touched.add(name)
        try:
            yield
        finally:
            self._changing[name] -= 1
            self._changing += Counter()  # which leaves out those that are at nought

    async def _run(self, script: str, *words: str, stdin: str = "", within_s: float) -> str:
        """What it printed. Raises LlamboError with what it complained about."""
        command = ["sh", "-c", script, "llambo", "user" if self.host.user else "system", *words]
        if self.host.address:
            command = [*SSH, self.host.address, shlex.join(command)]
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise LlamboError(Code.INTERNAL, f"{command[0]} cannot be run: {error.strerror}") from error
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
            text = told[-1].strip() if told else f"it ended with status {process.returncode}"
            if not self.host.address or process.returncode != SSH_FAILED:
                raise LlamboError(Code.INTERNAL, text)
            if any(sign in text for sign in _TO_SETTLE):
                text = f"{text.rstrip('.')}: `ssh {self.host.address} true` has to work here without a question"
            raise Away(Code.TIMEOUT, text)
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
    return name, Unit(alive, int(told.get("MainPID") or 0), how, told.get("ActiveState") == "activating")


def _quoted(value: str) -> str:
    """As EnvironmentFile= reads it."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`") + '"'
