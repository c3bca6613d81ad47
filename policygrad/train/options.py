"""All options: each is a field with its default, help text, bounds and the condition for reading it.

`options_of(method, world)` is the dataclass of the options that apply to a method on a world, with its defaults there.
No torch here: --help must be instant.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from tyro.conf import UseAppendAction, arg

from policygrad.errors import UserError, listed, shortened
from policygrad.train.methods import KNOWN, Method, nearest


class OptionError(UserError):
    """An option has an invalid value. `option` is its name."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Bound(NamedTuple):
    """A condition on a number, as a test and in words."""

    holds: Callable[[Any], bool]
    said: str


POSITIVE = Bound(lambda x: x > 0, "more than 0")
LOG_STD = Bound(lambda x: -20 <= x <= 10, "between -20 and 10")
RATE = Bound(lambda x: 0 < x < math.inf, "more than 0 and finite")
NOT_NEGATIVE = Bound(lambda x: 0 <= x < math.inf, "0 or more and finite")
POSSIBLY_INFINITE = Bound(lambda x: x >= 0, "0 or more")
COUNT = Bound(lambda x: x >= 1, "at least 1")
TWO = Bound(lambda x: x >= 2, "at least 2")
UNIT = Bound(lambda x: 0 <= x <= 1, "between 0 and 1")
PART = Bound(lambda x: 0 < x <= 1, "more than 0 and at most 1")
FRACTION = Bound(lambda x: 0 < x < 1, "more than 0 and less than 1")
SHARE = Bound(lambda x: 0 <= x < 1, "0 or more and less than 1")
ABOVE_1 = Bound(lambda x: x > 1, "more than 1")
SEED = Bound(lambda x: 0 <= x < 2**63, "0 or more and less than 2**63")
THREADS = Bound(lambda x: 1 <= x <= 1024, "between 1 and 1024")
SIZES = Bound(lambda x: all(size >= 1 for size in x), "at least 1 unit in every layer")
RATES = Bound(lambda x: all(0 < weight < math.inf for weight in x), "numbers that are more than 0 and finite")
TEXT = Bound(bool, "text that is not empty")
DISTINCT = Bound(lambda x: len({*x}) == len(x), "names that stand there once")
TEXTS = Bound(all, "texts that are not empty")
OBJECT = Bound(lambda x: isinstance(_json(x), dict), "a JSON object that has each name once, such as '{\"name\": 1}'")

When = dict[str, tuple[Any, ...]]  # `world`, a field of the method, or an option -> its allowed values
CONTROL: When = {"world": ("control",)}
LANGUAGE: When = {"world": ("language",)}
EPISODES: When = {"world": ("control", "exact")}
ASCEND: When = {"update": ("ascend",)}
NATURAL: When = {"update": ("natural", "trust_region")}
MINIBATCHES: When = {"objective": ("ppo", "grpo")}
SAMPLED: When = {"objective": ("reinforce", "actor_critic", "surrogate", "ppo", "grpo")}  # from the policy itself
CLONED: When = {"objective": ("clone",)}
REMEMBERS = ("gru", "lstm", "transformer")  # a policy with memory
CLIPPED: When = {"gain": ("surrogate", "weight")}
GAUSSIAN: When = {"distribution": ("normal", "squashed")}
BOOTSTRAPPED = ("gae", "n_step", "monte_carlo", "vtrace")
DEMONSTRATED = "demonstrated"  # the credit of clone, which has no such option
EPISODIC = ("reward_to_go", "trajectory_return", "group")  # credit that needs whole episodes as rows
OF_CRITIC = ("value", "start_value")  # baselines of a return that are learned
OF_GROUPS = ("length_weighted", "token")  # baselines of a return that compare the rows of a group
RETURNS: When = {"credit": ("reward_to_go", "trajectory_return")}


