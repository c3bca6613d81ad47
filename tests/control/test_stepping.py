"""Stepping: what counts, what the statistics contain, how resets work, and what the state restores."""

import io
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from probes import BROKEN, Broken, Counting, Known, limited

from policygrad.control import ObservationNormalizer, Policy, RewardScaler, Sampler, evaluate, make_environments
from policygrad.control.stepping import Stepping
from policygrad.errors import UserError


def stepping(*lengths: tuple[int, ...], mode: AutoresetMode = AutoresetMode.NEXT_STEP, **options: Any) -> Stepping:
    """Environments whose episodes have the given lengths, after their reset."""
    environments = SyncVectorEnv([lambda x=x: Counting(x) for x in lengths], autoreset_mode=mode)
    made = Stepping(environments, **options)
    made.reset()
    return made


def action(made: Stepping) -> np.ndarray:
    return np.zeros(made.environments.num_envs, np.int64)


def play(made: Stepping, steps: int = 8) -> None:
    made.reset()
    for _ in range(steps):
        made.step(action(made))


def test_a_step_that_only_resets_counts_in_nothing() -> None:
    made = stepping((2, 3))
    steps = [made.step(action(made)) for _ in range(4)]
    assert [x.reward.tolist() for x in steps] == [[1], [2], [0], [1]]
    assert [x.terminated.tolist() for x in steps] == [[False], [True], [False], [False]]
    assert made.obs is not None
    assert made.obs.tolist() == [[1, 1]]
    assert list(made.finished) == [(3.0, 2)]
    assert made.episode_length.tolist() == [1]


def test_same_step_resets_give_the_final_observation_and_the_next_one() -> None:
    made = stepping((2, 3), mode=AutoresetMode.SAME_STEP)
    first, second = made.step(action(made)), made.step(action(made))
    assert first.final is not None
    assert second.final is not None
    assert made.obs is not None
    assert (second.final.tolist(), made.obs.tolist()) == ([[0, 2]], [[1, 0]])
    assert second.ended.tolist() == [True]
    assert not made.resetting.any(), "the next step is a decision"


def test_with_whole_episodes_an_environment_waits_after_its_end() -> None:
    made = stepping((1,), (3,), whole_episodes=True)
    for _ in range(3):
        made.step(action(made))
    assert made.resetting.tolist() == [True, True]
    assert list(made.finished) == [(1.0, 1), (6.0, 3)]
    made.reset()
    assert made.resetting.tolist() == [False, False]


class GarbageOnReset(VectorWrapper):
    """Returns a reward and an end on the step that only resets."""

    garbage = np.nan

    def reset(self, **options: Any) -> Any:
        self.ended = np.zeros(self.num_envs, bool)
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        reward, resets = np.where(self.ended, self.garbage, reward), self.ended
        self.ended = terminated | truncated
        return obs, reward, terminated | resets, truncated | resets, info


@pytest.mark.parametrize("garbage", [1e9, np.nan, np.inf])
def test_the_values_of_a_reset_step_change_nothing(garbage: float) -> None:
    states = []
    for wrap in (lambda x: x, GarbageOnReset):
        environments = wrap(SyncVectorEnv([Counting, lambda: Counting((1, 4))]))
        environments.garbage = garbage
        made = Stepping(environments, reward_scaler=RewardScaler(2, 0.9))
        made.reset()
        steps = [made.step(action(made)) for _ in range(12)]
        states.append(([[x.tolist() for x in step[:3]] for step in steps], list(made.finished), made.metrics()))
    assert states[0] == states[1]


def test_observation_statistics_are_those_of_all_decisions() -> None:
    normalizer = ObservationNormalizer((2,))
    made, plain = stepping((2, 3), (1, 4), observation_normalizer=normalizer), stepping((2, 3), (1, 4))
    seen = []
    for _ in range(12):
        assert plain.obs is not None
        seen.append(plain.obs[~plain.resetting])
        made.step(action(made))
        plain.step(action(plain))
    assert plain.obs is not None
    seen = np.concatenate([*seen, plain.obs[~plain.resetting]]).astype(np.float64)
    assert normalizer.statistics.count == len(seen)
    np.testing.assert_allclose(normalizer.statistics.mean, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.statistics.var, seen.var(0), rtol=1e-12)


