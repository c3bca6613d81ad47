"""Which names of a run lead out of it, and where its local paths are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from policygrad.errors import UserError
from policygrad.train.names import NAMES, absolute, check_trusted, located, outside, resuming, trusting
from policygrad.train.options import Options, options_of


def holds_any_text(kind: Any) -> bool:
    """Whether an option's type has free text in it."""
    return kind is str or any(map(holds_any_text, get_args(kind)))


# Options whose text leads nowhere, whatever it is.
HARMLESS = {
    "device",
    "split",
    "evaluation_split",
    "lora_targets",
    "columns",
    "system_prompt",
    "template_variables",
    "stop",
    "wrap",  # names of a list
    "policy_keys",
    "critic_keys",
}


def test_every_option_with_a_text_of_its_own_is_known_to_be_a_name_or_harmless() -> None:
    """A new option that names a file or code must not be believed because nobody thought of it."""
    texts = {name for name, kind in get_type_hints(Options).items() if holds_any_text(kind)}
    assert texts <= {*NAMES, *HARMLESS}


def options(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"reward": (), "critic": "copy", "model": None, "attention": None, "lora_rank": 0} | values
    )


@pytest.mark.parametrize(
    ("kind", "task", "values", "expected"),
    [
        ("control", "CartPole-v1", {}, {}),
        ("control", "ALE/Pong-v5", {}, {}),
        ("control", None, {}, {}),
        ("control", "evil:CartPole-v1", {}, {"environment": ["evil:CartPole-v1"]}),
        ("control", "r/evil.py:Own", {}, {"environment": ["r/evil.py:Own"]}),
        ("control", "X-v0", {"env_options": {"map_name": "4x4", "slip": False, "size": 3}}, {}),
        ("control", "X-v0", {"env_options": {"xml_file": "/a/b"}}, {"env_options": ["/a/b"]}),
        ("control", "X-v0", {"env_options": '{"deep": [{"entry": "evil:f"}]}'}, {"env_options": ["evil:f"]}),
        ("exact", "exact:chain", {}, {}),
        ("language", "arithmetic", {}, {}),
        ("language", "/etc/x.jsonl", {"dataset": "/etc/y.jsonl", "model": "/m", "tokenizer": "/t"}, {}),
        ("language", "x.jsonl", {"reward": ("exact_match", "math_equal", "format:^a:b", "overlong:8,2")}, {}),
        ("language", "x.jsonl", {"reward": ("exact_match", "evil:f")}, {"reward": ["evil:f"]}),
        ("language", "x.jsonl", {"reward": ("a/b.py:f", "org/model")}, {"reward": ["a/b.py:f", "org/model"]}),
        ("language", "x.jsonl", {"critic": "shared"}, {}),
        ("language", "x.jsonl", {"critic": "org/model"}, {"critic": ["org/model"]}),
        ("language", "x.jsonl", {"attention": "sdpa"}, {}),
        ("language", "x.jsonl", {"attention": "org/kernels"}, {"attention": ["org/kernels"]}),
        ("language", "x.jsonl", {"model": "/m", "lora_rank": 4}, {"model": ["/m"]}),
        ("language", "x.jsonl", {"model": "/m", "lora_rank": 4, "save": "merged"}, {}),
    ],
)
def test_what_leads_out_of_a_run(kind: str, task: Any, values: dict[str, Any], expected: dict[str, list[str]]) -> None:
    assert outside(kind, task, options(**values)) == expected
    assert trusting(kind, task, options(**values)) == (" --trust" if expected else "")


@pytest.mark.parametrize(
    ("kind", "task", "values", "expected"),
    [
        ("control", "CartPole-v1", {}, []),
        ("control", "evil:CartPole-v1", {}, ["environment"]),
        ("control", "CartPole-v1", {"start": "/runs/x"}, ["start"]),
        ("exact", "exact:chain", {}, []),
        ("language", "arithmetic", {}, []),
        ("language", "/etc/x.jsonl", {"model": "/m", "tokenizer": "/t"}, ["dataset", "model", "tokenizer"]),
        ("language", None, {"dataset": ("/y",), "evaluation_dataset": ("/z",)}, ["dataset", "evaluation_dataset"]),
    ],
)
def test_training_follows_more_names_than_evaluating(
    kind: str, task: Any, values: dict[str, Any], expected: list[str]
) -> None:
    assert sorted(outside(kind, task, options(**values), training=True)) == expected
    command = resuming(Path("my runs"), kind, task, options(**values))
    assert command == "policygrad resume 'my runs'" + (" --trust" if expected else "")


def test_an_environment_without_a_name_is_handed_in_again() -> None:
    assert resuming(Path("run"), "control", None, options()) == "policygrad.resume('run', environment=...)"


def test_remote_code_is_a_flag_of_its_own() -> None:
    assert trusting("language", "x.jsonl", options(trust_remote_code=True)) == " --trust-remote-code"


def test_every_name_is_printed_in_one_line() -> None:
    check_trusted({})
    with pytest.raises(UserError, match=r"reward 'evil:f', model '/m'.*--trust"):
        check_trusted({"reward": ["evil:f"], "model": ["/m"]})
    with pytest.raises(UserError, match="--trust") as raised:
        check_trusted({"reward": ["\x1b[2J\n" * 50, "x" * 300]})
    assert len(str(raised.value)) <= 200
    assert str(raised.value).isprintable()


def test_local_paths_are_made_absolute_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "x.jsonl", "copy", "exact_match"):
        (tmp_path / name).touch()
    assert absolute("mine.py:f") == f"{tmp_path}/mine.py:f"
    assert absolute("x.jsonl") == f"{tmp_path}/x.jsonl"
    for name in ("org/model", "module:f", "elsewhere.py:f", "CartPole-v1"):
        assert absolute(name) == name
    kind = options_of("ppo", "language")
    found = located(kind(reward=("mine.py:f", "exact_match"), dataset="x.jsonl", model="org/model"))
    assert found.reward == (f"{tmp_path}/mine.py:f", "exact_match")
    assert (found.dataset, found.model, found.critic) == (f"{tmp_path}/x.jsonl", "org/model", "copy")
