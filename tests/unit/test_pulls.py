"""Pulls at a broker: which host is to get the files of a model, from where, and who may ask for it."""

from __future__ import annotations

import msgspec

from llambo.broker.placement import files
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import reports
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity
from tests.unit.broker_bench import Bench, Client, Host

REF = "hf:org/tiny"
NEVER_LOST = {"lease_ms": 10**7, "client_lease_ms": 10**7}


class Sharing(Host):
    """A host that gives files to others, and reports what a test says."""

    def __init__(self, bench: Bench, name: str, user: str = "", *, share: bool = True) -> None:
        address = f"tcp://{name}:7341" if share else ""
        hello = m.HostHello(name, b"i", share=address, fetches=True)
        super().__init__(bench, name.encode(), hello, user, 100)
        assert self.session != NO_SESSION

    def has(self, state: m.FileState, bytes: int = 0, **fields: object) -> None:
        self.revision += 1
        file = m.HostedFile(REF, state, bytes, 100, **fields)  # type: ignore[arg-type]
        self.send(m.HostHeartbeat(self.seq, self.revision, [], {"ram": m.Memory(100)}, [file]))
        self.bench.pass_time(files.SETTLE_MS + 50)

    @property
    def sent(self) -> m.FetchFiles:
        return self.received(m.FetchFiles)[-1]

    @property
    def order(self) -> m.FileOrder:
        return self.sent.orders[0]

    @property
    def sources(self) -> list[str]:
        return [source.host for source in self.order.sources]


def pulled(client: Client, to: str = "all", **fields: bool) -> dict[str, str]:
    client.send(m.PullModel(2, REF, to, **fields))
    reply = msgspec.msgpack.decode(client.received_last(m.Result)[-1].data, type=reports.PullReply)
    return {host.host: host.state for host in reply.hosts}


def three(bench: Bench) -> tuple[Sharing, Sharing, Sharing]:
    hosts = Sharing(bench, "a"), Sharing(bench, "b"), Sharing(bench, "c")
    assert pulled(bench.client()) == {"a": "waiting", "b": "waiting", "c": "waiting"}
    for host in hosts:
        host.has("waiting")
    return hosts


def test_one_downloads_it_and_is_the_source_of_the_others() -> None:
    a, b, c = three(Bench(**NEVER_LOST))
    assert [host.order.outside for host in (a, b, c)] == [False, False, True]
    assert a.sources == ["c"] and c.sources == []
    grants = {grant.ticket for grant in c.sent.grants}
    assert grants == {a.order.sources[0].ticket, b.order.sources[0].ticket} and len(grants) == 2
    b.has("fetching", 50)
    assert a.sources == ["c", "b"], "who has its beginning gives it too"
    c.has("here", 100)
    assert not any(host.order.outside for host in (a, b, c))


def test_when_the_one_that_downloads_is_lost_the_one_that_has_most_goes_on() -> None:
    bench = Bench(**NEVER_LOST)
    a, b, c = three(bench)
    a.has("fetching", 40)
    b.has("fetching", 30)
    c.send(m.Goodbye("killed"))
    bench.pass_time(files.LOST_MS // 2)
    assert not a.order.outside, "it may come back"
    bench.pass_time(files.LOST_MS)
    assert a.order.outside and not b.order.outside
    assert b.sources == ["a"]


def test_a_host_that_has_sent_wrong_bytes_does_not_go_on_for_another() -> None:
    bench = Bench(**NEVER_LOST)
    a, b, c = three(bench)
    a.has("fetching", 60)
    b.has("fetching", 30, wrong=["a"])
    c.send(m.Goodbye("killed"))
    bench.pass_time(2 * files.LOST_MS)
    assert b.order.outside and not a.order.outside


def test_who_was_stuck_before_another_had_it_gets_it_there() -> None:
    bench = Bench(**NEVER_LOST)
    a, b, c = three(bench)
    a.has("stuck", 50)
    c.has("here", 100)
    assert not a.order.outside and a.sources == ["c"]
    # ... and from outside if it is of no use
    bench.pass_time(files.LOOK_MS + 500)
    assert a.order.outside and not b.order.outside


def test_nothing_is_downloaded_if_a_host_has_it() -> None:
    bench = Bench(**NEVER_LOST)
    a, b = Sharing(bench, "a"), Sharing(bench, "b")
    client = bench.client()
    assert pulled(client, "b") == {"b": "waiting"}
    assert not a.order.want, "it is asked about it"
    a.has("here", 100)
    b.has("waiting")
    assert b.order.want and not b.order.outside and b.sources == ["a"]
    b.has("here", 100)
    assert a.sent.grants == []
    assert pulled(client, "b", poll=True) == {"b": "here"}


def test_a_host_that_failed_tries_again_when_it_is_asked_again() -> None:
    bench = Bench(**NEVER_LOST)
    a, client = Sharing(bench, "a"), bench.client()
    pulled(client)
    a.has("failed", attempt=a.order.attempt, note="the disk is too small")
    assert pulled(client, poll=True) == {"a": "failed"}
    assert not a.order.want
    assert pulled(client) == {"a": "waiting"}
    assert a.order.want and a.order.attempt > 0


def test_what_a_host_wants_for_itself_it_gets() -> None:
    bench = Bench(**NEVER_LOST)
    a = Sharing(bench, "a")
    a.has("wanted")
    bench.pass_time(files.LOOK_MS + 500)
    assert a.order.want and a.order.outside


def test_only_an_admin_lets_hosts_download_and_only_what_its_key_may_use() -> None:
    bench = Bench(**NEVER_LOST)
    bench.keys(Identity("ann", "client"), Identity("ops", "admin", models=("hf:other/*",)), Identity("a", "worker"))
    Sharing(bench, "a", "a")
    for user in ("ann", "ops"):
        client = bench.client(user.encode(), user)
        client.send(m.PullModel(3, REF, "all"))
        assert client.problems[-1].error.code == Code.FORBIDDEN
        assert client.problems[-1].query == 3


def test_an_unknown_host_is_refused() -> None:
    client = Bench(**NEVER_LOST).client()
    client.send(m.PullModel(3, REF, "nowhere"))
    assert client.problems[-1].error.code == Code.UNKNOWN_WORKER


def test_a_host_that_comes_and_goes_leaves_no_tickets() -> None:
    bench = Bench(**NEVER_LOST)
    source, client = Sharing(bench, "a"), bench.client()
    coming = Sharing(bench, "b")
    pulled(client)
    source.has("here", 100)
    for _ in range(10):
        coming.has("waiting")
        coming.send(m.Goodbye())
        coming = Sharing(bench, "b")
    coming.has("waiting")
    (pull,) = bench.state.hosts.pulls.values()
    assert pull.tickets.keys() == {(source.session, coming.session)}
