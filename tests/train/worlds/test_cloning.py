"""Cloning transitions of an environment: what is learned, the run that it leaves, and what goes on from it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from outcomes import parameters, untimed

import policygrad as pg
from policygrad.control import Policy, memory
from policygrad.errors import Note, UserError
from policygrad.train.options import OptionError

Rows = list[dict[str, Any]]


def collected(task: str, rule: Any, episodes: int, **options: Any) -> Rows:
    """Whole episodes of a rule: observation, seed -> action."""
    environment, rows, generator = gymnasium.make(task, **options), [], np.random.default_rng(0)
    for seed in range(episodes):
        obs, _ = environment.reset(seed=seed)
        ended = False
        while not ended:
            action = rule(obs, generator)
            following, reward, terminated, truncated, _ = environment.step(action)
            shown = obs.tolist() if isinstance(obs, np.ndarray) else int(obs)
            taken = action.tolist() if isinstance(action, np.ndarray) else int(action)
            rows.append(
                {"observation": shown, "action": taken, "reward": float(reward), "terminated": bool(terminated),
                 "truncated": bool(truncated), "episode": seed}
            )  # fmt: skip
            obs, ended = following, terminated or truncated
    return rows


def balanced(obs: np.ndarray, _: Any) -> int:
    """A rule that holds CartPole's pole for all of its 500 steps."""
    return int(obs[2] + 0.5 * obs[3] > 0)


@pytest.fixture(scope="module")
def demonstrations() -> Rows:
    return collected("CartPole-v1", balanced, 4)


