"""A check before training: the tokens of a completion are scored as they were sampled."""

import torch

from policygrad.errors import UserError
from policygrad.language.generation import Request, generate
from policygrad.language.policies import LanguagePolicy, Prefixes, causal
from policygrad.language.sampler import Prompts

TOKENS = 8  # of each completion
# The largest mean difference of log-probabilities that rounding explains; half precision rounds at every layer.
FLOAT32, HALF = 0.001, 0.2


@torch.no_grad()
def check_scored_as_sampled(policy: LanguagePolicy, prompts: Prompts, max_tokens: int) -> None:
    """Raise UserError if log pi of a few sampled tokens is another when the policy scores them.

    Two prompts of different lengths are answered twice each, as in training: with padding, a cache and rows side by
    side. Then each row is scored by itself. A model that keeps its state in its modules samples from another row's, one
    that ignores the mask from its padding, and every ratio would be wrong.
    """
    shortest = prompts.lengths.argsort()
    some = prompts.take(shortest[[0, len(shortest) // 2]])
    device = next(policy.parameters()).device
    prompt, mask = (x.to(device) for x in some.padded())
    request = Request(2, min(TOKENS, max_tokens), (), 0)  # no token ends them
    sampled = generate(policy, prompt, mask, request, torch.Generator(device=device).manual_seed(0))
    rows = torch.arange(2, device=device).repeat_interleave(2)
    obs = Prefixes(prompt[rows], mask[rows], sampled.tokens, sampled.mask)
    each = [Prefixes(*(x[i : i + 1] for x in obs)) for i in range(len(rows))]
    scored = torch.cat([policy(row).log_prob(row.completion) for row in each])
    difference = float((scored - sampled.logp).abs()[sampled.mask].mean())
    half = policy.autocast is not None or next(policy.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not difference <= (HALF if half else FLOAT32) / min(1.0, policy.temperature):
        raise UserError(
            f"{type(causal(policy.model)).__name__} gives other log-probabilities to its own samples, by "
            f"{difference:.3g} on average: a padded batch or its cache changes what it computes; give another model"
        )
