"""One set of names, four sources, and errors that name the source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llambo.broker.config import BrokerConfig
from llambo.mesh.settings import settings
from llambo.mesh.settings.settings_table import BY_NAME, SECTIONS, TABLE, Kind
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.worker.config import FakeFaults, FakeOptions

ROLES = ("broker", "worker", "client", "gateway", "bridge")


def load(
    *, file: str | None = None, env: dict[str, str] | None = None, tmp: Path | None = None, **flags: Any
) -> settings.Settings:
    """Settings from these sources only, not from this machine's."""
    places = []
    if file is not None:
        assert tmp is not None
        path = tmp / "llambo.toml"
        path.write_text(file, encoding="utf-8")
        places = [path]
    return settings.load(flags, environ=env or {}, places=places)


def refusal(**arguments: Any) -> str:
    with pytest.raises(LlamboError) as caught:
        load(**arguments)
    assert caught.value.code is Code.BAD_SETTING
    return caught.value.text


# --- the table ---------------------------------------------------------------------------------------


def test_the_table_is_consistent() -> None:
    assert len(BY_NAME) == len(TABLE)
    assert sum(map(len, SECTIONS.values())) == len(TABLE)
    for setting in TABLE:
        assert setting.parse(setting.default) == setting.default
        assert setting.parse(setting.show(setting.default)) == setting.default
        assert setting.roles <= set(ROLES)
        assert not setting.help.endswith(".")


@pytest.mark.parametrize("role", ROLES)
def test_within_a_role_every_flag_and_variable_is_one_setting(role: str) -> None:
    rows = settings.of_roles(role)
    assert len({row.flag for row in rows}) == len({row.env for row in rows}) == len(rows)


def test_durations_and_sizes_end_in_their_unit() -> None:
    units = {Kind.MS: "_ms", Kind.BYTES: "_bytes"}
    for setting in TABLE:
        for kind, ending in units.items():
            assert (setting.kind is kind) == setting.name.endswith(ending), setting.name


def test_the_names_follow_from_the_key() -> None:
    row = BY_NAME["queue_bytes"]
    assert (row.section, row.key, row.flag, row.env) == (
        "broker",
        "queue_bytes",
        "--queue-bytes",
        "LLAMBO_QUEUE_BYTES",
    )
    row = BY_NAME["fake_ttft_ms"]
    assert (row.section, row.key, row.flag, row.env) == ("fake", "ttft_ms", "--fake-ttft-ms", "LLAMBO_FAKE_TTFT_MS")


def test_the_fake_engine_has_the_options_that_the_table_says() -> None:
    own = {field.name: field.default for field in dataclasses.fields(FakeOptions)}
    faults = {field.name: field.default for field in dataclasses.fields(FakeFaults)}
    options = {name: value for name, value in (own | faults).items() if name not in ("slots", "adapters", "faults")}
    assert {key: row.default for key, row in SECTIONS["fake"].items()} == options


# --- precedence --------------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = "[broker]\nport = 1\nqueue_ms = 11\nlease_ms = 111\n"
    env = {"LLAMBO_PORT": "2", "LLAMBO_QUEUE_MS": "22"}
    found = load(file=file, env=env, tmp=tmp_path, port="3", queue_ms=None)
    place = str(tmp_path / "llambo.toml")
    assert [(found[name], found.sources[name]) for name in ("port", "queue_ms", "lease_ms", "hold_ms")] == [
        (3, "flag --port"),
        (22, "environment LLAMBO_QUEUE_MS"),
        (111, place),
        (30_000, "default"),
    ]
    assert found.file == tmp_path / "llambo.toml"


def test_one_variable_may_serve_two_roles() -> None:
    found = load(env={"LLAMBO_MODEL": "tiny"})
    assert (found["model"], found["client_model"]) == ("tiny", "tiny")


def test_the_rows_for_people() -> None:
    rows = load(env={"LLAMBO_QUEUE_BYTES": "1048576"}).rows()
    assert ("broker.queue_bytes", "1MiB", "environment LLAMBO_QUEUE_BYTES") in rows
    assert len(rows) == len(TABLE)


# --- which file --------------------------------------------------------------------------------------


def test_only_the_first_file_that_exists_is_read(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[broker]\nport = 1\n")
    second.write_text("[broker]\nport = 2\nhold_ms = 2\n")
    found = settings.load(environ={}, places=[tmp_path / "none.toml", first, second])
    assert (found["port"], found["hold_ms"]) == (1, 30_000)


def test_a_named_file_is_the_one_and_a_flag_names_it_first(tmp_path: Path) -> None:
    given, exported, lying_about = (tmp_path / f"{name}.toml" for name in "abc")
    for port, path in enumerate((given, exported, lying_about), start=1):
        path.write_text(f"[broker]\nport = {port}\n")
    env = {"LLAMBO_CONFIG": str(exported)}
    assert settings.load(environ=env, places=[lying_about])["port"] == 2
    assert settings.load(config=str(given), environ=env, places=[lying_about])["port"] == 1


def test_a_named_file_must_exist() -> None:
    with pytest.raises(LlamboError, match="--config names /no/such, and there is no such file"):
        settings.load(config="/no/such", environ={})
    with pytest.raises(LlamboError, match="LLAMBO_CONFIG names /no/such"):
        settings.load(environ={"LLAMBO_CONFIG": "/no/such"})


def test_where_files_are_looked_for() -> None:
    found = [str(path) for path in settings.search_path({"HOME": "/home/ada"})]
    assert found == ["llambo.toml", "/home/ada/.config/llambo/llambo.toml", "/etc/llambo/llambo.toml"]
    assert str(settings.search_path({"XDG_CONFIG_HOME": "/x"})[1]) == "/x/llambo/llambo.toml"


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "llambo.toml"
    path.write_text("")

    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(LlamboError, match=r"llambo\.toml cannot be read: Permission denied"):
        settings.load(environ={}, places=[path])


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65_536), ("512KiB", 524_288), ("64MiB", 2**26), ("2 GiB", 2**31), ("2048B", 2_048)]
)
def test_sizes(text: str, value: int) -> None:
    assert load(queue_bytes=text)["queue_bytes"] == value


