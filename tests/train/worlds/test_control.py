"""Control: any Gymnasium environment, by any method, however its copies are stepped."""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, TimeLimit
from outcomes import WHOLE, parameters, untimed
from probes import Counting, Known, Potential, limited
from torch import nn

import policygrad as pg
from policygrad.control import processes
from policygrad.control.processes import Processes
from policygrad.errors import Note, UserError
from policygrad.train.methods import METHODS
from policygrad.train.options import OptionError, options_of
from policygrad.train.worlds import kind_of
from policygrad.train.worlds.control import observations, own_module

SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "iterations": 2, "progress": False, "preset": "none"}


@pytest.mark.parametrize("method", WHOLE)
def test_every_method_trains_on_an_environment(method: str) -> None:
    run = pg.train(method, "CartPole-v1", **SMALL)
    assert len(run.metrics) == 2
    without = method == "remax" or (METHODS[method].objective == "grpo" and method != "dro")
    assert (run.critic is None) == without
    assert run.evaluate(2).episodes == 2


@pytest.mark.parametrize(
    ("environment", "vectorization", "kind"),
    [
        ("CartPole-v1", "auto", CartPoleVectorEnv),
        ("CartPole-v1", "sync", SyncVectorEnv),
        ("Acrobot-v1", "auto", SyncVectorEnv),
        ("probes:Known-v0", "async", Processes),
        ("probes:Slow-v0", "auto", Processes),
        ("probes:Slow-v0", "sync", SyncVectorEnv),
    ],
)
@pytest.mark.parametrize("method", ["actor_critic", "grpo"])
def test_vectorization_says_how_the_environments_are_stepped(
    method: str, environment: str, vectorization: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)
    with pg.Training(method, environment, vectorization=vectorization, num_envs=2, preset="none") as training:
        assert isinstance(training.world.environments.unwrapped, kind)


def test_processes_that_nobody_asked_for_are_said_and_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)
    runs = [
        pg.train("ppo", "probes:Slow-v0", vectorization=x, num_steps=16, **SMALL) for x in ("auto", "sync", "async")
    ]
    said = "2 processes stepped the environments, which measured as faster; vectorization sync keeps them in this one"
    assert [sum(said in x for x in run.world.notes(run)) for run in runs] == [1, 0, 0]
    assert [{row["info/child"] for row in run.metrics if "info/child" in row} for run in runs] == [{1}, {0}, {1}]
    for run in runs[1:]:
        for ours, theirs in zip(runs[0].policy.parameters(), run.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_groups_smaller_than_the_rollout_need_a_seed_for_each_environment() -> None:
    """A native vector environment takes one for all, so that its copies would start alike or not at all."""
    with pg.Training("grpo", "CartPole-v1", group_size=2, num_envs=4, preset="none") as training:
        assert isinstance(training.world.environments.unwrapped, SyncVectorEnv)
        row = next(training)
    assert row["episodes"] == 4


def test_groups_are_stepped_in_processes_too_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)
    runs = [pg.train("grpo", "probes:Slow-v0", group_size=2, vectorization=x, **SMALL) for x in ("auto", "sync")]
    assert runs[0].world.processes == 2
    for ours, theirs in zip(*(run.policy.parameters() for run in runs), strict=True):
        assert torch.equal(ours, theirs)


def test_the_critics_unit_is_the_size_of_a_reward_where_most_decisions_have_none() -> None:
    """Catch pays -1 or 1 once in an episode. In a smaller unit, errors of V would drown the advantages."""
    run = pg.train("ppo", "policygrad/Catch-v0", num_steps=32, **SMALL | {"hidden": ()})
    assert run.critic.scale.item() == 1


def test_a_group_begins_in_the_same_state() -> None:
    with pg.Training("grpo", "CartPole-v1", group_size=2, num_envs=6, preset="none") as training:
        rollout = training.world.sample(training.world.policy)
    start, group = rollout.obs[:, 0], rollout.group
    for i in range(6):
        for j in range(6):
            assert torch.equal(start[i], start[j]) == bool(group[i] == group[j])


