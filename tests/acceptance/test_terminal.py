"""Every command on a terminal, in a mesh where all names, notes, errors and answers are full of control characters."""

from __future__ import annotations

import json
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import click
import pytest

from llambo.cli import docs
from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import CONTROLS, Code, ErrorInfo
from llambo.testing.commands import BROKER
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.raw_peer import RawPeer, inference_request
from llambo.testing.terminal import CTRL_C, CTRL_D, ENTER, TAB, Terminal

#: What others call themselves and say: a title of the window, a cleared screen, colours, reversed text, C1, separators.
EVIL = "Mallory\x1b]0;PWN\x07\x1b[2J\x1b[66m\rOVER\x9b66m\x85\x08\x7f\u202egnp\u2066x\u2028y\u2029z"
#: How it looks where it was shown.
SHOWN = "Mallory"
#: What is certainly not ours: neither the library for prompts nor that for screens uses it, and the terminal driver
#: makes no carriage return before this word.
THEIRS = ("\x1b]0;PWN", "\x1b[66m", "\rOVER", "\x9b", "\x85")
#: Ours are ESC and the carriage return, and the bell and the backspace of the library for prompts.
OURS = "\x1b\r\x07\x08"
#: Requests of so many tokens the hostile worker runs for ever, the second until it is cancelled, or fails.
ENDLESS, DOOMED, ERROR = 61, 62, 63
FLEET = """
[fleet]
name = "f"
broker = "{address}"

[classes.tiny]
memory = "64MiB"
min = 0
max = 0
"""


