"""Tasks that a reflection leaves as they are: every decision is learned from twice, as it was and reflected."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from policygrad.errors import UserError, one_line
from policygrad.rollout import Batch
from policygrad.updates import Metrics, Update

Mirror = Callable[[Any, Tensor], tuple[Any, Tensor]]  # (obs [B, T, ...], action [B, T, ...]) -> their reflections


def mirrored(update: Update, mirror: Mirror) -> Update:
    """The update on each decision and its reflection (g s, g a), each with half the weight.

    mirror: (obs, action) -> (g obs, g action), its own inverse, in a task whose transitions and rewards g leaves as
    they are. What happened is then what the reflected policy would have met: advantage and value target hold for
    (g s, g a) too (Abdolhosseini et al. 2019, "On learning symmetric locomotion", DUP; Mittal et al. 2024, arXiv
    2403.04359).

    The reflection keeps the log-probability of the action that was sampled, for it is one of the reflected policy,
    g pi_old(g a|g s) = pi_old(a|s). With the objective E[r A] its half of the gradient is that off policy,

        sum_s eta'(s) sum_a pi(a|s) grad log pi(a|s) A'(s, a),   eta', A' of the reflected policy,

    which is grad J where the policy is symmetric, and leans on the reflected policy's states and values elsewhere. An
    objective without a ratio, log pi A, would take reflected actions for the policy's own.

    Of a policy with memory, histories are reflected: the observations of a row, which must begin where an episode does,
    so that the memory before it is empty on both sides. What the reflected policy would remember in the midst of an
    episode is not known. Raises UserError for rows that begin there, and, at the first batch, if the function is no
    such reflection.
    """
    checked = False

    def update_both(objective: Any, batch: Batch) -> Metrics:
        nonlocal checked
        rows = batch.obs if hasattr(batch.obs, "start") else None  # of a policy with memory
        if rows is not None and not rows.start[:, 0].all():
            raise UserError(
                "symmetry with memory is for rows that begin with an episode, and some do not: what a reflected policy "
                "remembers there is unknown"
            )
        seen = batch.obs if rows is None else rows.obs
        obs, action = _reflected(mirror, seen, batch.action)
        if not checked:
            again = _reflected(mirror, obs, action)
            columns = zip(tree_leaves(again), tree_leaves((seen, batch.action)), strict=True)
            if not all(torch.allclose(x[batch.mask], y[batch.mask], atol=1e-5) for x, y in columns):
                raise UserError("symmetry is not its own inverse: applied twice, it must give back obs and action")
            checked = True
        twins = batch._replace(obs=obs if rows is None else rows._replace(obs=obs), action=action)
        both: Batch = tree_map(lambda *x: torch.cat(x), batch, twins)
        return update(objective, both._replace(weight=both.weight / 2))

    return update_both


def _reflected(mirror: Mirror, obs: Any, action: Tensor) -> tuple[Any, Tensor]:
    """What the function returns. Raises UserError if it raises, or that has other shapes or types than it was given."""
    try:
        found = mirror(obs, action)
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error, 80)}"
        raise UserError(f"symmetry raised {said}: it takes (obs, action), tensors [B, T, ...]") from error
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError("symmetry must return a pair, the reflected obs and action")
    for name, x, y in zip(("obs", "action"), found, (obs, action), strict=True):
        was, now = ([(*a.shape, a.dtype) for a in tree_leaves(z) if isinstance(a, Tensor)] for z in (y, x))
        if was != now:
            raise UserError(f"symmetry changed the shape or the type of {name}: return tensors like those it is given")
    return found
