"""Evaluating a policy: its completions of given prompts, their reward, and pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError
from policygrad.language.generation import Engine, check_memory, generate
from policygrad.language.policies import LanguagePolicy
from policygrad.language.sampler import Judge, Prompts, answer, request_of

ROWS = 512  # completions sampled together


@dataclass
class Evaluation:
    """The reward of a policy's completions, with the completions themselves."""

    reward: float
    reward_std: float
    accuracy: float | None  # the mean reward, if every reward is 0 or 1
    pass_at_k: dict[int, float]  # the probability that one of k samples is right; also only then
    parts: dict[str, float]
    length: float
    cut_fraction: float
    prompts: int
    completions: int
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything except the completions."""
        return {name: x for name, x in vars(self).items() if name != "rows"}

    @property
    def score(self) -> float:
        """The one number that sums it up."""
        return self.reward

    def line(self) -> str:
        """The result in one line."""
        score = f"reward {self.reward:.3f} +- {self.reward_std:.3f}"
        if self.accuracy is not None:
            passes = ", ".join(f"pass@{k} {x:.3f}" for k, x in self.pass_at_k.items() if k > 1)
            score = f"accuracy {self.accuracy:.3f}" + (f", {passes}" if passes else "")
        return f"{score}, length {self.length:.1f}, {self.cut_fraction:.1%} cut, {self.prompts} prompts"


def evaluate_policy(
    policy: LanguagePolicy,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    *,
    completions: int,
    max_tokens: int,
    seed: int = 1000,
    greedy: bool = False,
    stop_texts: Sequence[str] = (),
    micro_batch: int | None = None,
    engine: Engine = generate,
) -> Evaluation:
    """Answer each prompt `completions` times, by samples at the policy's temperature or greedily.

    stop_texts: a completion ends with any of them. micro_batch: completions sampled at a time, at most ROWS.
    """
    if completions < 1:
        raise UserError(f"completions is {completions}: it must be at least 1")
    rows = min(micro_batch or ROWS, ROWS)
    request = request_of(
        policy.model, tokenizer, completions, max_tokens, greedy=greedy, stop_texts=stop_texts, micro_batch=rows
    )
    check_memory(policy, len(prompts), int(prompts.lengths.max()), request)
    device = next(policy.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    together = max(1, ROWS // completions)
    answers = [
        answer(policy, prompts.take(index), request, tokenizer, judge, generator, engine)
        for index in torch.arange(len(prompts)).split(together)
    ]
    reward = torch.cat([x.reward for x in answers]).double()
    parts = {name: torch.cat([x.parts[name] for x in answers]).double().nanmean().item() for name in answers[0].parts}
    binary = bool(((reward == 0) | (reward == 1)).all())
    right = reward.view(-1, completions).sum(1).round().long()
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= completions]
    return Evaluation(
        reward=reward.mean().item(),
        reward_std=reward.std(correction=0).item(),
        accuracy=reward.mean().item() if binary else None,
        pass_at_k={k: pass_at_k(right, completions, k) for k in ks} if binary else {},
        parts=parts,
        length=torch.cat([x.completions.mask.sum(1) for x in answers]).double().mean().item(),
        cut_fraction=torch.cat([x.completions.cut for x in answers]).double().mean().item(),
        prompts=len(prompts),
        completions=completions,
        rows=[row for x in answers for row in x.rows()],
    )


def pass_at_k(correct: Int[Tensor, " N"], samples: int, k: int) -> float:
    """pass@k = E[1 - C(n - c, k) / C(n, k)]: the probability that one of k samples is right, without bias.

    correct: [N], the number c of right samples of each problem, out of n = `samples`. Chen et al. 2021,
    arXiv 2107.03374, eq. 1; in whole numbers, so that nothing cancels or overflows.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} cannot be estimated from {samples} samples a problem: give a k from 1 to {samples}")
    counts = correct.tolist()
    if not counts:
        raise UserError("pass@k is a mean over problems, and there are none: evaluate at least one")
    wrong = [c for c in counts if not 0 <= c <= samples]
    if wrong:
        raise UserError(f"{wrong[0]} of {samples} samples of a problem cannot be right: count the right ones")
    subsets = math.comb(samples, k)
    return math.fsum((subsets - math.comb(samples - c, k)) / subsets for c in counts) / len(counts)
