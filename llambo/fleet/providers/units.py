"""The provider `systemd`: nodes are instances of `llambo-worker@.service`, on this machine or, by ssh, on another one.

    DIR/worker-tiny-0001.env    its settings, and in the first line what it was started with
    DIR/worker-tiny-0001.key    its key, if the mesh has keys

DIR is where the units look for settings: /etc/llambo, or a user's ~/.config/llambo (`llambo systemd install` writes the
units). The service manager does the rest: it restarts nodes that die and starts them when the host boots, it watches
them, and it knows what runs. Files are written atomically, with access for the owner only, by a shell on the host
itself, so that no secret is part of a command line.

    FOLDER/hosts/box.json       on the machine that manages the fleet: the last answer of a host, and what was started
                                there since

That is for the time when a host is away: its nodes do not count as ended, and no name is used twice.
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

from llambo.fleet.model import Host, NodeFailed, NodeRecord
from llambo.mesh.security.keys import KEY_ENV
from llambo.mesh.wire.errors import Code, LlamboError

#: The limit for a command that only asks, or writes a file.
ASK_S = 20.0
#: Never ask for a password: access is by an ssh key.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=5", "ServerAliveCountMax=3")
SSH = ("ssh", *(word for option in _OPTIONS for word in ("-o", option)))
#: ssh exits with this status if ssh itself failed, and not the command.
SSH_FAILED = 255
#: In messages of ssh, which has no codes for them: errors that only a person at a terminal can resolve.
_NEEDS_PERSON = ("verification failed", "Permission denied", "Too many authentication failures")
MARK = "# llambo fleet"

#: $1: system or user. Defines `ctl`, the systemctl for it, and $dir, where its files are.
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
#: $2: name of the file. It gets the content of stdin, atomically.
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
    echo "the units of llambo are missing: llambo systemd install, and daemon-reload" >&2
    exit 1
fi
ctl enable --quiet llambo.target
ctl enable --quiet --now "$2"
if [ "$(ctl show --property=CPUWeight --value "$2")" != "$3" ]; then ctl set-property "$2" "CPUWeight=$3"; fi
"""
)
#: $2: the unit, $3: its name. It can be repeated after an interruption. The unit file may have been removed since, and
#: reset-failed fails for a unit that has not failed.
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
_LOG = (
    _BEGIN
    + """
if [ "$1" = user ]; then unit=--user-unit; else unit=--unit; fi
journalctl "$unit=$2" --lines=20 --output=cat --no-pager
"""
)


class HostUnreachable(LlamboError):
    """The host was not reached, or the connection broke: whether the command was carried out is not known."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit, as the service manager reports it."""

    alive: bool
    pid: int = 0
    how: str = ""
    #: It has been started or restarted and is not ready yet.
    starting: bool = False