def test_the_reward_scale_is_the_standard_deviation_of_the_discounted_returns() -> None:
    scaler = RewardScaler(1, 0.9)
    made = stepping((2, 3), reward_scaler=scaler)
    scaled = [made.step(action(made)).reward[0] for _ in range(7)]
    # rewards 1 2 | 1 2 3 | with a reset step after each end
    returns = [1, 2.9, 1, 2.9, 3 + 0.9 * 2.9]
    assert scaler.statistics.count == len(returns)
    assert scaler.statistics.var == pytest.approx(np.var(returns), rel=1e-12)
    assert scaled[5] == pytest.approx(3 / np.std(returns), rel=1e-7)
    assert scaled[2] == scaled[6] == 0
    assert [x for x, _ in made.finished] == [3, 6], "returns are unscaled"


def test_a_reset_forgets_the_return_of_an_episode_that_was_cut() -> None:
    scaler = RewardScaler(1, 0.9)
    made = stepping((99,), reward_scaler=scaler)
    made.step(action(made))
    made.reset()
    assert scaler.returns.tolist() == made.episode_return.tolist() == made.episode_length.tolist() == [0]


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Box(0, 255, (2,), np.uint8), np.uint8),
        (spaces.Box(-9, 9, (2,), np.int16), np.int16),
        (spaces.Box(0, 60000, (2,), np.uint16), np.int64),
        (spaces.Box(0, 1, (2,), np.bool_), np.bool_),
        (spaces.Box(-1, 1, (2,), np.float64), np.float32),
        (spaces.Discrete(5), np.int64),
        (spaces.MultiBinary(2), np.int8),
    ],
    ids=str,
)
def test_integers_and_bools_keep_their_dtype_and_floats_get_the_default(space: spaces.Space, dtype: Any) -> None:
    class Observed(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = space
            self.shown: list[Any] = []

        def _obs(self) -> Any:
            self.shown.append(space.sample())
            return self.shown[-1]

    environment = Observed()
    made = Stepping(SyncVectorEnv([lambda: environment]))
    made.reset()
    assert made.obs is not None
    assert made.obs.dtype == dtype
    np.testing.assert_array_equal(made.obs[0], np.asarray(environment.shown[-1]).astype(dtype))


def test_normalized_integers_are_floats() -> None:
    class Image(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (2,), np.uint8)

        def _obs(self) -> Any:
            return super()._obs().astype(np.uint8)

    made = Stepping(SyncVectorEnv([Image]), observation_normalizer=ObservationNormalizer((2,)))
    made.reset()
    assert made.obs is not None
    assert made.obs.dtype == np.float32


@pytest.mark.parametrize("how", BROKEN)
def test_an_environment_that_misbehaves_is_one_short_line(how: str) -> None:
    made = Stepping(make_environments(lambda: Broken(how), 2))
    with pytest.raises(UserError, match="environment") as raised:
        play(made)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


def test_the_line_repeats_the_environments_own_error() -> None:
    made = Stepping(make_environments(Broken, 2))
    with pytest.raises(UserError, match=r"RuntimeError in step: the simulator crashed"):
        play(made)


@pytest.mark.parametrize("count", [1, 3])
def test_a_vector_environment_whose_rewards_have_the_wrong_shape_is_refused(count: int) -> None:
    class Wrong(VectorWrapper):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, reward[:, None], *rest

    made = Stepping(Wrong(SyncVectorEnv([Counting] * count)))
    made.reset()
    with pytest.raises(UserError, match="shape"):
        made.step(action(made))


@pytest.mark.parametrize("empty", [{}, {"final_obs": np.array([None], dtype=object)}], ids=["absent", "none"])
def test_a_same_step_reset_without_the_final_observation_is_refused(empty: Any) -> None:
    class Silent(VectorWrapper):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], empty

    made = Stepping(Silent(SyncVectorEnv([lambda: Counting((1,))], autoreset_mode=AutoresetMode.SAME_STEP)))
    made.reset()
    with pytest.raises(UserError, match=r"final_obs.*NEXT_STEP"):
        made.step(action(made))


