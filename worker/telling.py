"""What a worker tells of its links: to its operator, and to its supervisor when it is of use for the first time."""

from __future__ import annotations

from llambo.mesh.link_core import LinkCore, LinkState
from llambo.worker.actions import Action, Log


class Telling:
    def __init__(self, brokers: tuple[str, ...], out: list[Action]) -> None:
        self._brokers = brokers
        self._out = out
        self._told: dict[int, LinkState] = {}
        self._complaints: dict[int, str] = {}

    def news(self, link: LinkCore) -> bool:
        """Whether its state is another one than last time."""
        before, self._told[link.link] = self._told.get(link.link), link.state
        return before is not link.state

    def tell(self, link: LinkCore) -> None:
        number = link.link
        if link.state is LinkState.DOWN and link.problem:
            # Each try fails for the same reason; once is enough.
            if self._complaints.get(number) != link.problem:
                self._complaints[number] = link.problem
                address = self._brokers[number]
                text = (
                    f"no broker answers at {address}" if link.problem == "no answer" else f"{address}: {link.problem}"
                )
                self._out.append(Log(f"{text}; trying on", warning=True))
        elif link.state is LinkState.MENDING:
            self._out.append(Log(f"link {number}: the token plane is down, rebuilding it", warning=True))
        elif link.up:
            self._complaints.pop(number, None)
            self._out.append(Log(f"link {number}: up, broker {link.broker or 'without a name'}"))
