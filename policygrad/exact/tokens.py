"""Token sequences small enough to enumerate: prompts, completions of at most L tokens, and any reward.

The sequences form a tree, and the tree is a world: its states are prefixes and its actions are next tokens. So
closed_form.py applies to language too; only the observation differs: it is the row of tokens so far.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from policygrad.errors import UserError
from policygrad.exact.enumeration import LIMIT, trajectories
from policygrad.exact.worlds import DTYPE, World
from policygrad.rollout import Rollout

END = 0  # the end-of-sequence token; token `vocabulary + p` stands for prompt p


@dataclass(frozen=True)
class TokenWorld:
    """Equally likely prompts of one token each, and a reward for every completion.

    A completion ends with END or is cut after `length` tokens. A cut completion has no END, and its reward comes at its
    last token.
    """

    prompts: int
    vocabulary: int  # number of tokens, including END
    length: int
    reward: Callable[[int, tuple[int, ...]], float]  # (prompt, completion) -> reward


def token_world() -> TokenWorld:
    """Two prompts, 3 tokens, at most 4 per answer: reward 1 if the prompt's own token comes first, 1/2 for an END."""
    return TokenWorld(2, 3, 4, lambda prompt, answer: (answer[0] == prompt + 1) + 0.5 * (answer[-1] == END))


def tree(world: TokenWorld) -> World:
    """The world of prefixes: states 0 .. P - 1 are the prompts, and `successor` numbers the rest, level by level.

    The reward comes with the last token of a completion. gamma = 1. Raises UserError if there are too many prefixes.
    """
    size = offset(world, world.length)
    if size**2 * world.vocabulary > 10_000_000:
        raise UserError(f"{size:,} prefixes are too many to enumerate: use fewer tokens or shorter completions")
    transition = torch.zeros(size, world.vocabulary, size, dtype=DTYPE)
    reward = torch.zeros(size, world.vocabulary, dtype=DTYPE)
    level: list[tuple[int, int, tuple[int, ...]]] = [(prompt, prompt, ()) for prompt in range(world.prompts)]
    for t in range(world.length):
        following = []
        for state, prompt, prefix in level:
            for token in range(world.vocabulary):
                completion = (*prefix, token)
                if token == END or t + 1 == world.length:
                    reward[state, token] = world.reward(prompt, completion)
                else:
                    child = offset(world, t + 1) + (state - offset(world, t)) * world.vocabulary + token
                    transition[state, token, child] = 1.0
                    following.append((child, prompt, completion))
        level = following
    start = torch.zeros(size, dtype=DTYPE)
    start[: world.prompts] = 1 / world.prompts
    return World(transition, reward, start, gamma=1.0)


def offset(world: TokenWorld, depth: int) -> int:
    """P (1 + V + ... + V^(depth - 1)): the number of prefixes shorter than `depth` tokens, even those after END."""
    return world.prompts * sum(world.vocabulary**t for t in range(depth))


def prefix_state(world: TokenWorld, obs: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The tree's state for every prefix of a row of tokens (the prompt, then the completion so far)."""
    at = obs[:, 0] - world.vocabulary
    states = [at]
    for t in range(1, obs.shape[1]):
        at = at * world.vocabulary + obs[:, t]
        states.append(at + offset(world, t))
    return torch.stack(states, 1)


class OnPrefixes(nn.Module):
    """A policy or critic of the tree as a causal model of tokens: obs [B, T] -> its output at each prefix."""

    def __init__(self, world: TokenWorld, module: nn.Module) -> None:
        super().__init__()
        self.world = world
        self.module = module

    def forward(self, obs: Int[Tensor, "B T"]) -> torch.distributions.Distribution | Tensor:
        """The distribution of the next token, or the value, after every prefix."""
        return self.module(prefix_state(self.world, obs))


def as_tokens(world: TokenWorld, rollout: Rollout) -> Rollout:
    """A rollout of the tree in the form of language: obs are tokens, rows stay whole, and a prompt is a group."""
    prompt = rollout.obs[:, 0]
    obs = token_row(world, prompt, rollout.action[:, :-1])
    return replace(rollout, obs=obs, group=prompt, final_obs=None, memoryless=False)


def token_row(world: TokenWorld, prompt: Int[Tensor, " B"], completion: Int[Tensor, "B t"]) -> Int[Tensor, "B t+1"]:
    """The prompt's token, then the completion's."""
    return torch.cat([prompt.unsqueeze(1) + world.vocabulary, completion], 1)


def completions(
    world: TokenWorld, probs: Float[Tensor, "S A"], limit: int = LIMIT
) -> tuple[Rollout, Float[Tensor, " B"]]:
    """Every completion y of every prompt x, and P(x) P(y|x). Raises UserError if there are more than `limit`."""
    rollout, probability = trajectories(tree(world), probs, world.length, limit)
    return as_tokens(world, rollout), probability


def groups(
    rollout: Rollout, probability: Float[Tensor, " B"], size: int, limit: int = LIMIT
) -> tuple[Int[Tensor, "K size"], Float[Tensor, " K"]]:
    """All groups of `size` independent completions of one prompt, and P(group), including the prompt's probability.

    Raises UserError if there are more than `limit`.
    """
    index, weight = [], []
    for prompt in rollout.group.unique():
        member = (rollout.group == prompt).nonzero()[:, 0]
        share = probability[member].sum()
        if len(member) ** size * int(rollout.group.max() + 1) > limit:
            raise UserError(f"{len(member)} completions make {len(member) ** size:,} groups of {size}: too many")
        index.append(torch.cartesian_prod(*[member] * size).view(-1, size))
        weight.append(share * (probability[index[-1]] / share).prod(1))
    return torch.cat(index), torch.cat(weight)


def log_likelihood(rollout: Rollout, probs: Float[Tensor, "S A"], states: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """log P(y|x) = sum_t log pi(y_t|x, y_<t), from the table `probs`; differentiable in it."""
    return probs.log()[states, rollout.action].where(rollout.mask, 0.0).sum(1)


def expected_reward(
    log_p: Float[Tensor, " B"], prompt: Float[Tensor, " B"], reward: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """J = sum_y P(x) P(y|x) R(x, y), over all completions of all prompts."""
    return (prompt * log_p.exp() * reward).sum()


def sequence_kl(
    log_p: Float[Tensor, " B"], log_p_ref: Float[Tensor, " B"], prompt: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """KL(pi, pi_ref) = sum_y P(x) P(y|x) (log P(y|x) - log P_ref(y|x)) of whole completions, the mean over prompts."""
    return (prompt * log_p.exp() * (log_p - log_p_ref)).sum()
