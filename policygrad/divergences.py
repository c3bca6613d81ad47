"""KL(p, q): the exact value, the estimates k1, k2 and k3 from samples of p, and an adaptive coefficient."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import kl_divergence

from policygrad.rollout import Batch


def kl(p: Any, q: Any) -> Float[Tensor, "B T"]:
    """KL(p, q) = E_p[log p - log q] of two distributions of the same kind, in closed form.

    Raises NotImplementedError if torch.distributions knows no closed form for the pair.
    """
    return kl_divergence(p, q)


def k1(logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log p - log q: unbiased for KL(p, q) under samples of p; may be negative (Schulman 2020, Approximating KL)."""
    return logp - logp_ref


def k2(logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(log p - log q)^2 / 2: biased, never negative; its on-policy gradient is that of KL(p, q) (Schulman 2020)."""
    return (logp - logp_ref) ** 2 / 2


def k3(logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """q/p - 1 - log(q/p): unbiased for KL(p, q) under samples of p, never negative (Schulman 2020).

    Its gradient as a loss depends on which side is trained. If p is the fixed sampling policy and q is trained (PPO's
    KL(old, new)), its expected gradient is the gradient of KL(p, q). If p is trained, it is the gradient of KL(q, p).
    """
    log_ratio = logp_ref - logp
    return torch.expm1(log_ratio) - log_ratio


def straight_through(logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """sg(k3) + k2 - sg(k2): the value of k3 and the gradient of k2, which on-policy is the gradient of KL(p, q)."""
    square = k2(logp, logp_ref)
    return k3(logp, logp_ref).detach() + square - square.detach()


def squared_row(
    logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 1"]:
    """(log W)^2 / (2 |y|) at each of a row's |y| decisions, W = p(y|x) / q(y|x): k2 of whole rows, in equal shares.

    Summed over the row it is (log W)^2 / 2, the regularizer of online policy mirror descent (Kimi k1.5, arXiv
    2501.12599, section 2.3.2; DRO, arXiv 2405.19107).
    """
    total = (logp - logp_ref).where(mask, 0.0).sum(1, keepdim=True)
    return total**2 / 2 / mask.sum(1, keepdim=True).clamp(min=1)


def absolute(
    logp: Float[Tensor, "B T"], logp_old: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """|log(pi / pi_old)|: what the code of KL-Cov takes for KL(old, new) of a token (arXiv 2505.22617).

    Its gradient has the same size however near the two are. Where they differ by rounding alone it is 0: rounding would
    decide its sign.
    """
    difference = (logp - logp_old).where(mask, 0.0)
    rounding = 8 * torch.finfo(logp.dtype).eps * (1 + logp_old.abs())
    return difference.abs().where(difference.abs() > rounding, 0.0)


# How far a policy pi is from pi_old at each decision of a batch: (distribution of pi, batch, log pi(a|s)) -> [B, T].


def binary_total_variation(distribution: Any, batch: Batch, logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """|pi(a|s) - pi_old(a|s)|: the total variation of `a was drawn` (DPPO, arXiv 2602.04879).

    A lower bound of the total variation over all actions. For discrete actions, whose log pi is a probability's.
    """
    return (logp.exp() - batch.logp.exp()).abs()


def binary_kl(distribution: Any, batch: Batch, logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """KL(pi_old, pi) of `a was drawn`: q log(q/p) + (1 - q) log((1 - q)/(1 - p)), q = pi_old(a|s), p = pi(a|s).

    A lower bound of the KL over all actions (DPPO, arXiv 2602.04879).
    """
    tiny = torch.finfo(logp.dtype).tiny
    other, other_old = ((-torch.expm1(x)).clamp(min=tiny) for x in (logp, batch.logp))
    return batch.logp.exp() * (batch.logp - logp) + other_old * (other_old / other).log()


def total_variation(distribution: Any, batch: Batch, logp: Float[Tensor, "B T"], *, old: Any) -> Float[Tensor, "B T"]:
    """sum_a |pi(a|s) - pi_old(a|s)| / 2 over all actions, with `old` the policy that sampled (samplers.Following)."""
    with torch.no_grad():
        return (distribution.probs - old(batch.obs).probs).abs().sum(-1) / 2


def kl_from_old(distribution: Any, batch: Batch, logp: Float[Tensor, "B T"], *, old: Any) -> Float[Tensor, "B T"]:
    """KL(pi_old, pi) over all actions, with `old` the policy that sampled (samplers.Following)."""
    with torch.no_grad():
        return kl(old(batch.obs), distribution)


# KL(p, q) at each decision of a batch sampled by `p` or by an older policy:
# (p, q, batch, ratio [B, T] of p to the policy that sampled) -> [B, T].
Divergence = Callable[[Any, Any, Batch, Tensor], Tensor]


def at_action(
    p: Any, q: Any, batch: Batch, ratio: Float[Tensor, "B T"], *, estimate: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "B T"]:
    """k1, k2, k3 or straight_through at the actions taken. GRPO as published uses k3.

    The estimate is correct only while p is the policy that sampled.
    """
    return estimate(*_of_actions(p, q, batch))


def reweighted(
    p: Any,
    q: Any,
    batch: Batch,
    ratio: Float[Tensor, "B T"],
    *,
    estimate: Callable[[Tensor, Tensor], Tensor] = straight_through,
) -> Float[Tensor, "B T"]:
    """sg(ratio) times the estimate. With straight_through its gradient is that of KL(p, q), off-policy too.

    E_old[sg(r) log(p/q) grad log p] = E_p[log(p/q) grad log p] = grad KL(p, q), at every prefix.
    """
    return ratio.detach() * estimate(*_of_actions(p, q, batch))


def over_actions(p: Any, q: Any, batch: Batch, ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The exact KL(p, q), summed over all actions (the whole vocabulary): no noise, more computation."""
    return kl(p, q)


def to_reference(
    p: Any, batch: Batch, ratio: Float[Tensor, "B T"], *, reference: Callable[[Any], Any], divergence: Divergence
) -> Float[Tensor, "B T"]:
    """KL(pi, pi_ref) at each decision; 0 behind the mask.

    Each decision is charged only with its own KL, not with its effect on the KL of later tokens. Only KL in the reward
    includes that effect (see docs/theory.md).
    """
    with torch.no_grad():
        q = reference(batch.obs)
    return divergence(p, q, batch, ratio).where(batch.mask, 0.0)


def _of_actions(p: Any, q: Any, batch: Batch) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """log p and log q of the actions taken; 0 behind the mask, where an infinite estimate would give a NaN gradient."""
    logp, logp_ref = (x.log_prob(batch.action).where(batch.mask, 0.0) for x in (p, q))
    return logp, logp_ref


class AdaptiveCoefficient:
    """The adaptive KL coefficient: halved below target / 1.5, doubled above 1.5 target (Schulman et al. 2017, sec. 4).

    `value` is a tensor that changes in place, so a compiled objective can keep its graph. It is constant without a
    target. Raises ValueError for a negative value or a target that is not positive.
    """

    def __init__(self, value: float, target: float = math.inf) -> None:
        if value < 0 or not target > 0:
            raise ValueError(f"a KL coefficient is 0 or more and its target above 0, not {value} and {target}")
        self.value = torch.tensor(float(value))
        self.target = target

    @property
    def adapts(self) -> bool:
        """Whether the coefficient depends on the KL."""
        return math.isfinite(self.target)

    def update(self, kl: float | Tensor) -> None:
        """Adapt the coefficient to the KL of an update. `kl` is read only if there is a target."""
        if self.adapts:
            kl = float(kl)
            if kl < self.target / 1.5:
                self.value /= 2
            elif kl > self.target * 1.5:
                self.value *= 2

    def adapt(self, metrics: dict[str, Tensor], kl: str) -> dict[str, Tensor]:
        """Update from the metric named `kl`, and return the coefficient that was used, as a metric.

        An update that was dropped has no such metric, and none that is finite: the coefficient then stays.
        """
        used = {f"{kl}_coefficient": self.value.clone()}
        if kl in metrics:
            self.update(metrics[kl])
        return used

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.fill_(state["value"])


class AdaptiveEntropy:
    """The coefficient of an entropy bonus that keeps the entropy at a target (Skywork-OR1, arXiv 2505.22312).

    After an update whose mean entropy is at most the target, c rises by `step`; else it falls by `step`, to no less
    than 0. `value` is c after the former and 0 after the latter: there is a bonus only while the entropy is too small.
    It is a tensor that changes in place. Raises ValueError unless target and step are positive.
    """

    def __init__(self, target: float, step: float, start: float = 0.0) -> None:
        if not (target > 0 and step > 0 and start >= 0):
            raise ValueError(f"target and step of an entropy are above 0, not {target} and {step}")
        self.target, self.step, self.raised = target, step, start
        self.value = torch.tensor(float(start))

    def adapt(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Update from the metric `entropy`, and return the coefficient that was used, as a metric."""
        used = {"entropy_coefficient": self.value.clone()}
        if "entropy" in metrics:
            low = float(metrics["entropy"]) <= self.target
            self.raised = max(0.0, self.raised + (self.step if low else -self.step))
            self.value.fill_(self.raised if low else 0.0)
        return used

    def state_dict(self) -> dict[str, Any]:
        return {"raised": self.raised, "value": self.value.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raised = state["raised"]
        self.value.fill_(state["value"])
