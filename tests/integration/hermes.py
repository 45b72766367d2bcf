"""SmolLM2's file with another vocabulary and another template: as if it had been made for tools.

Two of its control tokens become the tags around a call, and its template is one that knows tools. What the model says
does not get better by that, but tokens and templates are handled as with models that were made for it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from llambo.mesh.wire.conversation import CALL_BEGIN, CALL_END
from llambo.worker.models import model_files

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '<tools>' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}"
    "{{ '\n</tools>\nCall them with <tool_call></tool_call>.<|im_end|>\n' }}{% endif %}"
    "{%- set rest = messages[1:] if tools and messages[0].role == 'system' else messages %}"
    "{% for message in rest %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\n' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)"
    " ~ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Control tokens of SmolLM2 that are not used.
RENAMED = {b"<gh_stars>": CALL_BEGIN.encode(), b"<empty_output>": CALL_END.encode()}
#: Bytes of a value, by its type in the file; 8 is text, 9 an array.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGNMENT = 32


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def skip_value(self, kind: int) -> None:
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.number("<I"), self.number("<Q")
            for _ in range(count):
                self.skip_value(inner)
        else:
            self.take(SIZES[kind])


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _entry(reader: _Reader) -> bytes:
    start, key, kind = reader.at, reader.text(), reader.number("<I")
    value = reader.at
    reader.skip_value(kind)
    if key == b"tokenizer.chat_template":
        return _text(key) + struct.pack("<I", 8) + _text(TEMPLATE.encode())
    entry = reader.data[start : reader.at]
    if key == b"tokenizer.ggml.tokens":
        head, names = entry[: value - start], entry[value - start :]
        for old, new in RENAMED.items():
            assert names.count(_text(old)) == 1
            names = names.replace(_text(old), _text(new))
        return head + names
    return entry


def make(path: Path) -> Path:
    """Tensors lie where the head ends, whatever it is long: only what is before them is written anew."""
    reader = _Reader(model_files.find("smollm2").read_bytes())
    head = reader.take(8)
    tensors, entries = reader.number("<Q"), reader.number("<Q")
    head += struct.pack("<QQ", tensors, entries) + b"".join(_entry(reader) for _ in range(entries))
    start = reader.at
    for _ in range(tensors):
        reader.text()
        reader.take(8 * reader.number("<I") + 4 + 8)
    head += reader.data[start : reader.at]
    reader.at += -reader.at % ALIGNMENT
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + reader.data[reader.at :])
    return path
