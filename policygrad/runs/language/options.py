"""What can be set when a language model is trained. No torch here: --help must be instant."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff

from policygrad.errors import UserError
from policygrad.runs.options import Reading, check_bounds


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """What every method has. The defaults are for models of a billion parameters; the arithmetic task has its own."""

    model: str | None = None
    """Any Hugging Face causal language model: a directory or a hub id. By default the task's own small one."""
    tokenizer: str | None = None
    """A directory or hub id; by default the model's."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the weights; auto: that of the file."""
    attention: str | None = None
    """sdpa, eager, flash_attention_2, ...; by default the model's own choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    lora_rank: int = 0
    """Train only a LoRA adapter of this rank; the reference is then the model without it. 0: train all weights."""
    lora_alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; 2 rank by default."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter; by default all linear ones but the head. Repeatable."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of the arithmetic; weights stay as they are, log-probabilities are in float32."""

    dataset: str | None = None
    """Prompts: a JSON, JSONL, CSV or Parquet file, or a hub id; a column `prompt`, the others go to the rewards."""
    split: str = "train"
    """Of a data set that has several."""
    held_out: int = 128
    """Examples kept from training to evaluate on; 0: none."""
    max_prompt_tokens: int | None = None
    """A longer prompt is refused."""

    reward: tuple[str, ...] = ()
    """exact_match, math_equal, format:REGEX, overlong:MAX,BUFFER, module:function, file.py:function, or a reward
    model's directory or hub id. Repeatable: the weighted sum."""
    reward_weight: tuple[float, ...] = ()
    """One for each reward, in the same order; 1 by default. Repeatable."""
    reward_time_limit: float = 60.0
    """Seconds that a reward function may take for one batch."""
    overlong_fraction: float = 0.0
    """Soft overlong penalty: over this last share of max_tokens the reward sinks linearly by 1 (DAPO, eq. 13)."""

    iterations: int = 200
    """Rollouts to train on."""
    prompts_per_rollout: int = 16
    """Different prompts in a rollout."""
    completions: int = 8
    """Of each prompt: its group."""
    max_tokens: int = 256
    """Of a completion; a longer one is cut."""
    temperature: float = 1.0
    """Part of the policy: what is sampled is what is scored."""
    cut: Literal["kept", "masked", "penalised"] = "kept"
    """Completions cut at max_tokens: rewarded as they are, left out of the update, or rewarded less."""
    cut_penalty: float = 1.0
    """Taken from the reward of a cut completion, if they are penalised."""
    sampling_rounds: int = 1
    """Dynamic sampling: up to so many rollouts to fill one with groups whose rewards differ. 1: none."""
    old_logp: Literal["sampled", "recomputed"] = "sampled"
    """Log-probabilities of the old policy: as sampling gave them, or computed again by the learner."""
    importance_bound: float = 2.0
    """With recomputed ones: weights old / sampled, truncated here, correct for the difference; 0: no correction."""

    learning_rate: float = 1e-6
    """Of Adam."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """linear: down to 0 at the last iteration."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatch_size: int | None = None
    """Completions in a gradient step; by default the whole rollout."""
    micro_batch: int | None = None
    """Completions computed at a time: less memory, the same gradient."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    kl: Literal["none", "reward", "loss"] = "none"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    kl_coefficient: float = 0.04
    """Its weight."""
    kl_target: float = math.inf
    """KL by token that the weight adapts to; inf: it stays."""

    evaluate_every: int = 0
    """Evaluate on the held-out examples every so many iterations; 0: only before and after."""
    evaluation_completions: int = 4
    """Of each held-out prompt."""
    seed: int = 0
    """Of sampling, the prompts' order and the minibatches."""
    device: str = "cpu"
    """Where the model lives: cpu, cuda, cuda:1, mps."""
    threads: int | None = None
    """Of torch on the CPU; by default all."""


