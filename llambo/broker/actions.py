"""What a broker orders its shell to do."""

from __future__ import annotations

import msgspec

from llambo.mesh.wire import messages as m


class ToClient(msgspec.Struct, frozen=True, gc=False):
    """Send on client control. Orders of one round to one route travel as one bundle."""

    route: bytes
    session: bytes
    message: m.Message


class ToWorker(msgspec.Struct, frozen=True, gc=False):
    """Send on worker control; a dispatch brings the prompt."""

    route: bytes
    session: bytes
    message: m.Message
    blob: bytes | None = None


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Publish frames on the token plane; each begins with the topic of a session."""

    frames: list[bytes]


Action = ToClient | ToWorker | Publish
