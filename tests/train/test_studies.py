"""Several seeds of one run: each is that seed's own run, a failure stops no other, and what is missing is trained."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import untimed
from safetensors.torch import load_file

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import studies
from policygrad.train.recording import Recorder
from policygrad.train.studies import _check_seeds, _processes, _sent, seeds_of

SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "minibatch_size": 16, "hidden": (8,), "steps": 100}
QUIET: dict[str, Any] = {**SMALL, "progress": False}


def rows(run: Path) -> list[dict[str, float]]:
    return untimed([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def found(place: Path) -> Any:
    return pg.study("ppo", "probes:Known-v0", seeds=[3, 0], out=place / "study", processes=2, **QUIET)


def test_each_seed_is_bit_for_bit_the_run_of_that_seed_alone(place: Path, found: Any) -> None:
    assert sorted(found.runs) == [0, 3]
    assert found.failed == {}
    for seed, path in found.runs.items():
        assert path == place / "study" / f"seed-{seed}"
        alone = place / f"alone-{seed}"
        pg.train("ppo", "probes:Known-v0", seed=seed, out=alone, **QUIET)
        ours, theirs = (load_file(x / "policy.safetensors") for x in (path, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert rows(path) == rows(alone)
        assert (path / "config.json").read_text() == (alone / "config.json").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize(("seeds", "in_processes"), [([0, 1], 0), ([0], 1)])
def test_seeds_at_a_time_share_the_cores(seeds: list[int], in_processes: int, tmp_path: Path) -> None:
    """With a core for each seed there is none left for processes of their environments."""
    had = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(had)[:2])
    try:
        found = pg.study("ppo", "probes:Slow-v0", seeds=seeds, out=tmp_path / "study", processes=len(seeds), **QUIET)
    finally:
        os.sched_setaffinity(0, had)
    assert [rows(path)[-1]["info/child"] for path in found.runs.values()] == [in_processes] * len(seeds)


def test_a_study_is_summed_up_in_its_directory(place: Path, found: Any) -> None:
    (group,) = found.comparison.groups
    assert [run.seed for run in group.runs] == [0, 3]
    assert found.comparison.summary() == pg.compare(place / "study").summary()
    for name in ("comparison.png", "comparison.json", "comparison.md", "study.json"):
        assert (place / "study" / name).exists()


def test_only_seeds_that_have_not_finished_are_trained(tmp_path: Path) -> None:
    again: dict[str, Any] = {"out": tmp_path / "study", "processes": 2, **QUIET}
    pg.study("ppo", "probes:Known-v0", seeds=[0, 1], **again)
    done, stopped = tmp_path / "study" / "seed-0", tmp_path / "study" / "seed-1"
    times = (done / "policy.safetensors").stat().st_mtime_ns
    expected = rows(stopped)
    summary = json.loads((stopped / "summary.json").read_text())
    (stopped / "summary.json").write_text(json.dumps({**summary, "ended": "interrupted"}))
    (stopped / "metrics.jsonl").write_text("")
    found = pg.study("ppo", "probes:Known-v0", seeds=range(3), **again)
    assert sorted(found.runs) == [0, 1, 2]
    assert (done / "policy.safetensors").stat().st_mtime_ns == times
    assert rows(stopped) == expected


def test_a_seed_that_was_stopped_goes_on_from_its_checkpoint(place: Path, tmp_path: Path) -> None:
    """The rows of before stay as they were, times included; the end is that of a run that was not stopped."""
    common = {**SMALL, "checkpoint_every": 1}
    pg.study("ppo", "probes:Known-v0", seeds=[0], out=tmp_path / "study", **common, progress=False)
    training = pg.Training("ppo", "probes:Known-v0", seed=3, out=tmp_path / "study" / "seed-3", **common)
    with suppress(KeyboardInterrupt), training, Recorder(training) as record:
        record(next(training))
        raise KeyboardInterrupt
    first = (tmp_path / "study" / "seed-3" / "metrics.jsonl").read_text()
    assert first
    pg.study("ppo", "probes:Known-v0", seeds=[0, 3], out=tmp_path / "study", **common, progress=False)
    assert (tmp_path / "study" / "seed-3" / "metrics.jsonl").read_text().startswith(first)
    pg.train("ppo", "probes:Known-v0", seed=3, out=tmp_path / "alone", progress=False, **common)
    assert rows(tmp_path / "study" / "seed-3") == rows(tmp_path / "alone")


def test_the_names_in_a_seeds_directory_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's own request says what is trained. A directory that came along names code of its own."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\nfrom probes import Known as Evil\n")
    common = {**SMALL, "checkpoint_every": 1}
    training = pg.Training("ppo", "probes:Known-v0", seed=3, out="study/seed-3", **common)
    with suppress(KeyboardInterrupt), training, Recorder(training) as record:
        record(next(training))
        raise KeyboardInterrupt
    config = json.loads(Path("study/seed-3/config.json").read_text())
    Path("study/seed-3/config.json").write_text(json.dumps(config | {"task": "evil.py:Evil"}))
    request = studies.request_of("ppo", "probes:Known-v0", common)
    Path("study/study.json").write_text(json.dumps(request))
    pg.study("ppo", "probes:Known-v0", seeds=[3], out="study", **common, progress=False)
    assert not Path("ran").exists()
    pg.train("ppo", "probes:Known-v0", seed=3, out="alone", progress=False, **common)
    assert rows(Path("study/seed-3")) == rows(Path("alone"))


def test_a_directory_has_one_study(tmp_path: Path) -> None:
    out = tmp_path / "study"
    pg.study("ppo", "probes:Known-v0", seeds=[0], out=out, **QUIET)
    with pytest.raises(UserError, match="holds a study that differs in learning_rate: choose another directory"):
        pg.study("ppo", "probes:Known-v0", seeds=[1], out=out, learning_rate=0.01, **QUIET)
    with pytest.raises(UserError, match="holds a study that differs in method"):
        pg.study("actor_critic", "probes:Known-v0", seeds=[1], out=out, **{x: QUIET[x] for x in ("steps", "progress")})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty, and holds no study"):
        pg.study("ppo", "probes:Known-v0", seeds=[1], out=tmp_path / "full", **QUIET)
    (out / "study.json").write_text("[]")
    with pytest.raises(UserError, match=r"study\.json is damaged"):
        pg.study("ppo", "probes:Known-v0", seeds=[1], out=out, **QUIET)


def test_what_is_no_run_of_the_study_is_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "study"
    pg.study("ppo", "probes:Known-v0", seeds=[0], out=out, **QUIET)
    (out / "seed-1").mkdir()
    (out / "seed-1" / "mine").write_text("precious")
    found = pg.study("ppo", "probes:Known-v0", seeds=[0, 1], out=out, **QUIET)
    assert "holds something else than a run of this study: move it away" in found.failed[1]
    assert (out / "seed-1" / "mine").read_text() == "precious"
    assert list(found.runs) == [0]


def test_by_default_a_study_finds_its_place_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = pg.study("ppo", "exact:chain", seeds=[0], steps=64, progress=False)
    other = pg.study("ppo", "exact:chain", seeds=[0], steps=96, progress=False)
    again = pg.study("ppo", "exact:chain", seeds=[0], steps=64, progress=False)
    assert first.directory == again.directory == Path("runs/exact-chain/ppo-seeds")
    assert other.directory == Path("runs/exact-chain/ppo-seeds-2")


FRAGILE = """
import probes

