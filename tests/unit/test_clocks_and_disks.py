"""No decision depends on the time of day, and a full disk stops nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "llambo"
#: Calls that return or depend on the time of day.
WALL = {
    "time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "mktime", "now", "utcnow", "today",
    "CLOCK_REALTIME", "uuid1", "wall_ms",
}  # fmt: skip
CLOCKS = {"time", "datetime", "date", "uuid", "clock"}
#: Files that use it all the same, and why.
ALLOWED = {
    # A chat template may put today's date into its prompt.
    "worker/llama/prompt.py": {"datetime.now"},
    # Keys are valid until a date.
    "broker/access/zap_handler.py": {"time.time"},
    "cli/services/service.py": {"time.time"},
    "cli/commands/keys.py": {"time.time", "time.localtime", "time.strftime"},
    # Dates shown to people: of conversations, events, processes.
    "cli/chat/chat.py": {"time.time", "time.strftime"},
    "cli/chat/dialogue.py": {"time.time"},
    "cli/chat/slash_commands.py": {"time.time"},
    # The clock itself is looked at, and whether keys have expired.
    "cli/doctor/probes.py": {"time.gmtime", "time.time"},
    "cli/fleet/fleet_status.py": {"clock.wall_ms"},
    "mesh/service/clock.py": {"time.time_ns"},
    "cli/top/top_app.py": {"time.time"},
    "cli/top/top_widgets.py": {"time.localtime", "time.strftime"},
}


def wall_clocks(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in CLOCKS and node.attr in WALL:
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "uuid"):
            found |= {f"{node.module}.{name.name}" for name in node.names if name.name in WALL}
    return found


def test_nothing_in_the_mesh_asks_what_time_of_day_it_is() -> None:
    """Leases, deadlines, ages and pauses are differences of a clock that cannot be set."""
    files = [path for folder in ("mesh", "broker", "worker", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): clocks for path in files if (clocks := wall_clocks(path))}
    assert found == ALLOWED


def test_the_search_for_clocks_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import time\nfrom time import time_ns\nfrom datetime import datetime\ntime.time()\ndatetime.now()\n"
    )
    assert wall_clocks(file) == {"time.time", "time.time_ns", "datetime.now"}


SUMS = """
import json, resource, sys
from pathlib import Path
from llambo.worker.models import model_files
model, cache = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sums = [model_files.digest(str(model), cache) for _ in range(2)]
print(json.dumps([sums, sorted(p.name for p in cache.parent.iterdir())]))
"""


def sums(model: Path, cache: Path, disk: str) -> tuple[list[str], list[str], str]:
    """In a process of its own: a limit on file sizes cannot be raised again."""
    done = subprocess.run(
        [sys.executable, "-c", SUMS, str(model), str(cache), disk],
        capture_output=True, text=True, timeout=30, check=True, env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
    )  # fmt: skip
    found, files = json.loads(done.stdout)
    return found, files, done.stderr


def test_a_checksum_that_cannot_be_stored_is_computed_and_reported(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" * 1000)
    good, files, log = sums(model, tmp_path / "good" / "digests.json", "free")
    assert (len(set(good)), files, log) == (1, ["digests.json"], "")

    found, files, log = sums(model, tmp_path / "full" / "digests.json", "full")

    assert found == good
    assert files == [], "a piece of the cache was left behind"
    assert log.count("is not cached, and is computed again at the next start") == 2
    assert "File too large" in log


def test_a_file_that_was_changed_within_a_clock_that_went_back_has_a_new_sum(tmp_path: Path) -> None:
    from llambo.worker.models import model_files

    model, cache = tmp_path / "model.gguf", tmp_path / "cache" / "digests.json"
    model.write_bytes(b"one!")
    os.utime(model, ns=(10**18, 10**18))
    before = model_files.digest(str(model), cache)
    # Same size, same time of change, as after `cp -p` or with a clock that was set back.
    model.write_bytes(b"two!")
    os.utime(model, ns=(10**18, 10**18))
    assert model_files.digest(str(model), cache) != before
