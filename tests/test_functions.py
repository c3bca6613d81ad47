"""Users' functions by name: which code runs, and one line of advice for everything that can go wrong."""

import sys
from pathlib import Path

import pytest

from policygrad.errors import UserError
from policygrad.functions import load_function


@pytest.fixture(autouse=True)
def no_module_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


def said(spec: str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load_function(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 200, message
    return message


def test_a_file_is_executed_anew(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for number in (1, 22):
        file.write_text(f"def f():\n    return {number}\n")
        assert load_function(f"{file}:f")() == number


def test_a_file_hides_no_module_and_no_other_file(tmp_path: Path) -> None:
    """Two files of one name, which is also that of an installed module."""
    import json

    functions = []
    for folder in ("a", "b"):
        file = tmp_path / folder / "json.py"
        file.parent.mkdir()
        file.write_text(f"def f():\n    return {folder!r}\n")
        functions.append(load_function(f"{file}:f"))
    assert [f() for f in functions] == ["a", "b"]
    assert functions[0].__module__ != functions[1].__module__
    assert sys.modules["json"] is json


def test_a_file_may_have_dataclasses_with_types_as_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom typing import ClassVar\n"
        "@dataclass\nclass Scale:\n    kind: ClassVar[str] = 'x'\n    by: float = 2.0\n"
        "def f():\n    return Scale()\n"
    )
    assert load_function(f"{file}:f")().by == 2.0


def test_anything_callable_is_a_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import functools\nf = functools.partial(max, 3)\nclass C: ...\n")
    assert load_function(f"{file}:f")(5) == 5
    assert load_function(f"{file}:C").__name__ == "C"
    assert load_function("math:sqrt")(4) == 2


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "inner.py").write_text("from helper_of_mine import f\n")
    (tmp_path / "helper_of_mine.py").write_text("def f():\n    return 'mine'\n")
    before = [x for x in sys.path if x]
    monkeypatch.setattr(sys, "path", list(before))
    assert load_function("package_of_mine.inner:f")() == "mine"
    assert sys.path == [*before, str(tmp_path)], "last, and for good: what was imported may import its neighbors later"
    assert load_function("package_of_mine.inner:f")() == "mine"
    assert sys.path == [*before, str(tmp_path)]


def test_a_file_finds_its_neighbors_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", before := [x for x in sys.path if x])
    before = list(before)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.py").write_text("from neighbor_of_mine import f\n")
    (tmp_path / "inner" / "neighbor_of_mine.py").write_text("def f():\n    return 'mine'\n")
    assert load_function("inner/mine.py:f")() == "mine"
    assert sys.path == [*before, str(tmp_path), str(tmp_path / "inner")]


def test_a_module_in_the_working_directory_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own colorsys.py, beside a reward, is not the standard library's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("def rgb_to_hsv():\n    return 'mine'\n")
    assert load_function("colorsys:rgb_to_hsv")(0, 0, 0) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("f", "reward 'f' names no function: write module:function or path/file.py:function"),
        (":f", "reward ':f' names no function"),
        ("mine:", "reward 'mine:' names no function"),
        ("mine.py:f()", "reward 'mine.py:f()' names no function"),
        ("some/model:f", "reward 'some/model:f' names no function"),
        ("..mine:f", "reward '..mine:f' names no function"),
        ("mine.py", "reward 'mine.py' is a file: add the function's name, as in file.py:function"),
        ("nowhere.py:f", "there is no file nowhere.py: give the path of the reward's file"),
        ("no/where.py:f", "there is no file no/where.py: give the path of the reward's file"),
        ("min.py:f", "there is no file min.py: did you mean mine.py?"),
        ("no_such_package.mod:f", "there is no module 'no_such_package.mod' for the reward: check its name, or write"),
        ("mime:f", "there is no module 'mime' for the reward: did you mean mine?"),
        ("urllib.requests:f", "there is no module 'urllib.requests' for the reward: did you mean urllib.request"),
        ("mine.py:helpful", "mine.py has no function 'helpful': did you mean helper?"),
        ("mine.py:zzz", "mine.py has no function 'zzz': it has helper, other"),
        ("mine.py:CONSTANT", "mine.py has no function 'CONSTANT': it has helper, other"),
        ("empty.py:f", "empty.py has no function 'f': it has none"),
        ("syntax.py:f", "importing syntax.py raised SyntaxError: "),
        ("exits.py:f", "importing exits.py raised SystemExit: 1: fix it (--debug shows where)"),
        ("exits:f", "importing exits raised SystemExit: 1: fix it (--debug shows where)"),
        ("needs.py:f", "importing needs.py raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("needs:f", "importing needs raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("talks.py:f", "importing talks.py raised ValueError: a a a "),
        (f"{'long/' * 50}mine.py:f", "there is no file ...long/long/"),
        (f"{'long.' * 50}mine:f", "there is no module '...ng.long."),
        (f"mine.py:{'long' * 50}", "mine.py has no function '...glong"),
    ],
)
def test_what_cannot_be_loaded(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "mine": "CONSTANT = 1\ndef helper(): ...\ndef other(): ...\ndef _private(): ...\n",
        "empty": "",
        "syntax": "def f(:\n",
        "exits": "raise SystemExit(1)\n",
        "needs": "import no_such_package\n",
        "talks": "raise ValueError('a\\n' * 500)\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    assert said(spec, what="reward").startswith(message)
    assert not {x for x in set(sys.modules) - before if "syntax" in x or "exits" in x or "needs" in x}


def test_a_users_own_user_error_is_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from policygrad.errors import UserError\nraise UserError('set MY_KEY')\n")
    assert said(f"{file}:f") == "set MY_KEY"


def test_an_interruption_is_not_an_error_of_the_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_function(f"{file}:f")
