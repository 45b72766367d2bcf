"""`llambo load` and `llambo unload`: which models hosts have in memory, apart from requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, asked_model
from llambo.cli.kit.flags import Duration, client_options, json_option
from llambo.cli.kit.progress import Progress
from llambo.cli.kit.tables import duration, show_json
from llambo.mesh.client.model_loading import ASK_S, LOADED, load_model, row_of
from llambo.mesh.wire.reports import HoldReply

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

LOAD_EXAMPLES = """
llambo load coder                  on the host where it fits best
llambo load coder --on box2
llambo load coder --ttl 30m        until then
llambo load embedder --pin         never unloaded for another; admins only
"""
UNLOAD_EXAMPLES = """
llambo unload coder
llambo unload coder --on box2
"""


@click.command(cls=Command, examples=LOAD_EXAMPLES)
@click.argument("name", metavar="NAME")
@click.option("--on", "host", default="", metavar="HOST", help="On this host only.")
@click.option("--pin", is_flag=True, help="Never unload it for another model. For admins.")
@click.option("--ttl", type=Duration(), default=0, metavar="TIME", help="Keep it for so long: 30m, 8h.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is loaded.")
@json_option
@client_options
def load(common: Common, name: str, host: str, pin: bool, ttl: int, no_wait: bool, as_json: bool) -> None:
    """Load model NAME at a host, wait until it is ready, and keep it there until `llambo unload`, or for --ttl.

    Requests for a model load it as well. This is for a model that is to be ready before the first of them, or to stay
    between them: while it is held it is not unloaded for another one. With keys, a client that is no admin holds it
    for an hour at most, and only one that its key may use.

    If it cannot be loaded the reason is shown, and it is not tried again for this command. A Ctrl-C ends the waiting
    only.
    """
    progress, name = Progress(hidden=as_json), asked_model(name)

    async def work(client: Client) -> HoldReply:
        if no_wait:
            return await client.hold_model(name, host=host, ttl_ms=ttl, pin=pin)
        return await load_model(client, name, host=host, ttl_ms=ttl, pin=pin, show=progress.show)

    try:
        found = ask(common, work)
    except KeyboardInterrupt:
        if progress.begun:
            text = f"{name} is loaded all the same; `llambo unload {name}` takes it back"
            click.echo(f"\nllambo: interrupted; {text}", err=True)
        raise
    finally:
        progress.end()
    if as_json:
        show_json(msgspec.structs.asdict(found))
        return
    where = f" on {found.host}" if found.host else ""
    until = f"for {duration(found.ttl_ms)}" if found.ttl_ms else f"until `llambo unload {name}`"
    if not found.host and found.state == "ready":
        click.echo(f"{name} is served: {found.note}")
    elif found.state == "ready":
        click.echo(f"{name} is loaded{where}, and stays {until}")
    else:
        click.echo(f"{name} is {found.state}{where}" + (f": {found.note}" if found.note else ""))


@click.command(cls=Command, examples=UNLOAD_EXAMPLES)
@click.argument("name", metavar="NAME")
@click.option("--on", "host", default="", metavar="HOST", help="On this host only.")
@click.option("--no-wait", is_flag=True, help="Do not wait until its memory is free.")
@json_option
@client_options
def unload(common: Common, name: str, host: str, no_wait: bool, as_json: bool) -> None:
    """Give back model NAME. An admin unloads it with this, even if others hold it; without keys so does every client.

    It is unloaded when nothing runs on it any more. A request that names it loads it again. A model that is given back
    stays in memory until another one needs that.
    """
    progress, name = Progress(hidden=as_json), asked_model(name)

    async def work(client: Client) -> HoldReply:
        before = await row_of(client, name)
        given = await client.release_model(name, host=host)
        if given.holder or no_wait:
            return given
        where = {there.host for there in before.hosts if there.state in LOADED and host in ("", there.host)}
        return await _until_unloaded(client, given, where, progress)

    try:
        found = ask(common, work)
    finally:
        progress.end()
    if as_json:
        show_json(msgspec.structs.asdict(found))
    elif found.holder:
        click.echo(f"{name} is given back; it stays loaded until its memory is needed, or while others hold it")
    elif found.state in LOADED:
        click.echo(f"{name} is unloaded as soon as nothing runs on it")
    else:
        click.echo(f"{name} is not loaded" + (f" on {host}" if host else ""))


async def _until_unloaded(client: Client, given: HoldReply, where: set[str], progress: Progress) -> HoldReply:
    """A host whose answer does not have it as loaded has freed its memory, or is gone."""
    while True:
        row = await row_of(client, given.model)
        left = [there for there in row.hosts if there.host in where and there.state in LOADED]
        if not left:
            return msgspec.structs.replace(given, state="stored")
        where = {there.host for there in left}  # what is loaded there again later is loaded for somebody
        progress.show(f"{given.model} is unloaded on {', '.join(sorted(where))} as soon as nothing runs on it")
        await asyncio.sleep(ASK_S)
