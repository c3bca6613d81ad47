"""A file from elsewhere is looked at before it is read, and one that is written is there whole or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from policygrad.errors import UserError
from policygrad.files import (
    DEEPEST_JSON,
    LARGEST_JSON,
    TYPES,
    add_metadata,
    as_path,
    as_safetensors,
    check_directory,
    check_real,
    read_json,
    read_metadata,
    read_tensors,
    write_bytes,
    write_durably,
    write_json,
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(__file__), "link out of its directory"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: None, "cannot be read"),
        (lambda path: (path.touch(), os.truncate(path, LARGEST_JSON + 1)), "at most"),
        (lambda path: path.write_bytes(b"\xff\xfe\xfd"), "damaged"),
        (lambda path: path.write_text("{"), "damaged"),
        (lambda path: path.write_text('{"a": NaN}'), "NaN is no JSON"),
        (lambda path: path.write_text("[" + "9" * 10_000 + "]"), "damaged"),
        (lambda path: path.write_text(nested(100_000)), "nested too deeply"),
        (lambda path: path.write_text(nested(DEEPEST_JSON + 1)), "nested too deeply"),
    ],
    ids=["fifo", "folder", "device", "link out", "loop", "missing", "large", "no text", "cut", "NaN", "digits", "deep",
         "too deep"],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(make: object, said: str, tmp_path: Path) -> None:
    make(tmp_path / "x.json")  # type: ignore[operator]
    for read in (read_json, *([read_tensors, read_metadata] if "link" in said or "regular" in said else [])):
        with pytest.raises(UserError, match=said) as raised:
            read(tmp_path / "x.json")
        assert "x.json" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) <= 200


def test_a_link_inside_the_directory_and_all_that_is_json_are_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, True, "\u2028"], "deep": json.loads(nested(DEEPEST_JSON - 1))}
    write_json(tmp_path / "x.json", content)
    (tmp_path / "link.json").symlink_to("x.json")
    assert read_json(tmp_path / "link.json") == content


@pytest.mark.parametrize("text", ["a\0b", "", 3, None])
def test_what_is_no_path_is_one_line(text: object) -> None:
    with pytest.raises(UserError, match="is no path"):
        as_path(text)  # type: ignore[arg-type]


def test_tensors_that_are_not_finite_or_not_whole_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path, {"name": "it"})
    assert read_tensors(path)[1] == read_metadata(path) == {"name": "it"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    for read in (read_tensors, read_metadata):
        with pytest.raises(UserError, match="damaged"):
            read(path)
    save_file({"a": torch.tensor([1.0, torch.nan])}, path)
    with pytest.raises(UserError, match="'a' is not finite"):
        read_tensors(path)


def test_metadata_are_added_and_the_tensors_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7)}
    save_file(tensors, path, {"format": "pt"})
    for number in ("1", "22"):
        add_metadata(path, {"number": number, "long": "x" * 500})
    assert read_metadata(path) == {"format": "pt", "number": "22", "long": "x" * 500}
    assert all(torch.equal(x, tensors[name]) for name, x in load_file(path).items())
    assert [x.name for x in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("policygrad.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", nested(100_000), "nested too deeply"),
        ("model.safetensors", "x", "damaged"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}', "outside its directory"),
    ],
)
def test_a_model_directory_is_looked_at_before_a_library_reads_it(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "fine.json").write_text('{"limit": Infinity}')
    check_directory(tmp_path / "model", tmp_path)
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(UserError, match=said):
        check_directory(tmp_path / "model", tmp_path)
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / "pytorch_model.bin").symlink_to(__file__)
    with pytest.raises(UserError, match="link out of its directory"):
        check_directory(tmp_path / "model", tmp_path)


def test_what_is_written_durably_is_there_with_its_size_and_hash(tmp_path: Path) -> None:
    path, content = tmp_path / "x", os.urandom(1000)
    assert write_durably(path, [content[:10], memoryview(content[10:])]) == (1000, hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "x", [b"new"])
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [("x", b"old")]


def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {str(kind): (100 * torch.randn(3, 2)).to(kind) for kind in TYPES}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(3.5), "turned": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "x.safetensors"
    write_durably(path, as_safetensors(tensors, {"a": "b"}))
    assert read_metadata(path) == {"a": "b"}
    for found in (load_file(path), load(path.read_bytes())):
        assert sorted(found) == sorted(tensors)
        for name, x in tensors.items():
            assert found[name].dtype == x.dtype
            assert found[name].shape == x.shape
            assert torch.equal(*(y.contiguous().flatten().view(torch.uint8) for y in (found[name], x)))


@pytest.mark.parametrize("write", [write_bytes, lambda path, content: write_durably(path, [content])])
def test_what_is_written_replaces_a_link_and_does_not_follow_it(write: Any, tmp_path: Path) -> None:
    """Neither the link in a file's place, nor one where it is written before it is whole."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("file", "file.new"):
        (tmp_path / name).symlink_to(victim)
    write(tmp_path / "file", b"new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()


def test_a_directory_that_leads_elsewhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_text("")
    check_real(tmp_path)
    for make in (lambda x: x.symlink_to("/etc"), lambda x: x.symlink_to("absent"), os.mkfifo):
        odd = tmp_path / "below" / "odd"
        make(odd)
        with pytest.raises(UserError, match="odd is damaged: it is no regular file"):
            check_real(tmp_path)
        odd.unlink()
