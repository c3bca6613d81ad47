"""One run on two hosts: network namespaces of this machine with a cable between them, which is pulled.

    sudo python benchmarks/hosts.py [CASE...]      all cases, as a table; exits with 1 if one is not as it should be

Each host is a network namespace with an address of its own (Linux, `ip` of iproute2, and root), and runs one torchrun
with one rank; both write to one file system. The cases: `whole`, two hosts that nothing happens to; `back`, the cable
is pulled for some seconds in the midst of the run; `late`, it is pulled for longer than the ranks wait for each other,
and torchrun may start them again; `gone`, it is pulled for good. The first three must end with the parameters of two
ranks on one host, bit for bit, and the last one with one line on each host, soon after the time limit that it says. (A
host that never comes is waited for by torchrun, before it starts a rank.)
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HOSTS = [f"policygrad-{os.getpid()}-{i}" for i in range(2)]
CABLE = "cable"  # the name of its end on each host
ADDRESSES = ("10.99.0.1", "10.99.0.2")
PORT = "29511"
WAITS = 15.0  # the run's rank_time_limit
AWAY = {"back": 6.0, "late": 2 * WAITS}  # seconds that the cable is out
TRAIN = ["train", "ppo", "CartPole-v1", "--preset", "none", "--num-envs", "4", "--num-steps", "32", "--epochs", "2",
         "--iterations", "60", "--minibatch-size", "64", "--compile", "off", "--checkpoint-every", "5",
         "--threads", "1", "--rank-time-limit", f"{WAITS:g}"]  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two hosts with a cable between them, which are gone after the block."""
    ends = [f"pg{os.getpid()}{side}" for side in "ab"]
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end, address in zip(HOSTS, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", host, "name", CABLE)
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def pull(out: bool) -> None:
    """Pull the cable out of the second host, or plug it in again: both lose the carrier."""
    ip("-n", HOSTS[1], "link", "set", CABLE, "down" if out else "up")


def started(out: Path, restarts: int) -> list[subprocess.Popen[str]]:
    """The run, by torchrun on each of two hosts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--max-restarts", str(restarts), "--master-addr", ADDRESSES[0], "--master-port", PORT]
    return [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                host,
                *launch,
                "--node-rank",
                str(i),
                "-m",
                "policygrad",
                *TRAIN,
                "--out",
                str(out),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for i, host in enumerate(HOSTS)
    ]


def ended(running: list[subprocess.Popen[str]], limit: float) -> list[tuple[int | None, float, list[str]]]:
    """Of each host the exit code (None: it hung), the seconds until it ended, and the lines of policygrad."""
    start, found = time.monotonic(), []
    for process in running:
        try:
            _, errors = process.communicate(timeout=max(1.0, limit - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its rank
            found.append((None, time.monotonic() - start, lines(process.communicate()[1])))
            continue
        found.append((process.returncode, time.monotonic() - start, lines(errors)))
    return found


def lines(errors: str) -> list[str]:
    """What policygrad says, and tracebacks but that of torchrun's own report."""
    said = [x for x in errors.splitlines() if x.startswith("policygrad: ")]
    return said + ["a traceback"] * (errors.count("Traceback (most") - errors.count("errors.ChildFailedError:"))


def begun(out: Path, running: list[subprocess.Popen[str]]) -> None:
    """Wait for the second checkpoint."""
    while not (out / "checkpoints" / "000000010.json").exists():
        if any(process.poll() is not None for process in running):
            raise SystemExit(f"the run has not begun: {[process.communicate()[1] for process in running]}")
        time.sleep(0.02)


def on_one_host(out: Path) -> None:
    """The same run as two ranks of one host."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "policygrad", *TRAIN, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def same(first: Path, second: Path) -> bool:
    one, other = (load_file(x / "policy.safetensors") for x in (first, second))
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def case(name: str, place: Path) -> tuple[bool, Any]:
    """Whether a case is as it should be, and what came of each host."""
    out = place / name
    with two_hosts():
        running = started(out, restarts=3 if name == "late" else 0)
        if name != "whole":
            begun(out, running)
            pull(True)
        if name in AWAY:
            time.sleep(AWAY[name])
            pull(False)
        found = ended(running, 600)
    said = [line for _, _, its in found for line in its]
    if name == "gone":
        soon = all(code not in (0, None) and seconds < WAITS + 45 for code, seconds, _ in found)
        return soon and all(len(its) == 1 and "lost another rank" in its[0] for _, _, its in found), found
    right = [code for code, _, _ in found] == [0, 0] and bool(said) == (name == "late")
    return right and same(out, place / "one host"), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="whole, back, late, gone; by default all")
    cases = parser.parse_args().cases or ["whole", "back", "late", "gone"]
    if os.geteuid() != 0:
        raise SystemExit("hosts.py makes network namespaces, which takes root: run it with sudo")
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if {*cases} != {"gone"}:
            on_one_host(place / "one host")
        for name in cases:
            right, found = case(name, place)
            wrong += not right
            print(f"{name}: {'as it should be' if right else 'WRONG'}", flush=True)
            for i, (code, seconds, said) in enumerate(found):
                print(
                    f"  host {i}: exit code {code} after {seconds:.0f} s; {' / '.join(said) or 'says nothing'}",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
