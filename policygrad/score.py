"""log pi: the score term, the ratios by token, sequence and product, and log pi of a rollout in micro-batches."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from policygrad.rollout import Batch, Rollout, Split, in_parts


def score(
    logp: Float[Tensor, "B T"], ratio: Float[Tensor, "B #T"], advantage: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """log pi(a|s) A: its gradient, grad log pi A, is the policy gradient (Williams 1992, theorem 1).

    Only its gradient has a meaning, not its value. It ignores the ratio, because the actions are the policy's own.
    """
    return logp * advantage.detach()


def log_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """log r = log pi(a|s) - log pi_old(a|s), at most 20, and 0 behind the mask.

    Without the bound, the ratio could be infinite and have a NaN gradient even if it is clipped.
    """
    return (logp - logp_old).where(mask, 0.0).clamp(max=20)


def token_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """r = pi(a|s) / pi_old(a|s), at most e^20, and 1 behind the mask (Schulman et al. 2017, section 3)."""
    return log_ratio(logp, logp_old, mask).exp()


def sequence_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 1"]:
    """s = (pi(y|x) / pi_old(y|x))^(1/|y|), at most e^20: one ratio for each row (GSPO, arXiv 2507.18071, eq. 7)."""
    total = (logp - logp_old).where(mask, 0.0).sum(1, keepdim=True)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).clamp(max=20).exp()


def sequence_token_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """sg(s) pi / sg(pi): the value of the sequence ratio s and the gradient s grad log pi of each token.

    GSPO-token (arXiv 2507.18071, section 4.3): s is what is clipped, and each token has an advantage of its own. With
    one advantage for the row, averaged by row, it is GSPO.
    """
    return sequence_ratio(logp, logp_old, mask).detach() * (logp - logp.detach()).where(mask, 0.0).exp()


def product_ratio(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 1"]:
    """W = pi(y|x) / pi_old(y|x), at most e^20: the ratio of whole rows, for which importance sampling is unbiased."""
    return (logp - logp_old).where(mask, 0.0).sum(1, keepdim=True).clamp(max=20).exp()


def bounded(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], bound: float
) -> Float[Tensor, "B T"]:
    """log pi, stopped where log(pi / pi_old) is further than `bound` in the direction that the advantage favors.

    It clips tokens before their ratios are averaged. The sequence ratio of it, unclipped, is geometric-mean policy
    optimization (GMPO, arXiv 2507.20673). bound = inf changes nothing.
    """
    up, down = (logp_old + bound).minimum(logp), (logp_old - bound).maximum(logp)
    return torch.where(advantage > 0, up, torch.where(advantage < 0, down, logp))


@torch.no_grad()
def log_probabilities(policy: nn.Module, rollout: Rollout | Batch, micro_batch: Split = None) -> Float[Tensor, "B T"]:
    """log pi(a|s) of the actions taken, `micro_batch` rows at a time; 0 behind the mask."""
    logp = in_parts(lambda obs, action: policy(obs).log_prob(action), micro_batch, rollout.obs, rollout.action)
    return logp.where(rollout.mask, 0.0)
