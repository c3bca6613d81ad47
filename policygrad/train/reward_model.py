"""`policygrad reward-model`: learn a reward from preferences, evaluate it on held-out pairs, save it."""

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from policygrad.errors import Kept, NonFiniteError, Note, UserError
from policygrad.files import as_path, write_bytes
from policygrad.language import arithmetic, data, models
from policygrad.language.policies import evaluating, width, without_dropout
from policygrad.language.reward_models import (
    Pair,
    RewardModel,
    accuracy,
    as_batch,
    bradley_terry,
    classifier,
    encode_pairs,
    preference_objective,
    scores,
)
from policygrad.language.tasks import ARITHMETIC
from policygrad.rollout import minibatches
from policygrad.train.directories import CLAIM, check_empty, claim, release
from policygrad.train.options import check_bounds, with_values
from policygrad.train.recording import SaveClock, rescued, unwritable
from policygrad.train.reports import Row, progress_bar
from policygrad.train.reward_options import RewardModelOptions
from policygrad.train.run import check_device
from policygrad.train.worlds.language import warm_model
from policygrad.updates import MasterWeightsAdam, ascend
from policygrad.weights import normalized

PROBLEMS, KEPT_PROBLEMS = 48_000, 512  # arithmetic problems; the kept ones evaluate policies, so no pair uses them
# The default learning rate times the width of the model: Adam's best rate falls as the width grows (Yang et al. 2022,
# arXiv 2203.03466). 1e-5 for a width of 4,096, 7e-5 for 576, 4e-4 for the arithmetic task's own model.
RATE_TIMES_WIDTH = 0.04


@dataclass
class PairEvaluation:
    """Scores of a reward model on pairs."""

    accuracy: float  # how often the chosen completion scores higher
    margin: float  # E[r_chosen - r_rejected]
    log_likelihood: float  # E[log sigma(r_chosen - r_rejected)]
    pairs: int

    def line(self) -> str:
        """The scores as one line."""
        return f"accuracy {self.accuracy:.3f}, margin {self.margin:+.3f}, {self.pairs:,} held-out pairs"

    def variance(self) -> float:
        """The squared standard error of the accuracy, as if it were (right + 1) / (pairs + 2), so that it is not 0."""
        share = (self.accuracy * self.pairs + 1) / (self.pairs + 2)
        return share * (1 - share) / self.pairs


