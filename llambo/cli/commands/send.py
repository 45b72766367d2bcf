"""`llambo send`: ask the mesh, and see the answer as it comes. `llambo attach`: follow a request sent earlier."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, asked_model
from llambo.cli.kit.flags import Duration, Function, Seed, StopText, client_options, json_option, settings_options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.naming import MARK

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Stream
    from llambo.mesh.client.client import Client
    from llambo.mesh.client.request_options import Options

SEND_EXAMPLES = """
llambo send "What is AI?"
llambo send --system "Answer in one word." "Is the sea blue?"
git diff | llambo send -                        the prompt from a pipe
llambo send -v --max-tokens 50 --seed 7 hello   with statistics
llambo send --json hello | jq -rj 'select(.type == "token").text'
id=$(llambo send --detach "A long story") && llambo attach "$id"
llambo send --class tiny "Is the sea blue?"     any worker of that class
llambo send --deadline 20s --priority interactive hello
"""
ATTACH_EXAMPLES = """
id=$(llambo send --detach "A long story")
llambo attach "$id"
llambo attach 3f2a --json
"""

SETTINGS = ("client_model", "max_tokens", "temperature", "connect_ms", "timeout_ms")


def _client_options(function: Function) -> Function:
    return client_options(function, verbose="Statistics and the log to stderr; twice for more.")


@click.command(cls=Command, examples=SEND_EXAMPLES, exit_codes=True)
@click.argument("prompt", nargs=-1, metavar="[PROMPT|-]")
@click.option("--seed", type=Seed(), metavar="NUMBER", help="The same seed, the same chances.")
@click.option(
    "--stop", type=StopText(), multiple=True, metavar="TEXT", help="End before this text; may be given often."
)
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
@click.option("--system", metavar="TEXT", help="Tell the model how to behave.")
@click.option("--class", "node_class", metavar="NAME", help="A worker of this class is to answer.")
@click.option("--lora", metavar="NAME", help="With this adapter of the model.")
@click.option("--priority", type=click.Choice(["interactive", "normal", "batch"]), help="Class in the queue.")
@click.option("--deadline", "deadline_ms", type=Duration(), help="End after so long: 500ms, 20s, 5m. Plain: seconds.")
@click.option("--detach", is_flag=True, help="Print the id and leave; the request runs on. See `llambo attach`.")
@click.option(
    "--logprobs", type=click.IntRange(0, limits.TOP_LOGPROBS), metavar="N",
    help="With --json: how likely each token was, and the N likeliest.",
)  # fmt: skip
@click.option("--no-stream", is_flag=True, help="Show the answer when it is whole.")
@json_option
@settings_options(SETTINGS)
@_client_options
def send(
    common: Common, /, prompt: tuple[str, ...], detach: bool, as_json: bool, no_stream: bool, **chosen: Any
) -> None:
    """Send PROMPT and show the answer as it comes.

    The prompt is the arguments, or stdin with `-` or without any. Ctrl-C cancels the request on its worker; a
    second one leaves at once. While its model is loaded, and when no token comes for 3 s, stderr says so, on a
    terminal or with -v; elsewhere it says once what the request waits for, if that is more than its turn.

    With --json each line is an object with a "type"; fields may be added, none changes its meaning:

    \b
    accepted  id, model, ahead         it is in; so many wait before it
    waiting   ahead, note              its place in the queue has changed, or
                                       the note: what is loaded for it
    token     index, ids, text         tokens that came together; index is
                                       that of the first; logprobs if asked for
    end       id, reason, tokens, prompt_tokens, worker, moves, queued_ms,
              first_token_ms, total_ms, tokens_per_s, fake
                                       reason: stop, length, cancelled, deadline;
                                       fake: the fake engine made it up
    error     code, text, hint, retryable, exit
                                       the last line, when it failed
    """
    text = prompt_of(prompt, in_shell=common.session is not None)
    if not text:
        raise LlamboError(Code.BAD_REQUEST, "the prompt is empty", hint="give a prompt, as an argument or on stdin")
    if len(chosen["stop"]) > limits.STOP_STRINGS:
        raise click.UsageError(f"--stop may be given {limits.STOP_STRINGS} times")
    if chosen["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs is shown with --json only")
    options = _options(common, chosen, stream=not no_stream)
    context = click.get_current_context()
    if detach:
        _detach(common, text, options, as_json)
        return
    from llambo.cli.kit.follow import follow

    async def opener(client: Client) -> Stream:
        return client.stream(text, **options)

    context.exit(follow(common, opener, as_json=as_json, mine=True))


def prompt_of(arguments: tuple[str, ...], *, in_shell: bool = False) -> str:
    """The prompt, from the arguments or from stdin. In a shell stdin has the shell's own commands."""
    if "-" in arguments and len(arguments) > 1:
        raise click.UsageError("`-` stands for the whole prompt, from stdin; give it alone")
    if arguments and arguments != ("-",):
        return " ".join(arguments)
    if in_shell:
        raise click.UsageError("there is no prompt: give it as an argument; stdin is the shell's")
    if not arguments and sys.stdin.isatty():
        raise click.UsageError("there is no prompt: give it as an argument, or pipe it in")
    return read_stdin()


