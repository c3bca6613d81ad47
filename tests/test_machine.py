"""What the machine is, and what is free: of it, and of the control groups around the process."""

import math
from pathlib import Path

import pytest

from policygrad import machine
from policygrad.machine import cores, described, free_memory, share


def made(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   3000 kB\n"}
SECOND = {"proc/self/cgroup": "0::/a/b\n"}
FIRST = {"proc/self/cgroup": "3:cpu:/x\n2:cpuset,memory:/a\n1:name=systemd:/\n"}
AT = "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 3000 * 1024),
        (SECOND, 3000 * 1024),
        (SECOND | {f"{AT}a/b/memory.max": "max\n", f"{AT}a/b/memory.current": "9\n"}, 3000 * 1024),
        (SECOND | {f"{AT}a/b/memory.max": "1000\n", f"{AT}a/b/memory.current": "700\n"}, 300),
        (
            SECOND
            | {f"{AT}a/b/memory.max": "max\n", f"{AT}a/b/memory.current": "700\n"}
            | {f"{AT}a/memory.max": "900\n", f"{AT}a/memory.current": "800\n"}
            | {f"{AT}a/memory.stat": "anon 1\ninactive_file 50\nactive_file 7\n"},
            150,
        ),
        (SECOND | {f"{AT}memory.max": "1000\n", f"{AT}memory.current": "400\n"}, 600),
        (SECOND | {f"{AT}a/b/memory.max": "1000\n", f"{AT}a/b/memory.current": "1700\n"}, 0),
        (
            FIRST
            | {f"{AT}memory/a/memory.limit_in_bytes": "1000\n", f"{AT}memory/a/memory.usage_in_bytes": "600\n"}
            | {f"{AT}memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n"},
            500,
        ),
        (FIRST | {f"{AT}memory/memory.limit_in_bytes": "1000\n", f"{AT}memory/memory.usage_in_bytes": "600\n"}, 400),
    ],
)
def test_free_is_what_is_available_within_every_limit(files: dict[str, str], free: int, tmp_path: Path) -> None:
    assert free_memory(made(tmp_path, MACHINE | files)) == free


def test_without_a_word_of_the_system_it_is_what_is_installed(tmp_path: Path) -> None:
    assert 2**28 < free_memory(tmp_path) <= math.inf
    assert 0 < free_memory() <= free_memory(tmp_path)


def test_a_machine_is_described_by_what_bits_depend_on(tmp_path: Path) -> None:
    found = described(made(tmp_path, {"proc/cpuinfo": "processor: 0\nmodel name\t: Abacus 9 (wood)\nflags: x\n"}))
    assert found["processor"] == "Abacus 9 (wood)"
    assert {"system", "instructions", "cores", "python"} <= set(found)
    assert all(isinstance(x, str) for x in found.values())
    assert described() == described()


@pytest.mark.parametrize(
    ("given", "processes", "ranks", "count"),
    [(8, 1, None, 8), (8, 3, None, 2), (8, 9, None, 1), (8, 1, "4", 2), (8, 2, "4", 2), (1, 1, "4", 1), (8, 1, "x", 8)],
)
def test_cores_are_shared(
    given: int, processes: int, ranks: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(given)), raising=False)
    monkeypatch.setattr(machine, "_sharing", 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    share(processes)
    assert cores() == count


def test_where_the_system_does_not_say_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == 1
