"""From the tokens of a feed to the events of a stream.

Every event has an id: the id of the feed, the time when it was created, and the number of the event. `Last-Event-ID`
brings it back, and the reader is given the events after it. Nothing here waits or sends.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any

from llambo.gateway.answers.api import Renderer, StreamEvent, Token, encode
from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.answers.feed import Feed

#: Tokens that are rendered at once. Without this limit a slow reader of a long answer would make the gateway hold all
#: of its events in memory, and delay every other reader while they are made.
AT_ONCE = 256
_ID = re.compile(r"([0-9a-f]{32})-([0-9a-f]{1,10})-(\d{1,9})")
_decoder = codecs.getincrementaldecoder("utf-8")


def parse_event_id(last_event_id: str) -> tuple[str, int, int]:
    """The feed, when it was created, and how many events the reader has seen."""
    found = _ID.fullmatch(last_event_id.strip())
    if found is None:
        raise FieldError("Last-Event-ID", f"{last_event_id[:80]!r} is not an event id of this gateway")
    return found[1], int(found[2], 16), int(found[3])


class Rendering:
    """One reader's way through a feed. `skip`: how many events it has seen already."""

    def __init__(self, feed: Feed, renderer: Renderer, skip: int = 0) -> None:
        self._feed, self._renderer, self._skip = feed, renderer, skip
        #: The next token, and the number of events so far.
        self._at = 0
        self._number = 0
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._begun = False
        self._prefix = f"{feed.id}-{feed.created:x}-"
        #: All events were made, and no more will follow.
        self.finished = False

    @property
    def behind(self) -> bool:
        """More events can be made at once."""
        return self._begun and self._at < len(self._feed.tokens.pieces)

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
            self._put(out, self._renderer.begin(feed.head))
        until = min(len(feed.tokens.pieces), self._at + AT_ONCE)
        while self._at < until:
            self._put(out, self._next(feed))
            self._at += 1
        if feed.over and not self.behind and not self.finished:
            self.finished = True
            if feed.error is not None:
                self._put(out, self._renderer.failed(feed.error))
            else:
                self._put(out, self._renderer.done(feed.all_answers()))
        return out

    def body(self) -> Any:
        """The whole answer, after the last event."""
        return self._renderer.body(self._feed.all_answers())

    def _next(self, feed: Feed) -> Iterable[StreamEvent]:
        at, tokens = self._at, feed.tokens
        choice, piece = tokens.choices[at], tokens.pieces[at]
        decoder = self._decoders.get(choice)
        if decoder is None:
            decoder = self._decoders[choice] = _decoder("replace")
        if piece is not None:
            return self._renderer.token(
                Token(choice, decoder.decode(piece), tokens.ids[at], piece, tokens.logprobs.get(at))
            )
        rest = decoder.decode(b"", final=True)
        last = self._renderer.token(Token(choice, rest, -1)) if rest else ()
        return [*last, *self._renderer.end(choice, feed.answers[choice])]

    def _put(self, out: list[tuple[str, StreamEvent]], events: Iterable[StreamEvent]) -> None:
        for event in events:
            self._number += 1
            if self._number > self._skip:
                out.append((f"{self._prefix}{self._number}", event))


def comment(text: str) -> bytes:
    """Readers of events ignore it; proxies see that the connection is in use."""
    return f": {text}\n\n".encode()
