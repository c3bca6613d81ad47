"""Supervised warm-up: a small model learns the form of an answer from imperfect demonstrations. Cached on disk."""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from policygrad.language import arithmetic, data, lookup, models
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.language.tasks import ARITHMETIC, LOOKUP
from policygrad.rollout import Batch
from policygrad.weights import average, per_token

Progress = Callable[[int, int, str], None]  # (done, total, status)

OWN: dict[str, Any] = {ARITHMETIC: arithmetic, LOOKUP: lookup}  # the tasks with a model of their own
# The warm model follows from it, the demonstrations and the configuration. If one of them changes, so does the cache.
RECIPE = {"steps": 600, "rows": 128, "learning_rate": 2e-3}


def warmed_up(
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
    *,
    task: str = ARITHMETIC,
    heads: int = models.HEADS,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A task's own model after its demonstrations, from the cache. If it is not there, train it first.

    task: arithmetic or lookup. heads: of its attention.
    """
    place = cache_directory() / f"{task}-{_key(task, heads)}"
    if not (place / "model.safetensors").is_file():
        announce(f"the {task} model learns from imperfect demonstrations first (kept for next time)")
        trained = _train(task, heads, progress, device)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent))
        models.save_model(trained, OWN[task].tokenizer(), beside)
        try:
            os.replace(beside, place)
        except OSError:  # another run was faster
            shutil.rmtree(beside)
    return models.load_model(str(place))  # type: ignore[return-value]


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/policygrad, or ~/.cache/policygrad."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policygrad"


def demonstrations_batch(
    examples: list[dict[str, Any]],
    completions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
) -> Batch:
    """Prompts and completions as decisions, to raise their log-probability."""
    pad, end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    prompt, prompt_mask = data.left_padded(data.encode_prompts(examples, tokenizer), pad)
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, end] for text in completions]
    width = max(map(len, rows))
    action = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    obs = Prefixes(*(x.to(device) for x in (prompt, prompt_mask, action, mask)))
    zero = torch.zeros(mask.shape, device=device)
    return Batch(obs, obs.completion, zero, obs.completion_mask, zero, zero, zero, zero)


def fit_demonstrations(
    policy: LanguagePolicy,
    batch: Batch,
    steps: int,
    rows: int,
    learning_rate: float,
    *,
    progress: Progress | None = None,
) -> list[float]:
    """Maximize the mean log-probability of the demonstrations' tokens by AdamW, with one cycle of the learning rate.

    Returns the objective, the mean log-probability of a token, of every step.
    """
    optimizer = AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, learning_rate, steps)
    history = []
    for step in range(steps):
        index = torch.randint(len(batch.mask), (rows,), device=batch.mask.device)
        obs = Prefixes(*(x[index] for x in batch.obs))
        objective = average(policy(obs).log_prob(batch.action[index]), per_token(batch.mask[index]))
        optimizer.zero_grad()
        (-objective).backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(objective.item())
        if progress is not None:
            progress(step + 1, steps, f"log-probability {history[-1]:.3f}")
    return history


def _key(task: str, heads: int) -> str:
    examples, demonstrations = _demonstrations() if task == ARITHMETIC else ([], [])
    learned = [x["prompt"] + y for x, y in zip(examples, demonstrations, strict=True)]
    learned = learned or [inspect.getsource(OWN[task])]  # it makes its demonstrations
    decides = [*learned, OWN[task].configuration(heads=heads).to_json_string(), json.dumps(RECIPE), torch.__version__]
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:12]


def _demonstrations() -> tuple[list[dict[str, Any]], list[str]]:
    examples, _ = arithmetic.splits(arithmetic.TRAINED_ON, 128, seed=0)
    return examples, arithmetic.demonstrations(examples, seed=0)


def _train(task: str, heads: int, progress: Progress | None, device: torch.device | str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = LanguagePolicy(OWN[task].model(heads=heads))
        policy.to(device)
        if task == ARITHMETIC:
            batch = demonstrations_batch(*_demonstrations(), arithmetic.tokenizer(), device)
        else:
            batch = lookup.demonstrations(policy)
        steps, rows = int(RECIPE["steps"]), int(RECIPE["rows"])
        fit_demonstrations(policy, batch, steps, rows, RECIPE["learning_rate"], progress=progress)
    return policy.model
