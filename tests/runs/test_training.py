"""A training run from Python: what it takes, what it leaves behind, and how it ends when it goes wrong."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv
from probes import Broken, Known, limited
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import policygrad as pg
from policygrad.errors import UserError
from policygrad.runs import learners, training
from policygrad.runs.options import ALGORITHMS
from policygrad.runs.run import Run

SHORT: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "steps": 100}
MINIBATCHES: dict[str, Any] = {"minibatch_size": 16}
SMALL: dict[str, Any] = {"hidden": (8,), **SHORT, **MINIBATCHES}


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def fake(monkeypatch: pytest.MonkeyPatch, iterate: Callable[[nn.Module, nn.Module], Iterator[Any]]) -> None:
    """Put an algorithm of the test's own in the place of whatever the options ask for."""

    def build(options: Any, policy: nn.Module, critic: nn.Module, sampler: Any) -> learners.Learner:
        return learners.Learner(iterate(policy, critic), [])

    monkeypatch.setattr(learners, "build", build)


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def values(module: nn.Module) -> set[float]:
    return {x for p in module.parameters() for x in p.flatten().tolist()}


def on_disk(directory: Path) -> set[float]:
    tensors = load_file(directory / "policy.safetensors")
    return {x for name, tensor in tensors.items() if name.startswith("policy.") for x in tensor.flatten().tolist()}


# What it takes


def test_the_five_lines_of_the_readme_are_enough(tmp_path: Path) -> None:
    run = pg.train("ppo", "CartPole-v1", steps=600, seed=0)
    assert isinstance(run.policy, nn.Module)
    assert run.evaluate(3).episodes == 3
    run.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "policy.safetensors").exists()


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = pg.train("ppo", "probes:Known-v0", **SMALL)
    assert run.directory is None
    assert list(tmp_path.iterdir()) == []


def test_an_environment_object_is_one_environment() -> None:
    run = pg.train("ppo", CartPoleEnv(), steps=10, num_steps=16, minibatch_size=16)
    assert run.options.num_envs == 1
    with pytest.raises(UserError, match="num_envs"):
        pg.train("ppo", CartPoleEnv(), **SMALL)


