"""TRL's side of benchmarks/language.py: the training run of a job on the command line, by a Python that has TRL.

The settings are the job's. A setting that the job leaves out is written here if TRL's default differs from ours.
"""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.chat_template_utils import qwen3_template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from policygrad.language import arithmetic, lookup  # the tasks; they need no more than transformers

GRPO = {"loss_type": "grpo", "scale_rewards": "group"}  # as published
CASES: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "rloo": {"normalize_advantages": False},
    "gspo": {**GRPO, "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "scale_rewards": "group"},
    "tools": GRPO,
}
# TRL asks for a template that writes tool calls, too. What it writes of a conversation without them is the same.
CALLS = (
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
)
TEMPLATE = lookup.TEMPLATE.replace(" + '<|im_end|>\n' }}", " }}" + CALLS)


class Chain:
    """The environment of lookup as TRL takes it: `reset`, and public methods that are tools."""

    def __init__(self) -> None:
        self._game = lookup.Lookup()

    def reset(self, seed: int, **_) -> None:
        self._game.reset(seed)

    def lookup(self, key: str) -> str:
        """Look up what stands at a key: another key, or the number.

        Args:
            key: The key.
        """
        return self._game.lookup(key)

    def _right(self, conversation: list[dict[str, Any]]) -> float:
        last = conversation[-1]
        asks = last["role"] != "assistant" or last.get("tool_calls")
        return 0.0 if asks else float(last["content"] == self._game.number)


class Capturing(GRPOTrainer):
    """Saves the batch of one update, with the weights before it and the gradient of the loss."""

    capture: tuple[int, Path]  # after how many updates, and where

    def _generate_and_score_completions(self, inputs):
        scored = super()._generate_and_score_completions(inputs)
        self.advantages = scored["advantages"]  # in the order of the rewards; the batch is shuffled afterwards
        return scored

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.state.global_step == self.capture[0]:
            named = dict(self.model.named_parameters())
            gradient = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            saved = {
                "batch": {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)},
                "weights": {name: x.detach() for name, x in named.items()},
                "gradient": dict(zip(named, gradient, strict=True)),
                "advantages": self.advantages,
                "rewards": torch.tensor(self.recorder.newest),
            }
            torch.save(saved, self.capture[1])
        return loss


class Recorder(TrainerCallback):
    """Rewards and seconds of every step. A step is all that happens between two updates, TRL's logging left out."""

    def __init__(self) -> None:
        self.start = self.before_mb = 0.0
        self.rewards: list[float] = []
        self.lengths: list[float] = []
        self.seconds: list[float] = []
        self.prompts: list[str] = []  # of the last step
        self.newest: list[float] = []  # the rewards of the last step

    def on_train_begin(self, *_, **__) -> None:
        self.before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def on_step_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args, state, control, logs, **_) -> None:
        if "reward" not in logs:  # the summary at the end, and updates that sample nothing
            return
        self.rewards.append(logs["reward"])
        self.lengths.append(logs["completions/mean_length"])
        if len(self.rewards) % 10 == 0:
            print(f"  step {len(self.rewards):4}: reward {logs['reward']:.2f}", file=sys.stderr, flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer_of, config_of = (RLOOTrainer, RLOOConfig) if job["method"] == "rloo" else (Capturing, GRPOConfig)
    options = dict(CASES[job["case"]])
    if "turns" in job:
        options["max_tool_calling_iterations"] = job["turns"] - 1
    if job["clip_low"] is not None:
        options["epsilon"] = job["clip_low"]
    # Of CISPO it is the bound of the weight itself.
    options["epsilon_high"] = job["clip_high"] + (job["case"] == "cispo")
    rows = job["prompts"] * job["completions"]
    config = config_of(
        output_dir=job["out"],
        seed=job["seed"],
        max_steps=job["steps"] * job["epochs"],
        # What one step is: all completions generated at once, then updates on all of them.
        num_generations=job["completions"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=job["epochs"],
        # Sampling
        max_completion_length=job["max_tokens"],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # The objective
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
    tokenizer = AutoTokenizer.from_pretrained(job["start"])
    recorder = Recorder()
    if job["task"] == "arithmetic":
        train, _ = arithmetic.splits(*job["problems"], seed=0)
    else:
        train = [{"prompt": lookup.Lookup().reset(seed), "seed": seed} for seed in range(job["problems"][0])]
        tokenizer.chat_template, tokenizer.response_template = TEMPLATE, qwen3_template

    def right(prompts, completions, **columns) -> list[float]:
        if job["task"] == "arithmetic":
            recorder.prompts = sorted(set(prompts))
            recorder.newest = arithmetic.right(prompts, completions, columns["answer"])
        else:
            recorder.prompts = sorted({x[-1]["content"] for x in prompts})
            pairs = zip(columns["environments"], completions, strict=True)
            recorder.newest = [environment._right(said) for environment, said in pairs]
        return recorder.newest

    trainer = trainer_of(
        model=AutoModelForCausalLM.from_pretrained(job["start"], dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=right,
        args=config,
        train_dataset=Dataset.from_list(train),
        callbacks=[recorder],
        **({"environment_factory": Chain} if job["task"] == "lookup" else {}),
    )
    trainer.recorder = recorder
    trainer.capture = (2 * job["epochs"] - 1, Path(job["out"]) / "captured.pt")  # the last update of the second step
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.model.save_pretrained(job["out"])
    result = {
        "reward": recorder.rewards,
        "length": recorder.lengths,
        "seconds": torch.tensor(recorder.seconds).unflatten(0, (job["steps"], job["epochs"])).sum(1).tolist(),
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
