"""The options of every method and world as keywords, so that editors and type checkers know them.

Written by `python tests/train/test_keywords.py` from options.py, which says what each means and where it applies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict


class Keywords(TypedDict, total=False):
    """The options."""

    steps: int | None
    iterations: int | None
    seed: int
    device: str
    threads: int | None
    compile: Literal["auto", "on", "off"]
    start: str | Path | None
    rank_time_limit: float
    profile: bool
    checkpoint_every: int | None
    checkpoints: int
    on_nonfinite: Literal["stop", "skip"]
    keep_best: bool
    log: Literal["wandb", "mlflow", "trackio"] | Sequence[Literal["wandb", "mlflow", "trackio"]]
    stop_at_return: float
    evaluate_every: int
    evaluation_patience: int | None
    evaluation_episodes: int
    evaluation_completions: int
    num_envs: int
    num_steps: int
    episode_steps: int | None
    group_size: int | None
    vectorization: Literal["auto", "sync", "async", "envpool"]
    step_time_limit: float | None
    wrap: str | Sequence[str]
    action_mask: Literal["auto", "info", "off"]
    opponent: Literal["random", "self"]
    freeze_every: int
    agents: Literal["shared", "separate"]
    restart_envs: int
    overlap: bool
    samplers: int | None
    ray: str | None
    env_options: str | dict[str, Any] | None
    normalize_observations: bool
    scale_rewards: bool
    encoder: Literal["auto", "flat", "nature", "impala", "small"]
    channels: Literal["auto", "first", "last"]
    policy_keys: str | Sequence[str]
    critic_keys: str | Sequence[str]
    critic_encoder: Literal["own", "shared"]
    memory: Literal["none", "gru", "lstm", "transformer"]
    memory_size: int
    memory_window: int
    critic_memory: Literal["own", "shared", "none"]
    sequence_length: int | None
    hidden: int | Sequence[int]
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"]
    orthogonal: bool
    distribution: Literal["normal", "squashed", "beta"]
    state_dependent_std: bool
    initial_log_std: float
    demonstrations: Any
    validation: float
    model: str | Path | None
    heads: int | None
    tokenizer: str | Path | None
    dtype: Literal["float32", "bfloat16", "float16", "auto"]
    attention: str | None
    trust_remote_code: bool
    base_model: str | Path | None
    trust: bool
    lora_rank: int
    lora_alpha: float | None
    lora_targets: str | Sequence[str]
    quantize: Literal["none", "4bit"]
    shard: bool
    gradient_sync: Literal["micro_batch", "step"]
    save: Literal["adapter", "merged"]
    gradient_checkpointing: bool
    autocast: Literal["none", "bfloat16", "auto"]
    dataset: Any
    dataset_weight: float | Sequence[float]
    split: str
    columns: str | dict[str, str] | Sequence[str]
    system_prompt: str | None
    template_variables: str | dict[str, Any] | None
    held_out: int
    evaluation_dataset: Any
    evaluation_split: str
    max_prompt_tokens: int | None
    long_prompts: Literal["refuse", "drop"]
    reward: Any
    reward_weight: float | Sequence[float]
    reward_time_limit: float
    decouple_rewards: bool
    overlong_fraction: float
    prompts_per_rollout: int
    completions: int
    max_tokens: int
    stop: str | Sequence[str]
    turns: int | None
    turn_tokens: int | None
    tool: str | Sequence[str]
    starts: int | None
    temperature: float
    cut: Literal["kept", "masked", "penalized"]
    cut_penalty: float
    old_logp: Literal["sampled", "recomputed"]
    engine_python: str | Path | None
    engine_tolerance: float
    engine_adapter: Literal["merged", "alone"]
    engine_sleep: bool
    engine_time_limit: float
    importance_bound: float
    importance_low: float
    importance_level: Literal["token", "sequence", "product"]
    importance_outside: Literal["clip", "drop"]
    importance_normalized: bool
    lag: int
    sampling_rounds: int
    credit: Literal["gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "trajectory_return", "group"]
    gamma: float | None
    lam: float
    length_adaptive_lam: float | None
    critic_lam: float | None
    n: int
    rho_bar: float
    c_bar: float
    baseline: Literal[
        "none", "mean", "time_mean", "optimal", "greedy", "length_weighted", "token", "value", "start_value"
    ]
    turn_level: bool
    state_weight: float
    discounted: bool
    group_baseline: Literal["mean", "leave_one_out", "other_best"]
    group_scale: Literal["std", "none", "mean", "batch"]
    learn_from: Literal["all", "high_entropy", "low_covariance"]
    learn_from_share: float
    covariance_share: float
    covariance_low: float
    covariance_high: float
    normalize_advantages: Literal["none", "batch", "minibatch"]
    weights: Literal["token", "row", "episode", "budget"]
    symmetry: str | None
    entropy_coefficient: float
    entropy_target: float | None
    entropy_step: float
    value_coefficient: float
    value_clip: float
    ratio: Literal["token", "sequence", "sequence_token", "product"]
    gain: Literal["surrogate", "weight", "sigmoid", "gamma", "score"]
    clip_low: float
    clip_high: float
    sigmoid_positive: float
    sigmoid_negative: float
    gamma_power_positive: float
    gamma_power_negative: float
    gamma_rate_positive: float
    gamma_rate_negative: float
    token_clip: float
    dual_clip: float
    divergence_mask: Literal["none", "binary_tv", "binary_kl", "tv", "kl"]
    divergence_bound: float
    drift_bound: float
    kl_old_coefficient: float
    kl_old_target: float
    kl_old_estimate: Literal["k3", "absolute", "squared_row"]
    kl_old_share: float
    target_kl: float
    kl_ref: Literal["none", "reward", "loss"]
    kl_ref_coefficient: float
    kl_ref_target: float
    kl_ref_estimate: Literal["straight_through", "k1", "k2", "k3", "exact"]
    teacher: str | None
    reference_every: int | None
    reference_decay: float | None
    positive_weight: float
    mix: str | None
    mix_weight: float
    mix_rows: int
    learning_rate: float | None
    learning_rate_schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    optimizer: Literal["adam", "adamw", "adamw_8bit", "sgd", "muon"]
    weight_decay: float
    momentum: float | None
    adam_epsilon: float
    epochs: int
    minibatch_size: int | None
    micro_batch: int | None
    micro_batch_tokens: int | None
    shared_prompts: Literal["auto", "on", "off"]
    gradient_noise: Literal["moments", "exact", "off"]
    max_grad_norm: float
    delta: float
    damping: float
    cg_iters: int
    backtracks: int
    shrink: float
    step_rule: Literal["kl_radius", "learning_rate"]
    natural_learning_rate: float
    critic_learning_rate: float | None
    critic_warmup: int
    critic_epochs: int
    critic_minibatch_size: int


class Arguments(Keywords, total=False):
    """The options, and what else `train` takes."""

    out: Path | str | None
    preset: str | Path | None
    policy: Any
    critic: Any
    engine: Any
