"""Remote samplers: what actors of Ray sample, together, after a death, and from a checkpoint."""

import hashlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from outcomes import parameters, untimed
from stopped import killed, without_pictures
from torch.utils._pytree import tree_map

import policygrad as pg
from policygrad import ranks
from policygrad.control.normalization import ObservationNormalizer, RewardScaler
from policygrad.errors import Note, UserError
from policygrad.rollout import Rollout
from policygrad.samplers import Together
from policygrad.train.options import OptionError
from policygrad.train.training import Training

ray = pytest.importorskip("ray")
assert without_pictures  # a fixture
SMALL: dict[str, Any] = {"preset": "none", "num_envs": 3, "num_steps": 16, "minibatch_size": 16, "threads": 1}
COLUMNS = ("obs", "action", "logp", "reward", "terminated", "ended", "mask", "group", "final_obs")


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[None]:
    """Ray, once for all tests of this file."""
    local: dict[str, Any] = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
    ray.init("local", log_to_driver=False, logging_level="CRITICAL", **local)
    yield
    ray.shutdown()


def seeds(count: int) -> list[int]:
    """Those of ranks, written out."""
    if count == 1:
        return [0]
    return [int.from_bytes(hashlib.sha256(f"0 {i}".encode()).digest()[:8], "big") >> 1 for i in range(count)]


def assert_joined(found: Rollout, parts: list[Rollout]) -> None:
    """Every column is that of the parts, one after the other, in this order."""
    length = max(x.mask.shape[1] for x in parts)
    assert found.mask.shape[1] == length
    start = 0
    for i, part in enumerate(parts):
        rows, steps = part.mask.shape
        for name in COLUMNS:
            own = getattr(part, name)
            if name == "group":
                own = own + (i << 32)
            cut = slice(None) if name in ("group", "final_obs") else (slice(None), slice(steps))
            whole = tree_map(
                lambda x, start=start, rows=rows, cut=cut: x[start : start + rows][cut], getattr(found, name)
            )
            same = tree_map(lambda x, y: torch.equal(x, y), own, whole)
            assert same is True or all(same), name
        assert not found.mask[start : start + rows, steps:].any()
        start += rows
    assert start == len(found.mask)


def test_a_rollout_is_what_samplers_with_these_shares_and_seeds_sample_here() -> None:
    with Training("ppo", "CartPole-v1", samplers=2, **SMALL) as training:
        policy = training.run.policy
        here = [
            pg.Sampler(pg.make_environments("CartPole-v1", count), 16, seed=seed)
            for count, seed in zip((2, 1), seeds(2), strict=True)
        ]
        for i in range(3):
            found, parts = training.sample(policy), [sample(policy) for sample in here]
            assert_joined(found, parts)
            assert found.metrics["steps"] == training.sample.steps == sum(int(x.metrics["steps"]) for x in parts)
            assert found.metrics["reward_per_step"] == 1.0
            with torch.no_grad():  # the next ones have another policy
                next(policy.parameters()).mul_(1.5 + i)
        lengths = [n for sample in here for _, n in sample.stepping.finished]
        assert found.metrics["length"] == pytest.approx(sum(lengths) / len(lengths))


def test_groups_stay_whole_and_rows_of_other_lengths_are_joined() -> None:
    options: dict[str, Any] = {"preset": "none", "num_envs": 6, "group_size": 2, "episode_steps": 40, "threads": 1}
    with Training("grpo", "CartPole-v1", samplers=2, **options) as training:
        policy = training.run.policy
        parts = []
        for count, seed in zip((4, 2), seeds(2), strict=True):
            environments = pg.make_environments("CartPole-v1", count, vectorization="sync")
            parts.append(pg.Sampler(environments, 40, seed=seed, whole_episodes=True, groups=2)(policy))
        assert parts[0].mask.shape != parts[1].mask.shape
        assert_joined(training.sample(policy), parts)


