"""One seat of a game, the others played by opponents: rewards, masks, seats and chance, against games by hand."""

import warnings
from collections import Counter
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from nim import Nim, best, best_of_seats
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import policygrad as pg
from policygrad.control import Policy, Sampler, make_environments
from policygrad.control.memory import rows_of
from policygrad.control.seats import Asked, Frozen, Opponents, Seat, Selves, SideBySide, play, random_player
from policygrad.errors import Note, UserError
from policygrad.rollout import state_size
from policygrad.train.checkpoints import load_policy
from policygrad.train.elo import elo


def one(obs: Any, info: Any, space: Any, generator: Any) -> int:
    """Always takes one."""
    return 0


def played(seat: Seat, actions: list[int]) -> list[tuple[float, float, bool]]:
    """Heap, reward and end of each step."""
    found = []
    for action in actions:
        obs, reward, terminated, truncated, _ = seat.step(action)
        assert not truncated
        found.append((float(obs["observation"][0]), reward, terminated))
    return found


def in_seat(name: str, **options: Any) -> tuple[Seat, Any]:
    """A seat of this name, after its reset."""
    seat = Seat(Nim(**options), Opponents(one))
    for seed in range(20):
        obs, _ = seat.reset(seed=seed)
        if seat.agents[seat.seat] == name:
            return seat, obs
    raise AssertionError


def test_a_step_goes_on_to_the_seats_next_turn() -> None:
    """Against one who always takes one: 7 - 2 - 1 - 2 - 1, the last is mine; 7 - 1 - 2 - 1 - 2, the last is his."""
    seat, obs = in_seat("first")
    assert obs["observation"] == 7
    assert played(seat, [1, 1, 0]) == [(4, 0, False), (1, 0, False), (0, 1, True)]
    seat, obs = in_seat("second")
    assert obs["observation"] == 6
    assert played(seat, [1, 1]) == [(3, 0, False), (0, -1, True)]


def test_the_info_at_the_end_says_who_won() -> None:
    ends = {}
    for name, actions in (("first", [1, 1, 0]), ("second", [1, 1])):
        seat, _ = in_seat(name)
        for action in actions:
            *_, ends[name] = seat.step(action)
    assert ends["first"] == {"is_success": 1, "draw": 0, "success_first": 1}
    assert ends["second"] == {"is_success": 0, "draw": 0, "success_second": 0}


def test_seats_are_drawn_and_follow_from_the_seed() -> None:
    def seats(seed: int) -> list[int]:
        seat = Seat(Nim(), Opponents())
        return [seat.reset(seed=seed if k == 0 else None) and seat.seat for k in range(200)]

    assert seats(3) == seats(3) != seats(4)
    assert 70 < sum(seats(3)) < 130


def test_a_game_may_end_before_the_seats_turn() -> None:
    """With a heap of one, the second player never has a turn: such games are played past."""
    seat = Seat(Nim(heap=1), Opponents())
    assert {seat.reset(seed=k) and seat.seat for k in range(20)} == {0}


def test_a_game_without_turns_is_one_line() -> None:
    class Over(Nim):
        def reset(self, seed: Any = None, options: Any = None) -> None:
            super().reset()
            self.over = True

    with pytest.raises(UserError, match="ended 100 times before it was the turn"):
        Seat(Over(), Opponents()).reset(seed=0)


@pytest.mark.parametrize("where", ["obs", "info"])
def test_a_random_player_takes_what_the_mask_allows(where: str) -> None:
    mask, generator = np.array([0, 1, 0, 1, 1]), np.random.default_rng(0)
    obs, info = ({"action_mask": mask}, {}) if where == "obs" else (np.zeros(2), {"action_mask": mask})
    drawn = Counter(random_player(obs, info, spaces.Discrete(5, start=2), generator) for _ in range(3000))
    assert set(drawn) == {3, 5, 6}
    assert all(abs(count - 1000) < 120 for count in drawn.values())


