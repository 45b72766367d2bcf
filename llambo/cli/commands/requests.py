"""`llambo requests`, `why`, `cancel`: the requests of any client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, query, rows_of
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import Row, duration, number, one_line, plural, request_note, show_json, table
from llambo.mesh.wire.reports import RequestRow, RequestStory, StoryStep

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
REQUESTS_EXAMPLES = """
llambo requests
llambo cancel "$(llambo requests --json | jq -r '.[0].id')"
"""
WHY_EXAMPLES = """
llambo why          the request that was sent last
llambo why 3f2a
llambo why "$(llambo send --detach 'Tell me a story')"
"""
CANCEL_EXAMPLES = """
llambo cancel 3f2a
llambo cancel 3f2a --json
"""

COLUMNS = ("id", "state", "model", "priority", "worker", "tokens", "moves", "age", "note")
#: Columns that a narrow terminal leaves out.
SPARE = ("moves", "priority", "model", "age", "note", "worker")


@click.command(cls=Command, examples=REQUESTS_EXAMPLES)
@json_option
@client_options
def requests(common: Common, as_json: bool) -> None:
    """List the requests that wait or run. The beginning of an id is enough wherever one is asked for.

    They are those of one broker. What other brokers run is seen here only as slots that are busy; their number is
    printed on stderr.
    """

    async def question(client: Client) -> tuple[Any, int]:
        return await client.query("requests"), (await client.status()).busy_elsewhere

    answer, elsewhere = ask(common, question)
    if as_json:
        show_json(answer)
    else:
        rows = [_row(request) for request in rows_of(answer, list[RequestRow])]
        table(COLUMNS, rows, nothing="nothing waits or runs", fixed=2, spare=SPARE)
    if elsewhere:
        click.echo(f"llambo: {elsewhere} more run through other brokers; ask those with --broker", err=True)


def _row(row: RequestRow) -> Row:
    return (
        row.id,
        row.state,
        row.model,
        row.priority,
        row.worker,
        number(f"{row.tokens}/{row.max_tokens}"),
        number(row.moves),
        duration(row.age_ms),
        request_note(row),
    )


@click.command(cls=Command, examples=WHY_EXAMPLES)
@click.argument("id", metavar="[ID]", default="last")
@json_option
@client_options
def why(common: Common, id: str, as_json: bool) -> None:
    """Show the story of the request ID: each step with its time and reason. The beginning of the id is enough.

    Without an ID, or with `last`, it is the request that was sent last with this key; without keys, by any client.
    Questions about a model or its tokens are passed over.
    """
    answer = query(common, "why", id)
    if as_json:
        show_json(answer)
        return
    found = rows_of(answer, RequestStory)
    click.echo("\n".join([summary(found), *timeline(found.story)]))


def summary(found: RequestStory) -> str:
    parts = [f"request {found.id}: {found.state}"]
    if found.reason:
        parts.append(f"({found.reason})")
    parts.append(f"after {found.tokens} tokens" if found.state == "ended" else f"with {found.tokens} tokens")
    parts.append(f"of model {found.model}")
    if found.worker:
        parts.append(f"on {found.worker}")
    if found.moves:
        parts.append(f"after {plural(found.moves, 'move')}")
    return one_line(" ".join(parts)) + (f"\nerror: {one_line(found.error)}" if found.error else "")


def timeline(story: Sequence[StoryStep]) -> list[str]:
    """A line for each step: the time since the submit, what happened, and why."""
    if not story:
        return ["the broker has no steps of it"]
    times = [f"{step.at_ms / 1000:.3f} s" for step in story]
    time_width, what_width = max(map(len, times)), max(len(step.what) for step in story)
    return [
        one_line(f"  {time:>{time_width}}  {step.what:<{what_width}}  {step.detail}").rstrip()
        for time, step in zip(times, story, strict=True)
    ]


@click.command(cls=Command, examples=CANCEL_EXAMPLES)
@click.argument("id", metavar="ID")
@json_option
@client_options
def cancel(common: Common, id: str, as_json: bool) -> None:
    """Stop the request ID, of any client. The beginning of the id is enough. One that has ended stays as it is."""

    async def stop(client: Client) -> tuple[str, RequestStory]:
        return await client.cancel(id), await client.why(id)

    reason, found = ask(common, stop)
    if as_json:
        show_json({"id": found.id, "reason": reason, "tokens": found.tokens})
    elif reason == "cancelled":
        click.echo(f"cancelled {found.id} after {found.tokens} tokens")
    else:
        click.echo(f"{found.id} had ended before ({reason}), after {found.tokens} tokens")
