"""Several processes train one run: each samples its share, all learn the same, and rank 0 writes it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import parameters, untimed
from probes import Known
from rank_cases import Messages, free_port, spawned
from safetensors.torch import load_file
from stopped import killed, known, without_pictures
from tiny_files import write_all
from torch import Tensor
from torch.utils._pytree import tree_leaves

import policygrad as pg
from policygrad import ranks
from policygrad.errors import UserError
from policygrad.train.recording import complete
from policygrad.train.reproduce import reproduce
from policygrad.train.snapshots import read_checkpoint
from policygrad.train.training import Training, contents

assert without_pictures  # a fixture
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "statistics": ("ppo", "CartPole-v1", {"normalize_observations": True, "scale_rewards": True}),
    "epochs of whole episodes": ("ppo", "CartPole-v1", {"credit": "reward_to_go", "episode_steps": 9}),
    "overlap": ("ppo", "CartPole-v1", {"overlap": True}),
    "one group": ("grpo", "CartPole-v1", {"episode_steps": 9}),
    "dynamic sampling": ("dapo", "CartPole-v1", {"num_envs": 6, "group_size": 2, "episode_steps": 9}),
    "evaluations": ("trpo", "CartPole-v1", {"evaluate_every": 2, "evaluation_episodes": 2}),
    "memory": ("ppo", "CartPole-v1", {"memory": "gru", "memory_size": 4}),
    "an exact world": ("npg", "exact:chain", {"num_envs": 5}),
    "answers": ("grpo", "exact:tokens", {"num_envs": 12, "kl_ref": "loss", "kl_ref_target": 0.01}),
}  # fmt: skip
LANGUAGE = {"iterations": 4, "prompts_per_rollout": 3, "completions": 4, "max_tokens": 6, "held_out": 4, "threads": 1}
OF_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"epochs": 2, "learning_rate": 1e-2}),
    "ppo": ("ppo", {"prompts_per_rollout": 5, "completions": 1, "learning_rate": 1e-2, "minibatch_size": 4}),
}


def outcome(method: str, task: str, place: Path, **arguments: Any) -> dict[str, Any]:
    """A whole run, and the same one stopped after three iterations and resumed."""
    whole = pg.train(method, task, out=place / "whole", progress=False, **arguments)
    killed(method, task, place / "broken", 3, checkpoint_every=2, **arguments)
    resumed = pg.resume(place / "broken", progress=False, trust=True)
    return {
        "parameters": [parameters(run) for run in (whole, resumed)],
        "metrics": [untimed(run.metrics) for run in (whole, resumed)],
        "steps": whole.world.sample.steps,
        "seed": ranks.seed(0),
    }


def in_a_process(place: Path) -> dict[str, Any]:
    """Every case as one of two ranks."""
    import policygrad.train.run as module

    module.draw_curve = lambda *arguments: None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in [*CASES, *(f"language, {x}" for x in OF_LANGUAGE)]:
        method, task, given = arguments_of(name, place)
        found[name] = outcome(method, task, place / name, **given)
    for name in ALONE:
        found[f"alone, {name}"] = gone_on(place / f"alone {name}")
    found["error"] = refused(partial(Training, "ppo", Known if ranks.rank() else "CartPole-v1", progress=False))
    found["limit"] = refused(partial(Training, "ppo", "CartPole-v1", seed=ranks.rank(), progress=False))
    for compiled in ("on", "off"):
        values = known("ppo", num_envs=3, compile=compiled, iterations=3) | {"threads": 1}
        found[f"compile {compiled}"] = parameters(pg.train("ppo", "CartPole-v1", **values))
    for name in DISTURBED:
        with disturbed(name):
            found[name] = parameters(pg.train("ppo", "CartPole-v1", **known("ppo", num_envs=3) | {"threads": 1}))
    found["messages"] = {name: messages_of(name, place) for name in SENT}
    found["environment"] = refused(partial(Training, "ppo", pg.make_environments("CartPole-v1", 2)))
    return found


# Of an iteration, sums of gradients and messages of other things: weights and credit, minibatches of each epoch, the
# size of the update, and its row with the comparison of parameters. Running statistics ride on them. In an exact world
# each iteration ends with an evaluation, which rank 0 makes.
SENT = {"statistics": (4, 1 + 2 + 1 + 1), "language, grpo": (2, 1 + 2 + 1), "answers": (1, 1 + 1 + 1 + 1 + 1)}


def messages_of(name: str, place: Path) -> tuple[int, int]:
    """What a rank sends in the third iteration of a case: sums, and other messages."""
    method, task, given = arguments_of(name, place)
    given |= {"num_steps": 8, "minibatch_size": 16, "epochs": 2, "num_envs": 4} if name == "statistics" else {}
    with Training(method, task, **given | {"iterations": 9}) as training:
        for _ in range(2):
            next(training)
        with Messages() as messages:
            next(training)
    calls = dict(messages.calls)
    assert set(calls) == {"allreduce_", "allgather_"} | {x for x in calls if not calls[x]}
    return calls["allreduce_"], calls["allgather_"]


# What happens to rank 1, whose one environment is fewer than the two of rank 0.
DISTURBED = ("nothing", "it is slow", "its mask is empty", "its mask is empty, and it is slow")


@contextmanager
def disturbed(name: str) -> Iterator[None]:
    """Rank 1 sleeps after each rollout inside the block, and none of its decisions counts."""
    from policygrad.control.sampler import Sampler

    plain = Sampler.__call__

    def sampled(self: Any, policy: Any) -> Any:
        rollout = plain(self, policy)
        if "slow" in name and ranks.rank() == 1:
            time.sleep(0.2)
        counts = "empty" not in name or ranks.rank() == 0
        return replace(rollout, mask=rollout.mask & counts)

    Sampler.__call__ = sampled  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampler.__call__ = plain  # type: ignore[method-assign]


ALONE = ("statistics", "memory", "answers", "language, grpo")  # cases of one process that two go on with


def begun_alone(name: str, place: Path) -> None:
    """Three iterations of a case in one process, with a checkpoint after each."""
    method, task, given = arguments_of(name, place)
    killed(method, task, place / f"alone {name}", 3, **given | {"checkpoint_every": 1})


def arguments_of(name: str, place: Path) -> tuple[str, str, dict[str, Any]]:
    """The method, task and arguments of a case."""
    if name in CASES:
        method, task, values = CASES[name]
        given = known(method, "control" if task == "CartPole-v1" else "exact", **values)
        return (
            method,
            task,
            {x: y for x, y in given.items() if x not in ("checkpoint_every", "progress")} | {"threads": 1},
        )
    method, values = OF_LANGUAGE[name.removeprefix("language, ")]
    reward = f"{place / 'rewards' / 'mine.py'}:sevens"
    given = {"model": str(place / "model"), "reward": (reward,), **LANGUAGE, **values}
    return method, str(place / "data" / "sums.jsonl"), given


def held(training: Training) -> list[Tensor]:
    """Parameters, the optimizers' state and running statistics: what all ranks have."""
    state = training.state_dict()
    own = state["ranks"][ranks.rank()] if "ranks" in state else state
    seen = {name: own["sample"].get(name) for name in ("observations", "rewards", "order", "order_generator")}
    found = tree_leaves([state[name] for name in ("modules", "optimizers", "coefficients")] + [seen])
    return [torch.as_tensor(x).clone() for x in found if isinstance(x, Tensor | np.ndarray | float | int)]