class Fragile(probes.Known):
    def reset(self, **options):
        found = super().reset(**options)
        if self.np_random.integers(2) == 0:
            raise RuntimeError("this seed\\nis unlucky")
        return found

class Deadly(probes.Known):
    def step(self, action):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_seed_that_fails_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    small = {**QUIET, "num_envs": 1, "steps": 16, "num_steps": 16}
    found = pg.study("ppo", f"{tmp_path}/fragile.py:Fragile", seeds=range(3), out=tmp_path / "out", **small)
    assert found.failed
    assert found.runs
    assert sorted([*found.failed, *found.runs]) == list(range(3))
    assert all("this seed is unlucky" in x and "\n" not in x and len(x) <= 200 for x in found.failed.values())
    assert {int(path.name.removeprefix("seed-")) for path in (tmp_path / "out").glob("seed-*")} >= set(found.runs)


def test_a_process_that_dies_is_told_by_its_signal(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    with pytest.raises(UserError, match="the process of seed 0 ended by signal 9"):
        pg.study("ppo", f"{tmp_path}/fragile.py:Deadly", seeds=[0], out=tmp_path / "out", **QUIET)


def test_if_all_seeds_fail_alike_that_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ppo has no option 'stepz'"):
        pg.study("ppo", "probes:Known-v0", seeds=[0, 1], out=tmp_path / "a" / "b", stepz=3, **QUIET)  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_a_study_may_be_of_the_users_own_objects(tmp_path: Path) -> None:
    import probes

    class Local(probes.Known):
        pass

    found = pg.study("ppo", lambda: Local(), seeds=[0], out=tmp_path / "out", **QUIET)
    assert list(found.runs) == [0]


def test_what_cannot_be_sent_is_one_line() -> None:
    import threading

    with pytest.raises(UserError, match="cannot be sent what it shall train") as error:
        _sent(("ppo", threading.Lock(), {}))
    assert len(str(error.value)) <= 200


STUDY = """
import sys
from policygrad import cli
cli.main(["train", "ppo", "probes:Known-v0", "--num-envs", "4", "--num-steps", "16", "--minibatch-size", "16",
          "--hidden", "8", "--steps", "100000000", "--compile", "off", "--seeds", "0-2", "--processes", "2",
          "--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_leaves_whole_runs(tmp_path: Path, number: int) -> None:
    here = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(pg.__file__).parent.parent)])
    out = tmp_path / "study"
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(out)],
        env=os.environ | {"PYTHONPATH": here},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not all(_has_rows(out / f"seed-{seed}") for seed in (0, 1)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "policygrad: stopped; 0 seeds are finished in" in said
    assert "the same command trains the others (0, 1, 2)" in said
    assert not (out / "seed-2").exists()
    for seed in (0, 1):
        assert "was stopped" in pg.load(out / f"seed-{seed}", trust=True).standing()
    assert "Traceback" not in said


def test_the_processes_of_a_study_end_with_it(tmp_path: Path) -> None:
    here = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(pg.__file__).parent.parent)])
    out = tmp_path / "study"
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(out)],
        env=os.environ | {"PYTHONPATH": here},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not all(_has_rows(out / f"seed-{seed}") for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    while any(not (out / f"seed-{seed}" / "summary.json").exists() for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _has_rows(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and b"\n" in (run / "metrics.jsonl").read_bytes()


def test_two_studies_do_not_share_a_directory(tmp_path: Path) -> None:
    request = studies.request_of("ppo", "probes:Known-v0", {x: y for x, y in QUIET.items() if x != "progress"})
    with studies.taken(tmp_path):
        (tmp_path / "study.json").write_text(json.dumps(request))  # no seed has begun
        with pytest.raises(UserError, match="is being trained by another process"):
            pg.study("ppo", "probes:Known-v0", seeds=[0], out=tmp_path, **QUIET)
        assert (tmp_path / "study.json").exists()


# What is asked


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("0,3,7", [0, 3, 7]), ("5", [5]), ("0-1,8-9, 4", [0, 1, 8, 9, 4]), ("3-3", [3])],
)
def test_seeds_are_typed_as_ranges_and_lists(text: str, seeds: list[int]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "0-", "1,,2", "1.5", "0--3", "0-1-2", "²", "9" * 30, "0-5000"])
def test_other_texts_are_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match="seeds is"):
        seeds_of(text)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([], "there are 0 seeds"),
        ([0, 1, 0], "the seed 0 is given more than once"),
        ([-1], "a seed is -1"),
        ([2**63], "a seed is"),
        ([1.0], "a seed is 1.0"),
        ([True], "a seed is True"),
        (range(2000), "there are 2,000 seeds"),
    ],
)
def test_wrong_seeds_are_one_line(seeds: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        _check_seeds(list(seeds))


def test_what_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are 0 seeds"):
        pg.study("ppo", "probes:Known-v0", seeds=[], out=tmp_path / "out", **QUIET)
    with pytest.raises(UserError, match="processes is 0"):
        pg.study("ppo", "probes:Known-v0", seeds=[0], out=tmp_path / "out", processes=0, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_one_seed_beside_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of the two"):
        pg.study("ppo", "probes:Known-v0", seeds=[0], seed=1, out=tmp_path / "out", **QUIET)


@pytest.mark.parametrize("processes", [0, -1, 1.5, True, 10**6])
def test_processes_are_counted_from_one(processes: Any) -> None:
    with pytest.raises(UserError, match="processes is"):
        _processes(processes, "ppo", "CartPole-v1", {}, 2)


def test_by_default_there_are_as_many_processes_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert _processes(None, "ppo", "CartPole-v1", {}, 20) == 8
    assert _processes(None, "ppo", "CartPole-v1", {}, 3) == 3
    assert _processes(None, "ppo", "CartPole-v1", {"threads": 3}, 20) == 2
    assert _processes(None, "ppo", "CartPole-v1", {"device": "cuda"}, 20) == 1
    assert _processes(None, "grpo", "arithmetic", {}, 20) == 1  # a model takes all threads
    assert _processes(None, "grpo", "arithmetic", {"threads": 1}, 20) == 8
    assert _processes(4, "ppo", "CartPole-v1", {"device": "cuda"}, 20) == 4
