"""Acting: observations in, the environment's actions out, as in sampling and evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from probes import Known, limited

from policygrad.control import ObservationNormalizer, Policy, evaluate
from policygrad.control.acting import act
from policygrad.errors import UserError

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = [
    spaces.Discrete(3, start=2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(2),
    spaces.Box(-2.0, 2.0, (2,), np.float32),
]


def policy(actions: spaces.Space, observations: spaces.Space = BOX) -> Policy:
    return Policy(observations, actions, hidden=(4,))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_an_action_is_one_of_the_environments_and_a_batch_is_its_rows(space: spaces.Space, greedy: bool) -> None:
    made, obs = policy(space), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    batch = made.act(obs, greedy=greedy)
    assert len(batch) == 5
    assert all(space.contains(x) for x in batch)
    assert space.contains(made.act(obs[0], greedy=greedy))
    if greedy:
        for row, action in zip(obs, batch, strict=True):
            np.testing.assert_allclose(made.act(row), action, rtol=1e-6)


def test_a_sample_is_the_distributions() -> None:
    made = policy(spaces.Discrete(3))
    obs = np.zeros((300, 3), np.float32)
    torch.manual_seed(3)
    found = made.act(obs, greedy=False)
    torch.manual_seed(3)
    expected = made(torch.zeros(300, 1, 3)).sample()[:, 0]
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) == 3
    assert len(set(made.act(obs).tolist())) == 1, "the mode has no noise"


@pytest.mark.parametrize("space", [spaces.Discrete(4, start=1), spaces.Box(0, 255, (2, 2), np.uint8)])
def test_state_numbers_and_images_are_observations_too(space: spaces.Space) -> None:
    made = policy(spaces.Discrete(2), space)
    rows = [space.sample() for _ in range(3)]
    assert made.act(np.stack(rows)).tolist() == [int(made.act(x)) for x in rows]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2,))}),
        spaces.Tuple((spaces.Discrete(3), spaces.Dict({"c": spaces.MultiBinary(2)}))),
        spaces.MultiDiscrete([2, 3]),
    ],
    ids=["dict", "tuple", "multi-discrete"],
)
@pytest.mark.usefixtures("float64")
def test_composite_observations_are_flattened_as_in_training(space: spaces.Space) -> None:
    """To a batch's rounding, in float64: sums that cancel have no relative precision in float32."""
    made = policy(spaces.Box(-1.0, 1.0, (2,)), spaces.flatten_space(space))
    rows: list[Any] = [space.sample() for _ in range(3)]
    flat = made.act(np.stack([spaces.flatten(space, x) for x in rows]))
    for row, expected in zip(rows, flat, strict=True):
        np.testing.assert_allclose(act(made, row, space, made.action_space), expected, rtol=1e-6)
    batch = rows_together(rows)
    np.testing.assert_allclose(act(made, batch, space, made.action_space), flat, rtol=1e-6)


def rows_together(rows: list[Any]) -> Any:
    if isinstance(rows[0], dict):
        return {name: rows_together([x[name] for x in rows]) for name in rows[0]}
    return (
        tuple(rows_together(list(x)) for x in zip(*rows, strict=True)) if isinstance(rows[0], tuple) else np.stack(rows)
    )


def test_the_normalizer_is_applied_and_does_not_learn() -> None:
    made, normalizer = policy(spaces.Box(-9.0, 9.0, (2,))), ObservationNormalizer((3,))
    normalizer.statistics.update(np.random.default_rng(0).normal(5, 2, (50, 3)))
    obs = np.array([6.0, 2.0, 5.0], np.float32)
    before = normalizer.statistics.count
    found = act(made, obs, BOX, made.action_space, normalizer=normalizer)
    scaled = (obs - normalizer.statistics.mean) / np.sqrt(normalizer.statistics.var)
    np.testing.assert_allclose(found, made.act(scaled.astype(np.float32)), rtol=1e-4)
    assert normalizer.statistics.count == before