def test_the_length_of_an_episode_is_the_environments_or_the_users() -> None:
    with pg.Training("grpo", "probes:Known-v0", num_envs=2) as training:
        assert training.world.sample.length == 8
    with pg.Training("grpo", "probes:Known-v0", num_envs=2, episode_steps=3) as training:
        assert training.world.sample.length == 3
    with pytest.raises(UserError, match=r"the environment has no time limit: .*episode_steps") as raised:
        pg.train("grpo", "probes:Endless-v0", **SMALL)
    assert raised.value.option == "episode_steps"


def test_it_is_solved_once_a_hundred_episodes_have_reached_the_return() -> None:
    with pg.Training("ppo", "CartPole-v1", stop_at_return=10.0, preset="none") as training:
        found = [
            training.world.solved({"episodes": n, "return": x}) for n, x in ((99.0, 11.0), (100.0, 9.0), (100.0, 11.0))
        ]
        assert found == [False, False, True]


def test_greedy_is_the_mode_and_sampled_has_noise() -> None:
    run = pg.train("ppo", "probes:Known-v0", minibatch_size=16, num_steps=16, **SMALL)
    plain = run.evaluate(4)
    assert run.evaluate(4, greedy=True) == run.evaluate(4) == plain
    assert run.evaluate(4, greedy=False) == run.evaluate(4, greedy=False) != plain
    assert run.evaluate(4, seed=3) != plain
    assert run.evaluate().episodes == 10
    for count in (0, -1):
        with pytest.raises(UserError, match=f"episodes is {count}"):
            run.evaluate(count)


def test_recurrent_critics_are_refused() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layer(obs.cumsum(1)).squeeze(-1)

    with pytest.raises(UserError, match="critic"):
        pg.train("ppo", "probes:Known-v0", critic=Remembers(), num_steps=16, minibatch_size=16, **SMALL)


SPACES = [
    spaces.Box(-1.0, 1.0, (3,), np.float32),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Discrete(5, start=2),
    spaces.MultiBinary(4),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_observations_to_try_a_module_on_are_of_the_space(space: gymnasium.Space) -> None:
    made = observations(space)
    assert made.shape[:2] == (4, 4)
    assert torch.equal(made, observations(space))
    if not isinstance(space, spaces.MultiBinary):
        assert all(space.contains(x.numpy().astype(space.dtype)[()]) for x in made.flatten(0, 1))


def test_a_module_by_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"policy is MlpPolicy: hand in an nn\.Module"):
        own_module("policy", "MlpPolicy")


