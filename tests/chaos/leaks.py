"""What no log may say: prompts, answers and keys. Reads what all processes of a run have written and looks for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llambo.mesh.security import keys
from llambo.worker.engine import fake_model
from tests.chaos.checker import Wrong
from tests.chaos.history import Line

LEAK = "leak"
#: Of each answer so many tokens are looked for: as text, and as numbers.
TOKENS = 8


def judge(lines: Iterable[Line], folder: Path, *, fake: bool) -> list[Wrong]:
    """One finding for each log and sort of secret."""
    secrets = list(_secrets(list(lines), folder, fake=fake))
    wrong: list[Wrong] = []
    for log in sorted(folder.rglob("*.log")):
        log_bytes = log.read_bytes()
        for what in dict.fromkeys(what for what, _ in secrets):
            found = next((secret for name, secret in secrets if name == what and secret in log_bytes), None)
            if found is not None:
                wrong.append(Wrong(LEAK, f"{log.name} tells {what}: {found[:60]!r}", 0))
    return wrong


def _secrets(lines: list[Line], folder: Path, *, fake: bool) -> Iterator[tuple[str, bytes]]:
    begun: dict[str, list[int]] = {}
    for line in lines:
        if line["e"] == "submit":
            yield "a prompt", line["prompt"].encode()
        elif line["e"] == "chunk" and not line.get("r") and len(begun.setdefault(line["id"], [])) < TOKENS:
            begun[line["id"]] += line["ids"]
    for ids in begun.values():
        first = ids[:TOKENS]
        if len(first) == TOKENS:
            yield "an answer's tokens", json.dumps(first)[1:-1].encode()
            if fake:
                yield "an answer", b"".join(fake_model.pieces_of(first))
    for file in (folder / "keys").rglob("*.key"):
        text = file.read_text(encoding="utf-8").strip()
        if text.startswith(keys.PREFIX):
            yield "a key", text.encode()
            yield "a secret", keys.from_line(text).pair.secret.encode()
        else:
            yield "a secret", json.loads(text)["secret"].encode()