class Units:
    """The nodes on one host."""

    def __init__(self, fleet: str, host: Host, folder: Path) -> None:
        self.host = host
        self._first = f"{MARK} {fleet}: "
        self._cache = folder / "hosts" / f"{host.name}.json"
        self._cached = self._read_cache()
        self._records = {record.name: record for record in self._cached}
        #: Until the host has answered they count as running.
        self._units: dict[str, Unit] = dict.fromkeys(self._records, Unit(True))
        #: Where its files are, as the host reports it.
        self._dir = ""
        self._log_tails: dict[str, str] = {}
        #: Nodes that are being started or ended.
        self._changing: Counter[str] = Counter()
        #: Nodes that were being started or ended at some time since the last question.
        self._touched: set[str] = set()
        #: A question has been answered, or has failed.
        self.asked = False
        #: Why it cannot be asked; then the last answer is used. Empty: it can.
        self.problem = ""

    async def refresh(self) -> None:
        """Ask the host what there is."""
        self._touched = set(self._changing)
        try:
            answer = await self._run(_LIST, within_s=ASK_S)
        except LlamboError as error:
            self.asked = True
            self.problem = f"it cannot be asked: {error.text}"
            return
        self.asked = True
        files, _, shown = answer.partition("\n\n")
        self._dir, *lines = files.splitlines()
        try:
            found = [
                msgspec.json.decode(line.removeprefix(self._first), type=NodeRecord)
                for line in lines
                if line.startswith(self._first)
            ]
        except msgspec.MsgspecError as error:
            self.problem = f"a file of a worker in {self._dir} cannot be read: {error}"
            return
        self.problem = ""
        # A node that was started while the host was asked may be missing in its answer, and one that was ended in it.
        ours = self._touched
        self._records = {record.name: record for record in found if record.name not in ours} | {
            name: record for name, record in self._records.items() if name in ours
        }
        found_units = dict(_unit(block) for block in shown.split("\n\n") if "Id=" in block)
        self._units = {name: unit for name, unit in found_units.items() if name not in ours} | {
            name: unit for name, unit in self._units.items() if name in ours
        }
        self._write_cache()

    def records(self) -> list[NodeRecord]:
        return list(self._records.values())

    def pid(self, name: str) -> int | None:
        """None: the service manager has given it up, or it was not started since the host booted."""
        unit = self._units.get(name)
        return unit.pid if unit is not None and unit.alive else None

    def starting(self, name: str) -> bool:
        unit = self._units.get(name)
        return unit is not None and unit.starting

    def how_it_ended(self, name: str) -> str:
        unit = self._units.get(name)
        return unit.how if unit is not None else "ended"

    def log_tail(self, name: str) -> str:
        """As it was fetched last."""
        return self._log_tails.get(name, "")

    async def fetch_log_tail(self, name: str) -> str:
        try:
            self._log_tails[name] = await self._run(_LOG, _unit_name(name), within_s=ASK_S)
        except LlamboError as error:
            self._log_tails[name] = f"(its journal cannot be read: {error.text})"
        return self._log_tails[name]

    async def spawn(
        self, record: NodeRecord, environ: Mapping[str, str], key: str, cpu_weight: int, within_s: float
    ) -> str:
        """Returns its name when it has reported to the service manager that it is ready."""
        name = record.name
        # Before the host is asked to do anything: the name is used from now on, whatever happens.
        self._records[name] = record
        self._units[name] = Unit(True)
        self._write_cache()
        with self._changing_node(name):
            try:
                await self._put(record, environ, key)
                await self._run(_START, _unit_name(name), str(cpu_weight), within_s=within_s)
            except HostUnreachable as error:
                raise NodeFailed(name, f"may or may not have started on {self.host.name}: {error.text}", "") from error
            except LlamboError as error:
                log_tail, how = await self.fetch_log_tail(name), f"did not start on {self.host.name}: {error.text}"
                try:
                    await self.end(name, ASK_S)
                except NodeFailed as remaining:
                    how += f"; then it {remaining.how}"
                raise NodeFailed(name, how, log_tail) from error
        return name

    async def _put(self, record: NodeRecord, environ: Mapping[str, str], key: str) -> None:
        variables = dict(environ)
        if key:
            file = f"worker-{record.name}.key"
            await self._run(_PUT, file, stdin=key, within_s=ASK_S)
            if self.host.user:
                # Only the system manager can pass it on as a credential.
                variables[KEY_ENV] = f"{self._dir}/{file}"
        first = self._first + msgspec.json.encode(record).decode()
        lines = [first, *(f"{name}={_quoted(value)}" for name, value in variables.items())]
        await self._run(_PUT, f"worker-{record.name}.env", stdin="\n".join(lines) + "\n", within_s=ASK_S)

    async def end(self, name: str, within_s: float) -> None:
        """SIGTERM, on which it finishes; the unit limits the time. After NodeFailed the node is still known, and can be
        ended again."""
        with self._changing_node(name):
            try:
                await self._run(_END, _unit_name(name), name, within_s=within_s + ASK_S)
            except LlamboError as error:
                raise NodeFailed(name, f"could not be ended on {self.host.name}: {error.text}", "") from error
            self._records.pop(name, None)
            self._units.pop(name, None)
            self._write_cache()

    # --- inside ----------------------------------------------------------------------------------------

    def _read_cache(self) -> list[NodeRecord]:
        try:
            return msgspec.json.decode(self._cache.read_bytes(), type=list[NodeRecord])
        except FileNotFoundError:
            return []
        except msgspec.MsgspecError as error:
            raise LlamboError(Code.INTERNAL, f"{self._cache} cannot be read: {error}") from error

    def _write_cache(self) -> None:
        known = self.records()
        if known == self._cached:
            return
        self._cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._cache.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(known))
        draft.replace(self._cache)
        self._cached = known

    @contextlib.contextmanager
    def _changing_node(self, name: str) -> Iterator[None]:
        self._changing[name] += 1
        self._touched.add(name)
        try:
            yield
        finally:
            self._changing[name] -= 1
            self._changing += Counter()  # removes the zero counts

    async def _run(self, script: str, *words: str, stdin: str = "", within_s: float) -> str:
        """What it printed. Raises LlamboError with its last line on stderr."""
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
                out, err = await process.communicate(stdin.encode())
        except TimeoutError as error:
            raise LlamboError(Code.TIMEOUT, f"no answer within {within_s:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            lines = err.decode("utf-8", "replace").strip().splitlines()
            text = lines[-1].strip() if lines else f"it ended with status {process.returncode}"
            if not self.host.address or process.returncode != SSH_FAILED:
                raise LlamboError(Code.INTERNAL, text)
            if any(sign in text for sign in _NEEDS_PERSON):
                text = f"{text.rstrip('.')}: `ssh {self.host.address} true` has to work here without a prompt"
            raise HostUnreachable(Code.TIMEOUT, text)
        return out.decode("utf-8", "replace")


def _unit_name(name: str) -> str:
    return f"llambo-worker@{name}.service"


def _unit(block: str) -> tuple[str, Unit]:
    """A node's name and its unit, from a block of `systemctl show`."""
    shown = dict(line.partition("=")[::2] for line in block.splitlines())
    name = shown["Id"].removeprefix("llambo-worker@").removesuffix(".service")
    # One that waits for its restart is `activating`: the service manager handles it.
    alive = shown.get("ActiveState") in ("active", "activating", "reloading", "deactivating")
    how = f"ended: {shown.get('Result', '')}, status {shown.get('ExecMainStatus', '')}"
    return name, Unit(alive, int(shown.get("MainPID") or 0), how, shown.get("ActiveState") == "activating")


def _quoted(value: str) -> str:
    """As EnvironmentFile= reads it."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`") + '"'