def gone_on(directory: Path) -> dict[str, Any]:
    """A run that goes on here, as it is at the start, and to its end."""
    with Training.resume(directory, progress=False, trust=True) as training:
        start, steps, random = held(training), training.world.sample.steps, training.random.state_dict()["torch"]
        iteration, drawn = training.iteration, drawn_by(training.world.sample)
        complete(training, progress=False)
    return {
        "start": start,
        "steps": steps,
        "random": random,
        "drawn": drawn,
        "iteration": iteration,
        "parameters": parameters(training.run),
        "metrics": untimed(training.run.metrics),
    }


def drawn_by(sample: Any) -> float:
    """The next number of a sampler's own generator, which stays as it is."""
    own = getattr(sample, "generator", None)
    if own is None:
        return float(deepcopy(sample.stepping.generator).random())
    return float(torch.rand((), generator=own.clone_state()))


def refused(make: Any) -> str:
    try:
        make()
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_all(tmp_path_factory.mktemp("ranks"))
    for name in ALONE:
        begun_alone(name, place)
        shutil.copytree(place / f"alone {name}", place / f"untouched {name}")
    return place


@pytest.fixture(scope="module")
def processes(place: Path) -> list[dict[str, Any]]:
    """What two processes have found, started once."""
    return spawned(partial(in_a_process, place), place)


