"""The probes of `llambo doctor` for ports and brokers: what listens on this host, and whether a broker answers."""

from __future__ import annotations

import asyncio
import errno
import http.client
import os
import pwd
import shlex
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from llambo.cli.doctor.facts import BrokerFacts, PortFacts
from llambo.cli.kit.common import address_of, key_of, user_name
from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import ConnectionChange, LinkProblem, OpenControl
from llambo.mesh.security.keyring import ISSUED, default_folder
from llambo.mesh.wire import codec
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.naming import is_in_class
from llambo.mesh.wire.reports import MeshStatus, WorkerRow

if TYPE_CHECKING:
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

#: How long a TCP connection, or a handshake, may take.
CONNECT_S = 2.0
#: How long a broker may take to answer, if the setting does not say less.
ANSWER_MS = 5_000
#: States of a worker that gets no new work.
DRAINED = ("draining", "drained")
BROKER_UNIT = "/etc/systemd/system/llambo-broker.service"

# --- ports ---------------------------------------------------------------------------------------------


def look_at_ports(settings: Settings) -> tuple[PortFacts, ...]:
    owners = _Owners()
    return tuple(_port(role, host, port, command, owners) for role, host, port, command in _wanted(settings))


def _wanted(settings: Settings) -> Iterator[tuple[str, str, int, str]]:
    """What the services would listen on here, and a command that avoids it. Port 0 takes any free one."""
    base, bind = settings.number("port"), settings.text("bind")
    for number in range(base, base + 4) if base else ():
        yield "broker", bind, number, "llambo up --port 0"
    if port := settings.number("http_port"):
        yield "gateway", settings.text("http_bind"), port, "llambo up --http-port 0"
    if (port := settings.number("bridge_tcp")) > 0:
        yield "bridge", "127.0.0.1", port, "llambo bridge --tcp 0"
    if metrics := settings.text("metrics"):
        host, port = sockets.split(metrics)
        yield "metrics", host, port, f"llambo-broker --metrics {host}:0"


def _port(role: str, host: str, port: int, command: str, owners: _Owners) -> PortFacts:
    problem, in_use, elsewhere, owner, pid, ours = "", False, False, "", 0, False
    try:
        found = socket.getaddrinfo(host if host != "*" else None, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # It does not listen, so it is in the way of no service that starts now.
            tried.bind(address)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        problem = "is in use" if in_use else f"cannot be used: {error.strerror or error}"
        elsewhere = error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
        if in_use:
            owner, pid, ours = owners.of(port)
            ours = ours or (role == "gateway" and pid == 0 and is_gateway(host, port))
    return PortFacts(role, host, port, problem, in_use, elsewhere, owner, pid > 0, ours, command)


#: The dashboard, which every gateway serves.
GATEWAY_PAGE = b"<title>llambo</title>"


def is_gateway(host: str, port: int) -> bool:
    """Whether a gateway answers there: one of another user, whose process cannot be seen."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    local = sockets.split(sockets.local_endpoint(host, port))[0]
    for connection in (
        http.client.HTTPConnection(local, port, timeout=CONNECT_S),
        http.client.HTTPSConnection(local, port, timeout=CONNECT_S, context=unverified),
    ):
        try:
            connection.request("GET", "/")
            return GATEWAY_PAGE in connection.getresponse().read(64 * 1024)
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return False


class _Owners:
    """Which process listens on a port. Those of other users cannot be seen, but for root; their user can."""

    _LISTENS = "0A"

    def __init__(self) -> None:
        self._processes: dict[str, int] | None = None

    def of(self, port: int) -> tuple[str, int, bool]:
        """For people; its id, if this user can see it; and whether it is one of llambo's."""
        for uid, inode in self._listening(port):
            pid = self._by_inode().get(inode)
            if pid is None:
                return f"a process of {_user(uid)}", 0, False
            words = _words(pid)
            ours = any("llambo" in Path(word).name for word in words[:4])
            return f"{Path(words[0]).name if words else 'a process'} (pid {pid})", pid, ours
        return "", 0, False

    def _listening(self, port: int) -> Iterator[tuple[int, str]]:
        for name in ("tcp", "tcp6"):
            try:
                lines = Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:]
            except OSError:  # a kernel without IPv6
                continue
            for line in lines:
                fields = line.split()
                if fields[3] == self._LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    yield int(fields[7]), fields[9]

    def _by_inode(self) -> dict[str, int]:
        if self._processes is None:
            self._processes = dict(_sockets_of_processes())
        return self._processes


