"""Masks of actions: the distribution is that of the allowed actions, and none but these reach the environment."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from torch.distributions import Bernoulli, Categorical, kl_divergence

import policygrad as pg
from policygrad.control import ObservationNormalizer, Policy, Sampler, evaluate, make_environments
from policygrad.control.acting import Mode
from policygrad.control.encoders import make_encoder
from policygrad.control.masks import choices, flat_mask, random_action, random_masks
from policygrad.control.processes import step_time
from policygrad.control.spaces import Flat, FlatActions, describe, rebuild
from policygrad.errors import Note, UserError

DISCRETE, MULTI = spaces.Discrete(4, start=3), spaces.MultiDiscrete([2, 3], start=[1, -1])
COINS = spaces.MultiBinary(3)
PAIR = spaces.Tuple([spaces.Box(-1, 1, (2,)), DISCRETE, spaces.Dict({"a": MULTI, "b": COINS})])
KINDS = {"discrete": DISCRETE, "multi": MULTI, "coins": COINS}
each_kind = pytest.mark.parametrize("kind", KINDS)


def dict_space(action_space: spaces.Space, n: int = 2) -> spaces.Dict:
    mask = spaces.Box(0, 1, (sum(choices(action_space)),), np.int8)
    return spaces.Dict({"observation": spaces.Box(-9, 9, (n,), np.float32), "action_mask": mask})


class Forbidding(gymnasium.Env):
    """Allows what its random mask says, which changes with every step, and fails at any other action.

    The reward of an action is 1 for each of its parts that is the highest choice, which is allowed now and then. With
    `key` the mask is a part of the observation, else of the info. sampled: as the action space samples with it.
    """

    def __init__(self, kind: str = "discrete", key: bool = True, last: bool = True, sampled: bool = False) -> None:
        self.action_space, self.key, self.last, self.sampled = KINDS[kind], key, last, sampled
        whole = dict_space(self.action_space)
        self.observation_space = whole if key else whole["observation"]

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.t = 0
        return self._next()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        first = np.cumsum([0, *choices(self.action_space)[:-1]])
        chosen = np.ravel(action - getattr(self.action_space, "start", 0)).astype(int)
        if not self.mask[first + chosen].all():
            raise RuntimeError(f"action {action} is forbidden by {self.mask}")
        self.t += 1
        reward = float((chosen == np.array(choices(self.action_space)) - 1).sum())
        obs, info = self._next()
        over = self.t == 5
        if over and not self.last:
            obs, info = (obs | {"action_mask": np.zeros_like(self.mask)} if self.key else obs), {}
        return obs, reward, over, False, info

    def _next(self) -> tuple[Any, dict[str, Any]]:
        masks = []
        for n in choices(self.action_space):
            masks.append(self.np_random.integers(0, 2, n))
            masks[-1][self.np_random.integers(n)] = 1
        self.mask = np.concatenate(masks).astype(np.int8)
        obs = self.np_random.normal(size=2).astype(np.float32)
        said = as_sampled(self.mask, self.action_space) if self.sampled else self.mask
        return ({"observation": obs, "action_mask": said}, {}) if self.key else (obs, {"action_mask": said})


def as_sampled(mask: np.ndarray, space: spaces.Space) -> Any:
    """A mask as Gymnasium's spaces take it in `sample`."""
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(np.split(mask, np.cumsum(space.nvec)[:-1]))
    if isinstance(space, spaces.MultiBinary):
        return np.array(
            [{(1, 0): 0, (0, 1): 1, (1, 1): 2}[tuple(pair)] for pair in mask.reshape(-1, 2).tolist()], np.int8
        )
    return mask


def policy_of(kind: str) -> Policy:
    policy = Policy(Flat(dict_space(KINDS[kind])), KINDS[kind], hidden=(8,))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape))
    return policy


# The distribution