def option(default: Any, help: str, bound: Any = None, **when: Any) -> Any:
    """A field of Options. `when`: the option is read only if each of these has one of the given values."""
    return field(default=default, metadata={"help": help, "bound": bound, "when": when})


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of all methods and worlds. methods.py has the defaults of methods, WORLDS those of worlds."""

    # The run
    steps: int | None = option(None, "Decisions to train on; the iteration that reaches them is the last.", COUNT)
    iterations: int | None = option(None, "Rollouts to train on, if steps does not end training first.", COUNT)
    seed: int = option(0, "Random seed of the whole run.", SEED)
    device: str = option("cpu", "Device of policy and critic: cpu, cuda, cuda:1, mps.")
    threads: int | None = option(None, "CPU threads of torch; one is fastest for small networks. None: all.", THREADS)
    compile: Literal["auto", "on", "off"] = option("auto",
        "Gradient steps as one compiled graph, the same to rounding, not Muon's; auto: if the run has enough of them.",
        world=("control", "exact"))
    start: str | None = option(None,
        "Run to begin from, or hub:NAME: its policy, and its critic and statistics where they fit; under any method.",
        TEXT)
    rank_time_limit: float = option(1800.0,
        "Seconds that a process of several (torchrun), or the learner of samplers, waits for others before it gives "
        "up.", RATE)
    profile: bool = option(False,
        "Measure where the time goes: a table at the end, and trace.json in the run's directory for trace viewers.")
    checkpoint_every: int | None = option(None,
        "Iterations between checkpoints, which `policygrad resume` goes on from; None: in 2% of the time.", COUNT)
    checkpoints: int = option(2, "Checkpoints to keep, the newest ones; 0: none, and no resuming.", NOT_NEGATIVE)
    on_nonfinite: Literal["stop", "skip"] = option("stop",
        "Updates whose gradient is not finite: stop the run and keep the batch, or skip them, counted as "
        "skipped_updates.")
    keep_best: bool = option(True,
        "Keep the policy with the best evaluation, or without evaluations the best training result, in RUN/best.")
    log: tuple[Literal["wandb", "mlflow", "trackio"], ...] = option((),
        "Show the run in this tool, too; metrics.jsonl and TensorBoard's events are always written. Repeatable.",
        DISTINCT)
    stop_at_return: float = option(math.inf,
        "Stop when the mean return of the last 100 episodes reaches this value.", **CONTROL, **SAMPLED)
    evaluate_every: int = option(0,
        "Iterations between evaluations, on held-out prompts, exactly, or in environments of their own; 0: only before "
        "and after training, and never in environments.", NOT_NEGATIVE)
    evaluation_patience: int | None = option(None,
        "Stop after so many evaluations in a row without a better one; None: never.", COUNT)
    evaluation_episodes: int = option(10, "Episodes in an evaluation.", COUNT, **CONTROL, **SAMPLED)
    evaluation_completions: int = option(4,
        "Completions per held-out prompt in an evaluation.", COUNT, **LANGUAGE, **SAMPLED)

    # What is sampled: episodes
    num_envs: int = option(8, "Parallel environments, which are the rows of a rollout.", COUNT, **EPISODES, **SAMPLED)
    num_steps: int = option(128, "Steps per environment in a rollout.", COUNT, **CONTROL, credit=BOOTSTRAPPED)
    episode_steps: int | None = option(None,
        "Maximum episode length if rows are whole episodes; None: the task's time limit.", COUNT, **EPISODES, **SAMPLED)
    group_size: int | None = option(None,
        "Episodes in a group, all from the same start; None: the whole rollout is one group.",
        TWO, **CONTROL, **SAMPLED)
    vectorization: Literal["auto", "sync", "async", "envpool"] = option("auto",
        "auto: the environment's own vectorized version, else sync or async, as measures faster; async: a process per "
        "core; envpool: EnvPool's environment of this id, in C++ (pip install envpool).", **CONTROL)
    step_time_limit: float | None = option(None,
        "Seconds that an environment's process, or one of conversations, may take for its start, a step or a reset. "
        "None: any time; of conversations 60.", POSITIVE, world=("control", "language"), vectorization=("async",))
    wrap: tuple[str, ...] = option((),
        "Wrapper of Gymnasium around each environment, its arguments as JSON: TimeLimit:200, RescaleAction:-1,1, "
        "FrameStackObservation:4. Repeatable, the first one inside.", TEXTS, **CONTROL)
    action_mask: Literal["auto", "info", "off"] = option("auto",
        "Where the mask of allowed actions is: auto, in the key action_mask of Dict observations; info, in the "
        "environment's info; off, nowhere.", **CONTROL)
    opponent: Literal["random", "self"] = option("random",
        "Who has the other seats of a game whose players take turns: a random player, or earlier selves, kept frozen "
        "in RUN/selves. Evaluations are against a random player.", **CONTROL, **SAMPLED)
    freeze_every: int = option(10,
        "Iterations between the selves that are frozen as opponents.", COUNT, **CONTROL, opponent=("self",))
    agents: Literal["shared", "separate"] = option("shared",
        "Parameters of the agents of a game: one policy and critic for all, or a policy and a critic for each.",
        **CONTROL, **SAMPLED)
    restart_envs: int = option(0,
        "Times that each environment is made anew if it raises an error, dies or hangs (step_time_limit); its episode "
        "is cut.", NOT_NEGATIVE, **CONTROL, **SAMPLED)
    overlap: bool = option(False,
        "Sample the next rollout while this one is learned from, with a policy one update old.", **CONTROL, **SAMPLED)
    samplers: int | None = option(None,
        "Remote samplers: actors of Ray that each sample a share of num_envs. None: this process samples.",
        COUNT, **EPISODES, **SAMPLED)
    ray: str | None = option(None,
        "Address of the Ray cluster that has the samplers, HOST:PORT or auto. None: RAY_ADDRESS, or Ray starts here.",
        TEXT, **EPISODES, **SAMPLED)
    env_options: str | None = option(None,
        'Options of the environment as a JSON object, such as \'{"is_slippery": false}\'; from Python, a dict.',
        OBJECT, **CONTROL)
    normalize_observations: bool = option(False,
        "Normalize observations by their running mean and standard deviation, saved with the policy.", **CONTROL)
    scale_rewards: bool = option(False,
        "Divide rewards by the running standard deviation of the discounted return.", **CONTROL, **SAMPLED)
    encoder: Literal["auto", "flat", "nature", "impala", "small"] = option("auto",
        "Network before the hidden layers for images (uint8, three dimensions): convolutions of Mnih et al. 2015, "
        "IMPALA's residual ones, a small one, or none; auto: nature from 36 x 36 on, else small.", **CONTROL)
    channels: Literal["auto", "first", "last"] = option("auto",
        "Which dimension of an image its channels are; auto: the smaller one of the first and the last.", **CONTROL,
        encoder=("auto", "nature", "impala", "small"))
    policy_keys: tuple[str, ...] = option((),
        "Part of Dict observations that the policy sees, by its key. Repeatable; by default all, but no action_mask.",
        TEXTS, **CONTROL)
    critic_keys: tuple[str, ...] = option((),
        "Part of Dict observations that the critic sees, such as what only a simulator knows. Repeatable; by default "
        "all.", TEXTS, **CONTROL, **SAMPLED)
    critic_encoder: Literal["own", "shared"] = option("own",
        "Encoder of the critic: one like the policy's, or the policy's own, so that images are encoded once for both.",
        **CONTROL, memory=("none",), objective=("actor_critic", "ppo"))
    memory: Literal["none", "gru", "lstm", "transformer"] = option("none",
        "Memory of the policy, after the encoder: none, a GRU, an LSTM, or a small transformer over a window.",
        **CONTROL)
    memory_size: int = option(64, "Features of the memory.", COUNT, **CONTROL, memory=REMEMBERS)
    memory_window: int = option(16,
        "Steps that each of the transformer's two blocks looks at, the newest included.", TWO, **CONTROL,
        memory=("transformer",))
    critic_memory: Literal["own", "shared", "none"] = option("own",
        "Memory of the critic: one like the policy's, the policy's own (with its encoder), or none.",
        **CONTROL, **SAMPLED, memory=REMEMBERS)
    sequence_length: int | None = option(None,
        "Learn from pieces of this many steps of the rows of a policy with memory, which divides num_steps; None: from "
        "whole rows.", COUNT, **CONTROL, credit=(*BOOTSTRAPPED, DEMONSTRATED))
    hidden: tuple[int, ...] = option((64, 64),
        "Sizes of the hidden layers of both policy and critic.", SIZES, **CONTROL)
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = option("tanh",
        "Activation function of the hidden layers.", **CONTROL)
    orthogonal: bool = option(True,
        "Use orthogonal initialization with a small last layer of the policy; else torch's default.", **CONTROL)
    distribution: Literal["normal", "squashed", "beta"] = option("normal",
        "Distribution of Box actions: a Gaussian clipped at the bounds, one squashed onto them by tanh, or a Beta "
        "between them.", **CONTROL)
    state_dependent_std: bool = option(False,
        "Compute the Gaussian's standard deviation by the network; else it is a parameter.", **CONTROL, **GAUSSIAN)
    initial_log_std: float = option(0.0,
        "Initial log standard deviation of the Gaussian, in units where the bounds of the actions are -1 and 1.",
        LOG_STD, **CONTROL, **GAUSSIAN)
    demonstrations: str | None = option(None,
        "Transitions to clone: a JSONL or Parquet file with columns `observation` and `action`, or a data set of "
        "Minari, its directory or HDF5 file.", TEXT, **CONTROL, **CLONED)
    validation: float = option(0.1,
        "Share of the demonstrations, of whole episodes where these are known, held out to measure log-probability.",
        SHARE, **CONTROL, **CLONED)

    # What is sampled: completions
    model: str | None = option(None,
        "Hugging Face causal language model, a directory or hub id; by default the task's own.", **LANGUAGE)
    heads: int | None = option(None,
        "Heads of attention in the model that arithmetic or lookup brings; None: 4.", COUNT, **LANGUAGE)
    tokenizer: str | None = option(None, "Tokenizer, a directory or hub id; by default the model's.", **LANGUAGE)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32",
        "Type of the weights; auto: the type in the file.", **LANGUAGE)
    attention: str | None = option(None,
        "Attention: sdpa, eager, flash_attention_2, ...; by default the model's choice.", **LANGUAGE)
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", **LANGUAGE)
    base_model: str | None = option(None,
        "Base of the model, a directory or hub id, if the model is an adapter: training starts from both, merged.",
        **LANGUAGE)
    trust: bool = option(False,
        "Follow the paths and names that files of the model name, such as the base of an adapter.", **LANGUAGE)
    lora_rank: int = option(0,
        "Train only a LoRA adapter of this rank; the reference is the model without it. 0: train all weights.",
        NOT_NEGATIVE, **LANGUAGE)
    lora_alpha: float | None = option(None,
        "LoRA scale: the adapter's output is multiplied by alpha / rank. By default 2 rank.", POSITIVE, **LANGUAGE)
    lora_targets: tuple[str, ...] = option((),
        "Layers with an adapter; by default all linear layers except the head. Repeatable.", **LANGUAGE)
    quantize: Literal["none", "4bit"] = option("none",
        "Hold the model under the adapter in 4 bits (NF4, as QLoRA does), by bitsandbytes.", **LANGUAGE)
    shard: bool = option(False,
        "Of several ranks (torchrun), each holds a part of all weights, of the reference and of the optimizer.",
        **LANGUAGE, **ASCEND)
    gradient_sync: Literal["micro_batch", "step"] = option("micro_batch",
        "When ranks sum the gradients of shards: after each micro-batch, so that each holds its part; or once a step: "
        "fewer messages, and each holds a whole gradient meanwhile.", shard=(True,), **LANGUAGE, **ASCEND)
    save: Literal["adapter", "merged"] = option("adapter",
        "What is saved of a run that trains an adapter: the adapter alone, or the whole model with it merged in.",
        **LANGUAGE)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory.", **LANGUAGE)
    autocast: Literal["none", "bfloat16", "auto"] = option("none",
        "Type of the computation of a language model, or of the encoder of images; weights keep their type, and "
        "log-probabilities are float32. auto: bfloat16 where the device has arithmetic for it.",
        world=("control", "language"))
    dataset: tuple[str, ...] = option((),
        "Prompts: a JSON, JSONL, CSV or Parquet file, or a hub id, with a column `prompt`; the rewards receive the "
        "other columns. Repeatable: the sets are mixed in proportion to their sizes.", **LANGUAGE)
    dataset_weight: tuple[float, ...] = option((),
        "Weight of each data set in the mixture, in the same order; by default its size. Repeatable.",
        RATES, **LANGUAGE)
    split: str = option("train", "Split of the data set, or a slice such as train[:1000].", **LANGUAGE)
    columns: tuple[str, ...] = option((),
        "Rename a column of the data, new=old, such as prompt=question. Repeatable.", **LANGUAGE)
    system_prompt: str | None = option(None,
        "System message before every prompt; a prompt of text then becomes the user's message after it.",
        TEXT, **LANGUAGE)
    template_variables: str | None = option(None,
        "Variables of the chat template as a JSON object, such as '{\"enable_thinking\": false}'.", OBJECT, **LANGUAGE)
    held_out: int = option(128, "Examples held out from training for evaluation; 0: none.", NOT_NEGATIVE, **LANGUAGE)
    evaluation_dataset: tuple[str, ...] = option((),
        "Prompts to evaluate on, in place of held-out ones. Repeatable.", **LANGUAGE)
    evaluation_split: str = option("test", "Split of evaluation_dataset; a file is one split.", **LANGUAGE)
    max_prompt_tokens: int | None = option(None,
        "Maximum tokens in a prompt; by default what the model's context leaves for it.", COUNT, **LANGUAGE)
    long_prompts: Literal["refuse", "drop"] = option("refuse",
        "Prompts with more tokens: an error, or left out and counted.", **LANGUAGE)
    reward: tuple[str, ...] = option((),
        "Reward: exact_match, math_equal, format:REGEX, overlong:MAX,BUFFER, module:function, file.py:function, or a "
        "reward model's directory or hub id. Repeatable: rewards add up with their weights.", **LANGUAGE)
    reward_weight: tuple[float, ...] = option((),
        "Weight of each reward, in the same order; 1 by default. Repeatable.", **LANGUAGE)
    reward_time_limit: float = option(60.0,
        "Time limit in seconds for a reward function on one batch.", POSITIVE, **LANGUAGE)
    decouple_rewards: bool = option(False,
        "Standardize each reward within its group before the weighted sum, so that none drowns the others.",
        **LANGUAGE, **SAMPLED)
    overlong_fraction: float = option(0.0,
        "Soft overlong penalty: the reward falls linearly by 1 over this last share of max_tokens.",
        SHARE, **LANGUAGE, **SAMPLED)
    prompts_per_rollout: int = option(16, "Number of prompts in a rollout.", COUNT, **LANGUAGE)
    completions: int = option(8, "Completions per prompt, which form a group.", COUNT, **LANGUAGE, **SAMPLED)
    max_tokens: int = option(256, "Maximum tokens in a completion; longer completions are cut.", COUNT, **LANGUAGE)
    stop: tuple[str, ...] = option((),
        "Text that ends a completion, which keeps it. Repeatable.", TEXTS, **LANGUAGE)
    turns: int | None = option(None,
        "Turns of the policy in a conversation with an environment or tools, at most; None: 8.", COUNT, **LANGUAGE,
        **SAMPLED)
    turn_tokens: int | None = option(None,
        "Maximum tokens in a turn; max_tokens is of the conversation, what others say included. None: what is left.",
        COUNT, **LANGUAGE, **SAMPLED)
    tool: tuple[str, ...] = option((),
        "Function that the policy may call: python (confined), python:unconfined, module:function or file.py:function. "
        "Repeatable.", DISTINCT, **LANGUAGE, **SAMPLED)
    starts: int | None = option(None,
        "Different beginnings of an environment's conversations, the held-out ones included; None: as many as it has, "
        "or 2048.", COUNT, **LANGUAGE, **SAMPLED)
    temperature: float = option(1.0, "Temperature of the policy, in sampling and log-probabilities.", RATE, **LANGUAGE)
    cut: Literal["kept", "masked", "penalized"] = option("kept",
        "Completions cut at max_tokens: kept as they are, masked out of the update, or penalized by cut_penalty.",
        **LANGUAGE, **SAMPLED)
    cut_penalty: float = option(1.0,
        "Subtracted from the reward of a cut completion.", NOT_NEGATIVE, **LANGUAGE, **SAMPLED, cut=("penalized",))
    old_logp: Literal["sampled", "recomputed"] = option("sampled",
        "Log-probabilities of the old policy: from sampling, or recomputed by the learner.", **LANGUAGE, **SAMPLED)
    engine: Literal["own", "vllm", "transformers"] = option("own",
        "What samples in training: the library's own decoding, or vLLM or transformers in another process.",
        **LANGUAGE, **SAMPLED)
    engine_python: str | None = option(None,
        "Python of the environment that has the engine, ENVIRONMENT/bin/python; None: for transformers, this one.",
        TEXT, **LANGUAGE, **SAMPLED, engine=("vllm", "transformers"))
    engine_tolerance: float = option(1e-3,
        "Most nats between engine and learner in the log-probability of a token, of 64 after each change of the "
        "weights; more is an error.", POSITIVE, **LANGUAGE, **SAMPLED, engine=("vllm", "transformers"))
    engine_adapter: Literal["merged", "alone"] = option("merged",
        "How an adapter reaches vLLM: merged into the weights, or alone, beside weights that it gets once.",
        **LANGUAGE, **SAMPLED, engine=("vllm",))
    engine_sleep: bool = option(False,
        "vLLM gives back its GPU's memory while the policy learns; on a CPU it cannot, which is an error.",
        **LANGUAGE, **SAMPLED, engine=("vllm",))
    engine_time_limit: float = option(1800.0,
        "Seconds that the engine may take for its start, for new weights, or for a rollout; then it is started again.",
        POSITIVE, **LANGUAGE, **SAMPLED, engine=("vllm", "transformers"))
    importance_bound: float = option(2.0,
        "Upper bound of the importance weights pi_old / sampling policy; 0: no correction.",
        POSSIBLY_INFINITE, **LANGUAGE, **SAMPLED, old_logp=("recomputed",))
    importance_low: float = option(0.0,
        "Lower bound of these weights.", SHARE, **LANGUAGE, **SAMPLED, old_logp=("recomputed",))
    importance_level: Literal["token", "sequence", "product"] = option("token",
        "These weights by token, or of the whole completion: their geometric mean, or their product.",
        **LANGUAGE, **SAMPLED, old_logp=("recomputed",))
    importance_outside: Literal["clip", "drop"] = option("clip",
        "Weights outside the bounds: clip them to the bounds, or drop what they weigh.",
        **LANGUAGE, **SAMPLED, old_logp=("recomputed",))
    importance_normalized: bool = option(False,
        "Divide these weights by their mean.", **LANGUAGE, **SAMPLED, old_logp=("recomputed",))
    lag: int = option(0,
        "Updates that the policy which samples is behind; 0: sampling and learning take turns. Of a language model it "
        "samples ahead in a thread, exactly so many; of remote samplers at most so many, and they do not wait for each "
        "other. None is discarded.", NOT_NEGATIVE, **SAMPLED)
    sampling_rounds: int = option(1,
        "Dynamic sampling: maximum rollouts to fill one with groups of unequal returns. 1: no dynamic sampling.",
        COUNT, **SAMPLED, credit=("group",))

    # Credit
    credit: Literal["gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "trajectory_return", "group"] = option(
        "gae",
        "Advantage: from a critic (GAE, n-step, TD(1) or V-trace); the reward-to-go or the whole episode's return, "
        "minus a baseline; or the episode's return relative to its group.", **SAMPLED)
    gamma: float | None = option(0.99, "Discount factor; None: the exact world's own.", UNIT, **SAMPLED)
    lam: float = option(0.95,
        "Lambda of GAE and V-trace: 0 gives the TD error, 1 gives Monte Carlo.", UNIT, credit=("gae", "vtrace"))
    length_adaptive_lam: float | None = option(None,
        "Lambda of the advantage by the length l of its completion or episode: 1 - 1 / (this * l), at least 0 "
        "(VAPO: 0.05); None: lam.", RATE, world=("language", "exact"), credit=("gae",))
    critic_lam: float | None = option(None,
        "Lambda of the critic's target; None: that of the advantage.", UNIT, credit=("gae",))
    n: int = option(5, "Rewards in the n-step return before it bootstraps from the critic.", COUNT, credit=("n_step",))
    rho_bar: float = option(1.0,
        "Bound of the ratio in V-trace's TD error; it sets the policy whose value is learned.",
        POSITIVE, credit=("vtrace",))
    c_bar: float = option(1.0, "Bound of the ratio in V-trace's traces.", POSITIVE, credit=("vtrace",))
    baseline: Literal[
        "none", "mean", "time_mean", "optimal", "greedy", "length_weighted", "token", "value", "start_value"
    ] = option("value",
        "Baseline of the return: none, the other episodes' mean, their mean at the same step, the constant of least "
        "variance, the return of one more episode by the policy's mode; of a group, the mean weighted by length, or "
        "the best number for each token; or a learned value, of each state or of the start.", **RETURNS)
    turn_level: bool = option(False,
        "GAE from turn to turn of a conversation, whose tokens share an advantage, instead of from token to token.",
        **LANGUAGE, credit=("gae",))
    state_weight: float = option(0.0,
        "GiGPO: add the advantage of a turn among the group's turns that begin in the same state, discounted by gamma "
        "from turn to turn, times this weight.", NOT_NEGATIVE, **LANGUAGE, credit=("group",))
    discounted: bool = option(False,
        "Multiply the advantage at step t by gamma^t, for the true gradient of the discounted return.",
        credit=("gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "group"))
    group_baseline: Literal["mean", "leave_one_out", "other_best"] = option("mean",
        "Baseline of a group: the mean of all its returns, or of the other returns; other_best leaves what the group's "
        "best return owes to the row.", credit=("group",))
    group_scale: Literal["std", "none", "mean", "batch"] = option("std",
        "Divisor of a group's advantages: its standard deviation, none, its mean return (for rewards that are not "
        "negative), or the standard deviation of all returns.", credit=("group",))
    learn_from: Literal["all", "high_entropy", "low_covariance"] = option("all",
        "Decisions that are learned from: all, those where the policy's entropy is largest (learn_from_share), or all "
        "but a share of those where log-probability and advantage covary most (covariance_share).",
        objective=("grpo",))
    learn_from_share: float = option(0.2, "The share of such decisions.", FRACTION, objective=("grpo",),
        learn_from=("high_entropy",))
    covariance_share: float = option(0.0002,
        "Clip-Cov: decisions left out of those between covariance_low and covariance_high, as a share of all, at least "
        "one; on average, by weights.", FRACTION, objective=("grpo",), learn_from=("low_covariance",))
    covariance_low: float = option(1.0,
        "Lower bound of (A - mean A)(log pi - mean log pi) of such decisions.", objective=("grpo",),
        learn_from=("low_covariance",))
    covariance_high: float = option(5.0,
        "Upper bound of the same.", objective=("grpo",), learn_from=("low_covariance",))
    normalize_advantages: Literal["none", "batch", "minibatch"] = option("none",
        "Standardize advantages over the batch or over each minibatch.", **SAMPLED)
    weights: Literal["token", "row", "episode", "budget"] = option("token",
        "Average over decisions: all equally; mean per row; sum per row; or sum per row / maximum row length.")

    symmetry: str | None = option(None,
        "Learn from each decision's reflection too, in a task that it leaves as it is: module:function or "
        "file.py:function of (obs, action), tensors [B, T, ...], which returns the reflected two.",
        TEXT, **CONTROL, objective=("surrogate", "ppo", "grpo"))

    # Objective
    entropy_coefficient: float = option(0.0,
        "Coefficient of the entropy in the objective.",
        NOT_NEGATIVE, objective=("reinforce", "actor_critic", "ppo", "grpo", "clone"))
    entropy_target: float | None = option(None,
        "Entropy below which the bonus grows by entropy_step an iteration, and above which it is off and shrinks; "
        "None: it is constant.", RATE, objective=("grpo",))
    entropy_step: float = option(0.005, "The step of entropy_target.", RATE, objective=("grpo",))
    value_coefficient: float = option(0.5,
        "Coefficient of the critic's squared error in the objective.",
        NOT_NEGATIVE, objective=("actor_critic", "ppo"), credit=BOOTSTRAPPED)
    value_clip: float = option(math.inf,
        "Clip the change of the critic's value to this, in the critic's unit of value; inf: no clipping.",
        POSITIVE, objective=("ppo",), credit=BOOTSTRAPPED)
    ratio: Literal["token", "sequence", "sequence_token", "product"] = option("token",
        "Ratio of the new policy to the old: by token; of the whole sequence, its geometric mean; that value with each "
        "token's own gradient; or the product over the sequence.", objective=("grpo", "surrogate"))
    gain: Literal["surrogate", "weight", "sigmoid", "gamma", "score"] = option("surrogate",
        "Clip the surrogate (as PPO), or only the importance weight, which keeps every gradient; a soft clip by a "
        "sigmoid, or a weight like a gamma density; or log pi A without a ratio.", objective=("grpo",))
    clip_low: float = option(0.2,
        "Clip the ratio to [1 - clip_low, 1 + clip_high]; inf: no clipping.", POSITIVE, **MINIBATCHES, **CLIPPED)
    clip_high: float = option(0.2,
        "Clip the ratio to at most 1 + clip_high; see clip_low.", POSITIVE, **MINIBATCHES, **CLIPPED)
    sigmoid_positive: float = option(1.0,
        "Temperature of the sigmoid where the advantage is positive: larger is a narrower trust region.",
        RATE, objective=("grpo",), gain=("sigmoid",))
    sigmoid_negative: float = option(1.05,
        "The same where the advantage is negative.", RATE, objective=("grpo",), gain=("sigmoid",))
    gamma_power_positive: float = option(2.0,
        "Power k of the weight W^k exp(c (1 - W)) where the advantage is positive.",
        RATE, objective=("grpo",), gain=("gamma",))
    gamma_power_negative: float = option(3.0,
        "The same where the advantage is negative.", RATE, objective=("grpo",), gain=("gamma",))
    gamma_rate_positive: float = option(3.0,
        "Rate c of that weight where the advantage is positive.", RATE, objective=("grpo",), gain=("gamma",))
    gamma_rate_negative: float = option(2.0,
        "The same where the advantage is negative.", RATE, objective=("grpo",), gain=("gamma",))
    token_clip: float = option(math.inf,
        "Clip the log-ratio of each token to this, where the advantage favors it, before ratios are averaged; inf: "
        "no such clipping.", POSITIVE, objective=("grpo",))
    dual_clip: float = option(math.inf,
        "Floor of the objective for negative advantages, as a multiple of the advantage; inf: none.",
        ABOVE_1, objective=("ppo", "grpo"))
    divergence_mask: Literal["none", "binary_tv", "binary_kl", "tv", "kl"] = option("none",
        "Leave out decisions whose divergence from the old policy exceeds divergence_bound in the direction that the "
        "advantage favors: total variation or KL, of the action taken (binary) or of all actions.",
        objective=("grpo",))
    divergence_bound: float = option(0.15,
        "Bound of that divergence.", POSITIVE, objective=("grpo",),
        divergence_mask=("binary_tv", "binary_kl", "tv", "kl"))
    drift_bound: float = option(math.inf,
        "Leave out rows of negative advantage whose mean log(pi_old / pi) exceeds this; inf: none.",
        POSITIVE, objective=("grpo",))
    kl_old_coefficient: float = option(0.0,
        "Initial beta of the penalty beta KL(old, new); 0: no penalty.", NOT_NEGATIVE, **MINIBATCHES)
    kl_old_target: float = option(math.inf,
        "Target KL(old, new) of an update, to which beta adapts; inf: beta is constant.", POSITIVE, **MINIBATCHES)
    kl_old_estimate: Literal["k3", "absolute", "squared_row"] = option("k3",
        "Estimate of that KL: k3 or the absolute log-ratio of each decision, or half the squared log-ratio of whole "
        "rows.", objective=("grpo",))
    kl_old_share: float = option(1.0,
        "KL-Cov: charge that KL only to this share of the decisions, those where log-probability and advantage covary "
        "most, at least one; 1: to all.", PART, objective=("grpo",))
    target_kl: float = option(math.inf,
        "End the epochs early if a minibatch's KL(old, new) exceeds 1.5 times this value.", POSITIVE, **MINIBATCHES)
    kl_ref: Literal["none", "reward", "loss"] = option("none",
        "Penalize KL(pi, pi_ref) to the starting policy in the reward or, for grpo and its variants, in the loss.",
        **SAMPLED)
    kl_ref_coefficient: float = option(0.04,
        "Coefficient of KL(pi, pi_ref).", NOT_NEGATIVE, **SAMPLED, kl_ref=("reward", "loss"))
    kl_ref_target: float = option(math.inf,
        "Target KL(pi, pi_ref) per decision, to which the coefficient adapts; inf: it is constant.",
        POSITIVE, **SAMPLED, kl_ref=("reward", "loss"))
    kl_ref_estimate: Literal["straight_through", "k1", "k2", "k3", "exact"] = option("straight_through",
        "Estimate in the loss: straight_through and exact have the correct gradient, k3 is GRPO's, k1 has none.",
        objective=("grpo",), kl_ref=("loss",))

    teacher: str | None = option(None,
        "Model that the policy is drawn to: the reference, in place of the policy's start, with the same tokenizer. "
        "Without a reward nothing else is learned.", TEXT, **LANGUAGE, **SAMPLED, kl_ref=("reward", "loss"))
    reference_every: int | None = option(None,
        "Iterations after which the reference becomes the policy as it is, again and again; None: it stays.",
        COUNT, **SAMPLED, kl_ref=("reward", "loss"))
    reference_decay: float | None = option(None,
        "Decay of a reference that is the exponential moving average of the policy; None: it stays.",
        FRACTION, **SAMPLED, kl_ref=("reward", "loss"))

    positive_weight: float = option(0.0,
        "Weight of the mean log-probability of the completions whose reward is above 0, which is added to the "
        "objective (VAPO: 0.1); 0: none.", NOT_NEGATIVE, **LANGUAGE, **MINIBATCHES)
    mix: str | None = option(None,
        "Demonstrations mixed in, as clone takes them: a file or hub id with `prompt` and `completion`, or `messages`. "
        "Each update adds their log-probability to the objective.", TEXT, **LANGUAGE, **SAMPLED, **ASCEND)
    mix_weight: float = option(1.0,
        "Weight of the mean log-probability of the tokens of such completions.", RATE, **LANGUAGE, **SAMPLED, **ASCEND)
    mix_rows: int = option(16, "Demonstrations in each update.", COUNT, **LANGUAGE, **SAMPLED, **ASCEND)

    # Update
    learning_rate: float | None = option(0.0003,
        "Learning rate of the policy; also of the critic if they share the optimizer. None, for a language "
        "model: 1e-6 (clone: 1e-5), or 1e-4 for an adapter.", RATE, **ASCEND)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = option("constant",
        "Learning rate schedule, by iterations: constant, or decay to 0, linear or by half a cosine.")
    warmup: float = option(0.0,
        "Share of the run over which learning rates first rise from 0, linearly (Hugging Face's warmup_ratio).", SHARE)
    optimizer: Literal["adam", "adamw", "adamw_8bit", "sgd", "muon"] = option("adam",
        "Optimizer, as in torch.optim. muon: Muon for matrices, its rate adjusted to AdamW's, which takes the others. "
        "adamw_8bit: AdamW by bitsandbytes, its moments in 8 bits.")
    weight_decay: float = option(0.0,
        "Weight decay: added to the gradient by adam and sgd, apart from it by the others.", NOT_NEGATIVE)
    momentum: float | None = option(None,
        "Momentum; None: torch's own, 0 for sgd and 0.95 for muon.", SHARE, optimizer=("sgd", "muon"))
    adam_epsilon: float = option(1e-05,
        "Epsilon of Adam, added to the denominator.", RATE, optimizer=("adam", "adamw", "adamw_8bit", "muon"))
    epochs: int = option(1,
        "Passes over a rollout; without minibatches, steps on it with credit recomputed before each.",
        COUNT, **ASCEND, **SAMPLED)
    minibatch_size: int | None = option(64,
        "Decisions in a gradient step, whole rows with at most so many if the policy has memory; or rows, if they are "
        "completions or its own whole episodes. None: the whole rollout.",
        COUNT, objective=("ppo", "grpo", "clone"))
    micro_batch: int | None = option(None,
        "Rows computed at a time, completions sampled too: smaller saves memory; the gradient is the same.",
        COUNT, **ASCEND)
    micro_batch_tokens: int | None = option(None,
        "Tokens computed at a time, prompts and padding included; a longer row is computed alone. See micro_batch.",
        COUNT, **LANGUAGE, **ASCEND)
    shared_prompts: Literal["auto", "on", "off"] = option("auto",
        "Compute the prompt of a group once in learning, the same to rounding; auto: if the model allows it.",
        **LANGUAGE, **ASCEND, **SAMPLED)
    gradient_noise: Literal["moments", "exact", "off"] = option("moments",
        "gradient_snr and noise_scale, the batch size that the gradient's noise suggests: from Adam's moments, or "
        "exact, from gradients of parts of a batch (one more gradient for each row of metrics).", **ASCEND)
    max_grad_norm: float = option(math.inf,
        "Gradient clipping: maximum norm of the gradient, of policy and critic apart if they share no parameter.",
        POSITIVE, **ASCEND)
    delta: float = option(0.01,
        "Radius of the trust region: the KL(old, new) of a step.", RATE, **NATURAL, step_rule=("kl_radius",))
    damping: float = option(0.1, "Added to the diagonal of the Fisher matrix.", NOT_NEGATIVE, **NATURAL)
    cg_iters: int = option(10, "Maximum iterations of conjugate gradient.", COUNT, **NATURAL)
    backtracks: int = option(10,
        "Maximum trials in the line search; if all fail, the policy stays unchanged.", COUNT, update=("trust_region",))
    shrink: float = option(0.8,
        "Factor that shrinks the step from one trial to the next.", FRACTION, update=("trust_region",))
    step_rule: Literal["kl_radius", "learning_rate"] = option("kl_radius",
        "Step size: kl_radius is alpha = sqrt(2 delta / g.F^-1 g), learning_rate a fixed alpha.", update=("natural",))
    natural_learning_rate: float = option(0.1,
        "The fixed alpha of the step rule learning_rate.", RATE, update=("natural",), step_rule=("learning_rate",))
    critic: str = option("copy",
        "copy: a copy of the model with a value head; shared: a value head on the policy's trunk; or the directory or "
        "hub id of another model with the same tokenizer.", **LANGUAGE, **SAMPLED)
    critic_learning_rate: float | None = option(None,
        "Learning rate of the critic, or only of its head on a shared trunk; None: the policy's.", RATE, **SAMPLED)
    critic_warmup: int = option(0,
        "First iterations in which only the critic learns.", NOT_NEGATIVE, **ASCEND, **SAMPLED)
    critic_epochs: int = option(10,
        "Passes over the rollout to fit a critic with its own optimizer.",
        COUNT, objective=("reinforce", "surrogate", "grpo"))
    critic_minibatch_size: int = option(128,
        "Minibatch size of the fit of such a critic.", COUNT, objective=("reinforce", "surrogate", "grpo"))
# fmt: on


def with_rate(options: Any) -> Any:
    """The options with a learning rate: if it is None, 1e-6 for a whole language model (of demonstrations, which are
    less noisy, 1e-5), 1e-4 for an adapter.

    An adapter starts at 0 and has few weights; at the rate of whole models it would not move.
    """
    if getattr(options, "learning_rate", 1.0) is not None:
        return options
    whole = 1e-5 if KNOWN[options.method].objective == "clone" else 1e-6
    return replace(options, learning_rate=1e-4 if options.lora_rank else whole)


def has_critic(options: Any) -> bool:
    """Whether the credit needs a critic."""
    if not hasattr(options, "credit"):  # that of demonstrations
        return False
    return options.credit in BOOTSTRAPPED or (options.credit != "group" and options.baseline in OF_CRITIC)


def compares_groups(options: Any) -> bool:
    """Whether the credit compares the rows of a group."""
    credit = getattr(options, "credit", None)
    return credit == "group" or (credit in RETURNS["credit"] and options.baseline in OF_GROUPS)


def compares_greedy(options: Any) -> bool:
    """Whether the baseline is the return of the policy's mode."""
    return getattr(options, "credit", None) in RETURNS["credit"] and options.baseline == "greedy"


