"""Checks before training: tokens are scored as they were sampled, and alike where a prompt is computed once."""

import torch

from policygrad.errors import UserError
from policygrad.language.completions import Request
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy, Prefixes, can_share, causal
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


def shares_prompts(policy: LanguagePolicy, prompts: Prompts) -> bool:
    """Whether log pi and its gradient are the same if a prompt is computed once for its completions, to rounding.

    The gradient is that of the first two parameters to train, which lie below all keys and values.
    """
    if not can_share(policy):
        return False
    shortest = prompts.lengths.argsort()
    some = prompts.take(shortest[[0, len(shortest) // 2]])
    first = [p for p in policy.parameters() if p.requires_grad][:2]
    device, generator = first[0].device, torch.Generator().manual_seed(0)
    prompt, mask = (x.to(device).repeat_interleave(2, 0) for x in some.padded())
    words = len(causal(policy.model).get_input_embeddings().weight)  # type: ignore[arg-type]
    tokens = torch.randint(words, (len(prompt), TOKENS), generator=generator).to(device)
    obs = Prefixes(prompt, mask, tokens, torch.ones_like(tokens, dtype=torch.bool))
    found, was = [], policy.shared
    for policy.shared in (False, True):
        logp = policy(obs).log_prob(tokens)
        gradient = torch.autograd.grad(logp.sum(), first, materialize_grads=True)
        found.append([logp.detach(), *gradient])
    policy.shared = was
    half = policy.autocast is not None or next(policy.parameters()).dtype in (torch.float16, torch.bfloat16)
    limit = HALF if half else FLOAT32
    return all(float((a - b).norm()) <= limit * float(a.norm()) for a, b in zip(*found, strict=True))
