"""Words that a reader has to guess at stay out of the code and the documents. The glossary is in ARCHITECTURE.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Pronouns for things, personification, and metaphors for which the field has a word.
BANNED = re.compile(
    r"\b(_?told|whoever|nobody|heed(s|ed)?|suffer(s|ed|ing)?|porter|household|heralds?|aboard|knock(s|ed)?|guests?"
    r"|wary|polite(ly)?|patience|forsaken|orphanage|pardon(s|ed)?|knobs?|hears|illness(es)?|convict(s|ed)?)\b|Told\b"
    r"|(?-i:Herald|Porter|Patien|Orphanage|Knobs)",
    re.IGNORECASE,
)
SUFFIXES = {".css", ".html", ".js", ".md", ".py", ".service", ".socket", ".toml", ".yml"}
#: Where one of the words is meant: the file, and the word.
MEANT = {
    ("tests/unit/test_tidy.py", "*"),
    ("docs/protocol-reference.md", "wary"),
    ("llambo/broker/records/measurements.py", "convicted"),
    # A counter of the broker.
    ("tests/sim/world.py", "convicted"),
    ("llambo/broker/records/registry.py", "wary"),
    ("llambo/broker/report/metrics_page.py", "convicted"),
    ("tests/chaos/report.py", "convicted"),
    ("tests/integration/test_poison.py", "convicted"),
    # A field of the heartbeat.
    ("llambo/worker/agent/core.py", "wary"),
    ("llambo/mesh/wire/messages.py", "wary"),
    ("tests/unit/test_suspicion.py", "wary"),
}


def pages() -> list[str]:
    found = [
        ROOT / name
        for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "Makefile")
    ]
    for folder in ("llambo", "bench", "docs", "examples", "tests", "tools"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)


@pytest.mark.parametrize("name", pages())
def test_words_are_plain(name: str) -> None:
    if (name, "*") in MEANT:
        return
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [
        f"{name}:{number}: {match[0]}"
        for number, line in enumerate(lines, 1)
        for match in BANNED.finditer(line)
        if (name, match[0].lower()) not in MEANT
    ]
    assert found == []


def test_the_search_finds_them() -> None:
    assert BANNED.search("what it was told") and BANNED.search("class TellTold") and not BANNED.search("behold")
    assert BANNED.search("ZapPorter") and not BANNED.search("except ImportError")
