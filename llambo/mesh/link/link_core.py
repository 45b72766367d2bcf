"""How a peer joins a broker and stays connected: the core that worker and client share.

A link is one control socket and one token socket to one broker, and each may fail alone. So beats are sent on both
planes, and their echoes show which of them works.

    worker   publishes beat n on the token plane; the broker echoes the last one it received, on control
    client   receives beat n on control and on the token plane, and echoes the latter on control
    host     has no token plane

The first beat that passed the token plane makes the link UP. When three are missing it is MENDING: the token socket is
replaced, and until that helps all tokens are sent by replay over control. With a silent control plane or an unknown
session the link is DOWN, and a new one is opened on new sockets.

If there is an alternative, a link does not wait for its lease: a connection that breaks and cannot be made again at
once means that the broker is gone. A client with several brokers then connects to the next one. A worker with several
brokers (`redundant`) has a link to each: it tries the same one again, and meanwhile offers its runs to the others.

                                     one broker      redundant       several brokers
    a silent broker counts as lost   after the lease after the lease after `SILENT_MS`, or ten beats
    and gets a goodbye               no              no              yes
    a hello without an answer        `GREETING_MS`   `GREETING_MS`   `TRY_MS`, doubled with each round
    a refused connection             wait            wait            try the next one at once
    a connection that was lost       wait            down after `CUT_MS`, or when an attempt to reconnect fails
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.timers import NEVER_MS

# --- The actions of a link. ---


class OpenControl(msgspec.Struct, frozen=True):
    """Close the sockets of this link, then connect a new control socket to broker number `target` of its address."""

    link: int
    target: int = 0


class OpenTokens(msgspec.Struct, frozen=True):
    """Connect a new token socket to this port of the same host, in place of the old one."""

    link: int
    port: int
    topic: bytes


class CloseLink(msgspec.Struct, frozen=True):
    """Close both sockets. The last messages may still be sent."""

    link: int


class Send(msgspec.Struct, frozen=True):
    """Send on control, with this session id. The messages of one round form one bundle."""

    link: int
    session: bytes
    message: m.Message
    blob: bytes | None = None


class Publish(msgspec.Struct, frozen=True):
    """Publish frames on the token plane."""

    link: int
    frames: list[bytes]


LinkAction = OpenControl | OpenTokens | CloseLink | Send | Publish


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
        LinkState.UP: "first token-plane proof, or without a token plane",
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
#: How long a hello waits for its answer before it is sent again, and before the sockets are replaced. The latter grows,
#: since a broker that a thousand peers join at once may need longer, and with new sockets a peer loses its place.
HELLO_AGAIN_MS = 500
GREETING_MS = 5_000
GREETING_DOUBLED = 2
#: The pause before another attempt: doubles from the first to the last.
BACKOFF_MS = (100, 2_000)
#: If there is an alternative: how long a connection may be broken, how long a broker may be silent, and how long a
#: hello waits for its answer in the first round. See the table above.
CUT_MS = 300
SILENT_MS = 2_000
TRY_MS = 1_000
#: Heartbeats that a broker may miss while it has no requests here.
IDLE_BEATS = 4
#: The shortest time between two beats, even if there are many changes to report.
SOON_MS = 20


class ConnectionChange(enum.Enum):
    """What the socket monitor reports of the control connection."""

    CONNECTED = "connected"
    LOST = "lost"  # it broke; the socket tries to connect again
    REFUSED = "refused"  # such an attempt has failed: nothing listens there
    HANDSHAKE_FAILED = "handshake failed"  # something listens there, and ends the handshake
    KEY_DENIED = "key denied"
    KEY_MISMATCH = "key mismatch"  # one end has keys, and the other has not


class LinkProblem(enum.Enum):
    """Why a link is down. Programs compare this; the value is the text for people."""

    NO_ANSWER = "no answer"
    NOT_LISTENING = "nothing listens there"
    #: With keys it looks like this if the other end is the first to notice that they do not match.
    NO_HANDSHAKE = "the handshake fails: what listens there is no broker, or it wants a key, or another key"
    KEY_DENIED = "the broker does not accept this key: it is unknown there, has expired, or is for another role"
    KEY_MISMATCH = "the broker wants a key and none was given, or one was given and the broker has no keys"
    LOST = "the connection to the broker is lost"
    SILENT = "the broker is silent"
    #: The broker has refused the peer, or has left. Its own text says why.
    REFUSED = "refused"


_DENIALS = {
    ConnectionChange.KEY_DENIED: LinkProblem.KEY_DENIED,
    ConnectionChange.KEY_MISMATCH: LinkProblem.KEY_MISMATCH,
}


class SessionTerms(msgspec.Struct, frozen=True):
    """The fields of the welcome. They remain readable when the session is over."""

    broker: str = ""
    heartbeat_ms: int = 200
    lease_ms: int = 2_000
    #: The broker sends pages on request only.
    pull: bool = False
    token_port: int = 0
    topic: bytes = b""
    #: The interval while there is nothing to report.
    idle_ms: int = 200

    @classmethod
    def of(cls, welcome: m.Welcome) -> SessionTerms:
        return cls(
            welcome.broker, max(welcome.heartbeat_ms, 10), max(welcome.lease_ms, 50),
            welcome.pull, welcome.token_port, welcome.topic, max(welcome.idle_ms, welcome.heartbeat_ms, 10),
        )  # fmt: skip


@dataclass(slots=True)
class Attempts:
    """Which broker to send a hello to, and when."""

    #: The number of known brokers, and which of them is the current one.
    choices: int = 1
    target: int = 0
    #: Attempts so far. Within one of them a hello that is sent again has to be the same.
    greetings: int = 0
    hello_at: int = 0
    #: This attempt has failed because of the key: another one with the same key will fail as well.
    denied: bool = False
    #: Failed attempts since the last welcome.
    failed: int = 0
    retry_at: int = 0
    pause_ms: int = BACKOFF_MS[0]

    @property
    def greeting_ms(self) -> int:
        if self.choices == 1:
            return GREETING_MS << min(self.failed, GREETING_DOUBLED)
        return min(TRY_MS << min(self.failed // self.choices, 8), GREETING_MS)

    def begin(self) -> None:
        self.greetings += 1
        self.denied = False

    def succeed(self) -> None:
        self.failed, self.pause_ms = 0, BACKOFF_MS[0]

    def fail(self, now_ms: int, *, again: bool) -> None:
        """`again`: the broker lives and wants another hello, so the next broker is not tried."""
        if not again:
            self.target = (self.target + 1) % self.choices
            self.failed += 1
        if self.failed % self.choices and not again:
            self.retry_at = now_ms  # the next broker was not tried in this round
        else:
            self.retry_at = now_ms + self.pause_ms
            self.pause_ms = min(self.pause_ms * 2, BACKOFF_MS[1])


@dataclass(slots=True)
class Beats:
    """Beats of one session, on both planes."""

    #: False: there is no token plane.
    on_tokens: bool = True
    #: In a worker the last number it published, in a client the last one it received.
    number: int = 0
    #: Only a later beat proves that the token socket works: earlier ones passed the previous socket.
    proof_after: int = 0
    next_at: int = 0
    sent_at: int = 0
    #: There is nothing to report, so beats may be rare; since when there is something.
    idle: bool = False
    busy_at: int = 0
    #: This peer has requests of the broker, so the silence of either matters at once.
    serves: bool = False

    def begin(self, now_ms: int) -> None:
        self.number = self.proof_after = 0
        self.next_at = now_ms

    def sent(self, now_ms: int) -> None:
        self.next_at, self.sent_at = NEVER_MS, now_ms

    def now(self) -> None:
        """Send the next beat at once, because something changed."""
        self.next_at = 0

    def soon(self, now_ms: int) -> None:
        """The same for frequent changes: at most one beat in `SOON_MS`."""
        self.next_at = min(self.next_at, max(now_ms, self.sent_at + SOON_MS))


class LinkCore:
    """One link. Its owner passes arrivals to it and calls `tick`; actions are passed to `emit`."""

    def __init__(
        self,
        link: int,
        hello: Callable[[], m.Message],
        emit: Callable[[LinkAction], None],
        *,
        redundant: bool = False,
        streams: bool = True,
    ) -> None:
        """`redundant`: notice the loss of the broker at once, because the owner can use other brokers.

        `streams`: it has a token plane. Without one the link is UP with the welcome.
        """
        self.link = link
        self.state = LinkState.DOWN
        self.session = NO_SESSION
        #: The number of sessions so far.
        self.sessions = 0
        self.terms = SessionTerms()
        self.attempts = Attempts()
        self.beats = Beats(streams)
        #: When the last control message of this session arrived.
        self.heard_ms = 0
        #: Why the link is down, or was down last: for programs, and as text.
        self.cause: LinkProblem | None = None
        self.problem = ""
        self._hello = hello
        self._emit = emit
        self._redundant = redundant
        self._lost_at = NEVER_MS
        self._since = 0

    @property
    def welcomed(self) -> bool:
        """True if the control plane works: requests can be sent, and tokens can be replayed."""
        return self.state in (LinkState.JOINING, LinkState.UP, LinkState.MENDING)

    @property
    def up(self) -> bool:
        return self.state is LinkState.UP

    @property
    def _beat_at(self) -> int:
        beats, terms = self.beats, self.terms
        if beats.idle and self.state is LinkState.UP:
            return min(beats.next_at, beats.sent_at + terms.idle_ms)
        return min(beats.next_at, max(beats.sent_at, beats.busy_at) + terms.heartbeat_ms)

    @property
    def _silence_ms(self) -> int:
        """How long a broker may be silent."""
        if self.attempts.choices == 1:
            return (
                self.terms.lease_ms if self.beats.serves else max(self.terms.lease_ms, IDLE_BEATS * self.terms.idle_ms)
            )
        return min(self.terms.lease_ms, max(SILENT_MS, 10 * self.terms.heartbeat_ms))

    # --- what arrives ------------------------------------------------------------------------------

    def on_found(self, choices: int) -> None:
        """The names were looked up: the address has so many brokers."""
        self.attempts.choices = max(1, choices)

    def on_connection(self, change: ConnectionChange, now_ms: int) -> None:
        several = self.attempts.choices > 1
        if change is ConnectionChange.CONNECTED:
            self._lost_at = NEVER_MS
            if self.welcomed:
                self.beats.now()  # the broker has to learn of the new connection; or it is another one, and says so
        elif self.state is LinkState.GREETING:
            if change in _DENIALS:
                self.attempts.denied = True
                self._fail(_DENIALS[change], now_ms)
            elif change is ConnectionChange.HANDSHAKE_FAILED:
                self._explain(LinkProblem.NO_HANDSHAKE)
            elif change is ConnectionChange.REFUSED and several:
                self._fail(LinkProblem.NOT_LISTENING, now_ms)
        elif self.welcomed and (self._redundant or several):
            if change is ConnectionChange.LOST:
                self._lost_at = min(self._lost_at, now_ms)
            elif self._lost_at != NEVER_MS:
                self._fail(LinkProblem.LOST, now_ms)

    def on_welcome(self, welcome: m.Welcome, now_ms: int) -> bool:
        """True if it begins a new session."""
        if self.state is not LinkState.GREETING:
            return False  # the second answer to a hello that was sent twice
        self._step(LinkState.JOINING, now_ms)
        self.session, self.terms = welcome.session, SessionTerms.of(welcome)
        self.heard_ms = now_ms
        self.sessions += 1
        self.attempts.succeed()
        self._lost_at = NEVER_MS
        self.beats.begin(now_ms)
        if self.beats.on_tokens:
            self._open_tokens()
        else:
            self._step(LinkState.UP, now_ms)
        return True

    def on_control(self, session: bytes, now_ms: int) -> bool:
        """Every control message proves that the broker lives. False: it belongs to an earlier session."""
        if session != self.session:
            return False
        self.heard_ms = now_ms
        return True

    def on_proof(self, number: int, now_ms: int) -> None:
        """The token plane works: the broker received our beat `number` (worker), or we received its beat (client)."""
        if number > self.beats.proof_after and self.state in (LinkState.JOINING, LinkState.MENDING):
            self._step(LinkState.UP, now_ms)

    def on_heartbeat(self, beat: m.BrokerHeartbeat) -> None:
        """The intervals as they are now."""
        terms = self.terms
        if beat.idle_ms and (beat.heartbeat_ms, beat.idle_ms) != (terms.heartbeat_ms, terms.idle_ms):
            self.terms = msgspec.structs.replace(terms, heartbeat_ms=beat.heartbeat_ms, idle_ms=beat.idle_ms)

    def on_load(self, now_ms: int, *, idle: bool, serves: bool) -> None:
        """`idle`: there is nothing to report. `serves`: this peer has requests of that broker."""
        beats = self.beats
        if beats.idle and not idle:
            beats.busy_at = now_ms
        beats.idle, beats.serves = idle, serves

    def on_missing(self, behind: int, now_ms: int) -> None:
        """The token plane is `behind` beats behind the control plane."""
        if behind <= MISSING_BEATS:
            return
        if self.state in (LinkState.JOINING, LinkState.UP):
            self._step(LinkState.MENDING, now_ms)
            self._replace_tokens(now_ms)
        elif self.state is LinkState.MENDING and now_ms - self._since >= 5 * self.terms.heartbeat_ms * MISSING_BEATS:
            self._replace_tokens(now_ms)

    def on_refused(self, text: str, now_ms: int, *, again: bool = False) -> None:
        """The broker refuses this peer, or (`again`) was restarted and does not know this session."""
        self._fail(LinkProblem.REFUSED, now_ms, text, again=again)

    # --- time --------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> bool:
        """True if a heartbeat is due. The owner sends it, because the content is known to the owner only."""
        match self.state:
            case LinkState.DOWN if now_ms >= self.attempts.retry_at:
                self._step(LinkState.GREETING, now_ms)
                self.attempts.begin()
                self._emit(OpenControl(self.link, self.attempts.target))
                self._greet(now_ms)
            case LinkState.GREETING if now_ms - self._since >= self.attempts.greeting_ms:
                self._fail(self.cause or LinkProblem.NO_ANSWER, now_ms, self.problem)
            case LinkState.GREETING if now_ms >= self.attempts.hello_at:
                self._greet(now_ms)
            case LinkState.JOINING | LinkState.UP | LinkState.MENDING:
                return self._tick_welcomed(now_ms)
            case _:
                pass
        return False

    def _tick_welcomed(self, now_ms: int) -> bool:
        if now_ms - self.heard_ms >= self._silence_ms:
            text = f"the broker was silent for {self._silence_ms} ms"
            if self.attempts.choices > 1:
                # This peer will not return soon. A broker that can read this need not wait for the lease.
                self.send(m.Goodbye(text))
            self._fail(LinkProblem.SILENT, now_ms, text)
        elif now_ms - self._lost_at >= CUT_MS:
            self._fail(LinkProblem.LOST, now_ms, f"the connection was broken for {CUT_MS} ms")
        elif now_ms >= self._beat_at:
            self.beats.sent(now_ms)
            return True
        return False

    def next_wakeup_ms(self) -> int:
        match self.state:
            case LinkState.DOWN:
                return self.attempts.retry_at
            case LinkState.GREETING:
                return min(self.attempts.hello_at, self._since + self.attempts.greeting_ms)
            case LinkState.CLOSED:
                return NEVER_MS
            case _:
                return min(self._beat_at, self.heard_ms + self._silence_ms, self._lost_at + CUT_MS)

    # --- what the owner sends ----------------------------------------------------------------------

    def send(self, message: m.Message, blob: bytes | None = None) -> None:
        self._emit(Send(self.link, self.session, message, blob))

    def publish_beat(self) -> None:
        """In a worker: publish the next beat on the token plane."""
        self.beats.number += 1
        self._emit(Publish(self.link, [tokens.encode_beat(self.beats.number, self.session)]))

    def leave(self, reason: str, now_ms: int) -> None:
        """Send a goodbye and close the link. It is not opened again."""
        if self.state is LinkState.CLOSED:
            return
        if self.welcomed:
            self.send(m.Goodbye(reason))
        self._step(LinkState.CLOSED, now_ms)
        self._emit(CloseLink(self.link))

    # --- inside ------------------------------------------------------------------------------------

    def _step(self, state: LinkState, now_ms: int) -> None:
        assert state in LINK_STEPS[self.state], f"link cannot go from {self.state} to {state}"
        self.state, self._since = state, now_ms

    def _greet(self, now_ms: int) -> None:
        self.attempts.hello_at = now_ms + HELLO_AGAIN_MS
        self._emit(Send(self.link, NO_SESSION, self._hello()))

    def _open_tokens(self) -> None:
        self._emit(OpenTokens(self.link, self.terms.token_port, self.terms.topic))

    def _replace_tokens(self, now_ms: int) -> None:
        self._since = now_ms
        self.beats.proof_after = self.beats.number
        self._open_tokens()

    def _explain(self, cause: LinkProblem, text: str = "") -> None:
        self.cause, self.problem = cause, text or cause.value

    def _fail(self, cause: LinkProblem, now_ms: int, text: str = "", *, again: bool = False) -> None:
        self._explain(cause, text)
        self._step(LinkState.DOWN, now_ms)
        self.session = NO_SESSION
        self._lost_at = NEVER_MS
        self.attempts.fail(now_ms, again=again)
        self._emit(CloseLink(self.link))
