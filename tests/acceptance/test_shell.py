"""`llambo shell`, at a terminal and in scripts, against a real mesh with the fake engine."""

from __future__ import annotations

import json
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llambo.cli.kit.failure import Exit
from llambo.testing.commands import BROKER, LLAMBO, Commands, command, environment, up
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.terminal import CTRL_C, CTRL_D, TAB, Terminal

PROMPT = "llambo>"
ID = r"([0-9a-f]{32})"
#: Of an answer of the fake engine; nothing that is typed here has three such words in a row.
WORDS = r"(?:[a-z]{4} ){3}"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Commands]:
    """Two workers, 100 tokens per second for each request."""
    with up("--workers", "2", "--fake-tokens-per-s", "100") as (mesh, _):
        yield mesh


def at_terminal(mesh: Commands, *words: str, **more: str) -> Terminal:
    env = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **more}
    return Terminal("--broker", mesh.address, "shell", *words, env=env, rows=50, columns=160)


# --- at a terminal -------------------------------------------------------------------------------------


def test_every_command_at_the_prompt(mesh: Commands, tmp_path: Path) -> None:
    with at_terminal(mesh, XDG_STATE_HOME=str(tmp_path)) as shell:
        shell.expect("2 of 2 workers ready.*`help` lists the commands")
        shell.expect(PROMPT)
        for line, shown in (
            ("help", "watch +Keep on screen"),
            ("help infer", "Usage: infer "),
            ("status", "workers +2 ready of 2"),
            ("nodes", "worker-2 +ready"),
            ("workers", "worker-1 +ready"),
            ("models fake", "engine +fake"),
            ("queue", "nothing waits or runs"),
            ("requests", "nothing waits or runs"),
            ("events", "worker serves +worker-1"),
            ("set max_tokens 20", PROMPT),
            ("set", "max_tokens +20 +set"),
            ("What is AI?", r"(\w{4} ){19}\w{4}"),
            ("> why is that?", r"(\w{4} ){19}\w{4}"),
            ("infer --max-tokens 5 hello", "5 tokens in .*never moved, length, id"),
            ("watch --times 2 --every 100ms status", "workers +2 ready of 2"),
            ("drain worker-2", "worker-2 takes no new work and runs nothing"),
            ("undrain worker-2", "worker-2 works again"),
            ("unset max_tokens", PROMPT),
            ("statsu", "'status' is"),
            ("why ffff", "no request ffff is known"),
        ):
            shell.enter(line)
            shell.expect(shown)
        shell.enter("send --detach --max-tokens 20000 long")
        id = shell.expect(ID)[1]
        for line, shown in (
            (f"why {id[:8]}", "dispatched"),
            ("queue", f"{id} +running"),
            (f"cancel {id[:8]}", f"cancelled {id} after"),
            (f"attach {id[:8]}", "the request was cancelled"),
            (f"why {id}", r"ended \(cancelled\)"),
        ):
            shell.enter(line)
            shell.expect(shown)
        shell.expect(PROMPT)
        shell.enter("exit")
        assert shell.end() == Exit.OK


def test_one_connection_for_all_of_it(mesh: Commands) -> None:
    with at_terminal(mesh) as shell:
        shell.expect(PROMPT)
        clients = mesh.ok("status", "--json").json()["clients"]
        shell.enter("status; nodes; infer --max-tokens 3 hi; status")
        shell.expect("3 tokens in")
        shell.expect(rf"clients +{clients - 1}\b")  # without the one that asked
        shell.expect(PROMPT)
        shell.press(CTRL_D)
        assert shell.end() == Exit.OK


def test_ctrl_c_stops_what_runs_and_not_the_shell(mesh: Commands) -> None:
    with at_terminal(mesh) as shell:
        shell.expect(PROMPT)
        shell.enter("send --max-tokens 20000 hello")
        shell.expect(WORDS)
        shell.press(CTRL_C)
        shell.expect("interrupted; the request was cancelled after")
        shell.expect(PROMPT)
        shell.enter("watch nodes")
        shell.expect("worker-2")
        shell.press(CTRL_C)
        shell.expect(PROMPT)
        shell.enter("send --detach --max-tokens 20000 hello")
        id = shell.expect(ID)[1]
        shell.enter(f"attach {id}")
        shell.expect(WORDS)
        shell.press(CTRL_C)
        shell.expect(f"llambo attach {id}")
        shell.expect(PROMPT)
        shell.press("half a line" + CTRL_C)
        shell.expect(PROMPT)
        shell.enter(f"cancel {id}")
        shell.expect(f"cancelled {id}")
        shell.expect(PROMPT)
        shell.press(CTRL_D)
        assert shell.end() == Exit.OK
    assert mesh.ok("requests", "--json").json() == []


