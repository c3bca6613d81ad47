"""A user's own loss, with the arguments that TRL's, verl's or OpenRLHF's take, held against the exact gradient.

Its advantages are GRPO's, on the world of tokens. The gradient of its negative is what a step would follow: it is
measured on policy and off it, and compared with that of every line of the table. Three checks ask what no loss may
depend on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from policygrad.errors import UserError, ending, one_line
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.train.compose import credit_of
from policygrad.train.methods import METHODS
from policygrad.updates import Metrics, Objective
from policygrad.verify.methods import method_rows, options_at
from policygrad.verify.settings import GROUP, Setting
from policygrad.verify.statistics import Row, moments
from policygrad.verify.updates import Check
from policygrad.verify.user import CALL_SECONDS, limited
from policygrad.weights import per_row

Loss = Callable[..., Any]
Adapter = Callable[[Loss, Tensor, Tensor, Tensor, Tensor], Any]  # (loss, logp, logp_old, advantage, mask)
ALIKE = 1e-9  # of two gradients, relative to the longer
CLIP, DUAL_CLIP = 0.2, 3.0


class Configuration(dict[str, Any]):
    """What a loss of verl reads of its actor's configuration: PPO's clip of 0.2 and nothing else."""

    def __init__(self) -> None:
        clips = {"clip_ratio": CLIP, "clip_ratio_low": CLIP, "clip_ratio_high": CLIP, "clip_ratio_c": DUAL_CLIP}
        super().__init__(clips, global_batch_info={}, policy_loss={})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


def of_verl(loss: Loss, logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor) -> Any:
    """loss(old_log_prob=, log_prob=, advantages=, response_mask=, [loss_agg_mode=, config=]), all [B, T]."""
    more = {"loss_agg_mode": "token-mean", "config": Configuration()}
    given = {name: x for name, x in more.items() if name in _parameters(loss)}
    return loss(old_log_prob=logp_old, log_prob=logp, advantages=advantage, response_mask=mask.to(logp.dtype), **given)


def of_openrlhf(loss: Loss, logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor) -> Any:
    """loss(log_probs, old_log_probs, advantages, action_mask=), all [B, T]."""
    return loss(logp, logp_old, advantage, action_mask=mask.to(logp.dtype))


def of_trl(loss: Loss, logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor) -> Any:
    """loss(per_token_logps=, old_per_token_logps=, advantages=, completion_mask=), advantages [B]."""
    of_row = advantage.gather(1, mask.int().argmax(1, keepdim=True)).squeeze(1)
    named = {"per_token_logps": logp, "old_per_token_logps": logp_old, "completion_mask": mask.to(logp.dtype)}
    return loss(advantages=of_row, **named)


# The names by which an adapter's loss is known.
ADAPTERS: Mapping[str, tuple[str, Adapter]] = {
    "verl": ("log_prob", of_verl), "OpenRLHF": ("log_probs", of_openrlhf), "TRL": ("per_token_logps", of_trl),
}  # fmt: skip


def adapter_of(name: str, loss: Loss) -> Adapter:
    """The adapter for the names of the loss's arguments. Raises UserError for a loss of none of them."""
    known = _parameters(loss)
    for argument, adapter in ADAPTERS.values():
        if argument in known:
            return adapter
    raise UserError(
        f"{ending(name, 40)} has no argument log_prob (verl), log_probs (OpenRLHF) or per_token_logps (TRL): name its "
        "arguments as one of them does"
    )


def made(name: str, loss: Loss) -> Loss:
    """The loss; of a class, such as OpenRLHF's modules, an object with its defaults. Raises UserError without any."""
    if not inspect.isclass(loss):
        return loss
    try:
        found: Any = loss()
        return found
    except Exception as error:
        raised = f"{type(error).__name__}: {one_line(error, 60)}"
        raise UserError(f"{ending(name, 40)}() raised {raised}: name a function, or an object of the class") from error


def _parameters(loss: Loss) -> set[str]:
    try:
        return set(inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters)
    except (TypeError, ValueError):  # of a function without a signature
        return set()


