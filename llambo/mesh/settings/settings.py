"""Which settings are in force, and where each of them came from.

A flag takes precedence over the environment, the environment over `llambo.toml`, and the file over the default. Only
one file is read, the first that exists, so that a single file shows all that files set. A wrong value is an error that
names its source, and so is an unknown key in the file. An unknown variable is only a warning, because environments are
inherited: a container manager may have put `LLAMBO_…` there.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llambo.mesh.settings.settings_table import BY_ENV, BY_NAME, SECTIONS, TABLE, Setting, Value, of_roles
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

__all__ = ["BY_NAME", "CONFIG_ENV", "TABLE", "Setting", "Settings", "Value", "load", "of_roles", "search_path"]

ENV_PREFIX = "LLAMBO_"
CONFIG_ENV = "LLAMBO_CONFIG"
FILE_NAME = "llambo.toml"
#: The section with names of models. Its keys are chosen by the user, so they are no settings.
MODELS = "models"


@dataclass(frozen=True, slots=True)
class Settings:
    """Values by name, and the source of each."""

    values: Mapping[str, Value]
    sources: Mapping[str, str]
    #: The file that was read, or None.
    file: Path | None
    #: For the log.
    warnings: tuple[str, ...] = ()
    #: Names of models, and what they stand for.
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def text(self, name: str) -> str:
        return str(self.values[name])

    def number(self, name: str) -> int:
        return int(self.values[name])

    def real(self, name: str) -> float:
        return float(self.values[name])

    def switch(self, name: str) -> bool:
        return bool(self.values[name])

    def rows(self) -> list[tuple[str, str, str]]:
        """(section.key, value, source) of every setting, for `llambo config`."""
        return [
            (f"{setting.section}.{setting.key}", setting.show(self.values[setting.name]), self.sources[setting.name])
            for setting in TABLE
        ] + [(f"{MODELS}.{name}", target, str(self.file)) for name, target in self.aliases.items()]


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    config: str | None = None,
    environ: Mapping[str, str] | None = None,
    places: Iterable[Path] | None = None,
) -> Settings:
    """Settings in force. `flags` are those of the command line, by setting name; None means that one was not given.

    `config` is the value of `--config`; `environ` and `places` are for tests.
    """
    environ = os.environ if environ is None else environ
    file = _find(config, environ, search_path(environ) if places is None else places)
    values: dict[str, Value] = {setting.name: setting.default for setting in TABLE}
    sources = dict.fromkeys(values, "default")

    def put(setting: Setting, raw: Any, source: str) -> None:
        values[setting.name] = _parse(setting, raw, source)
        sources[setting.name] = source

    aliases: dict[str, str] = {}
    if file is not None:
        content = _content(file)
        aliases = _aliases(file, content.pop(MODELS, {}))
        for setting, raw in _from_file(file, content):
            put(setting, raw, str(file))
    for env, settings in BY_ENV.items():
        for setting in settings if env in environ else ():
            put(setting, environ[env], f"environment {env}")
    for name, raw in (flags or {}).items():
        if raw is not None:
            put(BY_NAME[name], raw, f"flag {BY_NAME[name].flag}")
    return Settings(values, sources, file, tuple(_unknown_variables(environ)), aliases)


def search_path(environ: Mapping[str, str]) -> list[Path]:
    """Where `llambo.toml` is looked for unless the command line or the environment names a file."""
    user = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    return [Path(FILE_NAME), Path(user, "llambo", FILE_NAME), Path("/etc/llambo", FILE_NAME)]


def _find(config: str | None, environ: Mapping[str, str], places: Iterable[Path]) -> Path | None:
    named, source = (config, "--config") if config else (environ.get(CONFIG_ENV), CONFIG_ENV)
    if named:
        if not os.path.isfile(named):
            raise LlamboError(Code.BAD_SETTING, f"{source} names {named}, and there is no such file")
        return Path(named)
    # os.path.isfile, unlike Path.is_file, also returns False where we have no permission to look.
    return next((place for place in places if os.path.isfile(place)), None)


def _content(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlamboError(Code.BAD_SETTING, f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LlamboError(Code.BAD_SETTING, f"{file} is not TOML: {error}") from error


def _aliases(file: Path, entries: Any) -> dict[str, str]:
    """Names are shown in the lists of all users, and `model@class` has a meaning of its own."""
    if not isinstance(entries, dict):
        raise LlamboError(Code.BAD_SETTING, f"{file}: {MODELS} is not a section; write [{MODELS}]")
    for name, target in entries.items():
        if not name.isprintable() or not 0 < len(name) <= limits.NAME_CHARS or set(name) & set(":/@"):
            text = f"{file}: {name!r} in [{MODELS}] is not a name for a model: no colon, slash or @, and not too long"
            raise LlamboError(Code.BAD_SETTING, text)
        if not isinstance(target, str) or not target:
            text = f'{file}: {name} in [{MODELS}] is {target!r}, expected what it stands for, such as "hf:ORG/REPO"'
            raise LlamboError(Code.BAD_SETTING, text)
    return dict(entries)


def _from_file(file: Path, content: dict[str, Any]) -> list[tuple[Setting, Any]]:
    found: list[tuple[Setting, Any]] = []
    for section, entries in content.items():
        if not isinstance(entries, dict):
            raise _unknown(file, section, _sections_of(section))
        if section not in SECTIONS:
            raise _unknown(file, f"[{section}]", [f"[{name}]" for name in _close(section, SECTIONS)])
        for key, raw in entries.items():
            if key not in SECTIONS[section]:
                close = [f"{key} in [{section}]" for key in _close(key, SECTIONS[section])]
                raise _unknown(file, f"{key} in [{section}]", _sections_of(key) or close)
            found.append((SECTIONS[section][key], raw))
    return found


def _parse(setting: Setting, raw: Any, source: str) -> Value:
    try:
        return setting.parse(raw)
    except ValueError as error:
        where = setting.key if source.startswith(("flag", "environment")) else f"{setting.key} in [{setting.section}]"
        raise LlamboError(Code.BAD_SETTING, f"{source}: {where} is {raw!r}, {error}") from error


def _unknown(file: Path, what: str, close: list[str]) -> LlamboError:
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return LlamboError(Code.BAD_SETTING, f"{file}: unknown setting {what}{hint}")


def _sections_of(key: str) -> list[str]:
    """The sections that have this key: the most likely mistake is the wrong section."""
    return [f"{key} in [{section}]" for section, known in SECTIONS.items() if key in known]


def _close(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(known), n=3)


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    texts = []
    for env in sorted(environ):
        if env.startswith(ENV_PREFIX) and env != CONFIG_ENV and env not in BY_ENV:
            # Without the prefix, which would make them all similar.
            words = [known.removeprefix(ENV_PREFIX) for known in (*BY_ENV, CONFIG_ENV)]
            close = [ENV_PREFIX + word for word in _close(env.removeprefix(ENV_PREFIX), words)]
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            texts.append(f"environment {env} is not a setting{hint}")
    return texts
