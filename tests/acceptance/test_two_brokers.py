"""Two brokers, as a person runs them: a list wherever an address does, and the whole picture from either."""

from __future__ import annotations

import re
import signal

from llambo.testing.commands import BROKER, WORKER, Commands, command


def test_a_list_of_brokers_is_an_address() -> None:
    with command(BROKER, "--port", "0", "--name", "left") as left, command(BROKER, "--port", "0") as right:
        addresses = [broker.line(r"listening at (tcp://\S+)")[1] for broker in (left, right)]
        here, there, either = Commands(addresses[0]), Commands(addresses[1]), Commands(",".join(addresses))
        flags = ("--slots", "2", "--fake-tokens-per-s", "50", "-v")
        with command(WORKER, "--broker", either.address, "--name", "w", *flags) as worker:
            worker.line("link 0: up")
            worker.line("link 1: up")
            worker.line(re.escape(f"w is ready, at {addresses[0]}, {addresses[1]}"))
            # A slot in use through one broker is shown as busy by the other
            with here.start("send", "--json", "--seed", "7", "--max-tokens", "100000", "for ever") as sending:
                sending.line("ids")
                assert "1 of 2 slots busy (1 through other brokers)" in there.ok("status").out
                assert "0+1/2" in there.ok("workers").out
                requests = there.ok("requests")
                assert "1 more run through other brokers" in requests.err and requests.out == ""
            left.send(signal.SIGTERM)
            assert left.end() == 0
            # A client that has both addresses in its list gets its answer all the same
            assert either.ok("send", "--max-tokens", "5", "hello").out
