"""The options of `policygrad reward-model`. No torch here: --help must be instant."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from policygrad.train.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, SEED, THREADS, option


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    """Train a Bradley-Terry reward model on preferences: the chosen answer should score above the rejected one."""

    method: ClassVar[str] = "reward-model"
    world: ClassVar[str] = "language"

    dataset: str = option(
        "arithmetic",
        "Preferences: a JSON, JSONL, CSV or Parquet file, or a hub id, with the columns chosen and rejected, and "
        "prompt, unless both begin with it; arithmetic makes its own.",
    )
    split: str = option("train", "Split of the data set, or a slice such as train[:1000].")
    columns: tuple[str, ...] = option((), "Rename a column of the data, new=old, such as prompt=question. Repeatable.")
    model: str | None = option(
        None, "Hugging Face model, a directory or hub id; by default the arithmetic task's own small one."
    )
    tokenizer: str | None = option(None, "Tokenizer, a directory or hub id; by default the model's.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Type of the weights; auto: the type in the file."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    base_model: str | None = option(
        None, "Base of the model, a directory or hub id, if the model is an adapter: training starts from both, merged."
    )
    trust: bool = option(
        False, "Follow the paths and names that files of the model name, such as the base of an adapter."
    )
    held_out: int = option(256, "Pairs held out from training for evaluation.", NOT_NEGATIVE)
    max_length: int | None = option(
        None,
        "Maximum tokens in a prompt and its answer; longer pairs are an error. By default the model's context.",
        COUNT,
    )
    epochs: int = option(1, "Passes over the pairs.", COUNT)
    batch_size: int = option(64, "Pairs in a gradient step.", COUNT)
    micro_batch: int | None = option(
        None, "Pairs computed at a time: smaller saves memory; the gradient is the same.", COUNT
    )
    learning_rate: float | None = option(
        None,
        "Adam learning rate, decaying linearly to 0. By default 0.04 / the width of the model: 1e-5 at 4,096.",
        RATE,
    )
    max_grad_norm: float = option(1.0, "Gradient clipping: maximum norm of the gradient.", POSITIVE)
    center_coefficient: float = option(
        0.01, "Weight of (r_chosen + r_rejected)^2, which centers the rewards at 0 (Eisenstein et al. 2023).",
        NOT_NEGATIVE,
    )  # fmt: skip
    seed: int = option(0, "Random seed of the head's initial weights and of the order of the pairs.", SEED)
    device: str = option("cpu", "Device of the model: cpu, cuda, cuda:1, mps.")
    threads: int | None = option(None, "CPU threads of torch; by default all.", THREADS)