def _sockets_of_processes() -> Iterator[tuple[str, int]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            links = [str(entry.readlink()) for entry in (folder / "fd").iterdir()]
        except OSError:  # it has ended, or belongs to another user
            continue
        for link in links:
            if link.startswith("socket:["):
                yield link[len("socket:[") : -1], int(folder.name)


def _words(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.split("\0")


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


# --- brokers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asker:
    """Who asks, and how."""

    key: PeerKey | None
    #: A setting or the key names the address.
    configured: bool
    #: Where a broker on this host has its keys.
    folder: Path
    wait_ms: int


def look_at_brokers(settings: Settings, environ: Mapping[str, str]) -> tuple[BrokerFacts, ...]:
    """One of each address that clients and workers of this host use. None if their key cannot be used."""
    try:
        key = key_of(settings)
    except LlamboError:
        return ()  # the check of keys reports it
    named = settings.text("keys")
    asker = _Asker(
        key,
        configured=settings.sources["broker"] != "default" or key is not None,
        folder=Path(named).expanduser() if named else default_folder(environ),
        wait_ms=min(settings.number("connect_ms"), ANSWER_MS),
    )
    return tuple(_broker(host, port, asker) for host, port in sockets.split_all(address_of(settings, key)))


def _broker(host: str, port: int, asker: _Asker) -> BrokerFacts:
    found = BrokerFacts(
        sockets.endpoint(host, port),
        asker.configured,
        sockets.is_loopback(host) or host == socket.gethostname(),
        key=asker.key.name if asker.key else "",
    )
    try:
        ip = sockets.resolve(host)[0]
    except LlamboError as error:
        return replace(found, listens=False, code=error.code, error=error.text, command="llambo config --changed")
    if not _accepts(ip, port):
        text = f"no broker runs at {found.address}: {LinkProblem.NOT_LISTENING.value}"
        found = replace(found, listens=False, code=Code.NO_BROKER, error=text)
        return replace(found, command=_start(host, port, found, asker))
    serves = asker.key is not None and asker.key.role == "worker"
    refused = _handshake(ip, port, sockets.WORKER_OFFSET if serves else 0, asker)
    if refused is not None:
        known = refused in _ANSWERS.values()
        code = Code.UNAUTHORIZED if known else Code.NO_BROKER  # it may be another program
        text = f"{found.address} does not accept the connection: {_reason(refused, asker.key)}"
        return replace(found, code=code, error=text, command=_admission(refused, host, port, found, asker))
    closed = tuple(number for number in range(port + 1, port + 4) if not _accepts(ip, number))
    there = "" if found.on_this_host else f"ssh {host} "
    found = replace(found, closed=closed, command=f"{there}sudo ufw allow {port}:{port + 3}/tcp")
    if serves:
        return found  # a query is for clients
    try:
        seen, drained = asyncio.run(_status(sockets.endpoint(ip, port), asker))
    except LlamboError as error:
        text = f"{found.address}: {error.text.removesuffix(f'; {error.hint}')}"
        return replace(found, code=error.code, error=text, command=_start(host, port, found, asker))
    models = tuple(row.model for row in seen.models)
    variants = {row.model: row.variants for row in seen.models if row.variants and not is_in_class(row.model, models)}
    return replace(
        found, asked=True, workers=seen.workers, ready=seen.ready, models=models, variants=variants, drained=drained
    )


async def _status(address: str, asker: _Asker) -> tuple[MeshStatus, dict[str, str]]:
    """And the models all of whose workers are drained, with one of these."""
    wait_ms, key = asker.wait_ms, asker.key or ""
    async with Client(address, name="llambo doctor", connect_ms=wait_ms, query_ms=wait_ms, key=key) as client:
        seen = msgspec.convert(await client.query("status"), MeshStatus)
        return seen, all_drained(await client.workers() if seen.ready < seen.workers else [])


def all_drained(workers: Sequence[WorkerRow]) -> dict[str, str]:
    able = {model for row in workers if row.state not in DRAINED for model in row.models}
    drained = [(model, row.worker) for row in workers if row.state in DRAINED for model in row.models]
    found = {model: worker for model, worker in drained if model not in able}
    return {model: worker for model, worker in found.items() if not is_in_class(model, found)}


def _handshake(ip: str, port: int, offset: int, asker: _Asker) -> LinkProblem | None:
    """Why a connection is refused; None if it is not. Nothing is sent: the hello of a worker would announce it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = sockets.endpoint(ip, port)
    link = Link(context, address, token_kind=zmq.SUB, offset=offset, decoder=codec.to_client, key=asker.key)
    try:
        link.perform(OpenControl(0))
        assert link.monitor is not None, "an IP address is connected to at once"
        refused, until = LinkProblem.NO_ANSWER, time.monotonic() + asker.wait_ms / 1_000
        while link.monitor.poll(max(0, int((until - time.monotonic()) * 1_000))):
            for change in link.receive_changes():
                if change in _ANSWERS:
                    return _ANSWERS[change]
                # The socket tries again. Of two ends whose keys do not match, either may be the first to notice.
                refused, until = LinkProblem.NO_HANDSHAKE, min(until, time.monotonic() + CONNECT_S)
        return refused
    finally:
        link.close()
        context.destroy(linger=0)


_ANSWERS = {
    ConnectionChange.CONNECTED: None,
    ConnectionChange.KEY_DENIED: LinkProblem.KEY_DENIED,
    ConnectionChange.KEY_MISMATCH: LinkProblem.KEY_MISMATCH,
}


def _reason(refused: LinkProblem, key: PeerKey | None) -> str:
    if refused is LinkProblem.KEY_MISMATCH:
        return "it wants a key, and none was given" if key is None else "a key was given, and it has no keys"
    return str(refused.value)


def _accepts(ip: str, port: int) -> bool:
    try:
        with socket.create_connection((ip, port), CONNECT_S):
            return True
    except OSError:
        return False


def _start(host: str, port: int, found: BrokerFacts, asker: _Asker) -> str:
    """What makes a broker answer there."""
    if not found.on_this_host:
        return f"ssh {host} llambo doctor ports"
    if Path(BROKER_UNIT).exists():
        return "sudo systemctl restart llambo-broker"
    folder = f" --keys {shlex.quote(str(asker.folder))}" if asker.key else ""
    return f"llambo-broker{f' --port {port}' if port != sockets.DEFAULT_PORT else ''}{folder}"


def _admission(refused: LinkProblem, host: str, port: int, found: BrokerFacts, asker: _Asker) -> str:
    """What makes the broker accept this peer. What else may listen there is for the check of ports."""
    there = "" if found.on_this_host else f"ssh {host} "
    if refused not in _ANSWERS.values():
        return f"{there}llambo doctor ports"
    if refused is LinkProblem.KEY_MISMATCH and asker.key is not None:
        return _start(host, port, found, asker)
    admin = asker.folder / ISSUED / "admin.key"
    if asker.key is None and found.on_this_host and os.access(admin, os.R_OK):
        return f"export LLAMBO_KEY={shlex.quote(str(admin))}"
    role, name = (asker.key.role, asker.key.name) if asker.key else ("client", user_name())
    return f"{there}llambo keys add {name} --role {role}"
