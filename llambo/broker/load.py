"""Whether this broker keeps up, and what follows if it does not.

A turn of the loop reads what has arrived and answers it. Turns that stay long, or messages that stay unread, mean that
more arrives than this process has time for, because of the load or because others have the processor. Then new requests
are refused as busy, with the time of the next try, and those that are admitted get all the time there is. One long turn
means nothing: the process, or the machine, may have stood still.

Leases are judged by what was read: a peer is not silent because its messages lie unread (`Load.unread_ms`).
"""

from __future__ import annotations

from llambo.broker.events import Tick
from llambo.broker.records.state import State

#: A turn is long, and a message old, from here on.
LONG_MS = 200
#: For so long without a pause it has to be one way or the other before it counts.
LASTING_MS = 1_000
#: There is one line about it in this time, however often it begins and ends.
QUIET_MS = 60_000


def ticked(state: State, tick: Tick, now_ms: int) -> None:
    load = state.measured.load
    load.turn_ms = tick.turn_ms
    load.unread_ms, load.crowded = tick.unread_ms, tick.crowded
    load.longest_ms = max(load.longest_ms, tick.turn_ms)
    late = max(tick.turn_ms, tick.unread_ms) >= LONG_MS
    if late == load.behind:
        load.since = now_ms
    elif now_ms - load.since >= LASTING_MS:
        load.behind, load.since = late, now_ms
        _report(state, now_ms)


def _report(state: State, now_ms: int) -> None:
    load = state.measured.load
    if load.behind:
        load.refused = 0
        load.reported = not load.reported_at or now_ms - load.reported_at >= QUIET_MS
        if load.reported:
            load.reported_at = now_ms
            text = (
                f"this broker does not keep up: a turn takes {load.turn_ms} ms, messages wait for {load.unread_ms} ms; "
                "new requests are refused as busy until it does. It needs more processor time, or fewer requests"
            )
            state.journal.add(now_ms, "overloaded", text, warning=True)
    elif load.reported:
        text = f"this broker keeps up again; {load.refused} requests were refused meanwhile"
        state.journal.add(now_ms, "overload over", text)
