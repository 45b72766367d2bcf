"""What a process that serves asks of the kernel when it begins."""

from __future__ import annotations

import resource


def prepare() -> None:
    """No core files, and room for connections.

    A core file would hold people's prompts and the keys. And each connection is a descriptor: 1,024, which is what a
    process has by default where ten thousand or more are allowed, are a thousand idle connections of anybody.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
