"""The commands a person types, against real brokers and workers with the fake engine."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import tiny_model
from llambo import SyncClient
from llambo.cli.kit.answer_views import FAKE
from llambo.cli.kit.failure import Exit
from llambo.testing.commands import BROKER, LLAMBO, ROOT, WORKER, Commands, by_hand, command, environment, up
from llambo.testing.processes import TIMEOUT_S, children, family, wait_until_gone
from llambo.testing.terminal import Terminal

#: Far more tokens than any of these tests waits for.
ENDLESS = ("--max-tokens", "20000")
FIRST_TOKEN = r'"type": "token"'

#: What `send` says on stderr of the answers of these workers.
SAID_FAKE = f"llambo: {FAKE}\n"


def cut(tokens: int) -> str:
    return f"llambo: cut after {tokens} tokens; --max-tokens allows more\n"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Commands]:
    """Two workers, 200 tokens per second for each request."""
    with up("--workers", "2", "--fake-tokens-per-s", "200") as (mesh, _):
        yield mesh


def nothing_runs(mesh: Commands) -> bool:
    return bool(mesh.ok("requests", "--json").json() == [])


# --- asking --------------------------------------------------------------------------------------------


def test_an_answer_streams_through_a_broker_and_a_worker_started_by_hand() -> None:
    with by_hand(["--name", "tiny-01"]) as (mesh, broker, [worker]):
        done = mesh.ok("send", "-v", "--seed", "7", "--max-tokens", "12", "hello")

        assert done.out.count(" ") == 12
        assert done.out.endswith("\n")
        assert "12 tokens in" in done.err
        assert "worker tiny-01" in done.err
        assert mesh.ok("send", "--seed", "7", "--max-tokens", "12", "-", stdin="hello\n").out == done.out
        assert mesh.ok("send", "--seed", "7", "--max-tokens", "12", stdin="hello").out == done.out
        assert mesh.ok("send", "--seed", "8", "--max-tokens", "12", "hello").out != done.out
        worker.send(signal.SIGTERM)
        assert worker.end() == 0, worker.story("SIGTERM")
        broker.send(signal.SIGTERM)
        assert broker.end() == 0, broker.story("SIGTERM")


def test_json_lines_tell_the_whole_story(mesh: Commands) -> None:
    plain = mesh.ok("send", "--seed", "7", "--max-tokens", "12", "hello").out
    accepted, *tokens, end = mesh.ok(
        "send", "-", "--json", "--seed", "7", "--max-tokens", "12", stdin="hello\n"
    ).lines()

    assert accepted == {"type": "accepted", "id": end["id"], "model": "fake", "ahead": 0}
    assert {token["type"] for token in tokens} == {"token"}
    assert "".join(token["text"] for token in tokens) == plain.removesuffix("\n")
    assert [token["index"] for token in tokens] == [
        sum(len(t["ids"]) for t in tokens[:at]) for at in range(len(tokens))
    ]
    assert (end["type"], end["reason"], end["tokens"], end["moves"]) == ("end", "length", 12, 0)
    assert end["worker"] in ("worker-1", "worker-2")
    assert end["total_ms"] >= end["first_token_ms"] > 0


def shell(mesh: Commands, words: str) -> subprocess.CompletedProcess[str]:
    """`llambo WORDS`, by a shell: words may be redirections."""
    return subprocess.run(
        f"exec {sys.executable} -m {LLAMBO} --broker {mesh.address} {words}",
        shell=True, capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def test_the_fake_engine_says_that_it_is_one(mesh: Commands) -> None:
    assert mesh.ok("send", "--max-tokens", "5", "hi").err == SAID_FAKE + cut(5)
    assert mesh.ok("send", "--json", "--max-tokens", "5", "hi").lines()[-1]["fake"] is True
    assert "fake (fake engine)" in mesh.ok("status").out


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_stream_that_is_closed_costs_nothing_of_the_answer(mesh: Commands, closed: str) -> None:
    done = shell(mesh, f"send -v --max-tokens 5 hi {closed}")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ") == 5


@pytest.mark.parametrize("words", ["send hi", "status", "workers"])
def test_a_closed_stdout_is_no_error(mesh: Commands, words: str) -> None:
    done = shell(mesh, f"{words} >&-")

    assert (done.returncode, done.stderr.replace(SAID_FAKE, "").replace(cut(256), "")) == (0, "")


@pytest.mark.parametrize("words", ["send hi", "status"])
def test_a_full_disk_is_one_line(mesh: Commands, words: str) -> None:
    done = shell(mesh, f"{words} >/dev/full")

    said = done.stderr.replace(SAID_FAKE, "")
    assert (done.returncode, said) == (Exit.ERROR, "llambo: cannot write: No space left on device\n")


def test_a_terminal_that_is_closed_cancels(mesh: Commands) -> None:
    with mesh.start("send", "--json", *ENDLESS, "hello") as sending:
        sending.line(FIRST_TOKEN)
        sending.send(signal.SIGHUP)
        assert sending.end() == 128 + signal.SIGHUP, sending.story("the exit status")

    assert sending.objects()[-1]["reason"] == "cancelled"


def test_the_port_for_workers_is_recognized(mesh: Commands) -> None:
    host, _, port = mesh.address.rpartition(":")
    done = mesh.llambo("--broker", f"{host}:{int(port) + 1}", "status")

    assert done.code != 0
    assert "port for workers" in done.err


def test_a_lost_broker_and_its_return_are_printed() -> None:
    with command(BROKER, "--port", "0") as broker:
        port = broker.line(r"listening at tcp://\S+:(\d+)")[1]
        address = f"tcp://127.0.0.1:{port}"
        with command(WORKER, "--broker", address, "--fake-tokens-per-s", "50") as worker:
            worker.line("is ready")
            with command(LLAMBO, "--broker", address, "send", "-v", "--json", *ENDLESS, "hello") as sending:
                sending.line(FIRST_TOKEN)
                broker.send(signal.SIGKILL)
                broker.end()
                sending.line("lost the broker .*; trying again")
                with command(BROKER, "--port", port):
                    sending.line("the broker is back")
                    sending.send(signal.SIGINT)
                    sending.end()
            assert sum("lost the broker" in line for line in sending.err) == 1


def test_a_worker_whose_name_is_taken_says_so_also_when_its_engine_is_ready() -> None:
    with (
        by_hand(["--name", "tiny"]) as (mesh, _, _),
        command(WORKER, "--name", "tiny", "--broker", mesh.address) as second,
    ):
        second.line("the name 'tiny' is taken by a worker on .*; start this one with --name tiny-2; trying again")
        second.line("the engine is ready, but this worker gets no requests: .*--name tiny-2")


def test_a_worker_without_a_broker_says_so() -> None:
    with command(WORKER, "--broker", "tcp://127.0.0.1:1") as worker:
        worker.line("no broker answers at tcp://127.0.0.1:1; trying again")


def test_a_mesh_whose_terminal_is_closed_leaves_no_process() -> None:
    screen, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", LLAMBO, "up", "--port", "0", "--workers", "1", "-v"],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment(),
    ) as running:  # fmt: skip
        try:
            os.close(theirs)
            output = b""
            while b"Ctrl-C stops everything" not in output:
                assert select.select([screen], [], [], TIMEOUT_S)[0], output
                output += os.read(screen, 4096)
            pids = family(running.pid)
            os.close(screen)
            running.send_signal(signal.SIGHUP)
            assert running.wait(TIMEOUT_S) == Exit.OK
        finally:
            running.kill()
    for pid in pids:
        wait_until_gone(pid, TIMEOUT_S)


def test_without_a_stream_the_answer_comes_whole(mesh: Commands) -> None:
    accepted, token, end = mesh.ok("send", "--json", "--no-stream", "--seed", "7", "--max-tokens", "30", "hi").lines()

    assert [line["type"] for line in (accepted, token, end)] == ["accepted", "token", "end"]
    assert len(token["ids"]) == 30
    assert mesh.ok("send", "--no-stream", "--seed", "7", "--max-tokens", "30", "hi").out == token["text"] + "\n"


def test_generation_ends_before_a_stop_text(mesh: Commands) -> None:
    words = mesh.ok("send", "--seed", "7", "--max-tokens", "30", "hello").out.split()

    *_, end = mesh.ok(
        "send", "--json", "--seed", "7", "--max-tokens", "30", "--stop", words[9], "--stop", "xyzzy", "hello"
    ).lines()  # fmt: skip

    assert (end["reason"], end["tokens"]) == ("stop", 9)


def test_a_detached_request_runs_on_and_is_attached_to_by_the_beginning_of_its_id(mesh: Commands) -> None:
    id = mesh.ok("send", "--detach", "--seed", "7", "--max-tokens", "60", "hello").out.strip()

    first = mesh.ok("attach", id[:10])

    assert first.out.count(" ") == 60
    assert mesh.ok("attach", id).out == first.out
    assert mesh.ok("send", "--seed", "7", "--max-tokens", "60", "hello").out == first.out
    assert id in mesh.ok("why", id[:8]).out


def test_an_answer_that_is_over_is_attached_to_with_the_same_lines(mesh: Commands) -> None:
    id = mesh.ok("send", "--detach", "--json", "--max-tokens", "2", "hello").json()["id"]
    mesh.ok("attach", id)

    accepted, *tokens, end = mesh.ok("attach", "--json", id).lines()

    assert (accepted["type"], accepted["id"]) == ("accepted", id)
    assert sum(len(token["ids"]) for token in tokens) == end["tokens"] == 2


def test_ctrl_c_leaves_an_attached_request_alone(mesh: Commands) -> None:
    id = mesh.ok("send", "--detach", *ENDLESS, "hello").out.strip()
    with mesh.start("attach", "--json", id) as attached:
        attached.line(FIRST_TOKEN)
        attached.send(signal.SIGINT)
        assert attached.end() == Exit.INTERRUPTED
        assert f"llambo attach {id}" in attached.err[-1]

    assert mesh.ok("why", "--json", id).json()["state"] == "running"
    assert mesh.ok("cancel", id[:10]).out.startswith(f"cancelled {id} after ")
    assert nothing_runs(mesh)


def test_on_a_terminal_the_place_in_the_queue_is_shown() -> None:
    with by_hand(["--slots", "1", "--fake-tokens-per-s", "50"]) as (mesh, _, _):
        first, second = (mesh.ok("send", "--detach", *ENDLESS, "hello").out.strip() for _ in range(2))
        words = ["send", "--seed", "7", "--max-tokens", "2", "hello"]
        with Terminal("--broker", mesh.address, *words, only_stderr=True) as shown:
            shown.until_raw("waiting, 1 ahead")
            mesh.ok("cancel", second)
            shown.until_raw("waiting, next in line")
            mesh.ok("cancel", first)
            shown.until_raw("\r\x1b[K")
            assert shown.end() == Exit.OK
        assert len(shown.out.split()) == 2


def test_an_answer_that_stalls_says_on_a_terminal_what_it_waits_for() -> None:
    slow, fast = (["--name", "tiny", "--fake-tokens-per-s", speed] for speed in ("20", "2000"))
    words = ["--seed", "7", "--max-tokens", "300", "hello"]
    with by_hand(slow) as (mesh, _, [worker]):
        with mesh.start("send", "-v", *words) as piped:
            deadline = time.monotonic() + TIMEOUT_S
            while not any(row["tokens"] for row in mesh.ok("requests", "--json").json()):
                assert time.monotonic() < deadline, piped.story("no token has come")
            with Terminal("--broker", mesh.address, "send", *words, columns=120) as shown:
                shown.until(lambda text: len(text.split()) > 30)
                worker.kill()
                # Below the text, which is shown up to the last token that has come; in a pipe on a line of its own
                shown.until("waiting for a worker with the very same model; no worker serves fake; lost: worker tiny")
                piped.line("llambo: waiting for a worker with the very same model")
                with command(WORKER, "--broker", mesh.address, *fast) as again:
                    again.line("is ready")
                    # ... and nothing of it is left when the answer goes on
                    assert (shown.end(), piped.end()) == (Exit.OK, Exit.OK)
                    truth = mesh.ok("send", *words).out.split()
        said = SAID_FAKE.split()
        assert shown.text.split() == said + truth + cut(300).split()
        assert "\n".join(piped.out).split() == truth


# --- stopping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupt_cancels_on_the_worker(mesh: Commands, number: int, code: int) -> None:
    with mesh.start("send", "--json", *ENDLESS, "hello") as sending:
        id = sending.line(r'"accepted", "id": "(\w+)"')[1]
        sending.line(FIRST_TOKEN)
        sending.send(number)
        assert sending.end() == code, sending.story("the exit status")
        end = sending.objects()[-1]

    assert (end["type"], end["reason"]) == ("end", "cancelled")
    assert mesh.ok("why", "--json", id).json()["reason"] == "cancelled"
    assert nothing_runs(mesh)


def test_a_second_ctrl_c_does_not_wait_for_a_broker_that_is_stuck() -> None:
    with by_hand(["--fake-tokens-per-s", "100"]) as (mesh, broker, _), mesh.start("send", "--json", "a") as sending:
        sending.line(FIRST_TOKEN)
        broker.send(signal.SIGSTOP)
        try:
            sending.send(signal.SIGINT)
            sending.send(signal.SIGTERM)
            # Whichever the kernel hands over first: neither waits for the END.
            assert sending.end(1.5) in (130, 143)
        finally:
            broker.send(signal.SIGCONT)


def test_a_reader_that_leaves_ends_it_quietly(mesh: Commands) -> None:
    sending = subprocess.Popen(
        [sys.executable, "-m", LLAMBO, "--broker", mesh.address, "send", "--json", *ENDLESS, "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    with sending:
        head = subprocess.run(["head", "-3"], stdin=sending.stdout, capture_output=True, timeout=TIMEOUT_S, check=True)
        assert sending.stdout is not None
        sending.stdout.close()  # ours: `head` was the other reader
        assert sending.wait(TIMEOUT_S) == Exit.OK
        assert sending.stderr is not None
        assert sending.stderr.read() == b""

    assert head.stdout.count(b"\n") == 3
    assert nothing_runs(mesh)


def test_a_deadline_ends_it_and_keeps_what_there_is(mesh: Commands) -> None:
    done = mesh.llambo("send", "-v", "--deadline", "300ms", *ENDLESS, "hello")

    assert done.code == Exit.TIMEOUT, done.story
    assert "the deadline has passed after" in done.err
    # ... and it says how to look at what happened
    found = re.search(r"^id (\w+)$", done.err, re.MULTILINE)
    assert found, done.story
    assert f"`llambo why {found[1][:8]}` shows what happened" in done.err
    assert mesh.ok("why", found[1][:8]).out.startswith(f"request {found[1]}: ended (deadline)")
    assert len(done.out.split()) > 5


def test_a_timeout_of_its_own_cancels_too(mesh: Commands) -> None:
    done = mesh.llambo("send", "--timeout-ms", "300", *ENDLESS, "hello")

    assert done.code == Exit.TIMEOUT, done.story
    assert "no whole answer within 300 ms" in done.err
    assert nothing_runs(mesh)


# --- what can be wrong ---------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_and_the_known_ones_are_listed(mesh: Commands) -> None:
    done = mesh.llambo("send", "--json", "--model", "gpt-9", "hello")

    assert done.code == Exit.REFUSED, done.story
    assert "gpt-9" in done.err
    assert "there is: fake" in done.err
    assert done.json()["code"] == "unknown_model"


def test_with_several_models_one_must_be_named() -> None:
    with by_hand(["--model", "tiny", "--name", "a"], ["--model", "large", "--name", "b"]) as (mesh, _, _):
        done = mesh.llambo("send", "hello")
        assert done.code == Exit.REFUSED, done.story
        assert "large, tiny" in done.err
        assert "--model" in done.err

        *_, end = mesh.ok("send", "--json", "--model", "large", "--max-tokens", "3", "hello").lines()
        assert end["worker"] == "b"


def test_an_empty_prompt_is_refused(mesh: Commands) -> None:
    done = mesh.llambo("send", "-", stdin="")

    assert done.code == Exit.REFUSED, done.story
    assert "the prompt is empty" in done.err


@pytest.mark.parametrize("command", ["why", "cancel", "attach"])
def test_an_unknown_id_has_its_own_exit_code(mesh: Commands, command: str) -> None:
    done = mesh.llambo(command, "ffffffffffff")

    assert done.code == Exit.UNKNOWN_ID, done.story
    assert "no request ffffffffffff is known" in done.err


def test_no_broker_is_an_error_with_a_hint() -> None:
    done = Commands("tcp://127.0.0.1:1").llambo("send", "--connect-ms", "200", "hello")

    assert done.code == Exit.NO_BROKER, done.story
    assert done.err == (
        "llambo: no broker answers at tcp://127.0.0.1:1\n  start one with `llambo-broker` or `llambo up`\n"
    )  # fmt: skip


def test_models_of_the_host_are_listed_without_a_broker(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_model.whole())
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    words = ("models", "--connect-ms", "200", "--models-dir", str(tmp_path))
    nowhere = Commands("tcp://127.0.0.1:1")

    shown = nowhere.ok(*words).out
    found = nowhere.ok(*words, "--json").json()

    assert shown.splitlines()[-1].startswith("served: no broker answers at tcp://127.0.0.1:1")
    (line,) = [line for line in shown.splitlines() if "tiny.gguf" in line]
    assert line.split()[3:] == ["generate", "llama", "F32", "512", "models", "folder", "yes"]
    assert (found["mesh"], found["problem"].split(" at ")[0]) == (None, "no broker answers")
    assert {Path(each["path"]).name: each["problem"] for each in found["host"] if each["where"] == "models folder"} == {
        "tiny.gguf": "",
        "junk.gguf": "it is not a GGUF file",
    }


def test_a_file_is_described_without_a_broker(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_model.whole())
    nowhere = Commands("tcp://127.0.0.1:1")
    shown = nowhere.ok("models", str(tmp_path / "tiny.gguf"))
    assert "trained context  512" in shown.out and f"yes: llambo up --model {tmp_path}/tiny.gguf" in shown.out
    assert nowhere.ok("models", str(tmp_path / "tiny.gguf"), "--json").json()["problem"] == ""
    missing = nowhere.llambo("models", "/nowhere/x.gguf")
    assert missing.code == Exit.ERROR and "there is no file /nowhere/x.gguf" in missing.err


@pytest.mark.parametrize("kind", ["junk", "cut", "too large"])
def test_a_worker_whose_model_cannot_be_loaded_ends_with_the_reason(tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "x.gguf", tiny_model.whole()
    path.write_bytes({"junk": b"junk", "cut": content[:200_000]}.get(kind, content))
    with by_hand() as (mesh, _, _):
        size = ("--ctx", str(16 * 2**20), "--slots", "64") if kind == "too large" else ()
        words = ("--broker", mesh.address, "--engine", "llama", "--model", str(path))
        with command(WORKER, *words, *size) as worker:
            assert worker.end() == Exit.ERROR
        output = " ".join(worker.err)
        assert f"llambo: cannot serve {path}: {path} " in output
        if kind == "too large":
            assert "MiB of cache for 64 slots of 16777216 tokens" in output and "would fit" in output
        # The mesh has seen it come and go
        assert "cannot serve" in mesh.ok("events").out


def test_a_broker_without_workers_says_so() -> None:
    with by_hand() as (mesh, _, _):
        done = mesh.llambo("send", "hello")

        assert done.code == Exit.BUSY, done.story
        assert "llambo-worker" in done.err
        assert mesh.ok("workers").out == ""


# --- looking -------------------------------------------------------------------------------------------


def test_lists_are_plain_text_in_a_pipe_and_json_when_asked(mesh: Commands) -> None:
    mesh.ok("send", "--max-tokens", "3", "hello")
    shown = {name: mesh.ok(name).out for name in ("status", "workers", "models", "events")}

    assert all(text.isascii() and "\x1b" not in text for text in shown.values())
    assert [line.split()[:2] for line in shown["workers"].splitlines()[1:]] == [
        ["worker-1", "ready"],
        ["worker-2", "ready"],
    ]
    assert "2 ready of 2" in shown["status"]
    assert "worker joined" in shown["events"]
    assert mesh.ok("status", "--json").json()["ready"] == 2
    assert [row["worker"] for row in mesh.ok("workers", "--json").json()] == ["worker-1", "worker-2"]
    listed = mesh.ok("models", "--json").json()
    (model,) = listed["mesh"]
    assert model == {
        "model": "fake", "workers": 2, "loading": 0, "slots": 8, "waiting": 0, "fake": True, "variants": [],
        "kind": "generate", "hosts": [], "note": "",
    }  # fmt: skip
    assert listed["problem"] == ""
    last = mesh.ok("events", "--json").json()[-1]["number"]
    assert mesh.ok("events", "--since", str(last), "--json").json() == []


def test_why_tells_the_steps_of_a_request(mesh: Commands) -> None:
    id = mesh.ok("send", "--json", "--max-tokens", "3", "hello").lines()[0]["id"]

    shown = mesh.ok("why", id[:12]).out

    assert shown.splitlines()[0].startswith(f"request {id}: ended (length) after 3 tokens of model fake on worker-")
    steps = [line.split()[2] for line in shown.splitlines()[1:]]
    assert steps[0] == "submitted"
    assert steps[-1] == "ended"
    # Without an id it is the one that was sent last
    assert mesh.ok("why").out == shown == mesh.ok("why", "last").out


def test_a_drained_worker_gets_nothing_until_that_is_undone(mesh: Commands) -> None:
    assert "takes no new work" in mesh.ok("drain", "worker-1").out
    try:
        ends = [mesh.ok("send", "--json", "--max-tokens", "2", "hello").lines()[-1] for _ in range(3)]
        assert {end["worker"] for end in ends} == {"worker-2"}
        states = {row["worker"]: row["state"] for row in mesh.ok("workers", "--json").json()}
        assert states["worker-1"] == "drained"
    finally:
        assert mesh.ok("drain", "worker-1", "--undo").out == "worker-1 works again\n"

    done = mesh.llambo("drain", "no-such-worker")
    assert done.code == Exit.UNKNOWN_ID, done.story


@pytest.fixture
def busy(mesh: Commands) -> Iterator[tuple[str, str]]:
    """A request that runs while the test does, and the name of its worker. Nothing is drained afterwards."""
    with mesh.start("send", "--json", *ENDLESS, "hello") as sending:
        id = sending.line(r'"accepted", "id": "(\w+)"')[1]
        sending.line(FIRST_TOKEN)
        name = mesh.ok("why", "--json", id).json()["worker"]
        try:
            yield id, name
        finally:
            mesh.ok("drain", name, "--undo")
        sending.send(signal.SIGINT)
        sending.end()


def test_a_drain_waits_until_the_worker_is_empty_and_with_move_its_streams_go_on_elsewhere(
    mesh: Commands, busy: tuple[str, str]
) -> None:
    id, name = busy
    with mesh.start("drain", name) as draining:
        draining.line("1 request is still running there")
        assert draining.process.poll() is None, draining.story("it does not wait")
        assert "1 request is still" in mesh.ok("drain", name, "--no-wait").out
        # What it cannot finish soon is given away; then the one that waits is done as well.
        moved = mesh.ok("drain", name, "--move")
        assert moved.out == f"{name} takes no new work and runs nothing: it can be stopped\n"
        assert draining.end() == Exit.OK, draining.story("the exit status")
    why = mesh.ok("why", "--json", id).json()
    assert why["worker"] != name
    assert f"{name} is being emptied" in str(why["story"])


def test_a_drain_that_is_undone_ends_with_status_1(mesh: Commands, busy: tuple[str, str]) -> None:
    _, name = busy
    with mesh.start("drain", name) as draining:
        draining.line("1 request is still running there")
        mesh.ok("drain", name, "--undo")
        assert draining.end() == Exit.ERROR, draining.story("the exit status")
        assert draining.lines[-1] == f"{name} works again"
    with mesh.start("drain", name) as draining:
        draining.line("1 request is still running there")
        draining.send(signal.SIGINT)
        assert draining.end() == Exit.INTERRUPTED, draining.story("the exit status")
        assert f"`llambo drain {name} --undo` takes it back" in draining.lines[-1]


# --- a whole mesh --------------------------------------------------------------------------------------


def test_a_killed_worker_moves_its_stream_and_is_started_again() -> None:
    with up("--workers", "2", "--fake-tokens-per-s", "100") as (mesh, running):
        truth = mesh.ok("send", "--seed", "7", "--max-tokens", "150", "hello").out
        # (asked by a client that is there already: a command takes a while to start, and the answer does not wait)
        with (
            SyncClient(mesh.address) as client,
            mesh.start("send", "--json", "--seed", "7", "--max-tokens", "150", "hello") as sending,
        ):
            id = sending.line(r'"accepted", "id": "(\w+)"')[1]
            sending.line(r'"index": [2-9]\d,')
            name = client.why(id).worker
            pid = int(running.line(rf"{name} is ready, pid (\d+)")[1])
            os.kill(pid, signal.SIGKILL)
            assert sending.end() == Exit.OK, sending.story("the exit status")
            *_, end = sending.objects()

        assert "".join(line.get("text", "") for line in sending.objects()) == truth.removesuffix("\n")
        assert end["moves"] == 1
        assert end["worker"] != name
        assert "worker lost" in mesh.ok("events").out
        running.line(rf"{name} was killed by SIGKILL")
        running.line(rf"{name} is ready again")
        assert mesh.ok("status", "--json").json()["ready"] == 2


def test_ctrl_c_stops_a_whole_mesh_and_leaves_no_process() -> None:
    with up("--workers", "2", "--fake-tokens-per-s", "100") as (mesh, running):
        pids = family(running.pid)
        assert len(pids) == 5, "a broker, two agents, two engines"
        with mesh.start("send", "--json", "--max-tokens", "50", "hello") as sending:
            sending.line(FIRST_TOKEN)
            running.send(signal.SIGINT)
            # Stopping is orderly: what runs is finished first, and its end still finds a broker.
            assert running.end() == Exit.OK, running.story("the exit status")
            assert sending.end() == Exit.OK, sending.story("the exit status")
            assert sending.objects()[-1]["tokens"] == 50
        for pid in pids:
            wait_until_gone(pid, TIMEOUT_S)
        assert running.lines[-2:] == ["llambo up: stopping", "llambo up: stopped"]


def test_a_killed_up_takes_its_children_with_it() -> None:
    with up("--workers", "1") as (_, running):
        pids = family(running.pid)
        running.send(signal.SIGKILL)
        running.end()
        for pid in pids:
            wait_until_gone(pid, TIMEOUT_S)


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    with by_hand() as (mesh, _, _):
        port = mesh.address.rpartition(":")[2]
        with command(LLAMBO, "up", "--port", port) as second:
            assert second.end() == Exit.ERROR, second.story("the exit status")
            second_said = "\n".join(second.lines)

    assert f"cannot listen on 127.0.0.1, ports {port} to" in second_said
    assert "--port 0 takes any free ports" in second_said
    assert "broker ended with status 1 before it was ready" in second_said


def test_the_demo_shows_a_stream_that_survives_its_worker() -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=6 * TIMEOUT_S,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "kill -9" in done.stdout
    assert "moved 1 time" in done.stdout
    assert "dashboard: http://127.0.0.1:" in done.stdout and '"object":"chat.completion"' in done.stdout


def test_a_mesh_answers_over_http_and_its_gateway_is_started_again() -> None:
    with up("--workers", "1", "--engine", "fake", "--http-port", "0") as (_, running):
        line = running.line(r"curl (http://127.0.0.1:\d+)/v1/chat/completions -d '(\{.*\})'")
        with urllib.request.urlopen(f"{line[1]}/v1/chat/completions", line[2].encode(), TIMEOUT_S) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"]
        (gateway,) = [pid for pid in children(running.pid) if b"gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(gateway, signal.SIGKILL)
        running.line("gateway is ready again")
        with urllib.request.urlopen(f"{line[1]}/healthz", timeout=TIMEOUT_S) as reply:
            assert reply.status == 200
