"""TRL's side of benchmarks/language.py: the training run of a job on the command line, by a Python that has TRL.

The settings are the job's. A setting that the job leaves out is written here if TRL's default differs from ours.
"""

import hashlib
import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from policygrad.language import arithmetic  # the task; it needs no more than transformers

METHODS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "scale_rewards": "group"}),  # as published
    "rloo": (RLOOTrainer, RLOOConfig, {"normalize_advantages": False}),
}


class Recorder(TrainerCallback):
    """Rewards and seconds of every step. A step is all that happens between two updates, TRL's logging left out."""

    def __init__(self) -> None:
        self.start = self.before_mb = 0.0
        self.rewards: list[float] = []
        self.lengths: list[float] = []
        self.seconds: list[float] = []
        self.prompts: list[str] = []  # of the last step

    def on_train_begin(self, *_, **__) -> None:
        self.before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def on_step_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args, state, control, logs, **_) -> None:
        if "reward" not in logs:  # the summary at the end
            return
        self.rewards.append(logs["reward"])
        self.lengths.append(logs["completions/mean_length"])
        if len(self.rewards) % 20 == 0:
            print(f"  step {len(self.rewards):4}: reward {logs['reward']:.2f}", file=sys.stderr, flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    trainer_of, config_of, options = METHODS[job["method"]]
    rows = job["prompts"] * job["completions"]
    config = config_of(
        output_dir=job["out"],
        seed=job["seed"],
        max_steps=job["steps"],
        # What one step is: all completions generated at once, then one update on all of them.
        num_generations=job["completions"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        # Sampling
        max_completion_length=job["max_tokens"],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # The objective
        epsilon=job["clip"],
        beta=0.0,
        # The update
        optim="adamw_torch_fused",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=job["adam_betas"][0],
        adam_beta2=job["adam_betas"][1],
        adam_epsilon=job["adam_epsilon"],
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        # The machine: float32 on the CPU, and nothing that costs time for memory
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        # The least that it can be asked to log, and nothing saved on the way
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    train, _ = arithmetic.splits(*job["problems"], seed=0)
    recorder = Recorder()

    def right(prompts: list[str], completions: list[str], answer: list[str], **_) -> list[float]:
        recorder.prompts = sorted(set(prompts))
        return arithmetic.right(prompts, completions, answer)

    trainer = trainer_of(
        model=AutoModelForCausalLM.from_pretrained(job["start"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job["start"]),
        reward_funcs=right,
        args=config,
        train_dataset=Dataset.from_list(train),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.model.save_pretrained(job["out"])
    result = {
        "reward": recorder.rewards,
        "length": recorder.lengths,
        "seconds": recorder.seconds,
        "before_mb": recorder.before_mb,
        "peak_mb": peak_mb,
        "prompts": hashlib.sha256(" ".join(recorder.prompts).encode()).hexdigest()[:12],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl")},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
