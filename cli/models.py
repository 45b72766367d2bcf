"""`llambo models`: what can be asked, and what one of them is."""

from __future__ import annotations

from typing import Any

import click

from llambo.cli.ask import ask
from llambo.cli.command import Command
from llambo.cli.common import Common, pass_common
from llambo.cli.options import client_options, json_option
from llambo.cli.output import facts, number, show_json, table

EXAMPLES = """
llambo models
llambo models smollm2              what it is, and how it is served
llambo send --model tiny "What is AI?"
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("name", required=False, metavar="[NAME]")
@json_option
@client_options
@pass_common
def models(common: Common, name: str | None, as_json: bool) -> None:
    """List the models that are served, or tell what the model NAME is.

    With only one, nobody has to name it elsewhere.
    """
    if name is not None:
        info = ask(common, lambda client: client.model_info(model=name))
        show_json(info) if as_json else show_model(info)
        return
    found = ask(common, lambda client: client.models())
    if as_json:
        show_json(found)
    else:
        show_models(found)


def show_model(info: dict[str, Any]) -> None:
    """All but the template, which is pages long; --json has it."""
    sampling, ours = info.get("sampling", {}), set(info.get("sampling_from_model", []))
    shown = {name: value for name, value in info.items() if isinstance(value, str | int) and name != "chat_template"}
    pairs = [(name.replace("_", " "), value) for name, value in shown.items()]
    pairs += [("chat template", "yes" if info["chat_template"] else "no")] if "chat_template" in info else []
    pairs += [(name.replace("_", "-"), f"{value}{' (from the model)' if name in ours else ''}") for name, value in
              sampling.items()]  # fmt: skip
    facts(pairs)


def show_models(found: list[dict[str, Any]]) -> None:
    rows = [(row["model"], *(number(row[name]) for name in ("workers", "slots", "waiting"))) for row in found]
    table(["model", "workers", "slots", "waiting"], rows, nothing="no model is served: start a `llambo-worker`")
