"""Dict and Tuple observations: each part reaches the networks that are to see it, images through their own encoders."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from outcomes import parameters, untimed

import policygrad as pg
from policygrad.control import ObservationNormalizer, Policy, Sampler, make_environments
from policygrad.control.encoders import Joined, make_encoder, measured
from policygrad.control.spaces import Flat, FlatActions, describe, kept_of, rebuild
from policygrad.errors import UserError
from policygrad.train.worlds import control

IMAGE, OTHER = spaces.Box(0, 255, (1, 8, 8), np.uint8), spaces.Box(0, 255, (7, 9, 3), np.uint8)
SPACE = spaces.Dict(
    {
        "camera": IMAGE,
        "goal": spaces.Discrete(3),
        "inner": spaces.Tuple([OTHER, spaces.Box(-1, 1, (2,), np.float32)]),
        "keys": spaces.MultiBinary(2),
    }
)


class Sampling(gymnasium.Env):
    """Observations drawn from a space, each of which is kept."""

    def __init__(self, space: spaces.Space = SPACE, actions: int = 3) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(actions)
        self.seen: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._next(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._next(), float(action), self.t == 6, False, {}

    def _next(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.seen.append(self.observation_space.sample())
        return self.seen[-1]


def batch(count: int = 5) -> tuple[torch.Tensor, list[Any]]:
    SPACE.seed(0)
    drawn = [SPACE.sample() for _ in range(count)]
    return torch.from_numpy(np.stack([spaces.flatten(SPACE, x) for x in drawn])).float().unsqueeze(1), drawn


def test_each_image_goes_through_an_encoder_of_its_own_and_the_rest_stays_as_it_is() -> None:
    encode = make_encoder(Flat(SPACE))
    assert isinstance(encode, Joined)
    obs, drawn = batch()
    found = encode(obs)
    camera, other = (
        torch.from_numpy(np.stack(x)).unsqueeze(1)
        for x in zip(*((d["camera"], d["inner"][0]) for d in drawn), strict=True)
    )
    vectors = [np.concatenate([np.eye(3)[d["goal"]], d["inner"][1], d["keys"]]) for d in drawn]
    expected = torch.cat(
        [torch.from_numpy(np.stack(vectors)).float().unsqueeze(1), encode.images[0](camera), encode.images[1](other)],
        -1,
    )
    torch.testing.assert_close(found, expected)
    weights, features = measured(Flat(SPACE), "auto", "auto")
    assert features == encode.size == found.shape[-1]
    assert weights == sum(p.numel() for p in encode.parameters())


@pytest.mark.parametrize("keys", [("goal",), ("keys", "camera"), ("inner",)])
def test_only_the_named_parts_are_seen(keys: tuple[str, ...]) -> None:
    policy = Policy(Flat(SPACE), spaces.Discrete(2), keys=keys)
    with torch.no_grad():
        policy.network[-1].weight.mul_(100)
    obs, _ = batch()
    before = policy(obs).logits
    for name, place in policy.observation_space.slices.items():
        changed = obs.clone()
        changed[..., place] = 1 - changed[..., place].clamp(0, 1)
        assert torch.equal(policy(changed).logits, before) == (name not in keys), name
    again = Policy.from_description(policy.description)
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again(obs).logits, before)


def test_a_dict_keeps_the_order_of_its_keys_through_a_file() -> None:
    """Gymnasium sorts the keys of a dict, and not those of an ordered one: a policy would read other parts."""
    ordered = spaces.Dict(OrderedDict([("z", spaces.Discrete(3)), ("a", spaces.Box(-1, 1, (2,)))]))
    for made in (Flat, FlatActions):
        again = rebuild(json.loads(json.dumps(describe(made(ordered)), sort_keys=True)))
        assert list(again.of.spaces) == ["z", "a"]
    policy = Policy(Flat(ordered), FlatActions(ordered), keys=("z",))
    again = Policy.from_description(json.loads(json.dumps(policy.description)))
    again.load_state_dict(policy.state_dict())
    obs = torch.tensor([[[1.0, 0.0, 0.0, 0.3, -0.3]]])
    assert torch.equal(again.encode(obs), obs[..., :3])
    assert [type(x) for x in again(obs).parts] == [type(x) for x in policy(obs).parts]


@pytest.mark.parametrize("empty", [spaces.Dict({}), spaces.Tuple([])], ids=["Dict", "Tuple"])
def test_a_space_without_parts_is_refused(empty: spaces.Space) -> None:
    for what, environment in (
        ("observation", lambda: Sampling(empty)),
        ("action", lambda: Acting(empty)),
    ):
        with pytest.raises(UserError, match=f"the {what} space is a Dict or Tuple without parts: give it at least one"):
            pg.train("ppo", environment, steps=10, progress=False)


class Acting(Sampling):
    def __init__(self, actions: spaces.Space) -> None:
        super().__init__(spaces.Discrete(2))
        self.action_space = actions


def test_vectors_alone_are_the_vector_itself() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2, 2)), "b": spaces.Discrete(3)})
    encode, obs = make_encoder(Flat(space)), torch.randn(2, 3, 7)
    assert encode(obs) is obs
    tupled = Flat(spaces.Tuple(space.spaces.values()))
    assert list(tupled.slices) == ["0", "1"]
    assert describe(rebuild(describe(tupled))) == describe(tupled)


def test_rollouts_hold_what_the_environment_returned() -> None:
    environments = make_environments(Sampling, 1, vectorization="sync")
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    rollout = Sampler(environments, 6, seed=0)(policy)
    seen = environments.envs[0].unwrapped.seen
    for t in range(6):
        np.testing.assert_array_equal(rollout.obs[0, t], spaces.flatten(SPACE, seen[t]).astype(np.float32))


def test_images_are_not_normalized() -> None:
    environments = make_environments(Sampling, 2, vectorization="sync")
    space = environments.single_observation_space
    normalizer = ObservationNormalizer(space.shape, kept_of(space))
    policy = Policy(space, environments.single_action_space)
    rollout = Sampler(environments, 20, seed=0, observation_normalizer=normalizer)(policy)
    camera = rollout.obs[..., space.slices["camera"]]
    assert camera.max() > 200
    assert torch.equal(camera, camera.round())
    assert abs(float(rollout.obs[..., space.leaves[3][2]][:, 10:].mean())) < 0.5


@pytest.mark.parametrize("method", ["reinforce", "a2c", "trpo", "ppo"])
def test_every_method_sees_them(method: str, tmp_path: Path) -> None:
    task, out = "tests.control.test_parts:Sampling", tmp_path / "run"
    options = {"wrap": ["TimeLimit:9"], "steps": 100, "normalize_observations": True, "policy_keys": ["camera", "goal"]}
    run = pg.train(method, task, out=out, progress=False, **options)
    again = pg.Run.load(out, trust=True)
    SPACE.seed(1)
    obs = SPACE.sample()
    assert again.act(obs) == run.act(obs)
    assert again.evaluate(2).returns == run.evaluate(2).returns


def test_a_critic_may_see_more_than_the_policy() -> None:
    """The reward is known from a part that is hidden from the policy."""
    options = {"policy_keys": ["goal"], "critic_keys": ["inner", "keys"], "steps": 64, "num_steps": 32}
    run = pg.train("ppo", Sampling, progress=False, **options)
    assert run.policy.encode.size == 3
    assert run.world.critic.encode.size == 128 + 2 + 2


def test_a_critic_on_the_policys_encoder_learns_with_it_and_comes_back(tmp_path: Path) -> None:
    options = {"critic_encoder": "shared", "hidden": (), "num_envs": 16, "num_steps": 16, "learning_rate": 3e-3}
    run = pg.train("ppo", "policygrad/Catch-v0", steps=1_000, preset="none", progress=False, out=tmp_path, **options)
    policy, critic, obs = run.policy, run.world.critic, torch.randint(0, 256, (8, 1, 1, 10, 10), dtype=torch.uint8)
    assert critic.encode is policy.encode
    options |= {"learning_rate": 1e-12}
    again = pg.train("ppo", "policygrad/Catch-v0", steps=1, preset="none", progress=False, start=tmp_path, **options)
    assert again.world.critic.encode is again.policy.encode
    torch.testing.assert_close(again.world.critic(obs), critic(obs), rtol=0, atol=1e-5)
    assert critic(obs).std() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy_keys": ["gaol"]},
            "policy_keys names gaol, and the parts of observations are camera, goal, inner, keys: choose",
        ),
        ({"critic_keys": ["x"]}, "critic_keys names x, and the parts of observations"),
        ({"encoder": "nature"}, "encoder nature needs images of at least 36 x 36"),
        (
            {"critic_encoder": "shared", "critic_keys": ["goal"]},
            "critic_keys is of an encoder of the critic's own, and critic_encoder is shared: leave one out",
        ),
        (
            {"critic_encoder": "shared", "policy_keys": ["goal"]},
            "critic_encoder shared is of images: the encoder of these observations learns nothing: use own",
        ),
        (
            {"critic_encoder": "shared", "memory": "gru"},
            "critic_encoder is read only where memory is none",
        ),
        (
            {"critic_encoder": "shared", "critic": lambda obs, actions: torch.nn.Linear(1, 1)},
            "critic_encoder shapes the networks made here, and you hand in your own: leave critic_encoder out",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        pg.train("ppo", Sampling, steps=10, progress=False, **options)
    assert len(str(raised.value)) <= 200


def test_keys_need_parts_and_a_critic_to_see_them() -> None:
    with pytest.raises(UserError, match="policy_keys are of Dict or Tuple observations"):
        pg.train("ppo", "CartPole-v1", policy_keys=["x"], steps=10, progress=False)
    with pytest.raises(UserError, match="critic_keys is for a critic, and credit reward_to_go has none"):
        pg.train(
            "reinforce", Sampling, critic_keys=["goal"], baseline="none", wrap=["TimeLimit:9"], steps=10, progress=False
        )


def test_an_encoder_of_ones_own_sees_all_but_the_mask() -> None:
    space = Flat(spaces.Dict(a=spaces.Box(-1, 1, (2,)), action_mask=spaces.MultiBinary(3), b=spaces.Discrete(2)))
    seen = []

    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    obs = torch.arange(7.0).expand(1, 1, 7)
    assert make_encoder(space, Own())(obs).tolist() == [[[0.0, 1.0, 5.0, 6.0]]]
    assert seen[-1].shape == (1, 4)


# Images among other numbers, kept as bytes

MIXED = spaces.Dict(
    {**SPACE.spaces, "action_mask": spaces.MultiBinary(3), "whole": spaces.Box(-9, 9, (2,), np.float64)}
)


class Mixed(Sampling):
    """Images among floats, whole numbers and a mask that forbids the last action at times."""

    def __init__(self) -> None:
        super().__init__(MIXED)

    def _next(self) -> Any:
        obs = super()._next()
        obs["action_mask"] = np.array([1, 1, self.t % 2], np.int8)
        return obs


def mixed_batch(space: spaces.Dict, rows: int = 3, steps: int = 4) -> np.ndarray:
    space.seed(3)
    drawn = [spaces.flatten(space, space.sample()) for _ in range(rows * steps)]
    return np.stack(drawn).reshape(rows, steps, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "space",
    [SPACE, MIXED, spaces.Dict(a=IMAGE, b=spaces.Discrete(3)), spaces.Dict(a=IMAGE, b=IMAGE, c=spaces.Box(0, 1, (1,)))],
)
def test_packed_numbers_are_those_at_their_places(
    space: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    known, obs = Flat(space), mixed_batch(space)
    assert known.mixed
    packed = torch.from_numpy(known.packed(obs))
    pixels = sum(place.stop - place.start for place in known.images)
    assert packed.dtype == torch.uint8
    least = (known.shape[0] - pixels) * dtype.itemsize + pixels
    assert least <= packed.shape[-1] < least + dtype.itemsize
    for _, leaf, place in known.leaves:
        image = leaf.dtype == np.uint8 and len(leaf.shape) == 3
        for i, t in ((slice(None), slice(None)), (slice(1, 2), slice(2, 3)), (slice(2, 3), slice(1, None))):
            found = known.place(place).of(packed[i, t])  # from any byte on
            assert found.dtype == (torch.uint8 if image else dtype)
            assert torch.equal(found.to(dtype), torch.from_numpy(obs[i, t, place]).to(dtype))


def test_what_is_all_bytes_or_has_no_images_is_not_packed() -> None:
    for space in (spaces.Dict(a=IMAGE, b=OTHER), spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,)))):
        assert not Flat(space).mixed
    environments = make_environments("CartPole-v1", 1)
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    assert Sampler(environments, 4, packed=True)(policy).obs.dtype == torch.float32


def test_a_sampler_keeps_bytes_only_where_it_is_told_so() -> None:
    space = Flat(SPACE)
    for packed in (False, True):
        environments = make_environments(Sampling, 2, vectorization="sync")
        rollout = Sampler(environments, 6, seed=0, packed=packed)(Policy(space, environments.single_action_space))
        size = 7 * 4 + 64 + 189 + 3 if packed else 4 * space.shape[0]  # 3 bytes fill the last number
        assert rollout.obs.element_size() * rollout.obs.shape[-1] == size
        assert rollout.final_obs.dtype == rollout.obs.dtype == (torch.uint8 if packed else torch.float32)


PACKED: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"num_steps": 16, "minibatch_size": 8, "normalize_observations": True}),
    ("ppo", {"num_steps": 16, "minibatch_size": 16, "memory": "gru", "memory_size": 4, "sequence_length": 4}),
    ("ppo", {"num_steps": 16, "minibatch_size": 8, "policy_keys": ["goal", "camera"], "overlap": True}),
    ("trpo", {"num_steps": 16, "critic_minibatch_size": 16}),
    ("reinforce", {"episode_steps": 7}),
    ("reinforce", {"episode_steps": 7, "baseline": "optimal"}),
    ("grpo", {"episode_steps": 7, "minibatch_size": 2}),
]


@pytest.mark.parametrize(("method", "values"), PACKED, ids=[f"{x}-{i}" for i, (x, _) in enumerate(PACKED)])
def test_a_run_that_keeps_bytes_is_the_run_that_keeps_floats(
    method: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, parameters and metrics."""
    values = {"num_envs": 2, "iterations": 3, "hidden": (4,), "progress": False, **values}
    seen: list[torch.dtype] = []

    class Told(Sampler):
        def __call__(self, *modules: Any) -> Any:
            rollout = super().__call__(*modules)
            seen.append(getattr(rollout.obs, "obs", rollout.obs).dtype)
            return rollout

    def of_floats(*given: Any, packed: bool, **more: Any) -> Sampler:
        assert packed
        return Told(*given, **more)

    runs = []
    for sampler in (Told, of_floats):
        monkeypatch.setattr(control, "Sampler", sampler)
        runs.append(pg.train(method, Mixed, **values))
    assert {*seen} == {torch.uint8, torch.float32}
    assert torch.equal(*map(parameters, runs))
    assert untimed(runs[0].metrics) == untimed(runs[1].metrics)


