"""A Python interpreter for a model's code: a process of its own, with limits of time, memory and output.

On Linux the process has namespaces of its own: no network, files that it can read and not change, and no other process
to signal. Where the system does not allow that, it is refused, unless the caller asks for code that is not confined.
The code can read what the user can read, and can tell nobody but the policy.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from policygrad.errors import UserError, one_line

SECONDS = 5.0  # of a call
MEMORY = 2**30  # bytes
OUTPUT = 10_000  # characters
GRACE = 2.0  # seconds for the start of the interpreter

# The outer process gives up network and files, then starts the inner one, which runs the code, and ends it in time.
PROGRAM = r"""
import ast, ctypes, os, resource, signal, sys

confined, seconds, memory = sys.argv[1] == "confined", float(sys.argv[2]), int(sys.argv[3])
source = sys.stdin.read()


def checked(result, what):
    if result != 0:
        number = ctypes.get_errno()
        os.write(2, f"not confined: {what}: {os.strerror(number)}".encode())
        os._exit(77)


def confine():
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    # user, mounts, network, processes, IPC
    checked(libc.unshare(0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    checked(libc.mount(None, b"/", None, 0x4000 | 0x40000, None), "mount")  # recursive, private
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # read-only
    # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, ...); its number is that of every architecture
    checked(libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(attributes), 32), "mount_setattr")


def run():
    for name, limit in (("AS", memory), ("CPU", int(seconds) + 1), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    names = {"__name__": "__main__"}
    tree = ast.parse(source, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
    if value is not None:
        print(value)


if confined:
    try:
        confine()
    except OSError as error:
        os.write(2, f"not confined: {error}".encode())
        os._exit(77)
ready, begun = os.pipe()
inner = os.fork()
if inner:
    os.close(begun)
    def late(*_):
        os.kill(inner, signal.SIGKILL)  # the first process of a namespace: all others end with it
        os.waitpid(inner, 0)
        os._exit(78)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(inner, 0)
    code = os.waitstatus_to_exitcode(status) % 256
    os._exit(min(code, 1) if os.read(ready, 1) else code)  # once the code runs, its own status says nothing
if confined:  # a second namespace of users, in which no privilege is left over the mounts and the network of the first
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.unshare(0x10000000), "unshare")
    checked(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
os.write(begun, b"1")
os.close(begun)
os.close(ready)
try:
    run()
except SystemExit:
    pass
except MemoryError:
    print("MemoryError")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
sys.stdout.flush()
os._exit(0)
"""


def run_python(
    code: str, *, seconds: float = SECONDS, memory: int = MEMORY, output: int = OUTPUT, confined: bool = True
) -> str:
    """What the code prints, and the value of its last expression, as in a notebook; or the error that ended it.

    seconds: of time, in all. memory: bytes of address space. output: characters that are kept. confined: no network, no
    change to a file, no other process in reach.

    Raises UserError if it shall be confined and cannot be.
    """
    if confined and not sys.platform.startswith("linux"):
        raise _unconfined("that needs Linux")
    command = [sys.executable, "-I", "-c", PROGRAM, "confined" if confined else "free", str(seconds), str(memory)]
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:replace"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=alone,
        cwd="/",
        start_new_session=True,
    )
    said, late = _exchange(process, code.encode("utf-8", "replace"), seconds + GRACE, output)
    text = said.decode("utf-8", "replace").rstrip()
    if process.returncode == 77:
        raise _unconfined(text.removeprefix("not confined: "))
    if late or process.returncode == 78:
        text += f"\nTimeoutError: it took longer than {seconds:g} s"
    elif process.returncode != 0:
        text += "\nit was ended by the system (its limits of time or memory)"
    return (text if len(text) <= output else f"{text[:output]} ...").strip() or "(no output)"


def _exchange(process: "subprocess.Popen[bytes]", given: bytes, seconds: float, output: int) -> tuple[bytes, bool]:
    """What a process writes, up to 4 bytes a character of `output`, and whether it had to be ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline, said, late = time.monotonic() + seconds, b"", False
    try:
        process.stdin.write(given)
        process.stdin.close()
    except BrokenPipeError:
        pass
    while len(said) <= 4 * output:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            late = True
            break
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            break
        said += chunk
    try:
        if late or len(said) > 4 * output:
            os.killpg(process.pid, signal.SIGALRM)  # the outer process ends the inner one
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        process.stdout.close()
    return said, late


def _unconfined(why: str) -> UserError:
    return UserError(
        f"code cannot be confined here ({one_line(why, 60)}): use tool python:unconfined only where it may do anything"
    )


def python_tool(*, seconds: float = SECONDS, memory: int = MEMORY, confined: bool = True) -> Callable[[str], str]:
    """A tool that runs Python. Raises UserError if it shall be confined and cannot be."""
    run_python("0", confined=confined)

    def python(code: str) -> str:
        """Run Python code in a new interpreter and return what it prints, and the value of its last expression.

        Args:
            code: The code.
        """
        return run_python(code, seconds=seconds, memory=memory, confined=confined)

    return python