every_case = pytest.mark.parametrize("name", [*CASES, *(f"language, {x}" for x in OF_LANGUAGE)])


@every_case
def test_all_ranks_hold_the_same_parameters_and_a_resumed_run_those_of_an_unbroken_one(
    name: str, processes: list[dict[str, Any]]
) -> None:
    first, second = (found[name] for found in processes)
    for one in (first, second):
        assert torch.equal(one["parameters"][0], first["parameters"][0])
        assert torch.equal(one["parameters"][1], first["parameters"][0])
        assert one["metrics"][0] == first["metrics"][0]
        assert one["metrics"][1] == first["metrics"][0]
    assert first["metrics"][0]


@every_case
def test_the_steps_are_those_of_all(name: str, processes: list[dict[str, Any]]) -> None:
    steps = [found[name]["steps"] for found in processes]
    if name != "overlap":  # whose samplers are one rollout ahead
        assert processes[0][name]["metrics"][0][-1]["steps"] == sum(steps)
    assert min(steps) > 0
    assert processes[0][name]["seed"] != processes[1][name]["seed"]


def test_rank_0_alone_writes(place: Path, processes: list[dict[str, Any]]) -> None:
    run = pg.load(place / "statistics" / "whole")
    assert torch.equal(parameters(run), processes[1]["statistics"]["parameters"][0])
    rows = [json.loads(line) for line in (place / "statistics" / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert untimed(rows) == processes[0]["statistics"]["metrics"][0]
    assert json.loads((place / "statistics" / "whole" / "config.json").read_text())["ranks"] == 2


def kept(directory: Path) -> tuple[list[Tensor], int]:
    """What all ranks had at the last checkpoint, and the steps of all."""
    checkpoint = read_checkpoint(directory)
    assert checkpoint is not None
    state = checkpoint["training"]
    own = state.get("ranks", [state])[0]
    seen = {name: own["sample"].get(name) for name in ("observations", "rewards", "order", "order_generator")}
    found = tree_leaves([state[name] for name in ("modules", "optimizers", "coefficients")] + [seen])
    return [torch.as_tensor(x) for x in found if isinstance(x, Tensor | np.ndarray | float | int)], checkpoint["steps"]


@pytest.mark.parametrize("name", ALONE)
def test_two_ranks_go_on_with_what_one_process_had(name: str, place: Path, processes: list[dict[str, Any]]) -> None:
    """The parameters are the same, bit for bit, and the rows are not those of the beginning."""
    first, second = (found[f"alone, {name}"] for found in processes)
    with Training.resume(copied(place / f"untouched {name}", place), trust=True) as alone:
        before, steps = held(alone), alone.world.sample.steps
    for one in (first, second):
        assert same(one["start"], before)
        assert one["iteration"] == 3
        assert torch.equal(one["parameters"], first["parameters"])
    assert first["metrics"] == second["metrics"]
    assert first["steps"] + second["steps"] == steps
    assert first["metrics"][-1]["steps"] > steps
    assert not torch.equal(first["random"], second["random"])
    assert first["drawn"] != second["drawn"]
    config = json.loads((place / f"alone {name}" / "config.json").read_text())
    assert (config["ranks"], config["ranks_before"]) == (2, [{"iteration": 3, "ranks": 1}])


def copied(directory: Path, place: Path) -> Path:
    """A copy of a run that may go on."""
    return Path(shutil.copytree(directory, Path(tempfile.mkdtemp(dir=place)) / "run"))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@every_case
def test_one_process_goes_on_with_what_two_ranks_had(
    name: str, place: Path, processes: list[dict[str, Any]], recwarn: pytest.WarningsRecorder
) -> None:
    run = copied(place / name / "whole", place)
    wanted, steps = kept(run)
    with Training.resume(run, iterations=2, trust=True) as training:
        said = [str(x.message) for x in recwarn if "ranks" in str(x.message)]
        assert said == [
            "the run was trained by 2 ranks, and goes on with one process: from the same parameters and counts, and on "
            "rows that are drawn anew from the seed"
        ]
        assert same(held(training), wanted)
        assert training.last["steps"] == steps
        if name != "overlap":  # whose samplers were one rollout ahead
            assert training.world.sample.steps == steps
        iteration = training.iteration
        complete(training, progress=False)
    assert training.run.metrics[-1]["steps"] > steps
    assert (training.iteration, training.run.ended) == (iteration + 2, "finished")
    with pytest.raises(UserError, match=r"was trained by 2, 1 ranks, one number after the other: only a run"):
        reproduce(run, trust=True)


def test_a_run_that_goes_on_has_other_random_numbers_than_its_beginning() -> None:
    assert len({ranks.seed(5), *(ranks.seed_from(5, i) for i in range(3)), ranks.seed_from(6, 1)}) == 5


def test_what_ranks_cannot_do_is_one_error_on_all(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert found["error"].startswith("option task is CartPole-v1 on rank 0 and probes:Known on rank 1")
        assert found["limit"] == "option seed is 0 on rank 0 and 1 on rank 1: start all ranks alike"
    assert {found["environment"] for found in processes} == {
        "several ranks need environments of their own: hand in a function that makes one",
        "rank 0: several ranks need environments of their own: hand in a function that makes one",
    }


def test_an_iteration_sends_one_message_for_each_gradient_and_few_others(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert found["messages"] == SENT


def test_compiled_gradients_of_ranks_are_the_plain_ones(processes: list[dict[str, Any]]) -> None:
    on, off = (processes[0][f"compile {x}"] for x in ("on", "off"))
    assert not torch.equal(on, off)  # to rounding
    torch.testing.assert_close(on, off, rtol=1e-3, atol=1e-4)
    assert torch.equal(on, processes[1]["compile on"])


def test_a_slow_rank_and_one_whose_mask_is_empty_change_nothing_but_the_time(processes: list[dict[str, Any]]) -> None:
    plain, slow, empty, both = ([found[name] for found in processes] for name in DISTURBED)
    for found in (plain, slow, empty, both):
        assert torch.equal(found[0], found[1])
        assert found[0].isfinite().all()
    assert torch.equal(slow[0], plain[0])
    assert torch.equal(both[0], empty[0])
    assert not torch.equal(empty[0], plain[0])


def test_a_run_of_ranks_is_not_reproduced_by_one_process(place: Path, processes: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="was trained by 2 ranks, and one process would sample otherwise"):
        reproduce(place / "statistics" / "whole")


def test_files_of_code_are_compared_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1")
    found = contents(f"{tmp_path / 'mine.py'}:Env", ("exact_match", f"{tmp_path / 'mine.py'}:right"), None, 3)
    (tmp_path / "mine.py").write_text("x = 2")
    assert [*found] == ["mine.py"]
    assert contents(f"{tmp_path / 'mine.py'}:Env") != found
    assert contents("CartPole-v1", f"{tmp_path / 'none.py'}:Env") == {}


def test_one_process_has_no_rank_time_limit() -> None:
    with pytest.raises(UserError, match="rank_time_limit is of several ranks, and this is one process"):
        Training("ppo", "CartPole-v1", rank_time_limit=5)


# The command line


def started(
    words: list[list[str]], port: int, launch: Sequence[str] = ("-m", "policygrad"), **more: str
) -> list[subprocess.Popen[str]]:
    """`policygrad` as ranks, each with its words, as torchrun starts them."""
    return [
        subprocess.Popen(
            [sys.executable, *launch, *each],
            env=ENVIRONMENT
            | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(len(words))}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, each in enumerate(words)
    ]


def said(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str, list[str]]:
    """Exit codes, standard output, and the lines of errors of all."""
    outputs = [process.communicate(timeout=90) for process in processes]
    lines = [
        line
        for _, errors in outputs
        for line in errors.splitlines()
        if line.startswith(("policygrad", "Trace", "terminate", "  what", "Fatal"))
    ]
    return [process.returncode for process in processes], "".join(x for x, _ in outputs), lines


SOON = "import sys; from policygrad import cli, ranks; ranks.JOINING = 3.0; cli.main(sys.argv[1:])"


@pytest.mark.parametrize("here", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_as_long_as_is_said(here: int) -> None:
    port = free_port()
    code, output, lines = said(started([TRAIN], port, ["-c", SOON], WORLD_SIZE="2", RANK=str(here)))
    assert (code, output) == ([2], "")
    assert lines == [
        f"policygrad: the ranks cannot meet at 127.0.0.1:{port} (no answer within 3 s): check MASTER_ADDR and "
        "MASTER_PORT, and that all 2 were started"
    ]


TRAIN = ["train", "ppo", "CartPole-v1", "--preset", "none", "--iterations", "2", "--num-envs", "4"]


def test_different_options_a_rank_without_work_and_a_port_that_is_taken_are_one_line(tmp_path: Path) -> None:
    words = [*TRAIN, "--out", str(tmp_path / "run")]
    one = [*words, "--num-envs", "1"]
    one.remove("4")
    one.remove("--num-envs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = {
            "the command's argument": started([words, [*words, "--seed", "1"]], free_port()),
            "num_envs is 1, which leaves one of 2 ranks without work: give at least 2": started(
                [one, one], free_port()
            ),
            "eval runs in one process: start it without torchrun": started([["eval", "x"]] * 2, free_port()),
            f"port 127.0.0.1:{taken.getsockname()[1]} is taken": started(
                [words], taken.getsockname()[1], WORLD_SIZE="2"
            ),
        }
        for wanted, processes in running.items():
            codes, output, lines = said(processes)
            assert (set(codes), output, len(lines)) == ({2}, "", 1), (wanted, lines)
            assert wanted in lines[0]
            assert len(lines[0]) <= 200 + len("policygrad: ")
    assert not (tmp_path / "run").exists()


ODD = """
import os, sys
import policygrad.algorithms.ppo as module
from policygrad import cli
from policygrad.errors import UserError

def odd(*arguments):
    if os.environ["RANK"] == "1":
        raise UserError("this rank alone is odd: mend it")
    return credited(*arguments)

credited, module.credited = module.credited, odd
cli.main(sys.argv[1:])
"""


def test_an_error_that_no_other_rank_expects_is_said_by_rank_0(tmp_path: Path) -> None:
    words = [*TRAIN, "--out", str(tmp_path / "run")]
    codes, output, lines = said(started([words, words], free_port(), launch=["-c", ODD]))
    assert (codes, output) == ([2, 2], "")
    assert lines == ["policygrad: rank 1: this rank alone is odd: mend it"]


def test_a_rank_that_hangs_is_waited_for_as_long_as_is_said(tmp_path: Path) -> None:
    words = [*TRAIN[:-4], "--iterations", "1000000", "--rank-time-limit", "4", "--out", str(tmp_path / "run")]
    processes = started([words, words], free_port())
    wait_for(tmp_path / "run" / "metrics.jsonl", processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    code, _, lines = said(processes[:1])
    assert code == [2]
    (line,) = lines
    assert line.startswith("policygrad: rank 0 lost another rank (no answer within 4 s (rank_time_limit))")
    processes[1].kill()
    processes[1].communicate()


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Until the file is there and not empty."""
    start = time.monotonic()
    while not path.exists() or not path.stat().st_size:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() - start < 300  # so that nothing waits for ever; a busy machine takes its time
        time.sleep(0.05)


def test_a_rank_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    """torchrun starts both again, and they end with the parameters of a run that was not disturbed."""
    words = [*TRAIN[:-4], "--iterations", "9", "--num-envs", "3", "--num-steps", "16", "--checkpoint-every", "2"]
    words += ["--minibatch-size", "24", "--normalize-observations"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    codes, _, lines = said(started([[*words, "--out", str(whole)]] * 2, free_port()))
    assert (codes, lines) == ([0, 0], [])
    command = [*launch, "--max-restarts", "2", "-m", "policygrad", *words, "--out", str(broken)]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(broken / "checkpoints" / "000000002.json", [running])
    os.kill(max(children(running.pid)), signal.SIGKILL)
    output, errors = running.communicate(timeout=90)
    assert running.returncode == 0, errors
    assert "restarted from iteration" in output
    assert "Traceback" not in errors
    tensors = [load_file(x / "policy.safetensors") for x in (whole, broken)]
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


def children(parent: int) -> list[int]:
    """The processes that another one has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(x) for x in found.split()]