class Named(nn.Module):
    """A policy of one's own, which a module holds."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(observation_space.shape[0], int(action_space.n))

    def forward(self, obs: torch.Tensor) -> Any:
        return torch.distributions.Categorical(logits=self.layer(obs))


def test_a_network_of_ones_own_is_handed_in_again(tmp_path: Path) -> None:
    small = FAST | {"normalize_observations": True}
    run = pg.train("ppo", "CartPole-v1", policy=Named, out=tmp_path / "run", **small)
    obs = np.random.default_rng(0).normal(size=(9, 4))
    space, actions = run.world.observation_space, run.world.action_space
    with pytest.raises(UserError, match=r"a .*:Named of your own: load it from Python, with load\(directory, policy="):
        pg.load(tmp_path / "run")
    for policy in (Named, Named(space, actions)):
        again = pg.load(tmp_path / "run", policy=policy)
        assert again.act(obs).tolist() == run.act(obs).tolist()
        assert again.evaluate(2) == run.evaluate(2)
        assert again.stage == run.stage
    with pytest.raises(UserError, match="has weights that do not fit the policy"):
        pg.load(tmp_path / "run", policy=lambda *spaces: nn.Linear(3, 2))
    pg.train("ppo", "exact:bandit", out=tmp_path / "exact", iterations=1, progress=False)
    with pytest.raises(UserError, match="policy is for control, and this run is on exact: leave it out"):
        pg.load(tmp_path / "exact", policy=Named)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"policy": lambda space: None}, r"policy could not be made of \(observation_space, action_space\): TypeError"),
        (
            {"policy": nn.Linear(7, 2)},
            r"policy raised RuntimeError for obs \[2, 1, 4\] of torch.float32: mat1 and",
        ),
        (
            {"critic": nn.Linear(7, 1)},
            r"critic raised RuntimeError for obs \[4, 4, 4\] of torch.float32: mat1 and",
        ),
        ({"critic": nn.LSTM(4, 1)}, r"critic returned a tuple: return a tensor of values \[B, T\]"),
    ],
    ids=["arguments", "policy", "critic", "tuple"],
)
def test_an_error_of_a_module_of_ones_own_is_one_line(own: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("ppo", "CartPole-v1", **FAST, **own)
    assert len(str(raised.value)) <= 200


def test_an_evaluation_may_cut_its_episodes(tmp_path: Path) -> None:
    run = pg.train("ppo", Potential, out=tmp_path / "run", **FAST)
    assert run.evaluate(3, max_steps=7).lengths == [7, 7, 7]
    with pytest.raises(UserError, match="max_steps is 0: an episode needs at least one"):
        run.evaluate(3, max_steps=0)
    with pytest.raises(UserError, match="max_steps is for control, and this run is on exact:bandit"):
        pg.train("ppo", "exact:bandit", iterations=1, progress=False).evaluate(max_steps=3)


def test_a_preset_is_blamed_for_an_option_that_the_environment_has_no_use_for() -> None:
    said = r"initial_log_std is for Box actions, .* \(preset Pendulum-v1 sets initial_log_std=-0.5; preset none"
    with pytest.raises(OptionError, match=said):
        pg.train("ppo", "CartPole-v1", **FAST | {"num_steps": 512, "preset": "Pendulum-v1"})


@pytest.mark.parametrize(
    ("task", "values", "kind"),
    [
        ("CartPole-v1", {}, "control"),
        ("exact:chain", {}, "exact"),
        ("arithmetic", {}, "language"),
        ("prompts.jsonl", {}, "language"),
        (None, {"dataset": "org/name"}, "language"),
        (None, {"model": "org/name"}, "language"),
        ("CartPole-v1", {"model": None}, "control"),
        pytest.param(Known, {}, "control", id="a callable"),
    ],
    ids=lambda x: str(x),
)
def test_a_task_names_its_world(task: Any, values: dict[str, Any], kind: str) -> None:
    assert kind_of(task, values) == kind


FAST: dict[str, Any] = {**SMALL, "num_steps": 16, "minibatch_size": 16, "num_envs": 2}

MINE = """
import gymnasium, numpy as np
class Mine(gymnasium.Env):
    def __init__(self, steps=4):
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space, self.steps = gymnasium.spaces.Discrete(2), steps
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}
    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == self.steps, False, {"is_success": True}
