"""Transitions of a demonstrator: checked, split, scored, and their gradient that of the log-likelihood."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from policygrad import ranks
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.control import ObservationNormalizer, Policy
from policygrad.control.demonstrations import Demonstrations, as_columns, demonstrated, in_rows, transitions
from policygrad.control.distributions import INSIDE
from policygrad.control.memory import Rows
from policygrad.control.spaces import FlatActions, flat
from policygrad.credit import demonstrated as credit
from policygrad.errors import UserError
from policygrad.rollout import Rollout, decisions
from policygrad.weights import per_token

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
FOUR = spaces.Discrete(4, start=2)
BOX = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)
SPACES: list[spaces.Space] = [
    FOUR,
    spaces.Discrete(3),
    spaces.MultiDiscrete([2, 5], start=[1, 0]),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary((2, 2)),
    BOX,
    spaces.Box(-1.0, 3.0, (2, 2), np.float32),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(np.array([0.0]), np.array([np.inf]), dtype=np.float64),
    spaces.Box(np.array([1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64),
    spaces.Box(0, 7, (2,), np.int32),
]


def drawn(space: Any, count: int = 64) -> np.ndarray:
    space.seed(0)
    return np.stack([space.sample() for _ in range(count)])


def columns(space: spaces.Space = FOUR, count: int = 64, **more: Any) -> dict[str, Any]:
    return {"observation": drawn(OBS, count), "action": drawn(space, count), **more}


def batch_of(policy: nn.Module, space: spaces.Space, found: Any) -> Any:
    rollout = Demonstrations(found, space)(policy)
    return decisions(rollout, per_token(rollout.mask), *credit(rollout))


def gradient(value: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, list(module.parameters()))])


BOUNDED = [BOX, spaces.Box(-1.0, 3.0, (2, 2), np.float32)]  # what has an interval between its bounds


@pytest.mark.parametrize(
    ("space", "distribution"),
    [*((x, "normal") for x in SPACES), *product(BOUNDED, ("squashed", "beta"))],
    ids=str,
)
def test_actions_come_back_from_where_the_distribution_sends_them(space: Any, distribution: str) -> None:
    policy, action = Policy(OBS, space, distribution=distribution), drawn(space)
    made = policy(torch.zeros(len(action), 1, 3))
    u = torch.as_tensor(made.from_environment(action))
    again = made.to_environment(u)
    assert again.dtype == action.dtype
    if distribution != "normal":
        width = space.high - space.low
        assert (np.abs(again - action) <= (1 - INSIDE) / 2 * width + 1e-6 * width).all()
        inside = np.abs(2 * (action - space.low) / width - 1) < INSIDE
        np.testing.assert_allclose(again[inside], action[inside], atol=1e-5)
    else:
        np.testing.assert_allclose(again, action, atol=1e-6)


def test_an_action_at_a_bound_of_tanh_is_moved_a_thousandth_of_the_way_inside() -> None:
    policy = Policy(OBS, BOX, distribution="squashed")
    u = policy(torch.zeros(2, 1, 3)).from_environment(np.stack([BOX.low, BOX.high]))
    np.testing.assert_allclose(u, [[-math.atanh(0.999)] * 2, [math.atanh(0.999)] * 2])


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_that_of_the_mean_negative_log_likelihood() -> None:
    found, policy = transitions(columns(), OBS, FOUR), Policy(OBS, FOUR)
    objective, _ = ReinforceObjective(policy)(batch_of(policy, FOUR, found))
    logits = policy.network(torch.as_tensor(found.observation, dtype=torch.float64))
    plain = cross_entropy(logits, torch.as_tensor(found.action - 2))
    assert objective.item() == pytest.approx(-plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient(objective, policy), -gradient(plain, policy), rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("squash", [False, True])
def test_so_it_is_for_a_gaussian(squash: bool) -> None:
    """By the densities of a, written out; the clipped one is in units where the bounds are -1 and 1."""
    found, policy = (
        transitions(columns(BOX), OBS, BOX),
        Policy(OBS, BOX, distribution="squashed" if squash else "normal"),
    )
    objective, _ = ReinforceObjective(policy)(batch_of(policy, BOX, found))
    half, center = torch.tensor([2.0, 5.0]), torch.tensor([0.0, 5.0])
    x = (torch.as_tensor(found.action) - center) / half
    mean, log_std = policy.network(torch.as_tensor(found.observation, dtype=torch.float64)), policy.head.log_std
    u = torch.atanh(x.clamp(-INSIDE, INSIDE)) if squash else x
    density = -((u - mean) ** 2) / (2 * log_std.exp() ** 2) - log_std - math.log(2 * math.pi) / 2
    if squash:
        density = density - half.log() - (1 - u.tanh() ** 2).log()
    plain = -density.sum(-1).mean()
    assert objective.item() == pytest.approx(-plain.item(), rel=1e-9)
    torch.testing.assert_close(gradient(objective, policy), -gradient(plain, policy), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_action_space_has_a_finite_likelihood(space: spaces.Space) -> None:
    found, policy = transitions(columns(space), OBS, space), Policy(OBS, space)
    objective, _ = ReinforceObjective(policy)(batch_of(policy, space, found))
    assert objective.isfinite()


def test_rows_stand_alone_and_count_decisions() -> None:
    found, policy = transitions(columns(), OBS, FOUR), Policy(OBS, FOUR)
    sample = Demonstrations(found, FOUR)
    first, second = sample(policy), sample(policy)
    assert first.memoryless
    assert first.action.shape == (64, 1)
    assert second.metrics["steps"] == sample.steps == 128
    torch.testing.assert_close(first.obs[:, 0], torch.as_tensor(found.observation))
    again = Demonstrations(found, FOUR)
    again.load_state_dict(sample.state_dict())
    assert again.steps == 128


def test_observations_are_normalized_by_the_statistics_that_are_there_at_the_first_call() -> None:
    found, policy = transitions(columns(), OBS, FOUR), Policy(OBS, FOUR)
    normalizer = ObservationNormalizer((3,))
    sample = Demonstrations(found, FOUR, normalizer=normalizer)
    obs = sample(policy).obs[:, 0].double()
    torch.testing.assert_close(obs.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(obs.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert normalizer.statistics.count == 64
    other = Demonstrations(found.take(np.arange(8)), FOUR, normalizer=ObservationNormalizer((3,)))
    other.load_state_dict(sample.state_dict())
    torch.testing.assert_close(other(policy).obs[:, 0].double(), obs[:8])


def test_episodes_end_where_a_column_says_so() -> None:
    ends = np.zeros(6, dtype=bool)
    ends[2] = True
    rewards = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for more, returns in [
        ({}, [21.0]),
        ({"terminated": ends}, [6.0, 15.0]),
        ({"truncated": ends.tolist()}, [6.0, 15.0]),
        ({"episode": [7, 7, 7, "b", "b", "b"]}, [6.0, 15.0]),
        ({"terminated": ends, "episode": [0, 0, 0, 0, 1, 1]}, [6.0, 4.0, 11.0]),
    ]:
        found = transitions(columns(count=6, reward=rewards, **more), OBS, FOUR)
        assert found.returns is not None
        assert found.returns.tolist() == returns
        assert found.episodes == len(returns)


def test_whole_episodes_are_held_out_or_transitions_if_there_is_one_episode() -> None:
    found = transitions(columns(count=60, episode=np.arange(60) // 6), OBS, FOUR)
    train, held = found.split(0.3, seed=0)
    assert held is not None
    assert (len(train), len(held)) == (42, 18)
    assert not set(train.episode) & set(held.episode)
    train, held = transitions(columns(count=60), OBS, FOUR).split(0.3, seed=0)
    assert held is not None
    assert (len(train), len(held)) == (42, 18)
    assert found.split(0.0, seed=0)[1] is None
    few = transitions(columns(count=2), OBS, FOUR).split(0.01, seed=0)
    assert [len(x) for x in few if x is not None] == [1, 1], "at least one"
    with pytest.raises(UserError, match="set validation to 0"):
        transitions(columns(count=1), OBS, FOUR).split(0.1, seed=0)


GOOD: dict[str, Any] = {"observation": [0.0, 1.0, 2.0], "action": 2}
WRONG: list[tuple[dict[str, Any], spaces.Space, str]] = [
    ({"observation": [0.0, 1.0]}, FOUR, r"row 1 .*: observation has shape \(2,\), not \(3,\)"),
    ({"observation": [0.0, [1.0], 2.0]}, FOUR, "row 1 .*: observation .* differ in length"),
    ({"observation": [0.0, math.nan, 2.0]}, FOUR, "row 1 .*: observation .* not finite"),
    ({"observation": [0.0, 1e300, 2.0]}, FOUR, "row 1 .*: observation .* no float32 number"),
    ({"observation": "text"}, FOUR, "row 1 .*: observation is 'text', which is no number"),
    ({"observation": None}, FOUR, "row 1 .*: observation is None"),
    ({"action": 1}, FOUR, r"row 1 .*: action is 1, which is outside; Discrete\(4, start=2\) is its space"),
    ({"action": 6}, FOUR, "row 1 .*: action is 6, which is outside"),
    ({"action": 2.5}, FOUR, "row 1 .*: action is 2.5, which is no int64 number"),
    ({"action": "2"}, FOUR, "row 1 .*: action is '2', which is no number"),
    ({"action": [2]}, FOUR, r"row 1 .*: action has shape \(1,\), not \(\)"),
    ({"action": [0.0, 11.0]}, BOX, r"row 1 .*: action is \[0.0, 11.0\], which is outside"),
    ({"action": [math.inf, 1.0]}, BOX, "row 1 .*: action .* not finite"),
    ({"terminated": 2}, FOUR, "row 1 .*: terminated is 2, which is outside"),
    ({"truncated": "no"}, FOUR, "row 1 .*: truncated is 'no', which is no number"),
    ({"reward": None}, FOUR, "row 1 .*: reward is None"),
    ({"reward": [1.0]}, FOUR, r"row 1 .*: reward has shape \(1,\)"),
]


@pytest.mark.parametrize(("wrong", "space", "said"), WRONG)
def test_what_is_no_member_of_its_space_is_named_by_row_and_column(
    wrong: dict[str, Any], space: spaces.Space, said: str
) -> None:
    good = {**GOOD, "terminated": False, "truncated": False, "reward": 0.0}
    good |= {"action": [0.0, 1.0]} if space is BOX else {}
    rows = [good, good | wrong, good | wrong]
    with pytest.raises(UserError, match=said) as raised:
        transitions(as_columns(rows), OBS, space)
    assert len(str(raised.value)) <= 200
    transitions(as_columns([good, good]), OBS, space)


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(UserError, match="no column 'action', only observation"):
        transitions({"observation": [[0.0] * 3]}, OBS, FOUR)
    with pytest.raises(UserError, match="row 1 of the demonstrations has no 'action'"):
        as_columns([GOOD, {"observation": [0.0] * 3}])
    with pytest.raises(UserError, match="row 1 of the demonstrations alone has 'reward'"):
        as_columns([GOOD, {**GOOD, "reward": 1.0}])
    with pytest.raises(UserError, match="have no rows"):
        transitions({"observation": [], "action": []}, OBS, FOUR)


OF_PARTS = spaces.Dict({"a": FOUR, "b": spaces.Tuple([BOX, spaces.MultiBinary(2)])})


def test_actions_of_several_parts_are_vectors_of_their_numbers() -> None:
    middle = (BOX.low + BOX.high) / 2
    rows = [{"a": FOUR.start + k, "b": [middle.tolist(), [k % 2, 1]]} for k in range(4)]
    for space in (OF_PARTS, FlatActions(OF_PARTS)):
        found = transitions({"observation": [[0.0] * 3] * 4, "action": rows}, OBS, space)
        expected = [[FOUR.start + k, *middle.ravel(), k % 2, 1] for k in range(4)]
        np.testing.assert_array_equal(found.action, np.array(expected, np.float64))
    again = FlatActions(OF_PARTS).structured(found.action)
    np.testing.assert_array_equal(again["a"], [x["a"] for x in rows])
    np.testing.assert_array_equal(again["b"][1], [x["b"][1] for x in rows])


def test_they_are_scored_as_their_parts_are() -> None:
    """log pi of the whole is the sum over the parts, each scored by a policy's own distribution of it."""
    torch.manual_seed(0)
    flat_actions = FlatActions(OF_PARTS)
    policy = Policy(OBS, flat_actions, hidden=(4,))
    middle = ((BOX.low + BOX.high) / 2).tolist()
    rows = [{"a": FOUR.start + k, "b": [middle, [k % 2, 1]]} for k in range(4)]
    given = {"observation": [[0.1 * k] * 3 for k in range(4)], "action": rows}
    rollout = demonstrated(policy, transitions(given, OBS, flat_actions), flat_actions)
    found = policy(rollout.obs)
    a, box, coins = found.parts
    expected = (
        a.log_prob(torch.arange(4).unsqueeze(1))
        + box.log_prob(torch.zeros(4, 1, len(middle)))
        + coins.log_prob(torch.tensor([[[float(k % 2), 1.0]] for k in range(4)]))
    )
    torch.testing.assert_close(found.log_prob(rollout.action), expected)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"a": FOUR.start}, "a dict with the keys a, b"),
        ([1, 2], "a dict with the keys a, b"),
        ({"a": FOUR.start, "b": [[0.0, 0.0]]}, "action b is .*: give 2 parts"),
        ({"a": FOUR.start - 1, "b": [[0.0, 0.0], [0, 1]]}, "action a is .* outside"),
        ({"a": FOUR.start, "b": [[0.0, 0.0], [0, 2]]}, "action b 1 is .* outside"),
    ],
)
def test_a_wrong_part_is_named(action: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        transitions({"observation": [[0.0] * 3], "action": [action]}, OBS, OF_PARTS)
    assert len(str(raised.value)) <= 200


def test_an_action_whose_part_the_mask_forbids_is_refused() -> None:
    space = spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1.0, 1.0, (1,)), "c": spaces.MultiBinary(1)})
    seen = spaces.Dict({"action_mask": spaces.MultiBinary(5), "x": spaces.Box(-1.0, 1.0, (2,))})
    obs = {"action_mask": [1, 0, 1, 1, 0], "x": [0.0, 0.0]}
    transitions({"observation": [obs], "action": [{"a": 2, "b": [0.5], "c": [0]}]}, seen, space)
    for a, c in ((1, 0), (2, 1)):
        with pytest.raises(UserError, match="forbids"):
            transitions({"observation": [obs], "action": [{"a": a, "b": [0.5], "c": [c]}]}, seen, space)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="'reward' has 2 rows, and action 3"):
        transitions(columns(count=3, reward=[1.0, 2.0]), OBS, FOUR)


