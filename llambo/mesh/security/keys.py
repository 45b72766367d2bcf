"""The key of a peer: one line of text that carries all it needs to join a mesh.

    llambo-key-1.<base64 of: the broker's address, its public key, and the peer's name, role and key pair>

A setting (`--key`, `LLAMBO_KEY`) is the line itself, or the path of a file that contains it; systemd passes it as the
credential `llambo.key`. A file that others can read is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

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
#: Where systemd puts credentials, and the name of ours.
CREDENTIALS_ENV, CREDENTIAL = "CREDENTIALS_DIRECTORY", "llambo.key"
KEY_ENV = "LLAMBO_KEY"
#: A longer text is not a key.
_LONGEST = 4_096

T = TypeVar("T")
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
    line = _Line(key.address, key.broker, key.name, key.role, key.pair.public, key.pair.secret)
    return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(line)).decode().rstrip("=")


def from_line(text: str) -> PeerKey:
    packed = text.strip().removeprefix(PREFIX)
    try:
        if not text.strip().startswith(PREFIX) or len(packed) > _LONGEST:
            raise ValueError
        line = msgspec.json.decode(base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", True), type=_Line)
        if zmq.curve_public(line.secret.encode()).decode() != line.public:
            raise ValueError
        z85.decode(line.broker.encode())
    # KeyError and struct.error are raised by z85.
    except (ValueError, KeyError, struct.error, binascii.Error, msgspec.MsgspecError, zmq.ZMQError) as error:
        # The text is not repeated in the error: it may be most of a key.
        raise LlamboError(
            Code.BAD_SETTING, f"this is not a key: a key begins with {PREFIX!r} and is a single line"
        ) from error
    return PeerKey(line.address, line.broker, line.name, line.role, Pair(line.public, line.secret))


def read(path: Path) -> PeerKey:
    text = read_private(path)
    try:
        return from_line(text)
    except LlamboError as error:
        raise LlamboError(error.code, f"{path}: {error.text}") from error


def read_private(path: Path) -> str:
    """The text of a file. It is refused unless its owner is the only one who can read it."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                text = f"others can read or change {path}: chmod 600 {path}"
                raise LlamboError(Code.BAD_SETTING, text)
            # A keyring may have any length. What is no file might have no end.
            return file.read() if stat.S_ISREG(mode) else file.read(_LONGEST)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise LlamboError(Code.BAD_SETTING, f"{path} cannot be read: {why}") from error


def write(path: Path, key: PeerKey) -> None:
    write_private(path, to_line(key) + "\n", key, read)


def write_private(path: Path, text: str, value: T, read_back: Callable[[Path], T]) -> None:
    """Replace the file as a whole. It is never readable by others, not even for a moment.

    `value` is what `read_back` has to find in it. If that fails, the file stays as it is: a keyring that cannot be read
    is one from which nothing can be revoked.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # of a process with this number that has died: in a container all may have the same
    owner = path.parent.stat()
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            if os.geteuid() == 0:
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # for the user that the broker runs as
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if read_back(draft) != value:
            raise LlamboError(Code.BAD_SETTING, "something else is read than was written")
        draft.replace(path)
    except LlamboError as error:
        text = f"{path} was not changed: what was to be written could not be read again: {error}"
        raise LlamboError(Code.BAD_SETTING, text) from error
    finally:
        draft.unlink(missing_ok=True)


def find(setting: str, environ: Mapping[str, str]) -> PeerKey | None:
    """The key of the setting, or else systemd's credential; None if there is neither."""
    if setting.strip().startswith(PREFIX):
        return from_line(setting)
    if setting:
        return read(Path(setting).expanduser())
    folder = environ.get(CREDENTIALS_ENV)
    path = Path(folder, CREDENTIAL) if folder else None
    if path is None or not path.exists():
        return None
    # `read_private` would refuse it: systemd grants access by an access list, which looks like a readable group.
    text = path.read_text(encoding="utf-8")
    return from_line(text) if text.strip() else None  # a unit without keys passes an empty credential


def wanted(given: PeerKey | str | None, environ: Mapping[str, str]) -> PeerKey | None:
    """For programs: the key that they pass, "" for no key; None: the key of the environment."""
    if isinstance(given, PeerKey):
        return given
    if given == "":
        return None
    return find(environ.get(KEY_ENV, "") if given is None else given, environ)
