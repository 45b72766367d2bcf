"""`llambo pull` and `llambo rm`: models from elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.commands.models import show_file
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, asked_model, listens, pass_common
from llambo.cli.kit.download_view import download, failure_of, view
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import client_options, config_option, json_option, settings_options, verbosity
from llambo.cli.kit.tables import show_json, size
from llambo.mesh.client.model_loading import ASK_S
from llambo.mesh.wire.errors import LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.wire.reports import PullHost, PullReply
    from llambo.worker.store.caches import Removal

EXAMPLES_PULL = """
llambo pull hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF      Q4_K_M, or else Q8_0
llambo pull hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF:Q5_K_M
llambo pull hf:ORG/REPO/FOLDER/FILE.gguf
llambo pull ollama:llama3.2:1b
llambo pull https://example.org/x.gguf#sha256=SUM   checked against it
llambo pull hf:ORG/REPO --to all                 to all hosts of the mesh
"""
EXAMPLES_RM = """
llambo rm hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF:Q5_K_M
llambo rm --yes ollama:llama3.2:1b
llambo rm --yes ~/models/x.gguf                     a file that is in no cache
"""
#: How long it takes at most until a host on this machine has found a file and reported it; and the pause between two
#: questions about that.
FOUND_S, ASK_AGAIN_S = 3.0, 0.1
FORMS = "hf:ORG/REPO, hf:ORG/REPO:QUANT, hf:ORG/REPO/FILE.gguf, ollama:NAME:TAG, https://HOST/FILE.gguf"


@click.command(cls=Command, examples=EXAMPLES_PULL)
@click.argument("name", metavar="REF")
@click.option("--to", default="", metavar="HOST", help="To hosts of the mesh: the name of one, or of a class; or all.")
@json_option
@settings_options(["llama_lib"])
@client_options
def pull(common: Common, name: str, to: str, as_json: bool) -> None:
    """Download a model, into the cache that programs of its source use as well: Hugging Face's, or Ollama's.

    A download that was interrupted goes on where it stopped, and what is here already is not downloaded again. The
    bytes are checked against the sha256 that the source has for them. Models that are private, or have terms, need a
    token: HF_TOKEN, or `hf auth login`. HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and OLLAMA_MODELS count here
    as well.

    With --to the hosts of the mesh download it, into caches of theirs, and not this machine. One of them gets it from
    outside, the others from that one and from each other, if it was started with --share. A Ctrl-C ends the waiting
    only. With keys this is for admins.
    """
    from llambo.worker.store import refs

    try:
        ref = refs.parse(common.settings.aliases.get(name, name))
    except refs.StoreError as error:
        raise failure_of(error) from error
    if ref is None:
        raise Failure(f"{name} is not the name of a model that can be downloaded", FORMS, Exit.USAGE)
    if to:
        _pull_at(common, str(ref), to, as_json=as_json)
        return
    download(ref)
    # A host calls it by the name that llambo.toml has for it.
    aliases = common.settings.aliases
    named = name if name in aliases else next((each for each in aliases if aliases[each] == str(ref)), str(ref))
    show_file(common, named, as_json=as_json, served_by=_host_that_has(common, asked_model(named)))


def _host_that_has(common: Common, model: str) -> str:
    """The host on this machine that has found the model, so that it can be asked for now. Empty: there is none."""

    async def work(client: Client) -> str:
        machine = socket.gethostname()
        if not any(host.machine == machine for host in await client.hosts()):
            return ""
        try:
            async with asyncio.timeout(FOUND_S):
                while True:
                    hosts = {host.host for host in await client.hosts() if host.machine == machine}
                    rows = [row for row in await client.models() if row.model == model]
                    if found := next((each.host for row in rows for each in row.hosts if each.host in hosts), ""):
                        return found
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError:  # it serves other folders
            return ""

    try:
        return ask(common, work) if listens(common) else ""
    except LlamboError as error:  # a model is downloaded without a mesh, too
        logging.getLogger(__name__).info("the mesh was not asked for %s: %s", model, error.text)
        return ""


def _pull_at(common: Common, ref: str, to: str, *, as_json: bool) -> None:
    async def work(client: Client) -> PullReply:
        reply = await client.pull_model(ref, to)
        with ExitStack() as drawn:
            shown, done = None, 0
            while any(host.state in ("waiting", "fetching") for host in reply.hosts):
                # It is asked for again if the broker has been restarted, and knows nothing of it.
                await asyncio.sleep(ASK_S)
                reply = await client.pull_model(ref, to, poll=True)
                whole = max((host.size for host in reply.hosts), default=0)
                if shown is None and whole and not as_json:
                    shown, drawing = view(ref, whole * len(reply.hosts))
                    drawn.enter_context(drawing)
                if shown is not None:
                    here = sum(host.bytes for host in reply.hosts if host.state in ("fetching", "here"))
                    shown.moved(here - done)
                    done = here
        return reply

    reply = ask(common, work)
    bad = [host for host in reply.hosts if host.state != "here"]
    if as_json:
        show_json(msgspec.to_builtins(reply))
    else:
        for host in reply.hosts:
            click.echo(f"{host.host}  {_shown(host)}")
    if bad:
        text = f"{len(bad)} of {len(reply.hosts)} hosts do not have {ref}"
        raise Failure(f"{text}: {bad[0].host}: {bad[0].note}", "the same command goes on from there")


def _shown(host: PullHost) -> str:
    if host.state != "here":
        return f"{host.state}: {host.note}"
    if not host.outside:
        return f"has it, {size(host.size)}"
    return f"has it, {size(host.size)}, {size(host.outside)} of it downloaded from outside the mesh"


@click.command(cls=Command, examples=EXAMPLES_RM)
@click.argument("name", metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def rm(common: Common, name: str, yes: bool) -> None:
    """Remove a model that was downloaded, in all its states. Files that another model has as well stay.

    NAME is a name as in `llambo models`, or a path. A file that is in no cache is removed with --yes only. A worker
    that runs the model is not disturbed.
    """
    from llambo.worker.store import caches, chunk_sums
    from llambo.worker.store.refs import StoreError

    try:
        found = _what_to_remove(common.settings.aliases.get(name, name), yes=yes)
    except StoreError as error:
        raise failure_of(error) from error
    for path in found.files:
        click.echo(f"{size(path.lstat().st_size):>10}  {path}")
    total = f"{len(found.files)} file{'s' if len(found.files) != 1 else ''}, {size(found.size)}"
    if not yes and not sys.stdin.isatty():
        raise Failure(f"{name} is not removed without a confirmation", f"llambo rm --yes {name}", Exit.USAGE)
    if not yes:
        click.confirm(f"Remove {name}: {total}?", abort=True, err=True)
    caches.remove(found)
    for path in found.files:
        chunk_sums.forget(path)
    click.echo(f"removed {name}: {total}")
    if found.shared:
        click.echo(f"{len(found.shared)} more stay, because another model has them as well")


def _what_to_remove(target: str, *, yes: bool) -> Removal:
    from llambo.worker.models import model_files
    from llambo.worker.store import caches, refs

    ref = refs.parse(target)
    path = Path(target).expanduser()
    if ref is None and target in model_files.PACKAGED:
        raise Failure(f"{target} is a Python package", f"pip uninstall {model_files.package_of(target)}", Exit.USAGE)
    if ref is None and os.path.isfile(path):
        ref = caches.ref_of(path)
        if ref is None and path.suffix.lower() != ".gguf":
            raise Failure(f"{target} is not a GGUF file, and `llambo rm` removes models only", "", Exit.USAGE)
        if ref is None and not yes:
            raise Failure(f"{target} is in no cache of models", f"llambo rm --yes {target}   removes it", Exit.USAGE)
        if ref is None:
            return caches.Removal(files=model_files.parts(path))
    found = caches.removal(ref) if ref else caches.Removal()
    if not found.names and not found.files:
        if ref and caches.find(ref):
            raise Failure(f"{ref} belongs to the service of Ollama", f"ollama rm {str(ref).removeprefix('ollama:')}")
        raise Failure(f"{target} is not on this host", "llambo models   lists the models of this host")
    return found