@each_kind
def test_log_probabilities_entropy_and_divergence_are_those_of_the_allowed_actions(kind: str, float64: None) -> None:
    policy, other = policy_of(kind), policy_of(kind)
    masks = torch.from_numpy(random_masks(50, KINDS[kind]))
    obs = torch.cat([masks, torch.randn(50, 2)], -1).unsqueeze(1)
    distribution, q = policy(obs), policy_of(kind)(obs)
    q = other(obs)
    action = distribution.sample()
    logp, entropy, divergence = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    for i in range(50):
        features = obs[i, 0, policy.mask.stop :]
        logits, other_logits = policy.network(features), other.network(features)
        at = 0
        for part, n in enumerate(choices(KINDS[kind])):
            kept = masks[i, at : at + n].nonzero()[:, 0]
            if kind == "coins":
                p, p_other = (Bernoulli(logits=x[part]).probs for x in (logits, other_logits))
                pair, other_pair = (torch.stack([(1 - x).log(), x.log()]) for x in (p, p_other))
            else:
                pair, other_pair = logits[at : at + n], other_logits[at : at + n]
            one, two = Categorical(logits=pair[kept]), Categorical(logits=other_pair[kept])
            chosen = int(action[i, 0].reshape(-1)[part])
            assert chosen in kept
            logp[i] += one.log_prob((kept == chosen).nonzero()[0, 0])
            entropy[i] += one.entropy()
            divergence[i] += kl_divergence(one, two)
            at += n
    torch.testing.assert_close(distribution.log_prob(action)[:, 0], logp)
    torch.testing.assert_close(distribution.entropy()[:, 0], entropy)
    torch.testing.assert_close(kl_divergence(distribution, q)[:, 0], divergence)


@each_kind
def test_a_forbidden_choice_has_no_gradient(kind: str, float64: None) -> None:
    policy = policy_of(kind)
    masks = torch.from_numpy(random_masks(20, KINDS[kind]))
    output = torch.randn(20, policy.head.size, requires_grad=True)
    distribution = policy.head(policy.head.masked(output, masks != 0))
    (distribution.log_prob(distribution.sample()) + distribution.entropy()).sum().backward()
    open_choice = masks != 0 if kind != "coins" else masks.unflatten(-1, (3, 2)).all(-1)
    assert (output.grad[~open_choice] == 0).all()
    if kind == "discrete":
        several = (masks.sum(-1, keepdim=True) > 1) & open_choice
        assert (output.grad[several] != 0).all()


def test_the_network_does_not_see_the_mask() -> None:
    policy, obs = policy_of("discrete"), torch.randn(3, 1, 6)
    other = obs.clone()
    obs[..., :4], other[..., :4] = torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 0])
    one, two = policy(obs).logits, policy(other).logits
    torch.testing.assert_close(one[..., 0] - one[..., 1], two[..., 0] - two[..., 1])
    assert policy.network[0].in_features == 2


# Sampling


@pytest.mark.parametrize("space", [*KINDS.values(), PAIR], ids=[*KINDS, "pair"])
def test_random_actions_are_all_that_is_allowed(space: Any) -> None:
    taken: Any = FlatActions(space) if space is PAIR else space
    observed, generator = Flat(dict_space(taken)), np.random.default_rng(0)
    for mask in random_masks(5, taken).astype(np.int8):
        obs = spaces.flatten(observed.of, {"action_mask": mask, "observation": np.zeros(2, np.float32)})
        seen = [random_action(obs, observed, taken, generator) for _ in range(200)]
        assert all(taken.contains(x) for x in seen)
        if space is PAIR:  # the first two numbers are of the Box
            drawn, starts = np.array(seen)[:, 2:], np.array([3, 1, -1, 0, 0, 0])
        else:
            drawn, starts = np.reshape(seen, (200, -1)), getattr(space, "start", 0)
        allowed = np.split(mask, np.cumsum(choices(taken))[:-1])
        for column, each in zip((drawn - starts).T, allowed, strict=True):
            assert set(column.tolist()) == set(np.flatnonzero(each).tolist())


@each_kind
@pytest.mark.parametrize("key", [True, False])
def test_a_copy_whose_masks_are_strict_can_be_measured(kind: str, key: bool) -> None:
    """It raises an error at what is forbidden."""
    how = "auto" if key else "info"
    options = {"kind": kind, "key": key}
    environments: Any = make_environments(Forbidding, 1, action_mask=how, env_options=options)
    assert step_time(environments.envs[0]) > 0