@dataclass
class RewardModelRun:
    """A reward model, with its scores on held-out pairs before and after training."""

    model: RewardModel
    options: RewardModelOptions
    directory: Path | None
    pairs: int
    updates: int  # of the whole training
    metrics: list[Row] = field(default_factory=list)  # of the updates that were made
    seconds: float = 0.0
    ended: bool = False
    before: PairEvaluation | None = None
    after: PairEvaluation | None = None

    def save(self, directory: Path | str) -> None:
        """Write the model and its tokenizer in the Hugging Face layout, with a model card and the metrics.

        The file of the weights says of which update they are, and whether that was the last. Raises UserError for
        another directory than the run's own that is not empty.
        """
        directory = as_path(directory)
        if directory != self.directory:
            claim(directory)
        self.write(directory)

    def write(self, directory: Path) -> None:
        """Write all files of `save` to a directory that this run has claimed."""
        metadata = {"iteration": str(len(self.metrics)), "of": str(self.updates), "ended": str(self.ended).lower()}
        models.save_model(self.model.model, self.model.tokenizer, directory, metadata)
        write_bytes(directory / "README.md", self.card().encode())
        write_bytes(directory / CLAIM, "".join(json.dumps(row) + "\n" for row in self.metrics).encode())

    def stage(self) -> str:
        """How far training is, in words."""
        return f"the reward model after {len(self.metrics):,} of {self.updates:,} updates"

    def sound(self) -> bool:
        """Are all weights finite?"""
        return all(bool(p.isfinite().all()) for p in self.model.model.parameters())

    def learned(self) -> bool:
        """Whether accuracy on held-out pairs is above chance and above the start, by two standard errors.

        True also if no pair was held out, since nothing speaks against it.
        """
        if self.before is None or self.after is None:
            return True
        gain, variance = self.after.accuracy - self.before.accuracy, self.before.variance() + self.after.variance()
        above_chance = self.after.accuracy - 0.5 > 2 * math.sqrt(0.25 / self.after.pairs)
        return above_chance and gain > 2 * math.sqrt(variance)

    def verdict(self) -> str:
        """The last line of the command: what the model is for, or that nothing was learned."""
        if self.learned():
            said = f"to train on what it prefers: policygrad train ppo ... --reward {self.directory}"
            return f"model: {self.directory} ({said})"
        return (
            f"model: {self.directory} learned nothing that can be told from chance: on held-out pairs its accuracy was "
            f"{self.before.accuracy:.3f} and is {self.after.accuracy:.3f}. "  # type: ignore[union-attr]
            "More pairs or epochs, or another learning_rate, may help"
        )

    def card(self) -> str:
        """The model card: what the model is, how it was trained, and its scores."""
        source = self.options.model and models.located(self.options.model)
        base = source or f"the small model of the task {ARITHMETIC}"
        judged = [f"- {when}: {x.line()}" for when, x in (("before", self.before), ("after", self.after)) if x]
        options = {name: x for name, x in dataclasses.asdict(self.options).items() if x is not None}
        lines = [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-classification",
            *([f"base_model: {source}"] if source else []),
            "tags: [policygrad, reward-model]",
            "---",
            "",
            f"# A reward model of {self.options.dataset}",
            "",
            f"Trained by `policygrad reward-model` on {self.pairs:,} preferences, from {base}. The reward is the score",
            "at the last token, the end-of-sequence token of a completion that has ended. Use it as a reward function:",
            "`policygrad train ppo --reward DIRECTORY`.",
            *([] if self.ended else ["", f"Training has not ended: this is {self.stage()}."]),
            *(["", "On pairs that were held out:", "", *judged] if judged else []),
            "",
            "```json",
            json.dumps(options, indent=2, default=str),
            "```",
            "",
        ]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The JSON that `policygrad reward-model --json` prints."""
        return {
            "model": None if self.directory is None else str(self.directory),
            "dataset": self.options.dataset,
            "pairs": self.pairs,
            "updates": len(self.metrics),
            "ended": self.ended,
            "learned": self.learned(),
            "seconds": round(self.seconds, 3),
            "before": None if self.before is None else vars(self.before),
            "after": None if self.after is None else vars(self.after),
        }


def train_reward_model(
    dataset: str = ARITHMETIC,
    *,
    out: Path | str | None = None,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
    **values: Any,
) -> RewardModelRun:
    """Train a Bradley-Terry reward model on preferences.

    dataset: arithmetic, which makes its own preferences and needs no model, or a data set with the columns prompt,
    chosen and rejected. out: a directory to save the model to; None saves nothing. values: any other field of
    RewardModelOptions. announce: receives a line about the scores on held-out pairs, before and after training.

    The model is also saved every 30 seconds, and where training stops: a note on the exception says what is kept.

    Raises UserError for every error that the caller can fix, and if training produces NaN or infinity.
    """
    options = with_values(RewardModelOptions(dataset=dataset), values)
    check_bounds(options)
    check_device(options.device)
    directory = None if out is None else as_path(out)
    check_empty(directory)
    with _seeded(options.seed, options.threads):
        examples = preferences_of(options)
        model = starting_model(options, progress)
        encoded = encode_pairs(examples, model.tokenizer, max_length=limit_of(model, options))
        pairs, kept = data.hold_out(encoded, options.held_out, seed=0)
        result = RewardModelRun(model, options, directory, len(pairs), updates_of(len(pairs), options))
        result.before = judge(model, kept, options)
        if result.before:
            announce(f"before: {result.before.line()}")
        torch.manual_seed(options.seed)
        with _saved(result) as save_when_due:
            for row in fit_preferences(model, pairs, options, progress=progress):
                result.metrics.append(row)
                save_when_due()
            result.after = judge(model, kept, options)
            result.ended = True
        if result.after:
            announce(f"after:  {result.after.line()}")
    return result


@contextmanager
def _saved(result: RewardModelRun) -> Iterator[Callable[[], None]]:
    """Save the model at the end of the block, also if an exception ends it. Gives a function that saves now and then.

    A note on the exception says what is kept.
    """
    directory, start, clock, stage = result.directory, time.perf_counter(), SaveClock(), ""
    made = [] if directory is None else claim(directory)

    def kept(where: str) -> str:
        return f"{stage} is kept {where}" if stage else "nothing was saved"

    def save(directory: Path) -> str | None:
        """Save the model. Returns what is wrong if that fails."""
        nonlocal stage
        try:
            result.write(directory)
        except Exception as error:  # of the system or of a library's own kind
            return unwritable(directory, error)
        stage = result.stage()
        return None

    def save_when_due() -> None:
        if directory is not None and clock.due():
            with clock:
                if (said := save(directory)) is not None:
                    warnings.warn(f"{said}: training goes on, and {kept('there')}", Note, stacklevel=2)

    try:
        yield save_when_due
    except BaseException as error:
        result.seconds = time.perf_counter() - start
        if directory is not None and result.sound() and result.metrics:
            save(directory)
        if directory is not None and not stage:
            release(directory, made)
        error.add_note(Kept(kept(f"in {directory}")))
        raise
    result.seconds = time.perf_counter() - start
    if directory is not None and (said := save(directory)) is not None:
        raise UserError(f"{said}: {rescued(result.write, result.stage(), kept('there'))}")


@contextmanager
def _seeded(seed: int, threads: int | None) -> Iterator[None]:
    """Set torch's seed and number of threads (None: unchanged), and restore both afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def preferences_of(options: RewardModelOptions) -> Sequence[dict[str, Any]]:
    """The preferences from the options."""
    if options.dataset != ARITHMETIC:
        return data.load_preferences(options.dataset, split=options.split, columns=options.columns)
    problems, _ = arithmetic.splits(PROBLEMS, KEPT_PROBLEMS, seed=0)
    return arithmetic.preferences(problems, seed=0)


