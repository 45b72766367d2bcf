"""What a host does about the files that brokers want it to have, or to give to others."""

from __future__ import annotations

from llambo.mesh.wire import messages as m
from llambo.worker.host.file_orders import FETCHES, FileOrders
from llambo.worker.host.host_events import FetchModel, GrantFiles, HostAction, StopFetching

TICKET = bytes(16)


def order(ref: str, **fields: object) -> m.FileOrder:
    return m.FileOrder(ref, True, **fields)  # type: ignore[arg-type]


def settled(orders: FileOrders, out: list[HostAction], now_ms: int) -> list[HostAction]:
    out.clear()
    orders.settle(now_ms)
    return list(out)


def test_orders_and_grants_count_until_they_are_not_repeated() -> None:
    out: list[HostAction] = []
    orders = FileOrders(out)
    grant = m.FileGrant(TICKET, "a", "k")
    orders.on_orders(0, m.FetchFiles(1, [order("a")], [grant]), 100)
    assert settled(orders, out, 1) == [FetchModel(order("a")), GrantFiles((grant,))]
    assert settled(orders, out, 99) == [] and orders.next_wakeup_ms == 100
    assert settled(orders, out, 100) == [StopFetching("a"), GrantFiles(())]


def test_orders_of_two_brokers_are_one_fetch() -> None:
    out: list[HostAction] = []
    orders = FileOrders(out)
    one, other = m.FileSource("x", "tcp://x:1", TICKET), m.FileSource("y", "tcp://y:1", TICKET)
    orders.on_orders(0, m.FetchFiles(1, [order("a", sources=[one])]), 100)
    settled(orders, out, 1)
    orders.on_orders(1, m.FetchFiles(1, [order("a", outside=True, sources=[other])]), 100)
    (again,) = settled(orders, out, 2)
    assert isinstance(again, FetchModel)
    assert again.order.outside and {source.host for source in again.order.sources} == {"x", "y"}


def test_a_few_are_fetched_at_a_time_and_the_others_wait() -> None:
    out: list[HostAction] = []
    orders = FileOrders(out)
    orders.on_orders(0, m.FetchFiles(1, [order(ref) for ref in "abc"]), 100)
    assert len(settled(orders, out, 1)) == FETCHES
    assert [file.state for file in orders.hosted() if file.ref == "c"] == ["waiting"]
    orders.on_file(m.HostedFile("a", "here", 5, 5))
    assert settled(orders, out, 2) == [FetchModel(order("c"))]


def test_a_failed_one_is_tried_again_when_it_is_asked_for_anew() -> None:
    out: list[HostAction] = []
    orders = FileOrders(out)
    orders.on_orders(0, m.FetchFiles(1, [order("a", attempt=1)]), 100)
    settled(orders, out, 1)
    orders.on_file(m.HostedFile("a", "failed", note="no room", attempt=1))
    assert settled(orders, out, 2) == []
    orders.on_orders(0, m.FetchFiles(2, [order("a", attempt=2)]), 100)
    assert settled(orders, out, 3) == [FetchModel(order("a", attempt=2))]


def test_what_is_named_for_a_host_and_missing_is_reported_as_wanted() -> None:
    orders = FileOrders([])
    orders.on_wanted(("hf:a/b",))
    assert orders.changed and [(file.ref, file.state) for file in orders.hosted()] == [("hf:a/b", "wanted")]
