"""Supervised warm-up: a small model learns the form of an answer from imperfect demonstrations. Kept for next time."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from policygrad.language import arithmetic, data, models
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.rollout import Batch
from policygrad.runs.reports import progress_bar
from policygrad.updates import ascend
from policygrad.weights import average, per_token

PROBLEMS = 8000
# With the demonstrations and the configuration it decides the warm model: where any changes, the old one is not found.
RECIPE = {"steps": 600, "rows": 128, "learning_rate": 2e-3}


def warmed_up(announce: Callable[[str], None], progress: bool, *, device: str = "cpu") -> LlamaForCausalLM:
    """The arithmetic task's own model after its demonstrations: from the cache, or trained now and put there."""
    place = cache_directory() / f"arithmetic-{_key()}"
    if not (place / "model.safetensors").is_file():
        announce("the arithmetic model learns from imperfect demonstrations first (kept for next time)")
        trained = _train(progress, device)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent))
        models.save_model(trained, arithmetic.tokenizer(), beside)
        try:
            os.replace(beside, place)
        except OSError:  # another run was faster
            shutil.rmtree(beside)
    return models.load_model(str(place))  # type: ignore[return-value]


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/policygrad, or ~/.cache/policygrad."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policygrad"


def _key() -> str:
    examples, demonstrations = _demonstrations()
    learned = [x["prompt"] + y for x, y in zip(examples, demonstrations, strict=True)]
    decides = [*learned, arithmetic.configuration().to_json_string(), json.dumps(RECIPE), torch.__version__]
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:12]


def _demonstrations() -> tuple[list[dict], list[str]]:
    examples, _ = arithmetic.splits(PROBLEMS, 128, seed=0)
    return examples, arithmetic.demonstrations(examples, seed=0)


def _train(progress: bool, device: str) -> nn.Module:
    examples, completions = _demonstrations()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = LanguagePolicy(arithmetic.model())
        policy.to(device)
        batch = demonstrations_batch(examples, completions, arithmetic.tokenizer(), device)
        steps, rows = int(RECIPE["steps"]), int(RECIPE["rows"])
        fit_demonstrations(policy, batch, steps, rows, RECIPE["learning_rate"], progress=progress)
    return policy.model


def demonstrations_batch(
    examples: list[dict], completions: list[str], tokenizer: PreTrainedTokenizerBase, device: str = "cpu"
) -> Batch:
    """Prompts and completions as decisions of equal credit: their log-probability is to grow."""
    pad, end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    prompt, prompt_mask = data.left_padded(data.encode_prompts(examples, tokenizer, max_length=None), pad)
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
    progress: bool = False,
) -> list[float]:
    """Maximise the mean log-probability of the demonstrations' tokens: AdamW, one cycle of the learning rate.

    Returns the objective, the mean log-probability by token, of every step.
    """
    optimizer = AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, learning_rate, steps)

    def objective(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = average(policy(part.obs).log_prob(part.action), part.weight)
        return value, {"objective": value.detach()}

    history = []
    with progress_bar("learning from demonstrations", steps, progress) as advance:
        for _ in range(steps):
            index = torch.randint(len(batch.mask), (rows,), device=batch.mask.device)
            obs = Prefixes(*(x[index] for x in batch.obs))
            part = batch._replace(obs=obs, action=batch.action[index], mask=batch.mask[index])
            part = part._replace(weight=per_token(part.mask))
            history.append(float(ascend(objective, part, optimizer, max_grad_norm=1.0)["objective"]))
            schedule.step()
            advance(f"log-probability {history[-1]:.3f}")
    return history