def starting_model(options: RewardModelOptions, progress: bool) -> RewardModel:
    """The model from the options, with a new head if it has none."""
    if options.model is None and options.dataset != ARITHMETIC:
        raise UserError(f"there is no model to train on {options.dataset}: give --model, a directory or a hub id")
    name = options.model
    if name is None:
        name = str(warm_model(progress, options.device).name_or_path)
    torch.manual_seed(options.seed)
    if options.model is None and options.base_model is not None:
        raise UserError("base_model is of a model of your own, and there is none: give model")
    remote = options.trust_remote_code
    tokenizer = models.load_tokenizer(options.tokenizer or name, trust_remote_code=remote)
    base = {"base_model": options.base_model, "trust": options.trust}
    model, missing = classifier(name, dtype=options.dtype, num_labels=1, trust_remote_code=remote, **base)
    random = [x for x in missing if x.startswith(f"{model.base_model_prefix}.") and "pooler" not in x]
    if random:
        raise UserError(f"{name} has no weights for {random[0]}: they would be random; give a whole model")
    return RewardModel(without_dropout(model).to(options.device), tokenizer)  # type: ignore[arg-type]


def limit_of(model: RewardModel, options: RewardModelOptions) -> int | None:
    """The maximum number of tokens in a prompt and its completion together."""
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return min((x for x in (options.max_length, context) if x is not None), default=None)


def updates_of(pairs: int, options: RewardModelOptions) -> int:
    """The number of updates of the whole training."""
    return options.epochs * math.ceil(pairs / options.batch_size)


def fit_preferences(
    model: RewardModel, pairs: list[Pair], options: RewardModelOptions, *, progress: bool = False
) -> Iterator[Row]:
    """Maximize the likelihood of the preferences with Adam, its rate decaying to 0. Yields each update's metrics."""
    rate = options.learning_rate or RATE_TIMES_WIDTH / width(model.model.base_model)
    steps = updates_of(len(pairs), options)
    optimizer = MasterWeightsAdam(model.model.parameters(), lr=rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    objective = preference_objective(model, pairs, center_coefficient=options.center_coefficient)
    update = ascend(optimizer, max_grad_norm=options.max_grad_norm, micro_batch=options.micro_batch)
    parts = minibatches(as_batch(len(pairs), options.device), options.batch_size, options.epochs)
    with progress_bar("reward model", steps, progress) as advance:
        for number, part in enumerate(parts, 1):
            part = part._replace(weight=normalized(part.weight))
            try:
                metrics = update(objective, part)
            except NonFiniteError as error:
                raise UserError(f"training stopped in update {number}: {error}") from error
            row = {name: float(x) for name, x in metrics.items()}
            bad = [f"{name} is {x}" for name, x in row.items() if not math.isfinite(x)]
            if bad:
                raise UserError(
                    f"training stopped in update {number}, because {bad[0]}. A lower learning_rate may help"
                )
            schedule.step()
            advance(f"accuracy {row['accuracy']:.3f}  margin {row['margin']:+.2f}")
            yield row


@torch.no_grad()
def judge(model: RewardModel, pairs: list[Pair], options: RewardModelOptions) -> PairEvaluation | None:
    """The model's scores on the pairs; None if there are no pairs."""
    if not pairs:
        return None
    rows = options.micro_batch or options.batch_size
    with evaluating(model.model):
        parts = [scores(model, pairs[i : i + rows]) for i in range(0, len(pairs), rows)]
    chosen, rejected = (torch.cat(column).double() for column in zip(*parts, strict=True))
    return PairEvaluation(
        accuracy=accuracy(chosen, rejected).mean().item(),
        margin=(chosen - rejected).mean().item(),
        log_likelihood=bradley_terry(chosen, rejected).mean().item(),
        pairs=len(pairs),
    )
