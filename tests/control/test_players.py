"""Games of several players: rows that are agents, whose decisions are those of living agents and no others."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import policygrad as pg
from policygrad.advantages import gae
from policygrad.control import Critic, Policy, Sampler, evaluate, make_environments
from policygrad.control.players import Agents, agents_of
from policygrad.errors import Note, UserError

# The steps [first, last] in which each agent acts, and whether it is terminated after the last.
LIVES = {"a": (0, 4, False), "b": (0, 1, True), "c": (2, 3, False)}


class Lives:
    """A parallel game by a script: its observation is (agent, step), its reward 10 agent + step + 1.

    It fails if any but the living agents act.
    """

    possible_agents: Any = tuple(LIVES)

    def __init__(self, lives: dict[str, tuple[int, int, bool]] = LIVES, info: bool = False) -> None:
        self.lives, self.info, self.seeds = lives, info, []

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-1, 99, (2,), np.float32)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(2)

    def reset(self, seed: Any = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.seeds.append(seed)
        self.t = 0
        self.agents = [x for x, (first, _, _) in self.lives.items() if first == 0]
        return {x: self.seen(x) for x in self.agents}, {}

    def seen(self, agent: str) -> np.ndarray:
        return np.array([self.possible_agents.index(agent), self.t], np.float32)

    def step(self, actions: dict[str, Any]) -> tuple[Any, ...]:
        assert list(actions) == self.agents, (actions, self.agents)
        before = self.agents
        reward = {x: 10.0 * self.possible_agents.index(x) + self.t + 1 for x in before}
        over = {x: self.lives[x][1] == self.t for x in before}
        terminated = {x: over[x] and self.lives[x][2] for x in before}
        truncated = {x: over[x] and not self.lives[x][2] for x in before}
        self.t += 1
        self.agents = [x for x, (first, last, _) in self.lives.items() if first <= self.t <= last]
        obs = {x: self.seen(x) for x in {*before, *self.agents}}
        return obs, reward, terminated, truncated, {x: {"age": self.t} for x in before}

    def close(self) -> None:
        pass


def sampled(make: Any = Lives, games: int = 2, steps: int = 14, **how: Any) -> tuple[Sampler, Any]:
    environments = make_environments(make, games)
    sample = Sampler(environments, steps, seed=0, **how)
    policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))
    return sample, sample(policy)


def test_a_row_has_the_decisions_of_its_agent_alone() -> None:
    """A game takes 5 steps and one to begin anew. Written out for 14 steps: two games and two steps of the third."""
    _, rollout = sampled()
    assert rollout.mask.shape == (6, 14)
    for row in range(6):
        first, last, terminates = list(LIVES.values())[row % 3]
        for t in range(14):
            now, said = t % 6, f"row {row}, step {t}"
            acts = first <= now <= last
            assert bool(rollout.mask[row, t]) == acts, said
            assert float(rollout.reward[row, t]) == (10 * (row % 3) + now + 1 if acts else 0), said
            assert bool(rollout.terminated[row, t]) == (acts and terminates and now == last), said
            assert bool(rollout.ended[row, t]) == (not acts or now == last), said
            if acts or (now == last + 1):  # where it stopped: a value may come from there
                assert rollout.obs[row, t].tolist() == [row % 3, now], said


def test_credit_is_that_of_the_lives_one_by_one() -> None:
    """GAE over a row with its holes is GAE over each life alone, with the value of where it was cut."""
    _, rollout = sampled()
    torch.manual_seed(0)
    critic = Critic(spaces.Box(-1, 99, (2,), np.float32), hidden=(4,))
    credit = pg.credit.bootstrapped(critic, lambda *x: gae(*x, 0.9, 0.8))(rollout)
    for row in range(6):
        first, last, terminates = list(LIVES.values())[row % 3]
        for start in (0, 6):
            t = torch.arange(first, last + 2)
            value = critic(torch.stack([torch.full_like(t, row % 3), t], 1).float()[None]).detach()
            ended = torch.tensor([[False] * (last - first) + [True]])
            alone = gae(10.0 * (row % 3) + t[None, :-1] + 1, value, ended & terminates, ended, 0.9, 0.8)
            here = credit.advantage[row, start + first : start + last + 1]
            assert torch.allclose(here, alone[0], atol=1e-5), (row, start)


def test_statistics_are_those_of_agents() -> None:
    sample, rollout = sampled(steps=6)
    stepping = sample.stepping
    assert sorted(stepping.finished) == [(15.0, 5)] * 2 + [(23.0, 2)] * 2 + [(47.0, 2)] * 2
    assert rollout.metrics["steps"] == 2 * (5 + 2 + 2)
    assert rollout.metrics["episodes"] == 6
    assert rollout.metrics["info/age"] == pytest.approx((5 + 2 + 4) / 3)


def test_whole_episodes_wait_for_the_last_agent() -> None:
    lives = {"a": (0, 4, False), "b": (0, 1, True), "c": (0, 0, True)}
    _, rollout = sampled(lambda: Lives(lives), whole_episodes=True, groups="all")
    assert rollout.mask.sum(1).tolist() == [5, 2, 1] * 2
    assert rollout.reward.sum(1).tolist() == [15, 23, 21] * 2


def test_an_agent_that_comes_later_needs_rows_of_fixed_length() -> None:
    with pytest.raises(UserError, match="not there when its game begins"):
        sampled(whole_episodes=True)


def test_the_seed_decides_every_game() -> None:
    def seeds(seed: int) -> list[list[int]]:
        environments: Any = make_environments(Lives, 2)
        sample = Sampler(environments, 14, seed=seed)
        sample(Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,)))
        return [x.environment.seeds for x in environments.games]

    first, other = seeds(0), seeds(1)
    assert seeds(0) == first
    assert len({x for one in (*first, *other) for x in one}) == 12  # three games in each, none twice


def test_an_evaluation_plays_whole_games() -> None:
    lives = {"a": (0, 4, False), "b": (0, 1, True), "c": (0, 0, True)}
    policy = Policy(spaces.Box(-1, 99, (2,), np.float32), spaces.Discrete(2), hidden=(4,))
    found = evaluate(policy, lambda: Lives(lives), 18, max_steps=20)
    assert found.episodes == 18 * 3
    assert sorted({*found.returns}) == [15, 21, 23]
    assert found.return_mean == pytest.approx((15 + 21 + 23) / 3)


class Walk(Lives):
    """Agents on a line, blown by chance, each until it is 3 away from 0: its seed and the actions decide."""

    def __init__(
        self, agents: int = 3, mask: str = "", structured: bool = False, render_mode: str | None = None
    ) -> None:
        self.possible_agents = [f"walker_{i}" for i in range(agents)]
        self.mask, self.structured = mask, structured

    def observation_space(self, agent: str) -> spaces.Space:
        own = spaces.Box(-9, 9, (1,), np.float32)
        return spaces.Dict({"observation": own, "action_mask": spaces.MultiBinary(3)}) if self.mask == "key" else own

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Dict({"way": spaces.Discrete(3)}) if self.structured else spaces.Discrete(3)

    def reset(self, seed: Any = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.random, self.agents = np.random.default_rng(seed), list(self.possible_agents)
        self.place = dict.fromkeys(self.agents, 0)
        return self.views(self.agents), self.infos(self.agents)

    def allowed(self, agent: str) -> np.ndarray:
        return np.array([self.place[agent] != -1, 1, self.place[agent] != 1], np.int8)

    def views(self, agents: Any) -> dict[str, Any]:
        found = {x: np.array([self.place[x]], np.float32) for x in agents}
        if self.mask == "key":
            return {x: {"observation": y, "action_mask": self.allowed(x)} for x, y in found.items()}
        return found

    def infos(self, agents: Any) -> dict[str, Any]:
        return {x: {"action_mask": self.allowed(x)} for x in agents} if self.mask == "info" else {}

    def step(self, actions: dict[str, Any]) -> tuple[Any, ...]:
        acted = list(actions)
        for x, action in actions.items():
            way = action["way"] if self.structured else action
            assert not self.mask or self.allowed(x)[way], (x, way)
            self.place[x] += int(way) - 1 + int(self.random.integers(-1, 2))
        over = {x: abs(self.place[x]) >= 3 for x in acted}
        self.agents = [x for x in acted if not over[x]]
        reward = {x: float(self.place[x]) for x in acted}
        return self.views(acted), reward, over, dict.fromkeys(acted, False), self.infos(self.agents)


@pytest.mark.parametrize("mask", ["key", "info"])
def test_masks_of_living_agents_are_kept(mask: str) -> None:
    environments = make_environments(lambda: Walk(mask=mask), 2, action_mask="info" if mask == "info" else "auto")
    sample = Sampler(environments, 100, seed=0)
    rollout = sample(Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,)))
    assert sample.stepping.episodes > 6
    assert (~rollout.mask).sum() > 20


def test_structured_actions_reach_each_agent() -> None:
    run = pg.train("ppo", lambda: Walk(structured=True), steps=300, num_envs=2, num_steps=32, progress=False)
    assert run.metrics[-1]["episodes"] > 6


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_a_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    """In the middle of games, some of whose agents have ended."""
    how: Any = {"num_envs": 2, "num_steps": 35, "iterations": 9, "normalize_observations": True}
    whole = pg.Training(method, Walk, **how)
    rows = list(whole)
    first, done = pg.Training(method, Walk, **how), 1
    next(first)
    while not first.world.sample.stepping.resetting.any():
        next(first)
        done += 1
    state = first.state_dict()
    assert done < 9
    second = pg.Training(method, Walk, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        second.load_state_dict(state)
    rest = list(second)
    timed = ("seconds", "steps_per_second")
    for a, b in zip(rows[done:], rest, strict=True):
        assert {k: x for k, x in a.items() if k not in timed} == {k: x for k, x in b.items() if k not in timed}
    for a, b in zip(whole.run.policy.parameters(), second.run.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_games_that_no_seed_decides_begin_anew() -> None:
    class Chance(Walk):
        def reset(self, seed: Any = None, options: Any = None) -> Any:
            return super().reset(seed=None)

    first = pg.Training("ppo", Chance, num_envs=2, num_steps=32, iterations=4)
    next(first)
    state = first.state_dict()
    with pytest.warns(Note, match="did not repeat its episode: new episodes begin"):
        pg.Training("ppo", Chance, num_envs=2, num_steps=32, iterations=4).load_state_dict(state)


def changed(**attributes: Any) -> Any:
    return lambda: type("Changed", (Lives,), attributes)()


def without_rewards(self: Any, actions: Any) -> Any:
    obs, _, *rest = Lives.step(self, actions)
    return obs, {}, *rest


def never_gone(self: Any, actions: Any) -> Any:
    found = Lives.step(self, actions)
    self.agents = list(actions)
    return found


def gone(self: Any, actions: Any) -> Any:
    found = Lives.step(self, actions)
    self.agents = []
    return found


def unknown(self: Any, actions: Any) -> Any:
    found = Lives.step(self, actions)
    self.agents = [*self.agents, "z"]
    return found


def no_agents(self: Any, seed: Any = None) -> Any:
    self.agents = []
    return {}, {}


def other_space(self: Any, agent: str) -> spaces.Space:
    return spaces.Box(-np.inf, np.inf, (2 + (agent == "b"),), np.float32)


def other_actions(self: Any, agent: str) -> spaces.Space:
    return spaces.Discrete(2 + (agent == "b"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (changed(step=without_rewards), "no reward for agent a"),
        (changed(step=never_gone), "agent b has ended and is still"),
        (changed(step=gone), "agent a has not ended and is no longer"),
        (changed(step=unknown), "agent 'z' is not in the environment's possible_agents"),
        (changed(reset=no_agents), "no agent is in the environment's agents after reset"),
        (changed(possible_agents=[]), "possible_agents names no agent"),
        (changed(observation_space=other_space), "observation spaces differ.*pad_observations_v0"),
        (changed(action_space=other_actions), "action spaces differ.*pad_action_space_v0"),
        (changed(seen=lambda self, agent: np.zeros(3, np.float32)), "for agent a.*shape"),
    ],
)
def test_games_that_break_the_rules_are_one_line(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        sampled(make)
    assert len(str(error.value)) <= 200


def test_an_agent_that_never_acts_is_said_once() -> None:
    lives = LIVES | {"c": (9, 9, True)}
    with pytest.warns(Note, match="c of the environment's possible_agents did not act in the first game") as found:
        sampled(lambda: Lives(lives))
    assert len([x for x in found if issubclass(x.category, Note)]) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"wrap": ("TimeLimit:20",)}, "wrap is for Gymnasium's environments"),
        ({"restarts": 1}, "restart_envs is for Gymnasium's environments"),
        ({"vectorization": "async"}, "leave async out"),
    ],
)
def test_what_is_for_single_environments_is_refused(how: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make_environments(Lives, 2, **how)
    assert len(str(error.value)) <= 200


def test_other_refusals() -> None:
    with pytest.raises(UserError, match="already made: hand in the function"):
        make_environments(Lives())
    one = Lives()
    with pytest.raises(UserError, match="returned the same object more than once"):
        make_environments(lambda: one, 2)
    with pytest.raises(UserError, match="group_size starts copies of one environment alike"):
        pg.train("grpo", Walk, num_envs=4, group_size=2, steps=10, episode_steps=20, progress=False)
    run = pg.train("ppo", Walk, steps=10, num_envs=2, num_steps=32, progress=False)
    with pytest.raises(UserError, match="game of several agents, which cannot be filmed"):
        pg.watch(run, "film.gif")


def test_methods_of_whole_episodes_compare_agents() -> None:
    run = pg.train("grpo", Walk, num_envs=2, iterations=2, episode_steps=20, progress=False)
    assert run.metrics[-1]["episodes"] == 12


def test_ids_of_an_absent_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policygrad.control.players.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install its package, with pip install mpe2"):
        make_environments("mpe2/simple_spread-v3")


# PettingZoo itself


def test_a_parallel_environment_of_pettingzoo() -> None:
    pytest.importorskip("mpe2")
    environments = make_environments("mpe2/simple_spread-v3", 2, env_options={"N": 2})
    assert isinstance(environments.unwrapped, Agents)
    assert (environments.num_envs, agents_of(environments)) == (4, 2)
    run = pg.train("ppo", "mpe2/simple_spread-v3", num_envs=2, iterations=2, progress=False)
    assert run.evaluate(2).episodes == 6
    assert run.evaluate(2).lengths == [25] * 6


def test_names_of_pettingzoo() -> None:
    pytest.importorskip("mpe2")
    environments = make_environments("mpe2.simple_spread_v3:parallel_env", 1)
    assert agents_of(environments) == 3
    with pytest.raises(UserError, match="did you mean mpe2/simple_spread-v3"):
        make_environments("mpe2/simple_sped-v3")
    with pytest.raises(UserError, match="observation spaces differ"):
        make_environments("mpe2/simple_tag-v3")


def test_a_run_on_pettingzoo_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("mpe2")
    how: Any = {"num_envs": 2, "num_steps": 40, "progress": False, "checkpoint_every": 1}
    whole = pg.train("ppo", "mpe2/simple_spread-v3", iterations=4, out=tmp_path / "whole", **how)
    pg.train("ppo", "mpe2/simple_spread-v3", iterations=2, out=tmp_path / "run", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        rest = pg.resume(tmp_path / "run", iterations=2, progress=False)
    for a, b in zip(whole.policy.parameters(), rest.policy.parameters(), strict=True):
        assert torch.equal(a, b)
