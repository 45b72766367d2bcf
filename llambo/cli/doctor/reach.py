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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from llambo.cli.doctor.facts import BrokerFacts, PortFacts
from llambo.cli.kit.common import address_of, key_of
from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import ConnectionChange, LinkProblem, OpenControl
from llambo.mesh.security.keyring import ISSUED, default_folder
from llambo.mesh.wire import codec
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

#: How long a TCP connection, or a handshake, may take.
CONNECT_S = 2.0
#: How long a broker may take to answer, if the setting does not say less.
ANSWER_MS = 5_000
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
    problem, owner, pid, ours = "", "", 0, False
    try:
        found = socket.getaddrinfo(host if host != "*" else None, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # It does not listen, so it is in the way of no service that starts now.
            tried.bind(address)
    except OSError as error:
        problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            owner, pid, ours = owners.of(port)
            ours = ours or (role == "gateway" and pid == 0 and is_gateway(host, port))
    return PortFacts(role, host, port, problem, owner, pid > 0, ours, command)


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


def look_at_brokers(settings: Settings, environ: Mapping[str, str]) -> tuple[BrokerFacts, ...]:
    """One of each address that clients and workers of this host use. None if their key cannot be used."""
    try:
        key = key_of(settings)
    except LlamboError:
        return ()  # the check of keys reports it
    configured = settings.sources["broker"] != "default" or key is not None
    return tuple(
        _broker(host, port, key, configured, min(settings.number("connect_ms"), ANSWER_MS), environ)
        for host, port in sockets.split_all(address_of(settings, key))
    )


def _broker(
    host: str, port: int, key: PeerKey | None, configured: bool, wait_ms: int, environ: Mapping[str, str]
) -> BrokerFacts:
    address, here = sockets.endpoint(host, port), sockets.is_loopback(host) or host == socket.gethostname()
    name = key.name if key else ""
    try:
        ip = sockets.resolve(host)[0]
    except LlamboError as error:
        return BrokerFacts(
            address, configured, here, False, error.code.value, error.text, "llambo config --changed", name
        )
    listens = _accepts(ip, port)
    seen: dict[str, Any] = {}
    try:
        if not listens:
            raise LlamboError(Code.NO_BROKER, f"no broker runs at {address}: {LinkProblem.NOT_LISTENING.value}")
        if key is not None and key.role == "worker":
            _shake_hands(sockets.endpoint(ip, port), key)
        else:
            seen = asyncio.run(_status(sockets.endpoint(ip, port), key, wait_ms))
    except LlamboError as error:
        text = error.text.removesuffix(f"; {error.hint}").replace(sockets.endpoint(ip, port), address)
        command = _remedy(error.code, host, port, key, here, listens, environ)
        return BrokerFacts(address, configured, here, listens, error.code.value, text, command, name)
    closed = tuple(number for number in range(port + 1, port + 4) if not _accepts(ip, number))
    return BrokerFacts(
        address, configured, here, key=name, closed=closed,
        command=f"sudo ufw allow {port}:{port + 3}/tcp" if here else f"ssh {host} sudo ufw allow {port}:{port + 3}/tcp",
        workers=int(seen.get("workers", 0)), ready=int(seen.get("ready", 0)),
        models=tuple(str(each.get("model", "")) for each in seen.get("models", ())),
    )  # fmt: skip


async def _status(address: str, key: PeerKey | None, wait_ms: int) -> dict[str, Any]:
    async with Client(address, name="llambo doctor", connect_ms=wait_ms, query_ms=wait_ms, key=key or "") as client:
        found: dict[str, Any] = await client.query("status")
        return found


def _shake_hands(address: str, key: PeerKey) -> None:
    """A worker's key is accepted at the port for workers only. A hello would announce a worker, so none is sent."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link(context, address, token_kind=zmq.XPUB, offset=sockets.WORKER_OFFSET, decoder=codec.to_worker, key=key)
    try:
        link.perform(OpenControl(0))
        assert link.monitor is not None, "an IP address is connected to at once"
        while link.monitor.poll(int(CONNECT_S * 1_000)):
            for change in link.receive_changes():
                if change is ConnectionChange.CONNECTED:
                    return
                if change is ConnectionChange.KEY_DENIED:
                    raise LlamboError(Code.UNAUTHORIZED, LinkProblem.KEY_DENIED.value)
                if change is ConnectionChange.KEY_MISMATCH:
                    raise LlamboError(Code.UNAUTHORIZED, LinkProblem.KEY_MISMATCH.value)
                why = LinkProblem.NOT_LISTENING
                if change is ConnectionChange.HANDSHAKE_FAILED:
                    why = LinkProblem.NO_HANDSHAKE
                raise LlamboError(Code.NO_BROKER, f"no broker answers workers at {address}: {why.value}")
        raise LlamboError(Code.NO_BROKER, f"no broker answers workers at {address}: {LinkProblem.NO_ANSWER.value}")
    finally:
        link.close()
        context.destroy(linger=0)


def _accepts(ip: str, port: int) -> bool:
    try:
        with socket.create_connection((ip, port), CONNECT_S):
            return True
    except OSError:
        return False


def _remedy(
    code: Code, host: str, port: int, key: PeerKey | None, here: bool, listens: bool, environ: Mapping[str, str]
) -> str:
    """What helps against this error. A broker that wants a key may look like one that does not answer."""
    there = "" if here else f"ssh {host} "
    if code in (Code.UNAUTHORIZED, Code.FORBIDDEN) or listens:
        admin = default_folder(environ) / ISSUED / "admin.key"
        if key is None and here and os.access(admin, os.R_OK):
            return f"export LLAMBO_KEY={shlex.quote(str(admin))}"
        role, name = (key.role, key.name) if key else ("client", "NAME")
        return f"{there}llambo keys add {name} --role {role}"
    if not here:
        return f"{there}llambo doctor ports"
    if Path(BROKER_UNIT).exists():
        return "sudo systemctl start llambo-broker"
    folder = f" --keys {default_folder(environ)}" if key else ""
    return f"llambo-broker{f' --port {port}' if port != sockets.DEFAULT_PORT else ''}{folder}"
