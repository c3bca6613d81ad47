"""Checkpoints: whatever happens to process, disk or bits, the newest sound one is found, or an error says so."""

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policygrad.errors import Note, UserError
from policygrad.train.snapshots import FOLDER, digest, read_checkpoint, write_checkpoint


def state(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "steps": 10 * iteration, "x": torch.arange(50.0) + iteration, "y": [iteration, "ü"]}


def written(directory: Path, *iterations: int, keep: int = 2) -> Path:
    for k in iterations:
        write_checkpoint(directory, state(k), keep)
    return directory / FOLDER


def found(directory: Path) -> int | None:
    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        return None
    expected = state(checkpoint["iteration"])
    assert torch.equal(checkpoint.pop("x"), expected.pop("x"))
    assert checkpoint == expected
    return expected["iteration"]


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for keep in (1, 2, 5):
        folder = (
            written(tmp_path / str(keep), *range(1, 8), keep=keep) if (tmp_path / str(keep)).mkdir() is None else None
        )
        assert folder is not None
        names = sorted(x.name for x in folder.iterdir())
        assert names == sorted(f"{k:09d}.{x}" for k in range(8 - keep, 8) for x in ("json", "safetensors"))
        assert found(folder.parent) == 7


def test_without_any_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    folder = written(tmp_path, 1)
    (folder / "notes.json").write_text("{}")
    (folder / "mine.safetensors").write_text("")
    written(tmp_path, 2, 3, 4)
    assert {"notes.json", "mine.safetensors"} <= {x.name for x in folder.iterdir()}


def test_one_that_is_newer_than_the_newest_is_left_over_from_before(tmp_path: Path) -> None:
    """A run that goes on from an earlier one, because a later one was damaged, does not keep that."""
    folder = written(tmp_path, 4, 9)
    (folder / "000000009.safetensors").write_bytes(b"")
    written(tmp_path, 5)
    assert sorted(x.stem for x in folder.glob("*.json")) == ["000000004", "000000005"]


# Damage

CUTS: dict[str, Callable[[int, int], int]] = {
    "empty": lambda header, size: 0,
    "one byte": lambda header, size: 1,
    "inside the length of the header": lambda header, size: 7,
    "before the header": lambda header, size: 8,
    "inside the header": lambda header, size: header // 2,
    "before the tensors": lambda header, size: header,
    "inside the tensors": lambda header, size: (header + size) // 2,
    "without the last byte": lambda header, size: size - 1,
}


def assert_noticed(directory: Path) -> None:
    with pytest.warns(
        Note, match=r"00002\.(json|safetensors) (is damaged|cannot be read): .*; the one before it is used"
    ) as said:
        assert found(directory) == 1
    assert all(len(str(x.message)) <= 200 for x in said)


@pytest.mark.parametrize("name", CUTS)
def test_a_file_that_is_cut_short_is_noticed(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, 1, 2)
    tensors, manifest = folder / "000000002.safetensors", folder / "000000002.json"
    content = tensors.read_bytes()
    cut = CUTS[name](8 + int.from_bytes(content[:8], "little"), len(content))
    tensors.write_bytes(content[:cut])
    assert_noticed(tmp_path)
    tensors.write_bytes(content)
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: min(cut, len(whole) - 1)])
    assert_noticed(tmp_path)


def test_a_file_that_is_longer_or_missing_or_another_ones_is_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path, 1, 2)
    tensors, manifest = folder / "000000002.safetensors", folder / "000000002.json"
    kept = {path: path.read_bytes() for path in (tensors, manifest)}

    def changed(change: Callable[[], Any]) -> None:
        change()
        assert_noticed(tmp_path)
        for path, content in kept.items():
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    changed(lambda: tensors.write_bytes(kept[tensors] + b"\0"))
    changed(lambda: manifest.write_bytes(kept[manifest] + b" "))
    changed(tensors.unlink)
    changed(lambda: shutil.copy(folder / "000000001.safetensors", tensors))
    changed(lambda: shutil.copy(folder / "000000001.json", manifest))
    changed(
        lambda: [shutil.copy(folder / f"000000001.{x}", folder / f"000000002.{x}") for x in ("json", "safetensors")]
    )
    changed(lambda: manifest.write_text("[]"))
    changed(lambda: manifest.write_text(json.dumps({**json.loads(kept[manifest]), "format": 2}, indent=2) + "\n"))


@pytest.mark.parametrize("which", ["json", "safetensors"])
def test_every_bit_that_is_flipped_is_noticed(which: str, tmp_path: Path) -> None:
    """Of the manifest every one; of the tensors 100 at random, and every bit of the first 16 bytes."""
    path = written(tmp_path, 1, 2) / f"000000002.{which}"
    content, draw = path.read_bytes(), random.Random(0)
    bits = range(8 * len(content))
    chosen = list(bits) if which == "json" else [*range(128), *draw.sample(bits, 100)]
    for bit in chosen:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings(action="ignore", category=Note):
            assert found(tmp_path) == 1, bit


def test_if_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    for path in written(tmp_path, 1, 2).glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    said = r"000000002.safetensors is damaged: .*; there is no whole one before it: train again, or use its policy"
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=said):
        read_checkpoint(tmp_path)


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    path = written(run, 1, 2) / "000000002.safetensors"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.warns(Note, match="it is a link out of its directory"):
        assert found(run) == 1


# Interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
@pytest.mark.parametrize("at", range(4))
def test_what_was_there_stays_whole_whatever_ends_the_writing(
    name: str, at: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of the system on the way: of two files, one rename and two syncs each."""
    written(tmp_path, 1, 2)
    real, calls = getattr(os, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at + 1:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        try:
            write_checkpoint(tmp_path, state(3), 2)
            stopped = False
        except type(error):
            stopped = True
    assert stopped == (at < (4 if name == "fsync" else 2))
    with warnings.catch_warnings(action="error", category=Note):
        assert found(tmp_path) in ((2, 3) if stopped else (3,))
    written(tmp_path, 4)
    assert {x.name.partition(".")[0] for x in (tmp_path / FOLDER).iterdir()} <= {"000000002", "000000003", "000000004"}
    assert not list((tmp_path / FOLDER).glob("*.new"))


def test_a_digest_is_of_names_types_shapes_and_every_bit() -> None:
    x = {"a": torch.arange(6.0)}
    others = [
        {"b": x["a"]},
        {"a": x["a"].double()},
        {"a": x["a"].view(2, 3)},
        {"a": torch.nextafter(x["a"], torch.tensor(9.0))},
        {"a": x["a"], "b": x["a"]},
        {},
    ]
    assert digest(x) == digest({"a": torch.arange(6.0)})
    assert len({digest(y) for y in (x, *others)}) == 1 + len(others)
