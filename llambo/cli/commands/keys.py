"""`llambo keys`: who may connect. Works on a folder of the broker's host; a running broker sees each change at once."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from llambo.cli.kit.command import Command, Group
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import Function, config_option, json_option, settings_options
from llambo.cli.kit.tables import plural, show_json, table

if TYPE_CHECKING:
    from llambo.mesh.security.keyring import Folder, KeyEntry

EXAMPLES = """
llambo keys init --address tcp://box:7330
llambo keys add laptop --role client
llambo keys add gpu --role worker   for workers gpu, gpu-1, gpu-2 ...
llambo keys export laptop           one line, for its holder
llambo keys token laptop            for programs that speak HTTP
llambo keys revoke laptop           out at once
"""
INIT_EXAMPLES = """
llambo keys init --address tcp://box:7330
llambo keys init --address tcp://a:7330,tcp://b:7330 --keys ./keys
"""
ADD_EXAMPLES = """
llambo keys add laptop --role client
llambo keys add gpu --role worker
llambo keys add lab --role client --per-minute 10 --expires 7d
"""
LIST_EXAMPLES = """
llambo keys list
llambo keys list --json | jq -r '.[] | select(.valid) | .name'
"""
REVOKE_EXAMPLES = """
llambo keys revoke laptop
"""
ROTATE_EXAMPLES = """
llambo keys rotate gpu                 the old key is good for a day
llambo keys rotate laptop --grace 0s   or not at all
"""
EXPORT_EXAMPLES = """
llambo keys export gpu --output gpu.key
LLAMBO_KEY=$(llambo keys export laptop) llambo send hello
"""
HTTP_EXAMPLES = """
llambo keys token laptop
OPENAI_API_KEY=$(llambo keys token laptop --expires 30d)
llambo keys token laptop --withdraw    all tokens of that name
"""
_DAY_S = 86_400
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": _DAY_S, "w": 7 * _DAY_S}
#: How long the old key of a name is still good after `rotate`.
GRACE = "1d"


class Span(click.ParamType):  # type: ignore[type-arg]
    """A time such as 90d or 12h, in whole seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        if not text[:-1].isdecimal() or text[-1] not in _UNITS:
            self.fail(f"{value!r} is no time such as 90d, 12h, 30m or 2w", param, ctx)
        return int(text[:-1]) * _UNITS[text[-1]]


def keys_options(function: Function) -> Function:
    return settings_options(["keys"])(config_option()(pass_common(function)))


def _folder(common: Common) -> Folder:
    from llambo.mesh.security.keyring import Folder, default_folder

    path = common.settings.text("keys")
    return Folder(Path(path).expanduser() if path else default_folder(os.environ))


def _where(common: Common) -> str:
    """The option that the next command needs as well."""
    given = common.settings.sources["keys"].startswith("flag")
    return f" --keys {_folder(common).path}" if given else ""


@click.group(
    cls=Group,
    lazy={name: f"llambo.cli.commands.keys:{name}" for name in ("init", "add", "revoke", "rotate", "export", "token")}
    | {"list": "llambo.cli.commands.keys:list_keys"},
    examples=EXAMPLES,
)
def keys() -> None:
    """Who may connect: keys for clients, workers and admins.

    They are stored in a folder on the broker's host (--keys). The default is /etc/llambo/keys for root, and a folder
    in their home for others. A broker that runs with this folder sees a change within half a second.
    """


@click.command(cls=Command, examples=INIT_EXAMPLES)
@click.option("--address", metavar="ADDRESS", help="Where brokers are, as others reach them; with commas between.")
@keys_options
def init(common: Common, address: str | None) -> None:
    """Make a mesh: the broker's key pair, and an admin's key."""
    from llambo.mesh.link.sockets import DEFAULT_PORT, split_all
    from llambo.mesh.wire.identity import Identity

    address = address or f"tcp://{socket.gethostname()}:{DEFAULT_PORT}"
    ports = {port for _, port in split_all(address)}
    folder = _folder(common)
    folder.begin(address)
    folder.add(Identity("admin", "admin"), int(time.time()))
    click.echo(f"keys are in {folder.path}, for brokers at {address}")
    for port in sorted(ports):
        more = "" if port == DEFAULT_PORT else f" --port {port}"
        click.echo(f"  llambo-broker --bind 0.0.0.0 --keys {folder.path}{more}")
    where = _where(common)
    click.echo(f"  llambo keys add NAME --role worker{where}; llambo keys export NAME{where}")


@click.command(cls=Command, examples=ADD_EXAMPLES)
@click.argument("name")
@click.option("--role", type=click.Choice(["client", "worker", "admin"]), required=True, help="What it is for.")
@click.option("--max-in-flight", type=click.IntRange(0), default=0, help="Its requests with workers at a time.")
@click.option("--max-queued", type=click.IntRange(0), default=0, help="Its requests that wait at a time.")
@click.option("--max-bytes", type=click.IntRange(0), default=0, help="Bytes of its prompts and answers at a time.")
@click.option("--per-minute", type=click.IntRange(0), default=0, help="Its new requests in a minute.")
@click.option("--priority-max", type=click.Choice(["interactive", "normal", "batch"]), default="interactive",
              show_default=True, help="The best priority it may ask for.")  # fmt: skip