def test_a_vector_environment_says_how_many_it_is() -> None:
    environments = SyncVectorEnv([limited(Known, 8)] * 3)
    run = pg.train("ppo", environments, steps=10, num_steps=16, minibatch_size=16)
    assert run.options.num_envs == 3
    with pytest.raises(UserError, match="minibatch_size"):
        pg.train("ppo", environments, steps=10, num_steps=16, minibatch_size=49)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_modules_of_ones_own_take_the_place_of_policy_and_critic(algorithm: str) -> None:
    class Own(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(3, outputs)

    class OwnPolicy(Own):
        def forward(self, obs: Tensor) -> Independent:
            return Independent(Normal(self.layer(obs), 1.0), 1)

    class OwnCritic(Own):
        def forward(self, obs: Tensor) -> Tensor:
            return self.layer(obs).squeeze(-1)

    policy, critic = OwnPolicy(2), OwnCritic(1)
    before = [p.clone() for m in (policy, critic) for p in m.parameters()]
    size = SHORT | (MINIBATCHES if algorithm == "ppo" else {})
    run = pg.train(algorithm, "probes:Known-v0", policy=policy, critic=critic, **size)
    assert run.policy is policy
    assert run.critic is critic
    after = [p for m in (policy, critic) for p in m.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert run.evaluate(2).episodes == 2


def test_callables_make_modules_of_the_spaces() -> None:
    run = pg.train(
        "ppo",
        "probes:Known-v0",
        policy=lambda observations, actions: pg.Policy(observations, actions, hidden=(3,)),
        critic=lambda observations: pg.Critic(observations, hidden=(5,)),
        **SHORT,
        **MINIBATCHES,
    )
    sizes = [p.shape[0] for m in (run.policy, run.critic) for n, p in m.named_parameters() if n == "network.0.weight"]
    assert sizes == [3, 5]


def test_policy_and_critic_may_share_a_trunk() -> None:
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())

    class Shared(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.trunk, self.last = trunk, nn.Linear(8, outputs)

    class Actor(Shared):
        def forward(self, obs: Tensor) -> Categorical:
            return Categorical(logits=self.last(self.trunk(obs)))

    class Judge(Shared):
        def forward(self, obs: Tensor) -> Tensor:
            return self.last(self.trunk(obs)).squeeze(-1)

    for algorithm in ("ppo", "actor_critic"):
        size = SHORT | (MINIBATCHES if algorithm == "ppo" else {})
        pg.train(algorithm, "CartPole-v1", preset="none", policy=Actor(2), critic=Judge(1), **size)


def test_reinforce_needs_to_know_how_long_an_episode_may_be() -> None:
    with pytest.raises(UserError, match="num_steps"):
        pg.train("reinforce", Known, steps=10)
    for environment in (limited(Known, 8), "probes:Known-v0"):
        run = pg.train("reinforce", environment, steps=10)
        assert run.metrics[0]["length"] <= 8


def test_it_stops_at_the_first_iteration_that_reaches_the_steps() -> None:
    run = pg.train("actor_critic", "CartPole-v1", preset="none", steps=100, num_envs=4, num_steps=16)
    assert len(run.metrics) == 2
    assert run.metrics[-1]["steps"] <= 128


def test_it_stops_at_a_return_once_a_hundred_episodes_have_reached_it() -> None:
    run = pg.train("actor_critic", "probes:Known-v0", steps=10_000, stop_at_return=-1e9)
    assert 100 <= run.metrics[-1]["episodes"] < 200


def test_an_actor_critic_of_each_kind_reports_through_the_same_loop() -> None:
    run = pg.train("ppo", "probes:Known-v0", **SMALL)
    assert [row["steps_per_second"] > 0 for row in run.metrics] == [True] * len(run.metrics)
    assert run.seconds > 0
    summary = run.summary()
    assert summary["return_mean"] == pytest.approx(np.mean(run.recent))
    assert summary["return_std"] == pytest.approx(np.std(run.recent))
    assert summary["steps"] == run.metrics[-1]["steps"]


# What it leaves behind


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("runs") / "deep" / "er"
    return pg.train("ppo", "probes:Known-v0", out=directory, normalize_observations=True, **SMALL)


def test_the_run_directory_holds_all_of_it(run: Run) -> None:
    assert run.directory is not None
    names = {path.name for path in run.directory.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "policy.json", "policy.safetensors", "curve.png", "tensorboard"}


def test_the_configuration_is_whole_and_strict_json(run: Run) -> None:
    assert run.directory is not None
    config = strict((run.directory / "config.json").read_text())
    assert config["algorithm"] == "ppo"
    assert config["environment"] == "probes:Known-v0"
    assert config["preset"] is None
    assert config["versions"]["torch"] == torch.__version__
    options = config["options"]
    assert set(options) == set(vars(run.options))
    assert (options["hidden"], options["steps"], options["value_clip"]) == ([8], 100, "inf")


def test_a_directory_that_is_not_empty_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written|not a directory"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path / place, **SMALL)


# How it ends when it goes wrong


def test_a_metric_that_turns_nan_stops_it_and_the_policy_before_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[nn.Module] = []

    def iterate(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        seen.append(policy)
        for k, kl in enumerate((0.1, 0.1, math.nan), 1):
            fill(policy, k)
            yield {"steps": k, "episodes": 0, "kl": kl}

    fake(monkeypatch, iterate)
    with pytest.raises(UserError, match=r"iteration 3.*because kl is nan"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == values(seen[0]) == {2.0}
    assert [strict(line)["kl"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.1, 0.1]
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_parameter_that_turns_infinite_stops_it_by_name(
    which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def iterate(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1, "episodes": 0}
        fill({"policy": policy, "critic": critic}[which], math.inf)
        yield {"steps": 2, "episodes": 0}

    fake(monkeypatch, iterate)
    with pytest.raises(UserError, match=rf"iteration 2.*the parameter {which}\..* is not finite"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {1.0}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("found NaN in the loc"), UserError("no")])
def test_an_iteration_that_stops_half_way_keeps_the_policy_before_it(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def iterate(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1, "episodes": 0}
        fill(policy, math.nan)
        raise error

    fake(monkeypatch, iterate)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {1.0}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_that_explodes_is_one_line_and_keeps_a_finite_policy(algorithm: str, tmp_path: Path) -> None:
    """Rewards of 1e30: the squared error of a critic overflows, or the parameters do."""

    class Huge(Known):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, 1e30 * reward, *rest

    small = {n: x for n, x in SMALL.items() if n != "minibatch_size" or algorithm == "ppo"}
    with pytest.raises(UserError, match=r"training stopped.*(nan|inf|NaN|finite)") as raised:
        pg.train(algorithm, limited(Huge, 8), out=tmp_path, **(small | {"steps": 5000, "learning_rate": 1e30}))
    assert "\n" not in str(raised.value)
    assert all(math.isfinite(x) for x in on_disk(tmp_path))
    pg.load_policy(tmp_path)


def test_a_policy_of_ones_own_that_checks_its_arguments_ends_the_same_way(tmp_path: Path) -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, obs: Tensor) -> Independent:
            return Independent(Normal(self.layer(obs), 1.0, validate_args=True), 1)

    policy = Checking()
    with pytest.raises(UserError, match="training stopped"):
        pg.train("ppo", limited(Known, 8), policy=policy, out=tmp_path, **(SMALL | {"learning_rate": 1e38}))
    assert all(p.isfinite().all() for p in policy.parameters())
    assert all(math.isfinite(x) for x in on_disk(tmp_path))


def test_an_environment_that_fails_half_way_keeps_what_was_learned(tmp_path: Path) -> None:
    class Later(Broken):
        def step(self, action: Any) -> Any:
            if self.steps == 40:
                raise RuntimeError("the simulator crashed")
            self.steps += 1
            return self.observation(0), 1.0, False, False, {}

    with pytest.raises(UserError, match="the simulator crashed"):
        pg.train("ppo", Later, out=tmp_path, num_envs=2, num_steps=16, minibatch_size=16, steps=1000)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    pg.load_policy(tmp_path)


def test_errors_that_are_not_the_users_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def iterate(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        yield {"steps": 1, "episodes": 0}
        raise RuntimeError("a bug of this library")

    fake(monkeypatch, iterate)
    with pytest.raises(RuntimeError, match="a bug of this library"):
        pg.train("ppo", "probes:Known-v0", **SMALL)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"policy": lambda observations, actions: None}, "policy is None: hand in an nn.Module"),
        ({"critic": lambda observations: 3}, "critic is 3"),
        ({"policy": nn.Identity()}, "the policy handed in has no parameter that requires a gradient"),
        ({"critic": nn.Linear(3, 1)}, r"the critic returned values of shape \(4, 16, 1\).*squeeze"),
    ],
    ids=["policy None", "critic 3", "nothing to learn", "critic of [B, T, 1]"],
)
def test_modules_that_cannot_be_trained_are_refused(modules: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("ppo", "probes:Known-v0", **SHORT, **MINIBATCHES, **modules)
    assert "\n" not in str(raised.value)


def test_a_frozen_critic_is_used_as_it_is_or_refused_where_it_is_fitted_alone() -> None:
    def make(space: Any) -> nn.Module:
        return pg.Critic(space, hidden=(4,)).requires_grad_(False)

    run = pg.train("ppo", "probes:Known-v0", **SHORT, **MINIBATCHES, critic=make)
    assert run.metrics
    for algorithm in ("trpo", "npg", "reinforce"):
        with pytest.raises(UserError, match="the critic handed in has no parameter that requires a gradient"):
            pg.train(algorithm, "probes:Known-v0", **SHORT, critic=make)


def test_a_policy_by_name_is_refused() -> None:
    """train's own signature refuses it in the test run: this is what a user's Python sees."""
    with pytest.raises(UserError, match=r"policy is 'MlpPolicy': hand in an nn\.Module"):
        training._own("policy", "MlpPolicy")


def test_the_policy_is_saved_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what it had learned, not what it began with."""
    saved: list[bytes] = []
    save = training.save_policy

    def watch(directory: Path, *modules: Any) -> None:
        save(directory, *modules)
        saved.append((directory / "policy.safetensors").read_bytes())

    monkeypatch.setattr(training, "save_policy", watch)
    for seconds, count in ((0.0, 1 + 2), (1e9, 1)):
        monkeypatch.setattr(training, "SAVE_SECONDS", seconds)
        saved.clear()
        pg.train("ppo", "probes:Known-v0", out=tmp_path / str(seconds), **SMALL)
        assert len(saved) == count
        assert len(set(saved)) == count
