"""The public names: found at first use, listed for editors, checked by type checkers; importing them is instant."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import policygrad as pg
from policygrad.train.methods import METHODS

ROOT = Path(pg.__file__).parent.parent
PACKAGES = ["policygrad", "policygrad.exact", "policygrad.language", "policygrad.verify"]


def process(script: str, **options: object) -> str:
    """What a new interpreter prints. It finds policygrad by its path alone, with no distribution installed."""
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_every_listed_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"{package} has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_name_is_the_thing_that_its_module_has() -> None:
    from policygrad.exact.worlds import cliff
    from policygrad.language.rewards import Rewards
    from policygrad.train.run import Run
    from policygrad.verify.command import verify

    assert pg.exact.cliff is cliff
    assert pg.language.Rewards is Rewards
    assert pg.verify.verify is verify
    assert pg.load == Run.load
    assert pg.advantages.gae is pg.gae


def test_the_namespaces_of_the_lower_level_are_modules() -> None:
    names = (
        "advantages control credit critics diagnostics divergences exact language linalg objectives returns samplers"
    )
    for name in [*names.split(), "score", "updates", "verify", "weights"]:
        assert isinstance(getattr(pg, name), ModuleType), name
        assert getattr(pg, name).__name__ == f"policygrad.{name}"


def test_train_shows_the_arguments_of_the_function_whichever_way_it_is_found() -> None:
    from policygrad.train.training import train

    assert inspect.signature(pg.train) == inspect.signature(train)
    assert inspect.signature(sys.modules["policygrad.train"]) == inspect.signature(train)


def test_every_method_is_a_name_of_its_own() -> None:
    assert set(METHODS) <= set(pg.__all__)


def test_importing_is_instant_and_listing_too() -> None:
    """What makes an import slow is torch and the environments; so: none of them."""
    heavy = "{'torch', 'numpy', 'gymnasium', 'transformers', 'matplotlib'} & set(sys.modules)"
    lists = "dir(policygrad), policygrad.__all__, policygrad.__version__"
    assert process(f"import sys, policygrad; {lists}; print({heavy})") == "set()\n"


def test_the_version_is_known_without_an_installed_distribution() -> None:
    hidden = "import importlib.metadata as m; m.distribution = m.version = m.metadata = None; import policygrad as pg"
    assert process(f"{hidden}; print(pg.__version__)") == f"{pg.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pg.__version__)


def test_a_misspelled_name_is_told_the_right_one() -> None:
    done = subprocess.run([sys.executable, "-c", "import policygrad as pg; pg.trian"], capture_output=True, text=True)
    assert "policygrad has no attribute 'trian'" in done.stderr
    assert sys.version_info < (3, 12) or "Did you mean: 'train'?" in done.stderr


RIGHT = """
import policygrad as pg
from policygrad import dapo, train
run: pg.Run = pg.train("ppo", "CartPole-v1", steps=3, hidden=[8], critic=None, out="x", preset="none")
train("ppo", steps=3, iterations=None)
train("ppo", "FrozenLake-v1", env_options={"is_slippery": False}, hidden=8)
train("grpo", dataset=[{"prompt": "1+1="}], reward=[len, "exact_match"], columns={"prompt": "question"}, stop="END")
pg.Training("ppo", "CartPole-v1", steps=3, progress=True)
pg.load("runs/mine").evaluate(3)
pg.advantages.gae, pg.exact.chain(), pg.exact.worlds.cliff(), pg.language.Rewards, pg.verify.verify, pg.fit_critic
version: str = pg.__version__
sample = pg.Sampler(pg.make_environments("CartPole-v1"), 8, seed=0)
learner = pg.dapo(pg.exact.SoftmaxPolicy(pg.exact.policies.tabular(2, 2)), sample, clip_high=0.3)
"""
WRONG = [
    ('pg.trian("ppo", "CartPole-v1")', 'no attribute "trian"'),
    ('pg.train("ppo", "CartPole-v1", stepz=3)', 'Unexpected keyword argument "stepz"'),
    ('pg.train("ppo", "CartPole-v1", steps="three")', 'incompatible type "str"'),
    ('pg.train("ppo", "CartPole-v1", credit="gea")', "incompatible type \"Literal['gea']\""),
    ('pg.Training("ppo", "CartPole-v1", stepz=3)', 'Unexpected keyword argument "stepz"'),
    ('pg.assemble("ppo", learner.objective, learner.sample, stepz=3)', 'Unexpected keyword argument "stepz"'),
    ("dapo(learner.objective, learner.sample, stepz=3)", 'Unexpected keyword argument "stepz"'),
    ("pg.advantages.gea", 'no attribute "gea"'),
    ("pg.language.LanguagePolice", 'no attribute "LanguagePolice"'),
    ("pg.exact.words", 'no attribute "words"'),
    ("pg.load(3)", 'incompatible type "int"'),
    ("version.foo", '"str" has no attribute "foo"'),
]


def test_a_type_checker_sees_what_is_right_and_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(RIGHT + "\n".join(line for line, _ in WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"MYPYPATH": str(ROOT)})
    found = dict(re.findall(r"use\.py:(\d+): error: (.*)", done.stdout))
    first = RIGHT.count("\n") + 1
    assert list(map(int, found)) == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for said, (line, expected) in zip(found.values(), WRONG, strict=True):
        assert expected in said, line