def test_a_random_player_keeps_to_masks_of_several_choices() -> None:
    generator, space = np.random.default_rng(0), spaces.MultiDiscrete([2, 3], start=[1, -1])
    for mask in (np.array([1, 1, 0, 1, 1]), (np.array([1, 1]), np.array([0, 1, 1]))):
        drawn = Counter(tuple(random_player(0, {"action_mask": mask}, space, generator).tolist()) for _ in range(2000))
        assert set(drawn) == {(1, 0), (1, 1), (2, 0), (2, 1)}
        assert all(abs(count - 500) < 100 for count in drawn.values())
    for mask in (np.array([1, 0, 1, 1]), np.array([0, 2], np.int8)):
        found = [random_player(0, {"action_mask": mask}, spaces.MultiBinary(2), generator) for _ in range(99)]
        assert {tuple(x.tolist()) for x in found} == {(0, 0), (0, 1)}


def test_a_random_player_of_a_game_without_masks() -> None:
    generator = np.random.default_rng(0)
    assert {random_player(0, {}, spaces.Discrete(3), generator) for _ in range(50)} == {0, 1, 2}
    assert random_player(0, {}, spaces.Box(-1, 1, (2,)), generator).shape == (2,)
    with pytest.raises(UserError, match="allows none"):
        random_player({"action_mask": np.zeros(3)}, {}, spaces.Discrete(3), generator)


def test_nim_is_learned_as_well_as_it_can_be() -> None:
    """Against a random player the best result is known: who can leave a multiple of three has won."""
    how: Any = {"num_envs": 32, "num_steps": 16, "minibatch_size": 64, "learning_rate": 0.003, "gamma": 1}
    # Without the entropy some seeds keep to a worse way to play; which, depends on the processor's rounding.
    run = pg.train("ppo", Nim, steps=8_000, entropy_coefficient=0.03, progress=False, compile="off", **how)
    assert best(7) == 1.0
    found = run.evaluate(400)
    assert found.return_mean == pytest.approx(best_of_seats(7), abs=0.08)
    assert found.success is not None
    assert found.info["success_first"] == 1
    assert found.info["draw"] == 0


def test_a_mask_may_be_in_the_info() -> None:
    run = pg.train("ppo", lambda: Nim(mask="info"), action_mask="info", num_envs=4, steps=500, progress=False)
    assert run.metrics[-1]["episodes"] > 100