@dataclass(frozen=True, kw_only=True)
class GRPO(LanguageOptions):
    """Group-relative policy optimisation: (reward - group mean) / group std, clipped, and no critic."""

    kl: Literal["none", "reward", "loss"] = "loss"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    kl_estimate: Literal["straight_through", "k1", "k2", "k3", "exact"] = "straight_through"
    """In the loss. straight_through and exact have the right gradient, k3 is as published, k1 has none."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; inf clips nothing."""
    clip_high: float = 0.2
    """See clip_low."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO without its two biases: nothing is divided by the group's std or the completion's length."""

    kl: Literal["none", "reward", "loss"] = "none"
    """Where KL(pi, pi_ref) to the starting model is charged."""


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO with clip-higher, the loss by token, dynamic sampling and a soft penalty of overlong answers."""

    kl: Literal["none", "reward", "loss"] = "none"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    clip_high: float = 0.28
    """See clip_low."""
    sampling_rounds: int = 4
    """Dynamic sampling: up to so many rollouts to fill one with groups whose rewards differ. 1: none."""
    overlong_fraction: float = 0.2
    """Soft overlong penalty: over this last share of max_tokens the reward sinks linearly by 1 (DAPO, eq. 13)."""


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """GRPO with the ratio of whole completions."""

    kl: Literal["none", "reward", "loss"] = "none"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    clip_low: float = 3e-4
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; inf clips nothing."""
    clip_high: float = 4e-4
    """See clip_low."""


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """GRPO that clips the importance weight and keeps every token's gradient."""

    kl: Literal["none", "reward", "loss"] = "none"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    clip_low: float = math.inf
    """The weight is clipped to [1 - clip_low, 1 + clip_high]; inf clips nothing."""
    clip_high: float = 0.28
    """See clip_low."""


@dataclass(frozen=True, kw_only=True)
class RLOO(GRPO):
    """REINFORCE with the mean of the prompt's other completions as the baseline; KL in the reward."""

    kl: Literal["none", "reward", "loss"] = "reward"
    """Where KL(pi, pi_ref) to the starting model is charged."""


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(GRPO):
    """REINFORCE++: the batch as the baseline, one completion of each prompt will do; KL in the reward."""

    kl: Literal["none", "reward", "loss"] = "reward"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    completions: int = 1
    """Of each prompt."""
    prompts_per_rollout: int = 128
    """Different prompts in a rollout."""


@dataclass(frozen=True, kw_only=True)
class LanguagePPO(LanguageOptions):
    """RLHF-PPO: a critic, GAE by token, KL to the starting model charged in the reward."""

    kl: Literal["none", "reward"] = "reward"
    """Where KL(pi, pi_ref) to the starting model is charged."""
    completions: int = 1
    """Of each prompt."""
    prompts_per_rollout: int = 128
    """Different prompts in a rollout."""
    critic: str = "copy"
    """copy: the model's own copy with a value head; shared: a head on the policy's trunk; or another model's directory
    or hub id, of the same tokenizer."""
    critic_learning_rate: float = 1e-5
    """Of the critic's Adam; of a shared trunk only the head's."""
    gamma: float = 1.0
    """Discount factor."""
    lam: float = 0.95
    """Lambda of GAE."""
    epochs: int = 4
    """Passes over a rollout."""
    minibatch_size: int | None = 32
    """Completions in a gradient step."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; inf clips nothing."""
    clip_high: float = 0.2
    """See clip_low."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""
    value_coefficient: float = 0.5
    """Of the critic's squared error in the objective."""
    value_clip: float = math.inf
    """Clip the critic's change to this; inf: not at all."""
    normalize_advantages: bool = True
    """Standardise the advantages over the batch."""


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    """Train a Bradley-Terry reward model on preferences: of two answers to a prompt, the chosen is to score higher."""

    dataset: str = "arithmetic"
    """Preferences: a JSON, JSONL, CSV or Parquet file, or a hub id, with the columns prompt, chosen and rejected; or
    arithmetic, which makes its own."""
    split: str = "train"
    """Of a data set that has several."""
    model: str | None = None
    """Any Hugging Face model: a directory or a hub id. By default the arithmetic task's own small one."""
    tokenizer: str | None = None
    """A directory or hub id; by default the model's."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the weights; auto: that of the file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    held_out: int = 256
    """Pairs kept from training to judge it by."""
    max_length: int | None = None
    """Tokens of a prompt and its answer; a longer pair is refused. By default the model's context."""
    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 64
    """Pairs in a gradient step."""
    micro_batch: int | None = None
    """Pairs computed at a time: less memory, the same gradient."""
    learning_rate: float | None = None
    """Of Adam; down to 0 linearly. By default 1e-5, and 5e-4 for the arithmetic task's own model."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    centre_coefficient: float = 0.01
    """Of (r_chosen + r_rejected)^2: preferences leave the rewards' zero open (Eisenstein et al. 2023)."""
    out: Path | None = None
    """Directory of the model; by default runs/DATASET/reward-model-seedSEED."""
    seed: int = 0
    """Of the head's first weights and the order of the pairs."""
    device: str = "cpu"
    """Where the model lives: cpu, cuda, cuda:1, mps."""
    threads: int | None = None
    """Of torch on the CPU; by default all."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print one JSON object at the end, and nothing else."""