def test_a_dict_is_flattened_as_its_environment_flattens_it() -> None:
    space = spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Box(-1.0, 1.0, (2,))})
    rows = [{"a": [0.5, -0.5], "b": 2}, {"a": [0.0, 1.0], "b": 0}]
    found = transitions({"observation": rows, "action": [2, 3]}, space, FOUR)
    np.testing.assert_array_equal(found.observation, [[0.5, -0.5, 0, 0, 1], [0.0, 1.0, 1, 0, 0]])
    with pytest.raises(UserError, match="row 1 of the demonstrations has an observation without 'a'"):
        transitions({"observation": [rows[0], {"b": 1}], "action": [2, 3]}, space, FOUR)


class Own(nn.Module):
    """A policy of the user's own, whose distribution knows no environment."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.mean, self.kind = nn.Parameter(torch.zeros(2)), kind

    def forward(self, obs: torch.Tensor) -> Any:
        mean = self.mean.expand(*obs.shape[:2], 2)
        return self.kind(Normal(mean, torch.ones_like(mean)), 1)


class Changes(Independent):
    """A distribution with a way to the environment and none back."""

    def to_environment(self, action: torch.Tensor) -> np.ndarray:
        return action.exp().numpy()


def test_a_policy_of_ones_own_scores_the_environments_actions_or_says_how() -> None:
    found = transitions(columns(BOX), OBS, BOX)
    rollout = demonstrated(Own(Independent), found, BOX)
    torch.testing.assert_close(rollout.action[:, 0], torch.as_tensor(found.action, dtype=torch.float32))
    with pytest.raises(UserError, match="give it from_environment"):
        demonstrated(Own(Changes), found, BOX)


@pytest.mark.parametrize(
    ("space", "mask", "allowed", "forbidden"),
    [
        (spaces.Discrete(3, start=1), [1, 0, 1], 3, 2),
        (spaces.MultiDiscrete([2, 3]), [0, 1, 1, 1, 0], [1, 1], [1, 2]),
        (spaces.MultiBinary(2), [1, 0, 1, 1], [0, 1], [1, 1]),
    ],
)
def test_an_action_that_its_mask_forbids_is_named(space: Any, mask: list[int], allowed: Any, forbidden: Any) -> None:
    observation_space = spaces.Dict({"action_mask": spaces.MultiBinary(len(mask)), "x": spaces.Box(-1.0, 1.0, (2,))})
    obs = {"action_mask": mask, "x": [0.5, 0.0]}
    found = transitions({"observation": [obs] * 2, "action": [allowed] * 2}, observation_space, space)
    policy = Policy(flat(observation_space), space)
    value, _ = ReinforceObjective(policy)(batch_of(policy, space, found))
    assert -10 < value.item() <= 0
    with pytest.raises(UserError, match=r"row 1 of the demonstrations: action is .* forbids"):
        transitions({"observation": [obs] * 2, "action": [allowed, forbidden]}, observation_space, space)
    transitions({"observation": [obs], "action": [forbidden]}, observation_space, space, masked=False)
    nothing = {**obs, "action_mask": [0] * len(mask)}
    with pytest.raises(UserError, match="row 0 of 1 allows no action"):
        transitions({"observation": [nothing], "action": [allowed]}, observation_space, space)


# Policies with memory


LENGTHS = (3, 1, 5, 2, 2, 4)
each_kind = pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])


def of_episodes(lengths: Any = LENGTHS, **more: Any) -> Any:
    count = sum(lengths)
    return transitions(columns(count=count, episode=np.repeat(range(len(lengths)), lengths), **more), OBS, FOUR)


def remembering(kind: str) -> Any:
    """With parameters at which the memory matters."""
    policy = Policy(OBS, FOUR, memory=kind, memory_size=4, memory_window=3, hidden=(5,))
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return policy


def step_by_step(policy: Any, found: Any, cut: int = 1_000_000, width: int = 0) -> torch.Tensor:
    """The mean of log pi(a_t | o_0 .. o_t), each episode from the empty memory, a step at a time.

    cut: no gradient flows through the memory before steps at multiples of this in rows of `width`.
    """
    total, place = torch.zeros(()), 0
    for episode in np.unique(found.episode):
        its = np.flatnonzero(found.episode == episode)
        if place % width + len(its) > width:
            place = (place // width + 1) * width
        state = policy.initial(1)
        for t in its:
            state = state.detach() if place % cut == 0 else state
            obs = torch.as_tensor(found.observation[t], dtype=torch.get_default_dtype()).reshape(1, 1, 3)
            start = torch.zeros(1, 1, dtype=torch.bool)
            made, state = policy.unrolled(Rows(obs, start, state.unsqueeze(1), state.unsqueeze(1)[..., :0]))
            total = total + made.log_prob(torch.tensor([[int(found.action[t]) - 2]])).sum()
            place += 1
    return total / len(found)


@pytest.mark.usefixtures("float64")
@each_kind
def test_the_likelihood_of_whole_episodes_is_that_of_their_steps(kind: str) -> None:
    """And so is its gradient, which flows back through each episode and no further."""
    found, policy = of_episodes(), remembering(kind)
    batch = batch_of(policy, FOUR, found)
    assert batch.mask.shape == (4, 5), "episodes of 3 and 1, 5, 2 and 2, 4 steps, the longest as wide as a row"
    objective, _ = ReinforceObjective(policy)(batch)
    plain = step_by_step(policy, found, width=5)
    assert objective.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient(objective, policy), gradient(plain, policy), rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_pieces_have_the_memory_before_them_and_no_gradient_flows_out_of_them(kind: str) -> None:
    found, policy = of_episodes(), remembering(kind)
    sample = Demonstrations(found, FOUR, sequence_length=2)
    assert (sample.length, sample.pieces) == (6, 3)
    for _ in range(2):
        rollout = sample(policy)
        batch = decisions(rollout, per_token(rollout.mask), *credit(rollout))
        assert batch.mask.shape == (3 * len(rollout.mask), 2)
        objective, _ = ReinforceObjective(policy)(batch)
        plain = step_by_step(policy, found, cut=2, width=6)
        assert objective.item() == pytest.approx(plain.item(), rel=1e-12)
        torch.testing.assert_close(gradient(objective, policy), gradient(plain, policy), rtol=1e-9, atol=1e-13)
        for p in policy.parameters():  # the next call takes the memory of the policy as it then is
            p.data += 0.1
    whole = step_by_step(policy, found, width=6)
    assert not torch.allclose(gradient(whole, policy), gradient(objective_now(policy, found), policy))


def objective_now(policy: Any, found: Any) -> torch.Tensor:
    rollout = Demonstrations(found, FOUR, sequence_length=2)(policy)
    batch = decisions(rollout, per_token(rollout.mask), *credit(rollout))
    return ReinforceObjective(policy)(batch)[0]


@pytest.mark.parametrize("seed", range(20))
def test_rows_have_every_episode_once_and_whole(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, generator.integers(1, 12))
    episode = np.repeat(3 * np.arange(len(lengths)), lengths)
    width = int(lengths.max() + generator.integers(3))
    index, start, mask = in_rows(episode, width)
    assert index.shape == start.shape == mask.shape
    assert index.shape[1] == width
    assert index[mask].tolist() == list(range(len(episode))), "each once, in order"
    assert set(index[~mask]) <= set(range(len(episode)))
    assert start[:, 0].all()
    assert not (start & ~mask).any()
    begins = np.flatnonzero(np.diff(episode, prepend=-1))
    assert index[start].tolist() == begins.tolist(), "where episodes start"
    for those in mask:
        assert not (np.diff(those.astype(int)) == 1).any(), "holes are at the end"
    following = [lengths[episode[first] // 3] for first in index[1:, 0]]
    assert (mask[:-1].sum(1) + following > width).all(), "an episode goes after the one before if there is room"


def test_ends_of_episodes_in_rows() -> None:
    rollout = Demonstrations(of_episodes(), FOUR)(remembering("gru"))
    ended = [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert rollout.ended.int().tolist() == ended
    assert rollout.mask.sum() == sum(LENGTHS)
    assert not rollout.memoryless
    assert rollout.metrics["steps"] == sum(LENGTHS)


def test_a_policy_with_memory_needs_to_know_where_episodes_start() -> None:
    found = transitions(columns(), OBS, FOUR)
    with pytest.raises(
        UserError, match="needs to know where episodes start: give the demonstrations a column"
    ) as error:
        Demonstrations(found, FOUR)(remembering("gru"))
    assert len(str(error.value)) <= 200
    for name in ("episode", "terminated", "truncated"):
        found = transitions(columns(**{name: np.zeros(64, int)}), OBS, FOUR)
        assert Demonstrations(found, FOUR)(remembering("gru")).mask.shape == (1, 64)


@pytest.mark.parametrize("kind", ["none", "gru"])
def test_each_rank_has_its_share_of_the_rows(kind: str) -> None:
    found, policy = of_episodes(), Policy(OBS, FOUR, memory=kind, hidden=())
    whole, parts = Demonstrations(found, FOUR)(policy), []
    try:
        for rank in range(3):
            ranks.sample_as(rank, 3)
            parts.append(Demonstrations(found, FOUR)(policy))
    finally:
        ranks.sample_as(0, 1)
    assert [len(x.mask) for x in parts] == ([6, 6, 5] if kind == "none" else [2, 1, 1])
    joined = Rollout.join(parts)
    assert torch.equal(joined.action, whole.action)
    assert torch.equal(joined.mask, whole.mask)
    for x, y in zip(tree_leaves(joined.obs), tree_leaves(whole.obs), strict=True):
        assert torch.equal(x, y)
