"""The key of a peer: one line of text that carries all it needs to join a mesh.

    llambo-key-1.<base64 of: the broker's address, its public key, and the peer's name, role and key pair>

It is given as itself or as a file that holds it: `--key`, `LLAMBO_KEY`, or systemd's credential `llambo.key`. A file
that others could read is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import zmq
from msgspec import Meta
from zmq.utils import z85

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Pair, PeerKey, Role

PREFIX = "llambo-key-1."
#: A public or secret key as ZeroMQ writes it (z85).
Z85_CHARS = 40
#: Where systemd puts credentials, and what ours is called.
CREDENTIALS_ENV, CREDENTIAL = "CREDENTIALS_DIRECTORY", "llambo.key"
KEY_ENV = "LLAMBO_KEY"
#: More is no key; and a path is never so long either.
_LONGEST = 4_096

Z85 = Annotated[str, Meta(min_length=Z85_CHARS, max_length=Z85_CHARS)]


class _Line(msgspec.Struct, frozen=True):
    address: Annotated[str, Meta(max_length=1_024)]
    broker: Z85
    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    role: Role
    public: Z85
    secret: Z85


def new_pair() -> Pair:
    public, secret = zmq.curve_keypair()
    return Pair(public.decode(), secret.decode())


def to_line(key: PeerKey) -> str:
    told = _Line(key.address, key.broker, key.name, key.role, key.pair.public, key.pair.secret)
    return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(told)).decode().rstrip("=")


def from_line(text: str) -> PeerKey:
    packed = text.strip().removeprefix(PREFIX)
    try:
        if not text.strip().startswith(PREFIX) or len(packed) > _LONGEST:
            raise ValueError
        told = msgspec.json.decode(base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", True), type=_Line)
        if zmq.curve_public(told.secret.encode()).decode() != told.public:
            raise ValueError
        z85.decode(told.broker.encode())
    # z85 has two more ways to say that it is none.
    except (ValueError, KeyError, struct.error, binascii.Error, msgspec.MsgspecError, zmq.ZMQError) as error:
        # What was there is not repeated: it may be most of a key.
        raise LlamboError(
            Code.BAD_SETTING, f"that is no key: one begins with {PREFIX!r} and is a single line"
        ) from error
    return PeerKey(told.address, told.broker, told.name, told.role, Pair(told.public, told.secret))


def read(path: Path) -> PeerKey:
    text = read_private(path)
    try:
        return from_line(text)
    except LlamboError as error:
        raise LlamboError(error.code, f"{path}: {error.text}") from error


def read_private(path: Path) -> str:
    """The text of a file that only its owner can read."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                text = f"others can read or change {path}: chmod 600 {path}"
                raise LlamboError(Code.BAD_SETTING, text)
            return file.read(1024 * 1024)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise LlamboError(Code.BAD_SETTING, f"{path} cannot be read: {why}") from error


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others, not for a moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    owner = path.parent.stat()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # root writes it for the user the broker runs as
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def find(setting: str, environ: Mapping[str, str]) -> PeerKey | None:
    """The key that is meant: the setting's, or systemd's credential if there is one. None: there is none."""
    if setting.strip().startswith(PREFIX):
        return from_line(setting)
    if setting:
        return read(Path(setting).expanduser())
    folder = environ.get(CREDENTIALS_ENV)
    path = Path(folder, CREDENTIAL) if folder else None
    if path is None or not path.exists():
        return None
    # Whom it is for is told by its access list, which looks like a group that can read.
    text = path.read_text(encoding="utf-8")
    return from_line(text) if text.strip() else None  # an empty one is how a unit says that there are no keys


def wanted(given: PeerKey | str | None, environ: Mapping[str, str]) -> PeerKey | None:
    """For programs: what they give, "" being none; and what their environment gives if they say nothing."""
    if isinstance(given, PeerKey):
        return given
    if given == "":
        return None
    return find(environ.get(KEY_ENV, "") if given is None else given, environ)