def test_typed_values_of_a_file(tmp_path: Path) -> None:
    file = '[client]\ntemperature = 1\n[fake]\nutf8_split = true\n[broker]\nqueue_bytes = "1MiB"\n'
    found = load(file=file, tmp=tmp_path)
    assert found.real("temperature") == 1.0
    assert found.switch("fake_utf8_split") is True
    assert found.number("queue_bytes") == 2**20


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("ON", True), ("1", True), ("no", False), ("0", False)])
def test_switches(text: str, value: bool) -> None:
    assert load(env={"LLAMBO_FAKE_UTF8_SPLIT": text})["fake_utf8_split"] is value


# --- errors name the place, the key, the value and what was expected ---------------------------------


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("[broker]\nport = 'x'\n", ["port in [broker] is 'x'", "whole number"]),
        ("[broker]\nport = true\n", ["port in [broker] is True", "whole number"]),
        ("[broker]\nport = 65533\n", ["port in [broker] is 65533", "0 to 65532"]),
        ("[broker]\nqueue_requests = 0\n", ["queue_requests", "at least 1"]),
        ("[broker]\nqueue_bytes = '64MB'\n", ["'64MB'", "64MiB"]),
        ("[broker]\nlease_ms = '2s'\n", ["lease_ms", "'2s'", "milliseconds"]),
        ("[broker]\nlease_ms = 2000.5\n", ["lease_ms", "milliseconds"]),
        ("[broker]\nbind = 1\n", ["bind", "expected text"]),
        ("[client]\ntemperature = nan\n", ["temperature", "expected a number"]),
        ("[fake]\nstyle = 'plane'\n", ["style", "'plane'", "one of plain, wander"]),
        ("[fake]\nutf8_split = 'maybe'\n", ["utf8_split", "yes or no"]),
        ("[broker]\nqueue_byte = 1\n", ["unknown setting queue_byte in [broker]", "did you mean queue_bytes"]),
        ("[broker]\nslots = 1\n", ["unknown setting slots in [broker]", "did you mean slots in [worker]"]),
        ("[brooker]\nport = 1\n", ["unknown setting [brooker]", "did you mean [broker]"]),
        ("port = 1\n", ["unknown setting port", "did you mean port in [broker]"]),
        ("[broker]\nzzz = 1\n", ["unknown setting zzz in [broker]"]),
        ("[broker\n", ["is not TOML"]),
    ],
)
def test_errors_of_a_file(file: str, parts: list[str], tmp_path: Path) -> None:
    text = refusal(file=file, tmp=tmp_path)
    assert text.startswith(str(tmp_path / "llambo.toml"))
    for part in parts:
        assert part in text


def test_errors_of_the_environment_and_of_flags() -> None:
    assert refusal(env={"LLAMBO_PORT": "x"}) == "environment LLAMBO_PORT: port is 'x', expected a whole number"
    assert refusal(port="-1") == "flag --port: port is '-1', expected 0 to 65532"


def test_an_unknown_variable_is_only_a_warning() -> None:
    # Kubernetes, for one, sets LLAMBO_SERVICE_HOST for a service that is called llambo.
    found = load(env={"LLAMBO_SERVICE_HOST": "10.0.0.1", "LLAMBO_QUEUE_BYTE": "1", "LLAMBO_CONFIG": ""})
    close = ("LLAMBO_QUEUE_BYTES", "LLAMBO_QUEUE_MS", "LLAMBO_GPU_BYTES")
    assert found.warnings == (
        f"environment LLAMBO_QUEUE_BYTE is not a setting; did you mean {' or '.join(close)}?",
        "environment LLAMBO_SERVICE_HOST is not a setting",
    )


# --- the broker's configuration ----------------------------------------------------------------------


def test_a_broker_configured_by_the_defaults_has_the_defaults() -> None:
    assert BrokerConfig.from_settings(load().values) == BrokerConfig()


def test_every_setting_of_the_broker_arrives() -> None:
    config = BrokerConfig.from_settings(load(name="w-1", broker_name="b-1", queue_ms="5", policy="random").values)
    assert (config.name, config.bounds.queue_ms, config.policy) == ("b-1", 5, "random")


def test_a_lease_shorter_than_three_heartbeats_is_refused() -> None:
    with pytest.raises(LlamboError, match="lease_ms is 500, expected at least 600: 3 x heartbeat_ms"):
        BrokerConfig.from_settings(load(lease_ms="500").values)
