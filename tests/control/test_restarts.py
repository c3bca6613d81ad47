"""An environment that fails is made anew: its episode is cut where it was, and nothing else changes."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical

import policygrad as pg
from policygrad.advantages import gae
from policygrad.control import Sampler, make_environments
from policygrad.control.environments import _prepared, close
from policygrad.control.processes import Processes, another_seed
from policygrad.errors import Note, UserError


class Counter(gymnasium.Env):
    """Its observation counts its steps, from 100 times the number of copies made before it; each step rewards 1.

    fail: what happens in step `at` of the first copies, `times` of them; the episodes have 6 steps. marker: files that
    count the copies, where they are made in several processes.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Discrete(2)
    made = 0

    def __init__(self, fail: Callable[[], Any] | None = None, times: int = 1, marker: Path | None = None) -> None:
        self.number, self.fail, self.times = Counter.made, fail, times
        if marker is not None:
            marker.mkdir(exist_ok=True)
            self.number = len(list(marker.iterdir()))
            (marker / str(self.number)).touch()
        Counter.made += 1
        self.steps, self.seeds = 0, list[Any]()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.fail is not None and self.steps == 3 and self.number < self.times:
            self.fail()
        return self.obs(), 1.0, self.steps == 6, False, {}

    def obs(self) -> np.ndarray:
        return np.array([100.0 * self.number + self.steps])