def read_stdin() -> str:
    """No more than a prompt may have, however much there is."""
    read = sys.stdin.buffer.read(limits.PROMPT_BYTES + 2)
    # Without the newline that `echo` adds, so that both ways of asking ask the same.
    if len(read.removesuffix(b"\n")) > limits.PROMPT_BYTES:
        text = f"the prompt on stdin is longer than the {limits.PROMPT_BYTES} bytes that are allowed"
        raise LlamboError(Code.TOO_LONG, text)
    try:
        return read.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"the prompt on stdin is not UTF-8 text: {error}") from error


def _options(common: Common, chosen: dict[str, Any], *, stream: bool) -> Options:
    settings = common.settings
    if chosen["raw"] and chosen["system"]:
        raise click.UsageError("--raw leaves no place for --system")
    model = asked_model(settings.text("client_model"))
    return {
        "model": f"{model}{MARK}{chosen['node_class']}" if chosen["node_class"] else model or None,
        "lora": chosen["lora"],
        "max_tokens": settings.number("max_tokens"),
        # If none was set, the model may have a default of its own.
        "temperature": settings.real("temperature") if settings.sources["temperature"] != "default" else None,
        "seed": chosen["seed"],
        "stop": list(chosen["stop"]) or None,
        "form": "text" if chosen["raw"] else "user",
        "system": chosen["system"],
        "priority": chosen["priority"],
        "deadline_ms": chosen["deadline_ms"],
        "logprobs": chosen["logprobs"],
        "stream": stream,
    }


def _detach(common: Common, text: str, options: Options, as_json: bool) -> None:
    from llambo.cli.kit.common import ask

    id = ask(common, lambda client: client.submit(text, detached=True, **options))
    if common.session is not None:
        common.session.sent.append(id)
    click.echo(json.dumps({"type": "accepted", "id": id, "detached": True}) if as_json else id)


@click.command(cls=Command, examples=ATTACH_EXAMPLES)
@click.argument("id", metavar="ID")
@json_option
@settings_options(["connect_ms", "timeout_ms"])
@_client_options
def attach(common: Common, id: str, as_json: bool) -> None:
    """Show the answer to the request ID from its first token on, and follow it to its end.

    The beginning of the id is enough. Ctrl-C stops following and leaves the request alone: `llambo cancel` stops it.
    The JSON lines are those of `llambo send`.
    """
    from llambo.cli.kit.follow import follow

    code = follow(common, lambda client: client.attach(id), as_json=as_json, mine=False)
    click.get_current_context().exit(code)
