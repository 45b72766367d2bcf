"""`llambo tokens`, `embed`: a text as the tokens of a model, and texts as vectors, to compare them."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from llambo.cli.commands.send import prompt_of
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, asked_model
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.std_streams import print_output
from llambo.cli.kit.tables import number, show_json, table
from llambo.mesh.wire.errors import Code, LlamboError

TOKENS_EXAMPLES = """
llambo tokens "What is AI?"
llambo tokens --count - < book.txt          how long a text is
llambo tokens --chat --count "What is AI?"  with the chat template around it
llambo tokens --back 1780 314               the text of token ids
"""
EMBED_EXAMPLES = """
llambo embed "The cat sits on the mat."        one line of JSON
llambo embed --lines - < titles.txt > vectors.jsonl
llambo embed --compare "a cat" "a kitten" "a bond"   how near they are
llambo embed --model nomic --dimensions 256 "a cat"
"""


@click.command(cls=Command, examples=TOKENS_EXAMPLES, exit_codes=True)
@click.argument("text", nargs=-1, metavar="[TEXT|-]")
@click.option("--count", is_flag=True, help="Only how many there are.")
@click.option("--chat", is_flag=True, help="Put the text into the model's chat template first.")
@click.option("--special", is_flag=True, help="Names of control tokens mean those tokens, and are shown.")
@click.option("--back", is_flag=True, help="The arguments are token ids; show their text.")
@json_option
@settings_options(["client_model"])
@client_options
def tokens(
    common: Common, /, text: tuple[str, ...], count: bool, chat: bool, special: bool, back: bool, as_json: bool,
    **_: Any,
) -> None:  # fmt: skip
    """Show the tokens of TEXT, or with --back the text of tokens.

    The text is the arguments, or stdin with `-` or without any.
    """
    if back and (count or chat):
        raise click.UsageError("--back leaves nothing to count, and no place for a template")
    model = asked_model(common.settings.text("client_model")) or None
    if back:
        ids = _ids(prompt_of(text))
        found = ask(common, lambda client: client.detokenize(ids, special=special, model=model))
        show_json({"text": found}) if as_json else print_output(found)
        return
    prompt, form = prompt_of(text), "user" if chat else "text"
    result = ask(common, lambda client: client.tokenize(prompt, special=special, form=form, model=model))  # type: ignore[arg-type]
    pieces = [piece.decode(errors="replace") for piece in result.pieces]
    if count:
        show_json({"count": len(result.ids)}) if as_json else click.echo(len(result.ids))
    elif as_json:
        show_json({"count": len(result.ids), "ids": result.ids, "pieces": pieces})
    else:
        rows = [
            (number(at), number(id), repr(piece)) for at, (id, piece) in enumerate(zip(result.ids, pieces, strict=True))
        ]
        table(["index", "id", "text"], rows, nothing="no tokens")


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise LlamboError(Code.BAD_REQUEST, f"with --back the arguments are token ids: {error}") from error


@click.command(cls=Command, examples=EMBED_EXAMPLES, exit_codes=True)
@click.argument("text", nargs=-1, metavar="[TEXT...|-]")
@click.option("--lines", is_flag=True, help="Each line of stdin is a text.")
@click.option("--compare", is_flag=True, help="Show how near each is to each: 1 is the same direction.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    help="How the tokens of a text become one vector, if the model is not one for embeddings.",
)
@click.option(
    "--dimensions", type=click.IntRange(min=1),
    help="Only the first so many numbers of a vector, for models that were trained for that.",
)  # fmt: skip
@json_option
@settings_options(["client_model"])
@client_options
def embed(
    common: Common, /, text: tuple[str, ...], lines: bool, compare: bool, pooling: str | None, dimensions: int | None,
    as_json: bool, **_: Any,
) -> None:  # fmt: skip
    """Make a vector of each TEXT, of length 1, and print one a line: JSON arrays.

    The text is stdin with `-` or without any argument.
    """
    if text and text != ("-",):
        texts = list(text)
    else:
        whole = prompt_of(text)
        texts = whole.splitlines() if lines else [whole]
    model = asked_model(common.settings.text("client_model")) or None
    found = ask(
        common,
        lambda client: client.embed(texts, pooling=pooling or "", dimensions=dimensions, model=model),  # type: ignore[arg-type]
    )
    if found.fake:
        click.echo(f"llambo: {found.model} is a fake model; its vectors are made up", err=True)
    if compare:
        near = [
            [math.fsum(a * b for a, b in zip(one, two, strict=True)) for two in found.vectors] for one in found.vectors
        ]
        if as_json:
            show_json(near)
        else:
            names = [str(at + 1) for at in range(len(texts))]
            table(
                ["text", *names],
                [(name, *(number(f"{n:.3f}") for n in row)) for name, row in zip(names, near, strict=True)],
            )
    elif as_json:
        show_json({"pooling": found.pooling, "tokens": found.tokens, "vectors": found.vectors})
    else:
        for vector in found.vectors:
            click.echo(json.dumps(vector))
