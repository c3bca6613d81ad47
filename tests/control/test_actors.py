"""Actors: the numbers of the policy's own distributions, without the distributions."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from policygrad.control.acting import Mode
from policygrad.control.actors import BLOCK, DistributionActor, PerceptronActor, actor
from policygrad.control.encoders import is_image
from policygrad.control.policies import Policy
from policygrad.errors import UserError

ROWS = 6
BEGINS = np.zeros(ROWS, dtype=bool)  # where an episode starts; of a policy with memory alone
CPU = torch.device("cpu")
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS: list[tuple[spaces.Space, dict[str, Any]]] = [
    (spaces.Discrete(4, start=-1), {}),
    (spaces.Box(np.float32([-1, 0]), np.float32([1, 5])), {}),
    (spaces.Box(np.float32([-1, 0]), np.float32([1, 5])), {"distribution": "squashed"}),
    (spaces.Box(-1, 1, (2,), np.float32), {"state_dependent_std": True, "initial_log_std": -1.0}),
    (spaces.Box(0, 9, (2, 1), np.int32), {}),
]
OBSERVATIONS = [
    BOX, spaces.Discrete(5, start=2), spaces.Box(0, 2, (2, 2), np.uint8), spaces.Box(0, 255, (4, 3, 2), np.uint8),
]  # fmt: skip


def observations(space: spaces.Space, steps: int) -> np.ndarray:
    space.seed(0)
    obs = np.stack([[space.sample() for _ in range(ROWS)] for _ in range(steps)])
    return obs.astype(torch.get_default_dtype().__repr__().split(".")[1]) if obs.dtype.kind == "f" else obs


def made(obs: spaces.Space, action: spaces.Space, options: dict[str, Any], **more: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(obs, action, hidden=(8, 7), **options, **more)
    for p in policy.parameters():
        nn.init.normal_(p, std=0.5)
    return policy


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("case", "obs_space"), list(product(ACTIONS, OBSERVATIONS)), ids=str)
def test_log_probabilities_and_actions_are_those_of_the_policys_distributions(
    case: tuple[spaces.Space, dict[str, Any]],
    obs_space: spaces.Space,
    activation: str,
    request: pytest.FixtureRequest,
) -> None:
    if is_image(obs_space) or case[1].get("state_dependent_std"):
        # In float32 convolutions of other batches differ, and a small standard deviation makes much of that.
        request.getfixturevalue("float64")
    policy, steps = made(obs_space, *case, activation=activation), BLOCK + 3
    seen = observations(obs_space, steps)
    act = actor(policy, case[0], CPU, ROWS, BLOCK + 3, np.random.default_rng(0))
    assert isinstance(act, PerceptronActor)
    with torch.no_grad():
        pairs = [act(obs, np.ones(ROWS, dtype=bool), BEGINS) for obs in seen]
        stored = torch.from_numpy(np.stack([x for x, _ in pairs], 1))
        obs = torch.from_numpy(seen).transpose(0, 1)
        distribution = policy(obs)
        torch.testing.assert_close(act.log_probabilities(stored), distribution.log_prob(stored))
        for t in (0, BLOCK - 1, BLOCK, steps - 1):
            expected = distribution.to_environment(stored)  # type: ignore[attr-defined]
            expected = expected.reshape(ROWS, steps, *case[0].shape)  # type: ignore[misc]
            np.testing.assert_array_equal(pairs[t][1], expected[:, t])
            assert pairs[t][1].dtype == case[0].dtype


@pytest.mark.parametrize("case", ACTIONS, ids=str)
def test_without_noise_the_action_is_the_mode(case: tuple[spaces.Space, dict[str, Any]]) -> None:
    policy = made(BOX, *case)
    obs = observations(BOX, 1)[0]
    act = actor(Mode(policy), case[0], CPU, ROWS, BLOCK + 3, np.random.default_rng(0))
    assert isinstance(act, PerceptronActor)
    with torch.no_grad():
        action, _ = act(obs, np.ones(ROWS, dtype=bool), BEGINS)
        expected = policy(torch.from_numpy(obs).unsqueeze(1)).mode[:, 0]
    torch.testing.assert_close(torch.from_numpy(action), expected)


def test_gumbel_noise_samples_the_softmax_of_the_logits() -> None:
    head = made(BOX, spaces.Discrete(3), {}).head
    logits, count = np.float32([0.5, -2.0, -9.0]), 400_000
    noise = head.noise(np.random.default_rng(0), (count,))
    found = np.bincount(head.choice()(logits, noise), minlength=3) / count
    p = torch.from_numpy(logits).double().softmax(0).numpy()
    assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / count)).all()


@pytest.mark.parametrize("case", [ACTIONS[1], ACTIONS[3]], ids=str)
def test_gaussian_actions_are_the_mean_plus_the_standard_deviation_times_noise(case: Any) -> None:
    policy = made(BOX, *case)
    output = torch.randn(ROWS, policy.head.size)
    noise = policy.head.noise(np.random.default_rng(0), (ROWS,))
    base = policy.head(output.unsqueeze(1)).base_dist
    expected = (base.mean + base.stddev * torch.from_numpy(noise).unsqueeze(1))[:, 0]
    torch.testing.assert_close(torch.from_numpy(policy.head.choice()(output.numpy(), noise)), expected)


def test_an_output_that_is_not_finite_is_told_where_it_counts() -> None:
    policy = made(BOX, spaces.Discrete(3), {})
    obs, counts = observations(BOX, 1)[0], np.ones(ROWS, dtype=bool)
    obs[2] = np.nan
    with torch.no_grad():
        with pytest.raises(UserError, match=f"output is not finite for environment 2 of {ROWS}:"):
            actor(policy, spaces.Discrete(3), CPU, ROWS, BLOCK + 3, np.random.default_rng(0))(obs, counts, BEGINS)
        counts[2] = False
        actor(policy, spaces.Discrete(3), CPU, ROWS, BLOCK + 3, np.random.default_rng(0))(obs, counts, BEGINS)


def test_a_policy_that_does_more_than_its_layers_is_called() -> None:
    class Own(Policy):
        pass

    hooked = made(BOX, spaces.Discrete(3), {})
    hooked.register_forward_hook(lambda *_: None)
    replaced = made(BOX, spaces.Discrete(3), {})
    replaced.forward = lambda obs: Policy.forward(replaced, 2 * obs)  # type: ignore[method-assign]
    normed = made(BOX, spaces.Discrete(3), {})
    torch.nn.utils.parametrizations.weight_norm(normed.network[0])
    others: list[nn.Module] = [
        Own(BOX, spaces.Discrete(3)),
        hooked,
        replaced,
        normed,
        made(BOX, spaces.Discrete(3), {}, activation="gelu"),
        made(BOX, spaces.MultiDiscrete([2, 3]), {}),
        made(BOX, spaces.MultiBinary(2), {}),
    ]
    for policy in others:
        space = policy.action_space  # type: ignore[attr-defined]
        for played in (policy, Mode(policy)):
            act = actor(played, space, CPU, ROWS, BLOCK + 3, np.random.default_rng(0))  # type: ignore[arg-type]
            assert isinstance(act, DistributionActor)
            with torch.no_grad():
                action, taken = act(observations(BOX, 1)[0], np.ones(ROWS, dtype=bool), BEGINS)
                assert act.log_probabilities(torch.from_numpy(action).unsqueeze(1)).shape == (ROWS, 1)
            assert taken.shape == (ROWS, *space.shape)  # type: ignore[misc]


def test_an_actor_reads_the_parameters_as_they_are() -> None:
    policy = made(BOX, ACTIONS[1][0], {})
    obs, everywhere = observations(BOX, 1)[0], np.ones(ROWS, dtype=bool)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3)
        action, _ = actor(Mode(policy), ACTIONS[1][0], CPU, ROWS, BLOCK + 3, np.random.default_rng(0))(
            obs, everywhere, BEGINS
        )
        expected = policy(torch.from_numpy(obs).unsqueeze(1)).mode[:, 0]
    torch.testing.assert_close(torch.from_numpy(action), expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_layout_of_the_observations_changes_no_bit(seed: int) -> None:
    """An environment may hand out a transposed array; the state that a run is resumed from is none."""
    torch.manual_seed(seed)
    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), hidden=(16,))
    obs = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    counts = np.ones(3, dtype=bool)
    found = []
    for given in (obs, np.asfortranarray(obs)):
        act = actor(policy, spaces.Discrete(2), CPU, 3, 1, np.random.default_rng(0))
        with torch.no_grad():
            action, _ = act(given, counts, ~counts)
            found.append(act.log_probabilities(torch.from_numpy(action).unsqueeze(1)))
    assert torch.equal(*found)


def test_an_encoder_of_ones_own_acts_by_its_distributions() -> None:
    policy = Policy(BOX, ACTIONS[0][0], encoder=nn.Linear(3, 4))
    assert isinstance(actor(policy, ACTIONS[0][0], CPU, ROWS, 1, np.random.default_rng(0)), DistributionActor)
