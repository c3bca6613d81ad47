"""The sandbox: what code may do in it, and what not."""

import os
import sys
import time
from pathlib import Path

import pytest

from policygrad.errors import UserError
from policygrad.language import sandbox
from policygrad.language.sandbox import python_tool, run_python


def can_be_confined() -> bool:
    try:
        return run_python("1") == "1"
    except UserError:
        return False


needs_confinement = pytest.mark.skipif(not can_be_confined(), reason="this system lets no process confine itself")
both = pytest.mark.parametrize("confined", [pytest.param(True, marks=needs_confinement), False])


@both
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('a')\nx = 3\nx * 2", "a\n6"),
        ("1 + 1", "2"),
        ("x = 1", "(no output)"),
        ("", "(no output)"),
        ("print('é')", "é"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x =", "SyntaxError: invalid syntax (<code>, line 1)"),
        ("raise SystemExit(3)", "(no output)"),
        ("def f():\n    return g()\ndef g():\n    return 5\nf()", "5"),
        ("import os\nsorted(os.environ)[:1]", "['LC_CTYPE']"),
    ],
)
def test_what_code_says(code: str, said: str, confined: bool) -> None:
    assert run_python(code, confined=confined) == said


@both
def test_limits_of_time_memory_and_output(confined: bool) -> None:
    start = time.monotonic()
    late = "TimeoutError: it took longer than 0.5 s"
    assert run_python("while True: pass", seconds=0.5, confined=confined) == late
    assert run_python("import time\ntime.sleep(60)", seconds=0.5, confined=confined) == late
    assert run_python("print(1, flush=True)\nwhile True: pass", seconds=0.5, confined=confined) == f"1\n{late}"
    assert time.monotonic() - start < 6
    assert run_python("x = bytearray(3 * 2**30)", confined=confined) == "MemoryError"
    assert run_python("print('x' * 100)", output=10, confined=confined) == "xxxxxxxxxx ..."
    assert run_python("while True: print('x' * 1000)", output=10, confined=confined) == "xxxxxxxxxx ..."


@needs_confinement
def test_there_is_no_network() -> None:
    assert run_python("import socket\nsocket.if_nameindex()") == "[(1, 'lo')]"
    tried = run_python("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)")
    assert tried.startswith("OSError"), tried


@needs_confinement
def test_files_can_be_read_and_not_changed(tmp_path: Path) -> None:
    here = tmp_path / "x"
    here.write_text("kept")
    assert run_python(f"open({str(here)!r}).read()") == "kept"
    for code in (
        f"open({str(here)!r}, 'w')",
        f"import os\nos.remove({str(here)!r})",
        f"open({str(tmp_path)!r} + '/y', 'w')",
    ):
        assert "Read-only file system" in run_python(code)
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


@needs_confinement
def test_the_confinement_cannot_be_undone(tmp_path: Path) -> None:
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "writable = (ctypes.c_uint64 * 4)(0, 1, 0, 0)\n"
        "undo = lambda: libc.syscall(442, -100, b'/', 0x8000, ctypes.byref(writable), 32)\n"
        "print(undo(), libc.unshare(0x10000000 | 0x20000), undo(), libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))\n"
        f"open({str(tmp_path / 'y')!r}, 'w')"
    )
    first, second = run_python(code).splitlines()
    assert [int(x) != 0 for x in first.split()][::2] == [True, True]
    assert "Read-only file system" in second


@needs_confinement
def test_no_other_process_is_in_reach() -> None:
    assert run_python("import os\nos.getpid()") == "1"
    assert "ProcessLookupError" in run_python(f"import os\nos.kill({os.getpid()}, 0)")


def test_a_status_of_its_own_is_no_refusal() -> None:
    for status in (77, 78):
        said = run_python(f"import os\nprint('not confined', flush=True)\nos._exit({status})", confined=False)
        assert said == "not confined\nit was ended by the system (its limits of time or memory)"


def test_it_is_refused_where_it_cannot_be_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError) as caught:
        python_tool()
    assert str(caught.value) == (
        "code cannot be confined here (that needs Linux): use tool python:unconfined only where it may do anything"
    )
    assert python_tool(confined=False)("2") == "2"
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "PROGRAM", sandbox.PROGRAM.replace("0x10000000 | 0x00020000", "0x10000000 | 0x1"))
    with pytest.raises(UserError, match=r"cannot be confined here \(unshare: Invalid argument\)"):
        python_tool()
