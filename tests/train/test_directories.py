"""Where a run goes: a directory of its own, made when it begins, gone again if nothing was written."""

import gc
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from policygrad.errors import UserError
from policygrad.train.directories import CLAIM, Lock, claim, file_name, free_directory, release, run_directory


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ALE/Pong-v5", "ALE-Pong-v5"),
        ("a:b c", "a-b-c"),
        ("exact:chain", "exact-chain"),
        ("x_1.y", "x_1.y"),
        ("x" * 999, "x" * 100),
    ],
)
def test_a_file_name_has_nothing_in_it_that_a_file_system_minds(name: str, said: str) -> None:
    assert file_name(name) == said


def test_no_two_runs_are_given_the_same_directory(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(free_directory, [tmp_path / "runs" / "it"] * 24))
    assert {path.name for path in given} == {"it", *(f"it-{n}" for n in range(2, 25))}
    assert all(path.is_dir() for path in given)


def test_a_directory_that_nothing_was_written_to_is_gone_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with run_directory(None, tmp_path / "a" / "b" / "c") as directory:
        assert directory.is_dir()
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(UserError), run_directory(None, tmp_path / "a" / "b" / "c") as directory:  # noqa: PT012
        (directory / "kept").touch()
        raise UserError("stopped")
    assert (tmp_path / "a" / "b" / "c" / "kept").exists()
    with run_directory(tmp_path / "mine", tmp_path / "a") as directory:
        assert directory == tmp_path / "mine"


def test_a_place_where_no_directory_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file" / "a" / "b", tmp_path / "link" / "a", tmp_path / ("x" * 400)):
        with pytest.raises(UserError, match="cannot be written"):
            free_directory(place)


@pytest.mark.parametrize("there", [True, False])
def test_of_many_runs_with_one_directory_one_gets_it(there: bool, tmp_path: Path) -> None:
    def attempt(place: Path) -> str:
        try:
            claim(place)
        except UserError as error:
            return str(error)
        return ""

    for number in range(20):
        place = tmp_path / str(number) / "it"
        if there:
            place.mkdir(parents=True)
        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(attempt, [place] * 8))
        assert said.count("") == 1
        assert all("choose another directory" in x for x in said if x)


def test_a_run_that_never_began_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for place, left in ((tmp_path / "mine", ["mine"]), (tmp_path / "a" / "b", ["mine"])):
        made = claim(place)
        (place / "model").mkdir()
        for name in ("config.json", "model/config.json"):
            (place / name).touch()
        release(place, made, ("config.json", "model", "model/*"))
        assert [x.name for x in tmp_path.iterdir()] == left
    claim(tmp_path / "mine")
    (tmp_path / "mine" / "notes").touch()
    release(tmp_path / "mine", [tmp_path / "mine"])
    assert [x.name for x in (tmp_path / "mine").iterdir()] == ["notes"]
    assert not (tmp_path / "mine" / CLAIM).exists()


HOLD = "import sys, time; from pathlib import Path; from policygrad.train.directories import Lock; "
HOLD += "lock = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="is being written by another run: wait for it, or stop it"):
            Lock(tmp_path)
    lock.release()
    lock.release()
    again = Lock(tmp_path)
    del again
    gc.collect()
    Lock(tmp_path).release()


@pytest.mark.parametrize("forked", [False, True])
def test_a_process_that_is_killed_holds_no_lock_and_nor_does_its_child(forked: bool, tmp_path: Path) -> None:
    """A process of environments may live a moment longer."""
    script = HOLD.replace("time.sleep(60)", "import os; os.fork(); time.sleep(3)") if forked else HOLD
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="another run"):
            Lock(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        Lock(tmp_path).release()


def test_a_directory_that_cannot_be_written_has_no_lock(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "nowhere")
