"""The options of `policygrad reward-model`. No torch here: --help must be instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from policygrad.train.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, SEED, THREADS, option


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    """Train a Bradley-Terry reward model on preferences: of two answers to a prompt, the chosen is to score higher."""

    method: ClassVar[str] = "reward-model"
    world: ClassVar[str] = "language"

    dataset: str = option(
        "arithmetic",
        "Preferences: a JSON, JSONL, CSV or Parquet file, or a hub id, with the columns prompt, chosen and rejected; "
        "arithmetic makes its own.",
    )
    split: str = option("train", "Of a data set that has several.")
    model: str | None = option(
        None, "Any Hugging Face model: a directory or a hub id; by default the arithmetic task's own small one."
    )
    tokenizer: str | None = option(None, "A directory or hub id; by default the model's.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Of the weights; auto: that of the file."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    held_out: int = option(256, "Pairs kept from training to judge it by.", NOT_NEGATIVE)
    max_length: int | None = option(
        None, "Tokens of a prompt and its answer; a longer pair is refused. By default the model's context.", COUNT
    )
    epochs: int = option(1, "Passes over the pairs.", COUNT)
    batch_size: int = option(64, "Pairs in a gradient step.", COUNT)
    micro_batch: int | None = option(None, "Pairs computed at a time: less memory, the same gradient.", COUNT)
    learning_rate: float | None = option(
        None, "Of Adam; down to 0 linearly. By default 1e-5, and 5e-4 for the arithmetic task's own model.", RATE
    )
    max_grad_norm: float = option(1.0, "The gradient is scaled down to this norm.", POSITIVE)
    center_coefficient: float = option(
        0.01, "Of (r_chosen + r_rejected)^2: preferences leave the rewards' zero open (Eisenstein et al. 2023).",
        NOT_NEGATIVE,
    )  # fmt: skip
    seed: int = option(0, "Of the head's first weights and the order of the pairs.", SEED)
    device: str = option("cpu", "Where the model lives: cpu, cuda, cuda:1, mps.")
    threads: int | None = option(None, "Of torch on the CPU; by default all.", THREADS)