@cache
def options_of(method: str, world: str) -> type:
    """The dataclass of a method's options on a world, with their defaults there."""
    named, hints = KNOWN[method], get_type_hints(Options)
    given = defaults_of(named, world)
    made: list[tuple[str, Any, Field]] = []
    for f in fields(Options):
        if not _applies(f, named, world):
            continue
        made.append((f.name, hints[f.name], field(default=given.pop(f.name, f.default), metadata=f.metadata)))
    assert not given, f"{method} on {world} has no {', '.join(given)}"
    name = "".join(part.title() for part in method.split("_")) + "Options"
    kind = make_dataclass(name, made, frozen=True, kw_only=True)
    kind.__doc__ = named.summary
    kind.method, kind.world = method, world  # type: ignore[attr-defined]
    return kind


def defaults_of(method: Method, world: str) -> dict[str, Any]:
    """A method's defaults on a world that override the fields' defaults: the world's, then the method's."""
    known = {f.name for f in fields(Options) if _applies(f, method, world)}
    given = {**WORLDS[world], **method.defaults, **method.on.get(world, {})}
    return {name: x for name, x in given.items() if name in known}


# Each world's defaults that differ from the fields' defaults.
WORLDS: dict[str, dict[str, Any]] = {
    "control": {"steps": 1_000_000, "threads": 1},
    "exact": {
        "steps": 20_000,
        "gamma": None,
        "evaluate_every": 1,
        "threads": 1,
        "num_envs": 32,
        "learning_rate": 0.05,
        "critic_learning_rate": 0.1,
    },
    "language": {
        "iterations": 200,
        "gamma": 1.0,
        "learning_rate": None,
        "critic_learning_rate": 1e-5,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "minibatch_size": None,
        "critic_epochs": 4,
        "critic_minibatch_size": 32,
    },
}