@each_kind
@pytest.mark.parametrize("key", [True, False], ids=["key", "info"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_only_allowed_actions_are_taken(kind: str, key: bool, vectorization: str) -> None:
    environments = make_environments(
        Forbidding,
        3,
        vectorization=vectorization,
        action_mask="auto" if key else "info",
        env_options={"kind": kind, "key": key},
    )
    try:
        policy = Policy(environments.single_observation_space, environments.single_action_space)
        rollout = Sampler(environments, 64, seed=0)(policy)
        again = policy(rollout.obs).log_prob(rollout.action)
        torch.testing.assert_close(again.where(rollout.mask, 0.0), rollout.logp)
        mask = rollout.obs[..., policy.mask][rollout.mask]
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    finally:
        environments.close()


@each_kind
@pytest.mark.parametrize("own", [False, True], ids=["made here", "a vector environment"])
def test_the_info_may_have_the_masks_that_spaces_sample_with(kind: str, own: bool) -> None:
    """The rollouts are the same, and Gymnasium draws from what these masks allow and from all of it."""

    def sampled(sampled: bool) -> pg.Rollout:
        def make() -> gymnasium.Env:
            return Forbidding(kind, key=False, sampled=sampled)

        given = SyncVectorEnv([make] * 2, autoreset_mode=AutoresetMode.NEXT_STEP) if own else make
        environments = make_environments(given, 2, action_mask="info", vectorization="auto" if own else "sync")
        torch.manual_seed(0)
        policy = Policy(environments.single_observation_space, environments.single_action_space)
        torch.manual_seed(0)
        return Sampler(environments, 30, seed=0)(policy)

    one, other = sampled(False), sampled(True)
    assert torch.equal(one.obs, other.obs)
    assert torch.equal(one.action, other.action)
    assert torch.equal(one.logp, other.logp)
    space = KINDS[kind]
    for mask in random_masks(5, space).astype(np.int8):
        first = np.cumsum([0, *choices(space)[:-1]])
        drawn = [space.sample(mask=as_sampled(mask, space)) for _ in range(200)]
        seen = np.zeros_like(mask)
        for action in drawn:
            seen[first + np.ravel(action - getattr(space, "start", 0)).astype(int)] = 1
        assert seen.tolist() == mask.tolist() == flat_mask(as_sampled(mask, space), space).tolist()


def test_a_tuple_of_such_masks_is_one_for_each_part() -> None:
    space = FlatActions(PAIR)
    mask = random_masks(1, space)[0].astype(np.int8)
    parts = (mask[:4], as_sampled(mask[4:9], MULTI), as_sampled(mask[9:], COINS))
    assert flat_mask(parts, space).tolist() == mask.tolist()


@pytest.mark.parametrize("key", [True, False], ids=["key", "info"])
@pytest.mark.parametrize("whole_episodes", [True, False])
def test_a_mask_may_be_missing_or_0_where_an_episode_ended(key: bool, whole_episodes: bool) -> None:
    options = {"key": key, "last": False}
    environments = make_environments(
        Forbidding, 2, action_mask="auto" if key else "info", env_options=options, vectorization="sync"
    )
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    rollout = Sampler(environments, 20, seed=0, whole_episodes=whole_episodes)(policy)
    assert rollout.ended.any()
    assert rollout.logp.isfinite().all()
    assert policy(rollout.obs).entropy().isfinite().all()


class Vector(VectorEnv):
    """Three environments at once, whose masks are in the info; they reset on the next step."""

    def __init__(self, **_: Any) -> None:
        self.num_envs, self.metadata = 3, {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = spaces.Discrete(2), spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, 3)
        self.action_space = batch_space(self.single_action_space, 3)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.generator = np.random.default_rng(seed)
        return self._next()

    def step(self, actions: Any) -> Any:
        assert self.masks[np.arange(3), actions].all()
        obs, info = self._next()
        return obs, actions.astype(float), self.generator.random(3) < 0.1, np.zeros(3, bool), info

    def _next(self) -> Any:
        self.masks = np.eye(3, dtype=bool)[self.generator.integers(0, 3, 3)]
        return self.generator.integers(0, 2, 3), {"action_mask": self.masks}


def test_a_vector_environment_has_the_masks_of_all_in_its_info() -> None:
    environments = make_environments(Vector(), 3, action_mask="info")
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    rollout = Sampler(environments, 50, seed=0)(policy)
    assert (rollout.reward == rollout.action)[rollout.mask].all()
    assert rollout.logp.abs().max() == 0  # one choice each


def test_off_leaves_the_mask_a_feature() -> None:
    environments = make_environments(Forbidding, 1, action_mask="off")
    assert environments.single_observation_space.mask is None
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    assert policy.network[0].in_features == 6
    with pytest.raises(UserError, match="is forbidden by"):
        Sampler(environments, 100, seed=0)(policy)


def test_acting_without_noise_is_allowed_too() -> None:
    environments = make_environments(Forbidding, 4, vectorization="sync")
    policy = policy_of("discrete")
    Sampler(environments, 60, seed=0, whole_episodes=True).play(Mode(policy))
    found = evaluate(policy, Forbidding, 20)
    assert found.episodes == 20


def test_a_normalizer_leaves_masks_alone() -> None:
    environments = make_environments(Forbidding, 4, vectorization="sync")
    space = environments.single_observation_space
    normalizer = ObservationNormalizer(space.shape, space.kept)
    rollout = Sampler(environments, 40, seed=0, observation_normalizer=normalizer)(policy_of("discrete"))
    mask, rest = rollout.obs[..., space.mask], rollout.obs[..., space.mask.stop :]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(float(rest[:, 10:].std()) - 1) < 0.2


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_mask_that_is_not_read_is_mentioned_once(vectorization: str) -> None:
    how = {"vectorization": vectorization, "env_options": {"key": False}}

    def notes(action_mask: str) -> list[str]:
        environments = make_environments(Forbidding, 2, action_mask=action_mask, **how)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            sample = Sampler(environments, 3, seed=0, whole_episodes=True)
            for _ in range(2):
                sample.stepping.reset()
        environments.close()
        return [str(x.message) for x in found if issubclass(x.category, Note)]

    said = "the environment's info has an action_mask, which is not read: set action_mask to info, or off"
    assert notes("auto") == [said]
    assert notes("off") == notes("info") == []


# Spaces


def test_a_flat_space_knows_its_parts_and_comes_back_from_its_description() -> None:
    inner = spaces.Dict(
        {"b": spaces.Discrete(3), "action_mask": spaces.MultiBinary(4), "a": spaces.Tuple([spaces.Box(-1, 1, (2, 2))])}
    )
    flat = Flat(inner)
    obs = inner.sample()
    vector = torch.from_numpy(spaces.flatten(inner, obs))
    parts = flat.parts(vector)
    assert parts["action_mask"].tolist() == obs["action_mask"].tolist()
    assert parts["b"].argmax() == obs["b"]
    assert torch.equal(make_encoder(flat)(vector[None, None])[0, 0], torch.cat([parts["a"], parts["b"]]))
    again = rebuild(describe(flat))
    assert again == flat
    assert again.mask == flat.mask
    assert describe(again) == describe(flat)


def test_a_mask_of_a_tuple_has_the_choices_of_its_parts(float64: None) -> None:
    space, n = FlatActions(PAIR), 4 + 5 + 6
    policy = Policy(Flat(spaces.Dict({"o": spaces.Box(-1, 1, (2,)), "action_mask": spaces.MultiBinary(n)})), space)
    masks = torch.from_numpy(random_masks(30, space))
    distribution = policy(torch.cat([masks, torch.randn(30, 2)], -1).unsqueeze(1))
    action = distribution.of_parts(distribution.sample())
    assert masks[torch.arange(30), action[1][:, 0].long()].all()
    start = 4
    for part in action[2][:, 0].long().unbind(-1):
        size = (2, 3)[start > 4]
        assert masks[torch.arange(30), start + part].all()
        start += size
    free, bound = distribution.parts[0], policy(torch.cat([torch.ones(30, n), torch.randn(30, 2)], -1).unsqueeze(1))
    assert free.log_prob(action[0]).isfinite().all()
    assert (distribution.parts[3].entropy() < bound.parts[3].entropy()).any()


class Hybrid(gymnasium.Env):
    """Actions of two parts, and a mask of the choices of the first in its info."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Dict(turn=spaces.Discrete(3), speed=spaces.Box(-1, 1, (1,)))

    def reset(self, **options: Any) -> Any:
        super().reset(seed=options.get("seed"))
        return self._next()

    def step(self, action: Any) -> Any:
        assert self.mask[action["turn"]]
        obs, info = self._next()
        return obs, 0.0, bool(self.np_random.random() < 0.1), False, info

    def _next(self) -> Any:
        self.mask = np.eye(3, dtype=np.int8)[self.np_random.integers(3)]
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {"action_mask": self.mask}


@pytest.mark.parametrize("own", [False, True], ids=["made here", "a vector environment"])
def test_the_info_has_masks_of_structured_actions(own: bool) -> None:
    given = SyncVectorEnv([Hybrid] * 2, autoreset_mode=AutoresetMode.NEXT_STEP) if own else Hybrid
    environments = make_environments(given, 2, action_mask="info")
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    rollout = Sampler(environments, 60, seed=0)(policy)
    assert policy(rollout.obs).parts[0].entropy().max() == 0  # one choice each


# Whole runs


@pytest.mark.parametrize("method", ["reinforce", "a2c", "npg", "trpo", "ppo", "grpo"])
def test_every_method_plays_under_masks(method: str, tmp_path: Any) -> None:
    task, out = "tests.control.test_masks:Forbidding", tmp_path / "run"
    run = pg.train(method, task, steps=600, seed=0, out=out, progress=False, wrap=["TimeLimit:9"])
    again = pg.Run.load(out, trust=True)
    obs = {"observation": np.zeros(2, np.float32), "action_mask": np.array([0, 0, 1, 0], np.int8)}
    assert again.act(obs) == run.act(obs) == 5
    assert again.evaluate(3).returns == run.evaluate(3).returns


@pytest.mark.parametrize("method", ["a2c", "ppo"])
def test_the_best_action_that_is_allowed_is_learned(method: str) -> None:
    """The highest choice alone is paid, and forbidden now and then."""
    options: dict[str, Any] = {"learning_rate": 3e-3, "num_envs": 8, "num_steps": 32, "seed": 0}
    run = pg.train(method, Forbidding, steps=12_000, progress=False, **options)
    masks = random_masks(200, DISCRETE)
    obs = {"observation": np.zeros((200, 2), np.float32), "action_mask": masks.astype(np.int8)}
    action = run.act(obs) - DISCRETE.start
    assert masks[np.arange(200), action].all()
    assert (action[masks[:, 3] == 1] == 3).all()


def test_masks_from_the_info_are_kept_with_the_run(tmp_path: Any) -> None:
    task, out = "tests.control.test_masks:Forbidding", tmp_path / "run"
    options = {"env_options": {"key": False}, "action_mask": "info", "normalize_observations": True}
    run = pg.train("ppo", task, steps=1000, out=out, progress=False, **options)
    assert pg.Run.load(out, trust=True).evaluate(3).returns == run.evaluate(3).returns


# Refused


@pytest.mark.parametrize(
    ("space", "action_space", "message"),
    [
        (dict_space(spaces.Discrete(3)), spaces.Discrete(4), r"the action_mask has 3 numbers, and .* 4 choices"),
        (dict_space(spaces.Discrete(3)), spaces.Box(-1, 1, (3,)), "action_mask is for Discrete"),
    ],
)
def test_a_mask_of_another_size_is_refused(space: Any, action_space: Any, message: str) -> None:
    class Wrong(gymnasium.Env):
        def __init__(self) -> None:
            self.observation_space, self.action_space = space, action_space

        def step(self, action: Any) -> Any: ...

    with pytest.raises(UserError, match=message):
        pg.train("ppo", Wrong, steps=10, progress=False)


class Saying(Forbidding):
    """Has this mask in its second step."""

    def __init__(self, mask: Any, key: bool = True) -> None:
        super().__init__(key=key)
        self.said = mask

    def _next(self) -> Any:
        obs, info = super()._next()
        if self.t == 1:
            (obs if self.key else info)["action_mask"] = self.said
        return obs, info


@pytest.mark.parametrize(
    ("mask", "key", "message"),
    [
        (np.zeros(4, np.int8), True, "environment 0 of 1 allows no action: its action_mask is 0 everywhere"),
        (np.zeros(4, np.int8), False, "environment 0 of 1 allows no action"),
        (np.array([1, 2, 0, 0], np.int8), True, "environment 0 of 1 has 2 in its action_mask: use 0 and 1"),
        (np.ones(3, np.int8), True, r"observation of shape \(3,\), but its observation_space says \(4,\)"),
        (np.ones(3, np.int8), False, r"observation of shape \(3,\), but its observation_space says \(4,\)"),
        (None, False, "the info of the environment's step has no action_mask"),
    ],
)
def test_a_bad_mask_is_one_clear_line(mask: Any, key: bool, message: str) -> None:
    how = {"action_mask": "auto" if key else "info"}
    with pytest.raises(UserError, match=message) as raised:
        pg.train("ppo", lambda: Saying(mask, key), steps=50, num_envs=1, progress=False, **how)
    assert len(str(raised.value)) <= 200


def test_a_mask_of_coins_that_is_neither_form_is_refused() -> None:
    with pytest.raises(UserError, match=r"of 3 coins is \[0, 3, 1\]: use 0 or 1 for one that must be so, 2") as raised:
        flat_mask(np.array([0, 3, 1], np.int8), COINS)
    assert len(str(raised.value)) <= 200


def test_an_observation_that_allows_nothing_is_refused_in_acting() -> None:
    policy = policy_of("discrete")
    obs = {"observation": np.zeros(2, np.float32), "action_mask": np.zeros(4, np.int8)}
    with pytest.raises(UserError, match="observation 0 of 1 allows no action"):
        pg.control.acting.act(policy, obs, policy.observation_space.of, DISCRETE)


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(UserError, match="choose one of auto, info, off"):
        make_environments(Forbidding, action_mask="key")