def test_packed_observations_go_into_one_graph() -> None:
    space = spaces.Dict(a=IMAGE, b=spaces.Discrete(3), action_mask=spaces.MultiBinary(2))
    policy, obs = Policy(Flat(space), spaces.Discrete(2), hidden=()), mixed_batch(space)
    packed = torch.from_numpy(Flat(space).packed(obs))

    def logits(obs: torch.Tensor) -> torch.Tensor:
        return policy.network(policy.encode(obs)) + policy.allowed.of(obs)

    found = torch.compile(logits, backend="aot_eager", fullgraph=True)(packed)
    torch.testing.assert_close(found, logits(torch.from_numpy(obs).float()))


def test_modules_of_ones_own_get_vectors_of_floats() -> None:
    seen: list[torch.dtype] = []

    class Own(torch.nn.Module):
        def __init__(self, space: Any, actions: Any = None) -> None:
            super().__init__()
            self.last = torch.nn.Linear(space.shape[0], 3 if actions is not None else 1)

        def forward(self, obs: torch.Tensor) -> Any:
            seen.append(obs.dtype)
            out = self.last(obs / 255)
            return torch.distributions.Categorical(logits=out) if out.shape[-1] > 1 else out.squeeze(-1)

    for own in ({"policy": Own}, {"critic": Own}):
        pg.train("ppo", Sampling, num_envs=2, num_steps=8, minibatch_size=8, iterations=1, progress=False, **own)
        assert {*seen} == {torch.float32}
        seen.clear()