def for_command_line(kind: type) -> type:
    """The same dataclass, with the help texts in tyro's form."""
    made = []
    for f in fields(kind):
        marks = (UseAppendAction,) if repeats(f.type) else ()
        made.append((f.name, Annotated[f.type, *marks, arg(help=f.metadata["help"])], field(default=f.default)))
    return make_dataclass(kind.__name__, made, frozen=True, kw_only=True)


def repeats(kind: Any) -> bool:
    """Whether an option of this type is given once for each entry: a list, but for the sizes in `--hidden 64 64`."""
    return get_origin(kind) is tuple and get_args(kind)[0] is not int


def with_values(options: Any, values: Mapping[str, Any], origin: str = "") -> Any:
    """The options with the given values. Raises OptionError for an unknown name or a value of the wrong type."""
    kinds: dict[str, Any] = {f.name: f.type for f in fields(options)}
    objects = {f.name for f in fields(options) if f.metadata["bound"] is OBJECT}
    given: dict[str, Any] = {}
    for name, x in values.items():
        if name not in kinds:
            raise OptionError(name, f"{origin}{options.method} has no option {name!r}{_why_not(name, options, kinds)}")
        entries = _from_python(x, kinds[name])
        texts = tuple(y for y in entries if not callable(y)) if name == "reward" else entries  # functions, from Python
        single = texts if isinstance(texts, tuple) else (texts,)
        if any(isinstance(y, str) and "\0" in y for y in single):
            raise OptionError(name, f"{origin}{name} is {shortened(x)}: no name holds a null byte")
        if any(isinstance(y, str) and re.search("[\ud800-\udfff]", y) for y in single):
            raise OptionError(name, f"{origin}{name} is {shortened(x)}: half of a surrogate pair is no character")
        if any(isinstance(y, Integral) and abs(int(y)) >= 2**63 for y in single):
            raise OptionError(name, f"{origin}{name} is too large: an integer must be less than 2**63 in size")
        if not _fits(texts, kinds[name]):
            a_dict = isinstance(entries, Mapping) or name in objects
            must_be = "a dict that JSON keeps as it is" if a_dict else in_words(kinds[name])
            raise OptionError(name, f"{origin}{name} is {shortened(x)}: it must be {must_be}")
        given[name] = _plain(entries, kinds[name])
    return replace(options, **given)


