"""GRPO beside TRL, in alternation: the same models, prompts, completions, reward and steps.

    python -m venv PEERS && PEERS/bin/pip install trl peft torch==2.13.0 datasets
    python benchmarks/speed_language.py --peers PEERS/bin/python [--only NAME] [--repetitions 3] [--smollm2 DIRECTORY]

Each measurement is a process of its own with one thread: the first step is warm-up, the next are timed. Processor and
wall seconds a step, and the peak of resident memory (Linux); medians of the repetitions. A ratio is that of processor
seconds, which other work beside changes less. Weights are random, so that nearly every completion has all its tokens;
there is no KL to a reference. The row of SmolLM2 needs what benchmarks/smollm2.py made.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from speed import measured

# Name: (shape of the Llama, prompts, completions, tokens of both, LoRA rank, steps to time, the ratio asked for).
SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
LARGE = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
WORK: dict[str, tuple[dict[str, Any] | None, int, int, int, int, int, int, float]] = {
    "Llama of 1M, 8 x 8 x 32": ({**SMALL, "num_attention_heads": 4}, 8, 8, 24, 32, 0, 10, 2.5),
    "Llama of 37M, 4 x 8 x 128": ({**LARGE, "num_attention_heads": 8}, 4, 8, 64, 128, 0, 2, 4.0),
    "SmolLM2-135M with LoRA, 4 x 4 x 32": (None, 4, 4, 0, 32, 16, 3, 3.0),
}
RATE = 1e-6


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Any number that differs between completions."""
    return [sum(map(ord, str(text))) % 7 / 7 for text in completions]


def make(shape: dict[str, Any], directory: Path, longest: int = 512) -> None:
    """A random Llama of the shape for so many tokens, with a tokenizer of one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    how: dict[str, Any] = {"tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**shape, max_position_embeddings=longest, **how)
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, shape["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def prompts(name: str) -> list[str]:
    shape, count, _, length, *_ = WORK[name]
    if shape is None:
        return [f"What is {17 + i} + {28 + 3 * i}? Reply with the number only." for i in range(64)]
    return [" ".join(f"w{2 + (i * 31 + j * 7) % 500}" for j in range(length)) for i in range(max(64, count))]


def ours(name: str, model: str) -> dict[str, float]:
    """Seconds a step of this library, and the peak of its memory."""
    from policygrad.train.training import Training

    _, count, completions, _, tokens, rank, steps, _ = WORK[name]
    options: dict[str, Any] = {"lora_rank": rank} if rank else {}
    with Training(
        "grpo", None, dataset=[{"prompt": x} for x in prompts(name)], model=model, reward=reward, held_out=0,
        prompts_per_rollout=count, completions=completions, max_tokens=tokens, kl_ref="none", learning_rate=RATE,
        iterations=10**6, threads=1, **options,
    ) as training:  # fmt: skip
        next(training)
        times = [now()]
        for _ in range(steps):
            next(training)
            times.append(now())
    return of_a_step(times)


def theirs(name: str, model: str) -> dict[str, float]:
    """The same of TRL."""
    import datasets
    import transformers
    import trl

    _, count, completions, _, tokens, rank, steps, _ = WORK[name]
    times: list[tuple[float, float]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now())

    with tempfile.TemporaryDirectory() as place:
        arguments = trl.GRPOConfig(
            output_dir=place, per_device_train_batch_size=count * completions, num_generations=completions,
            max_completion_length=tokens, beta=0.0, learning_rate=RATE, max_steps=1 + steps, use_cpu=True, bf16=False,
            report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        adapter = None
        if rank:
            import peft

            adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, peft_config=adapter, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_list([{"prompt": x} for x in prompts(name)]),
        )  # fmt: skip
        trainer.train()
    return of_a_step(times)


def now() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def of_a_step(times: list[tuple[float, float]]) -> dict[str, float]:
    """The medians of a step's wall and processor seconds, and the peak of resident memory in GiB."""
    wall, processor = (statistics.median(b - a for a, b in pairwise(column)) for column in zip(*times, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"wall": wall, "processor": processor, "peak": peak}


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        import torch

        torch.set_num_threads(1)
        who, name, model = sys.argv[2:5]
        print(json.dumps((theirs if who == "theirs" else ours)(name, model)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True)
    parser.add_argument("--only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--smollm2", help="what benchmarks/smollm2.py made")
    options = parser.parse_args()
    print("| work | processor seconds a step | TRL | ratio | asked for | wall seconds | TRL | peak GiB | TRL |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (shape, *_, wanted) in WORK.items():
        if (options.only and options.only not in name) or (shape is None and not options.smollm2):
            continue
        with tempfile.TemporaryDirectory() as place:
            model = options.smollm2
            if shape is not None:
                model = place
                make(shape, Path(place))
            ways = {"ours": sys.executable, "theirs": options.peers}
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(options.repetitions):
                for way, python in ways.items():
                    found[way].append(measured(__file__, python, way, name, model))
        middle = {way: {key: statistics.median(x[key] for x in xs) for key in xs[0]} for way, xs in found.items()}
        mine, other = middle["ours"], middle["theirs"]
        columns = [f"{x['processor']:.2f}" for x in (mine, other)]
        columns += [f"{other['processor'] / mine['processor']:.2f}", f"{wanted}"]
        columns += [f"{x[key]:.2f}" for key in ("wall", "peak") for x in (mine, other)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