def test_environments_that_never_reset_are_refused() -> None:
    with pytest.raises(UserError, match="does not reset itself"):
        stepping((1,), mode=AutoresetMode.DISABLED)


def test_only_a_box_can_be_normalized() -> None:
    class Numbered(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Discrete(9)

    with pytest.raises(UserError, match="Discrete"):
        Stepping(SyncVectorEnv([Numbered]), observation_normalizer=ObservationNormalizer(()))


def test_observations_without_a_shape_are_to_be_flattened() -> None:
    class Named(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Dict({"a": spaces.Discrete(2)})

    with pytest.raises(UserError, match=r"Dict.*make_environments"):
        Stepping(SyncVectorEnv([Named]))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="seed is -1"):
        Stepping(SyncVectorEnv([Counting]), seed=-1)


def grouped(seed: int = 0, size: int = 3) -> Stepping:
    return Stepping(SyncVectorEnv([limited(Known, 8)] * 6), seed=seed, whole_episodes=True, group_size=size)


def starts(made: Stepping, resets: int) -> np.ndarray:
    """The first observations, [resets, B, D]."""
    found = []
    for _ in range(resets):
        made.reset()
        assert made.obs is not None
        found.append(made.obs)
    return np.stack(found)


def test_the_environments_of_a_group_start_the_same_and_groups_differ() -> None:
    first, second = starts(grouped(), 2)
    for obs in (first, second):
        assert (obs[:3] == obs[0]).all()
        assert (obs[3:] == obs[3]).all()
        assert (obs[0] != obs[3]).any()
    assert (first != second).any(1).all(), "every reset draws new seeds"


def test_the_seeds_of_groups_follow_from_the_seed_and_are_part_of_the_state() -> None:
    made = grouped()
    whole = starts(made, 4)
    np.testing.assert_array_equal(whole, starts(grouped(), 4))
    assert (whole != starts(grouped(seed=1), 4)).any()
    other, again = grouped(), grouped(seed=7)
    starts(other, 2)
    again.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(whole[2:], starts(again, 2))


def test_a_vector_environment_with_a_single_seed_cannot_make_groups() -> None:
    made = Stepping(CartPoleVectorEnv(4), seed=0, whole_episodes=True, group_size=2)
    with pytest.raises(UserError, match='vectorization="sync"'):
        made.reset()


def test_environments_that_ignore_their_seed_cannot_make_groups() -> None:
    class Unseeded(Known):
        def reset(self, **options: Any) -> Any:
            return super().reset(seed=id(self) % 2**31)

    made = Stepping(SyncVectorEnv([Unseeded] * 2), whole_episodes=True, group_size=2)
    with pytest.raises(UserError, match="depends on nothing but its seed"):
        made.reset()


def test_an_error_in_a_groups_reset_is_reported_as_such() -> None:
    made = Stepping(make_environments(lambda: Broken("raises in reset"), 2), whole_episodes=True, group_size=2)
    with pytest.raises(UserError, match="no such level"):
        made.reset()


def test_the_state_is_tensors_numbers_and_strings_and_restores_everything() -> None:
    def new() -> Stepping:
        return Stepping(
            make_environments(limited(Known, 8), 2),
            seed=0,
            observation_normalizer=ObservationNormalizer((3,)),
            reward_scaler=RewardScaler(2, 0.9),
        )

    made, act = new(), np.zeros((2, 2), np.float32)
    made.reset()
    for _ in range(12):
        made.step(act)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = new()
    other.environments = made.environments  # whose state is their own
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(made.state_dict()) == str(state)
    assert made.finished
    made.step(act)
    assert str(other.state_dict()) == str(state), "the state is a copy"
    assert str(made.state_dict()) != str(state)


def test_environments_that_have_not_begun_start_new_episodes_from_the_state_as_it_is_loaded() -> None:
    def new() -> Sampler:
        return Sampler(make_environments(limited(Known, 8), 2), 6, seed=0)

    known = Known()
    made, policy = new(), Policy(known.observation_space, known.action_space, hidden=(4,))
    made(policy)
    state = made.state_dict()
    rollouts = []
    for _ in range(2):
        other = new()
        other.load_state_dict(state)
        torch.manual_seed(0)
        rollouts.append(other(policy))
        assert other.steps > made.steps
    assert torch.equal(rollouts[0].obs, rollouts[1].obs)
    assert not torch.equal(rollouts[0].obs[:, 0], torch.as_tensor(state["obs"])), "new episodes"
    assert made(policy).mask.any(), "and those of the first sampler go on"


def test_the_metrics_are_those_of_the_last_100_episodes() -> None:
    made = stepping((1,))
    assert made.metrics() == {"steps": 0, "episodes": 0}
    made.finished.extend((float(i), i) for i in range(150))
    assert made.metrics() == {"steps": 0, "episodes": 0, "return": 99.5, "length": 99.5}


class Seeded(Known):
    """Keeps every seed that any copy was reset with."""

    seeds: ClassVar[list[int]] = []

    def reset(self, **options: Any) -> Any:
        if options.get("seed") is not None:
            self.seeds.append(options["seed"])
        return super().reset(**options)


def seeds_of(play: Any) -> set[int]:
    Seeded.seeds.clear()
    play()
    return set(Seeded.seeds)


def test_no_two_runs_share_the_seed_of_an_environment() -> None:
    """Neither those of neighboring seeds, nor a run and its evaluation, nor groups."""

    def training(seed: int, size: int = 1) -> Any:
        environments = SyncVectorEnv([limited(Seeded, 8)] * 8)
        return Stepping(environments, seed=seed, whole_episodes=True, group_size=size).reset

    policy = Policy(spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1.0, 1.0, (2,)), hidden=(4,))
    of_training = [seeds_of(training(seed)) for seed in range(101)] + [seeds_of(training(1000))]
    of_evaluation = [seeds_of(partial(evaluate, policy, limited(Seeded, 8), 8, seed=seed)) for seed in (0, 1, 1000)]
    assert [len(x) for x in of_training + of_evaluation] == [8] * 105
    assert len(set.union(*of_training, *of_evaluation)) == 8 * 105
    assert len(seeds_of(training(0, size=2))) == 4


