"""`llambo doctor`: what is wrong on this machine, on one screen, with the command that helps."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import textwrap

import click
import msgspec

from llambo.cli.doctor import doctor_core
from llambo.cli.doctor.doctor_core import Finding, Level
from llambo.cli.doctor.facts import Facts, HostFacts
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.failure import Exit
from llambo.cli.kit.flags import config_option, json_option, settings_options
from llambo.cli.kit.std_streams import paint
from llambo.cli.kit.tables import plural, show_json
from llambo.mesh.service.extras import install_command, requirement
from llambo.mesh.wire.errors import printable

EXAMPLES = """
llambo doctor
llambo doctor broker keys clock     on a machine that only asks
llambo doctor --broker tcp://box:7330
llambo doctor --json | jq '.findings[] | select(.level == "problem")'
"""

#: In these columns the text of a finding begins.
INDENT = 20
#: How findings look on a terminal, which has so many columns at most for text.
COLOURS = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "red"}
WIDEST = 120
#: Keys and tokens, wherever a text may have one: a setting with the wrong name, an argument of a process.
_SECRET = re.compile(r"(llambo-key-1\.|sk-llambo-)[\w-]+")


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("checks", nargs=-1, type=click.Choice(list(doctor_core.NEEDS)), metavar="[CHECK]...")
@json_option
@settings_options(["broker", "key", "connect_ms"])
@config_option()
@pass_common
def doctor(common: Common, checks: tuple[str, ...], as_json: bool) -> None:
    """Look for what is wrong on this machine, and say which command helps.

    \b
    settings  whether they can be read      library  llama.cpp, and its version
    cpu       what it can do                devices  their memory; unused GPUs
    models    those on this host            limits   memory, cores, open files
    disk      space for models              keys     who can read them
    ports     free, or in use by what       broker   whether it answers
    clock     whether it is synchronised    systemd  units, if there are any
    extras    parts that are not installed

    All of it, or only the checks that are named. Each has a deadline. Nothing is changed, and no secret is shown.
    The exit status is 0 if there is no problem, and 10 if there is one; notes do not count.
    """
    facts = look(common, checks)
    findings = doctor_core.judge(checks or list(doctor_core.NEEDS), facts)
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        show_json(_without_secrets({**_about(), "problems": problems, "findings": msgspec.to_builtins(findings),
                                    "facts": msgspec.to_builtins(facts)}))  # fmt: skip
    else:
        show(findings, problems)
    click.get_current_context().exit(Exit.PROBLEM if problems else Exit.OK)


def look(common: Common, checks: tuple[str, ...]) -> Facts:
    from llambo.cli.doctor import probes

    seen, settings = probes.look_at_settings(common.flags, common.config)
    names = {name for check in checks or doctor_core.NEEDS for name in doctor_core.NEEDS[check]}
    host = HostFacts(install_command(), requirement("{}"), probes.family(), os.geteuid() == 0)
    return probes.collect(names - {"settings"}, probes.Place(settings, os.environ), Facts(settings=seen, host=host))


def _about() -> dict[str, object]:
    import llambo

    return {
        "llambo": llambo.__version__,
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.system()} {platform.release()} on {platform.machine()}",
    }


def _without_secrets(value: object) -> object:
    match value:
        case str():
            return _SECRET.sub(r"\1...", value)
        case dict():
            return {name: _without_secrets(each) for name, each in value.items()}
        case list():
            return [_without_secrets(each) for each in value]
    return value


def show(findings: list[Finding], problems: int) -> None:
    about = _about()
    click.echo(f"llambo {about['llambo']}, Python {platform.python_version()}, {about['system']}\n")
    columns = min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout.isatty() else 0
    before, margin = "", " " * INDENT
    for finding in findings:
        name = finding.check if finding.check != before else ""
        before = finding.check
        text = printable(_SECRET.sub(r"\1...", finding.text))
        lines = textwrap.wrap(text, columns - INDENT, break_on_hyphens=False) if columns > 2 * INDENT else [text]
        level = click.style(
            f"{finding.level:<9}", fg=COLOURS[finding.level], bold=finding.level is Level.PROBLEM or None
        )
        paint(f"{level}{name:<{INDENT - 9}}" + f"\n{margin}".join(lines) + "\n")
        if finding.command:
            # In one line, so that it can be copied.
            paint(f"{margin}  {click.style(printable(finding.command), bold=True)}\n")
    notes = sum(finding.level is Level.NOTE for finding in findings)
    click.echo(f"\n{plural(problems, 'problem') if problems else 'no problem'}, {plural(notes, 'note')}")
