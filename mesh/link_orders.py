"""What a link orders its shell to do."""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh import messages as m


@dataclass(frozen=True, slots=True)
class OpenControl:
    """Close whatever this link has open, then connect a fresh control socket to this one of its brokers."""

    link: int
    target: int = 0


@dataclass(frozen=True, slots=True)
class OpenTokens:
    """Connect a fresh token socket to this port of the same host; replace the old one."""

    link: int
    port: int
    topic: bytes


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close both sockets; what was just sent may still leave."""

    link: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send on control, under this session id. Orders of one round travel as one bundle."""

    link: int
    session: bytes
    message: m.Message
    blob: bytes | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish frames on the token plane."""

    link: int
    frames: list[bytes]


LinkOrder = OpenControl | OpenTokens | CloseLink | Send | Publish
