"""EnvPool's environments under the same demands as Gymnasium's own."""

from typing import Any

import pytest
import torch

from policygrad.control import Policy, Sampler, evaluate, make_environments
from policygrad.errors import UserError
from policygrad.rollout import Rollout

installed = pytest.mark.usefixtures("envpool")


@pytest.fixture(name="envpool")
def _envpool() -> Any:
    return pytest.importorskip("envpool", reason="EnvPool is not installed")


def sampled(name: str, count: int, steps: int, seed: int | None = 0, **options: Any) -> Rollout:
    environments = make_environments(name, count, vectorization="envpool")
    torch.manual_seed(0)
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    return Sampler(environments, steps, seed=seed, **options)(policy)


@installed
def test_an_episode_ends_with_its_final_observation_and_a_masked_step() -> None:
    rollout = sampled("CartPole-v1", 8, 96)
    ends = rollout.terminated.nonzero().tolist()
    assert ends
    for i, t in ends:
        if t + 2 < 96:
            x, _, angle, _ = rollout.obs[i, t + 1].tolist()  # where the episode stopped
            assert abs(x) > 2.4 or abs(angle) > 0.2095
            assert not rollout.mask[i, t + 1]
            assert rollout.reward[i, t + 1] == 0
            assert rollout.mask[i, t + 2]
            assert rollout.obs[i, t + 2].abs().max() < 0.06  # a new start
    assert (rollout.mask.sum() + (~rollout.mask).sum()) == 8 * 96


@installed
def test_a_time_limit_truncates_and_does_not_terminate() -> None:
    rollout = sampled("Pendulum-v1", 2, 205)
    assert not rollout.terminated.any()
    assert rollout.ended[:, 199].all()
    assert not rollout.mask[:, 200].any()


@installed
def test_the_seed_decides() -> None:
    first, again, other = (sampled("CartPole-v1", 4, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first.obs, again.obs)
    assert not torch.equal(first.obs[:, 0], other.obs[:, 0])
    starts = first.obs[:, 0]
    assert len({tuple(x) for x in starts.tolist()}) == 4


@installed
def test_pools_without_a_seed_differ() -> None:
    a, b = (make_environments("CartPole-v1", 2, vectorization="envpool").reset()[0] for _ in range(2))
    assert (a != b).any()


@installed
def test_groups_start_from_the_same_state() -> None:
    rollout = sampled("CartPole-v1", 6, 500, whole_episodes=True, groups=3)
    starts = rollout.obs[:, 0]
    assert torch.equal(starts[:3], starts[:1].expand(3, -1))
    assert torch.equal(starts[3:], starts[3:4].expand(3, -1))
    assert not torch.equal(starts[0], starts[3])


@installed
def test_the_dynamics_are_gymnasiums() -> None:
    """One step of CartPole from the same state, by its equations."""
    rollout = sampled("CartPole-v1", 4, 2)
    x, v, angle, w = rollout.obs[:, 0].double().unbind(-1)
    force = torch.where(rollout.action[:, 0] == 1, 10.0, -10.0).double()
    inner = (force + 0.05 * w**2 * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * inner) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
    push = inner - 0.05 * turn * angle.cos() / 1.1
    expected = torch.stack([x + 0.02 * v, v + 0.02 * push, angle + 0.02 * w, w + 0.02 * turn], -1)
    torch.testing.assert_close(rollout.obs[:, 1].double(), expected, atol=1e-6, rtol=0)


@installed
def test_numbers_in_info_are_told_without_those_of_the_pool() -> None:
    rollout = sampled("HalfCheetah-v5", 2, 1000)
    assert "info/reward_run" in rollout.metrics
    assert not any(name in rollout.metrics for name in ("info/env_id", "info/elapsed_step"))


@installed
def test_an_evaluation_ends_at_the_environments_own_limit() -> None:
    environments = make_environments("Pendulum-v1", 1, vectorization="envpool")
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    assert evaluate(policy, "Pendulum-v1", 3, vectorization="envpool").lengths == [200] * 3


@installed
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("CartPoll-v1", {}, "did you mean CartPole"),
        (lambda: None, {}, "EnvPool has no environment"),
        ("CartPole-v1", {"wind": 3}, "its arguments are env_options"),
        ("CartPole-v1", {"seed": 3}, "the seed of the run decides"),
    ],
)
def test_what_envpool_does_not_know_is_refused(name: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments(name, 2, vectorization="envpool", env_options=options)
    assert len(str(raised.value)) <= 200


def test_without_envpool_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(UserError, match="pip install envpool"):
        make_environments("CartPole-v1", 2, vectorization="envpool")
