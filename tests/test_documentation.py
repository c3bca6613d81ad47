"""What the documents show is so: the examples run, the commands parse, the links lead somewhere, the tree is whole."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tyro.conf import UseAppendAction

import policygrad
from policygrad import cli
from policygrad.language import warmup
from policygrad.train import presets
from policygrad.train.methods import METHODS, TABLE, method_named
from policygrad.train.options import for_command_line, options_of, validate, with_values
from policygrad.train.reward_model import train_reward_model
from policygrad.train.reward_options import RewardModelOptions
from policygrad.train.worlds import OWN_TASKS
from policygrad.train.worlds.language import warm_model

ROOT = Path(policygrad.__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_PACKAGES = (
    ("ALE/", "ale_py"),
    ("MiniGrid-", "minigrid"),
    ("mpe2/", "mpe2"),
    ("classic/", "pettingzoo"),
    ("phys2d/", "flax"),
)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(document: Path) -> list[list[str]]:
    """The lines of its shell blocks, in words, with continuations joined and comments and prompts left out.

    A block is fenced, or of indented lines that begin with a command.
    """
    indented = re.findall(r"^    ((?:policygrad|python|make) .*)$", document.read_text(), re.MULTILINE)
    text = "\n".join([*blocks(document, "sh", "bash", "console", "shell"), *indented]).replace("\\\n", " ")
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in text.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(autouse=True)
def hardly_warmed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(warmup.RECIPE, "steps", 5)
    monkeypatch.setitem(warmup.RECIPE, "rows", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@every_document
def test_python_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would paste them; of training steps there are fewer."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in blocks(document, "python"):
        short = re.sub(r"\b\d{1,3}(?:_?\d{3}){1,2}\b", "400", source)
        short = re.sub(r"iterations=\d+", "iterations=1, prompts_per_rollout=4, held_out=2", short)
        exec(compile(short, f"{document.name}: {source[:40]}", "exec"), names)


METHODS_AND_TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("ppo", "CartPole-v1", {"num_steps": 16, "kl_old_coefficient": 0.1, "kl_old_target": 0.01}),
    ("trpo", "Pendulum-v1", {"num_steps": 16}),
    ("npg", "exact:chain", {}),
    ("grpo", "exact:tokens", {"kl_ref": "loss", "kl_ref_target": 0.1}),
    ("grpo", "arithmetic", {"kl_ref": "loss", "kl_ref_target": 0.1, "old_logp": "recomputed", "sampling_rounds": 2}),
    ("clone", "CartPole-v1", {"demonstrations": [{"observation": [0.0, 0.1, 0.2, 0.3], "action": 1}] * 20}),
    ("clone", "arithmetic", {}),
    ("ppo", "arithmetic", {"reward": ["math_equal", "overlong:40,10"], "cut": "masked", "minibatch_size": 8}),
]


def test_every_metric_is_explained() -> None:
    document = (ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`([a-zA-Z_]+)`", document))
    for method, task, options in METHODS_AND_TASKS:
        more = (
            {"prompts_per_rollout": 8, "held_out": 4, "evaluate_every": 1, "max_tokens": 40}
            if task == "arithmetic"
            else {}
        )
        more = {name: x for name, x in more.items() if hasattr(options_of(method, "language"), name)}
        run = policygrad.train(method, task, iterations=2, preset="none", progress=False, **options, **more)
        found = {name for row in run.metrics for name in row}
        assert {name for name in found if not name.startswith(("reward/", "info/"))} <= known, (method, task)
    preferences = [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": "1+2=", "chosen": "3", "rejected": "4"},
    ]
    judge = train_reward_model(
        preferences, model=str(warm_model(False, "cpu").name_or_path), held_out=1, progress=False
    )
    assert {name for row in judge.metrics for name in row} <= known


def shortened(rest: list[str]) -> list[str]:
    """The arguments, with one step of training, and of a study two seeds or trials."""
    for flag, few in (("--steps", []), ("--seeds", ["--seeds", "0-1"]), ("--trials", ["--trials", "2"])):
        if flag in rest:
            at = rest.index(flag)
            rest = rest[:at] + rest[at + 2 :] + few
    return [*rest, "--steps", "1"]


@every_document
def test_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one directory, each training for a single iteration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _, name, *rest in (line for line in commands(document) if line[0] == "policygrad"):
        if name == "clone" and "--model" in rest:
            name, rest = "train", ["clone", *rest]
        theirs = "--model" in rest or "--engine-python" in rest or ("--start" in rest and "--dataset" in rest)
        if name == "train" and theirs:  # a model, a program and files that are the reader's
            defaults = options_of(method_named(rest[0]).name, "language")()
            given = cli._parse(cli._command(defaults), rest[1:], "train", UseAppendAction).options
            validate(with_values(defaults, vars(given)), defaults)
            continue
        if "--samplers" in rest:  # Ray, or its cluster, may not be there
            defaults = options_of(method_named(rest[0]).name, "control")()
            given = cli._parse(cli._command(defaults), rest[1:], "train", UseAppendAction).options
            validate(with_values(defaults, vars(given)), defaults)
            continue
        if any(word.removeprefix("hub:").isupper() and len(word) > 2 for word in rest):
            continue  # a form, not an example
        if name == "verify":
            cli._parse(cli.VerifyOptions, rest, "verify")
            continue
        if name == "reward-model":
            cli._parse(for_command_line(RewardModelOptions), rest, "reward-model")
            continue
        task = rest[1] if name in ("train", "tune") and len(rest) > 1 else ""
        if task.endswith("-v5") and find_spec("mujoco") is None:
            continue
        if any(task.startswith(x) and find_spec(y) is None for x, y in OF_PACKAGES):
            continue
        if task in OWN_TASKS:
            rest += ["--starts", "8"] if task == "lookup" else []
            rest += ["--iterations", "1", "--prompts-per-rollout", "4", "--completions", "2", "--held-out", "2"]
            rest += ["--minibatch-size", "4"] if rest[0] == "ppo" else []
        elif name in ("train", "tune") and "--help" not in rest:
            rest = shortened(rest)
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *rest])
        assert not stop.value.code, f"{document.name}: policygrad {name} {' '.join(rest)}"


def test_the_table_of_methods_is_what_its_generator_makes(capsys: pytest.CaptureFixture[str]) -> None:
    document = ROOT / "docs" / "methods.md"
    source, *_ = blocks(document, "python")
    exec(compile(source, "the generator", "exec"), {})
    made = capsys.readouterr().out
    assert made.count("\n") == len(TABLE) + 2
    assert f"\n{made}\n" in document.read_text()


@every_document
def test_scripts_and_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(document):
        if line[0] == "make":
            assert {word for word in line[1:] if "=" not in word} <= targets
        if line[0] == "python" and line[1].endswith(".py"):
            assert (ROOT / line[1]).exists(), line[1]


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_tree_of_the_readme_has_one_line_for_each_file() -> None:
    """Two spaces a level; a file stands below its folder, with a word on what is in it."""
    folders: list[str] = []
    named = set()
    for line in blocks(ROOT / "README.md", "", "text")[-1].splitlines():
        name, *words = line.split(maxsplit=1)
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        elif not name.endswith("__init__.py"):
            assert words, line
            named.add("".join(folders) + name)
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "policygrad").rglob("*.py")}
    package -= {path for path in package if path.endswith("/__init__.py")}
    assert {path for path in named if path.startswith("policygrad/")} == package
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_readme_names_every_method_by_the_name_it_has() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []


def test_presets_begin_with_a_word_on_their_environment() -> None:
    for name in presets.names():
        first = (ROOT / "policygrad" / "presets" / f"{name}.toml").read_text().splitlines()[0]
        assert re.match(r"# .{10,}", first), name


def test_the_contributors_page_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", sorted(policygrad.__all__))
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(policygrad, name)
    assert thing.__doc__
    assert name in dir(policygrad)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_public_function(name: str) -> None:
    assert callable(getattr(policygrad, name))


def test_there_is_nothing_by_any_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dqn'"):
        _ = policygrad.dqn
