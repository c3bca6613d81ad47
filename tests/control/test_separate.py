"""Agents with parameters of their own: what each computes and learns is what it would alone."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.optim import SGD
from torch.utils._pytree import tree_map

import policygrad as pg
from policygrad.control import Sampler, make_environments
from policygrad.control.memory import Rows
from policygrad.control.separate import SeparateCritics, SeparatePolicies
from policygrad.critics import both
from policygrad.errors import UserError
from policygrad.rollout import decisions
from policygrad.updates import ascend
from policygrad.weights import per_token

NAMES = ("left", "right")
HOW: dict[str, Any] = {"hidden": (8,)}


class Opposites:
    """Two agents who see the same number; 1 is right for one of them, and 0 for the other. Four steps long."""

    possible_agents: Any = NAMES

    def __init__(self, box: bool = False) -> None:
        self.box = box

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-1, 1, (1,), np.float32)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-1, 1, (2,), np.float32) if self.box else spaces.Discrete(2)

    def reset(self, seed: Any = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self.t = list(NAMES), 0
        self.numbers = np.random.default_rng(seed).uniform(-1, 1, 5).astype(np.float32)
        return self.seen(), {}

    def seen(self) -> dict[str, Any]:
        return {x: self.numbers[[self.t]] for x in NAMES}

    def step(self, actions: dict[str, Any]) -> tuple[Any, ...]:
        chosen = {x: float(np.mean(actions[x])) for x in NAMES}
        reward = {x: chosen[x] if x == "right" else 1 - chosen[x] for x in NAMES}
        self.t += 1
        over = dict.fromkeys(NAMES, self.t == 4)
        self.agents = [] if self.t == 4 else self.agents
        return self.seen(), reward, over, dict.fromkeys(NAMES, False), {x: {} for x in NAMES}

    def close(self) -> None:
        pass


def made(memory: str = "none", games: int = 3, **game: Any) -> tuple[SeparatePolicies, SeparateCritics, Any]:
    """Policies and critics, and a rollout of theirs; the agents are told apart by parameters alone."""
    environments = make_environments(partial(Opposites, **game), games, agents="separate")
    torch.manual_seed(0)
    space: Any = environments.single_observation_space
    policies = SeparatePolicies(space, environments.single_action_space, memory=memory, memory_size=4, **HOW)
    critics = SeparateCritics(space, memory=memory, memory_size=4, **HOW)
    sample = Sampler(environments, 9, seed=0, critic=critics if memory != "none" else None)
    return policies, critics, sample(policies)


def of_agent(x: Any, k: int) -> Any:
    return tree_map(lambda y: y[k :: len(NAMES)], x)


def gradients(module: nn.Module, value: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True))


def bits(x: Tensor) -> list[Any]:
    return x.detach().double().flatten().tolist()


@pytest.mark.parametrize("memory", ["none", "gru", "transformer"])
@pytest.mark.parametrize("box", [False, True])
def test_each_row_has_the_policy_of_its_agent(memory: str, box: bool) -> None:
    policies, critics, rollout = made(memory, box=box)
    others = deepcopy(policies)
    with torch.no_grad():
        for p in others.parameters():
            p.add_(0.1)
    found, value = policies(rollout.obs), critics(rollout.obs)
    assert isinstance(rollout.obs, Rows) == (memory != "none")
    assert torch.allclose(found.log_prob(rollout.action)[rollout.mask], rollout.logp[rollout.mask], atol=1e-6)
    kl, mode = kl_divergence(found, others(rollout.obs)), found.mode
    for k in range(len(NAMES)):
        alone = policies.policies[k](of_agent(rollout.obs, k))
        action = of_agent(rollout.action, k)
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)  # kernels for other numbers of rows
        close(of_agent(found.log_prob(rollout.action), k), alone.log_prob(action))
        close(of_agent(found.entropy(), k), alone.entropy())
        close(of_agent(mode, k), alone.mode)
        close(of_agent(kl, k), kl_divergence(alone, others.policies[k](of_agent(rollout.obs, k))))
        close(of_agent(value, k), critics.critics[k](of_agent(rollout.obs, k)))
    first, second = (bits(x) for x in (of_agent(value, 0), of_agent(value, 1)))
    assert first != second, "they see the same"
    assert policies.policies[0].encode.size == 1, "no policy sees its number"


def test_what_an_agents_policy_and_critic_share_is_computed_once() -> None:
    policies, _, rollout = made("gru")
    critics = SeparateCritics(policies.observation_space, of=policies, **HOW)
    wanted = [*policies.parameters(), *(p for x in critics.critics for p in x.network.parameters())]  # type: ignore

    def slopes(distribution: Any, value: Tensor) -> tuple[Tensor, ...]:
        total = distribution.log_prob(rollout.action)[rollout.mask].sum() + (value**2).sum()
        return torch.autograd.grad(total, wanted)

    expected = slopes(policies(rollout.obs), critics(rollout.obs))
    calls: list[int] = []
    for one in policies.policies:
        one.memory.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    found = slopes(*both(policies, critics, rollout.obs))
    assert len(calls) == len(NAMES)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    alone = both(policies.policies[0], critics, rollout.obs)
    assert torch.equal(alone[1], critics(rollout.obs))


def test_the_update_is_that_of_two_runs_bit_for_bit() -> None:
    """Of half the decisions each: the gradient is half as large, to the bit, and twice the rate makes up for it."""
    policies, critics, rollout = made()
    alone = [(deepcopy(policies.policies[k]), deepcopy(critics.critics[k])) for k in range(2)]

    def learn(policy: Any, critic: Any, rows: Any, rate: float) -> None:
        parameters = [*policy.parameters(), *critic.parameters()]
        update = ascend(SGD(parameters, rate))
        objective = pg.PPOObjective(policy, critic, clip=(0.01, 0.01), entropy_coefficient=0.1)
        for _ in range(4):
            credit = pg.credit.bootstrapped(critic, partial(pg.gae, gamma=0.9, lam=0.8))(rows)
            update(objective, decisions(rows, per_token(rows.mask), *credit))

    before = [bits(p) for p in policies.parameters()]
    learn(policies, critics, rollout, 1.0)
    for k, (policy, critic) in enumerate(alone):
        learn(policy, critic, rollout.rows(slice(k, None, 2)), 0.5)
        for own, p in zip(policies.policies[k].parameters(), policy.parameters(), strict=True):
            assert bits(own) == bits(p)
        for own, p in zip(critics.critics[k].parameters(), critic.parameters(), strict=True):
            assert bits(own) == bits(p)
    assert before != [bits(p) for p in policies.parameters()]


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_no_gradient_reaches_another_agent(memory: str) -> None:
    policies, _, rollout = made(memory)
    logp = policies(rollout.obs).log_prob(rollout.action)
    for k in range(2):
        own = gradients(policies.policies[k], of_agent(logp, k).sum())
        assert all(g is not None and g.any() for g in own[:-2])
        assert all(g is None or not g.any() for g in gradients(policies.policies[1 - k], of_agent(logp, k).sum()))


SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 20, "hidden": (8,), "progress": False, "minibatch_size": 40}


def test_what_agents_who_see_the_same_should_do_is_learned_only_apart() -> None:
    how: dict[str, Any] = SMALL | {"steps": 2_000, "learning_rate": 0.05, "epochs": 4, "gamma": 0.5}
    apart, together = (pg.train("ppo", Opposites, agents=x, **how).evaluate(4) for x in ("separate", "shared"))
    assert apart.return_mean == 4
    assert together.return_mean == 2


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_they_are_saved_found_again_and_resumed(tmp_path: Path, memory: str) -> None:
    how: dict[str, Any] = SMALL | {"agents": "separate", "memory": memory, "normalize_observations": True}
    whole = pg.train("ppo", Opposites, iterations=4, **how)
    pg.train("ppo", Opposites, iterations=2, out=str(tmp_path / "run"), checkpoint_every=1, **how)
    resumed = pg.resume(str(tmp_path / "run"), environment=Opposites, iterations=2, progress=False)
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert bits(one) == bits(other)
    loaded = pg.load(str(tmp_path / "run"), trust=True)
    assert isinstance(loaded.policy, SeparatePolicies)
    obs = {"agent_index": 1, "observation": np.array([0.5], np.float32)}
    one, other = (x.act(obs) for x in (loaded, resumed))
    assert str(one) == str(other)
    with pytest.raises(UserError, match="one for each agent"):
        pg.export(loaded, out=str(tmp_path / "policy.onnx"))


def test_what_does_not_fit_is_one_line() -> None:
    for task, values, said in (
        ("CartPole-v1", {}, "games of several agents"),
        (Opposites, {"compile": "on"}, "leave compile on out"),
        (Opposites, {"overlap": True}, "leave overlap True out"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pg.train("ppo", task, agents="separate", **SMALL, iterations=1, preset="none", **values)
        assert len(str(raised.value)) <= 200
    with pytest.raises(UserError, match="key agent_index"):
        SeparatePolicies(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
