"""Command line options made from the table of settings: one vocabulary for flags, environment and file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from llambo.cli.kit.command import aside_help
from llambo.cli.kit.common import Common, pass_common
from llambo.mesh.settings.settings_table import BY_NAME, SECTIONS, Setting
from llambo.mesh.wire import limits

F = TypeVar("F", bound=Callable[..., Any])
FAKE_HEADING = "The fake engine"
Function = Callable[..., None]


class SettingType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """Parses a value as the file and the environment do: the same values and the same errors in all three."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.name = setting.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.setting.parse(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


#: Settings whose option has a letter as well.
SHORT = {"client_model": ("-m",)}


class SettingOption(click.Option):
    """An option with a heading in the help. Its value is stored in `Common` and not passed to the function."""

    def __init__(self, setting: Setting, heading: str = "", default: str = "", *, aside: bool = False) -> None:
        """`default`: the command's own default, if it differs from the setting's. `aside`: not shown by --help."""
        shown = default or setting.show(setting.default)
        default = f"  [default: {shown}]" if shown else ""
        super().__init__(
            [*SHORT.get(setting.name, ()), setting.flag, setting.name],
            type=SettingType(setting),
            metavar=setting.metavar,
            help=f"{_sentence(setting.help)}{default}",
            expose_value=False,
            callback=self._remember,
        )
        self.heading = heading
        self.aside = aside

    @staticmethod
    def _remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
        # None means that the flag was not given: the environment, the file or the default decides then.
        if value is not None and parameter.name is not None:
            context.ensure_object(Common).flags[parameter.name] = value


def _sentence(text: str) -> str:
    # A first word that is a value to choose is not capitalised.
    return f"{text if text.split()[0].endswith(':') else text[:1].upper() + text[1:]}."


def settings_options(settings: Iterable[Setting | str], heading: str = "") -> Callable[[F], F]:
    """Options for these settings, in this order."""
    rows = [BY_NAME[setting] if isinstance(setting, str) else setting for setting in settings]

    def decorate(function: F) -> F:
        for setting in reversed(rows):
            _attach(function, SettingOption(setting, heading))
        return function

    return decorate


def fake_options(function: F) -> F:
    """The options of the fake engine. They are for tests, so --help leaves them to --help-fake."""

    def show(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(aside_help(context))
            context.exit()

    for setting in reversed(SECTIONS["fake"].values()):
        _attach(function, SettingOption(setting, FAKE_HEADING, aside=True))
    return click.option(
        "--help-fake", is_flag=True, is_eager=True, expose_value=False, callback=show,
        help="Show the options of the fake engine, and exit.",
    )(function)  # fmt: skip


def setting_option(name: str, *, default: str) -> Callable[[F], F]:
    """The option of one setting, for a command that has its own default."""

    def decorate(function: F) -> F:
        _attach(function, SettingOption(BY_NAME[name], default=default))
        return function

    return decorate


def _attach(function: Any, option: click.Option) -> None:
    # As click's own decorators do. Click has none for an option object.
    if isinstance(function, click.Command):
        function.params.append(option)
    else:
        function.__dict__.setdefault("__click_params__", []).append(option)


def _remember(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        common = context.ensure_object(Common)
        if key == "verbose":
            common.verbose += value
        elif value is not None:
            common.config = value

    return callback


def verbosity(help: str) -> Callable[[F], F]:
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=_remember("verbose"), help=help
    )  # fmt: skip


def config_option() -> Callable[[F], F]:
    return click.option(
        "--config",
        metavar="FILE",
        expose_value=False,
        callback=_remember("config"),
        help="Read this file instead of llambo.toml.",
    )


def client_options(function: Function, *, verbose: str = "Log to stderr; twice for more.") -> Function:
    """The options of every command that asks the mesh, which gets `Common` as its first argument.

    `llambo` takes them too, before the command.
    """
    return settings_options(["broker", "key"])(config_option()(verbosity(verbose)(pass_common(function))))


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")(function)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time such as 500ms, 20s or 5m, in whole milliseconds."""

    name = "TIME"
    _UNITS = {"ms": 1, "": 1_000, "s": 1_000, "m": 60_000, "h": 3_600_000}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", str(value).strip())
        time_ms = round(float(found[1]) * self._UNITS[found[2]]) if found else 0
        if time_ms < 1:
            self.fail(f"{value!r} is not a time such as 500ms, 20s, 20 (seconds), 5m or 1h", param, ctx)
        return time_ms


class StopText(click.ParamType):  # type: ignore[type-arg]
    name = "TEXT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not 1 <= len(value) <= limits.STOP_CHARS:
            self.fail(f"{value!r}: expected 1 to {limits.STOP_CHARS} characters", param, ctx)
        return str(value)


class Seed(click.ParamType):  # type: ignore[type-arg]
    name = "NUMBER"
    _HIGHEST = 2**63 - 1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seed = int(value) if re.fullmatch(r"\d{1,19}", str(value).strip(), re.ASCII) else -1
        if not 0 <= seed <= self._HIGHEST:
            self.fail(f"{value!r}: expected a whole number, 0 to {self._HIGHEST}", param, ctx)
        return seed
