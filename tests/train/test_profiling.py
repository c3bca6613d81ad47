"""Where the time goes: the parts add up, and the trace is one that viewers open."""

import json
from pathlib import Path
from typing import Any

import pytest

import policygrad as pg
from policygrad.train import profiling
from policygrad.train.profiling import Profile

CONTROL = {"other", "acting", "environment", "credit", "update", "evaluation", "logging"}
SMALL: dict[str, Any] = {"iterations": 3, "progress": False, "preset": "none"}
RUNS: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("ppo", "CartPole-v1", {"num_envs": 2, "num_steps": 32}, CONTROL),
    ("trpo", "CartPole-v1", {"num_envs": 2, "num_steps": 8}, CONTROL),
    ("grpo", "CartPole-v1", {"num_envs": 4, "episode_steps": 8, "kl_ref": "reward"}, CONTROL),
    ("reinforce", "exact:chain", {}, CONTROL - {"environment"}),
    (
        "rloo",
        "arithmetic",
        {"max_tokens": 4, "prompts_per_rollout": 2, "held_out": 2, "completions": 2},
        {"other", "sampling", "scoring", "credit", "learning", "evaluation", "logging"},
    ),
]


def test_own_seconds_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """a from 1 to 11, in it b from 2 to 5, and in that c from 3 to 4, and b again from 6 to 9; then c from 20 to 25."""
    clock = iter([0, 1, 2, 3, 4, 5, 6, 9, 11, 20, 25])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(clock)))
    profile = Profile()
    with profile.span("a"):
        with profile.span("b"), profile.span("c"):
            pass
        profile.timed("b", lambda: None)()
    with profile.span("c"):
        pass
    assert profile.own == {"a": 4, "b": 5, "c": 6}
    assert profile.count == {"a": 1, "b": 2, "c": 2}
    assert profile.seconds == 15
    assert [(x["name"], x["ts"], x["dur"]) for x in profile.trace()["traceEvents"]] == [
        ("c", 3e6, 1e6), ("b", 2e6, 3e6), ("b", 6e6, 3e6), ("a", 1e6, 10e6), ("c", 20e6, 5e6),
    ]  # fmt: skip
    assert profile.table().splitlines()[1].split() == ["c", "6.000", "s", "40.0%", "2", "times"]


@pytest.mark.parametrize(("method", "task", "options", "names"), RUNS)
def test_a_run_has_its_parts_and_learns_the_same(
    method: str, task: str, options: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    plain, run = (pg.train(method, task, **SMALL, **options, profile=x, out=tmp_path / str(x)) for x in (False, True))
    kept = [{k: x for k, x in row.items() if "second" not in k} for row in run.metrics]
    assert kept == [{k: x for k, x in row.items() if "second" not in k} for row in plain.metrics]
    assert plain.profile is None
    assert not (tmp_path / "False" / "trace.json").exists()
    profile = run.profile
    assert set(profile.own) == names
    assert all(x >= 0 for x in profile.own.values())
    assert sum(profile.own.values()) == pytest.approx(profile.seconds)
    trace = json.loads((tmp_path / "True" / "trace.json").read_text())["traceEvents"]
    assert {x["name"] for x in trace} == names
    assert all(x["ph"] == "X" and x["dur"] >= 0 and x["ts"] >= 0 and {"pid", "tid"} <= set(x) for x in trace)
    outer = [x for x in trace if x["name"] in ("other", "logging")]
    assert sum(x["dur"] for x in outer) == pytest.approx(1e6 * profile.seconds)
    assert profile.count["logging"] == len([row for row in run.metrics if row["steps"]]) == 3