def check_bounds(options: Any) -> None:
    """Raise OptionError if a value is out of bounds."""
    for f in fields(options):
        x, bound = getattr(options, f.name), f.metadata["bound"]
        if isinstance(x, float) and math.isnan(x):
            raise OptionError(f.name, f"{f.name} is {x}: it must be a number")
        if bound is not None and x is not None and not bound.holds(x):
            raise OptionError(f.name, f"{f.name} is {str(x)[:60]}: it must be {bound.said}")


def validate(options: Any, defaults: Any) -> None:
    """Raise OptionError for values that are out of bounds, are never read, or conflict with each other.

    defaults: the options without the user's values, including the preset's values.
    """
    check_bounds(options)
    for f in fields(options):
        if getattr(options, f.name) != getattr(defaults, f.name):
            _check_read(f, options)
    for name, message in _conflicts(options):
        raise OptionError(name, message)


def is_read(name: str, options: Any) -> bool:
    """Whether the other options leave this one read."""
    try:
        _check_read(next(f for f in fields(options) if f.name == name), options)
    except OptionError:
        return False
    return True


def _check_read(f: Field, options: Any) -> None:
    """Raise OptionError if an option was set but the other options mean that it is not read."""
    for other, values in f.metadata["when"].items():
        if hasattr(options, other) and other not in ("world", "method") and getattr(options, other) not in values:
            allowed = " or ".join(str(x) for x in values if x != DEMONSTRATED)
            raise OptionError(
                f.name,
                f"{f.name} is read only where {other} is {allowed}, and {other} is {getattr(options, other)}: "
                f"set that too, or leave {f.name} out",
            )
    scaled = getattr(options, "scale_rewards", False)
    scaled = scaled or bool(getattr(options, "state_weight", 0.0))
    if f.name == "gamma" and options.credit == "group" and not options.discounted and not scaled:
        raise OptionError(
            "gamma", "gamma is read only where a group's credit is discounted: set that too, or leave it out"
        )
    if f.name == "group_size" and not compares_groups(options):
        raise OptionError(
            "group_size", "group_size is read only where credit is group, or the baseline of a group's: leave it out"
        )
    if f.name == "lam" and getattr(options, "length_adaptive_lam", None) is not None:
        raise OptionError("lam", "lam is read only without length_adaptive_lam: leave one of the two out")
    if f.name == "ray" and options.samplers is None:
        raise OptionError("ray", "ray is of samplers, which is None: set that too, or leave ray out")
    if f.name == "lag" and getattr(options, "samplers", 1) is None:
        other = ", or overlap" if hasattr(options, "overlap") else ""
        raise OptionError("lag", f"lag is of samplers here, and samplers is None: set that{other}, or leave lag out")
    if f.name in ("mix_weight", "mix_rows") and options.mix is None:
        raise OptionError(f.name, f"{f.name} is of mix, which is None: set that too, or leave it out")
    if f.name == "entropy_step" and options.entropy_target is None:
        raise OptionError("entropy_step", "entropy_step is of entropy_target, which is None: set that too")
    if f.name in ("evaluation_episodes", "evaluation_patience") and not options.evaluate_every:
        raise OptionError(f.name, f"{f.name} is of evaluate_every, which is 0: set that too, or leave it out")
    evaluation = bool(getattr(options, "evaluation_dataset", ()))
    if f.name == "held_out" and evaluation:
        raise OptionError("held_out", "held_out is read only without evaluation_dataset: leave one of the two out")
    if f.name == "evaluation_split" and not evaluation:
        raise OptionError(
            "evaluation_split", "evaluation_split is of evaluation_dataset: set that too, or leave it out"
        )
    critics = {
        "critic_warmup",
        "critic_epochs",
        "critic_minibatch_size",
        "critic",
        "critic_learning_rate",
        "critic_encoder",
        "critic_memory",
    }
    if KNOWN[options.method].update != "ascend":  # then the optimizer is the critic's alone
        critics |= {"optimizer", "weight_decay", "momentum", "adam_epsilon", "learning_rate_schedule", "warmup"}
    if f.name in critics and not has_critic(options):
        raise OptionError(f.name, f"{f.name} is a critic's, and credit {options.credit} has none: leave it out")


