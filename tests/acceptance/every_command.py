"""`python -m tests.acceptance.every_command CASES`: many commands of `llambo`, one after another, in one process.

Each runs as if it was started alone; a process for each would take most of the time of a test. CASES: a JSON list of
lists of words. A line before each command says which it is.
"""

from __future__ import annotations

import json
import sys

from llambo.cli.main import main


def run_all(cases: list[list[str]]) -> None:
    for words in cases:
        print(f"@@@ {words}", flush=True)
        try:
            main.main(words, prog_name="llambo")
        except SystemExit as ended:
            print(f"@@@ exit {ended.code}", flush=True)


if __name__ == "__main__":
    run_all(json.loads(sys.argv[1]))
