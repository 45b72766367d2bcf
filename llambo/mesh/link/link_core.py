"""How a peer joins a broker and stays joined: the core that worker and client share.

A link is one control socket and one token socket to one broker, and each may die alone. So nobody
sleeps and hopes: a beat goes out on both planes, and what comes back says which of them works.

    worker   publishes beat n on the token plane; the broker echoes the last one it saw on control
    client   receives beat n on control and on the token plane, and echoes the latter on control

The first proof makes the link UP. Three missing ones make it MENDING: the token socket is rebuilt, and
until that helps everything is served by REPLAY over control. A silent control plane or an unknown session
takes the link DOWN, and a new one is opened on fresh sockets.

Where there is somewhere else to go (a client that knows several brokers, a worker whose runs another broker may adopt)
a link does not wait for a lease: a connection that breaks and is not to be had again at once is a broker that is gone.
A client then goes to the next broker; a worker has one link to each, and tries the same one again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.timers import NEVER_MS

# --- What a link orders its shell to do. ---


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


__all__ = [
    "LINK_STEPS", "CloseLink", "LinkCore", "LinkOrder", "LinkState", "OpenControl", "OpenTokens", "Publish",
    "Send", "Sign",
]  # fmt: skip


class LinkState(enum.Enum):
    DOWN = "down"
    GREETING = "greeting"
    JOINING = "joining"
    UP = "up"
    MENDING = "mending"
    CLOSED = "closed"


#: Every legal step. The diagram in ARCHITECTURE.md is drawn from this table.
LINK_STEPS: dict[LinkState, dict[LinkState, str]] = {
    LinkState.DOWN: {LinkState.GREETING: "back-off over", LinkState.CLOSED: "left"},
    LinkState.GREETING: {
        LinkState.JOINING: "welcome",
        LinkState.DOWN: "no answer or refused",
        LinkState.CLOSED: "left",
    },
    LinkState.JOINING: {
        LinkState.UP: "first token-plane proof",
        LinkState.MENDING: "no proof in time",
        LinkState.DOWN: "lease out or unknown session",
        LinkState.CLOSED: "left",
    },
    LinkState.UP: {
        LinkState.MENDING: "three proofs missing",
        LinkState.DOWN: "lease out or unknown session",
        LinkState.CLOSED: "left",
    },
    LinkState.MENDING: {
        LinkState.UP: "proof",
        LinkState.DOWN: "lease out or unknown session",
        LinkState.CLOSED: "left",
    },
    LinkState.CLOSED: {},
}

#: Token-plane beats that may be missing before the plane counts as down.
MISSING_BEATS = 3
#: How long a hello may stay unanswered before it is said again, and before the sockets are replaced.
HELLO_AGAIN_MS = 500
GREETING_MS = 5_000
#: The pause before a new try: doubles from the first to the last.
BACKOFF_MS = (100, 2_000)
#: Who can go elsewhere does so when a connection was broken for this long, when a broker said nothing for so long,
#: and when it has not answered a hello by then (which doubles with each round, up to `GREETING_MS`).
CUT_MS = 300
SILENT_MS = 2_000
TRY_MS = 1_000
#: At least so long between two beats, however much there is to tell.
SOON_MS = 20


class Sign(enum.Enum):
    """What is seen of the control connection."""

    CONNECTED = "connected"
    CUT = "cut"  # it was there, and is not any more; the socket tries to have it back
    REFUSED = "refused"  # such a try has failed: nobody is there
    BROKEN_OFF = "broken off"  # somebody is there, who does not shake hands with us
    DENIED = "denied"  # the broker does not take the key
    UNLIKE = "unlike"  # one of both has keys, and the other has not


_DENIALS = {
    Sign.DENIED: "the broker does not take this key: it is unknown there, has expired, or is for another role",
    Sign.UNLIKE: "the broker wants a key and none was given, or one was given and the broker has no keys",
}


#: With keys it looks like this when the other end is the first to see that they do not match.
BROKEN_OFF = "whoever listens there does not shake hands: it is no broker, or it wants a key, or another key"


class LinkCore:
    """One link. Its owner passes on what arrives and calls `tick`; orders are appended to `out`."""

    def __init__(self, link: int, hello: Callable[[], m.Message], out: list[LinkOrder], *, hasty: bool = False) -> None:
        """`hasty`: when its broker is gone there is something to be done at once."""
        self.link = link
        self.state = LinkState.DOWN
        self.session = NO_SESSION
        self.broker = ""
        self.problem: str = ""
        #: The last try failed for want of the right key: another one with the same will, too.
        self.denied = False
        #: The broker sends no page that it was not asked for.
        self.pull = False
        self.heartbeat_ms = 200
        self.lease_ms = 2_000
        self.beat = 0  # workers: the last number published; clients: the last number seen
        self.heard_ms = 0
        self.sessions = 0
        #: Tries so far: a hello that is said again within one of them has to say the same.
        self.greetings = 0
        #: How many brokers there are to choose from, and which of them it is now.
        self.choices = 1
        self.target = 0
        self._hello = hello
        self._out = out
        self._is_hasty = hasty
        self._failed = 0
        self._cut_at = NEVER_MS
        self._port = 0
        self._topic = b""
        self._proof_after = 0
        self._retry_at = 0
        self._hello_at = 0
        self._beat_at = 0
        self._beaten_at = 0
        self._backoff = BACKOFF_MS[0]
        self._since = 0

    @property
    def welcomed(self) -> bool:
        """The control plane works: requests can be made, if need be served by REPLAY."""
        return self.state in (LinkState.JOINING, LinkState.UP, LinkState.MENDING)

    @property
    def up(self) -> bool:
        return self.state is LinkState.UP

    @property
    def _hasty(self) -> bool:
        return self._is_hasty or self.choices > 1

    @property
    def _patience_ms(self) -> int:
        """How long a broker may be silent."""
        if self.choices == 1:
            return self.lease_ms
        return min(self.lease_ms, max(SILENT_MS, 10 * self.heartbeat_ms))

    @property
    def _greeting_ms(self) -> int:
        if self.choices == 1:
            return GREETING_MS
        return min(TRY_MS << min(self._failed // self.choices, 8), GREETING_MS)

    # --- what arrives ------------------------------------------------------------------------------

    def on_found(self, choices: int) -> None:
        """So many brokers are known now."""
        self.choices = max(1, choices)

    def on_connection(self, sign: Sign, now_ms: int) -> None:
        if sign is Sign.CONNECTED:
            self._cut_at = NEVER_MS
        elif self.state is LinkState.GREETING:
            if sign in _DENIALS:
                self.problem, self.denied = _DENIALS[sign], True
                self._down(now_ms)
            elif sign is Sign.BROKEN_OFF:
                self.problem = BROKEN_OFF
            elif sign is Sign.REFUSED and self.choices > 1:
                self.problem = "nobody listens there"
                self._down(now_ms)
        elif self.welcomed and self._hasty:
            if sign is Sign.CUT:
                self._cut_at = min(self._cut_at, now_ms)
            elif self._cut_at != NEVER_MS:
                self.problem = "the broker is gone"
                self._down(now_ms)

    def on_welcome(self, welcome: m.Welcome, now_ms: int) -> bool:
        """True if it opened a new session."""
        if self.state is not LinkState.GREETING:
            return False  # an answer to a hello that was said twice
        self._step(LinkState.JOINING, now_ms)
        self.session, self.broker = welcome.session, welcome.broker
        self.heartbeat_ms, self.lease_ms = max(welcome.heartbeat_ms, 10), max(welcome.lease_ms, 50)
        self.heard_ms = now_ms
        self.pull = welcome.pull
        self.sessions += 1
        self._backoff = BACKOFF_MS[0]
        self._failed, self._cut_at = 0, NEVER_MS
        self._port, self._topic = welcome.token_port, welcome.topic
        self._beat_at = now_ms
        self._proof_after = self.beat = 0
        self._out.append(OpenTokens(self.link, self._port, self._topic))
        return True

    def on_control(self, session: bytes, now_ms: int) -> bool:
        """Every control message proves that the broker lives. False: it belongs to an earlier session."""
        if session != self.session:
            return False
        self.heard_ms = now_ms
        return True

    def on_proof(self, number: int, now_ms: int) -> None:
        """The token plane works: the broker saw our beat `number` (worker), or we saw its beat (client)."""
        if number > self._proof_after and self.state in (LinkState.JOINING, LinkState.MENDING):
            self._step(LinkState.UP, now_ms)

    def on_missing(self, behind: int, now_ms: int) -> None:
        """The token plane is `behind` beats behind the control plane."""
        late = behind > MISSING_BEATS
        if late and self.state in (LinkState.JOINING, LinkState.UP):
            self._step(LinkState.MENDING, now_ms)
            self._rebuild(now_ms)
        elif late and now_ms - self._since >= 5 * self.heartbeat_ms * MISSING_BEATS and self.state is LinkState.MENDING:
            self._rebuild(now_ms)

    def on_refused(self, text: str, now_ms: int, *, again: bool = False) -> None:
        """The broker does not want this peer, or (`again`) does not know this session: then it is there, and young."""
        self.problem = text
        self._down(now_ms, again=again)

    # --- time --------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> bool:
        """True when a heartbeat is due: the owner composes it, for only the owner knows what it carries."""
        match self.state:
            case LinkState.DOWN if now_ms >= self._retry_at:
                self._step(LinkState.GREETING, now_ms)
                self.greetings += 1
                self.denied = False
                self._out.append(OpenControl(self.link, self.target))
                self._greet(now_ms)
            case LinkState.GREETING if now_ms - self._since >= self._greeting_ms:
                self.problem = self.problem or "no answer"
                self._down(now_ms)
            case LinkState.GREETING if now_ms >= self._hello_at:
                self._greet(now_ms)
            case LinkState.JOINING | LinkState.UP | LinkState.MENDING:
                if now_ms - self.heard_ms >= self._patience_ms:
                    self.problem = f"the broker was silent for {self._patience_ms} ms"
                    if self.choices > 1:
                        # We will not be back soon. If it can hear that, it need not wait for our lease.
                        self.send(m.Goodbye(self.problem))
                    self._down(now_ms)
                elif now_ms - self._cut_at >= CUT_MS:
                    self.problem = f"the connection was gone for {CUT_MS} ms"
                    self._down(now_ms)
                elif now_ms >= self._beat_at:
                    self._beat_at, self._beaten_at = now_ms + self.heartbeat_ms, now_ms
                    return True
            case _:
                pass
        return False

    def next_wakeup_ms(self) -> int:
        match self.state:
            case LinkState.DOWN:
                return self._retry_at
            case LinkState.GREETING:
                return min(self._hello_at, self._since + self._greeting_ms)
            case LinkState.CLOSED:
                return NEVER_MS
            case _:
                return min(self._beat_at, self.heard_ms + self._patience_ms, self._cut_at + CUT_MS)

    def beat_now(self) -> None:
        """Something changed that the broker should know before the next regular beat."""
        self._beat_at = 0

    def beat_soon(self, now_ms: int) -> None:
        """The same, for what changes often: not more than one in `SOON_MS`."""
        self._beat_at = min(self._beat_at, max(now_ms, self._beaten_at + SOON_MS))

    # --- what the owner says -----------------------------------------------------------------------

    def send(self, message: m.Message, blob: bytes | None = None) -> None:
        self._out.append(Send(self.link, self.session, message, blob))

    def publish_beat(self) -> None:
        """Workers: put the next beat on the token plane."""
        self.beat += 1
        self._out.append(Publish(self.link, [tokens.encode_beat(self.beat, self.session)]))

    def leave(self, reason: str, now_ms: int) -> None:
        """Say goodbye and close for good."""
        if self.state is LinkState.CLOSED:
            return
        if self.welcomed:
            self.send(m.Goodbye(reason))
        self._step(LinkState.CLOSED, now_ms)
        self._out.append(CloseLink(self.link))

    # --- inside ------------------------------------------------------------------------------------

    def _step(self, state: LinkState, now_ms: int) -> None:
        assert state in LINK_STEPS[self.state], f"link cannot go from {self.state} to {state}"
        self.state, self._since = state, now_ms

    def _greet(self, now_ms: int) -> None:
        self._hello_at = now_ms + HELLO_AGAIN_MS
        self._out.append(Send(self.link, NO_SESSION, self._hello()))

    def _rebuild(self, now_ms: int) -> None:
        self._since = now_ms
        self._proof_after = self.beat
        self._out.append(OpenTokens(self.link, self._port, self._topic))

    def _down(self, now_ms: int, *, again: bool = False) -> None:
        self._step(LinkState.DOWN, now_ms)
        self.session = NO_SESSION
        self._cut_at = NEVER_MS
        if not again:
            self.target = (self.target + 1) % self.choices
            self._failed += 1
        if self._failed % self.choices and not again:
            self._retry_at = now_ms  # somebody else, whom we have not tried yet
        else:
            self._retry_at = now_ms + self._backoff
            self._backoff = min(self._backoff * 2, BACKOFF_MS[1])
        self._out.append(CloseLink(self.link))