def _conflicts(o: Any) -> Any:
    """(option, message) for each conflict between values."""
    method, world = KNOWN[o.method], o.world
    if method.objective == "clone" and world == "exact":
        yield "demonstrations", "clone learns from demonstrations, and an exact world has none: use another method"
    if o.steps is None and o.iterations is None:
        yield "steps", "steps and iterations are both None: say how long to train"
    if o.checkpoint_every is not None and not o.checkpoints:
        yield "checkpoint_every", "checkpoint_every is of checkpoints, and there are to be 0: set that too"
    if getattr(o, "compile", "off") == "on" and o.optimizer in WITHOUT_GRAPH:
        yield "compile", f"compile is on, and steps of {o.optimizer} have no graph: leave it out, or choose adam"
    if getattr(o, "learning_rate", 1.0) is None and world != "language":
        yield "learning_rate", "learning_rate is None, which is for language models: give a number, such as 3e-4"
    if world == "language":
        yield from _language_conflicts(o)
    if method.objective == "clone":
        if world == "control" and o.weights != "token":
            yield "weights", "weights is of whole rows, and transitions all count equally: leave it out"
        return
    if method.objective not in ("ppo", "grpo") and o.normalize_advantages == "minibatch":
        yield "normalize_advantages", f"normalize_advantages is minibatch, and {o.method} has none: use batch or none"
    if world == "control":
        yield from _sampling_conflicts(o)
    if getattr(o, "minibatch_size", None) == 1 and o.normalize_advantages == "minibatch":
        yield (
            "minibatch_size",
            "minibatch_size is 1: one advantage cannot be standardized; normalize_advantages batch can",
        )
    yield from _penalty_conflicts(o)
    if o.critic_learning_rate is None and has_critic(o) and not hasattr(o, "learning_rate"):
        yield (
            "critic_learning_rate",
            f"critic_learning_rate is None, which is the policy's, and {o.method} has none: give a number",
        )
    if o.credit == "trajectory_return" and o.discounted:
        yield "discounted", "discounted is for reward_to_go: a trajectory_return has gamma^t in it already"
    if o.gamma is None and world != "exact":
        yield "gamma", "gamma is None, and only an exact world has one of its own: give a number, such as 0.99"
    if world != "language":
        rows = o.num_envs
        if world == "control" and o.credit not in EPISODIC and o.episode_steps is not None:
            yield (
                "episode_steps",
                f"episode_steps is for whole episodes, and credit {o.credit} takes segments: set num_steps",
            )
        if compares_groups(o) and rows < 2:
            yield "num_envs", f"num_envs is {rows}: {o.method} compares episodes; give at least 2"
        group = getattr(o, "group_size", None)
        if group is not None and rows % group:
            yield "group_size", f"group_size is {group}, which does not divide num_envs, {rows}"
        if o.samplers is not None:
            yield from _remote_conflicts(o, rows // (group or 1))
        yield from _sizes(o)


def _penalty_conflicts(o: Any) -> Any:
    """Conflicts of the penalties of KL to the old policy and to the reference."""
    if getattr(o, "kl_old_coefficient", None) == 0 and math.isfinite(o.kl_old_target):
        yield "kl_old_target", "kl_old_target adapts kl_old_coefficient, which is 0: set that too"
    if getattr(o, "kl_old_coefficient", None) == 0 and getattr(o, "kl_old_estimate", "k3") != "k3":
        yield "kl_old_estimate", "kl_old_estimate is of kl_old_coefficient, which is 0: set that too"
    if getattr(o, "kl_old_share", 1.0) < 1 and (o.kl_old_coefficient == 0 or o.kl_old_estimate == "squared_row"):
        wanted = (
            "kl_old_coefficient, which is 0" if o.kl_old_coefficient == 0 else "single decisions, not of squared_row"
        )
        yield "kl_old_share", f"kl_old_share is of {wanted}: change that too, or leave it out"
    if getattr(o, "learn_from", "all") == "low_covariance" and o.covariance_low >= o.covariance_high:
        yield "covariance_low", "covariance_low is not below covariance_high: lower it, or nothing is between them"
    if o.kl_ref == "loss" and KNOWN[o.method].objective != "grpo":
        yield (
            "kl_ref",
            f"kl_ref is loss, and {o.method} has no such term: use kl_ref reward, or a method of grpo's family",
        )
    if o.reference_every is not None and o.reference_decay is not None:
        yield "reference_decay", "reference_every and reference_decay are two ways to move the reference: leave one out"
    if o.kl_ref != "none" and getattr(o, "lora_rank", 0):
        for name in ("reference_every", "reference_decay"):
            if getattr(o, name) is not None:
                yield name, f"{name} moves a copy of the model, and with lora_rank the reference is none: leave it out"


def _sampling_conflicts(o: Any) -> Any:
    """Conflicts of memory, self-play, and a rollout that is sampled beside."""
    method = KNOWN[o.method]
    if o.sequence_length is not None and o.credit not in EPISODIC and o.num_steps % o.sequence_length:
        yield (
            "sequence_length",
            f"sequence_length is {o.sequence_length}, which does not divide num_steps, {o.num_steps}",
        )
    if o.critic_memory == "shared" and method.objective not in ("ppo", "actor_critic") and has_critic(o):
        yield (
            "critic_memory",
            f"critic_memory is shared, and {o.method} fits its critic alone, which would move the policy: use own",
        )
    if o.overlap and getattr(o, "divergence_mask", "none") in ("tv", "kl"):
        yield (
            "overlap",
            "overlap samples while the copy of the old policy is read: leave it out, or use a binary divergence_mask",
        )
    if o.overlap and o.profile:
        yield "profile", "profile follows one thread, and overlap samples in another: leave one of the two out"
    if o.overlap and method.objective in ("reinforce", "actor_critic") and o.credit != "vtrace":
        yield (
            "overlap",
            f"overlap learns from a policy one update old, and {o.method} does not correct for that: use "
            "off_policy_actor_critic, or a method with a ratio such as ppo or grpo",
        )
    if o.agents == "separate":
        unfit = {
            "compile": o.compile == "on",
            "overlap": o.overlap,
            "opponent": o.opponent == "self",
            "divergence_mask": getattr(o, "divergence_mask", "none") == "tv",
            "baseline": getattr(o, "baseline", "") in ("optimal", "token"),
        }
        for name, given in unfit.items():
            if given:
                said = "agents separate has a policy for each agent, whose rows differ from batch to batch"
                yield name, f"{said}: leave {name} {getattr(o, name)} out"
    if getattr(o, "symmetry", None) is not None:
        if o.normalize_observations:
            said = "symmetry reflects observations as the environment gives them, and normalized ones have lost theirs"
            yield "normalize_observations", f"{said}: leave one out"
        if o.memory != "none" and o.credit not in EPISODIC:
            said = "symmetry with memory needs rows that are whole episodes, before which the memory is empty"
            yield "memory", f"{said}: use credit group or reward_to_go, or leave one out"
        if getattr(o, "gain", "surrogate") == "score":
            yield "gain", "symmetry needs a ratio, and gain score has none: leave one of the two out"
    if o.opponent == "self":
        for name, given in (("overlap", o.overlap), ("wrap", o.wrap), ("vectorization", o.vectorization == "async")):
            if given:
                why = "between its rollouts, with the observations of the game itself, and in this process"
                yield name, f"opponent self freezes and plays the policy {why}: leave {name} out"


def _remote_conflicts(o: Any, shared: int) -> Any:
    """Conflicts of remote samplers, which share so many environments or groups of them."""
    of_control = o.world == "control"
    if o.samplers > shared:
        each = "" if getattr(o, "group_size", None) is None else f" in groups of {o.group_size}"
        said = f"samplers is {o.samplers:,}, and num_envs is {o.num_envs:,}{each}: a sampler would have no work"
        yield "samplers", f"{said}; give at most {shared:,} samplers"
    if o.lag and o.credit not in BOOTSTRAPPED:
        yield "lag", f"lag is for credit {', '.join(BOOTSTRAPPED)}, and credit is {o.credit}: leave lag out"
    if o.lag and shared % o.samplers:
        said = f"samplers is {o.samplers:,}, which does not divide num_envs, {o.num_envs:,}"
        yield "samplers", f"{said}: with lag each has as many, whichever are the first"
    if o.lag and (said := _uncorrected(o)):
        yield "lag", f"lag {said}"
    unfit = {
        "overlap": of_control and o.overlap,
        "opponent": of_control and o.opponent == "self",
        "profile": o.profile,
    }
    why = {
        "overlap": "samplers have lag for this",
        "opponent": "samplers do not have the earlier selves",
        "profile": "profile follows one process, and samplers are others",
    }
    for name, given in unfit.items():
        if given:
            yield name, f"{why[name]}: leave {name} or samplers out"


def _uncorrected(o: Any) -> str:
    """Why a method must not learn from a policy that is some updates old; empty if it may."""
    if getattr(o, "divergence_mask", "none") in ("tv", "kl"):
        return "needs the policy that sampled, and divergence_mask reads the newest old one: use a binary one"
    if KNOWN[o.method].objective in ("reinforce", "actor_critic") and o.credit != "vtrace":
        return (
            f"learns from a policy some updates old, and {o.method} does not correct for that: use "
            "off_policy_actor_critic, or a method with a ratio such as ppo or grpo"
        )
    return ""


WITHOUT_GRAPH = ("muon", "adamw_8bit")  # optimizers whose steps are not compiled

# What needs all weights of a model on one rank, or passes through it that are not those of other ranks.
NOT_SHARDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lora_rank": (lambda x: x > 0, "an adapter is small, and its model would be whole"),
    "optimizer": (lambda x: x in WITHOUT_GRAPH, "it needs whole matrices, or blocks of them"),
    "dtype": (lambda x: x != "float32", "optimizers keep float32 copies of other weights, which are not sharded"),
    "critic": (lambda x: x == "shared", "a trunk belongs to one model"),
    "divergence_mask": (lambda x: x in ("tv", "kl"), "it keeps a whole copy of the policy"),
    "engine": (lambda x: x != "own", "it would need whole weights on each rank"),
    "baseline": (lambda x: x == "optimal", "it needs the score of each row"),
    "gradient_noise": (lambda x: x == "exact", "it needs the gradient of each row"),
    "reference_every": (lambda x: x is not None, "a sharded reference stays as it is"),
    "reference_decay": (lambda x: x is not None, "a sharded reference stays as it is"),
    "mix": (lambda x: x is not None, "ranks would pass through it a different number of times"),
    "shared_prompts": (lambda x: x == "on", "ranks would pass through it a different number of times"),
}