"""


@pytest.mark.parametrize("name", ["mine_world.py:Mine", "mine_world:Mine"])
def test_a_class_of_ones_own_is_trained_and_evaluated_by_its_name_and_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "mine_world", raising=False)
    Path("mine_world.py").write_text(MINE)
    pg.train("ppo", name, out="run", env_options={"steps": 3}, **FAST)
    monkeypatch.chdir("/")
    again = pg.Run.load(tmp_path / "run", trust=True)
    assert again.options.env_options == '{"steps": 3}'
    if name.endswith(".py:Mine"):
        assert again.world.task == f"{tmp_path}/mine_world.py:Mine", "found from anywhere"
    found = again.evaluate(2)
    assert (found.lengths, found.success) == ([3, 3], 1.0)


def test_an_environments_options_may_have_the_names_of_the_librarys_own() -> None:
    """MiniGrid's max_steps, for one: they are the environment's, and no function here takes them for its own."""

    class Named(Counting):
        def __init__(self, max_steps: int, num_envs: int, seed: int, wrap: str, device: str, environment: int) -> None:
            super().__init__()
            assert (num_envs, seed, wrap, device, environment) == (2, 3, "x", "y", 4)
            self.max_steps = max_steps

        def step(self, action: Any) -> Any:
            obs, reward, terminated, _, info = super().step(action)
            self.steps_here = getattr(self, "steps_here", 0) + 1
            return obs, reward, terminated, self.steps_here % self.max_steps == 0, info

    names = {"max_steps": 3, "num_envs": 2, "seed": 3, "wrap": "x", "device": "y", "environment": 4}
    run = pg.train("ppo", Named, env_options=names, **FAST)
    assert max(run.evaluate(2).lengths) <= 3


def test_a_class_that_a_module_holds_is_kept_with_its_name(tmp_path: Path) -> None:
    run = pg.train("ppo", Counting, out=tmp_path, **FAST)
    assert run.world.stored() == "probes:Counting"
    assert pg.Run.load(tmp_path, trust=True).evaluate(2).returns == run.evaluate(2).returns


def test_a_class_without_a_name_says_how_to_evaluate_it(tmp_path: Path) -> None:
    class Local(Counting):
        pass

    run = pg.train("ppo", Local, out=tmp_path, **FAST)
    again = pg.Run.load(tmp_path)
    with pytest.raises(UserError, match=r"this run, Local, has no name .*evaluate\(environment=\.\.\.\) takes Local"):
        again.evaluate(2)
    assert again.evaluate(2, environment=Local) == run.evaluate(2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{", "env_options is {: it must be a JSON object"),
        ("[1]", r"env_options is \[1\]: it must be a JSON object"),
        ({1: 2}, "env_options is {1: 2}: it must be a dict that JSON keeps as it is"),
        ({"a": {1, 2}}, "it must be a dict that JSON keeps as it is"),
        ({"a": np.int64(3)}, "it must be a dict that JSON keeps as it is"),
        (3, "env_options is 3: it must be a dict that JSON keeps as it is"),
        ({"num_envs": 3}, "could not be made: TypeError: .*num_envs.*: its arguments are env_options"),
        ({"no_such": 3}, "could not be made: TypeError"),
    ],
)
def test_options_that_no_environment_can_take_are_one_line(options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pg.train("ppo", "CartPole-v1", env_options=options, **FAST)


def test_options_of_an_environment_may_be_json_text() -> None:
    text, plain = (
        pg.train("ppo", "FrozenLake-v1", env_options=x, **FAST)
        for x in ('{"is_slippery": false, "map_name": "8x8"}', {"is_slippery": False, "map_name": "8x8"})
    )
    assert text.options.env_options == plain.options.env_options
    assert plain.world.observation_space == spaces.Discrete(64)


def test_what_wrappers_learned_is_kept_with_the_run(tmp_path: Path) -> None:
    def make() -> gymnasium.Env:
        return TimeLimit(NormalizeObservation(Known()), 8)

    run = pg.train("ppo", make, out=tmp_path, **FAST)
    learned = run.world.learned()
    assert learned["NormalizeObservation.0.obs_rms.count"] > 30
    again = pg.Run.load(tmp_path)
    for name, x in learned.items():
        np.testing.assert_array_equal(again.world.learned()[name], x)
    assert again.evaluate(6, environment=make) == run.evaluate(6) == run.evaluate(6)


def test_an_evaluation_of_the_environment_in_training_lets_training_go_on_with_new_episodes() -> None:
    environment = TimeLimit(Counting((100,)), 50)
    with pg.Training("ppo", environment, steps=96, **{**FAST, "num_envs": 1, "iterations": None}) as training:
        next(training)
        training.run.evaluate(1)
        rollout = training.world.sample(training.world.policy)
    assert rollout.obs[0, :, 1].tolist() == list(range(16))


class Chancy(Known):
    """Draws from the global generators, too."""

    def step(self, action: Any) -> Any:
        obs, reward, *ends = super().step(action)
        chance = torch.rand(()).item() + np.random.random() + random.random()  # noqa: NPY002
        return (obs, reward + chance, *ends)


def noisy() -> gymnasium.Env:
    return TimeLimit(NormalizeObservation(Chancy()), 8)


def quiet() -> gymnasium.Env:
    """The type checks of these tests draw from Python's generator, too."""
    return TimeLimit(NormalizeObservation(Known()), 8)


