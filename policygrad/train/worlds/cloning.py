"""Learning from demonstrations, on any world: the sampler is a data set, and the likelihood of what is held out judges.

In control the data set is a file of transitions; language models have theirs in language_cloning.py.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import torch
from torch import Tensor

from policygrad import ranks
from policygrad.control.demonstrations import (
    COLUMNS,
    TOGETHER,
    Demonstrations,
    Transitions,
    as_columns,
    demonstrated,
    layout_of,
    transitions,
)
from policygrad.control.environments import unflattened
from policygrad.control.minari import place_of, read_minari
from policygrad.control.spaces import Flat
from policygrad.errors import Note, UserError, ending, listed, shortened
from policygrad.language.reading import read_file
from policygrad.rollout import Rollout, Split, in_parts, state_size
from policygrad.score import log_probabilities
from policygrad.train.compose import split_of
from policygrad.train.options import OptionError
from policygrad.train.reports import Curve, Row
from policygrad.train.worlds import ROWS
from policygrad.train.worlds.control import ControlWorld
from policygrad.train.worlds.world import Own, World
from policygrad.weights import average, per_token


@dataclass
class Likelihood:
    """How likely the held-out decisions of the demonstrator are under a policy."""

    log_probability: float  # the mean of log pi(a|s), of a density in control with Box actions
    accuracy: float | None  # how often a discrete policy's most likely action is the demonstrator's
    decisions: int

    @property
    def score(self) -> float:
        """The main number."""
        return self.log_probability

    def line(self) -> str:
        """The result as one line."""
        known = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        return f"log-probability {self.log_probability:.4f}{known}, of {self.decisions:,} held-out decisions"

    def summary(self) -> dict[str, Any]:
        """The result for JSON."""
        return asdict(self)


class Cloning(World):
    """A world whose rollouts are demonstrations. Mixed in before the world that has the policy."""

    def held_out(self) -> Rollout | None:
        """The demonstrations that nothing is learned from."""
        raise NotImplementedError

    @property
    def judged(self) -> str | None:  # type: ignore[override]
        """The metric of evaluation in training, if anything is held out."""
        return "log_probability" if self.validates() else None

    def validates(self) -> bool:
        """Whether anything is held out."""
        raise NotImplementedError

    def judge(self) -> Likelihood:
        """The likelihood of the held-out demonstrations."""
        self.policy.eval()
        rollout = self.held_out()
        assert rollout is not None
        weight = per_token(rollout.mask)
        logp = log_probabilities(self.policy, rollout, self.together(rollout))
        found = float(average(logp, weight))
        return Likelihood(found, self.accuracy(rollout), int(rollout.mask.sum()))

    def together(self, rollout: Rollout) -> Split:
        """The rows whose likelihood is computed at a time."""
        return split_of(self.options, self.policy) or max(1, TOGETHER // rollout.mask.shape[1])

    def accuracy(self, rollout: Rollout) -> float | None:
        """How often the policy's most likely action is the demonstrator's; None if that is not measured."""
        return None

    def scores(self, evaluation: Any) -> Row:
        known = {} if evaluation.accuracy is None else {"accuracy": evaluation.accuracy}
        return {"log_probability": evaluation.log_probability, **known}

    def curve(self) -> Curve:
        points = ("log_probability", "of held-out ones") if self.judged else None
        return Curve(x=("steps", "decisions"), y=("objective", "log-probability of demonstrations"), points=points)

    def status(self, row: Row) -> list[str]:
        parts = [f"log-probability {row['objective']:.4f}"]
        parts += [f"held-out {row['log_probability']:.4f}"] if "log_probability" in row else []
        return [*parts, f"{row['steps_per_second']:,.0f} decisions/s"]

    def speeds(self, row: Row, before: Row, seconds: float) -> Row:
        return World.speeds(self, row, before, seconds)

    def solved(self, row: Row) -> bool:
        return False

    def summary(self, rows: list[Row]) -> dict[str, Any]:
        return {"objective": rows[-1]["objective"] if rows else None}

    def result(self, rows: list[Row], seconds: float) -> str:
        last = rows[-1]
        return f"log-probability {last['objective']:.4f}, {last['steps']:,.0f} decisions in {seconds:.1f} s"

    def notes(self, run: Any) -> list[str]:
        return []

    def part(self, row: Row) -> Any:
        return World.part(self, row)

    def joined(self, parts: list[Any]) -> Row:
        return World.joined(self, parts)

    def watch(self, profile: Any, learner: Any) -> None:
        World.watch(self, profile, learner)

    def surroundings(self) -> Any:
        return None

    def restore(self, surroundings: Any) -> str | None:
        return None

    def restore_common(self, surroundings: Any) -> None:
        return


class ClonedControl(Cloning, ControlWorld):
    """An environment, for its spaces and for evaluation, and transitions of another policy in it."""

    kept: Transitions | None = None  # for validation
    data: Any = None  # transitions that were handed in, and not their file

    def build(self, own: Own, progress: bool) -> None:
        self.data = own.data.get("demonstrations")
        super().build(own, progress)

    def validates(self) -> bool:
        return self.options.validation > 0

    def _environments(self) -> Any:
        return self._made(1, vectorization=self.options.vectorization)

    def _sampler(self, environments: Any) -> Any:
        options, space = self.options, environments.single_observation_space
        if options.normalize_observations and not isinstance(space, gymnasium.spaces.Box):
            said = f"observations in {shortened(space, 60)} cannot be normalized, only a Box: leave it off"
            raise OptionError("normalize_observations", said)
        self.normalizer = self._normalizer(space) if options.normalize_observations else None
        source = options.demonstrations if self.data is None else self.data
        if source is None or source == ROWS:
            raise OptionError("demonstrations", "there are no demonstrations to clone: give demonstrations, their file")
        raw, action_space = unflattened(environments), environments.single_action_space
        masked = isinstance(space, Flat) and space.mask is not None
        found = transitions(columns_of(source), raw, action_space, masked=masked)
        self.described, self.digest = described(found), found.digest()
        train, self.kept = found.split(options.validation, options.seed)
        how = {"sequence_length": options.sequence_length, "device": options.device}
        return Demonstrations(train, action_space, normalizer=self.normalizer, **how)

    def _check_memory(self) -> None:
        """As the base class; and raise UserError for demonstrations that such a policy cannot learn from."""
        super()._check_memory()
        train: Transitions = self.sample.found
        rows = len(layout_of(self.policy, train, self.options.sequence_length).mask)
        if rows < ranks.size():
            what = "rows of whole episodes" if state_size(self.policy) else "transitions"
            raise UserError(f"there are {rows:,} {what} for {ranks.size()} ranks: start fewer")
        if state_size(self.policy) and self.kept is not None and self.kept.episode[0] in train.episode:
            said = "a policy with memory learns from whole episodes, and all demonstrations are one"
            raise OptionError("validation", f"{said}: give more episodes, or set validation to 0")

    def held_out(self) -> Rollout | None:
        if self.kept is None:
            return None
        device = self.options.device
        return demonstrated(self.policy, self.kept, self.action_space, self.normalizer, device)

    @torch.no_grad()
    def accuracy(self, rollout: Rollout) -> float | None:
        if isinstance(self.action_space, gymnasium.spaces.Box):
            return None

        def hits(obs: Any, action: Tensor) -> Tensor:
            return (self.policy(obs).mode == action).reshape(*action.shape[:2], -1).all(-1)

        try:
            found = in_parts(hits, self.together(rollout), rollout.obs, rollout.action)
            return float(found[rollout.mask].double().mean())
        except (NotImplementedError, AttributeError):  # a distribution of the user's own, without a mode
            return None

    def fingerprint(self) -> list[float]:
        return World.fingerprint(self)

    def data_digests(self) -> dict[str, str]:
        return {"training data": self.digest}

    def _settle(self) -> None:
        """There is no rollout beside."""

    def notes(self, run: Any) -> list[str]:
        return [f"demonstrations: {self.described}"]


def described(found: Transitions) -> str:
    """What transitions are, in words."""
    known = "" if found.returns is None else f", return {found.returns.mean():,.1f} +- {found.returns.std():,.1f}"
    return f"{len(found):,} transitions, {found.episodes:,} episode{'s' * (found.episodes > 1)}{known}"


def columns_of(source: Any) -> Mapping[str, Any]:
    """The columns of transitions in a file, in a data set of Minari, or of Python: rows, or arrays by name.

    Raises UserError if they cannot be read.
    """
    if not isinstance(source, str):
        return _known(source if isinstance(source, Mapping) else as_columns(_rows(source)))
    path = place_of(source)
    if path.is_dir() or path.suffix in (".hdf5", ".h5"):
        return read_minari(path)
    if path.suffix not in (".jsonl", ".parquet"):
        shown = ending(source, 60)
        if not path.exists():
            raise UserError(f"there is no file {shown} of demonstrations: check the path")
        raise UserError(f"{shown} cannot be read: demonstrations are a .jsonl, .parquet or .hdf5 file")
    return _known(as_columns(read_file(path, path.suffix)))


def _rows(source: Any) -> Any:
    if not isinstance(source, list | tuple) or not all(isinstance(row, Mapping) for row in source):
        said = "give a file, a list of dicts, or a dict of arrays"
        raise OptionError("demonstrations", f"demonstrations is {shortened(source)}: {said}")
    return source


def _known(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns that transitions have, with a note about others."""
    others = [name for name in columns if name not in COLUMNS]
    if others:
        warnings.warn(f"columns of the demonstrations that are not read: {listed(others, 100)}", Note, stacklevel=2)
    return {name: x for name, x in columns.items() if name in COLUMNS}