def _language_conflicts(o: Any) -> Any:
    if getattr(o, "shard", False) and KNOWN[o.method].objective == "clone":
        yield "shard", "shard is not for clone, which learns with whole weights: leave it out"
    if getattr(o, "engine", "own") == "vllm" and o.engine_python is None:
        said = "engine is vllm, which needs an environment of its own"
        yield "engine_python", f"{said}: give engine_python, the path of its bin/python"
    if getattr(o, "engine_adapter", "merged") == "alone" and not o.lora_rank:
        yield "engine_adapter", "engine_adapter alone is of an adapter, and lora_rank is 0: set that too"
    if getattr(o, "engine", "own") != "own" and o.quantize != "none":
        yield "engine", f"{o.engine} would need the rounded weights that quantize holds: use the engine own"
    for name, (refused, why) in NOT_SHARDED.items() if getattr(o, "shard", False) else ():
        if hasattr(o, name) and refused(x := getattr(o, name)):
            yield name, f"{name} is {shortened(x, 20)}, and not with shard, since {why}: leave one of the two out"
    if getattr(o, "lag", 0):
        yield from _lag_conflicts(o)
    for name in ("reference_every", "reference_decay"):
        if getattr(o, "teacher", None) is not None and getattr(o, name) is not None:
            yield name, f"{name} moves the reference, and a teacher stays as it is: leave one out"
    if getattr(o, "decouple_rewards", False) and o.completions < 2:
        yield (
            "decouple_rewards",
            "decouple_rewards compares the completions of a prompt, and completions is 1: raise it",
        )
    if getattr(o, "decouple_rewards", False) and compares_greedy(o):
        said = "decouple_rewards standardizes rewards within a group, and baseline greedy compares them with another's"
        yield "decouple_rewards", f"{said}: leave one out"
    for name in ("length_adaptive_lam", "critic_lam"):
        if getattr(o, "turn_level", False) and getattr(o, name) is not None:
            yield name, f"{name} is of tokens, and turn_level takes lam from turn to turn: leave one out"
    if getattr(o, "turn_level", False) and o.discounted:
        yield (
            "discounted",
            "discounted counts tokens, and turn_level discounts from turn to turn: leave one out",
        )
    if compares_groups(o) and o.completions < 2:
        yield "completions", f"completions is 1: {o.method} compares the completions of a prompt; give at least 2"
    each = getattr(o, "completions", 1)
    rows = o.prompts_per_rollout * each
    if (getattr(o, "minibatch_size", None) or 0) > rows:
        many = "prompts_per_rollout" if each == 1 else "prompts_per_rollout * completions"
        yield (
            "minibatch_size",
            f"minibatch_size is {o.minibatch_size}, and a rollout has {many} = {rows} "
            "completions: lower the one or raise the other",
        )
    if o.reward_weight and len(o.reward_weight) != len(o.reward):
        yield (
            "reward_weight",
            f"there are {len(o.reward)} rewards and {len(o.reward_weight)} weights: give one weight for each reward",
        )
    if not o.lora_rank and (o.lora_targets or o.lora_alpha is not None):
        yield "lora_rank", "lora_targets and lora_alpha are of an adapter, and lora_rank is 0: set that too"
    if getattr(o, "positive_weight", 0.0) and o.kl_ref == "reward":
        said = "positive_weight reads which rewards are above 0, and kl_ref reward charges KL to them"
        yield "positive_weight", f"{said}: use another kl_ref"
    if not o.lora_rank and o.save == "merged":
        yield "save", "save merged is of an adapter, and lora_rank is 0: set that too, or leave save out"
    if o.quantize != "none":
        if not o.lora_rank:
            yield "quantize", "quantize is of the model under an adapter, and lora_rank is 0: set that too"
        if o.save == "merged":
            yield "save", "save merged adds the adapter to weights, which quantize rounds: save the adapter"
        if has_critic(o) and o.critic == "copy":
            yield "critic", "critic copy would train a copy of weights in 4 bits: use shared, or name another model"
    if has_critic(o) and o.critic == "shared" and KNOWN[o.method].objective not in ("ppo", "actor_critic"):
        yield "critic", f"critic is shared, and {o.method} fits its critic alone, which would move the policy: use copy"