@pytest.mark.parametrize("method", ["ppo", "reinforce", "trpo"])
@pytest.mark.parametrize("task", [noisy, "CartPole-v1"], ids=["noisy", "CartPole-v1"])
def test_evaluation_does_not_disturb_training(method: str, task: Any) -> None:
    known = {f.name for f in dataclasses.fields(options_of(method, "control"))}
    small = {name: x for name, x in FAST.items() if name in known | {"progress", "preset"}}
    small |= {"normalize_observations": True, "iterations": 4}
    if method == "reinforce":
        small.pop("num_steps")
    plain = pg.train(method, task, **small)
    judged = pg.train(method, task, evaluate_every=1, evaluation_episodes=3, **small)
    assert torch.equal(parameters(plain), parameters(judged))
    rows = [{name: x for name, x in row.items() if name != "evaluation"} for row in judged.metrics[1:]]
    assert untimed(rows) == untimed(plain.metrics)
    learned, other = ({x: y.tolist() for x, y in (run.world.learned() or {}).items()} for run in (plain, judged))
    assert learned == other


def test_evaluations_are_those_of_the_run_at_their_time() -> None:
    small = {**FAST, "iterations": 5, "normalize_observations": True}
    scores = []
    with pg.Training("ppo", quiet, evaluate_every=2, evaluation_episodes=3, **small) as training:
        first = training.run.evaluate(3)
        for row in training:
            scores.append((row.get("evaluation"), training.run.evaluate(3).score))
        run = training.run
    assert [x is not None for x, _ in scores] == [False, True, False, True, True]
    assert all(x == y for x, y in scores if x is not None)
    assert run.before == first
    assert run.after == run.evaluate()
    assert run.metrics[0] == {"steps": 0.0, "evaluation": first.score}
    assert set(run.summary()["after"]) >= {"return_mean", "episodes"}


def test_by_default_nothing_is_evaluated_in_training() -> None:
    run = pg.train("ppo", noisy, **FAST)
    assert (run.before, run.after) == (None, None)
    assert "before" not in run.summary()
    assert not any("evaluation" in row for row in run.metrics)


def test_an_evaluation_needs_environments_of_its_own() -> None:
    with pytest.raises(OptionError, match="hand in a function that makes it"):
        pg.train("ppo", noisy(), evaluate_every=1, **{**FAST, "num_envs": 1})
    with pytest.raises(OptionError, match="evaluation_episodes is of evaluate_every, which is 0"):
        pg.train("ppo", noisy, evaluation_episodes=3, **FAST)


def test_a_run_acts_as_it_is_evaluated() -> None:
    class Pairs(Known):
        """Observations in a Dict, and normalized by the run."""

        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (3,), np.float32)})

        def _obs(self) -> Any:
            return {"x": super()._obs()}

        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, float(obs["x"][0] * action[0]), *rest

    def make() -> gymnasium.Env:
        return TimeLimit(Pairs(), 8)

    run = pg.train("ppo", make, normalize_observations=True, **FAST)
    returns = []
    for seed in np.random.default_rng(np.random.SeedSequence(7, spawn_key=(1,))).integers(2**31, size=5).tolist():
        environment = make()
        obs, _ = environment.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = environment.step(run.act(obs))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert run.evaluate(5, seed=7).returns == pytest.approx(returns, rel=1e-4)
    count = run.world.normalizer.statistics.count
    run.act({"x": np.zeros((4, 3), np.float32)})
    assert run.world.normalizer.statistics.count == count
    with pytest.raises(UserError, match="act is for control"):
        pg.train("ppo", "exact:bandit", iterations=1, progress=False).act(0)


def test_a_task_without_an_end_shows_the_reward_of_a_step(tmp_path: Path) -> None:
    run = pg.train("ppo", "probes:Endless-v0", out=tmp_path, **FAST | {"iterations": 1})
    row = run.metrics[-1]
    if "return" not in row:
        assert f"{row['reward_per_step']:.4g} reward per step (no episode has ended)" in run.world.result([row], 1.0)
        assert f"{row['reward_per_step']:.4g} reward/step" in run.world.status(row)
    run = pg.train("ppo", Potential, **FAST)
    row = run.metrics[-1]
    assert "return" not in row
    assert run.world.summary([row])["reward_per_step"] == row["reward_per_step"]
    assert f"{row['reward_per_step']:.4g} reward per step (no episode has ended)" in run.world.result([row], 1.0)
    assert run.world.status(row)[0] == f"{row['reward_per_step']:.4g} reward/step"
    assert run.world.curve().y[0] == "reward_per_step"
    assert set(run.evaluate(1, environment=limited(Potential, 8)).lengths) == {8}


