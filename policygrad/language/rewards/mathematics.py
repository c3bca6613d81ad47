"""Whether two formulas are equal, by math-verify in a child process.

math-verify limits its time by signals, which only a main thread receives. And Python lets no other thread run while it
raises 9 to the power 9^9. A child process can be ended at any time.
"""

import atexit
import json
import select
import subprocess
import sys
import threading

from policygrad.errors import UserError

COMPARE = """
import json, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
    print(json.dumps(verify(gold, answer, timeout_seconds=None) if gold else None), flush=True)
"""
COMPARISON_SECONDS, START_SECONDS = 3.0, 60.0


class Mathematics:
    """(gold, answer) -> are the two formulas equal? None if `gold` is no formula. The process starts at first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def __call__(self, gold: str, answer: str) -> bool | None:
        with self.lock:
            process = self.process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                said = self._line(process, COMPARISON_SECONDS)
            except BrokenPipeError:
                said = b""
            if not said:  # it took too much time or memory
                self._end()
                return False
            return json.loads(said)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMPARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if not self._line(self.process, START_SECONDS):
            self._end()
            raise UserError("math_equal cannot import math_verify: pip install math-verify")
        return self.process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def _end(self) -> None:
        if self.process is not None:
            with self.process as process:  # closes the pipes and waits
                process.kill()
        self.process = None


equal = Mathematics()