def test_a_native_vector_environment_gets_one_seed_that_follows_from_the_runs() -> None:
    given = []

    class Native(VectorWrapper):
        def reset(self, *, seed: Any = None, **options: Any) -> Any:
            given.append(seed)
            return super().reset(seed=seed, **options)

    for seed in (0, 0, 1, None):
        made = Stepping(Native(CartPoleVectorEnv(4)), seed=seed)
        made.reset()
        made.reset()
    assert given[0] == given[2] not in (0, None)
    assert given[4] not in (0, 1, given[0], given[0] + 1, None)
    assert given[1] is given[3] is given[5] is given[6] is None, "later resets go on with the environment's own stream"


class Told(Counting):
    """Says in its info whether it has succeeded, how far it came, and something only now and then."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        info: dict[str, Any] = {"is_success": terminated, "distance": 10 * self.t}
        return obs, reward, terminated, truncated, info | ({"rare": 4.0} if self.episode == 1 else {})


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_the_numbers_in_the_infos_of_episodes_that_end_are_metrics(mode: AutoresetMode) -> None:
    made = Stepping(SyncVectorEnv([lambda: Told((2, 3))], autoreset_mode=mode))
    made.reset()
    while made.episodes < 4:  # of 2, 3, 2, 3 steps; the first and the third terminate
        made.step(action(made))
    found = {name: x for name, x in made.metrics().items() if "/" in name or name == "success"}
    assert found == {"success": 0.5, "info/distance": 25.0, "info/rare": 4.0}
    again = Stepping(SyncVectorEnv([lambda: Told((2, 3))], autoreset_mode=mode))
    again.load_state_dict(made.state_dict())
    assert {name: again.metrics()[name] for name in found} == found


def test_an_action_beyond_the_spaces_type_is_refused() -> None:
    made = Stepping(SyncVectorEnv([limited(Known, 8)]))
    made.reset()
    with pytest.raises(UserError, match="the policy's action is beyond float32"):
        made.step(np.array([[np.inf, 0]], np.float32))