@pytest.fixture(scope="module")
def file(demonstrations: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    return path


SMALL: dict[str, Any] = {"iterations": 2, "hidden": (8,), "progress": False, "preset": "none"}


def test_a_policy_that_balances_a_pole_is_cloned_in_seconds(file: Path, tmp_path: Path) -> None:
    run = pg.clone("CartPole-v1", file, iterations=10, minibatch_size=32, out=tmp_path / "run", progress=False)
    assert run.evaluate(2).score > 400
    before, after = run.before, run.after
    assert before.log_probability == pytest.approx(-np.log(2), abs=0.01)
    assert after.log_probability > -0.4
    assert after.accuracy > 0.75
    first, *rows, last = run.metrics
    assert first["log_probability"] == before.log_probability
    assert (last["log_probability"], last["accuracy"]) == (after.log_probability, after.accuracy)
    assert [row["steps"] for row in [*rows, last]] == [1500.0 * k for k in range(1, 11)], "one episode is held out"
    assert run.world.notes(run) == ["demonstrations: 2,000 transitions, 4 episodes, return 500.0 +- 0.0"]
    for name in ("config.json", "metrics.jsonl", "curve.png", "summary.json", "policy.safetensors", "best/config.json"):
        assert (tmp_path / "run" / name).exists(), name
    loaded = pg.load(tmp_path / "run")
    assert torch.equal(parameters(loaded), parameters(run))
    assert loaded.act(np.array([0.0, 0.0, 0.2, 0.5])) == 1


def test_the_most_likely_tabular_policy_has_the_demonstrators_frequencies() -> None:
    """On 16 states, one-hot into a linear layer: any distribution in each."""
    rows = collected("FrozenLake-v1", lambda obs, generator: generator.choice(4, p=[0.1, 0.5, 0.3, 0.1]), 300)
    run = pg.clone(
        "FrozenLake-v1", rows, hidden=(), validation=0.0, minibatch_size=None, learning_rate=0.1, iterations=600,
        learning_rate_schedule="linear", progress=False,
    )  # fmt: skip
    assert run.world.judged is None
    counts = np.zeros((16, 4))
    for row in rows:
        counts[row["observation"], row["action"]] += 1
    seen = counts.sum(1) > 0
    with torch.no_grad():
        found = run.policy(torch.arange(16).unsqueeze(1)).probs[:, 0].numpy()
    np.testing.assert_allclose(found[seen], (counts / counts.sum(1, keepdims=True).clip(1))[seen], atol=2e-3)
    frequencies = counts[seen] / counts[seen].sum(1, keepdims=True)
    best = float((counts[seen] * np.log(frequencies, out=np.zeros_like(frequencies), where=frequencies > 0)).sum())
    assert run.metrics[-1]["objective"] == pytest.approx(best / len(rows), abs=1e-4)


@pytest.mark.parametrize("distribution", ["normal", "squashed", "beta"])
def test_box_actions_are_cloned_in_the_environments_units(distribution: str) -> None:
    """The bounds of Pendulum's torque are -2 and 2."""

    def rule(obs: np.ndarray, _: Any) -> np.ndarray:
        return np.clip(obs[2:] * 0.2, -1.8, 1.8).astype(np.float32)

    rows = collected("Pendulum-v1", rule, 4)
    run = pg.clone("Pendulum-v1", rows, iterations=60, minibatch_size=32, distribution=distribution, progress=False)
    for row in rows[::50]:
        assert run.act(np.array(row["observation"], dtype=np.float32))[0] == pytest.approx(row["action"][0], abs=0.15)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_any_method_goes_on_from_it(method: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pg.clone("CartPole-v1", file, out=out, normalize_observations=True, **SMALL)
    cloned = pg.load(out)
    options: dict[str, Any] = {"start": out, "num_envs": 2, "normalize_observations": True, **SMALL}
    with pytest.warns(Note, match="has no critic") if method == "ppo" else nullcontext():
        training = pg.Training(method, "CartPole-v1", **{x: y for x, y in options.items() if x != "progress"})
    mine, its = training.world.policy.state_dict(), cloned.policy.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    assert training.world.normalizer.statistics.count >= 1500
    training.close()


def test_it_goes_on_from_another_run_with_the_statistics_of_that(file: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    pg.clone("CartPole-v1", file, out=first, normalize_observations=True, **SMALL)
    rows = collected("CartPole-v1", balanced, 2)
    with pg.Training(
        "clone", "CartPole-v1", demonstrations=rows, start=first, normalize_observations=True, out=again,
        **{name: x for name, x in SMALL.items() if name != "progress"},
    ) as training:  # fmt: skip
        cloned = pg.load(first)
        assert torch.equal(parameters(training.run), parameters(cloned))
        next(training)
        seen, mean = training.world.normalizer.statistics, cloned.world.normalizer.statistics.mean
        np.testing.assert_array_equal(seen.mean, mean)
        obs, found = training.world.sample.found.observation, training.world.sample.rollout.obs[:, 0].numpy()
        np.testing.assert_allclose(found, ((obs - mean) / np.sqrt(seen.var)).clip(-10, 10), rtol=1e-5, atol=1e-5)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = SMALL | {"normalize_observations": True, "checkpoint_every": 1}
    whole = pg.clone("CartPole-v1", file, out=tmp_path / "whole", **(options | {"iterations": 4}))
    pg.clone("CartPole-v1", file, out=tmp_path / "part", **(options | {"iterations": 2}))
    again = pg.resume(tmp_path / "part", iterations=2, demonstrations=file, progress=False)
    assert torch.equal(parameters(whole), parameters(again))
    assert untimed(whole.metrics) == untimed(again.metrics)
    with pytest.raises(UserError, match="the run names what is not its own, demonstrations"):
        pg.resume(tmp_path / "part", iterations=1, progress=False)


def test_rows_that_were_handed_in_are_handed_in_again(demonstrations: Rows, tmp_path: Path) -> None:
    pg.clone("CartPole-v1", demonstrations, out=tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="there are no demonstrations to clone"):
        pg.resume(tmp_path / "run", iterations=1, progress=False)
    assert len(pg.resume(tmp_path / "run", iterations=1, demonstrations=demonstrations, progress=False).metrics) == 4


def test_training_stops_when_held_out_demonstrations_are_no_more_likely() -> None:
    generator = np.random.default_rng(0)
    noise = {"observation": generator.normal(size=(64, 4)).astype(np.float32), "action": generator.integers(2, size=64)}
    run = pg.clone("CartPole-v1", noise, learning_rate=0.02, minibatch_size=16, validation=0.5, progress=False)
    assert run.best is not None
    assert run.best["metric"] == "log_probability"
    assert len(run.metrics) - 1 == run.best["iteration"] + 10 < 100
    plain = pg.clone("CartPole-v1", noise, learning_rate=0.02, minibatch_size=16, validation=0.5, progress=False,
                     evaluation_patience=None, iterations=30)  # fmt: skip
    assert len(plain.metrics) == 31


def test_rows_arrays_and_files_are_the_same_data(demonstrations: Rows, file: Path, tmp_path: Path) -> None:
    arrays = {name: np.array([row[name] for row in demonstrations]) for name in demonstrations[0]}
    sources: list[Any] = [file, str(file), demonstrations, arrays]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(demonstrations), tmp_path / "x.parquet")
    found = [parameters(pg.clone("CartPole-v1", x, **SMALL)) for x in [*sources, tmp_path / "x.parquet"]]
    assert all(torch.equal(found[0], x) for x in found)


def test_columns_that_are_not_read_are_said(demonstrations: Rows) -> None:
    with pytest.warns(Note, match="not read: next_observation"):
        pg.clone("CartPole-v1", [{**row, "next_observation": 0} for row in demonstrations], **SMALL)


def test_an_environment_and_a_policy_of_ones_own(demonstrations: Rows) -> None:
    made = gymnasium.make("CartPole-v1")
    run = pg.clone(made, demonstrations, policy=lambda *spaces: Policy(*spaces, hidden=(4,)), iterations=1,
                   progress=False)  # fmt: skip
    assert run.policy.network[0].out_features == 4


def test_a_compiled_update_is_the_same_to_rounding(file: Path) -> None:
    plain, compiled = (parameters(pg.clone("CartPole-v1", file, compile=x, **SMALL)) for x in ("off", "on"))
    torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-5)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("CartPole-v1", {}, "there are no demonstrations to clone"),
    ("CartPole-v1", {"demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
    ("CartPole-v1", {"demonstrations": "nowhere.csv"}, "there is no file nowhere.csv"),
    ("CartPole-v1", {"demonstrations": __file__}, "are a .jsonl, .parquet or .hdf5 file"),
    ("CartPole-v1", {"demonstrations": 3}, "demonstrations is 3: give a file"),
    ("CartPole-v1", {"demonstrations": [1, 2]}, "give a file"),
    ("exact:chain", {}, "an exact world has none"),
    (
        "FrozenLake-v1",
        {"demonstrations": [{"observation": 0, "action": 1}], "normalize_observations": True},
        "only a Box",
    ),
]


@pytest.mark.parametrize(("task", "options", "said"), WRONG)
def test_what_cannot_be_cloned_is_one_line(task: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("clone", task, progress=False, **options)
    assert len(str(raised.value)) <= 200


def test_other_methods_take_no_demonstrations(demonstrations: Rows, file: Path) -> None:
    for given in (demonstrations, file):
        with pytest.raises(OptionError, match="ppo has no option 'demonstrations': it is for clone"):
            pg.train("ppo", "CartPole-v1", demonstrations=given, progress=False)
    with pytest.raises(OptionError, match="clone has no option 'gamma'"):
        pg.clone("CartPole-v1", file, gamma=0.5, progress=False)
    with pytest.raises(OptionError, match="transitions all count equally"):
        pg.clone("CartPole-v1", file, weights="row", progress=False)


class Steering(gymnasium.Env[Any, Any]):
    """Two numbers are seen: the first one's sign is the gear, and the second one the wheel. Four steps long."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Dict(
        {"gear": gymnasium.spaces.Discrete(2), "wheel": gymnasium.spaces.Box(-1, 1, (1,), np.float32)}
    )

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def seen(self) -> np.ndarray:
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action["gear"] == int(self.obs[0] > 0)) - abs(float(action["wheel"][0] - self.obs[1]))
        self.t += 1
        return self.seen(), reward, self.t == 4, False, {}


def test_actions_of_several_parts_are_cloned_from_a_file(tmp_path: Path) -> None:
    """Each part alone, right, has a share in the return, whose largest value is 4."""
    drawn = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    rows = [{"observation": x.tolist(), "action": {"gear": int(x[0] > 0), "wheel": [x[1]]}} for x in drawn]
    path = tmp_path / "steering.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {
        "preset": "none",
        "progress": False,
        "hidden": (32,),
        "learning_rate": 0.01,
        "validation": 0.0,
    }
    cloned = pg.clone(Steering, str(path), iterations=30, **how)
    assert cloned.evaluate(50).return_mean > 3


def test_a_run_that_goes_on_with_other_demonstrations_says_so(demonstrations: Rows, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    pg.train("clone", "CartPole-v1", demonstrations=str(path), **SMALL, out=tmp_path / "run")
    pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)  # a Note would be an error
    path.write_text("".join(json.dumps(row | {"action": 1 - row["action"]}) + "\n" for row in demonstrations))
    with pytest.warns(Note, match="the training data is no longer what it was"):
        pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)


# With memory

LENGTH = {"env_options": {"length": 3}}
MAZE: dict[str, Any] = {"preset": "none", "progress": False, "validation": 0.25, "learning_rate": 0.02} | LENGTH
MAZE |= {"minibatch_size": 16, "hidden": (), "evaluation_patience": None}
REMEMBERS: dict[str, Any] = {"memory": "gru", "memory_size": 16, **MAZE}


def mazes(episodes: int = 40, length: int = 3) -> Rows:
    """Walks through a T-maze that turn as the sign said, which is seen in the first step alone."""
    rows: Rows = []
    for k in range(episodes):
        environment = gymnasium.make("policygrad/TMaze-v0", length=length)
        (obs, _), ended, sign = environment.reset(seed=k), False, 0
        while not ended:
            sign = int(obs[0]) or sign
            action = (0 if sign == 1 else 2) if obs[2] else 1
            rows.append({"observation": obs.tolist(), "action": action, "episode": k})
            obs, _, ended, *_ = environment.step(action)
    return rows


@pytest.fixture(scope="module")
def maze_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mazes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mazes()))
    return path


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_what_needs_memory_is_cloned_with_one(kind: str, maze_file: Path) -> None:
    run = pg.clone("policygrad/TMaze-v0", maze_file, iterations=25, **REMEMBERS | {"memory": kind})
    assert run.after.log_probability > -0.05
    assert run.after.accuracy == 1
    assert run.after.decisions == 40
    assert run.evaluate(20).return_mean == 1


def test_without_memory_it_cannot_be_fitted(maze_file: Path) -> None:
    """Of four decisions one is a coin: nothing is more likely than its frequencies, and half of the turns are wrong."""
    run = pg.clone("policygrad/TMaze-v0", maze_file, iterations=200, **MAZE)
    train, kept = run.world.sample.found, run.world.kept
    up = np.mean(train.action[train.observation[:, 2] == 1] == 0)
    best = (up * np.log(up) + (1 - up) * np.log(1 - up)) / 4
    assert run.metrics[-1]["objective"] == pytest.approx(best, abs=5e-3)
    assert run.after.log_probability < -0.1
    assert run.after.accuracy == 1 - np.mean(kept.action[kept.observation[:, 2] == 1] != 2 * (up < 0.5)) / 4
    assert run.evaluate(40).return_mean < 0.7


def test_a_clone_with_memory_resumes_and_any_method_goes_on_from_it(maze_file: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = REMEMBERS | {"sequence_length": 2, "checkpoint_every": 1, "normalize_observations": True}
    whole = pg.clone("policygrad/TMaze-v0", maze_file, iterations=4, out=tmp_path / "whole", **how)
    pg.clone("policygrad/TMaze-v0", maze_file, iterations=2, out=tmp_path / "part", **how)
    again = pg.resume(tmp_path / "part", iterations=2, demonstrations=maze_file, progress=False)
    assert torch.equal(parameters(whole), parameters(again))
    assert untimed(whole.metrics) == untimed(again.metrics)
    on: dict[str, Any] = {"memory": "gru", "memory_size": 16, "hidden": (), "preset": "none", **LENGTH}
    on |= {"normalize_observations": True, "num_envs": 2, "start": tmp_path / "whole"}
    with pytest.warns(Note, match="has no critic"):
        training = pg.Training("ppo", "policygrad/TMaze-v0", **on)
    with training:
        mine, its = training.world.policy.state_dict(), whole.policy.state_dict()
        assert all(torch.equal(mine[name], x) for name, x in its.items())
        next(training)


def test_minibatches_are_whole_rows_or_pieces_of_them(maze_file: Path) -> None:
    how: dict[str, Any] = REMEMBERS | {"iterations": 2}
    whole, pieces = (pg.clone("policygrad/TMaze-v0", maze_file, **how, **x) for x in ({}, {"sequence_length": 3}))
    assert whole.metrics[-1]["updates"] == 8, "30 episodes of 4 steps, 4 in a minibatch"
    assert pieces.metrics[-1]["updates"] == 12, "30 rows of 6 steps in two pieces each, 5 in a minibatch"
    assert pieces.metrics[-1]["steps"] == whole.metrics[-1]["steps"] == 2 * 120


def test_what_is_held_out_is_judged_as_it_is_acted(maze_file: Path) -> None:
    """Episodes of several lengths: what fills their rows counts for nothing."""
    rows = [{**row, "episode": f"{k}, {row['episode']}"} for k in (1, 5, 2) for row in mazes(6, k)]
    run = pg.clone("policygrad/TMaze-v0", rows, iterations=2, **REMEMBERS)
    kept, right, total = run.world.kept, 0, 0.0
    for episode in np.unique(kept.episode):
        state = None
        for t in np.flatnonzero(kept.episode == episode):
            start = torch.zeros(1, 1, dtype=torch.bool)
            before = run.policy.initial(1) if state is None else state
            given = memory.Rows(
                torch.tensor(kept.observation[t]).view(1, 1, 3), start, before.unsqueeze(1), before[:, None, :0]
            )
            with torch.no_grad():
                made, _ = run.policy.unrolled(given)
            total += float(made.log_prob(torch.tensor([[int(kept.action[t])]])))
            action, state = run.act(kept.observation[t], state)
            right += action == kept.action[t]
    assert run.after.decisions == len(kept)
    assert run.after.accuracy == pytest.approx(right / len(kept))
    assert run.after.log_probability == pytest.approx(total / len(kept), abs=1e-6)


def test_a_policy_of_ones_own_with_memory_is_cloned(maze_file: Path) -> None:
    def policy(*spaces: Any) -> Policy:
        return Policy(*spaces, memory="gru", memory_size=16, hidden=())

    how: dict[str, Any] = {name: x for name, x in MAZE.items() if name != "hidden"}
    assert pg.clone("policygrad/TMaze-v0", maze_file, policy=policy, iterations=25, **how).after.accuracy == 1


@pytest.mark.parametrize(
    ("rows", "how", "said"),
    [
        ([{**row, "episode": 0} for row in mazes(3)], {"memory": "gru"}, "all demonstrations are one: give more"),
        (
            [{x: y for x, y in row.items() if x != "episode"} for row in mazes(3)],
            {"memory": "gru"},
            "needs to know where episodes start: give the demonstrations a column episode",
        ),
        (mazes(3), {"sequence_length": 2}, "sequence_length cuts rows of a policy with memory, and this one has none"),
        (mazes(3), {"memory_size": 2}, "memory_size is read only where memory is gru or lstm or transformer"),
    ],
)
def test_what_a_memory_cannot_be_cloned_from_is_one_line(rows: Rows, how: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.clone("policygrad/TMaze-v0", rows, iterations=1, **MAZE, **how)
    assert len(str(raised.value)) <= 200
