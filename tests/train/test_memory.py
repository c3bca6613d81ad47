"""Training with memory: every method, every memory, every head, what needs it is learned, and what does not fit."""

import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from outcomes import WHOLE, parameters
from torch import nn

import policygrad as pg
from policygrad import compiling
from policygrad.control.memory import GRU
from policygrad.errors import Note, UserError
from policygrad.rollout import state_size
from policygrad.samplers import RandomNetworkDistillation
from policygrad.train import compose
from policygrad.train.options import EPISODIC, options_of

TWO = spaces.Discrete(2)
RATE = {"gru": 3e-3, "lstm": 3e-3, "transformer": 1e-3}  # at which each is learned in a few thousand steps


class Sign(gymnasium.Env):
    """The first observation is -1 or 1, two more are 0, and the last action is to be of that sign."""

    def __init__(self, actions: str = "discrete") -> None:
        self.actions = actions
        self.observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space: Any = {
            "discrete": TWO,
            "box": spaces.Box(-1, 1, (1,), np.float32),
            "multi": spaces.MultiDiscrete([2, 2]),
            "tuple": spaces.Tuple([TWO, spaces.Box(-1, 1, (1,), np.float32)]),
        }[actions]

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.sign, self.t = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self.sign - 1, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        first = action[0] if self.actions in ("multi", "tuple") else action
        chosen = float(np.ravel(first)[0]) > (0 if self.actions == "box" else 0.5)
        last = self.t == 3
        return np.array([0, self.t], np.float32), float(last and chosen == bool(self.sign)), last, False, {}


