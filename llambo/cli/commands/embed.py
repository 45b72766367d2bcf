"""`llambo embed`: texts as vectors, to compare them."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from llambo.cli.commands.send import prompt_of
from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.tables import number, show_json, table

EXAMPLES = """
llambo embed "The cat sits on the mat."        one line of JSON
llambo embed --lines - < titles.txt > vectors.jsonl
llambo embed --compare "a cat" "a kitten" "a bond"   how near they are
"""


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.argument("text", nargs=-1, metavar="[TEXT...|-]")
@click.option("--lines", is_flag=True, help="Each line of stdin is a text.")
@click.option("--compare", is_flag=True, help="Show how near each is to each: 1 is the same direction.")
@click.option("--pooling", type=click.Choice(["mean", "last"]), help="How the tokens of a text become one vector.")
@json_option
@settings_options(["client_model"])
@client_options
@pass_common
def embed(
    common: Common, /, text: tuple[str, ...], lines: bool, compare: bool, pooling: str | None, as_json: bool, **_: Any
) -> None:
    """Make a vector of each TEXT, of length 1, and print one a line: JSON arrays.

    The text is stdin with `-` or without any argument.
    """
    if text and text != ("-",):
        texts = list(text)
    else:
        whole = prompt_of(text)
        texts = whole.splitlines() if lines else [whole]
    model = common.settings.text("client_model") or None
    found = ask(common, lambda client: client.embed(texts, pooling=pooling or "", model=model))  # type: ignore[arg-type]
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
