"""How much of a step is signal: the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162).

The gradient of a batch of b independent decisions is G + e, with E|e|^2 = tr(Sigma) / b. signal to noise of the step:
|G|^2 b / tr(Sigma). noise scale: B = tr(Sigma) / |G|^2 (their eq. 2.9, B_simple), the batch size at which both are
equal. Far below it, a batch of twice the size saves almost half of the steps; far above it, almost none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from policygrad import ranks
from policygrad.rollout import Batch, Everywhere, measured, micro_batches
from policygrad.updates import Metrics, Update

UNSEEN = 1e-6  # the ratio of signal to noise where no signal is seen
PARTS = 16  # of a batch, whose gradients are compared


def gradient_noise(objective: Any, batch: Batch, parts: int = PARTS) -> Metrics:
    """gradient_snr and noise_scale of the policy's gradient, from the gradients g_k of parts of the batch.

    With g = sum_k w_k g_k, w_k each part's share of the weight, sum_k w_k |g_k - g|^2 / (K - 1) is an unbiased estimate
    of tr(Sigma) / b, and |g|^2 less that one of |G|^2. Rows are taken as independent. Costs a gradient of the batch.
    With fewer than two parts of weight nothing is seen. Of several ranks, each parts its own share of the batch.
    """
    parameters = [p for p in objective.policy.parameters() if p.requires_grad]
    rows, count = len(batch.mask), 0
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares: Any = 0.0
    known = measured(batch).everywhere
    weight = known.weight if isinstance(known, Everywhere) else float(batch.weight.sum())
    for share, part in micro_batches(batch, list(torch.arange(rows).tensor_split(min(parts, rows))), weight):
        found = torch.autograd.grad(objective(part)[0], parameters, allow_unused=True)
        count += 1
        for total, x in zip(mean, found, strict=True):
            if x is not None:
                total += share * x
                squares = squares + share * x.double().square().sum()
    own = (squares, count, batch.mask.any(1).sum())
    numbers = [torch.as_tensor(x, dtype=torch.float64, device=mean[0].device) for x in own]
    *mean, squares, counts, rows_counting = ranks.sum_all([*mean, *numbers])
    count, counting = int(counts), int(rows_counting)
    whole = _sum_of_squares(mean)
    if count < 2:
        return _metrics(torch.zeros_like(whole), torch.zeros_like(whole), counting)
    noise = (squares - whole).clamp(min=0.0) / (count - 1)
    return _metrics(whole - noise, noise, counting)


def noise_of_moments(optimizers: list[Optimizer], policy: nn.Module, size: float | int) -> Metrics:
    """The same from Adam's moments of the policy's parameters, at no cost: of its last 1 / (1 - beta_1) steps.

    m and v are weighted means of gradients and of their squares, with the weights w_i and 1 in all. If the gradients
    are G + e_i, sum m^2 has the mean |G|^2 + rho tr(Sigma) / b with rho = sum_i w_i^2, and sum v the mean |G|^2 +
    tr(Sigma) / b. v remembers longer than m: where gradients have shrunk, the noise is overstated. size: b. Empty
    without Adam or AdamW.
    """
    own, rho, first, second = set(policy.parameters()), 1.0, torch.zeros(()).double(), torch.zeros(()).double()
    for adam, group in ((x, group) for x in optimizers if isinstance(x, Adam) for group in x.param_groups):
        states = [adam.state[p] for p in group["params"] if p in own and "exp_avg" in adam.state.get(p, {})]
        beta, beta_2 = group["betas"]
        for steps in {float(state["step"]) for state in states} - {1.0}:
            same = [state for state in states if float(state["step"]) == steps]
            rho = (1 - beta) / (1 + beta) * (1 + beta**steps) / (1 - beta**steps)
            norms = torch._foreach_norm([ranks.local(x["exp_avg"]) for x in same], 2, dtype=torch.float64)
            sums = torch._foreach_norm([ranks.local(x["exp_avg_sq"]) for x in same], 1, dtype=torch.float64)
            first = first + _sum_of_squares(list(norms)).cpu() / (1 - beta**steps) ** 2
            second = second + torch.stack(list(sums)).sum().cpu() / (1 - beta_2**steps)
    if not any(isinstance(x, Adam) for x in optimizers):
        return {}
    if any(map(ranks.is_shard, own)):
        first, second = ranks.sum_all([first, second])
    if rho == 1.0:  # no parameter has taken a second step
        return _metrics(signal=first, noise=second, size=size)
    noise = (second - first) / (1 - rho)
    return _metrics(second - noise, noise, size)


class NoiseMeter:
    """Wraps an update: the first batch after `begin` is measured by gradient_noise before its step, if that is `due`.

    found: the metrics of that batch.
    """

    def __init__(self, due: Callable[[], bool] = lambda: True) -> None:
        self.due, self.waiting, self.found = due, False, Metrics()

    def begin(self) -> None:
        """An iteration begins."""
        self.waiting, self.found = True, {}

    def __call__(self, update: Update) -> Update:
        """The update, measured."""

        def measured(objective: Any, batch: Batch) -> Metrics:
            if self.waiting:
                self.waiting = False
                self.found = gradient_noise(objective, batch) if self.due() else {}
            return update(objective, batch)

        return measured


def _metrics(signal: Tensor, noise: Tensor, size: float | int) -> Metrics:
    """As metrics, between UNSEEN and its inverse.

    The estimates are unbiased, so that of the signal may be below 0: then, and before there are two gradients, it is
    UNSEEN. Without noise the ratio would be infinite.
    """
    ratio = torch.where(noise > 0, signal / noise, torch.where(signal > 0, 1 / UNSEEN, UNSEEN))
    ratio = ratio.clamp(UNSEEN, 1 / UNSEEN)
    return {"gradient_snr": ratio, "noise_scale": size / ratio}


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors]).sum()