def test_rows_of_a_policy_with_memory_keep_the_states_before_their_pieces() -> None:
    options = {**SMALL, "memory": "gru", "memory_size": 4, "sequence_length": 8, "iterations": 3}
    with Training("ppo", "CartPole-v1", samplers=2, **options) as training:
        policy, critic = training.run.policy, training.run.critic
        parts = []
        for count, seed in zip((2, 1), seeds(2), strict=True):
            environments = pg.make_environments("CartPole-v1", count)
            parts.append(pg.Sampler(environments, 16, seed=seed, sequence_length=8, critic=critic)(policy))
        found = training.sample(policy)
        assert found.pieces == 2
        assert found.obs.state.shape[1] == 2
        assert found.obs.state.any()
        assert found.obs.critic_state.any()
        assert_joined(found, parts)


RUNNING: dict[str, Any] = {"normalize_observations": True, "scale_rewards": True}


def test_running_statistics_are_those_that_ranks_have() -> None:
    """Of all samplers at the start of a rollout, with what a sampler sees itself on top; bit for bit as ranks do it."""
    with Training("ppo", "CartPole-v1", samplers=2, **SMALL, **RUNNING) as training:
        policy = training.run.policy

        def rank(i: int) -> tuple[list[Rollout], list[Any]]:
            count = (2, 1)[i]
            normalizer, scaler = ObservationNormalizer((4,)), RewardScaler(count, 0.99)
            own = pg.Sampler(
                pg.make_environments("CartPole-v1", count), 16, seed=seeds(2)[i],
                observation_normalizer=normalizer, reward_scaler=scaler,
            )  # fmt: skip
            sample, rollouts = Together(own), []
            for _ in range(4):
                rollout = sample(policy)
                rollouts.append(replace(rollout, group=rollout.group - (i << 32)))
                ranks.sum(torch.zeros(()))  # the message that tells the others
            return rollouts, [x.state_dict() for x in own.statistics()]

        (first, seen), (second, same) = ranks.simulated([partial(rank, 0), partial(rank, 1)])
        for parts in zip(first, second, strict=True):
            assert_joined(training.sample(policy), list(parts))
        for one, *others in zip(training.run.world.sample.statistics(), seen, same, strict=True):
            assert one.count > 3 * 16
            for other in others:
                assert all(np.array_equal(x, other[name]) for name, x in one.state_dict().items())


@pytest.mark.parametrize(
    ("method", "task", "options"),
    [
        ("ppo", "CartPole-v1", {}),
        ("ppo", "CartPole-v1", {**SMALL, **RUNNING}),
        ("npg", "exact:chain", {"num_envs": 4, "preset": "none"}),
    ],
    ids=["control", "statistics", "exact"],
)
def test_one_sampler_is_as_none(method: str, task: str, options: dict[str, Any]) -> None:
    options = {**(options or SMALL), "iterations": 3, "progress": False}
    plain, remote = pg.train(method, task, **options), pg.train(method, task, samplers=1, **options)
    assert torch.equal(parameters(plain), parameters(remote))
    assert untimed(plain.metrics) == untimed(remote.metrics)


def pid(training: Training, i: int) -> int:
    return ray.get(training.remote.actors[i].__ray_call__.remote(lambda self: os.getpid()))


@pytest.mark.parametrize("running", [{}, RUNNING], ids=["plain", "statistics"])
def test_a_sampler_that_is_killed_costs_its_rollout_only(running: dict[str, Any]) -> None:
    options = {**SMALL, **running, "iterations": 4, "samplers": 2}
    whole = pg.train("ppo", "CartPole-v1", progress=False, **options)
    with Training("ppo", "CartPole-v1", **options) as training, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        next(training)
        next(training)
        os.kill(pid(training, 1), signal.SIGKILL)
        for _ in training:
            pass
        assert any("sampler 1 has died" in str(x.message) for x in seen)
    assert torch.equal(parameters(training.run), parameters(whole))
    assert untimed(training.run.metrics) == untimed(whole.metrics)


