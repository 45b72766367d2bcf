"""What became of the streams over HTTP: reads the lines of `http_load.py`.

    whole       byte for byte the right answer, with the end of one that has all its tokens
    error       an error that the API names as retryable, after a right beginning
    cut short   an end as of a whole answer, and it is none
    wrong       text that is not that of the right answer
    doubled     an event came twice
    fatal       an error that is not named as retryable
    hung        no end

All but the first two are findings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.chaos.checker import Wrong
from tests.chaos.history import Line

WHOLE, ERROR = "whole", "error"
FINDINGS = ("cut short", "wrong", "doubled", "fatal", "hung")


@dataclass
class HttpStreams:
    #: By outcome, by the code of an error, and by what else they were.
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)


def judge(lines: Iterable[Line]) -> HttpStreams:
    found = HttpStreams()
    begun: dict[str, Line] = {}
    for line in lines:
        if line["e"] == "http begun":
            begun[line["key"]] = line
        elif line["e"] == "http":
            begun.pop(line["key"], None)
            _note(found, line)
    for key, line in begun.items():
        found.outcomes["hung"] += 1
        found.wrong.append(Wrong("http hung", f"{key}: its reader has ended before it", line["t"]))
    return found


def _note(found: HttpStreams, line: Line) -> None:
    outcome = line["outcome"]
    found.outcomes[outcome] += 1
    found.kinds[line["api"] + (" by WebSocket" if line["socket"] else "")] += 1
    found.kinds["of several choices"] += line["choices"] > 1
    found.kinds["taken over"] += line["takeovers"] > 0
    found.kinds["takeovers"] += line["takeovers"]
    found.kinds["tried again after an error"] += line["tried_again"]
    if outcome == ERROR:
        found.errors[line["text"]] += 1
    elif outcome != WHOLE:
        text = f"{line['key']} ({line['api']}): {line['text']}, at {line['place']}"
        found.wrong.append(Wrong(f"http {outcome}", text, line["t"], line["id"]))
