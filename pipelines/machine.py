"""What the machine, or the container, that this runs in has."""

from pathlib import Path

import psutil  # type: ignore[import-untyped]

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container's limit, by version of control groups."""


def machine_memory() -> int:
    """Bytes of memory, used or not: the machine's, or what a container may use of it."""
    limits = [path.read_text().strip() for path in LIMITS if path.is_file()]
    total: int = psutil.virtual_memory().total
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])
