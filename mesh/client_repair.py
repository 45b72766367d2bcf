"""When a client asks for tokens to be sent again, and which.

That a token exists is known from a later one (a gap), from a beat (progress), from a page (total) or from End
(count). If it is not here a moment later, the broker is asked for the first hole. Asking less often and for
exactly what is missing keeps the duplicates down: un-coalesced replays were four frames for each token.
"""

from __future__ import annotations

from llambo.mesh import messages as m
from llambo.mesh.client_requests import Counters, Request
from llambo.mesh.link_core import LinkCore
from llambo.mesh.timers import Timers

#: Frames overtake each other by a fraction of a millisecond; a hole older than this will not close by itself.
TAIL_GRACE_MS = 10
#: After this a replay that was asked for is asked for again.
REPLAY_AGAIN_MS = 500


class Repair:
    def __init__(self, link: LinkCore, timers: Timers[bytes], counters: Counters) -> None:
        self._link = link
        self._timers = timers
        self._counters = counters

    def owe(self, request: Request, until: int, now_ms: int) -> None:
        """Tokens before `until` exist. If they are not here in a moment, ask for them."""
        request.owed = max(request.owed, until)
        if not request.target and request.repairable and request.missing_until:
            request.target = request.owed
            # Without a token plane there is nothing to wait for.
            self._timers.set(request.id, now_ms + (TAIL_GRACE_MS if self._link.up else 0))

    def expect(self, request: Request, until: int, now_ms: int) -> None:
        """As if a replay had been asked for just now: look again when it should have come."""
        request.owed = max(request.owed, until)
        request.target = request.asked_until = until
        request.asked_first = request.tokens.next_index
        self._timers.set(request.id, now_ms + REPLAY_AGAIN_MS)

    def ask(self, request: Request, now_ms: int) -> None:
        if not request.repairable or not request.missing_until:
            return
        self._counters.replays += 1
        self._link.send(m.Replay(request.id, request.tokens.next_index, request.missing_until))
        self.expect(request, request.missing_until, now_ms)

    def on_alarm(self, request: Request, now_ms: int) -> None:
        late = request.tokens.next_index < request.target
        request.forget_repair()
        if late:
            self.ask(request, now_ms)
        else:
            self.owe(request, 0, now_ms)  # that came by itself; newer ones may be missing

    def on_page(self, request: Request, page: m.Page, now_ms: int) -> None:
        """A page was taken in: go on with the rest of what was asked for."""
        asked_first, asked_until = request.asked_first, request.asked_until
        request.forget_repair()
        if not request.repairable or not request.missing_until:
            return
        if request.tokens.next_index == asked_first:
            self.expect(request, request.owed, now_ms)  # it brought nothing: the broker waits for it, too
        elif page.next < asked_until:
            self.ask(request, now_ms)
        else:
            self.owe(request, 0, now_ms)
