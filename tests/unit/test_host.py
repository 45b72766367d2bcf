"""Facts of the host (memory under the limits of control groups, cores), and the limits a broker asks the kernel for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llambo.mesh.service import host


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 1,000,000 kB, half of it free, on which we are in the control group /llambo.slice/worker."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000000 kB\nMemFree: 5 kB\nMemAvailable:  500000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/old\n0::/llambo.slice/worker\n")
    (tmp_path / "sys/fs/cgroup/llambo.slice/worker").mkdir(parents=True)
    return tmp_path


def limit(root: Path, group: str, **files: str) -> None:
    for name, text in files.items():
        (root / "sys/fs/cgroup" / group / f"memory.{name}").write_text(f"{text}\n")


def test_this_host_has_cores_and_memory() -> None:
    assert 1 <= host.physical_cores() <= host.cpus() <= 4096
    assert 1024 * 1024 < host.free_memory_bytes() <= host.memory_bytes()


def test_without_limits_memory_is_what_the_kernel_has(root: Path) -> None:
    assert host.memory_bytes(root) == 1_000_000 * 1024
    assert host.free_memory_bytes(root) == 500_000 * 1024
    (root / "proc/self/cgroup").unlink()
    assert host.memory_bytes(root) == 1_000_000 * 1024


def test_memory_is_what_the_narrowest_group_above_us_may_have(root: Path) -> None:
    limit(root, "llambo.slice/worker", max="max")
    limit(root, "llambo.slice", max="100000000")
    assert host.memory_bytes(root) == 100_000_000


def test_free_memory_is_what_the_narrowest_group_above_us_leaves(root: Path) -> None:
    limit(root, "llambo.slice", max="1000", high="max", current="300")
    limit(root, "llambo.slice/worker", max="max", high="900", current="250")
    assert host.free_memory_bytes(root) == 650
    limit(root, "llambo.slice", current="1200")
    assert host.free_memory_bytes(root) == 0


def test_files_that_were_read_do_not_count_as_used(root: Path) -> None:
    """A worker that has read its model once can load it again."""
    limit(root, "llambo.slice/worker", max="1000", current="950", stat="anon 200\ninactive_file 700\nactive_file 50")
    assert host.free_memory_bytes(root) == 750


SMAPS = """\
5600-5700 rw-p 00000000 00:00 0                          [heap]
Size:                100 kB
Rss:                  60 kB
7f00-7f10 r--s 00000000 08:01 77                         /models/a model.gguf
Size:               5000 kB
Rss:                3000 kB
7f10-7f20 r-xp 00000000 08:01 78                         /lib/libc.so
Size:                 90 kB
Rss:                  10 kB
7f20-7f30 rw-p 00000000 00:00 0
Size:               1000 kB
Rss:                 700 kB
"""


def test_memory_of_a_process_with_a_file_that_may_be_read_in_full(root: Path) -> None:
    (root / "proc/self/smaps").write_text(SMAPS)
    assert host.own_memory(root=root) == (760 * 1024, 3010 * 1024)
    assert host.own_memory({"/models/a model.gguf"}, root) == (760 * 1024, 5010 * 1024)


PREPARED = """
import json, resource
from llambo.cli.services.service import disable_core_dumps, raise_descriptor_limit

resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
disable_core_dumps()
raise_descriptor_limit()
print(json.dumps([resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


def test_without_descriptors_for_connections_no_service_starts() -> None:
    out = subprocess.run([sys.executable, "-c", PREPARED.format(hard=64)], capture_output=True, text=True, check=False)
    assert "only 64 descriptors are allowed (ulimit -Hn); 128 are needed" in out.stderr


@pytest.mark.parametrize("hard", [128, 200])
def test_no_cores_and_as_many_connections_as_there_may_be(hard: int) -> None:
    out = subprocess.run([sys.executable, "-c", PREPARED.format(hard=hard)], capture_output=True, check=True)
    assert json.loads(out.stdout) == [[0, 0], [hard, hard]]
