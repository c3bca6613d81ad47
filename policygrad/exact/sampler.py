"""Samplers of small worlds: (policy) -> Rollout. Their own random generator lets them resume bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from policygrad import ranks
from policygrad.errors import UserError
from policygrad.exact.enumeration import as_rollout
from policygrad.exact.tokens import TokenWorld, as_tokens, token_row, tree
from policygrad.exact.worlds import World, termination
from policygrad.rollout import Rollout


class EpisodeSampler:
    """Each call plays `rows` episodes, one per row, of at most `horizon` steps (by default the world's time limit).

    Longer episodes are truncated. Rows with the same start state form a group. greedy: each row's start is played once
    more, by the most likely actions (Rollout.greedy). The policy's distribution must have `probs`. Raises UserError if
    rows < 1, or if there is neither a horizon nor a time limit.
    """

    def __init__(
        self, world: World, rows: int, horizon: int | None = None, seed: int = 0, *, greedy: bool = False
    ) -> None:
        length = horizon or world.time_limit
        if length is None or rows < 1:
            raise UserError("a sampler needs at least one row, and a horizon where the world has no time limit")
        self.world, self.rows, self.horizon, self.greedy = world, rows, length, greedy
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.episodes = 0  # so far

    def __call__(self, policy: nn.Module) -> Rollout:
        """Play with the current policy."""
        start = _draw(self.world.start.expand(self.rows, -1), self.generator)
        rollout = play(self.world, policy, start, self.horizon, self.generator)
        found = None
        if self.greedy:
            found = play(self.world, policy, start, self.horizon, self.generator, greedy=True).reward.sum(1)
        return replace(rollout, group=start, greedy=found, metrics=_counted(self, rollout))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "steps": self.steps, "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.steps, self.episodes = state["steps"], state["episodes"]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """As Wrapper.divide_anew."""
        _divide_anew(self, states, seed)


class CompletionSampler:
    """Each call draws `prompts` prompts and answers each `completions` times; one prompt's rows form a group.

    greedy: it is answered once more, by the most likely tokens (Rollout.greedy).
    """

    def __init__(
        self, world: TokenWorld, prompts: int, completions: int, seed: int = 0, *, greedy: bool = False
    ) -> None:
        self.world, self.prompts, self.completions, self.greedy = world, prompts, completions, greedy
        self.tree = tree(world)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.episodes = 0  # so far

    def __call__(self, policy: nn.Module) -> Rollout:
        """Answer with the current policy."""
        drawn = torch.randint(self.world.prompts, (self.prompts,), generator=self.generator)
        start = drawn.repeat_interleave(self.completions)

        def see(state: Tensor, action: Tensor) -> Tensor:
            return token_row(self.world, start, action)

        asked = self.tree, policy, start, self.world.length, self.generator, see
        rollout = as_tokens(self.world, play(*asked))
        found = play(*asked, greedy=True).reward.sum(1) if self.greedy else None
        group = ranks.apart(torch.arange(self.prompts).repeat_interleave(self.completions))
        metrics = _counted(self, rollout)
        if self.completions > 1:
            spread = rollout.reward.sum(1).view(-1, self.completions).std(1, correction=0)
            metrics |= {"group_std": float(spread.mean()), "flat_groups": float((spread == 0).double().mean())}
        return replace(rollout, group=group, greedy=found, metrics={**metrics, "reward": metrics["return"]})

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "steps": self.steps, "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.steps, self.episodes = state["steps"], state["episodes"]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """As Wrapper.divide_anew."""
        _divide_anew(self, states, seed)


def _divide_anew(sampler: EpisodeSampler | CompletionSampler, states: Sequence[dict[str, Any]], seed: int) -> None:
    sampler.generator.manual_seed(seed)
    sampler.steps, sampler.episodes = (ranks.portion(sum(x[name] for x in states)) for name in ("steps", "episodes"))


def _newest(state: Tensor, action: Tensor) -> Tensor:
    """The observation of a memoryless policy: the current state."""
    return state[:, -1:]


@torch.no_grad()
def play(
    world: World,
    policy: nn.Module,
    start: Int[Tensor, " B"],
    horizon: int,
    generator: torch.Generator,
    see: Callable[[Tensor, Tensor], Tensor] = _newest,
    greedy: bool = False,
) -> Rollout:
    """Follow the policy from the given states: a_t ~ pi(.|o_t), or its mode if greedy; s_{t+1} ~ P(.|s_t, a_t).

    `see` turns the states [B, t + 1] and actions [B, t] so far into the policy's observation o_t [B, *].
    """
    end = len(world.start)
    outcome = torch.cat([world.transition, termination(world).unsqueeze(-1)], -1)
    state, action = start.unsqueeze(1), start.new_zeros(len(start), 0)
    logp = []
    for _ in range(horizon):
        alive = state[:, -1] != end
        probs = policy(see(state.where(state != end, 0), action)).probs[:, -1]
        a = (probs.argmax(1) if greedy else _draw(probs, generator)).where(alive, 0)
        logp.append(probs.gather(1, a.unsqueeze(1))[:, 0].log())
        to = _draw(outcome[state[:, -1].where(alive, 0), a], generator).where(alive, end)
        state = torch.cat([state, to.unsqueeze(1)], 1)
        action = torch.cat([action, a.unsqueeze(1)], 1)
    return as_rollout(world, state, action, torch.stack(logp, 1))


def _draw(probs: Float[Tensor, "B K"], generator: torch.Generator) -> Int[Tensor, " B"]:
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _counted(sampler: EpisodeSampler | CompletionSampler, rollout: Rollout) -> dict[str, float]:
    """Means over the rollout's episodes, and the sampler's total steps and episodes including this rollout."""
    sampler.steps += int(rollout.mask.sum())
    sampler.episodes += len(rollout.mask)
    return {
        "return": float(rollout.reward.sum(1).mean()),
        "length": float(rollout.mask.sum(1).double().mean()),
        "steps": float(sampler.steps),
        "episodes": float(sampler.episodes),
    }