def test_the_share_of_successes_is_in_the_line() -> None:
    class Told(Counting):
        def step(self, action: Any) -> Any:
            obs, reward, terminated, truncated, _ = super().step(action)
            return obs, reward, terminated, truncated, {"is_success": terminated}

    run = pg.train("ppo", Told, **FAST)
    row = run.metrics[-1]
    assert 0.4 < row["success"] < 0.6
    assert f"success {row['success']:.2f}" in run.world.status(row)
    assert f", success {row['success']:.2f}" in run.world.result(run.metrics, 1.0)
    found = run.evaluate(8)
    assert (found.success, found.summary()["success"]) == (0.5, 0.5) or found.success in (0.0, 1.0, 0.5)
    assert f"success {found.success:.2f}" in found.line()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_envs": 10**9}, "1000000000 environments would take .* GiB, and .* are free here: lower num_envs"),
        ({"num_steps": 10**12}, "a rollout of 2 environments and 1000000000000 steps would take .*: lower num_envs or"),
        ({"hidden": (10**9, 10**9)}, r"networks with hidden \[1000000000, 1000000000\] would take .*: lower hidden"),
        ({"memory": "gru", "memory_size": 10**9}, "a memory of 1000000000 features would take .*: lower memory_size$"),
        ({"memory": "lstm", "memory_size": 10**6}, "a memory of 1000000 features would take .*: lower memory_size$"),
        (
            {"memory": "transformer", "memory_window": 10**10},
            "a memory of 64 features would take .*: lower memory_size or memory_window",
        ),
    ],
)
def test_sizes_beyond_memory_are_refused_before_they_are_allocated(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("ppo", "CartPole-v1", **FAST | options)
    assert len(str(raised.value)) <= 200


def test_an_environment_that_cannot_be_closed_loses_nothing(tmp_path: Path) -> None:
    class Unclosed(Counting):
        def close(self) -> None:
            raise RuntimeError("the window is gone")

    with pytest.warns(Note, match="RuntimeError in close: the window is gone"):
        run = pg.train("ppo", Unclosed, out=tmp_path, **FAST)
    assert len(run.metrics) == 2
    assert (tmp_path / "policy.safetensors").exists()
    with pytest.warns(Note, match="in close"):
        assert run.evaluate(2).episodes == 2


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Sequence(spaces.Discrete(2)), "Sequence"),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Tuple([spaces.Text(5)])}), "Text"),
    ],
)
def test_actions_that_are_no_numbers_are_one_line(space: spaces.Space, name: str) -> None:
    with pytest.raises(UserError, match=f"a {name} space is not supported: wrap") as raised:
        pg.train("ppo", lambda: Known(space), **FAST)
    assert len(str(raised.value)) <= 200


def test_an_evaluation_takes_one_thread_and_gives_the_others_back() -> None:
    used = []

    class Watching(nn.Module):
        def forward(self, obs: torch.Tensor) -> Any:
            used.append(torch.get_num_threads())
            return torch.distributions.Categorical(logits=torch.zeros(*obs.shape[:2], 2))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pg.evaluate(Watching(), Counting, 1)
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
        pg.evaluate(Watching(), Counting, 1, threads=None)
        assert used[-1] == 2
    finally:
        torch.set_num_threads(before)


def test_a_time_limit_of_a_step_is_the_processes() -> None:
    for limit in (None, 60.0):
        values: dict[str, Any] = {"vectorization": "async", "step_time_limit": limit, "preset": "none"}
        with pg.Training("ppo", "CartPole-v1", num_envs=2, **values) as training:
            assert training.world.environments.time_limit == limit
    with pytest.raises(UserError, match="step_time_limit is read only where vectorization is async"):
        pg.Training("ppo", "CartPole-v1", step_time_limit=60.0)
