"""`llambo rerank`: documents by how well they fit a query."""

from __future__ import annotations

import sys
from typing import Any

import click

from llambo.cli.commands.send import read_stdin
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, asked_model
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.tables import number, show_json, table
from llambo.mesh.client.task_results import Ranking
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

EXAMPLES = """
llambo rerank "Where do cats sleep?" "A cat rests on a mat." "Bonds fell."
llambo rerank "Where do cats sleep?" < titles.txt     each line is a document
llambo rerank "error 502" --file gateway.log --top 5
llambo rerank --json cats "a cat" "a bond" | jq '.results[0].index'
"""


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.argument("query")
@click.argument("documents", nargs=-1, metavar="[DOCUMENT...|-]")
@click.option(
    "--file", "files", multiple=True, type=click.Path(exists=True, dir_okay=False),
    help="Each line of this file is a document. May be repeated.",
)  # fmt: skip
@click.option("--top", type=click.IntRange(min=1), help="Show only so many, the best.")
@click.option("--raw", is_flag=True, help="Scores as the model gives them, and not from 0 to 1.")
@json_option
@settings_options(["client_model"])
@client_options
def rerank(
    common: Common, /, query: str, documents: tuple[str, ...], files: tuple[str, ...], top: int | None, raw: bool,
    as_json: bool, **_: Any,
) -> None:  # fmt: skip
    """Show documents by how well they fit QUERY, the best first.

    The documents are the arguments, the lines of --file, or with `-` or without any the lines of stdin. Empty lines are
    left out. The model has to be one that reranks; `llambo models` shows which are.
    """
    texts = _documents(documents, files)
    model = asked_model(common.settings.text("client_model")) or None
    found = ask(common, lambda client: client.rerank(query, texts, top_n=top, raw=raw, model=model))
    if as_json:
        show_json(_map_of(found))
        return
    rows = [(number(f"{each.score:.4f}"), number(each.index), each.document) for each in found.results]
    table(["score", "index", "document"], rows, fixed=2)
    if found.fake:
        click.echo(f"llambo: {found.model} is a fake model; its scores are made up", err=True)


def _documents(arguments: tuple[str, ...], files: tuple[str, ...]) -> list[str]:
    if arguments and arguments != ("-",) and files:
        raise click.UsageError("the documents are arguments or the lines of files; give one of both")
    if arguments and arguments != ("-",):
        return list(arguments)
    if not arguments and not files and sys.stdin.isatty():
        raise click.UsageError("there are no documents: give them as arguments or with --file, or pipe them in")
    texts = [_read(path) for path in files] if files else [read_stdin()]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise LlamboError(Code.BAD_REQUEST, "there are no documents: all lines are empty")
    return lines


def _read(path: str) -> str:
    try:
        with click.open_file(path, encoding="utf-8") as file:
            # No more than the task may have, however much there is.
            return str(file.read(limits.PROMPT_BYTES + 1))
    except UnicodeDecodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"{path} is not UTF-8 text: {error}") from error


def _map_of(found: Ranking) -> dict[str, Any]:
    results = [{"index": each.index, "score": each.score, "document": each.document} for each in found.results]
    return {"model": found.model, "tokens": found.tokens, "results": results, **({"fake": True} if found.fake else {})}