LANGUAGE: dict[str, type[LanguageOptions]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "ppo": LanguagePPO,
}

POSITIVE = (
    "temperature",
    "reward_time_limit",
    "learning_rate",
    "critic_learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "clip_low",
    "clip_high",
    "kl_target",
    "value_clip",
    "lora_alpha",
)
COUNTS = (
    "iterations",
    "prompts_per_rollout",
    "completions",
    "max_tokens",
    "max_prompt_tokens",
    "sampling_rounds",
    "epochs",
    "minibatch_size",
    "micro_batch",
    "evaluation_completions",
    "threads",
)
NOT_NEGATIVE = (
    "held_out",
    "lora_rank",
    "cut_penalty",
    "importance_bound",
    "kl_coefficient",
    "entropy_coefficient",
    "value_coefficient",
    "evaluate_every",
    "seed",
)
GROUPED = (GRPO, DrGRPO, DAPO, GSPO, CISPO, RLOO)


# Options that are read only under a choice made by another (see policygrad.runs.options.check_read).
READ_UNDER: tuple[Reading, ...] = (
    (LanguageOptions, "cut_penalty", "cut", ("penalised",)),
    (LanguageOptions, "importance_bound", "old_logp", ("recomputed",)),
    (LanguageOptions, "kl_coefficient", "kl", ("loss", "reward")),
    (LanguageOptions, "kl_target", "kl", ("loss", "reward")),
    (GRPO, "kl_estimate", "kl", ("loss",)),
)


def validate(name: str, options: LanguageOptions) -> None:
    """Raise UserError for a value that cannot be meant."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    check_bounds(values, positive=POSITIVE, counts=COUNTS, not_negative=NOT_NEGATIVE, unit=("gamma", "lam"))
    if not 0 <= options.overlong_fraction < 1:
        raise UserError(f"overlong_fraction is {options.overlong_fraction}: it must be 0 or more and less than 1")
    if type(options) in GROUPED and options.completions < 2:
        raise UserError(f"completions is 1: {name} compares the completions of a prompt; give at least 2")
    rows = options.prompts_per_rollout * options.completions
    if options.minibatch_size is not None and options.minibatch_size > rows:
        raise UserError(
            f"minibatch_size is {options.minibatch_size}, and a rollout has prompts_per_rollout * completions = {rows} "
            "completions: lower the one or raise the other"
        )
    if options.reward_weight and len(options.reward_weight) != len(options.reward):
        counts = f"{len(options.reward)} rewards and {len(options.reward_weight)} weights"
        raise UserError(f"there are {counts}: give one each")
    if not options.lora_rank and (options.lora_targets or options.lora_alpha is not None):
        raise UserError("lora_targets and lora_alpha are of an adapter, and lora_rank is 0: set that too")


def validate_reward_model(options: RewardModelOptions) -> None:
    """Raise UserError for a value that cannot be meant."""
    check_bounds(
        {f.name: getattr(options, f.name) for f in fields(options) if f.name != "out"},
        positive=("learning_rate", "max_grad_norm"),
        counts=("max_length", "epochs", "batch_size", "micro_batch", "threads"),
        not_negative=("held_out", "centre_coefficient", "seed"),
    )
