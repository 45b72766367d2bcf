"""`llambo why ID`: the story of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import show_json

if TYPE_CHECKING:
    from llambo.mesh.wire.reports import RequestStory, StoryStep

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
    """Show the story of the request ID: each step with its time and reason. The beginning of the id is enough."""
    if as_json:
        show_json(ask(common, lambda client: client.query("why", id)))
        return
    found = ask(common, lambda client: client.why(id))
    click.echo(summary(found))
    for line in timeline(found.story):
        click.echo(line)


def summary(found: RequestStory) -> str:
    parts = [f"request {found.id}: {found.state}"]
    if found.reason:
        parts.append(f"({found.reason})")
    parts.append(f"after {found.tokens} tokens" if found.state == "ended" else f"with {found.tokens} tokens")
    parts.append(f"of model {found.model}")
    if found.worker:
        parts.append(f"on {found.worker}")
    if found.moves:
        parts.append(f"after {found.moves} move" + ("s" if found.moves != 1 else ""))
    lines = [" ".join(parts)]
    if found.error:
        lines.append(f"error: {found.error}")
    return "\n".join(lines)


def timeline(story: list[StoryStep]) -> list[str]:
    """A line for each step: the time since the submit, what happened, and why."""
    if not story:
        return ["the broker has no steps of it"]
    times = [f"{step.at_ms / 1000:.3f} s" for step in story]
    time_width, what_width = max(map(len, times)), max(len(step.what) for step in story)
    return [
        f"  {time:>{time_width}}  {step.what:<{what_width}}  {step.detail}".rstrip()
        for time, step in zip(times, story, strict=True)
    ]
