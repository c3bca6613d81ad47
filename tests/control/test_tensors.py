"""Actions arrive as tensors as they do as arrays, and what an environment of tensors cannot be is said."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probes import Known
from torch.utils._pytree import tree_leaves, tree_map

from policygrad.control import Policy, make_environments
from policygrad.control import spaces as own_spaces
from policygrad.control.spaces import FlatActions
from policygrad.control.tensors import TensorEnvironments, normalized, of_tensors, structured, tensor, to_environment
from policygrad.errors import UserError

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,))
BOX = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
POLICIES: list[tuple[spaces.Space, dict[str, Any]]] = [
    (spaces.Discrete(4, start=-2), {}),
    (spaces.MultiDiscrete([2, 5], start=[1, 3]), {}),
    (spaces.MultiBinary((2, 2)), {}),
    (BOX, {}),
    (BOX, {"distribution": "squashed"}),
    (BOX, {"distribution": "beta"}),
    (spaces.Box(-3, 9, (2, 2), np.int32), {}),
    (spaces.Box(-np.inf, np.inf, (2,), np.float64), {"initial_log_std": 2.0}),
    (FlatActions(spaces.Tuple([spaces.Discrete(3, start=1), BOX])), {}),
]


@pytest.mark.parametrize(("space", "options"), POLICIES, ids=str)
def test_an_action_arrives_as_it_does_in_numpy(space: spaces.Space, options: dict[str, Any]) -> None:
    with torch.no_grad():
        distribution: Any = Policy(OBSERVATIONS, space, **options)(torch.randn(500, 1, 3))
    for action in (distribution.sample()[:, 0], distribution.mode[:, 0]):
        expected, found = distribution.to_environment(action), to_environment(action, distribution, space)
        assert found.numpy().dtype == expected.dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_distribution_with_a_way_of_its_own_is_refused() -> None:
    class Own(torch.distributions.Normal):
        def to_environment(self, action: torch.Tensor) -> np.ndarray:
            return action.numpy()

    with pytest.raises(UserError, match="maps its actions in a way of its own, outside of torch"):
        to_environment(torch.zeros(1, 1), Own(0.0, 1.0), spaces.Box(-1, 1, (1,)))


def test_normalized_is_written_out() -> None:
    obs, kept = torch.tensor([[3.0, 5.0, 500.0, 7.0]]), torch.tensor([False, False, False, True])
    found = normalized(obs, torch.tensor([1.0, 5.0, 0.0, 0.0]), torch.tensor([4.0, 0.0, 1.0, 1.0]), kept)
    assert found.tolist() == [[0.5, 0.0, 10.0, 7.0]]


def test_an_array_is_handed_on_in_its_own_memory() -> None:
    array = np.arange(3.0)
    found = tensor(array)
    array[0] = 9.0
    assert found.tolist() == [9.0, 1.0, 2.0]
    array.flags.writeable = False
    assert tensor(array).tolist() == [9.0, 1.0, 2.0]


def test_what_is_of_tensors_says_so() -> None:
    vector = CartPoleVectorEnv(2)
    assert not of_tensors(vector)
    assert not of_tensors(Known())
    vector.metadata = {**vector.metadata, "torch": True}
    assert of_tensors(vector)
    assert isinstance(make_environments(vector), TensorEnvironments)


class Several(gymnasium.Env):
    """Isaac Lab's interface, without a simulator."""

    num_envs = 2

    def __init__(self, observations: spaces.Space, actions: spaces.Space) -> None:
        self.single_observation_space, self.single_action_space = observations, actions


