"""`policygrad reward-model`: learn a reward from preferences, evaluate it on held-out pairs, save it."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from policygrad.errors import NonFiniteError, UserError
from policygrad.language import arithmetic, data, models
from policygrad.language.policies import evaluating, without_dropout
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
from policygrad.train.options import check_bounds, with_values
from policygrad.train.reports import Row, progress_bar
from policygrad.train.reward_options import RewardModelOptions
from policygrad.train.run import make_directory
from policygrad.train.training import check_device, check_empty
from policygrad.train.worlds.language import warm_model
from policygrad.updates import ascend
from policygrad.weights import normalized

PROBLEMS, KEPT_PROBLEMS = 48_000, 512  # arithmetic problems; the kept ones evaluate policies, so no pair uses them
OWN_LEARNING_RATE, LEARNING_RATE = 5e-4, 1e-5  # for the arithmetic task's own model, and for any other


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


@dataclass
class RewardModelRun:
    """A trained reward model, with its scores on held-out pairs before and after training."""

    model: RewardModel
    options: RewardModelOptions
    directory: Path | None
    pairs: int
    metrics: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    before: PairEvaluation | None = None
    after: PairEvaluation | None = None

    def save(self, directory: Path) -> None:
        """Write the model and its tokenizer in the Hugging Face layout, with a model card."""
        make_directory(directory)
        models.save_model(self.model.model, self.model.tokenizer, directory)
        (directory / "README.md").write_text(self.card())

    def card(self) -> str:
        """The model card: what the model is, how it was trained, and its scores."""
        base = self.options.model or f"the small model of the task {ARITHMETIC}"
        judged = [f"- {when}: {x.line()}" for when, x in (("before", self.before), ("after", self.after)) if x]
        options = {name: x for name, x in dataclasses.asdict(self.options).items() if x is not None}
        lines = [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-classification",
            *([f"base_model: {self.options.model}"] if self.options.model else []),
            "tags: [policygrad, reward-model]",
            "---",
            "",
            f"# A reward model of {self.options.dataset}",
            "",
            f"Trained by `policygrad reward-model` on {self.pairs:,} preferences, from {base}. The reward is the score",
            "at the last token, the end-of-sequence token of a completion that has ended. Use it as a reward function:",
            "`policygrad train ppo --reward DIRECTORY`.",
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

    Raises UserError for every error that the caller can fix, and if training produces NaN or infinity.
    """
    options = with_values(RewardModelOptions(dataset=dataset), values)
    check_bounds(options)
    check_device(options.device)
    directory = None if out is None else Path(out)
    check_empty(directory)
    with _seeded(options.seed, options.threads):
        examples = preferences_of(options)
        train, held_out = data.hold_out(examples, options.held_out, seed=0)
        model = starting_model(options, progress)
        pairs, kept = (encode_pairs(x, model.tokenizer, max_length=limit_of(model, options)) for x in (train, held_out))
        result = RewardModelRun(model, options, directory, len(pairs))
        result.before = judge(model, kept, options)
        if result.before:
            announce(f"before: {result.before.line()}")
        if directory is not None:
            make_directory(directory)
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        result.metrics = fit_preferences(model, pairs, options, progress=progress)
        result.seconds = time.perf_counter() - start
        result.after = judge(model, kept, options)
        if result.after:
            announce(f"after:  {result.after.line()}")
        if directory is not None:
            result.save(directory)
    return result


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
    trust = {"trust_remote_code": options.trust_remote_code}
    tokenizer = models.load_tokenizer(options.tokenizer or name, **trust)
    model, missing = classifier(name, dtype=options.dtype, num_labels=1, **trust)
    random = [x for x in missing if x.startswith(f"{model.base_model_prefix}.") and "pooler" not in x]
    if random:
        raise UserError(f"{name} has no weights for {random[0]}: they would be random; give a whole model")
    return RewardModel(without_dropout(model).to(options.device), tokenizer)  # type: ignore[arg-type]


def limit_of(model: RewardModel, options: RewardModelOptions) -> int | None:
    """The maximum number of tokens in a prompt and its completion together."""
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return min((x for x in (options.max_length, context) if x is not None), default=None)


def fit_preferences(
    model: RewardModel, pairs: list[Pair], options: RewardModelOptions, *, progress: bool = False
) -> list[Row]:
    """Maximize the likelihood of the preferences with Adam, its rate decaying to 0. Returns each update's metrics."""
    rate = options.learning_rate or (LEARNING_RATE if options.model else OWN_LEARNING_RATE)
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    optimizer = Adam(model.model.parameters(), lr=rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    objective = preference_objective(model, pairs, center_coefficient=options.center_coefficient)
    update = ascend(optimizer, max_grad_norm=options.max_grad_norm, micro_batch=options.micro_batch)
    rows: list[Row] = []
    with progress_bar("reward model", steps, progress) as advance:
        for part in minibatches(as_batch(len(pairs), options.device), options.batch_size, options.epochs):
            part = part._replace(weight=normalized(part.weight))
            try:
                metrics = update(objective, part)
            except NonFiniteError as error:
                raise UserError(f"training stopped in update {len(rows) + 1}: {error}") from error
            rows.append({name: float(x) for name, x in metrics.items()})
            bad = [f"{name} is {x}" for name, x in rows[-1].items() if not math.isfinite(x)]
            if bad:
                raise UserError(
                    f"training stopped in update {len(rows)}, because {bad[0]}. A lower learning_rate may help"
                )
            schedule.step()
            advance(f"accuracy {rows[-1]['accuracy']:.3f}  margin {rows[-1]['margin']:+.2f}")
    return rows


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