class HostileMesh:
    """A broker on a terminal of its own, with a worker and a client of bare sockets that are called EVIL."""

    def __init__(self) -> None:
        self.terminal = Terminal("-vv", "--port", "0", module=BROKER)
        self.port = int(self.terminal.expect(r"listening at tcp://127\.0\.0\.1:(\d+)")[1])
        self.address = f"tcp://127.0.0.1:{self.port}"
        #: Requests by their number of tokens: two run, one was answered, one failed.
        self.ids: dict[int, str] = {}
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="hostile worker")

    def __enter__(self) -> HostileMesh:
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S), "the hostile worker has not joined"
        self._client = RawPeer(self.port)
        self._client.send_messages(m.ClientHello(name=EVIL, software=EVIL), session=codec.NO_SESSION)
        self._client.joined()
        for count in (ENDLESS, DOOMED, 5, ERROR):
            request = inference_request(detached=True, max_tokens=count)
            self._client.send_map(request, b"hello")
            self._client.expect(m.Accepted, id=request["id"])
            self.ids[count] = request["id"].hex()
        for count in (5, ERROR):
            self._client.expect(m.End, id=bytes.fromhex(self.ids[count]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(TIMEOUT_S)
        self._client.close()
        self.terminal.send(signal.SIGTERM)
        self.terminal.end()
        self.terminal.__exit__()
        if self._problem is not None:
            raise self._problem

    def _serve(self) -> None:
        try:
            with RawPeer(self.port, 1) as worker:
                self._work(worker)
        except Exception as problem:  # noqa: BLE001  # the test raises it
            self._problem = problem

    def _work(self, worker: RawPeer) -> None:
        models = [m.ModelInfo(EVIL, EVIL)]
        hello = m.WorkerHello(
            EVIL, secrets.token_bytes(8), models, 8, software=EVIL, node_class=EVIL, host=EVIL, library=EVIL
        )
        worker.send_messages(hello, session=codec.NO_SESSION)
        worker.joined()
        out, beat, seq, seen, claims = worker.tokens_in(), 0, 0, 0, dict[bytes, int]()
        while not self._stopping.is_set():
            self.terminal._read(0)  # or the broker would soon wait for its terminal
            beat += 1
            out.send(tokens.encode_beat(beat, worker.session))
            worker.send_messages(m.WorkerHeartbeat(seq=seq, beat=beat, claims=claims, note=EVIL, rate=1.0))
            if worker.control.poll(50):
                worker._receive()
            for _, message in worker.received[seen:]:
                seq = max(seq, getattr(message, "seq", 0))
                if isinstance(message, m.Dispatch):
                    self._answer(worker, out, message, claims)
                elif isinstance(message, m.Cancel) and claims.pop(message.id + message.dispatch, None) is not None:
                    worker.send_messages(m.End(message.id, 0, "cancelled", message.dispatch))
                elif isinstance(message, m.BrokerHeartbeat) and message.echo:
                    self._ready.set()
            seen = len(worker.received)

    def _answer(self, worker: RawPeer, out: Any, work: m.Dispatch, claims: dict[bytes, int]) -> None:
        key = work.id + work.dispatch
        worker.send_messages(m.Accept(work.id, work.dispatch))
        if work.max_tokens in (ENDLESS, DOOMED):
            claims[key] = 0
        elif work.max_tokens == ERROR or work.task != "generate":
            error = ErrorInfo(Code.ENGINE_FAILED, EVIL)
            worker.send_messages(m.End(work.id, 0, "error", work.dispatch, error=error))
        else:
            out.send(tokens.encode_chunk(key, 0, [1, 2], [EVIL.encode(), b" **bold** "], tokens.final_flags("stop")))
            worker.send_messages(m.End(work.id, 2, "stop", work.dispatch))


@pytest.fixture(scope="module")
def mesh() -> Iterator[HostileMesh]:
    with HostileMesh() as mesh:
        yield mesh


def check(raw: str, what: str) -> int:
    """No control character of others is in it. How often they were shown."""
    wrong = {letter for letter in raw if ord(letter) in CONTROLS and letter not in OURS}
    wrong |= {text for text in THEIRS if text in raw}
    at = min((raw.index(text) for text in wrong), default=0)
    assert not wrong, f"{what} has written {wrong}: {raw[max(0, at - 200) : at + 50]!r}"
    return raw.count(SHOWN)


# --- commands that end by themselves -----------------------------------------------------------------------------


def cases(mesh: HostileMesh, folder: Path) -> dict[str, list[list[str]]]:
    """By the path of each command, what is run. More than one: the last of them show most of others."""
    ask = ["--broker", mesh.address]
    file, keys = str(folder / "fleet.toml"), ["--keys", str(folder / "keys")]
    fleet = ["--file", file, "--state", str(folder / "state")]
    one, failed = mesh.ids[5], mesh.ids[ERROR]

    def asked(*words: str) -> list[str]:
        return [*ask, *words]

    def in_fleet(command: str, *words: str) -> list[str]:
        return [*ask, "fleet", command, *words, *fleet]

    return {
        "llambo": [["--help"]],
        "llambo send": [asked("send", "hi"), asked("send", "--json", "hi"), asked("-v", "send", "hi"),
                        asked("send", "--max-tokens", str(ERROR), "hi")],
        "llambo attach": [asked("attach", one), asked("attach", "--json", failed)],
        "llambo embed": [asked("embed", "x"), asked("embed", "--model", EVIL, "x")],
        "llambo load": [asked("load", EVIL)],
        "llambo unload": [asked("unload", EVIL)],
        "llambo rerank": [asked("rerank", "x", "y"), asked("rerank", "--model", EVIL, "x", "y")],
        "llambo tokens": [asked("tokens", "x"), asked("tokens", "--back", "1", "2")],
        "llambo status": [asked("status"), asked("status", "--json")],
        "llambo workers": [asked("workers"), asked("workers", "--json")],
        "llambo models": [asked("models"), asked("models", EVIL), asked("models", "--json")],
        "llambo pull": [["pull", EVIL], ["pull", f"hf:{EVIL}"]],
        "llambo rm": [["rm", "--yes", EVIL]],
        "llambo requests": [asked("requests"), asked("requests", "--json")],
        "llambo why": [asked("why", id) for id in mesh.ids.values()] + [asked("why", "--json", failed)],
        "llambo events": [asked("events"), asked("events", "--json")],
        "llambo metrics": [asked("metrics")],
        "llambo drain": [asked("drain", "--no-wait", EVIL), asked("drain", "--undo", EVIL), asked("drain", EVIL + "?")],
        "llambo cancel": [asked("cancel", mesh.ids[DOOMED])],
        "llambo fleet init": [["fleet", "init", "--file", str(folder / "new.toml")]],
        "llambo fleet plan": [in_fleet("plan")],
        "llambo fleet apply": [in_fleet("apply")],
        "llambo fleet status": [in_fleet("status"), in_fleet("status", "--json")],
        "llambo fleet logs": [in_fleet("logs", EVIL)],
        "llambo fleet scale": [in_fleet("scale", "tiny=0")],
        "llambo fleet spawn": [in_fleet("spawn", EVIL)],
        "llambo fleet rolling-restart": [in_fleet("rolling-restart")],
        "llambo fleet rollback": [in_fleet("rollback")],
        "llambo fleet drain": [in_fleet("drain", EVIL)],
        "llambo fleet down": [in_fleet("down")],
        "llambo systemd install": [["systemd", "install", "--root", str(folder)]],
        "llambo systemd check": [["systemd", "check", "--root", str(folder)]],
        "llambo doctor": [asked("doctor", "broker")],
        "llambo keys init": [["keys", "init", *keys]],
        "llambo keys add": [["keys", "add", "a", "--role", "client", "--models", EVIL, *keys]],
        "llambo keys rotate": [["keys", "rotate", "a", *keys]],
        "llambo keys export": [["keys", "export", "a", *keys]],
        "llambo keys token": [["keys", "token", "a", *keys]],
        "llambo keys list": [["keys", "list", *keys], ["keys", "list", "--json", *keys]],
        "llambo keys revoke": [["keys", "revoke", "a", *keys], ["keys", "revoke", EVIL, *keys]],
        "llambo config": [["--broker", EVIL, "config"], ["--broker", EVIL, "config", "--json"]],
        "llambo completion": [["completion", "bash"]],
        "llambo help": [["help"], ["help", "send"], ["help", EVIL]],
    }  # fmt: skip


#: Commands that show nothing of others in this mesh.
QUIET = {
    "llambo", "llambo fleet init", "llambo fleet scale", "llambo fleet rollback", "llambo fleet down",
    "llambo fleet plan", "llambo fleet apply", "llambo fleet rolling-restart", "llambo systemd install",
    "llambo systemd check", "llambo doctor", "llambo keys init", "llambo keys add", "llambo keys rotate",
    "llambo keys export", "llambo keys token", "llambo completion", "llambo cancel", "llambo fleet status",
}  # fmt: skip


def test_commands_that_end(mesh: HostileMesh, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET.format(address=mesh.address))
    table = cases(mesh, tmp_path)
    words = json.dumps([each for rows in table.values() for each in rows])
    env = {"PAGER": "cat", "XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    with Terminal(words, module="tests.acceptance.every_command", env=env) as terminal:
        assert terminal.end() == 0, terminal.story("it failed")
    outputs = iter(re.split(r"@@@ exit \S+\r\n", terminal.raw))
    shown = {path: sum(check(next(outputs).partition("\n")[2], " ".join(row)) for row in rows)
             for path, rows in table.items()}  # fmt: skip
    print("\n", shown)
    assert {path for path, count in shown.items() if not count} <= QUIET


# --- commands that go on -----------------------------------------------------------------------------------------


def chat(terminal: Terminal, mesh: HostileMesh) -> None:
    terminal.until("/help")
    terminal.enter("hi")
    terminal.until(SHOWN, after="hi")
    terminal.enter("/model")
    terminal.until(SHOWN, after="/model")
    terminal.press(CTRL_D)


def shell(terminal: Terminal, mesh: HostileMesh) -> None:
    terminal.until("llambo>")
    terminal.ask(f"why {mesh.ids[ERROR]}", SHOWN, after="why")
    terminal.ask("watch --times 2 --every 100ms workers", SHOWN)
    terminal.press(f"drain M{TAB}")
    terminal.until(f"drain {SHOWN}")
    terminal.press(CTRL_C)
    terminal.until(lambda text: text.endswith("llambo>"))
    terminal.press(CTRL_D)


def top(terminal: Terminal, mesh: HostileMesh) -> None:
    terminal.until(SHOWN)
    terminal.press("1d")
    terminal.until("Drain Mallory")
    terminal.press("n")
    terminal.until(lambda text: "Drain Mallory" not in text)
    terminal.press(f"2{ENTER}")
    terminal.until(lambda text: "of model" in text and "Esc closes" in text)
    terminal.press("w")
    terminal.until(lambda text: "Esc closes" not in text)
    terminal.press("q")


def up(terminal: Terminal, mesh: HostileMesh) -> None:
    port = int(terminal.expect(r"broker at tcp://127\.0\.0\.1:(\d+)")[1])
    terminal.expect("Ctrl-C stops everything")
    with RawPeer(port, 1) as peer:
        peer.join_as_worker(EVIL, EVIL)
        terminal.expect(f"worker joined.*{SHOWN}|{SHOWN}.*joined")
    terminal.press(CTRL_C)


def gateway(terminal: Terminal, mesh: HostileMesh) -> None:
    port = int(terminal.expect(r"http://127\.0\.0\.1:(\d+)/")[1])
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    body = {"messages": [{"role": "user", "content": EVIL}], "max_tokens": ERROR, "model": EVIL}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    assert (reply.status, SHOWN.encode() in reply.read()) == (502, True)
    connection.request("GET", "/" + quote(EVIL))
    assert connection.getresponse().status == 404
    connection.close()
    terminal.expect("GET /" + SHOWN)
    terminal.press(CTRL_C)


def bridge(terminal: Terminal, mesh: HostileMesh) -> None:
    path = terminal.expect(r"listening at (\S+);")[1]
    with socket.socket(socket.AF_UNIX) as peer, peer.makefile("rw") as lines:
        peer.connect(path)
        for line in ("STATUS", f"LOAD {EVIL}?", "INFER hi"):
            lines.write(line.replace("\r", "") + "\n")
            lines.flush()
            check(lines.readline(), line)
    terminal.press(CTRL_C)


def fleet_run(terminal: Terminal, mesh: HostileMesh) -> None:
    terminal.expect("fleet: ")
    terminal.press(CTRL_C)


def worker(terminal: Terminal, mesh: HostileMesh) -> None:
    terminal.expect("is ready")
    terminal.press(CTRL_C)


#: What is done at the terminal of each.
RUNNING: dict[str, Callable[[Terminal, HostileMesh], None]] = {
    "llambo chat": chat,
    "llambo shell": shell,
    "llambo top": top,
    "llambo up": up,
    "llambo gateway": gateway,
    "llambo bridge": bridge,
    "llambo fleet run": fleet_run,
    "llambo worker": worker,
}


def test_commands_that_go_on(mesh: HostileMesh, tmp_path: Path) -> None:
    """All are started before the first is used."""
    (tmp_path / "fleet.toml").write_text(FLEET.format(address=mesh.address))
    words = {
        "llambo chat": ["--private", "--model", EVIL],
        "llambo up": ["--port", "0", "--no-http", "--workers", "1"],
        "llambo gateway": ["--http-port", "0"],
        "llambo bridge": ["--socket", str(tmp_path / "b.sock")],
        "llambo fleet run": ["--file", str(tmp_path / "fleet.toml"), "--state", str(tmp_path / "state")],
        "llambo worker": ["--name", "w"],
    }
    verbose = {"llambo up", "llambo gateway", "llambo bridge", "llambo worker"}
    shown = {}
    with ExitStack() as stack:
        terminals = {}
        for path in RUNNING:
            more = ["-vv"] if path in verbose else []
            start = ["--broker", mesh.address, *more, *path.split()[1:], *words.get(path, [])]
            terminals[path] = stack.enter_context(Terminal(*start, env={"XDG_STATE_HOME": str(tmp_path)}))
        for path, use in RUNNING.items():
            use(terminals[path], mesh)
            terminals[path].end()
            shown[path] = check(terminals[path].raw, path)
    shown["llambo-broker"] = check(mesh.terminal.raw, "llambo-broker")
    print("\n", shown)
    quiet = {path for path, count in shown.items() if not count}
    assert quiet <= {"llambo bridge", "llambo fleet run", "llambo worker"}


def test_no_command_is_left_out(tmp_path: Path) -> None:
    """A new command needs a case above."""

    def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                below = command.get_command(click.Context(command), name)
                assert below is not None
                yield from leaves(below, f"{path} {name}")
        else:
            yield path, command

    mesh: Any = SimpleNamespace(address="", ids=dict.fromkeys((ENDLESS, DOOMED, 5, ERROR), ""))
    tried = {*cases(mesh, tmp_path), *RUNNING, "llambo-broker"}
    every = [leaf for name, command in docs.COMMANDS.items() for leaf in leaves(command, name)]
    done = {id(command) for path, command in every if path in tried}
    assert [path for path, command in every if id(command) not in done] == []
    assert tried <= {"llambo", *(path for path, _ in every)}
