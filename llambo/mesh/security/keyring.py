"""The keyring: a folder with the keys that a broker accepts, which `llambo keys` maintains.

    broker.key      the broker's own key pair; brokers of one mesh share it
    keyring.json    public keys, each with name, role, limits and expiry
    issued/NAME.key the keys of the peers, for `llambo keys export`; no broker needs them

The files have mode 0600; others are refused. They are replaced as a whole, so a broker never reads half of one.
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
#: Names of keys that an error lists.
SHOWN = 20
T = TypeVar("T")
#: Valid names of keys: they are names of files and of workers too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class KeyEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One public key. During a rotation a name has two of them."""

    public: keys.Z85
    identity: Identity
    #: Seconds since 1970.
    made: Annotated[int, Meta(ge=0)] = 0
    #: From then on it is not valid, in seconds since 1970; 0: no expiry.
    expires: Annotated[int, Meta(ge=0)] = 0

    def valid(self, now_s: float) -> bool:
        return not self.expires or now_s < self.expires


class Ring(msgspec.Struct, frozen=True):
    format: Annotated[int, Meta(ge=1, le=1)]
    #: The address of the brokers, for exported keys.
    address: Annotated[str, Meta(max_length=1_024)]
    entries: list[KeyEntry] = []

    def identities(self, now_s: float) -> dict[str, Identity]:
        """The identities of the keys that are valid at this time, by public key."""
        return {entry.public: entry.identity for entry in self.entries if entry.valid(now_s)}

    def named(self, name: str) -> list[KeyEntry]:
        return [entry for entry in self.entries if entry.identity.name == name]

    def names(self) -> str:
        """For an error: the names that there are, or the first of them and how many there are."""
        names = list(dict.fromkeys(entry.identity.name for entry in self.entries))
        some = f"the first of {len(names)} keys: " if len(names) > SHOWN else "existing keys: "
        return some + (", ".join(names[:SHOWN]) or "none")


class _BrokerFile(msgspec.Struct, frozen=True):
    public: keys.Z85
    secret: keys.Z85


def default_folder(environ: Mapping[str, str]) -> Path:
    """For root that of the machine, for other users their own."""
    if os.geteuid() == 0:
        return Path("/etc/llambo/keys")
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/"), ".config"), "llambo", "keys")


class Folder:
    """One such folder. A lock is held while it is read, changed and written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / BROKER_FILE).exists()

    def broker(self) -> Pair:
        path = self.path / BROKER_FILE
        found = decoded(path, _BrokerFile)
        return Pair(found.public, found.secret)

    def ring(self) -> Ring:
        return decoded(self.path / RING_FILE, Ring)

    def stamp(self) -> tuple[int, int, int]:
        """Changes when the keyring is replaced."""
        found = (self.path / RING_FILE).stat()
        return found.st_mtime_ns, found.st_ino, found.st_size

    def begin(self, address: str) -> None:
        if self.exists:
            hint = (
                f"a key for another address: llambo keys export NAME --address tcp://HOST:7330 --keys {self.path}\n"
                f"  to begin anew, which makes every key of it invalid, move {self.path} away"
            )
            raise LlamboError(Code.BAD_SETTING, f"{self.path} already has keys", hint=hint)
        pair = keys.new_pair()
        store(self.path / RING_FILE, Ring(1, address))
        store(self.path / BROKER_FILE, _BrokerFile(pair.public, pair.secret))

    def add(self, identity: Identity, now_s: int, expires: int = 0) -> PeerKey:
        """A new key under a new name."""
        with self.locked():
            ring = self.ring()
            if ring.named(identity.name):
                raise LlamboError(Code.BAD_SETTING, f"a key with the name {identity.name!r} exists already")
            return self._issue(ring, identity, now_s, expires)

    def revoke(self, name: str) -> int:
        """Remove the keys of this name. Returns their number."""
        with self.locked():
            ring = self.ring()
            gone = self._named(ring, name)
            (self.path / ISSUED / f"{name}.key").unlink(missing_ok=True)
            self._write(ring, [entry for entry in ring.entries if entry not in gone])
            return len(gone)

    def rotate(self, name: str, now_s: int, grace_s: int) -> PeerKey:
        """A new key under the same name. The old ones stay valid for `grace_s`, in which peers get the new one."""
        with self.locked():
            ring = self.ring()
            newest = self._named(ring, name)[-1]
            until = now_s + grace_s
            entries = [
                msgspec.structs.replace(entry, expires=min(entry.expires or until, until))
                if entry.identity.name == name
                else entry
                for entry in ring.entries
            ]
            valid = msgspec.structs.replace(ring, entries=[entry for entry in entries if entry.valid(now_s)])
            return self._issue(valid, newest.identity, now_s, newest.expires)

    def export(self, name: str, address: str = "") -> PeerKey:
        """The key of this name, as it was issued; with `address` for brokers at another address."""
        self._named(self.ring(), name)
        key = self.issued(name)
        return PeerKey(address or key.address, key.broker, key.name, key.role, key.pair)

    def newest(self, name: str) -> KeyEntry:
        return self._named(self.ring(), name)[-1]

    def issued(self, name: str) -> PeerKey:
        """The newest key of a name that is in the keyring, which is not read for it."""
        return keys.read(self.path / ISSUED / f"{name}.key")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the folder meanwhile."""
        if not self.exists:
            raise LlamboError(Code.BAD_SETTING, f"{self.path} has no keys; `llambo keys init` makes them")
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # --- inside --------------------------------------------------------------------------------------

    def _issue(self, ring: Ring, identity: Identity, now_s: int, expires: int) -> PeerKey:
        if not NAME.fullmatch(identity.name) or len(identity.name) > limits.NAME_CHARS:
            text = f"{identity.name!r} cannot be the name of a key: use letters, digits, and . _ @ - inside, 64 at most"
            raise LlamboError(Code.BAD_SETTING, text)
        key = PeerKey(ring.address, self.broker().public, identity.name, identity.role, keys.new_pair())
        keys.write(self.path / ISSUED / f"{identity.name}.key", key)
        self._write(ring, [*ring.entries, KeyEntry(key.pair.public, identity, now_s, expires)])
        return key

    def _named(self, ring: Ring, name: str) -> list[KeyEntry]:
        found = ring.named(name)
        if not found:
            raise LlamboError(Code.BAD_SETTING, f"no key has the name {name!r}; {ring.names()}")
        return found

    def _write(self, ring: Ring, entries: list[KeyEntry]) -> None:
        store(self.path / RING_FILE, msgspec.structs.replace(ring, entries=entries))


def decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(keys.read_private(path), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LlamboError(Code.BAD_SETTING, f"{path} was not written by `llambo keys`: {error}") from error


def store(path: Path, value: T) -> None:
    """Replace one of the folder's files, if what is written can be read again."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError as error:
        raise LlamboError(Code.BAD_SETTING, f"{path} was not changed: {error.object!r} is no Unicode text") from error
    keys.write_private(path, text + "\n", value, lambda draft: decoded(draft, type(value)))
