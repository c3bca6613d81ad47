"""A language model that was trained: judged on held-out examples, saved in the Hugging Face layout, found again."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from policygrad.errors import UserError
from policygrad.language import models
from policygrad.language.evaluation import pass_at_k, write_samples
from policygrad.language.generation import Request
from policygrad.language.policies import LanguagePolicy
from policygrad.language.rewards import Rewards
from policygrad.language.sampler import Prompts, answer
from policygrad.runs.checkpoints import write_json
from policygrad.runs.language.options import LANGUAGE, LanguageOptions
from policygrad.runs.language.task import Task, load_task
from policygrad.runs.options import with_values
from policygrad.runs.reports import Row, draw_curve
from policygrad.runs.run import json_number, make_directory

EVALUATION_ROWS = 512  # completions sampled together


@dataclass
class LanguageEvaluation:
    """What a policy's answers to prompts were worth."""

    reward: float
    reward_std: float
    accuracy: float | None  # the mean reward, where every reward is 0 or 1
    pass_at_k: dict[int, float]  # there too: the probability that one of k samples is right
    parts: dict[str, float]
    length: float
    cut_fraction: float
    prompts: int
    completions: int
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All but the samples."""
        return {name: x for name, x in vars(self).items() if name != "rows"}

    def line(self) -> str:
        """In a line."""
        score = f"reward {self.reward:.3f} +- {self.reward_std:.3f}"
        if self.accuracy is not None:
            passes = ", ".join(f"pass@{k} {x:.3f}" for k, x in self.pass_at_k.items() if k > 1)
            score = f"accuracy {self.accuracy:.3f}" + (f", {passes}" if passes else "")
        return f"{score}, length {self.length:.1f}, {self.cut_fraction:.1%} cut, {self.prompts} prompts"


def evaluate_policy(
    policy: LanguagePolicy,
    prompts: Prompts,
    tokenizer: Any,
    judge: Rewards,
    *,
    completions: int,
    max_tokens: int,
    seed: int = 1000,
    greedy: bool = False,
) -> LanguageEvaluation:
    """Answer each prompt `completions` times, with samples at the policy's temperature or greedily."""
    stop = models.stop_tokens(policy.model, tokenizer)
    request = Request(completions, max_tokens, stop, int(tokenizer.pad_token_id), greedy)
    device = next(policy.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    together = max(1, EVALUATION_ROWS // completions)
    answers = [
        answer(policy, prompts.take(index), request, tokenizer, judge, generator)
        for index in torch.arange(len(prompts)).split(together)
    ]
    reward = torch.cat([x.reward for x in answers]).double()
    parts = {name: torch.cat([x.parts[name] for x in answers]).double().nanmean().item() for name in answers[0].parts}
    binary = bool(((reward == 0) | (reward == 1)).all())
    right = reward.view(-1, completions).sum(1).round().long()
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= completions]
    return LanguageEvaluation(
        reward=reward.mean().item(),
        reward_std=reward.std(correction=0).item(),
        accuracy=reward.mean().item() if binary else None,
        pass_at_k={k: pass_at_k(right, completions, k) for k in ks} if binary else {},
        parts=parts,
        length=torch.cat([x.completions.mask.sum(1) for x in answers]).double().mean().item(),
        cut_fraction=torch.cat([x.completions.cut for x in answers]).double().mean().item(),
        prompts=len(prompts),
        completions=completions,
        rows=[row for x in answers for row in x.rows()],
    )


@dataclass
class LanguageRun:
    """A policy that was trained, with what is needed to use it, judge it and save it."""

    algorithm: str
    task: Task
    options: LanguageOptions
    preset: str | None
    directory: Path | None
    metrics: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    before: LanguageEvaluation | None = None
    after: LanguageEvaluation | None = None

    @property
    def policy(self) -> LanguagePolicy:
        """The policy, as it is now."""
        return self.task.policy

    def evaluate(self, completions: int | None = None, *, seed: int = 1000, greedy: bool = False) -> LanguageEvaluation:
        """Answer the held-out prompts, each `completions` times. Raises UserError if there are none."""
        completions = self.options.evaluation_completions if completions is None else completions
        if completions < 1:
            raise UserError(f"completions is {completions}: it must be at least 1")
        if self.task.held_out is None:
            raise UserError("there are no held-out examples to evaluate on: train with held_out above 0")
        return evaluate_policy(
            self.policy,
            self.task.held_out,
            self.task.tokenizer,
            self.task.judge_held_out,
            completions=completions,
            max_tokens=self.options.max_tokens,
            seed=seed,
            greedy=greedy,
        )

    def save(self, directory: Path | str) -> None:
        """Write the run: config.json, model/ in the Hugging Face layout with its card, samples.jsonl, curve.png."""
        directory = Path(directory)
        make_directory(directory)
        write_json(directory / "config.json", self.configuration())
        models.save_model(self.policy.model, self.task.tokenizer, directory / "model")
        (directory / "model" / "README.md").write_text(self.card())
        if self.after is not None:
            write_samples(directory / "samples.jsonl", self.after.rows)
        if self.metrics:
            draw_curve(
                self.metrics,
                f"{self.algorithm} on {self.task.name}",
                directory / "curve.png",
                x=("completions", "completions"),
                y=("reward", "mean reward of a rollout"),
                points=("held_out", "held-out"),
                length_of="completion",
            )

    def configuration(self) -> dict[str, Any]:
        """All that the run was started with."""
        return {
            "kind": "language",
            "algorithm": self.algorithm,
            "task": self.task.name,
            "preset": self.preset,
            "options": {name: json_number(x) for name, x in dataclasses.asdict(self.options).items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def card(self) -> str:
        """The model card: what it is, how it was made, what it scored."""
        base = self.options.model or f"the small model of the task {self.task.name}"
        scores = [
            f"- {when}: {x.line()}" for when, x in (("before", self.before), ("after", self.after)) if x is not None
        ]
        options = {k: v for k, v in self.configuration()["options"].items() if v not in (None, [], ())}
        lines = [
            "---",
            "library_name: " + ("peft" if self.options.lora_rank else "transformers"),
            *([f"base_model: {self.options.model}"] if self.options.model else []),
            "tags: [policygrad, reinforcement-learning]",
            "---",
            "",
            f"# {self.algorithm} on {self.task.name}",
            "",
            f"Trained by `{self.algorithm}` with policygrad, from {base}.",
            *(["", "On held-out prompts:", "", *scores] if scores else []),
            "",
            "```json",
            json.dumps(options, indent=2),
            "```",
            "",
        ]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """What `policygrad train --json` prints."""
        last = self.metrics[-1] if self.metrics else {}
        return {
            "run": None if self.directory is None else str(self.directory),
            "algorithm": self.algorithm,
            "task": self.task.name,
            "iterations": sum("reward" in row for row in self.metrics),
            "completions": int(last.get("completions", 0)),
            "tokens": int(last.get("steps", 0)),
            "seconds": round(self.seconds, 3),
            "reward": last.get("reward"),
            "before": None if self.before is None else self.before.summary(),
            "after": None if self.after is None else self.after.summary(),
        }


def evaluate_language_run(
    directory: Path | str, completions: int | None = None, *, seed: int = 1000, greedy: bool = False
) -> LanguageEvaluation:
    """Evaluate the model in a run directory on the examples that were held out from its training."""
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
        kind = LANGUAGE[config["algorithm"]]
        values = {name: float(x) if x in ("inf", "-inf", "nan") else x for name, x in config["options"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/config.json cannot be read ({error}): give the directory of a run") from error
    options = with_values(kind(), {name: x for name, x in values.items() if x is not None})
    adapter = options.lora_rank > 0
    if not adapter:
        options = dataclasses.replace(options, model=str(directory / "model"), tokenizer=None)
    task = load_task(config["task"] if options.dataset is None else None, options, announce=lambda line: None)
    if adapter:
        task.policy.model.load_adapter(str(directory / "model"), adapter_name="default")  # type: ignore[operator]
    run = LanguageRun(config["algorithm"], task, options, None, directory)
    return run.evaluate(completions, seed=seed, greedy=greedy)