@click.option("--models", metavar="PATTERN", multiple=True, help="Models it may use.  [default: all]")
@click.option("--expires", type=Span(), metavar="TIME", help="Valid for so long: 90d, 12h.")
@keys_options
def add(common: Common, /, name: str, expires: int | None, models: tuple[str, ...], **limits: Any) -> None:
    """Make a key. Limits are for clients; 0 is none."""
    from llambo.mesh.wire.identity import Identity

    now = int(time.time())
    folder = _folder(common)
    folder.add(Identity(name, models=models, **limits), now, now + expires if expires else 0)
    click.echo(f"{name} has a key: llambo keys export {name}{_where(common)}")


@click.command("list", cls=Command, examples=LIST_EXAMPLES)
@json_option
@keys_options
def list_keys(common: Common, as_json: bool) -> None:
    """Show whose keys there are, and what they may do. Nothing secret is shown."""
    now = time.time()
    found = [_row_of(entry, now) for entry in _folder(common).ring().entries]
    if as_json:
        show_json([row._asdict() for row in found])
        return
    rows = [(row.name, row.role, row.limits or "none", row.expires or "never", row.public[:8]) for row in found]
    table(["name", "role", "limits", "valid until", "public"], rows, nothing="there are no keys")


class _KeyRow(NamedTuple):
    name: str
    role: str
    limits: str
    expires: str
    valid: bool
    public: str


def _row_of(entry: KeyEntry, now: float) -> _KeyRow:
    who = entry.identity
    limits = {
        "in flight": who.max_in_flight,
        "queued": who.max_queued,
        "bytes": who.max_bytes,
        "per minute": who.per_minute,
        "priority": "" if who.priority_max == "interactive" else who.priority_max,
        "models": ",".join(who.models),
    }
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.expires)) if entry.expires else ""
    valid = entry.valid(now)
    listed = ", ".join(f"{what} {value}" for what, value in limits.items() if value)
    return _KeyRow(who.name, who.role, listed, until if valid else f"{until} (over)", valid, entry.public)


@click.command(cls=Command, examples=REVOKE_EXAMPLES)
@click.argument("name")
@keys_options
def revoke(common: Common, name: str) -> None:
    """Take back all keys of this name. Who is connected with one is out within half a second."""
    from llambo.mesh.security import api_tokens

    folder = _folder(common)
    count = folder.revoke(name)
    api_tokens.withdraw(folder, name)
    click.echo(f"{plural(count, 'key')} of {name} revoked")


@click.command(cls=Command, examples=ROTATE_EXAMPLES)
@click.argument("name")
@click.option("--grace", type=Span(), metavar="TIME", default=GRACE, show_default=True,
              help="How long the old key is still valid.")  # fmt: skip
@keys_options
def rotate(common: Common, name: str, grace: int) -> None:
    """Make a new key under the same name, with the same rights."""
    _folder(common).rotate(name, int(time.time()), grace)
    click.echo(f"{name} has a new key: llambo keys export {name}{_where(common)}")


@click.command(cls=Command, examples=EXPORT_EXAMPLES)
@click.argument("name")
@click.option("--address", metavar="ADDRESS", help="Where the broker is for this one, if elsewhere than for others.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write this file (0600), not stdout.")
@keys_options
def export(common: Common, name: str, address: str | None, output: Path | None) -> None:
    """Print the key: one line, for --key, LLAMBO_KEY or a file. Every program that has it is admitted."""
    from llambo.mesh.link.sockets import split_all
    from llambo.mesh.security.keys import to_line, write

    if address:
        split_all(address)
    key = _folder(common).export(name, address or "")
    if output is None:
        click.echo(to_line(key))
        return
    try:
        write(output, key)
    except OSError as error:
        raise Failure(f"{output} cannot be written: {error.strerror}", "", Exit.ERROR) from error
    click.echo(f"{output}: the key of {name}")


@click.command(cls=Command, examples=HTTP_EXAMPLES)
@click.argument("name")
@click.option("--expires", type=Span(), metavar="TIME", help="Valid for so long: 90d, 12h.")
@click.option("--withdraw", is_flag=True, help="Take back every token of this name; its keys stay.")
@keys_options
def token(common: Common, name: str, expires: int | None, withdraw: bool) -> None:
    """Print a new API token of NAME: what the gateway wants from programs that speak HTTP.

    It has the role and the limits of the key of that name, and is shown only once. A gateway that runs with
    this folder (--http-keys) knows it at once.
    """
    from llambo.mesh.security import api_tokens

    folder, now = _folder(common), int(time.time())
    if withdraw:
        count = api_tokens.withdraw(folder, name)
        click.echo(f"{plural(count, 'token')} of {name} withdrawn")
        return
    click.echo(api_tokens.issue(folder, name, now, now + expires if expires else 0))
