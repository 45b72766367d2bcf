"""The settings of a client, prompts, conversations, options of requests and tasks, and the messages they become.

A task (tokenize, detokenize, embed, rerank, model_info) is a request like any other, see `wire/tasks.py`.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec
import zmq

from llambo.mesh.link import sockets
from llambo.mesh.wire import conversation, limits, naming, tasks
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.conversation import BadConversation, EncodedChat, ToolChoice
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import PeerKey

_encode = msgspec.msgpack.Encoder().encode
_checked = msgspec.msgpack.Decoder(m.InferenceRequest).decode
_checked_sampling = msgspec.msgpack.Decoder(m.Sampling).decode
#: Options of a request that are fields of its `sampling`.
SAMPLING_OPTIONS = ("temperature", "stop", "form", "system", "tool_choice")
_MODES = ("auto", "required", "none")
_ROLES = ", ".join(conversation.ROLES)
_TOOL_OPTIONS = ("tool_choice", "tool_names", "parallel_tool_calls")
_EXAMPLE = '[{"role": "user", "content": "Hello"}]'

Context = zmq.Context[zmq.Socket[bytes]]


class ClientSettings(TypedDict, total=False):
    """Settings of a client. Each has a default."""

    #: The name of this client in the log of the broker.
    name: str
    #: How long `connect` waits for the first answer of a broker.
    connect_ms: int
    #: How long to wait for the answer to a query (`status`, `workers`, ..., also `cancel`).
    query_ms: int
    #: How long requests wait for a new connection after the broker was lost; then they fail. 0: no limit.
    lost_ms: int
    #: Token frames queued while this process is busy; more are dropped, and fetched again.
    token_hwm: int
    #: The path of a key's file, or the line in it. "": no key; None: `LLAMBO_KEY`, or the credential of systemd.
    key: PeerKey | str | None
    #: Which of several brokers to use first, as an address with an IP and a port. "": one of them at random.
    first: str
    #: A pyzmq context to use instead of one of its own. It is not closed.
    context: Context | None


CLIENT_DEFAULTS: ClientSettings = {
    "name": "",
    "connect_ms": 5_000,
    "query_ms": 10_000,
    "lost_ms": 30_000,
    "token_hwm": sockets.TOKEN_HWM,
    "key": None,
    "first": "",
    "context": None,
}


#: The messages of a conversation, the oldest first, as in OpenAI's chat API: {"role": "user", "content": "Hello"}.
Messages = Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """Options of one request. An option that is left out, or None, has its default."""

    #: Required only if the mesh serves several models. "MODEL@CLASS": on a worker of that class. "MODEL+ADAPTER": with
    #: that adapter (LoRA).
    model: str | None
    #: The adapter of the model, by name, if it is not in the name of the model.
    lora: str | None
    #: The answer ends after so many tokens. Left out: 256.
    max_tokens: int | None
    #: 0: always the likeliest token. Left out: the default of the model, or else 0.8. Likewise for other sampling.
    temperature: float | None
    #: The same seed gives the same random numbers. Chosen at random if left out.
    seed: int | None
    #: The answer ends before any of these strings.
    stop: str | Sequence[str] | None
    #: The system message before a prompt. In a conversation it is the first message.
    system: str | None
    #: What the prompt is. "user", the default: the message of a user, put into the chat template of the model. "text":
    #: the model continues it as it is. "messages", "chat": the JSON of a conversation, without and with tools.
    form: tasks.Form | None
    #: Tools that the model may call, as in OpenAI's chat API. They need a conversation.
    tools: Sequence[Mapping[str, Any]] | None
    #: "auto", the default: the model may call tools; "required": it must; "none": it cannot; or the name of the tool
    #: that it must call.
    tool_choice: str | None
    #: Return the log-probability of each token, and of so many of the likeliest tokens with it: 0 to 20.
    logprobs: int | None
    #: Other options of the sampler: `top_k`, `min_p`, `grammar`, `json_schema`, ...
    sampling: dict[str, Any] | None
    #: The class in the queue: "interactive", "normal" (the default) or "batch".
    priority: m.Priority | None
    #: The request ends after this time, with the tokens it has by then. 0: no limit.
    deadline_ms: int | None
    #: False: all tokens arrive together, at the end. That is the default of `generate` and `chat`.
    stream: bool | None
    #: The id of the request: 32 hex digits. Left out: random ones. It has to be unique, and not to be guessed.
    id: str | None


class TaskCall(TypedDict, total=False):
    """Options of every task. An option that is left out, or None, has its default."""

    #: Required only if the mesh serves several models that can do the task.
    model: str | None
    #: The class in the queue: "interactive", "normal" (the default) or "batch".
    priority: m.Priority | None
    #: The task fails after this time. 0: no limit.
    deadline_ms: int | None


def build_request(
    id: bytes, seed: int, prompt: str | Messages, detached: bool, options: Options
) -> tuple[m.InferenceRequest, bytes]:
    """The request and its prompt. They are checked here, so that a mistake raises an error at once."""
    given = {name: value for name, value in options.items() if value is not None and name != "id"}
    for name in sorted(given.keys() - Options.__optional_keys__):
        raise LlamboError(Code.BAD_REQUEST, f"there is no option {name!r}", hint=_hint_for(name, given[name]))
    if (lora := given.pop("lora", None)) is not None:
        given["model"] = _with_adapter(given.get("model", ""), lora)
    tools = given.pop("tools", ())
    sampling: dict[str, Any] = {**_known_sampling(given.pop("sampling", {}))}
    sampling |= {name: given.pop(name) for name in SAMPLING_OPTIONS if name in given}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    if not isinstance(prompt, str):
        chat = chat_prompt(prompt, tools, sampling)
        plain = {name: value for name, value in sampling.items() if name not in _TOOL_OPTIONS}
        prompt, sampling = chat.text, {**plain, "form": chat.form, **chat.tool_options}
    elif tools:
        raise LlamboError(Code.BAD_REQUEST, "tools need a conversation: pass a list of messages, not a text")
    # The default of the wire is "text", and stays so for older clients.
    sampling.setdefault("form", "user")
    fields = {"seed": seed, **given, "id": id, "detached": detached}
    try:
        body = _encode(sampling)
        _checked_sampling(body)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise _invalid(error) from error
    request = checked_request({**fields, "sampling": msgspec.Raw(body)})
    if len(body) > limits.SAMPLING_BYTES:
        raise LlamboError(
            Code.BAD_REQUEST, f"{len(body)} bytes of sampling options, {limits.SAMPLING_BYTES} are allowed"
        )
    return request, encode_prompt(prompt)


def _with_adapter(model: Any, lora: Any) -> str:
    if not isinstance(model, str) or not isinstance(lora, str) or not naming.is_adapter_name(lora):
        raise LlamboError(
            Code.BAD_REQUEST, f"{lora!r} is not the name of an adapter", hint="`llambo models` lists them"
        )
    return naming.with_adapter(model, lora)


def request_id(given: str | None) -> bytes:
    if given is None:
        return secrets.token_bytes(limits.REQUEST_ID_BYTES)
    try:
        id = bytes.fromhex(given)
    except (TypeError, ValueError):
        id = b""
    if len(id) != limits.REQUEST_ID_BYTES:
        raise LlamboError(Code.BAD_REQUEST, f"the id of a request has {2 * limits.REQUEST_ID_BYTES} hex digits")
    return id


def refuse_text(messages: object) -> None:
    if isinstance(messages, str):
        raise LlamboError(Code.BAD_REQUEST, "chat takes a list of messages, not a text", hint="use generate for a text")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, bytes | str)


def chat_prompt(messages: Messages, tools: Any = (), sampling: Mapping[str, Any] | None = None) -> EncodedChat:
    """The conversation as the prompt of a request. `sampling` may have options for tools."""
    options = sampling or {}
    if not _is_list(messages):
        text = f"a prompt is a text or a list of messages, not {type(messages).__name__}"
        raise LlamboError(Code.BAD_REQUEST, text, hint=f"messages are like {_EXAMPLE}")
    for name, hint in (("form", "leave it out"), ("system", "begin the list with a message of the role system")):
        if name in options:
            raise LlamboError(Code.BAD_REQUEST, f"{name} cannot be combined with a list of messages", hint=hint)
    mode: Any
    choice = options.get("tool_choice", "auto")
    mode, only = (choice, options.get("tool_names", ())) if choice in _MODES else ("required", [choice])
    try:
        chat = conversation.read(msgspec.json.encode({"messages": messages, "tools": tools}), "chat")
        for at, message in enumerate(chat.messages):
            if message.role not in conversation.ROLES:
                raise BadConversation(f"{message.role!r} is not one of {_ROLES}", f"messages[{at}].role")
        return conversation.prompt_with_tools(chat, ToolChoice(mode, only, options.get("parallel_tool_calls")))
    except BadConversation as error:
        raise LlamboError(Code.BAD_REQUEST, str(error), hint=f"messages are like {_EXAMPLE}") from error
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError, ValueError, RecursionError) as error:
        text = f"the messages or the tools cannot be written as JSON: {error}"
        raise LlamboError(Code.BAD_REQUEST, text, hint=f"messages are like {_EXAMPLE}") from error


def checked_request(fields: dict[str, Any]) -> m.InferenceRequest:
    """The message, checked as a broker checks it."""
    try:
        return _checked(_encode({**fields, "type": "inference_request"}))
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> LlamboError:
    return LlamboError(Code.BAD_REQUEST, f"the request is not valid: {error}")


def _hint_for(name: str, value: object) -> str:
    """What is probably meant by an option that is not known. Empty: nothing similar is known."""
    if name in m.Sampling.__struct_fields__:
        return f"options of the sampler are passed as sampling={{{name!r}: {value!r}}}"
    close = difflib.get_close_matches(name, Options.__optional_keys__, 1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def _known_sampling(sampling: Any) -> dict[str, Any]:
    """A worker ignores unknown fields. Here an unknown name is an error, because it is a mistake of the caller."""
    if not isinstance(sampling, dict):
        raise LlamboError(Code.BAD_REQUEST, "sampling options must be a dictionary")
    unknown = sorted(map(str, sampling.keys() - set(m.Sampling.__struct_fields__)))
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"there is no sampling option {unknown[0]!r}")
    return sampling


def encode_prompt(prompt: str) -> bytes:
    try:
        encoded = prompt.encode()
    except UnicodeEncodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"the prompt is not text: {error}") from error
    if len(encoded) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"a prompt of {len(encoded)} bytes, {limits.PROMPT_BYTES} are allowed")
    return encoded


# --- tasks -------------------------------------------------------------------------------------------------------


def task_request(
    task: m.Task, inputs: int, input_bytes: int, options: tasks.TaskOptions, call: TaskCall
) -> m.InferenceRequest:
    fields = {name: value for name, value in call.items() if value is not None}
    unknown = sorted(fields.keys() - TaskCall.__optional_keys__)
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"{task} has no option {unknown[0]!r}")
    return checked_request(
        {**fields, "id": secrets.token_bytes(limits.REQUEST_ID_BYTES), "task": task, "stream": False,
         "sampling": msgspec.Raw(_encode(options)), "max_tokens": tasks.most_pieces(task, inputs, input_bytes)}
    )  # fmt: skip


def task_input(value: Any, kind: Any) -> bytes:
    """`kind`: as what the worker decodes it."""
    try:
        data = _encode(value)
        msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise LlamboError(Code.BAD_REQUEST, f"the input is not valid: {error}") from error
    if len(data) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"an input of {len(data)} bytes, {limits.PROMPT_BYTES} are allowed")
    return data