@pytest.mark.parametrize("method", WHOLE)
def test_every_method_trains_with_memory(method: str, tmp_path: Any) -> None:
    values: dict[str, Any] = {"num_envs": 4, "memory": "gru", "memory_size": 4, "hidden": (), "progress": False}
    options = options_of(method, "control")()
    values |= {"episode_steps": 4} if options.credit in EPISODIC else {"num_steps": 8}
    values |= {"minibatch_size": 16} if getattr(options, "minibatch_size", None) else {}
    run = pg.train(method, Sign, steps=60, out=tmp_path / "run", **values)
    again = pg.Run.load(tmp_path / "run", trust=True)
    assert isinstance(again.policy.memory, GRU)
    for one, other in zip(run.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert run.evaluate(4, environment=Sign).returns == again.evaluate(4, environment=Sign).returns


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize(
    ("method", "values"),
    [("trpo", {"num_steps": 8}), ("reinforce", {"episode_steps": 4, "baseline": "optimal"})],
    ids=["trpo", "optimal baseline"],
)
def test_second_derivatives_and_mapped_gradients_go_through_every_memory(
    method: str, values: dict[str, Any], kind: str
) -> None:
    values = {"num_envs": 4, "memory": kind, "memory_size": 4, "hidden": (), "progress": False, **values}
    run = pg.train(method, Sign, steps=60, **values)
    assert all(row["gradient_norm"] > 0 for row in run.metrics)
    if method == "trpo":
        assert any(row["accepted"] for row in run.metrics)
        assert all(row["kl_old"] <= 0.01 for row in run.metrics)


@pytest.mark.parametrize("actions", ["discrete", "box", "multi", "tuple"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_what_needs_memory_is_learned(kind: str, actions: str) -> None:
    """Without memory the mean return is one half."""
    values: dict[str, Any] = {"num_envs": 16, "num_steps": 16, "minibatch_size": 128, "learning_rate": RATE[kind]}
    values |= {"epochs": 4, "memory": kind, "memory_size": 16, "hidden": (), "sequence_length": 8, "seed": 1}
    run = pg.train("ppo", partial(Sign, actions), steps=8_000, progress=False, **values)
    assert run.evaluate(50).return_mean > 0.9


class Image(Sign):
    """The sign is a bright row in the first image of 3 x 3, above or below; the other images are dark."""

    def __init__(self, actions: str = "discrete") -> None:
        super().__init__(actions)
        self.observation_space = spaces.Box(0, 255, (1, 3, 3), np.uint8)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**options)
        image = np.zeros((1, 3, 3), np.uint8)
        image[0, 2 * self.sign] = 255
        return image, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return np.zeros((1, 3, 3), np.uint8), *rest  # type: ignore[return-value]


class Forbidden(Sign):
    """A third action would have reward 2 at any time, and is forbidden at all times."""

    def __init__(self, actions: str = "discrete") -> None:
        super().__init__(actions)
        self.action_space = spaces.Discrete(3)
        parts = {"observation": self.observation_space, "action_mask": spaces.Box(0, 1, (3,), np.int8)}
        self.observation_space = spaces.Dict(parts)

    def masked(self, obs: Any) -> dict[str, Any]:
        return {"observation": obs, "action_mask": np.array([1, 1, 0], np.int8)}

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(**options)
        return self.masked(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action < 2
        obs, *rest = super().step(action)
        return self.masked(obs), *rest  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("task", [Image, Forbidden])
def test_images_and_masks_go_with_memory(task: type[Sign], kind: str) -> None:
    values: dict[str, Any] = {"num_envs": 16, "num_steps": 16, "minibatch_size": 128, "learning_rate": RATE[kind]}
    values |= {"epochs": 4, "memory": kind, "memory_size": 16, "hidden": (), "sequence_length": 8, "seed": 1}
    run = pg.train("ppo", task, steps=8_000, progress=False, **values)
    assert run.evaluate(50).return_mean > 0.9


@pytest.mark.parametrize("critic_memory", ["own", "shared", "none"])
def test_each_critic_learns(critic_memory: str) -> None:
    values: dict[str, Any] = {"num_envs": 16, "num_steps": 16, "minibatch_size": 128, "learning_rate": 3e-3}
    values |= {"memory": "gru", "memory_size": 16, "hidden": (), "critic_memory": critic_memory}
    run = pg.train("ppo", Sign, steps=6_000, epochs=4, progress=False, **values)
    assert run.evaluate(50).return_mean > 0.9
    own = {"own": True, "shared": False, "none": False}[critic_memory]
    assert bool(state_size(run.critic)) == own


def test_a_memoryless_policy_does_not_learn_it() -> None:
    values: dict[str, Any] = {"num_envs": 16, "num_steps": 16, "minibatch_size": 128, "learning_rate": 3e-3}
    run = pg.train("ppo", Sign, steps=6_000, epochs=4, progress=False, hidden=(), **values)
    assert run.evaluate(50).return_mean < 0.8


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_a_compiled_step_is_the_plain_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # the graph, without the minutes in which code is made
    values: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "sequence_length": 4, "minibatch_size": 16, "seed": 2}
    values |= {"memory": kind, "memory_size": 4, "hidden": (4,), "steps": 96, "epochs": 2, "progress": False}
    with warnings.catch_warnings(action="error", category=Note):  # a Note says that there is no graph
        plain, compiled = (pg.train("ppo", Sign, compile=how, **values) for how in ("off", "on"))
    for p, q in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


# Sampled beside


class Behind:
    """What Overlapped does, one after the other: a rollout of policy and critic of `lag` calls before."""

    def __init__(self, sample: Any, lag: int) -> None:
        self.sample, self.lag, self.versions = sample, lag, list[Any]()

    def __call__(self, policy: Any) -> Any:
        self.versions.append(deepcopy([policy] if self.sample.critic is None else [policy, self.sample.critic]))
        policy, *critic = self.versions[max(0, len(self.versions) - 1 - self.lag)]
        self.sample.critic = critic[0] if critic else None  # bound to the sampler while it samples
        try:
            return self.sample(policy)
        finally:
            self.sample.critic = self.versions[-1][1] if critic else None


@pytest.mark.parametrize(
    ("kind", "critic_memory"),
    [("gru", "own"), ("gru", "shared"), ("gru", "none"), ("lstm", "own"), ("transformer", "own")],
)
def test_overlap_is_sampling_from_the_policy_and_critic_of_one_update_before(
    kind: str, critic_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "sequence_length": 4, "minibatch_size": 16, "epochs": 2}
    values |= {"memory": kind, "memory_size": 4, "hidden": (4,), "iterations": 5, "learning_rate": 0.01}
    values |= {"critic_memory": critic_memory, "progress": False}
    plain, found, again = (pg.train("ppo", Sign, **values, overlap=x) for x in (False, True, True))
    monkeypatch.setattr(compose, "Overlapped", Behind)
    behind = pg.train("ppo", Sign, **values, overlap=True)
    assert [row["policy_lag"] for row in found.metrics] == [0, 1, 1, 1, 1]
    assert torch.equal(parameters(found), parameters(behind))
    assert torch.equal(parameters(found), parameters(again))
    assert not torch.equal(parameters(found), parameters(plain))


# What does not fit


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ppo", {"memory": "rnn"}, "memory is 'rnn': it must be one of none, gru, lstm, transformer"),
    ("ppo", {"memory_size": 8}, "memory_size is read only where memory is gru or lstm or transformer"),
    ("ppo", {"memory": "gru", "memory_window": 8}, "memory_window is read only where memory is transformer"),
    ("ppo", {"memory": "transformer", "memory_window": 1}, "memory_window is 1: it must be at least 2"),
    ("ppo", {"sequence_length": 8}, "sequence_length cuts rows of a policy with memory, and this one has none"),
    ("ppo", {"memory": "gru", "sequence_length": 24}, "sequence_length is 24, which does not divide num_steps, 32"),
    ("trpo", {"memory": "gru", "critic_memory": "shared"}, "critic_memory is shared, and trpo fits its critic alone"),
    ("grpo", {"memory": "gru", "critic_memory": "none"}, "critic_memory is a critic's, and credit group has none"),
    ("ppo", {"memory": "gru", "kl_ref": "reward"}, "kl_ref is to a policy with a memory of its own"),
    (
        "ppo",
        {"memory": "gru", "policy": lambda obs, actions: nn.Linear(4, 2)},
        "memory is of the policy made here, and one is handed in",
    ),
]


@pytest.mark.parametrize(("method", "values", "said"), REFUSED, ids=[f"{m}-{i}" for i, (m, *_) in enumerate(REFUSED)])
def test_what_does_not_fit_is_one_clear_line(method: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="^" + said.replace("(", r"\(")) as raised:
        pg.train(method, "CartPole-v1", progress=False, **values)
    assert len(str(raised.value)) <= 200


def test_a_critic_remembers_only_beside_a_policy_that_does() -> None:
    said = "the critic has memory, and rows of a policy without one keep none"
    with pytest.raises(UserError, match=said):
        pg.train("ppo", Sign, critic=lambda space: pg.Critic(space, memory="gru"), steps=64, progress=False)
    environments = pg.make_environments(Sign, 2)
    spaces_ = environments.single_observation_space, environments.single_action_space
    critic = pg.Critic(spaces_[0], memory="gru")
    with pytest.raises(UserError, match=said):
        pg.assemble("ppo", pg.Policy(*spaces_), pg.Sampler(environments, 8), critic=critic)
    policy = pg.Policy(*spaces_, memory="lstm")
    with pytest.raises(
        UserError, match="the sampler's rows do not have this critic's memory: make it with critic=critic"
    ):
        next(iter(pg.assemble("ppo", policy, pg.Sampler(environments, 8), critic=critic)))
    learner = pg.assemble("ppo", policy, pg.Sampler(environments, 8, critic=critic), critic=critic, minibatch_size=8)
    assert np.isfinite(float(next(iter(learner))["value_loss"]))


def test_a_penalty_to_a_policy_with_memory_needs_whole_episodes_in_python_too() -> None:
    environments = pg.make_environments(Sign, 2)
    policy = pg.Policy(environments.single_observation_space, environments.single_action_space, memory="gru")
    with pytest.raises(UserError, match="kl_ref is to a policy with a memory of its own"):
        pg.assemble(
            "ppo", policy, pg.Sampler(environments, 8), critic=pg.Critic(policy.observation_space), kl_ref="reward"
        )


def test_what_is_new_is_paid_for_beside_a_memory() -> None:
    environments = pg.make_environments(Sign, 2)
    policy = pg.Policy(environments.single_observation_space, environments.single_action_space, memory="gru")
    target, predictor = nn.Linear(2, 4), nn.Linear(2, 4)
    optimizer = torch.optim.SGD(predictor.parameters(), 0.1)
    rollout = RandomNetworkDistillation(pg.Sampler(environments, 8), target, predictor, optimizer)(policy)
    assert rollout.metrics["novelty"] > 0
    assert (rollout.reward[rollout.mask] > 0).all()