class Coin(nn.Module):
    """Both actions are as likely in every state."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.logits.expand(*obs.shape[:-1], 2))


def raises() -> None:
    raise RuntimeError("the simulator is gone")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(60)


@pytest.fixture(autouse=True)
def count_from_0() -> None:
    Counter.made = 0


def test_the_row_is_that_of_an_episode_that_a_limit_cut() -> None:
    environments = make_environments(lambda: Counter(raises), 1, vectorization="sync", restarts=1)
    said = r"^environment 0 of 1 was made anew, and its episode is cut: it raised RuntimeError in step: the sim"
    with pytest.warns(Note, match=said):
        rollout = Sampler(environments, 12, seed=0)(Coin())
    start = int(rollout.obs[0, 3, 0])
    assert start > 0, "another copy"
    # Step 3 fails: observation 2 is where the first episode was cut, and no decision.
    assert (rollout.obs[0, :3, 0]).tolist() == [0, 1, 2]
    assert (rollout.obs[0, 3:, 0] - start).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert rollout.mask[0].tolist() == [True, True, False, *[True] * 6, False, True, True]
    assert rollout.ended[0].tolist() == [False, True, True, *[False] * 5, True, True, False, False]
    assert not rollout.terminated[0, :3].any()
    assert rollout.reward[0].tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    assert rollout.metrics["restarts"] == 1
    assert rollout.metrics["steps"] == 10
    assert (rollout.metrics["episodes"], rollout.metrics["return"]) == (1, 6), "the episode that was cut is none"
    value = torch.cat([rollout.obs[..., 0], rollout.final_obs], 1)
    advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, 0.5, 0.9)
    assert advantage[0, 1] == 1 + 0.5 * 2 - 1, "it bootstraps from where it was cut"
    close(environments)


def test_a_failure_in_the_first_step_of_a_row_cuts_the_row_before(recwarn: Any) -> None:
    environments = make_environments(lambda: Counter(raises), 1, vectorization="sync", restarts=1)
    sampler = Sampler(environments, 2, seed=0)
    first, second = sampler(Coin()), sampler(Coin())
    assert first.final_obs.item() == 2
    assert first.mask.all()
    assert (second.obs[0, :, 0] % 100).tolist() == [2, 0]
    assert second.mask[0].tolist() == [False, True]
    assert second.ended[0].tolist() == [True, False]


def test_a_part_of_an_episode_has_no_return(recwarn: Any) -> None:
    """A row of a whole episode whose environment failed counts nowhere, and is a group of its own."""
    failing = iter([None, raises, None, None, None, None, None])  # the first copy is an example
    environments = make_environments(lambda: Counter(next(failing), 9), 4, vectorization="sync", restarts=1)
    sampler = Sampler(environments, 10, seed=0, whole_episodes=True)
    rollout, again = sampler(Coin()), sampler(Coin())
    (out,) = (~rollout.mask.any(1)).nonzero().flatten().tolist()
    assert rollout.mask.sum(1).tolist() == [0 if i == out else 6 for i in range(4)]
    assert rollout.group.tolist() == [4 + i if i == out else i for i in range(4)]
    assert rollout.reward.sum(1).tolist() == [0 if i == out else 6 for i in range(4)]
    assert again.mask.sum(1).tolist() == [6, 6, 6, 6]
    assert again.group.tolist() == [0, 1, 2, 3]


def test_a_group_with_such_a_row_is_in_no_statistic(recwarn: Any) -> None:
    class Seeded(Counter):
        """Its reward is of its seed, and so are the returns of a group equal."""

        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, reward + self.reset_seed % 5, *rest

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.reset_seed = seed or 0
            obs, info = super().reset(seed=seed, options=options)
            return obs % 100, info  # rows of a group begin in the same state

    failing = iter([None, raises, *[None] * 9])  # the first copy is an example
    environments = make_environments(lambda: Seeded(next(failing), 99), 4, vectorization="sync", restarts=1)
    rollout = Sampler(environments, 10, seed=0, whole_episodes=True, groups=2)(Coin())
    (out,) = (~rollout.mask.any(1)).nonzero().flatten().tolist()
    assert rollout.group.tolist() == [4 + i if i == out else i // 2 for i in range(4)]
    assert (rollout.metrics["group_std"], rollout.metrics["flat_groups"]) == (0, 1)


def test_a_run_with_one_is_resumed_bit_for_bit(recwarn: Any, tmp_path: Path) -> None:
    """The episode of the new environment is what the checkpoint has, and what is played again."""

    class Once(Counter):
        failed = False

        def fail_once() -> None:  # type: ignore[misc]
            if not Once.failed:
                Once.failed = True
                raises()

        def __init__(self) -> None:
            super().__init__(Once.fail_once, 99)

        def obs(self) -> np.ndarray:
            return np.array([self.np_random.normal() + self.steps])

    values: dict[str, Any] = {
        "num_envs": 2, "num_steps": 4, "minibatch_size": 8, "iterations": 5, "checkpoint_every": 1, "hidden": (8,),
        "restart_envs": 1, "preset": "none", "progress": False,
    }  # fmt: skip
    whole = pg.train("ppo", Once, out=tmp_path / "whole", **values)
    Once.failed = False
    pg.train("ppo", Once, out=tmp_path / "broken", **(values | {"iterations": 3}))
    resumed = pg.resume(tmp_path / "broken", iterations=2, environment=Once, progress=False)
    assert whole.metrics[-1]["restarts"] == resumed.metrics[-1]["restarts"] == 1
    assert all(map(torch.equal, resumed.policy.parameters(), whole.policy.parameters()))


def test_so_many_times_and_no_more(recwarn: Any) -> None:
    environments = make_environments(lambda: Counter(raises, 99), 1, vectorization="sync", restarts=2)
    sampler = Sampler(environments, 3, seed=0)
    for _ in range(2):
        sampler(Coin())
    with pytest.raises(UserError, match="the environment raised RuntimeError in step: the simulator is gone"):
        sampler(Coin())
    environments = make_environments(lambda: Counter(raises, 99), 1, vectorization="sync")
    with pytest.raises(UserError, match="raised RuntimeError in step"):
        Sampler(environments, 3, seed=0)(Coin())


def test_the_new_one_has_another_seed_and_what_its_wrappers_had_learned(recwarn: Any) -> None:
    made: list[Counter] = []

    def make() -> gymnasium.Env:
        made.append(Counter(raises, 99))
        return gymnasium.wrappers.NormalizeObservation(made[-1])

    environments = make_environments(make, 1, vectorization="sync", restarts=1)
    Sampler(environments, 3, seed=0)(Coin())
    first, second = (x for x in made if x.seeds)
    assert second.seeds == [another_seed(first.seeds[0], 1)] != first.seeds
    (statistics,) = environments.get_attr("obs_rms")
    assert statistics.count == pytest.approx(4, abs=1e-3), "a reset and two steps of the old one, a reset of the new"


def test_what_an_environment_returns_wrongly_is_no_failure(recwarn: Any) -> None:
    class Wrong(Counter):
        def step(self, action: Any) -> Any:
            return np.zeros(3), 1.0, False, False, {}

    environments = make_environments(Wrong, 1, vectorization="sync", restarts=5)
    with pytest.raises(UserError, match="observation of shape"):
        Sampler(environments, 3, seed=0)(Coin())


def test_a_reset_that_fails_is_tried_again_and_cuts_nothing(recwarn: Any) -> None:
    class Stuck(Counter):
        stuck = True

        def reset(self, **options: Any) -> Any:
            if Stuck.stuck:
                Stuck.stuck = False
                raises()
            return super().reset(**options)

    environments = make_environments(Stuck, 1, vectorization="sync", restarts=1)
    rollout = Sampler(environments, 3, seed=0)(Coin())
    assert (rollout.obs[0, :, 0] % 100).tolist() == [0, 1, 2]
    assert rollout.mask.all()
    assert "restarts" not in rollout.metrics


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (dies, "the process of environment 1 of 2 was ended by SIGKILL (out of memory?) in step"),
        (hangs, "environment 1 of 2 did not finish step within 1 s"),
        (raises, "it raised RuntimeError in step: the simulator is gone"),
    ],
)
def test_a_process_that_is_lost_is_started_anew_and_the_others_go_on(
    fail: Callable[[], None], said: str, tmp_path: Path
) -> None:
    def maker(name: str, *arguments: Any) -> Callable[[], gymnasium.Env]:
        def make() -> gymnasium.Env:
            return Counter(*arguments, marker=tmp_path / name)

        return lambda: _prepared(make(), "counter", make, 1)

    Counter(marker=tmp_path / "second")  # number 0
    makers = [maker("first"), maker("second", fail, 2)]
    environments = Processes(makers, 1.0 if fail is hangs else 20.0, workers=2, restarts=1)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        rollout = Sampler(environments, 6, seed=0)(Coin())
    (note,) = (str(x.message) for x in notes if "made anew" in str(x.message))
    assert said[:70] in note
    assert len(note) <= 200
    assert rollout.mask.tolist() == [[True] * 6, [True, True, False, True, True, True]]
    assert rollout.obs[1, :, 0].tolist() == [100, 101, 102, 200, 201, 202]
    assert (rollout.obs[0, :, 0] % 100).tolist() == [0, 1, 2, 3, 4, 5]
    assert rollout.ended.tolist() == [[False] * 5 + [True], [False, True, True, False, False, False]]
    close(environments)


def test_the_process_that_hangs_is_named_and_not_the_first() -> None:
    makers = [lambda: _prepared(Counter(), "counter"), lambda: _prepared(Counter(hangs, 99), "counter")]
    with pytest.raises(UserError, match="environment 1 of 2 did not finish step"):
        Sampler(Processes(makers, 1.0, workers=2), 6, seed=0)(Coin())


def test_training_counts_them(recwarn: Any) -> None:
    values: dict[str, Any] = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "iterations": 2, "progress": False}
    run = pg.train("ppo", lambda: Counter(raises, 2), restart_envs=2, preset="none", **values)
    assert run.metrics[-1]["restarts"] >= 1
    Counter.made = 0
    with pytest.raises(UserError, match="raised RuntimeError in step"):
        pg.train("ppo", lambda: Counter(raises, 2), preset="none", **values)


@pytest.mark.parametrize("task", ["an object", "CartPole-v1"])
def test_what_cannot_be_made_one_by_one_is_refused(task: str) -> None:
    values: dict[str, Any] = {"vectorization": "envpool"} if task == "CartPole-v1" else {"num_envs": 1}
    with pytest.raises(UserError, match="restart_envs makes environments anew one by one"):
        pg.Training("ppo", Counter() if task == "an object" else task, restart_envs=1, preset="none", **values)