def test_tab_completes_commands_workers_and_requests(mesh: Commands) -> None:
    with at_terminal(mesh) as shell:
        shell.expect(PROMPT)
        shell.enter("send --detach --max-tokens 20000 hello")
        id = shell.expect(ID)[1]
        shell.expect(PROMPT)
        shell.press("stat" + TAB)
        shell.expect("us")
        shell.press("\r")
        shell.expect("2 ready of 2")
        shell.expect(PROMPT)
        shell.press("cancel " + id[:4] + TAB)
        shell.expect(id[5:])
        shell.press("\r")
        shell.expect(f"cancelled {id}")
        shell.expect(PROMPT)
        shell.press("drain wor" + TAB)
        shell.expect("worker-2")  # both are offered
        shell.press(CTRL_C)
        shell.enter("exit")
        assert shell.end() == Exit.OK


def test_lines_are_stored_for_the_next_shell_of_the_same_user(mesh: Commands, tmp_path: Path) -> None:
    for typed in ("set seed 4711\r", "\x1b[A\x1b[A\r"):
        with at_terminal(mesh, XDG_STATE_HOME=str(tmp_path)) as shell:
            shell.expect(PROMPT)
            shell.press(typed)
            shell.expect(PROMPT)
            shell.enter("set")
            shell.expect(r"seed +4711 +set")
            shell.expect(PROMPT)
            shell.press("\x1b[A\x1b[A")  # so that the next shell finds it before `exit`
            shell.expect("4711")
            shell.press("\r")
            shell.expect(PROMPT)
            shell.enter("exit")
            assert shell.end() == Exit.OK
    stored = tmp_path / "llambo" / "shell_history"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert "set seed 4711" in stored.read_text()


def test_a_lost_broker_and_its_return_are_printed_above_the_prompt() -> None:
    with command(BROKER, "--port", "0", "--client-lease-ms", "1000") as broker:
        port = broker.line(r"listening at tcp://\S+:(\d+)")[1]
        with Terminal("--broker", f"tcp://127.0.0.1:{port}", "shell") as shell:
            shell.expect(PROMPT)
            shell.press("stat")
            broker.send(signal.SIGKILL)
            broker.end()
            shell.expect("lost the broker .*; trying again")
            with command(BROKER, "--port", port):
                shell.expect("the broker is back")
                shell.enter("us")
                shell.expect("workers +0 ready of 0")
                shell.expect(PROMPT)
                shell.enter("exit")
                assert shell.end() == Exit.OK


def test_without_a_broker_there_is_a_shell_all_the_same() -> None:
    with Terminal("--broker", "tcp://127.0.0.1:1", "shell", "--connect-ms", "100") as shell:
        shell.expect("no broker answers")
        shell.expect(PROMPT)
        shell.enter("help")
        shell.expect("Anything else is a prompt")
        shell.enter("nodes")
        shell.expect("no broker answers")
        shell.expect(PROMPT)
        shell.press(CTRL_D)
        assert shell.end() == Exit.OK


def test_a_shell_that_gets_a_signal_leaves_the_mesh(mesh: Commands) -> None:
    with at_terminal(mesh) as shell:
        shell.expect(PROMPT)
        shell.enter("send --max-tokens 20000 hello")
        shell.expect(WORDS)
        shell.process.send_signal(signal.SIGTERM)
        assert shell.end() == 128 + signal.SIGTERM
    assert mesh.ok("requests", "--json").json() == []


def test_sigterm_at_the_prompt_ends_the_shell(mesh: Commands) -> None:
    with at_terminal(mesh) as shell:
        shell.expect(PROMPT)
        before = mesh.ok("status", "--json").json()["clients"]
        shell.send(signal.SIGTERM)
        assert shell.end() == 128 + signal.SIGTERM
        assert "Traceback" not in shell.text
        assert mesh.ok("status", "--json").json()["clients"] == before - 1, "it has sent GOODBYE"