def _lag_conflicts(o: Any) -> Any:
    """Conflicts of rollouts of an older policy, which are sampled in a thread."""
    if o.profile:
        yield "profile", "profile follows one thread, and lag samples in another: leave one of the two out"
    if said := _uncorrected(o):
        yield "lag", f"lag {said}"
    if o.credit == "group" and o.sampling_rounds > 1:
        yield "lag", "lag counts rollouts, of which sampling_rounds may take several an update: set sampling_rounds 1"


def _sizes(o: Any) -> Any:
    """Conflicts of minibatches larger than a rollout of segments. The length of whole episodes is not known yet."""
    if o.credit in EPISODIC or o.world == "exact":
        return
    decisions = o.num_envs * o.num_steps
    size = getattr(o, "minibatch_size", None) or 0
    default = {f.name: f.default for f in fields(o)}
    for name, x in (("minibatch_size", size), ("critic_minibatch_size", getattr(o, "critic_minibatch_size", 0))):
        # The critic's default may exceed a small rollout: the fit then uses the whole rollout.
        if x > decisions and not (name.startswith("critic") and x == default[name]):
            yield (
                name,
                f"{name} is {x}, and a rollout has num_envs * num_steps = {decisions} decisions: "
                "lower the one or raise the other",
            )


def _applies(f: Field, method: Method, world: str) -> bool:
    """Whether the method can read the option on this world, for some values of the other options."""
    known = {"world": world, "objective": method.objective, "update": method.update}
    if method.objective == "clone":
        known["credit"] = DEMONSTRATED
    return all(known[name] in values for name, values in f.metadata["when"].items() if name in known)


def _why_not(name: str, options: Any, known: Mapping[str, Any]) -> str:
    """The end of a message about an option that does not apply here or does not exist."""
    for f in fields(Options):
        if f.name == name and options.method in KNOWN:
            when = f.metadata["when"]
            if "world" in when and options.world not in when["world"]:
                return f" on {options.world}: it is for {' and '.join(when['world'])}; leave it out"
            users = [m.name for m in KNOWN.values() if _applies(f, m, options.world)]
            return f": it is for {listed(users, 80)}; leave it out"
    return f": {nearest(name, sorted(known))}"


def _from_python(x: Any, kind: Any) -> Any:
    """A value in the option's own form: a list or one value as a tuple, a path as text, a dict as JSON or new=old."""
    if get_origin(kind) is tuple:
        x = [f"{new}={old}" for new, old in x.items()] if isinstance(x, Mapping) else x
        listed = x if isinstance(x, list | tuple) else (x,)
        return tuple(str(item) if isinstance(item, Path) else item for item in listed)
    if isinstance(x, Mapping):
        return _json_text(x)
    return str(x) if isinstance(x, Path) else x


def _json_text(x: Mapping[Any, Any]) -> Any:
    """The JSON text of a dict; the dict itself if JSON would not keep it as it is."""
    try:
        text = json.dumps(x)
        return text if json.loads(text) == x else x
    except (TypeError, ValueError):
        return x


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none, or if an object has two values of one name."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _plain(x: Any, kind: Any) -> Any:
    """Convert numpy's integers and floats to Python's, for JSON and torch."""
    if isinstance(x, tuple):
        return tuple(_plain(item, get_args(kind)[0]) for item in x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    fractional = kind is float or (isinstance(kind, UnionType) and float in get_args(kind))
    return float(x) if fractional or not isinstance(x, Integral) else int(x)


def _fits(x: Any, kind: Any) -> bool:
    """Whether x fits the option's type. An integer fits a float, and a bool fits neither."""
    if get_origin(kind) is Annotated:
        return _fits(x, get_args(kind)[0])
    if get_origin(kind) is Literal:
        return x in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(x, tuple) and all(_fits(item, get_args(kind)[0]) for item in x)
    if isinstance(kind, UnionType):
        return any(_fits(x, one) for one in get_args(kind))
    if kind in (int, float):
        return isinstance(x, Integral if kind is int else Real) and not isinstance(x, bool)
    return isinstance(x, kind)


def in_words(kind: Any) -> str:
    """The type of an option in words."""
    if get_origin(kind) is Annotated:
        return in_words(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list, each entry {in_words(get_args(kind)[0])}"
    if isinstance(kind, UnionType):
        return " or ".join(in_words(one) for one in get_args(kind) if one is not type(None))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}[kind]
