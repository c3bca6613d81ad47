"""Every trajectory of a small world, as one Rollout with the probability of each row; and every batch of them.

The expectation of any estimator is then a finite sum over batches of its value times the batch's probability.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from policygrad.errors import UserError
from policygrad.exact.worlds import World, termination
from policygrad.rollout import Rollout

LIMIT = 200_000


def trajectories(
    world: World, probs: Float[Tensor, "S A"], horizon: int, limit: int = LIMIT
) -> tuple[Rollout, Float[Tensor, " B"]]:
    """All trajectories of at most `horizon` steps, with P(row) = P(s_0) prod_t pi(a_t|s_t) P(s_{t+1}|s_t, a_t).

    A row that terminates early is padded behind its mask; a row that does not terminate is truncated. Padded states are
    0, a valid state, so code that reads them gets a wrong value. Raises UserError if there are more than `limit`.
    """
    probs = probs.detach()
    states = world.start.shape[0]
    outcome = torch.cat([world.transition, termination(world).unsqueeze(-1)], -1)  # [S, A, S + 1]: the last is the end
    step = probs.unsqueeze(-1) * outcome
    step = torch.cat([step, torch.zeros_like(step[:1])])  # the end always leads to itself, by action 0
    step[states, 0, states] = 1.0
    state = world.start.nonzero()[:, 0].unsqueeze(1)
    action, probability = state.new_zeros(len(state), 0), world.start[state[:, 0]]
    for _ in range(horizon):
        branch = step[state[:, -1]]
        if branch.count_nonzero() > limit:
            raise UserError(f"the world has more than {limit:,} trajectories of {horizon} steps: shorten its horizon")
        row, a, to = branch.nonzero(as_tuple=True)
        probability = probability[row] * branch[row, a, to]
        state = torch.cat([state[row], to.unsqueeze(1)], 1)
        action = torch.cat([action[row], a.unsqueeze(1)], 1)
    logp = torch.cat([probs, probs[:1]])[state[:, :-1], action].log()
    return as_rollout(world, state, action, logp), probability


def batches(
    probability: Float[Tensor, " B"], size: int, limit: int = LIMIT
) -> tuple[Int[Tensor, "K size"], Float[Tensor, " K"]]:
    """All ordered batches of `size` independent rows: the row indices, and P(batch) = prod_i P(row_i).

    Raises UserError if there are more than `limit`.
    """
    count = len(probability)
    if count**size > limit:
        raise UserError(f"{count} trajectories make {count**size:,} batches of {size}: too many to enumerate")
    index = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
    return index, probability[index].prod(1)


def in_succession(rollout: Rollout, index: Int[Tensor, "K 2"]) -> Rollout:
    """Rows of two consecutive episodes, separated by one step that no policy chose.

    This is the extra step of Gymnasium's next-step auto-reset. It is masked and ended; its observation is the state
    where the first episode stopped, and its action is ignored. Its reward and log-probability are NaN, which exposes
    code that counts it. An episode that terminates early is padded with masked steps.
    """
    first, second = rollout.rows(index[:, 0]), rollout.rows(index[:, 1])
    pad = first.mask[:, :1]
    between = first.obs[:, :1] if first.final_obs is None else first.final_obs.unsqueeze(1)
    nothing = torch.zeros_like(first.reward[:, :1])

    def joined(name: str, filler: Tensor) -> Tensor:
        return torch.cat([getattr(first, name), filler, getattr(second, name)], 1)

    return Rollout(
        joined("obs", between),
        joined("action", torch.zeros_like(first.action[:, :1])),
        joined("logp", nothing + torch.nan),
        joined("reward", nothing + torch.nan),
        joined("terminated", torch.zeros_like(pad)),
        joined("ended", torch.ones_like(pad)),
        joined("mask", torch.zeros_like(pad)),
        first.group,
        second.final_obs,
        rollout.memoryless,
    )


def with_holes(rollout: Rollout, holes: int = 3, hole: int | None = None, seed: int = 0) -> Rollout:
    """The same trajectories with `holes` holes in each row. Every decision's expected credit is unchanged.

    Holes are inserted at random before, between and after the decisions, at most 2 in one place. A hole is masked and
    ends nothing. Its reward and log-probability are NaN, its action is meaningless, and its observation is a random
    state (or the state `hole`), so the critic's value there is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, steps = rollout.mask.shape
    decided = (rollout.mask * torch.arange(1, steps + 1)).amax(1, keepdim=True)  # steps up to the last decision
    # Each gap has two seats: before each of these steps, and after the last one.
    gap = torch.arange(steps + 1).repeat_interleave(2).expand(rows, -1)
    seat = torch.rand(rows, 2 * (steps + 1), generator=generator).where(gap <= decided, 2.0)
    place = gap.gather(1, seat.argsort(1)[:, :holes]) - 0.5  # before step `gap`
    order = torch.cat([torch.arange(steps).expand(rows, -1).to(place.dtype), place], 1).argsort(dim=1, stable=True)
    drawn = torch.randint(int(rollout.obs.max()) + 1, (rows, holes), generator=generator)
    nothing, no = torch.full((rows, holes), torch.nan, dtype=rollout.reward.dtype), torch.zeros(rows, holes).bool()
    filler = {
        "obs": drawn if hole is None else torch.full_like(drawn, hole),
        "action": torch.zeros_like(drawn),
        **dict.fromkeys(("reward", "logp"), nothing),
        **dict.fromkeys(("terminated", "ended", "mask"), no),
    }
    columns: dict[str, Any] = {
        name: torch.cat([getattr(rollout, name), x], 1).gather(1, order) for name, x in filler.items()
    }
    return replace(rollout, **columns)