@pytest.mark.parametrize(
    ("obs", "said"),
    [
        (np.zeros(4, np.float32), r"act got shape \(4,\), and an observation is in Box"),
        (np.zeros((2, 2, 3), np.float32), r"shape \(2, 2, 3\)"),
        (0.0, "act got 0.0, and"),
        (None, "act got None, and"),
        (np.zeros((0, 3), np.float32), r"shape \(0, 3\)"),
        (np.array([np.nan, 0, 0], np.float32), "act got an observation that is NaN"),
        (np.array([1e300, 0, 0]), r"act got 1e\+300 in an observation, which is no float32 number"),
        ((np.zeros(3, np.float32), {}), r"act got a pair \(obs, info\), as reset returns it: give obs alone"),
    ],
)
def test_an_observation_of_another_kind_is_one_line(obs: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        policy(spaces.Discrete(2)).act(obs)


def test_a_composite_observation_of_other_parts_is_one_line() -> None:
    space = spaces.Dict({"a": spaces.Discrete(3)})
    made = policy(spaces.Discrete(2), spaces.flatten_space(space))
    for wrong in ({"b": 1}, (1,), {"a": [[1]]}):
        with pytest.raises(UserError, match=r"act got .*, and an observation is in Dict"):
            act(made, wrong, space, made.action_space)
    for wrong in ({"a": 7}, {"a": [0, -1]}):
        with pytest.raises(UserError, match=r"act got (7|-1), which is outside Discrete\(3\)"):
            act(made, wrong, space, made.action_space)


@pytest.mark.parametrize(
    "inner",
    [
        np.array([0.5, 2.0]),  # float64, and beyond the bounds
        [0.5, 2.0],
        torch.tensor([0.5, 2.0], requires_grad=True),
    ],
    ids=["float64", "list", "tensor"],
)
def test_act_takes_what_training_takes(inner: Any) -> None:
    """An observation of other types, or outside the bounds of its Box, is neither refused nor read as a batch."""
    space = spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,), np.float32), "b": spaces.Discrete(3)})
    made = policy(spaces.Box(-1.0, 1.0, (2,)), spaces.flatten_space(space))
    found = act(made, {"a": inner, "b": 1}, space, made.action_space)
    np.testing.assert_array_equal(found, made.act(np.array([0.5, 2.0, 0, 1, 0], np.float32)))


def test_a_loop_of_ones_own_is_an_evaluation() -> None:
    """Each episode from the seed that the evaluation gives it."""
    made = policy(spaces.Box(-1.0, 1.0, (2,), np.float32))
    returns = []
    seeds = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(1,))).integers(2**31, size=4)
    for seed in seeds.tolist():
        environment = limited(Known, 8)()
        obs, _ = environment.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = environment.step(made.act(obs))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    assert evaluate(made, limited(Known, 8), 4, seed=5).returns == pytest.approx(returns, rel=1e-5)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda obs: torch.zeros(*obs.shape[:2], 2), "returned a tensor, such as logits, and no distribution"),
        (lambda obs: (torch.zeros(1), None), "returned a tuple and no distribution"),
        (lambda obs: torch.distributions.Categorical(logits=torch.zeros(len(obs), 2)), r"batch_shape \(1,\) for obs"),
        (
            lambda obs: torch.distributions.Categorical(logits=torch.zeros(*obs.shape[:2], 5)),
            "among 5 actions, and .* 2",
        ),
        (
            lambda obs: torch.distributions.Normal(torch.zeros(*obs.shape[:2]), 1.0),
            r"returned a Normal, and actions are Discrete\(2\)",
        ),
    ],
    ids=["logits", "tuple", "batch", "count", "normal"],
)
def test_a_policy_that_returns_something_else_is_named(output: Any, said: str) -> None:
    class Own(torch.nn.Module):
        def forward(self, obs: torch.Tensor) -> Any:
            return output(obs)

    with pytest.raises(UserError, match=said) as raised:
        act(Own(), np.zeros(3, np.float32), BOX, spaces.Discrete(2), greedy=False)
    assert len(str(raised.value)) <= 200
