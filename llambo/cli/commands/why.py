"""`llambo why ID`: what became of a request, and why."""

from __future__ import annotations

from typing import Any

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import show_json

EXAMPLES = """
llambo why 3f2a
llambo why "$(llambo send --detach 'Tell me a story')"
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("id", metavar="ID")
@json_option
@client_options
@pass_common
def why(common: Common, id: str, as_json: bool) -> None:
    """Tell the story of the request ID: each step with its time and its reason. The beginning of the id is enough."""
    found = ask(common, lambda client: client.query("why", id))
    if as_json:
        show_json(found)
        return
    click.echo(summary(found))
    for line in timeline(found["story"]):
        click.echo(line)


def summary(found: dict[str, Any]) -> str:
    parts = [f"request {found['id']}: {found['state']}"]
    if found.get("reason"):
        parts.append(f"({found['reason']})")
    parts.append(f"after {found['tokens']} tokens" if found["state"] == "ended" else f"with {found['tokens']} tokens")
    parts.append(f"of model {found['model']}")
    if found["worker"]:
        parts.append(f"on {found['worker']}")
    if found["moves"]:
        parts.append(f"after {found['moves']} move" + ("s" if found["moves"] != 1 else ""))
    lines = [" ".join(parts)]
    if found.get("error"):
        lines.append(f"error: {found['error']}")
    return "\n".join(lines)


def timeline(story: list[dict[str, Any]]) -> list[str]:
    """Times since the submit, to the right; what happened; and why."""
    if not story:
        return ["nothing is remembered about it"]
    times = [f"{entry['at_ms'] / 1000:.3f} s" for entry in story]
    when, what = max(map(len, times)), max(len(entry["what"]) for entry in story)
    return [
        f"  {time:>{when}}  {entry['what']:<{what}}  {entry['detail']}".rstrip()
        for time, entry in zip(times, story, strict=True)
    ]
