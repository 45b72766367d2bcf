"""Events of the tokens of a feed, as one reader gets them. A rendering neither waits nor sends.

Every event has an id, which `Last-Event-ID` brings back: the id of the feed, the time when it was created, how many
events there were, and a checksum of the tokens in them. The reader is then given the events after it, made again from
the first token on, if the checksum of those it has is the same.
"""

from __future__ import annotations

import codecs
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from llambo.gateway.answers.api import JsonObject, Renderer, StreamEvent, Token, encode
from llambo.gateway.answers.feed import INTERRUPTED, Feed, Place
from llambo.mesh.wire.errors import Code, LlamboError

#: Tokens that are rendered at once. Without this limit a slow reader of a long answer would make the gateway hold all
#: of its events in memory, and delay every other reader while they are made.
AT_ONCE = 256
_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True)
class _Lane:
    """Events whose order is the same whenever they are made."""

    #: The number of events that the reader had when it came.
    seen: int
    #: How many it has now, and the checksum of their tokens.
    count: int
    mark: int = 0
    #: How many were made here, and the checksum of their tokens.
    made: int = 0
    sum: int = 0


class Rendering:
    """One reader's way through a feed. `place`: how far it has come already."""

    def __init__(self, feed: Feed, renderer: Renderer, place: Place | None = None) -> None:
        self._feed, self._renderer = feed, renderer
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._begun = False
        #: The next token.
        self._at = 0
        several = len(feed.requests) > 1
        seen = place.seen if place is not None else (0,) * (1 + len(feed.requests) if several else 1)
        #: One, or, if there are several choices, one for what belongs to no choice and one for each choice.
        self._lanes = [_Lane(seen=count, count=count) for count in seen]
        self._of_choice = self._lanes[1:] or self._lanes
        self._checksum = place.checksum if place is not None else None
        #: How many lanes have fewer events than the reader has; and new events, which wait for those.
        self._behind = sum(count > 0 for count in seen)
        self._held: list[tuple[_Lane, int, int, StreamEvent]] = []
        self._prefix = f"{feed.id}-{feed.created:x}-"
        #: All events were made, and no more will follow.
        self.finished = False
        #: The error of the feed; or the tokens are not those that the reader has.
        self.error: LlamboError | None = None

    @property
    def behind(self) -> bool:
        """More events can be made at once."""
        return self._begun and not self.finished and self._at < len(self._feed.tokens.pieces)

    def server_sent_events(self) -> bytes:
        """The events since the last call, as they go over HTTP."""
        out = bytearray()
        for id, event in self.events():
            if event.name:
                out += b"event: %s\n" % event.name.encode()
            data = event.data.encode() if isinstance(event.data, str) else encode(event.data)
            out += b"id: %s\ndata: %s\n\n" % (id.encode(), data)
        return bytes(out)

    def events(self) -> list[tuple[str, StreamEvent]]:
        """The events since the last call, with their ids."""
        feed = self._feed
        out: list[tuple[str, StreamEvent]] = []
        if not self._begun and feed.begun and feed.failed_before_begin is None:
            self._begun = True
            self._put(out, self._renderer.begin(feed.head), self._lanes[0])
        until = min(len(feed.tokens.pieces), self._at + AT_ONCE)
        while self._at < until and self.error is None:
            lane = self._of_choice[feed.tokens.choices[self._at]]
            self._put(out, self._next(feed, lane), lane)
            self._at += 1
        feed.lead.taken(self._at)
        if feed.over and not self.behind and not self.finished and self.error is None:
            self._finish(out)
        if self.error is not None and not self.finished:
            self._fail(out, self.error)
        return out

    def body(self) -> JsonObject:
        """The whole answer, after the last event."""
        return self._renderer.body(self._feed.all_answers())

    def _next(self, feed: Feed, lane: _Lane) -> Iterable[StreamEvent]:
        at, tokens = self._at, feed.tokens
        choice, piece = tokens.choices[at], tokens.pieces[at]
        decoder = self._decoders.get(choice)
        if decoder is None:
            decoder = self._decoders[choice] = _decoder("replace")
        if piece is not None:
            lane.sum = zlib.crc32(piece, lane.sum)
            return self._renderer.token(
                Token(choice, decoder.decode(piece), tokens.ids[at], piece, tokens.logprobs.get(at))
            )
        rest = decoder.decode(b"", final=True)
        last = self._renderer.token(Token(choice, rest, -1)) if rest else ()
        return [*last, *self._renderer.end(choice, feed.answers[choice])]

    def _put(self, out: list[tuple[str, StreamEvent]], events: Iterable[StreamEvent], lane: _Lane) -> None:
        for event in events:
            lane.made += 1
            if lane.made > lane.seen:
                if self._behind:
                    self._held.append((lane, lane.made, lane.sum, event))
                else:
                    self._emit(out, lane, lane.made, lane.sum, event)
            elif lane.made == lane.seen:
                lane.mark = lane.sum
                self._behind -= 1
                if not self._behind:
                    self._caught_up(out)

    def _caught_up(self, out: list[tuple[str, StreamEvent]]) -> None:
        """All that the reader has was made again."""
        if self._checksum is not None and self._checksum != self._sum():
            self.error = LlamboError(Code.CANCELLED, INTERRUPTED)
            return
        held, self._held = self._held, []
        for each in held:
            self._emit(out, *each)

    def _emit(self, out: list[tuple[str, StreamEvent]], lane: _Lane, count: int, mark: int, event: StreamEvent) -> None:
        lane.count, lane.mark = count, mark
        out.append((self._id(), event))

    def _sum(self) -> int:
        lanes = self._lanes
        return lanes[0].mark if len(lanes) == 1 else zlib.crc32(struct.pack(f"{len(lanes)}I", *(e.mark for e in lanes)))

    def _id(self) -> str:
        return f"{self._prefix}{'.'.join(str(lane.count) for lane in self._lanes)}-{self._sum():08x}"

    def _finish(self, out: list[tuple[str, StreamEvent]]) -> None:
        if self._feed.error is not None:
            self._fail(out, self._feed.error)
            return
        self._put(out, self._renderer.done(self._feed.all_answers()), self._lanes[0])
        if self._behind:  # the reader has more than there is
            self.error = LlamboError(Code.CANCELLED, INTERRUPTED)
        self.finished = self.error is None

    def _fail(self, out: list[tuple[str, StreamEvent]], error: LlamboError) -> None:
        """The event has the id of the one before it, so that a reader that comes back may get what follows."""
        self.error, self.finished = error, True
        out += [(self._id(), event) for event in self._renderer.failed(error)]


def comment(text: str) -> bytes:
    """Readers of events ignore it; proxies see that the connection is in use."""
    return f": {text}\n\n".encode()