@pytest.mark.parametrize("running", [{}, RUNNING], ids=["plain", "statistics"])
def test_a_run_that_was_killed_goes_on_with_its_samplers_where_they_were(
    running: dict[str, Any], tmp_path: Path
) -> None:
    options = {**SMALL, **running, "iterations": 5, "samplers": 2}
    whole = pg.train("ppo", "CartPole-v1", progress=False, **options)
    killed("ppo", "CartPole-v1", tmp_path / "run", 3, checkpoint_every=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        resumed = pg.resume(tmp_path / "run", progress=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert resumed.summary()["return_mean"] == whole.summary()["return_mean"]


def test_a_killed_learner_without_a_rollout_since_knows_the_last_episodes(tmp_path: Path) -> None:
    options = {**SMALL, "iterations": 5, "samplers": 2}
    killed("ppo", "CartPole-v1", tmp_path / "run", 3, checkpoint_every=3, **options)
    with Training.resume(tmp_path / "run") as training:
        assert training.run.world.finished
        assert training.sample.steps == training.last["steps"] > 0


SLOW = """
import time
import gymnasium

class Slow(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.slow = seed % 2
        return self.observation_space.sample() * 0, {}
    def step(self, action):
        time.sleep(0.02 * self.slow)
        return self.observation_space.sample() * 0, float(action), False, False, {}

class Broken(Slow):
    def step(self, action):
        raise RuntimeError("no more steps")

class Deadly(Slow):
    def step(self, action):
        import os
        os._exit(1)
"""


class Scripted:
    """Stands in for Ray: rollouts are ready in an order that is written down, and time does not pass."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.store = list(order), dict[int, Any]()

    def put(self, x: Any) -> Any:
        return x

    def wait(self, among: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        for i, sampler in enumerate(self.order):
            if found := [x for x in among if x[0] == sampler]:
                del self.order[i]
                return found, []
        return [among[0]], []


def test_no_rollout_is_older_than_the_bound_and_none_is_dropped() -> None:
    """Sampler 0 is quick, and sampler 2 is ready only when it is waited for."""
    from policygrad.train.remote import Remote

    for bound in (1, 2, 3):
        remote = Remote.__new__(Remote)
        remote.lag, remote.limit, remote.version, remote.actors = bound, 1.0, 0, [None] * 3
        remote.world = SimpleNamespace(sample=None)  # without running statistics
        remote.ray, remote.pending = Scripted([0, 0, 1, 0] * 30), {}
        begun: list[tuple[int, int, int]] = []
        taken: list[tuple[int, int, int]] = []

        def begin(i: int, remote: Any = remote, begun: Any = begun) -> None:
            begun.append((i, len(begun), remote.version))
            remote.pending[i] = begun[-1], remote.version

        def take(i: int, remote: Any = remote, taken: Any = taken) -> tuple[Any, int]:
            rollout, version = remote.pending.pop(i)
            taken.append(rollout)
            return rollout, remote.version - version

        remote._begin, remote._taken = begin, take  # type: ignore[method-assign, assignment]
        lags = []
        for _ in range(30):
            remote.version += 1
            for i in range(3):
                if i not in remote.pending:
                    begin(i)
            found = remote._first()
            assert len(found) == 3
            lags += [lag for _, lag in found]
        assert max(lags) == bound
        assert min(lags) == 0
        assert sorted(taken + [x for x, _ in remote.pending.values()]) == sorted(begun)
        assert {x[0] for x in taken[-6 * bound :]} == {0, 1, 2}


class Restarting:
    """Stands in for Ray, and for an actor that has died: until it is there again, it refuses all that it is asked."""

    exceptions = ray.exceptions

    def __init__(self, refusals: int) -> None:
        self.refusals, self.asked, self.begun = refusals, 0, 0
        self.sample = self.__ray_ready__ = self

    def remote(self, *arguments: Any) -> str:
        self.begun += len(arguments) > 0
        return "a rollout" if arguments else "whether it is there"

    def get(self, answer: str, timeout: float) -> Any:
        self.asked += 1
        if self.asked <= self.refusals:
            raise ray.exceptions.ActorUnavailableError("it restarts", b"0" * 16)
        ones = np.ones((1, 1), dtype=bool)
        columns = dict.fromkeys(("obs", "action", "logp", "reward"), np.zeros((1, 1)))
        columns |= {"terminated": ones, "ended": ones, "mask": ones, "group": np.zeros(1)}
        return columns, ({}, 1.0), [], "its state", []


@pytest.mark.parametrize("refusals", [1, 9])
def test_a_sampler_that_has_died_is_asked_again_when_it_is_there_and_not_before(refusals: int) -> None:
    from policygrad.train.remote import Remote

    remote, actor = Remote.__new__(Remote), Restarting(refusals)
    remote.ray, remote.actors, remote.states, remote.parts = actor, [actor], ["the state before"], {}
    remote.anew, remote.weights, remote.version, remote.limit, remote.pending = set(), "weights", 1, 30.0, {}
    remote.world, remote.statistics = SimpleNamespace(sample=None), []
    remote._begin(0)
    with pytest.warns(Note, match="sampler 0 has died: it starts again, with the same rollout") as said:
        assert remote._taken(0)[0].mask.all()
    assert (actor.begun, len(said), remote.states) == (2, 1, ["its state"])


def test_a_sampler_that_does_not_start_again_is_said() -> None:
    from policygrad.train.remote import Remote

    remote, actor = Remote.__new__(Remote), Restarting(10**9)
    remote.ray, remote.actors, remote.limit = actor, [actor], 0.3
    with pytest.raises(UserError, match=r"sampler 0 has died, and did not start again within 0 s: rank_time_limit is"):
        remote._wait_for(0)


def test_samplers_that_do_not_wait_learn_by_vtrace(tmp_path: Path) -> None:
    options = {"preset": "none", "num_envs": 4, "iterations": 6, "threads": 1, "progress": False}
    run = pg.train("off_policy_actor_critic", "CartPole-v1", samplers=2, lag=2, **options)
    assert run.metrics[0]["policy_lag"] == 0
    assert 0 < max(x["policy_lag"] for x in run.metrics) <= 2
    steps = [x["steps"] for x in run.metrics]
    assert steps == sorted(steps)


@pytest.mark.parametrize("running", [{}, RUNNING], ids=["plain", "statistics"])
def test_one_sampler_that_is_one_update_behind_is_overlap_in_another_process(running: dict[str, Any]) -> None:
    options = SMALL | running | {"iterations": 4, "progress": False}
    runs = [pg.train("ppo", "CartPole-v1", **options, **x) for x in ({"samplers": 1, "lag": 1}, {"overlap": True})]
    assert [[x["policy_lag"] for x in run.metrics] for run in runs] == [[0, 1, 1, 1]] * 2
    parameters = [run.world.modules().state_dict() for run in runs]
    assert parameters[0].keys() == parameters[1].keys()
    for name, x in parameters[0].items():
        assert torch.equal(x, parameters[1][name]), name


def test_nothing_that_a_sampler_has_seen_is_lost_or_counted_twice() -> None:
    """Samplers that do not wait: of the steps of all rollouts that were taken, each is in the statistics once."""
    options = {**SMALL, **RUNNING, "num_envs": 4, "samplers": 2, "lag": 1}
    with Training("ppo", "CartPole-v1", **options) as training:
        for _ in range(5):
            training.sample(training.run.policy)
        observations, returns = (x.count for x in training.run.world.sample.statistics())
        assert returns == training.sample.steps
        assert observations == training.sample.steps + 4  # those of the next decisions


def test_an_asynchronous_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = {"preset": "none", "num_envs": 4, "num_steps": 16, "iterations": 6, "threads": 1}
    options |= {"samplers": 2, "lag": 1}
    killed("off_policy_actor_critic", "CartPole-v1", tmp_path / "run", 4, checkpoint_every=2, **options)
    resumed = pg.resume(tmp_path / "run", progress=False)
    steps = [x["steps"] for x in resumed.metrics]
    assert len(steps) == 6
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samplers": 0}, "samplers is 0: it must be at least 1"),
        ({"samplers": 4}, "samplers is 4, and num_envs is 3: a sampler would have no work; give at most 3 samplers"),
        ({"ray": "auto"}, "ray is of samplers, which is None: set that too"),
        ({"lag": 1}, "lag is of samplers here, and samplers is None: set that, or overlap"),
        ({"samplers": 2, "lag": 1}, "samplers is 2, which does not divide num_envs, 3"),
        ({"samplers": 1, "ray": "auto"}, "this process has begun with Ray"),
        ({"samplers": 1, "overlap": True}, "samplers have lag for this: leave overlap or samplers out"),
        ({"samplers": 1, "profile": True}, "profile follows one process"),
        ({"samplers": 1, "wrap": ("NormalizeObservation",)}, "a wrapper of the environment learns"),
        ({"samplers": 1, "policy": torch.nn.Linear(4, 2)}, "samplers make policy and critic anew"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)  # fmt: skip
def test_what_samplers_cannot_do_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Training("ppo", "CartPole-v1", **{**SMALL, **options})
    assert len(str(caught.value)) <= 200


def test_a_lag_needs_a_method_that_corrects_for_it_and_another_world_has_no_samplers() -> None:
    options = {"preset": "none", "num_envs": 2, "samplers": 2}
    with pytest.raises(OptionError, match="lag learns from a policy some updates old, and actor_critic does not"):
        Training("actor_critic", "CartPole-v1", lag=1, **options)
    with pytest.raises(OptionError, match="lag is for credit gae"):
        Training("reinforce", "CartPole-v1", lag=1, **options)
    with pytest.raises(OptionError, match="grpo has no option 'samplers' on language: it is for control and exact"):
        Training("grpo", "arithmetic", samplers=2)
    with pytest.raises(UserError, match="samplers make environments by name"):
        Training("ppo", lambda: gymnasium.make("CartPole-v1"), **{**SMALL, "samplers": 1})


def test_ray_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"Ray, which is not installed: pip install policygrad\[ray\]"):
        Training("ppo", "CartPole-v1", samplers=1, **SMALL)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Broken", "sampler 0: the environment raised RuntimeError in step: no more steps"),
        ("Deadly", "sampler 0 has died of one rollout 5 times"),
    ],
)
def test_an_environment_that_fails_is_said_with_its_sampler(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with Training("ppo", f"{tmp_path}/slow.py:{name}", samplers=1, **SMALL) as training, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        with pytest.raises(UserError, match=said):
            next(training)


def test_a_sampler_that_gives_no_answer_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.replace("0.02 * self.slow", "60"))
    options = {**SMALL, "samplers": 1, "rank_time_limit": 1.0}
    with (
        Training("ppo", f"{tmp_path}/slow.py:Slow", **options) as training,
        pytest.raises(UserError, match="no answer of sampler 0 within 1 s"),
    ):
        next(training)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process that has not begun with Ray."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith("RAY_")}
    options = [
        "--preset",
        "none",
        "--num-envs",
        "2",
        "--num-steps",
        "32",
        "--minibatch-size",
        "32",
        "--iterations",
        "1",
    ]
    line = [sys.executable, "-m", "policygrad", "train", "ppo", "CartPole-v1", *options, *arguments]
    return subprocess.run(line, env=kept, capture_output=True, text=True, timeout=300, check=False)


def test_ray_is_quiet() -> None:
    plain, remote = command("--json"), command("--json", "--samplers", "2")
    assert remote.returncode == 0
    assert len(remote.stdout.splitlines()) == len(plain.stdout.splitlines())
    assert len(remote.stderr.splitlines()) == len(plain.stderr.splitlines()), remote.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere:x", "nonsense", "ray://127.0.0.1:9"])
def test_a_head_that_is_not_there_is_one_line(address: str) -> None:
    gone = command("--samplers", "1", "--ray", address)
    assert gone.returncode == 2
    assert f"Ray at '{address}' cannot be reached" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
