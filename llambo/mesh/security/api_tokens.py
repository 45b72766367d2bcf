"""API tokens, which HTTP clients send in place of a key.

Each belongs to a name of the keyring and has the rights and limits of that name. Only hashes are stored, in
`tokens.json` beside the keyring; the token itself is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta

from llambo.mesh.security import keyring
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

PREFIX = "sk-llambo-"
FILE = "tokens.json"
_RANDOM_BYTES = 32
#: A longer text is not one of our tokens, and is not hashed.
_LONGEST = 128


class ApiToken(msgspec.Struct, frozen=True, omit_defaults=True):
    sha256: Annotated[str, Meta(min_length=64, max_length=64)]
    #: A name of the keyring.
    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    #: Seconds since 1970.
    made: Annotated[int, Meta(ge=0)] = 0
    #: From then on it is not valid, in seconds since 1970; 0: no expiry.
    expires: Annotated[int, Meta(ge=0)] = 0

    def valid(self, now_s: float) -> bool:
        return not self.expires or now_s < self.expires


class TokenFile(msgspec.Struct, frozen=True):
    format: Annotated[int, Meta(ge=1, le=1)]
    tokens: list[ApiToken] = []


def sha256_of(token: str) -> str:
    """The hash that is stored; empty if it cannot be a token. Tokens are long and random, so no salt is needed."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest() if len(token) <= _LONGEST else ""


def issue(folder: Folder, name: str, now_s: int, expires: int = 0) -> str:
    """A new token for a name that has a valid key of a client or an admin here."""
    entry = folder.newest(name)
    folder.issued(name)  # the gateway needs it; raises an error if it is not here
    if not entry.identity.may_ask:
        text = f"the key of {name} is for a worker, and the gateway admits clients and admins"
        raise LlamboError(Code.BAD_SETTING, text, hint="make another: llambo keys add NAME --role client")
    if not entry.valid(now_s):
        text = f"the key of {name} has expired"
        raise LlamboError(
            Code.BAD_SETTING, text, hint=f"make another: llambo keys revoke {name}, llambo keys add {name}"
        )
    token = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    with folder.locked():
        valid = [each for each in read(folder) if each.valid(now_s)]
        _write(folder, [*valid, ApiToken(sha256_of(token), name, now_s, expires)])
    return token


def withdraw(folder: Folder, name: str) -> int:
    """Remove all tokens of a name. Returns their number."""
    with folder.locked():
        found = read(folder)
        others = [each for each in found if each.name != name]
        if len(others) != len(found):
            _write(folder, others)
        return len(found) - len(others)


def read(folder: Folder) -> list[ApiToken]:
    path = folder.path / FILE
    return keyring.decoded(path, TokenFile).tokens if path.exists() else []


def _write(folder: Folder, tokens: list[ApiToken]) -> None:
    keyring.store(folder.path / FILE, TokenFile(1, tokens))
