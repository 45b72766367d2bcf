"""The keys a broker knows: a folder that `llambo keys` keeps.

    broker.key      the broker's own key pair; brokers of one mesh share it
    keyring.json    public keys, with name, role, limits, and until when they are valid
    issued/NAME.key the keys themselves, for `llambo keys export`; no broker needs them

The files are 0600, and refused otherwise. They are replaced whole, so a broker that looks never sees half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from llambo.mesh.security import keys
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity, Pair, PeerKey

BROKER_FILE, RING_FILE, ISSUED = "broker.key", "keyring.json", "issued"
T = TypeVar("T")
#: What the name of a key may be: it is a file's and a worker's name too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class KeyEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One public key. A name may have two of them while it is rotated."""

    public: keys.Z85
    identity: Identity
    #: Seconds since 1970.
    made: Annotated[int, Meta(ge=0)] = 0
    #: Not valid from then on; 0: for ever.
    expires: Annotated[int, Meta(ge=0)] = 0

    def valid(self, now_s: float) -> bool:
        return not self.expires or now_s < self.expires


class Ring(msgspec.Struct, frozen=True):
    format: Annotated[int, Meta(ge=1, le=1)]
    #: Where the brokers are, as an exported key tells it.
    address: Annotated[str, Meta(max_length=1_024)]
    entries: list[KeyEntry] = []

    def identities(self, now_s: float) -> dict[str, Identity]:
        """Of the keys that are valid at this time, by public key."""
        return {entry.public: entry.identity for entry in self.entries if entry.valid(now_s)}

    def named(self, name: str) -> list[KeyEntry]:
        return [entry for entry in self.entries if entry.identity.name == name]


class _BrokerFile(msgspec.Struct, frozen=True):
    public: keys.Z85
    secret: keys.Z85


def default_folder(environ: Mapping[str, str]) -> Path:
    """Of root the machine's, of everybody else his own."""
    if os.geteuid() == 0:
        return Path("/etc/llambo/keys")
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/"), ".config"), "llambo", "keys")


class Folder:
    """Reads and changes one such folder. Each change is read, made and written under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / BROKER_FILE).exists()

    def broker(self) -> Pair:
        path = self.path / BROKER_FILE
        told = _decoded(path, _BrokerFile)
        return Pair(told.public, told.secret)

    def ring(self) -> Ring:
        return _decoded(self.path / RING_FILE, Ring)

    def stamp(self) -> tuple[int, int, int]:
        """Differs when the keyring was replaced."""
        there = (self.path / RING_FILE).stat()
        return there.st_mtime_ns, there.st_ino, there.st_size

    def begin(self, address: str) -> None:
        if self.exists:
            raise LlamboError(Code.BAD_SETTING, f"there are keys in {self.path} already")
        pair = keys.new_pair()
        keys.write_private(self.path / RING_FILE, _pretty(Ring(1, address)))
        keys.write_private(self.path / BROKER_FILE, _pretty(_BrokerFile(pair.public, pair.secret)))

    def add(self, identity: Identity, now_s: int, expires: int = 0) -> PeerKey:
        """A new key under a new name."""
        with self._changed() as (ring, put):
            if ring.named(identity.name):
                raise LlamboError(Code.BAD_SETTING, f"there is a key called {identity.name!r} already")
            return self._issue(ring, put, identity, now_s, expires)

    def revoke(self, name: str) -> int:
        """How many keys of this name there were."""
        with self._changed() as (ring, put):
            gone = self._named(ring, name)
            put.append(msgspec.structs.replace(ring, entries=[entry for entry in ring.entries if entry not in gone]))
            (self.path / ISSUED / f"{name}.key").unlink(missing_ok=True)
            return len(gone)

    def rotate(self, name: str, now_s: int, grace_s: int) -> PeerKey:
        """A new key under the same name. The old ones are valid for a while yet, so that peers can be told."""
        with self._changed() as (ring, put):
            newest = self._named(ring, name)[-1]
            until = now_s + grace_s
            entries = [
                msgspec.structs.replace(entry, expires=min(entry.expires or until, until))
                if entry.identity.name == name
                else entry
                for entry in ring.entries
            ]
            kept = msgspec.structs.replace(ring, entries=[entry for entry in entries if entry.valid(now_s)])
            return self._issue(kept, put, newest.identity, now_s, newest.expires)

    def export(self, name: str, address: str = "") -> PeerKey:
        """The key of this name, as it was issued here; for another address if that is wanted."""
        self._named(self.ring(), name)
        key = keys.read(self.path / ISSUED / f"{name}.key")
        return PeerKey(address or key.address, key.broker, key.name, key.role, key.pair)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile."""
        if not self.exists:
            raise LlamboError(Code.BAD_SETTING, f"there are no keys in {self.path}: llambo keys init")
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # --- inside --------------------------------------------------------------------------------------

    def _issue(self, ring: Ring, put: list[Ring], identity: Identity, now_s: int, expires: int) -> PeerKey:
        if not NAME.fullmatch(identity.name) or len(identity.name) > limits.NAME_CHARS:
            text = f"{identity.name!r} is no name for a key: letters, digits, and . _ @ - inside, 64 at most"
            raise LlamboError(Code.BAD_SETTING, text)
        key = PeerKey(ring.address, self.broker().public, identity.name, identity.role, keys.new_pair())
        put.append(
            msgspec.structs.replace(ring, entries=[*ring.entries, KeyEntry(key.pair.public, identity, now_s, expires)])
        )
        keys.write_private(self.path / ISSUED / f"{identity.name}.key", keys.to_line(key) + "\n")
        return key

    def _named(self, ring: Ring, name: str) -> list[KeyEntry]:
        found = ring.named(name)
        if not found:
            known = ", ".join(dict.fromkeys(entry.identity.name for entry in ring.entries)) or "none"
            raise LlamboError(Code.BAD_SETTING, f"no key is called {name!r}; there is: {known}")
        return found

    @contextmanager
    def _changed(self) -> Iterator[tuple[Ring, list[Ring]]]:
        """The ring as it is, and a list to put the one in that takes its place."""
        with self.locked():
            put: list[Ring] = []
            yield self.ring(), put
            if put:
                keys.write_private(self.path / RING_FILE, _pretty(put[-1]))


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(keys.read_private(path), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LlamboError(Code.BAD_SETTING, f"{path} is not what `llambo keys` has written: {error}") from error


def _pretty(value: msgspec.Struct) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
