"""An iteration on a GPU: plain and compiled, decoding captured and step by step, and on the CPU beside it.

    python benchmarks/gpu.py [REPETITIONS] [NAME]   # NAME: a part of what is timed

Medians of iterations, in alternation; the GPU is synchronized by the metrics that are read after every iteration.
Control: PPO on CartPole-v1, 64 environments x 128 steps, 4 epochs of 4 minibatches. Language: GRPO with random weights
and a vocabulary of 32,000 on Llamas of about 37M parameters (4 prompts x 8 completions x 128 tokens) and of the shape
of SmolLM2-135M (8 x 8 x 256).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policygrad.language import generation
from policygrad.language.decoding import Growing
from policygrad.train.training import Training

CONTROL: dict[str, Any] = {
    "num_envs": 64, "num_steps": 128, "epochs": 4, "minibatch_size": 2048, "preset": "none", "steps": 10**9,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "completions": 8, "held_out": 0, "iterations": 10**6, "preset": "none",
    "kl_ref": "none",
}  # fmt: skip


# Name: (shape, prompts, tokens of a completion)
LLAMAS: dict[str, tuple[dict[str, int], int, int]] = {
    "37M": (
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}, 4, 128,
    ),
    "135M": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3}, 8, 256,
    ),
}  # fmt: skip


def write_llama(place: Path, shape: dict[str, int]) -> None:
    """Random weights, and a tokenizer of numbers."""
    config = LlamaConfig(vocab_size=32_000, bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    words = {"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 32_000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(place)


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward for which no completion must be right."""
    return [float(len(x) % 7) for x in completions]


def cases(place: Path) -> dict[str, Callable[[], Training]]:
    """What is timed."""
    found: dict[str, Any] = {}
    for device in ("cuda", "cpu"):
        for way in ("off", "on"):
            name = f"control, {device}, compile {way}"
            found[name] = partial(Training, "ppo", "CartPole-v1", device=device, compile=way, **CONTROL)
    rows = [{"prompt": " ".join(str(j) for j in range(2 + i, 34 + i))} for i in range(64)]
    for name, (shape, prompts, tokens) in LLAMAS.items():
        write_llama(place / name, shape)
        for autocast in ("none", "bfloat16"):
            for form in ("step by step", "captured"):
                found[f"language {name}, {autocast}, {form}"] = partial(
                    Training, "grpo", dataset=rows, model=str(place / name), reward=length, device="cuda",
                    prompts_per_rollout=prompts, max_tokens=tokens, autocast=autocast, **LANGUAGE,
                )  # fmt: skip
    return found


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    captured = generation.form
    with tempfile.TemporaryDirectory() as place:
        groups: dict[str, dict[str, Callable[[], Training]]] = {}
        for name, make in cases(Path(place)).items():
            if not all(part in name for part in sys.argv[2:]):
                continue
            groups.setdefault(name.split(",")[0], {})[name] = make
        for group in groups.values():
            trainings = {name: make() for name, make in group.items()}
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
            for i in range(2 + repetitions):
                for name, training in trainings.items():
                    generation.form = (lambda *_: Growing) if "step by step" in name else captured
                    start = time.perf_counter()
                    row = next(training)
                    if i >= 2:
                        rows[name].append({"all": time.perf_counter() - start, **row})
            for name, training in trainings.items():
                training.close()
                middle = 1e3 * statistics.median(row["all"] for row in rows[name])
                part = 1e3 * statistics.median(row.get("sampling_seconds", 0.0) for row in rows[name])
                print(f"{name:42} {middle:9.1f} ms an iteration, {part:9.1f} ms of it sampling", flush=True)


if __name__ == "__main__":
    main()
