"""What the machine is, and what it has left."""

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch


def described(root: Path = Path("/")) -> dict[str, str]:
    """What the bits of a result may depend on, besides the versions of packages. root: where /proc is."""
    named = re.search(r"^model name\s*: (.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": platform.processor() if named is None else named[1],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **gpu,
    }


_sharing = 1  # processes like this one on the machine, as share() was told


def share(processes: int) -> None:
    """Say that this process is one of several that train on this machine at the same time."""
    global _sharing
    _sharing = max(1, processes)


def cores() -> int:
    """The cores that are this process's: those it may run on, divided by those of share(), or torchrun's ranks here."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, count // max(_sharing, int(ranks) if ranks.isdecimal() else 1))


def free_memory(root: Path = Path("/")) -> float:
    """The bytes of memory that this process can still have; infinity where the system does not say.

    What is available on the machine, and what the limits of the process's control groups (those of a container) leave.
    Files that are only cached count as free. root: where /proc and /sys are.
    """
    return max(0.0, min(_available(root), *map(_left, _groups(root)), math.inf))


def _available(root: Path) -> float:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found is not None:
        return 1024.0 * int(found[1])
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        return math.inf


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The directory of each control group that bounds this process, and the files of its limit and its use there."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, place = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):  # of the first version
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = top / place.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, *names
            if folder == top:  # in a container its own group may be mounted here
                break


def _left(group: tuple[Path, str, str]) -> float:
    folder, limit, usage = group
    try:
        cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
        used = int(_text(folder / usage)) - max(map(int, cached), default=0)
        return float(int(_text(folder / limit)) - used)
    except ValueError:  # there is none, or it says "max"
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
