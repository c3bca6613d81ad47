"""One iteration on a GPU beside one on the CPU of the same machine.

    python benchmarks/gpu.py [REPETITIONS]

Medians of iterations, in alternation; the GPU is synchronized by the metrics that are read after every iteration.
Control: PPO on CartPole-v1, 64 environments x 128 steps, 4 epochs of 4 minibatches. Language: GRPO on a Llama of about
37M parameters with a vocabulary of 32,000, 4 prompts x 8 completions x 128 tokens.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policygrad.train.training import Training

CONTROL: dict[str, Any] = {
    "num_envs": 64, "num_steps": 128, "epochs": 4, "minibatch_size": 2048, "preset": "none", "steps": 10**9,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "prompts_per_rollout": 4, "completions": 8, "max_tokens": 128, "held_out": 0, "iterations": 10**6, "preset": "none",
    "kl_ref": "none",
}  # fmt: skip


def write_llama(place: Path) -> None:
    """About 37M parameters with random weights, and a tokenizer of numbers."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    words = {"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 32_000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(place)


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward for which no completion must be right."""
    return [float(len(x) % 7) for x in completions]


def cases(place: Path) -> dict[str, Training]:
    """What is timed."""
    found: dict[str, Any] = {}
    for device in ("cuda", "cpu"):
        for way in ("off", "on"):
            name = f"control, {device}, compile {way}"
            found[name] = lambda d=device, w=way: Training("ppo", "CartPole-v1", device=d, compile=w, **CONTROL)
    rows = [{"prompt": " ".join(str(j) for j in range(2 + i, 34 + i))} for i in range(64)]
    for name, values in {"float32": {}, "bfloat16": {"dtype": "bfloat16"}}.items():
        found[f"language, cuda, {name}"] = lambda v=values: Training(
            "grpo", dataset=rows, model=str(place), reward=length, device="cuda", **LANGUAGE, **v
        )
    return {name: make() for name, make in found.items()}


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as place:
        write_llama(Path(place))
        trainings = cases(Path(place))
        times: dict[str, list[float]] = {name: [] for name in trainings}
        for training in trainings.values():
            for _ in range(3):
                next(training)
        for _ in range(repetitions):
            for name, training in trainings.items():
                start = time.perf_counter()
                next(training)
                times[name].append(time.perf_counter() - start)
        for name, training in trainings.items():
            training.close()
            print(f"{name:28} {1e3 * statistics.median(times[name]):9.1f} ms an iteration")


if __name__ == "__main__":
    main()