def test_a_run_goes_on_bit_for_bit() -> None:
    how: Any = {"num_envs": 4, "num_steps": 19, "iterations": 6}
    whole = pg.Training("ppo", Nim, **how)
    list(whole)
    first = pg.Training("ppo", Nim, **how)
    for _ in range(3):
        next(first)
    state, second = first.state_dict(), pg.Training("ppo", Nim, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        second.load_state_dict(state)
    list(second)
    for a, b in zip(whole.run.policy.parameters(), second.run.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrappers_processes_and_restarts_are_as_for_any_environment() -> None:
    environments = make_environments(Nim, 2, wrap=["TimeLimit:2"], restarts=1)
    assert all(isinstance(x.unwrapped, Seat) for x in environments.envs)  # type: ignore[attr-defined]
    run = pg.train("ppo", Nim, vectorization="async", num_envs=2, num_steps=32, iterations=1, progress=False)
    assert run.metrics[-1]["episodes"] > 5


def test_a_game_is_filmed(tmp_path: Any) -> None:
    run = pg.train("ppo", Nim, num_envs=2, num_steps=32, iterations=1, progress=False)
    pg.watch(run, tmp_path / "film.gif")
    assert (tmp_path / "film.gif").stat().st_size > 100


def test_seats_of_different_spaces_are_one_line() -> None:
    class Unequal(Nim):
        def action_space(self, agent: str) -> spaces.Space:
            return spaces.Discrete(2 + (agent == "second"))

    with pytest.raises(UserError, match="action spaces differ") as error:
        make_environments(Unequal)
    assert len(str(error.value)) <= 200


# Self-play

SELF: Any = {"num_envs": 4, "num_steps": 19, "iterations": 6, "opponent": "self", "freeze_every": 2}


def moved(player: Frozen, obs: Any, generator: np.random.Generator, held: dict[str, Any] | None = None) -> Any:
    """One move, by default the first of a game."""
    return player.moves([Asked(obs, {}, generator, {} if held is None else held)])[0]


def frozen_of(training: Any) -> list[Frozen]:
    return training.world.selves.frozen


def test_selves_are_the_policy_as_it_was() -> None:
    training, before = pg.Training("ppo", Nim, **SELF), {}
    before[0] = deepcopy(training.run.policy.state_dict())
    for k, _ in enumerate(training):
        before[k + 1] = deepcopy(training.run.policy.state_dict())
    assert [x.iteration for x in frozen_of(training)] == [0, 2, 4, 6]
    assert frozen_of(training)[0].steps == 0
    for x in frozen_of(training):
        assert all(torch.equal(y, x.policy.state_dict()[name]) for name, y in before[x.iteration].items())


def test_a_frozen_self_samples_its_policy_and_draws_from_the_generator_alone() -> None:
    training = pg.Training("ppo", Nim, **SELF)
    (one,), generator, before = frozen_of(training), np.random.default_rng(0), torch.get_rng_state()
    obs = {"observation": np.array([5], np.float32), "action_mask": np.array([1, 1], np.int8)}
    with torch.no_grad():
        one.policy.network[-1].bias[:] = torch.tensor([1.0, 0.0])
        chance = one.policy(torch.tensor([[[1.0, 1.0, 5.0]]])).probs[0, 0, 0]
    drawn = [moved(one, obs, generator) for _ in range(1000)]
    assert 1 - np.mean(drawn) == pytest.approx(float(chance), abs=0.05)
    assert torch.equal(torch.get_rng_state(), before)
    assert [moved(one, obs, np.random.default_rng(k)) for k in range(9)] == [
        moved(one, obs, np.random.default_rng(k)) for k in range(9)
    ]
    mask = {"observation": np.array([1], np.float32), "action_mask": np.array([1, 0], np.int8)}
    assert {int(moved(one, mask, generator)) for _ in range(50)} == {0}


def moved_selves(count: int, **how: Any) -> list[Frozen]:
    """Frozen selves of a run, each moved away from the others."""
    training = pg.Training("ppo", Nim, **SELF | how)
    found = [deepcopy(frozen_of(training)[0]) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    for one in found:
        for p in one.policy.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return found


@pytest.mark.parametrize("normalize", [False, True])
def test_moves_asked_for_together_are_those_asked_for_alone(normalize: bool) -> None:
    (one,) = moved_selves(1, normalize_observations=normalize)
    if one.normalizer is not None:
        one.normalizer.statistics.update(np.random.default_rng(0).normal(4, 2, (50, 3)))
    heaps = np.random.default_rng(1).integers(1, 9, 3000)
    seen = [{"observation": np.array([x], np.float32), "action_mask": np.array([1, x > 1], np.int8)} for x in heaps]
    together = one.moves([Asked(obs, {}, np.random.default_rng(k), {}) for k, obs in enumerate(seen)])
    alone = [moved(one, obs, np.random.default_rng(k)) for k, obs in enumerate(seen)]
    assert together == alone
    assert 0.05 < np.mean(alone) < 0.95
    logits = one._logits(
        np.stack([np.concatenate([x["action_mask"], x["observation"]]) for x in seen]), [{}] * len(seen)
    )
    numbers = np.stack([np.concatenate([x["action_mask"], x["observation"]]) for x in seen])
    if one.normalizer is not None:
        numbers = one.normalizer(numbers, np.zeros(len(numbers), bool))
    with torch.no_grad():
        plain = one.policy(torch.from_numpy(numbers).float().unsqueeze(1)).logits[:, 0]
    torch.testing.assert_close(torch.from_numpy(logits).float(), plain)


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("mask", ["key", "info"])
@pytest.mark.parametrize("whole_episodes", [False, True])
def test_games_side_by_side_are_those_stepped_alone(mask: str, whole_episodes: bool, memory: str) -> None:
    """Bit for bit, with several selves that are asked together; and they are asked together."""

    def made() -> Nim:
        return Nim(heap=11, mask=mask)

    players, found, asked = moved_selves(3, memory=memory), [], []
    for together in (True, False):
        selves = Selves()
        selves.frozen = [deepcopy(x) for x in players]
        for x in selves.frozen:
            its = x.moves
            x.moves = lambda given, its=its: asked.append(len(given)) or its(given)  # type: ignore[assignment,func-returns-value]
        how: Any = {"opponents": selves, "action_mask": "auto" if mask == "key" else "info"}
        environments: Any = make_environments(made, 6, **how)
        assert isinstance(environments, SideBySide)
        environments = environments if together else environments.env
        torch.manual_seed(0)
        known = environments.single_observation_space, environments.single_action_space
        policy = Policy(*known, memory=memory, hidden=(8,))
        sample = Sampler(environments, 60, seed=0, whole_episodes=whole_episodes)
        torch.manual_seed(0)
        found += [[sample(policy) for _ in range(3)]]
        assert (max(asked) > 1) == together
        asked.clear()
    for one, other in zip(*found, strict=True):
        for name in ("obs", "action", "logp", "reward", "ended", "mask"):
            for x, y in zip(tree_leaves(getattr(one, name)), tree_leaves(getattr(other, name)), strict=True):
                assert torch.equal(x, y), name
        assert one.metrics == other.metrics


def test_a_player_of_ones_own_is_asked_side_by_side_too() -> None:
    environments: Any = make_environments(Nim, 3, opponents=self_of_one())
    assert isinstance(environments, SideBySide)
    environments.reset(seed=0)
    heaps = environments.step(np.zeros(3, np.int64))[0][:, -1]
    seats = [x.unwrapped.seat for x in environments.copies.envs]
    assert heaps.tolist() == [7 - 2 - (x == 1) for x in seats]


def test_an_error_of_one_game_is_that_of_its_environment() -> None:
    """The others have taken their step, and the one that failed is made anew."""

    class Failing(Nim):
        def step(self, action: Any) -> None:
            if self.heap == 3:
                raise RuntimeError("three are left")
            super().step(action)

    environments = make_environments(Failing, 2, opponents=self_of_one(), restarts=1)
    environments.reset(seed=3)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        infos = [environments.step(np.zeros(2, np.int64))[-1] for _ in range(3)]
    assert any("raised RuntimeError in step: three are left" in str(x) for x in infos)
    environments = make_environments(Failing, 2, opponents=self_of_one())
    environments.reset(seed=3)
    with pytest.raises(RuntimeError, match="three are left"):  # noqa: PT012 - some game is at three in one of these
        for _ in range(3):
            environments.step(np.zeros(2, np.int64))


def self_of_one() -> Selves:
    class Ones(Selves):
        def __call__(self, generator: Any, count: int) -> Any:
            return one

    return Ones()


# With memory


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_a_self_that_is_the_learner_acts_as_the_learner_does(kind: str, float64: None) -> None:
    """In games of its own: the logits of each move are those of the learner's whole row of that seat's turns."""
    (one,), generator = moved_selves(1, memory=kind, memory_size=4), np.random.default_rng(0)
    for p in one.policy.parameters():
        p += 0.5 * torch.randn_like(p)
    learner, seat, asked = one.policy, Seat(Nim(heap=11), Opponents()), []
    its = one._logits
    one._logits = lambda batch, held: asked.append((batch, its(batch, held))) or asked[-1][1]  # type: ignore[method-assign]
    for _ in range(5):
        seat.opponents.player = one  # type: ignore[assignment]
        asked.clear()
        (obs, _), over = seat.reset(seed=int(generator.integers(99))), False
        while not over:
            action = int(generator.integers(2)) if obs["action_mask"][1] else 0
            obs, _, over, *_ = seat.step(action)
        rows = torch.from_numpy(np.concatenate([x for x, _ in asked])).double().unsqueeze(0)
        assert rows.shape[1] > 2
        with torch.no_grad():
            whole = learner(rows_of(rows, state_size(learner))).logits[0]  # an episode from the empty memory
            alone = torch.cat([learner(rows_of(rows[:, t : t + 1], state_size(learner))).logits[0] for t in range(3)])
        found = torch.from_numpy(np.concatenate([x for _, x in asked]))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
        assert not torch.allclose(alone[1:], whole[1:3], atol=1e-3), "the memory matters"


def test_actions_of_several_parts_are_sampled_after_what_is_held() -> None:
    space, seen = spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,), np.float32)
    torch.manual_seed(0)
    policy = Policy(seen, space, memory="gru", memory_size=4, orthogonal=False)
    one, held, state = Frozen(0, 0, deepcopy(policy), None, seen, space), {}, None
    for k in range(6):
        obs = np.array([k / 6, 1 - k / 3], np.float32)
        found = moved(one, obs, np.random.default_rng(k), held)
        torch.manual_seed(int(np.random.default_rng(k).integers(2**62)))
        action, state = policy.act(obs, state, greedy=False)
        np.testing.assert_array_equal(found, action)
        assert torch.equal(held["state"], state)


def test_each_game_and_each_seat_has_a_memory_of_its_own() -> None:
    """Two selves that are one object play both seats of games: what one seat saw, the other does not remember."""
    (one,) = moved_selves(1, memory="gru")
    asked: list[tuple[Any, dict[str, Any]]] = []
    its = one.moves
    one.moves = lambda given: asked.extend((x.obs, dict(x.held)) for x in given) or its(given)  # type: ignore[method-assign,func-returns-value]
    for seed in range(2):
        asked.clear()
        play(Seat(Nim(heap=11), Opponents()), [one, one], np.random.default_rng(seed))
        assert [bool(held) for _, held in asked] == [False, False, *[True] * (len(asked) - 2)]
        states = [held["state"] for _, held in asked[2:]]
        again: list[Any] = [{}, {}]
        for k, (obs, _) in enumerate(asked[:-2]):
            its([Asked(obs, {}, np.random.default_rng(0), again[k % 2])])
            assert torch.equal(again[k % 2]["state"], states[k])


def test_ratings_of_selves_with_memory(tmp_path: Path) -> None:
    run = pg.train("ppo", "nim:Nim", out=tmp_path / "run", progress=False, memory="gru", memory_size=4, **SELF)
    found = elo(pg.Run.load(tmp_path / "run", trust=True), games=2, players=3)
    assert [x.games for x in found] == [4, 4, 4]
    assert run.evaluate(4).episodes == 4


def test_half_of_the_games_are_against_the_newest() -> None:
    selves, generator = Selves(), np.random.default_rng(0)
    training = pg.Training("ppo", Nim, **SELF)
    (one,) = frozen_of(training)
    selves.frozen = [one, copy(one), copy(one), copy(one)]
    drawn = Counter(selves.frozen.index(selves(generator, 3)) for _ in range(6000))  # type: ignore[arg-type]
    assert set(drawn) == {0, 1, 2}  # the fourth is of later than that game
    assert drawn[2] / 6000 == pytest.approx(0.5 + 0.5 / 3, abs=0.03)


def test_a_game_that_has_begun_keeps_its_player() -> None:
    training = pg.Training("ppo", Nim, **SELF | {"num_steps": 20, "iterations": 40})
    environments = training.world.sample.stepping.environments.unwrapped  # type: ignore[attr-defined]
    seats = [x.unwrapped for x in environments.envs]
    for _ in range(3):
        next(training)
    players = [x.player for x in seats]
    training.world.after(4)
    assert [x.player for x in seats] == players
    assert all(x.known == len(frozen_of(training)) for x in seats)


@pytest.mark.parametrize(("normalize", "memory"), [(False, "none"), (True, "none"), (True, "lstm")])
def test_self_play_goes_on_bit_for_bit(normalize: bool, memory: str, tmp_path: Path) -> None:
    how = SELF | {"normalize_observations": normalize, "checkpoint_every": 1, "progress": False, "memory": memory}
    whole = pg.train("ppo", "nim:Nim", out=tmp_path / "whole", **how)
    pg.train("ppo", "nim:Nim", out=tmp_path / "run", **how | {"iterations": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        rest = pg.resume(tmp_path / "run", iterations=3, trust=True, progress=False)
    for a, b in zip(whole.policy.parameters(), rest.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    for k in (0, 2, 4, 6):
        a, b = (load_file(tmp_path / x / "selves" / str(k) / "policy.safetensors") for x in ("whole", "run"))
        assert a.keys() == b.keys()
        assert all(torch.equal(x, b[name]) for name, x in a.items())
    _, normalizer = load_policy(tmp_path / "run" / "selves" / "4")
    assert (normalizer is not None) == normalize


def test_the_opponent_matters_and_evaluations_are_against_a_random_player() -> None:
    own = pg.train("ppo", Nim, progress=False, **SELF)
    other = pg.train(
        "ppo", Nim, progress=False, **{x: y for x, y in SELF.items() if isinstance(y, int) and x != "freeze_every"}
    )
    often = pg.train("ppo", Nim, progress=False, **SELF | {"freeze_every": 1})
    first = [torch.cat([p.flatten() for p in x.policy.parameters()]) for x in (own, other, often)]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    with torch.no_grad():
        for a, b in zip(own.policy.parameters(), other.policy.parameters(), strict=True):
            a.copy_(b)
    assert own.evaluate(20).returns == other.evaluate(20).returns


def test_a_mask_from_the_info_reaches_the_selves() -> None:
    run = pg.train("ppo", lambda: Nim(mask="info"), action_mask="info", progress=False, **SELF)
    assert run.metrics[-1]["episodes"] > 20


@pytest.mark.parametrize(
    ("task", "how", "said"),
    [
        ("CartPole-v1", {}, "no game whose players take turns"),
        (Nim, {"wrap": ("TimeLimit:9",)}, "leave wrap out"),
        (Nim, {"vectorization": "async"}, "leave vectorization out"),
        (Nim, {"overlap": True}, "leave overlap out"),
    ],
)
def test_where_there_is_no_self_play(task: Any, how: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        pg.Training("ppo", task, preset="none", **SELF | {"num_steps": 32} | how)
    assert len(str(error.value)) <= 200


# PettingZoo itself


def test_tic_tac_toe_is_learned_against_a_random_player() -> None:
    """A few seconds of training: far more than half of the games are won. (The guide has the numbers of a long run.)"""
    pytest.importorskip("pettingzoo")
    how: Any = {"num_envs": 32, "num_steps": 64, "learning_rate": 1e-3, "minibatch_size": 256, "compile": "off"}
    run = pg.train("ppo", "classic/tictactoe-v3", steps=8_000, progress=False, gamma=1, **how)
    environments = make_environments("classic/tictactoe-v3", 1)
    assert isinstance(environments.envs[0].unwrapped, Seat)  # type: ignore[attr-defined]
    assert isinstance(environments.envs[0], gymnasium.Env)  # type: ignore[attr-defined]
    found = run.evaluate(300)
    assert found.success is not None
    assert found.success > 0.65