# --- in scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text", "code"),
    [
        ((), "status; nodes; infer --max-tokens 3 hello", Exit.OK),
        ((), "status; why ffff; nodes", Exit.UNKNOWN_ID),
        ((), "infer --model gpt-9 hello; nodes", Exit.REFUSED),
        ((), "drain no-such-worker; nodes", Exit.UNKNOWN_ID),
        ((), "send --max-tokens 20000 --deadline 100ms hello; nodes", Exit.TIMEOUT),
        (("--keep-going",), "why ffff; infer --model gpt-9 hello; nodes", Exit.UNKNOWN_ID),
        (("--keep-going",), "nodes; frobnicates; nodes", Exit.OK),
    ],
)
def test_exit_codes_with_c_and_on_stdin(mesh: Commands, flags: tuple[str, ...], text: str, code: int) -> None:
    done = mesh.llambo("shell", "--max-tokens", "3", *flags, "-c", text)
    read = mesh.llambo("shell", "--max-tokens", "3", *flags, stdin=text.replace("; ", "\n"))

    for each in (done, read):
        assert each.code == code, each.story
        assert ("TOKENS/S" in each.out) == (code == Exit.OK or bool(flags)), each.story
    assert PROMPT not in done.out + read.out


def test_a_script_shows_what_the_commands_show(mesh: Commands) -> None:
    mesh.ok("shell", "-c", "drain worker-1 --no-wait")
    one = mesh.ok("workers", "--json").json()
    printed = mesh.ok("shell", "--json", "-c", "nodes").json()
    mesh.ok("shell", "-c", "undrain worker-1")

    assert [(row["worker"], row["state"]) for row in printed] == [(row["worker"], row["state"]) for row in one]
    plain = mesh.ok("send", "--seed", "7", "--max-tokens", "12", "hello; friend").out
    assert mesh.ok("shell", "-c", "set seed 7; set max_tokens 12; hello; friend").out == plain
    assert mesh.ok("shell", "-c", "send --seed 7 --max-tokens 12 'hello; friend'").out == plain
    assert mesh.ok("shell", "-c", "infer --seed 7 --max-tokens 12 'hello; friend'").out == plain


def test_json_of_several_commands_is_read_one_after_another(mesh: Commands) -> None:
    text = mesh.ok("shell", "--json", "-c", "status; queue; infer --max-tokens 2 hello").out
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        value, at = decoder.raw_decode(text, at)
        found.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())

    assert found[0]["ready"] == 2
    assert found[1] == []
    assert (found[2]["type"], found[-1]["type"], found[-1]["tokens"]) == ("accepted", "end", 2)


def test_remarks_and_exit_in_a_script(mesh: Commands) -> None:
    text = "\n".join(["# a remark", "", "set max_tokens 2", "infer hello", "exit", "status"])
    done = mesh.llambo("shell", stdin=text)

    assert done.code == Exit.OK, done.story
    assert "2 tokens in" in done.err and "clients" not in done.out
    assert mesh.ok("shell", stdin="").out == ""


def test_each_line_of_a_script_is_done_as_soon_as_it_is_there(mesh: Commands) -> None:
    """The next command may depend on the output of the last one."""
    with subprocess.Popen(
        [sys.executable, "-m", LLAMBO, "--broker", mesh.address, "shell"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    ) as running:  # fmt: skip
        try:
            assert running.stdin is not None and running.stdout is not None
            running.stdin.write("send --detach --max-tokens 20000 hello\n")
            running.stdin.flush()
            assert select.select([running.stdout], [], [], TIMEOUT_S)[0], "no id before the next line"
            id = running.stdout.readline().strip()
            running.stdin.write(f"cancel {id}\n")
            running.stdin.flush()
            assert select.select([running.stdout], [], [], TIMEOUT_S)[0], "nothing was cancelled"
            assert running.stdout.readline().startswith(f"cancelled {id} after")
            running.stdin.close()
            assert running.wait(TIMEOUT_S) == Exit.OK
        finally:
            running.kill()


def test_an_interrupt_ends_a_script_with_what_it_was_doing(mesh: Commands) -> None:
    with mesh.start("shell", "--keep-going", "-c", "send --json --max-tokens 20000 hello; nodes") as script:
        script.line(r'"type": "token"')
        script.send(signal.SIGINT)
        assert script.end() == Exit.INTERRUPTED, script.story("the exit status")
        assert script.objects()[-1]["reason"] == "cancelled"
    assert mesh.ok("requests", "--json").json() == []


def test_another_broker_may_be_asked_in_between(mesh: Commands) -> None:
    with up("--workers", "1") as (other, _):
        done = mesh.ok("shell", "-c", f"nodes; nodes --broker {other.address}; nodes")

    assert [line.split()[0] for line in done.out.splitlines()].count("worker-2") == 2
    assert [line.split()[0] for line in done.out.splitlines()].count("worker-1") == 3