@pytest.mark.parametrize(
    ("observations", "actions", "said"),
    [
        (OBSERVATIONS, spaces.Dict(a=spaces.Text(3)), "Text"),
        (spaces.Dict(a=spaces.MultiDiscrete([2, 3])), BOX, "observations of tensors are Box, Discrete or MultiBinary"),
        (OBSERVATIONS, spaces.Text(3), "Text"),
    ],
    ids=["actions", "observations", "text"],
)
def test_a_space_that_it_cannot_have_is_named(observations: Any, actions: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments(Several(observations, actions))
    assert len(str(raised.value)) <= 200


def test_structured_actions_are_those_of_arrays() -> None:
    inner = spaces.Dict(
        a=spaces.Discrete(3, start=2),
        b=spaces.Tuple([spaces.Box(-1, 1, (2, 2), np.float64), spaces.MultiBinary(2)]),
        c=spaces.MultiDiscrete([2, 3], start=[1, 0]),
    )
    space = FlatActions(inner)
    inner.seed(0)
    samples = [tree_map(lambda x: np.asarray(x)[None], inner.sample()) for _ in range(5)]
    vectors = np.concatenate([space.vectors(x) for x in samples])
    found, expected = structured(torch.from_numpy(vectors), space), space.structured(vectors)
    leaves = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert len(leaves) == 4
    for x, y in leaves:
        assert x.is_contiguous()
        assert x.numpy().dtype == y.dtype
        np.testing.assert_array_equal(x.numpy(), y)


def test_a_policy_of_ones_own_counts_from_0() -> None:
    space = FlatActions(spaces.Tuple([spaces.Discrete(3, start=2), spaces.Box(-1, 1, (1,))]))
    own = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1, 2), 1.0), 1)
    action = torch.tensor([[1.0, 3.0], [2.0, -0.5]])
    found = to_environment(action, own, space)
    np.testing.assert_array_equal(found.numpy(), own_spaces.to_environment(action.numpy(), space))
    assert found.tolist() == [[3, 1], [4, -0.5]]


def test_masks_are_keys() -> None:
    with pytest.raises(UserError, match="have their mask in the key action_mask"):
        make_environments(Several(OBSERVATIONS, spaces.Discrete(2)), action_mask="info")


def test_parts_of_an_observation_are_those_of_its_space() -> None:
    class Parts(Several):
        obs: Any = None

        def reset(self, **options: Any) -> Any:
            return self.obs, {}

    parts = Parts(spaces.Dict(a=spaces.Box(-1, 1, (2,)), n=spaces.Discrete(3, start=1)), BOX)
    environments = make_environments(parts)
    parts.obs = {"a": torch.tensor([[1.0, 2], [3, 4]]), "n": torch.tensor([1, 3])}
    assert environments.reset()[0].tolist() == [[1, 2, 1, 0, 0], [3, 4, 0, 0, 1]]
    for obs, said in (
        ({"a": parts.obs["a"]}, "without 'n'"),
        ({**parts.obs, "more": parts.obs["n"]}, "with 'more'"),
        ({**parts.obs, "a": torch.zeros(2, 3)}, r"of shape \(2, 3\)"),
        ({**parts.obs, "a": [[1.0, 2.0]] * 2}, "returned a list"),
    ):
        parts.obs = obs
        with pytest.raises(UserError, match=said) as raised:
            environments.reset()
        assert len(str(raised.value)) <= 200
        parts.obs = {"a": torch.tensor([[1.0, 2], [3, 4]]), "n": torch.tensor([1, 3])}


def test_gymnasiums_copies_are_those_of_numpy() -> None:
    """Seeded alike, SyncVectorEnv gives the same numbers through DLPack."""
    plain, other = (SyncVectorEnv([Known] * 2, autoreset_mode=AutoresetMode.NEXT_STEP) for _ in range(2))
    converted = TensorEnvironments(other)
    np.testing.assert_array_equal(converted.reset(seed=3)[0].numpy(), plain.reset(seed=3)[0])
    action = torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    for found, expected in zip(converted.step(action)[:4], plain.step(action.numpy())[:4], strict=True):
        np.testing.assert_array_equal(found.numpy(), expected)
    converted.close()
    assert other.closed
