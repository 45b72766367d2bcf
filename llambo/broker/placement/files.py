"""Which host is to get the files of which model, and from where: pulls, as state, and grants.

A pull is a model, by the name of its source, and the hosts that are to have it. An admin has asked for it
(`PullModel`), or a host itself, whose `--models` names it. What a host has is known from its reports. From both follows
what each host is sent (`FetchFiles`), again with each of its heartbeats, so it does not matter which message is lost.

    sources    of a host that is to get it: those that have all of it, then the one that downloads it, then those that
               have its beginning
    outside    one host downloads it from its source, if none that gives files away has all of it. If that one is lost
               or fails, it is the one that has most of it
    grants     for each host that is to get it, at each of its sources, with a ticket of its own

The files do not pass through the broker.
"""

from __future__ import annotations

import msgspec

from llambo.broker.records.hosts import HostEntry, Pull
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.state import State
from llambo.broker.report import queries
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

#: Pulls at a time; more are refused as busy.
PULLS = 32
#: A pull that is done is forgotten when it was not asked about for so long; one that is not done, after a day.
DONE_MS, OLD_MS = 60_000, 86_400_000
#: For so long it is waited for the answers of hosts that may have it, and for those that are stuck to ask a new one.
LOOK_MS = 3_000
#: A host that downloads and is lost is waited for: it may come back, and then nothing is downloaded twice.
LOST_MS = 2_000
#: How often what hosts have reported is looked at.
SETTLE_MS = 200
ALL = "all"
#: States in which a host is not to get it any more.
_ENDED = ("here", "failed")


# --- what is asked for ---


def asked(state: State, client: ClientEntry, order: m.PullModel, blob: bytes, now_ms: int) -> None:
    pulls = state.hosts.pulls
    pull = pulls.get(order.ref)
    error = None
    if pull is None or not order.poll:
        error = _begin(state, order, now_ms)
    if error is not None:
        state.to_client(client, m.Problem(error, b"", order.query))
        return
    pull = pulls[order.ref]
    pull.asked_at = now_ms
    settle(state, now_ms)
    queries.send(state, client, order.query, msgspec.msgpack.encode(_reply(state, pull)))


def _begin(state: State, order: m.PullModel, now_ms: int) -> ErrorInfo | None:
    hosts = state.hosts.sessions.values()
    meant = [host for host in hosts if order.to in (ALL, host.name, host.hello.node_class)]
    able = {host.name for host in meant if host.hello.fetches}
    if not meant:
        known = ", ".join(sorted(state.hosts.by_name)[:20]) or "none"
        text = f"no host, and no class of hosts, is called {order.to!r}; hosts are: {known}"
        return ErrorInfo(Code.UNKNOWN_WORKER, text, hint="a host is a worker that was started with --models")
    if not able:
        return ErrorInfo(Code.UNKNOWN_WORKER, f"{meant[0].name} cannot get files: its version is too old")
    return _add(state, order.ref, able, now_ms)


def _add(state: State, ref: str, names: set[str], now_ms: int) -> ErrorInfo | None:
    pulls = state.hosts.pulls
    pull = pulls.get(ref)
    if pull is None:
        if len(pulls) >= PULLS:
            return ErrorInfo(Code.BUSY, f"{PULLS} models are fetched already", 10_000)
        pull = pulls[ref] = Pull(ref, since=now_ms)
        state.journal.add(now_ms, "model asked for", f"{ref}, to {len(names)} hosts")
    # One that has failed tries again.
    pull.attempt = max(pull.attempt + 1, now_ms)
    pull.asked_at = now_ms
    pull.hosts |= names
    return None


def reported(state: State, host: HostEntry, files: list[m.HostedFile], now_ms: int) -> None:
    """All that it has to say about files."""
    before, host.files = host.files, {file.ref: file for file in files}
    for file in files:
        pull = state.hosts.pulls.get(file.ref)
        if file.state == "wanted" and (pull is None or host.name not in pull.hosts):
            _add(state, file.ref, {host.name}, now_ms)
        old = before.get(file.ref)
        was = old.state if old is not None else ""
        for name in set(file.wrong).difference(old.wrong if old is not None else ()):
            state.journal.add(now_ms, "wrong bytes", f"of {file.ref}: {host.name} got some from {name}", warning=True)
        if pull is not None and host.name in pull.hosts and file.state != was and file.state in _ENDED:
            failed = file.state == "failed"
            text = f"{file.ref} on {host.name}" + (f": {file.note}" if failed else "")
            state.journal.add(now_ms, "model not fetched" if failed else "model is here", text, warning=failed)


# --- what follows from it ---


def look_again(state: State, now_ms: int) -> None:
    """Often, also if nothing has happened."""
    if state.hosts.pulls and now_ms >= state.hosts.pulls_at:
        settle(state, now_ms)


def settle(state: State, now_ms: int) -> None:
    """Tell each host what has changed for it."""
    hosts = state.hosts
    hosts.pulls_at = now_ms + SETTLE_MS
    for pull in list(hosts.pulls.values()):
        silent_ms = now_ms - pull.asked_at
        if silent_ms >= (OLD_MS if _wanting(state, pull) else DONE_MS):
            del hosts.pulls[pull.ref]
        # A host that comes back has another session, and gets other tickets.
        gone = [pair for pair in pull.tickets if not hosts.sessions.keys() >= set(pair)]
        for pair in gone:
            del pull.tickets[pair]
    orders: dict[str, list[m.FileOrder]] = {}
    grants: dict[str, list[m.FileGrant]] = {}
    for pull in hosts.pulls.values():
        _appoint(state, pull, now_ms)
        _decide(state, pull, orders, grants)
    for host in hosts.sessions.values():
        now = (orders.get(host.name, []), grants.get(host.name, []))
        if host.hello.fetches and now != host.files_sent:
            host.files_sent = now
            tell(state, host)


