"""Imports run one way: 0 <- 1 <- 2 <- 3 <- 4, and the worlds know layer 0 only (language the divergences too).

`ranks` lies below: whatever sums over rows knows who has the others.
"""

import ast
import sys
from pathlib import Path

import pytest

import policygrad

ROOT = Path(policygrad.__file__).parent
LAYER = {
    "ranks": -1,
    **dict.fromkeys(["errors", "files", "functions", "lazy", "machine", "precision", "rollout", "weights"], 0),
    **dict.fromkeys(["score", "returns", "advantages", "divergences", "objectives", "diagnostics"], 1),
    **dict.fromkeys(
        ["compiling", "linalg", "updates", "guards", "noise", "critics", "credit", "turns", "samplers", "symmetry"], 2
    ),
    **dict.fromkeys(["algorithms"], 3),
    **dict.fromkeys(["verify", "train", "cli"], 4),
}
WORLDS = {"control", "language", "exact"}
ALSO = {"language": {"divergences"}}  # what a world may know besides
LOADERS = {"functions", "lazy"}  # where a name becomes a module
ABOVE = {"__init__", "__main__"}  # the public names: anything, lazily
FILES = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """The top-level module or subpackage a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(source: str) -> set[str]:
    """Everything that a source imports, at any depth, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "policygrad" else {module}
    return names


def broken(here: str, source: str) -> list[str]:
    """What a source in `here` imports and may not."""
    if here in ABOVE or LAYER.get(here) == 4:
        return []
    wrong = []
    for name in imported(source):
        top, *rest = name.split(".")
        there = rest[0] if rest else ""
        if top == "":
            wrong.append(name)  # a relative import hides where it goes
        elif top != "policygrad":
            known = top in {"torch", "jaxtyping", "safetensors"} or top in sys.stdlib_module_names
            if here in LAYER and (not known or (top == "importlib" and here not in LOADERS)):
                wrong.append(name)
        elif not (there == here or there == "errors" or _below(here, there)):
            wrong.append(name)
    return wrong


def _below(here: str, there: str) -> bool:
    if here in WORLDS:
        return LAYER.get(there) in (-1, 0) or there in ALSO.get(here, set())
    # layers 1 and 2 may import within themselves; a file of layer 0 stands alone
    return there in LAYER and (LAYER[there] < LAYER[here] or LAYER[there] == LAYER[here] in (1, 2))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    assert broken(part(path), path.read_text()) == []


def test_every_file_has_a_place() -> None:
    assert {part(path) for path in FILES} <= set(LAYER) | WORLDS | ABOVE


def test_policygrad_is_where_the_files_are() -> None:
    assert {"rollout", "algorithms", "control"} <= {part(path) for path in FILES}


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("rollout", "from policygrad.weights import average"),
        ("weights", "import numpy"),
        ("returns", "from policygrad.updates import ascend"),
        ("returns", "import gymnasium"),
        ("returns", "def f():\n    from policygrad.control import policies"),
        ("advantages", "from policygrad import linalg"),
        ("advantages", "from policygrad import Rollout"),
        ("advantages", "from . import updates"),
        ("advantages", "import importlib"),
        ("updates", "import policygrad.algorithms.ppo"),
        ("algorithms", "from policygrad.control.sampler import Sampler"),
        ("algorithms", "from policygrad.train.methods import METHODS"),
        ("credit", "from policygrad.algorithms.ppo import ppo"),
        ("score", "from policygrad.critics import fit_critic"),
        ("control", "from policygrad.returns import reward_to_go"),
        ("control", "from policygrad.language import policies"),
        ("control", "from policygrad.divergences import k3"),
        ("language", "from policygrad.advantages import gae"),
        ("exact", "from policygrad.control import policies"),
        ("exact", "from policygrad.algorithms.ppo import ppo"),
    ],
)
def test_the_rule_forbids(here: str, source: str) -> None:
    assert broken(here, source)


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("rollout", "import torch\nfrom jaxtyping import Float\nfrom policygrad.errors import UserError"),
        ("advantages", "from policygrad.returns import n_step\nfrom policygrad.rollout import Rollout"),
        ("critics", "from policygrad.linalg import score_products\nfrom policygrad.advantages import gae"),
        ("algorithms", "from policygrad.updates import ascend\nfrom policygrad.algorithms.trpo import trpo"),
        ("control", "import gymnasium\nfrom policygrad.rollout import Rollout\nfrom policygrad.control import spaces"),
        ("credit", "from policygrad.critics import bootstrap_values\nfrom policygrad.score import log_probabilities"),
        ("functions", "import importlib\nfrom policygrad.errors import UserError"),
        ("language", "import transformers\nfrom policygrad.divergences import k3"),
        ("train", "from policygrad.control.sampler import Sampler\nfrom policygrad.algorithms.ppo import ppo"),
        ("cli", "from policygrad.train.training import train"),
    ],
)
def test_the_rule_allows(here: str, source: str) -> None:
    assert broken(here, source) == []