class LossObjective(Objective):
    """The negative of a user's loss. The batch's weights are not read: a loss averages by itself."""

    def __init__(self, policy: nn.Module, name: str, loss: Loss) -> None:
        super().__init__()
        self.policy, self.name, self.loss = policy, name, made(name, loss)
        self.adapter = adapter_of(name, self.loss)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logp = self.policy(batch.obs).log_prob(batch.action).where(batch.mask, 0.0)
        return -self.value(logp, batch.logp, batch.advantage, batch.mask), {}

    def value(self, logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """The loss. Raises UserError if it raises, exits, hangs, or returns anything but one number."""
        try:
            with limited(CALL_SECONDS):
                found = self.adapter(self.loss, logp, logp_old.clone(), advantage.clone(), mask.clone())
        except (Exception, SystemExit) as error:
            raised = f"{type(error).__name__}: {one_line(error, 80)}"
            raise UserError(f"{ending(self.name, 50)} raised {raised}: fix the loss") from error
        found = found[0] if isinstance(found, tuple | list) and found else found
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            said = f"{ending(self.name, 50)} returned {what}: return one number that has a gradient, or a tuple"
            raise UserError(f"{said} that begins with it")
        if not bool(found.isfinite()):
            raise UserError(f"{ending(self.name, 50)} returned a number that is not finite: fix the loss")
        return found.reshape(())


def loss_rows(name: str, loss: Loss, at: Setting) -> list[Row]:
    """Its row on policy and its row off policy, each with the methods whose gradient it has."""
    objective, short = LossObjective(at.seen(at.table), name, loss), name.rpartition(":")[2]
    credit, rows, alike = credit_of(options_at("grpo", at), objective.policy, None), [], []
    for words, experience in (("on", at.on_policy), ("off", at.off_policy)):
        row = Row(f"{short}, {words} policy", credit, objective, per_row, GROUP, one_by_one=True, known=False)
        found = moments(row, experience)
        alike.append([other for other, mean in _of_the_table(at, words) if _alike(found.mean, mean)])
        rows.append(replace(row, measured=found, expected=found.mean, experience=experience))
    both = [other for other in alike[0] if other in alike[1]]
    said = [f"as {(both or same)[0]}" if same else "as no line of the table" for same in alike]
    return [replace(row, reason=reason) for row, reason in zip(rows, said, strict=True)]


def _of_the_table(at: Setting, words: str) -> Iterator[tuple[str, Tensor]]:
    """What each method with GRPO's advantages expects on or off policy."""
    plain = options_at("grpo", at)
    for name, method in METHODS.items():
        options = options_at(name, at)
        credited = all(
            getattr(options, x, None) == getattr(plain, x)
            for x in ("credit", "group_baseline", "group_scale", "learn_from", "normalize_advantages")
        )
        if method.objective == "grpo" and credited:
            row = next(row for row in method_rows(at, options) if row.name == f"{name}, {words} policy")
            assert row.expected is not None
            yield name, row.expected


def _alike(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= ALIKE * max(float(a.norm()), float(b.norm()))


def loss_checks(name: str, loss: Loss, at: Setting) -> list[Check]:
    """What a loss must not depend on: padding, what stands behind the mask, and how a batch is split."""
    options, short = options_at("grpo", at), name.rpartition(":")[2]
    rollout = at.off_policy.rollout
    chosen = torch.cat([(rollout.group == prompt).nonzero()[:4, 0] for prompt in rollout.group.unique()])
    part: Rollout = rollout.rows(chosen)
    batch = decisions(part, per_row(part.mask), *credit_of(options, at.seen(at.table), None)(part))
    whole = partial(_slope, LossObjective(at.seen(at.table), name, loss))
    plain = whole(batch.logp, batch)
    size = max(float(plain.norm()), 1e-12)

    def distance(found: Tensor) -> float:
        return float((found - plain).norm()) / size

    padded = tree_map(lambda x: x if x.shape[1:] != batch.mask.shape[1:] else _padded(x), batch)
    behind = batch._replace(logp=batch.logp.where(batch.mask, 7.0), advantage=batch.advantage.where(batch.mask, -5.0))
    halves = [tree_map(lambda x, rows=rows: x[rows], batch) for rows in (slice(0, 3), slice(3, None))]
    slopes = [whole(half.logp, half) for half in halves]

    def apart(counted: Callable[[Tensor], Tensor]) -> float:
        shares = [float(counted(half.mask).sum() / counted(batch.mask).sum()) for half in halves]
        return distance(torch.cat([share * x for share, x in zip(shares, slopes, strict=True)]))

    changes = {
        "with three more columns of padding": distance(whole(padded.logp, padded)[:, : plain.shape[1]]),
        "with other numbers behind the mask": distance(whole(behind.logp, behind)),
        "in two parts, by their shares of rows or tokens": min(apart(lambda m: m.any(1)), apart(lambda m: m)),
    }
    return [
        Check(f"{short}: change of the gradient {what}", x, "0", math.isfinite(x) and x < ALIKE)
        for what, x in changes.items()
    ]


def _padded(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(x[:, :1]).expand(-1, 3, *x.shape[2:])], 1)


def _slope(objective: LossObjective, logp_old: Tensor, batch: Batch) -> Tensor:
    """d objective / d log pi at each decision [B, T], at a policy near the old one."""
    near = 0.1 * torch.cos(2.0 * torch.arange(logp_old.shape[1])).expand_as(logp_old)
    logp = (logp_old + near).where(batch.mask, 0.0).detach().requires_grad_()
    (found,) = torch.autograd.grad(-objective.value(logp, logp_old, batch.advantage, batch.mask), logp)
    return found.where(batch.mask, 0.0)