def tell(state: State, host: HostEntry) -> None:
    """What it is to get and to give; also with each heartbeat while there is any."""
    if host.backlog.full:
        return
    host.beats.seq += 1
    state.to_host(host, m.FetchFiles(host.beats.seq, *host.files_sent))


def _file(host: HostEntry, pull: Pull) -> m.HostedFile:
    file = host.files.get(pull.ref)
    if file is None or (file.state == "failed" and file.attempt < pull.attempt):
        return m.HostedFile(pull.ref, "waiting")
    return file


def _wanting(state: State, pull: Pull) -> list[HostEntry]:
    """The hosts that are to get it."""
    there = [state.hosts.by_name[name] for name in sorted(pull.hosts) if name in state.hosts.by_name]
    return [host for host in there if _file(host, pull).state not in _ENDED]


def _whole(state: State, pull: Pull) -> list[HostEntry]:
    """Those that have it and give it away."""
    return [host for host in state.hosts.sessions.values() if host.hello.share and _file(host, pull).state == "here"]


def _wrong(state: State, pull: Pull) -> set[str]:
    """Those that have sent wrong bytes, as others say. They are not chosen if there is another one."""
    return {name for host in state.hosts.sessions.values() for name in _file(host, pull).wrong}


def _appoint(state: State, pull: Pull, now_ms: int) -> None:
    """Which host downloads it from its source."""
    if pull.outside and pull.outside not in state.hosts.by_name:
        pull.lost_at = pull.lost_at or now_ms
        if now_ms - pull.lost_at < LOST_MS:
            return
    pull.lost_at = 0
    wanting, whole = _wanting(state, pull), _whole(state, pull)
    names = frozenset(host.name for host in whole)
    if names - pull.whole:
        pull.whole_at = now_ms
    pull.whole = names
    stuck = [host for host in wanting if _file(host, pull).state == "stuck"]
    appointed = next((host for host in wanting if host.name == pull.outside), None)
    if appointed is not None and (not whole or pull.because_stuck):
        return
    pull.outside, pull.because_stuck = "", bool(whole)
    if whole and now_ms - pull.whole_at < LOOK_MS:
        return  # one that was stuck until then has not looked there yet
    asking = stuck if whole else wanting
    may_have = [host for host in state.hosts.sessions.values() if host.hello.share and host.hello.fetches]
    unknown = any(pull.ref not in host.files for host in may_have) and now_ms - pull.since < LOOK_MS
    if asking and not unknown:
        wrong = _wrong(state, pull)
        best = max(asking, key=lambda host: (
            host.name not in wrong, bool(host.hello.share), _file(host, pull).bytes, host.name
        ))  # fmt: skip
        pull.outside = best.name
        state.journal.add(now_ms, "model downloaded", f"{pull.ref}, by {best.name}")


def _decide(
    state: State, pull: Pull, orders: dict[str, list[m.FileOrder]], grants: dict[str, list[m.FileGrant]]
) -> None:
    wanting, whole = _wanting(state, pull), _whole(state, pull)
    partial = [host for host in wanting if host.hello.share and (_file(host, pull).bytes or host.name == pull.outside)]
    partial.sort(key=lambda host: (host.name != pull.outside, host.name))
    for number, host in enumerate(wanting):
        sources: list[m.FileSource] = []
        for source in [*_turned(whole, number), *_turned(partial, number, keep=pull.outside)]:
            given = grants.setdefault(source.name, [])
            if source is host or len(sources) == limits.SOURCES_PER_FILE or len(given) == limits.FILE_GRANTS:
                continue
            ticket = pull.tickets.setdefault((source.session, host.session), b"")
            if not ticket:
                ticket = pull.tickets[source.session, host.session] = state.random_bytes(limits.TICKET_BYTES)
            given.append(m.FileGrant(ticket, pull.ref, host.link.user))
            sources.append(m.FileSource(source.name, source.hello.share, ticket, source.link.user))
        outside = host.name == pull.outside
        _add_order(orders, host, m.FileOrder(pull.ref, True, outside, sources, pull.attempt))
    for host in state.hosts.sessions.values():  # those that may have it, or have ended: they go on to report
        if host not in wanting and (host.hello.share or host.name in pull.hosts):
            _add_order(orders, host, m.FileOrder(pull.ref, attempt=pull.attempt))


def _add_order(orders: dict[str, list[m.FileOrder]], host: HostEntry, order: m.FileOrder) -> None:
    there = orders.setdefault(host.name, [])
    if len(there) < limits.FILES_PER_HOST:
        there.append(order)


def _turned(hosts: list[HostEntry], by: int, keep: str = "") -> list[HostEntry]:
    """Another one first for each, so that not all fetch from the same ones; but this one first in any case."""
    first = [host for host in hosts if host.name == keep]
    rest = [host for host in hosts if host.name != keep]
    by %= len(rest) or 1
    return [*first, *rest[by:], *rest[:by]]


# --- how far it is ---


def _reply(state: State, pull: Pull) -> reports.PullReply:
    return reports.PullReply(ref=pull.ref, hosts=[_row(state, pull, name) for name in sorted(pull.hosts)])


def _row(state: State, pull: Pull, name: str) -> reports.PullHost:
    host = state.hosts.by_name.get(name)
    if host is None:
        return reports.PullHost(host=name, state="gone", note="it has left the mesh")
    file = _file(host, pull)
    shown = file.state if file.state in ("fetching", *_ENDED) else "waiting"
    return reports.PullHost(
        host=name, state=shown, bytes=file.bytes, size=file.size, outside=file.outside, note=file.note
    )
