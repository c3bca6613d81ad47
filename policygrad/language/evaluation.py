"""Evaluating a policy: its completions of given prompts, their reward, and pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError
from policygrad.language.completions import Engine
from policygrad.language.generation import check_memory, generate
from policygrad.language.policies import LanguagePolicy
from policygrad.language.sampler import Answering, Judge, Prompts, answer, check_judged, request_of

ROWS = 512  # completions sampled together


@dataclass
class Evaluation:
    """The reward of a policy's completions, with the completions themselves."""

    reward: float
    reward_std: float
    accuracy: float | None  # the mean reward, if every reward is 0 or 1
    pass_at_k: dict[int, float]  # the probability that one of k samples is right; also only then
    parts: dict[str, float]  # the mean of each reward function, which is its accuracy if its values are 0 or 1
    part_pass_at_k: dict[str, dict[int, float]]  # of each reward function whose values are all 0 or 1
    unjudged: float  # the share of completions to which no reward applies; they are in none of the numbers above
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
            score = _accuracy(self.accuracy, self.pass_at_k)
        if len(self.parts) > 1:
            judged = [f"{name} {_accuracy(self.parts[name], passes)}" for name, passes in self.part_pass_at_k.items()]
            score = ", ".join([score, *judged])
        unjudged = f", {self.unjudged:.1%} without a reward" if self.unjudged else ""
        return f"{score}, length {self.length:.1f}, {self.cut_fraction:.1%} cut{unjudged}, {self.prompts} prompts"


def evaluate_policy(
    policy: LanguagePolicy,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    *,
    completions: int,
    max_tokens: int,
    seed: int = 1000,
    greedy: bool = False,
    stop_texts: Sequence[str] = (),
    micro_batch: int | None = None,
    answers: Answering = answer,
    engine: Engine = generate,
) -> Evaluation:
    """Answer each prompt `completions` times, by samples at the policy's temperature or greedily.

    stop_texts: a completion ends with any of them. micro_batch: completions sampled at a time, at most ROWS.
    answers: see CompletionSampler.
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
    answered = [
        answers(policy, prompts.take(index), request, tokenizer, judge, generator, engine)
        for index in torch.arange(len(prompts)).split(together)
    ]
    check_judged(answered)
    reward = torch.cat([x.reward for x in answered]).double()
    parts = {name: torch.cat([x.parts[name] for x in answered]).double() for name in answered[0].parts}
    passes, judged = passes_at_k(reward, completions), reward[~reward.isnan()]
    of_parts = {name: passes_at_k(part, completions) for name, part in parts.items()}
    return Evaluation(
        reward=judged.mean().item(),
        reward_std=judged.std(correction=0).item(),
        accuracy=None if passes is None else judged.mean().item(),
        pass_at_k=passes or {},
        parts={name: part.nanmean().item() for name, part in parts.items() if not part.isnan().all()},
        part_pass_at_k={name: x for name, x in of_parts.items() if x is not None},
        unjudged=1 - len(judged) / len(reward),
        length=torch.cat([x.completions.mask.sum(1) for x in answered]).double().mean().item(),
        cut_fraction=torch.cat([x.completions.cut for x in answered]).double().mean().item(),
        prompts=len(prompts),
        completions=completions,
        rows=[row for x in answered for row in x.rows()],
    )


def passes_at_k(values: Float[Tensor, " B"], completions: int) -> dict[int, float] | None:
    """pass@k for k = 1, 2, 4, ..., 64, of rewards that are 0 or 1, or NaN where none applies; None for other rewards.

    A prompt counts for the k up to the number of its completions that have a reward.
    """
    by_prompt = [x[~x.isnan()] for x in values.split(completions)]
    given = torch.cat(by_prompt)
    if not len(given) or not bool(((given == 0) | (given == 1)).all()):
        return None
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if any(len(x) >= k for x in by_prompt)]
    return {
        k: math.fsum(pass_at_k(x.sum(0, keepdim=True).long(), len(x), k) for x in by_prompt if len(x) >= k)
        / sum(len(x) >= k for x in by_prompt)
        for k in ks
    }


def _accuracy(accuracy: float, passes: dict[int, float]) -> str:
    return ", ".join([f"accuracy {accuracy:.3f}", *(f"pass@{k} {x:.3f}" for k, x in passes.items() if k > 1)])


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
