"""Whether a connection is let in: the answer to ZeroMQ's question, which it asks before anything else is heard.

A key has to be in the keyring, valid, and of a role that has business at this door. Every other answer is no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llambo.mesh.wire.identity import CLIENT_DOMAIN, WORKER_DOMAIN, Identity

VERSION = b"1.0"
#: version, request id, domain, address, identity, mechanism, and the credentials: for CURVE the public key.
FRAMES = 7
_YES, _NO = b"200", b"400"


def answer(question: Sequence[bytes], public: str, identities: Mapping[str, Identity]) -> tuple[list[bytes], str]:
    """The frames of the reply, and why not, for the log. `public`: the key of the credentials, in letters."""
    number = question[1] if len(question) > 1 else b""
    why = _objection(question, identities.get(public))
    status, user = (_NO, b"") if why else (_YES, public.encode())
    return [VERSION, number, status, why.encode(), user, b""], why


def _objection(question: Sequence[bytes], who: Identity | None) -> str:
    if len(question) != FRAMES or question[0] != VERSION or question[5] != b"CURVE":
        return "not asked in a way that is known here"
    if who is None:
        return "this key is not known"
    if question[2] == CLIENT_DOMAIN.encode():
        return "" if who.may_ask else f"the key of {who.name} is for a worker"
    if question[2] == WORKER_DOMAIN.encode():
        return "" if who.may_serve else f"the key of {who.name} is not for a worker"
    return "there is no such door"
