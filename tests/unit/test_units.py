"""The systemd units: for a machine, for a user, and checked by systemd-analyze."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llambo.cli.main import main
from llambo.cli.services import systemd
from llambo.cli.services.systemd import EXPOSURE, Checked, everything, variables
from llambo.mesh.security.keyring import Folder
from llambo.mesh.settings.settings_table import BY_NAME
from llambo.systemd import units
from llambo.systemd.units import (
    HIDDEN,
    NOT_FOR_USERS,
    PROGRAMS,
    SERVICES,
    UNITS,
    Place,
    directives,
    hidden_folders,
    unit,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "llambo" / "systemd"
BIN = str(Path(sys.executable).absolute().parent)
USER = Place(BIN, user=True)


def settings_of(name: str) -> dict[str, str]:
    return dict(directives(unit(name, Place())))


def seconds(text: str) -> float:
    return float(text.removesuffix("ms")) / 1_000 if text.endswith("ms") else float(text)


def test_every_file_is_written_and_nothing_else() -> None:
    assert {path.name for path in (FOLDER / "units").iterdir()} == set(UNITS)
    etc = {path.name for path in (FOLDER / "etc").iterdir()}
    written = {Path(file.path).name for file in units.to_write(Place())}
    assert etc == (written - set(UNITS) - {"llambo.conf"}) | {"sysusers.conf", "tmpfiles.conf"}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("place", [Place(BIN), USER], ids=["system", "user"])
def test_a_unit_is_read_and_names_these_programs(name: str, place: Place) -> None:
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(unit(name, place))
    assert parser.has_section("Unit")
    for key, value in directives(unit(name, place)):
        if key == "ExecStart":
            assert value.split()[0] in (f"{BIN}/llambo-broker", f"{BIN}/llambo-worker", f"{BIN}/llambo")
    assert PROGRAMS not in unit(name, place)


def test_in_the_files_it_is_the_place_of_the_readme() -> None:
    assert unit("llambo.target", Place()) == (FOLDER / "units/llambo.target").read_text()
    for name in SERVICES:
        assert unit(name, Place()) == (FOLDER / "units" / name).read_text()


def test_the_limits_of_a_worker_fit_each_other() -> None:
    worker = settings_of("llambo-worker@.service")
    assert 2 * int(BY_NAME["stall_ms"].default) < 1_000 * seconds(worker["WatchdogSec"])
    assert int(BY_NAME["drain_ms"].default) + 5_000 < 1_000 * seconds(worker["TimeoutStopSec"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_every_service_has(name: str) -> None:
    service = settings_of(name)
    wanted = {"Type": "notify", "Restart": "always", "LimitCORE": "0", "StartLimitIntervalSec": "0"}
    assert {key: service[key] for key in wanted} == wanted
    assert service["RestartPreventExitStatus"].split()[0] == "2"
    assert "AF_NETLINK" in service["RestrictAddressFamilies"], "ZeroMQ aborts without it"
    filters = [value for key, value in directives(unit(name, Place())) if key == "SystemCallFilter"]
    assert "sched_setscheduler" in filters[-1] and "sched_setparam" in filters[-1], "ZeroMQ aborts without them"


@pytest.mark.parametrize("name", UNITS)
def test_a_persons_manager_is_not_asked_for_what_it_cannot_do(name: str) -> None:
    text = unit(name, USER)
    assert not {key for key, _ in directives(text)} & NOT_FOR_USERS
    assert "multi-user.target" not in text
    # No comment without its setting.
    for before, after in zip(text.split("\n"), [*text.split("\n")[1:], ""], strict=True):
        assert not (before.startswith("#") and after == "" and "nothing" in before)


def test_what_a_service_would_not_see_is_shown_to_it() -> None:
    assert hidden_folders(["/opt/llambo", "/usr", "/home/a/venv", "/home/a/venv/lib", "/rooted"]) == ["/home/a/venv"]
    assert hidden_folders([f"{top}/x" for top in HIDDEN]) == sorted(f"{top}/x" for top in HIDDEN)
    text = unit("llambo-broker.service", Place("/home/a/venv/bin", visible=("/home/a/venv", "/usr")))
    assert "ProtectHome=tmpfs\n# The programs are here.\nBindReadOnlyPaths=/home/a/venv\n" in text
    assert "ProtectHome=yes" not in text


def test_another_address_resets_the_ports_of_the_unit() -> None:
    file = units.listen(Place(), "::", 9_000)
    assert file.path == "/etc/systemd/system/llambo-broker.socket.d/listen.conf"
    assert directives(file.text) == [("ListenStream", "")] + [("ListenStream", f"[::]:{9_000 + n}") for n in range(4)]


# --- the commands ----------------------------------------------------------------------------------------


def test_install_writes_once_and_leaves_settings_alone(tmp_path: Path) -> None:
    def install(*words: str) -> str:
        done = CliRunner().invoke(main, ["systemd", "install", "--root", str(tmp_path), *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert install("--bind", "0.0.0.0").count("written") == len(units.to_write(Place())) + 1
    (tmp_path / "etc/llambo/llambo.toml").write_text("[worker]\nslots = 3\n")
    (tmp_path / "etc/systemd/system/llambo.slice").write_text("[Slice]\n")
    again = install()
    assert again.count("changed") == 1 and "written" not in again
    assert "slots = 3" in (tmp_path / "etc/llambo/llambo.toml").read_text()
    assert "0.0.0.0:7333" in (tmp_path / "etc/systemd/system/llambo-broker.socket.d/listen.conf").read_text()


def test_without_systemd_install_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "RUNNING", tmp_path / "none")
    (line,) = systemd.next_steps(False, Path("/"))
    assert "systemd does not run here" in line
    monkeypatch.setattr(systemd, "RUNNING", tmp_path)
    assert any("daemon-reload" in each for each in systemd.next_steps(True, Path("/")))


def test_variables_are_read_as_the_manager_does() -> None:
    assert variables("# a\n\n; b\nA=1\n B = two words \nC='x'\nD=\"y\"\nE=") == {
        "A": "1", "B": "two words", "C": "x", "D": "y", "E": ""
    }  # fmt: skip
    with pytest.raises(ValueError, match="line 2"):
        variables("A=1\nexport B=2")


# --- as systemd sees them --------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Place, Path]:
    place = Place(BIN)
    for file in units.to_write(place):
        path = tmp_path / file.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text)
    return place, tmp_path


by_systemd = pytest.mark.needs("systemd")


@by_systemd
def test_systemd_has_nothing_to_say_against_them(written: tuple[Place, Path]) -> None:
    place, root = written
    findings = list(everything(place, root))
    assert not [finding for finding in findings if not finding.good]
    assert Checked(True, "systemd-analyze verify") in findings


@pytest.mark.parametrize("name", SERVICES)
@by_systemd
def test_no_service_is_exposed_more_than_it_may_be(written: tuple[Place, Path], name: str) -> None:
    path = written[1] / "etc/systemd/system" / name
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("systemd/system/llambo.target", None, "is missing"),
        ("systemd/system/llambo-broker.service", "[Service]\nType=maybe\n", "Failed to parse service type"),
        ("llambo/worker-a.env", "LLAMBO_SLOTS=0\n", "slots"),
        ("llambo/worker-a.env", "LLAMBO_STALL_MS=15000\n", "less than half of WatchdogSec"),
        ("llambo/broker.env", "LLAMBO_PROT=1\n", "did you mean LLAMBO_PORT"),
        ("llambo/broker.env", "just words\n", "line 1 is not NAME=value"),
        ("llambo/llambo.toml", "[worker]\nslot = 1\n", "did you mean slots"),
        ("llambo/worker-a.key", "no key\n", "this is not a key"),
        ("llambo/worker-a.env", "LLAMBO_KEY=llambo-key-1.x\n", "others can read it"),
    ],
)
@by_systemd
def test_what_is_wrong_is_found(written: tuple[Place, Path], name: str, text: str | None, complaint: str) -> None:
    place, root = written
    path = root / "etc" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
        path.chmod(0o600 if name.endswith(".key") else 0o644)
    bad = [finding for finding in everything(place, root) if not finding.good]
    assert bad
    assert any(complaint in finding.text for finding in bad), bad


@by_systemd
def test_a_port_without_a_key_is_found(written: tuple[Place, Path]) -> None:
    place, root = written
    path = root / "etc/systemd/system" / units.LISTEN
    path.parent.mkdir()
    path.write_text(units.listen(place, "0.0.0.0", 7330).text)
    (bad,) = [finding for finding in everything(place, root) if not finding.good]
    assert bad.what == "llambo-broker.socket"
    assert "0.0.0.0" in bad.text and "LLAMBO_KEYS=/etc/llambo/keys" in bad.text
    (root / "etc/llambo/broker.env").write_text("LLAMBO_KEYS=/etc/llambo/keys\n")
    (bad,) = [finding for finding in everything(place, root) if not finding.good]
    assert "llambo keys init --keys /etc/llambo/keys" in bad.text
    Folder(root / "etc/llambo/keys").begin("tcp://box:7330")
    assert not [finding for finding in everything(place, root) if not finding.good]