def with_turns(rollout: Rollout, decisions: int = 1) -> Rollout:
    """The same trajectories as conversations: a hole after every `decisions` decisions, where another speaks.

    What is said changes with the state, as it does there. The hole is as those of `with_holes`, its observation the
    state before it. rollout.state is the state of the first decision after the newest hole.
    """
    rows, steps = rollout.mask.shape
    count = (steps - 1) // decisions
    place = torch.arange(1, count + 1) * decisions
    before = torch.cat([torch.arange(steps).to(torch.double), place - 0.5]).argsort(stable=True)
    begins = torch.arange(steps) // decisions * decisions
    nothing, no = torch.full((rows, count), torch.nan, dtype=rollout.reward.dtype), torch.zeros(rows, count).bool()
    filler = {
        "obs": rollout.obs[:, place - 1],
        "action": torch.zeros(rows, count, dtype=rollout.action.dtype),
        **dict.fromkeys(("reward", "logp"), nothing),
        **dict.fromkeys(("terminated", "ended", "mask"), no),
    }
    columns: dict[str, Any] = {name: torch.cat([getattr(rollout, name), x], 1)[:, before] for name, x in filler.items()}
    state = torch.cat([rollout.obs[:, begins], rollout.obs[:, place - 1]], 1)[:, before]
    return replace(rollout, **columns, state=state)


def as_rollout(
    world: World, state: Int[Tensor, "B _"], action: Int[Tensor, "B T"], logp: Float[Tensor, "B T"]
) -> Rollout:
    """The rollout of the given states and actions, one episode in each row. State S marks the end.

    An episode that has not terminated by the last step is truncated there.
    """
    end = state == len(world.start)
    mask, over, state = ~end[:, :-1], end[:, 1:], state.where(~end, 0)
    terminated = mask & over
    ended = terminated.clone()
    ended[:, -1] |= mask[:, -1]
    return Rollout(
        state[:, :-1],
        action,
        logp,
        world.reward[state[:, :-1], action],
        terminated,
        ended,
        mask,
        torch.arange(len(state)),
        state[:, -1],
        memoryless=True,
    )
