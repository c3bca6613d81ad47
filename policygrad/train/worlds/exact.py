"""Small worlds in closed form: a policy's return is computed exactly."""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from policygrad import ranks
from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return, optimal_probs
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, tabular
from policygrad.exact.sampler import CompletionSampler, EpisodeSampler
from policygrad.exact.tokens import OnPrefixes, TokenWorld, token_world, tree
from policygrad.exact.worlds import world_named
from policygrad.train.checkpoints import Stage, load_tensors, write_tensors
from policygrad.train.options import OptionError, compares_greedy, has_critic
from policygrad.train.reports import Curve, Row
from policygrad.train.worlds.world import DECISIONS, Own, World

HORIZON = 100  # steps, for a world without a time limit
COMPLETIONS = 4  # for each prompt of `exact:tokens`


@dataclass
class Evaluation:
    """The discounted return J of a policy in closed form, and the optimal J."""

    score: float
    best: float

    def line(self) -> str:
        """The result as one line."""
        return f"J = {self.score:.4f} of at most {self.best:.4f}, exactly"

    def summary(self) -> dict[str, Any]:
        """The result for JSON."""
        return asdict(self)


class ExactWorld(World):
    """`exact:` chain, bandit, cliff, garnet, two_states or tokens, with a tabular policy and critic in float64."""

    kind = "exact"
    dtype = torch.float64
    judged = "expected_return"

    def __init__(self, task: str, options: Any) -> None:
        self.tokens: TokenWorld | None = token_world() if task == "exact:tokens" else None
        self.world = tree(self.tokens) if self.tokens is not None else world_named(task.removeprefix("exact:"))
        gamma = self.world.gamma if options.gamma is None else options.gamma
        super().__init__(task, dataclasses.replace(options, gamma=gamma))

    @property
    def name(self) -> str:
        return self.task

    def build(self, own: Own, progress: bool) -> None:
        if own != Own():
            raise UserError(
                "policy, critic and engine are for other worlds: an exact one has its own tables; leave them out"
            )
        self._make_tables()
        rows, seed = self.options.num_envs, ranks.seed(self.options.seed)
        if self.tokens is not None and self.options.episode_steps is not None:
            raise OptionError("episode_steps", f"{self.name} has a length of its own: leave episode_steps out")
        if self.tokens is not None and rows % COMPLETIONS:
            raise UserError(
                f"num_envs is {rows}: {self.name} answers each prompt {COMPLETIONS} times; give a multiple of it"
            )
        together = 1 if self.tokens is None else COMPLETIONS
        self.sample = self.sampler(self.rows_of_rank("num_envs", together), seed)

    def sampler(self, rows: int, seed: int, completions: int = COMPLETIONS) -> Any:
        """A sampler of so many episodes; of `exact:tokens`, of so many answers, `completions` to each prompt."""
        greedy = compares_greedy(self.options)
        if self.tokens is not None:
            return CompletionSampler(self.tokens, rows // completions, completions, seed, greedy=greedy)
        horizon = self.options.episode_steps or self.world.time_limit or HORIZON
        return EpisodeSampler(self.world, rows, horizon, seed, greedy=greedy)

    def _make_tables(self) -> None:
        states, actions = self.world.reward.shape
        self.policy = self.table = SoftmaxPolicy(tabular(states, actions))
        self.critic = TabularCritic(torch.zeros(states)) if has_critic(self.options) else None
        if self.tokens is not None:
            self.policy = OnPrefixes(self.tokens, self.table)
            self.critic = None if self.critic is None else OnPrefixes(self.tokens, self.critic)

    def load(self, directory: Path) -> Stage:
        self._make_tables()
        return load_tensors(directory / "policy.safetensors", self.modules())

    def save(self, directory: Path, stage: Stage) -> None:
        write_tensors(directory / "policy.safetensors", self.modules().state_dict(), stage)

    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """The exact J of the stochastic policy. Raises UserError for `count` and `greedy`, which do not apply."""
        if count is not None or greedy is not None:
            raise UserError(
                f"{self.name} is evaluated exactly, not by samples: leave the number of them and greedy out"
            )
        with torch.no_grad():
            found = [
                expected_return(self.world, probs) for probs in (probabilities(self.table), optimal_probs(self.world))
            ]
        return Evaluation(*map(float, found))

    def part(self, row: Row) -> Any:
        rows = self.sample.rows if self.tokens is None else self.sample.prompts
        episodes = rows if self.tokens is None else rows * COMPLETIONS
        own = {"group_std": rows, "flat_groups": rows, "return": episodes, "length": episodes, "reward": episodes}
        return row, {DECISIONS: 1.0, **own}

    def status(self, row: Row) -> list[str]:
        known = [f"J {row['expected_return']:.4f}"] if "expected_return" in row else []
        return [*known, f"return {row['return']:,.3f}", f"{row['steps_per_second']:,.0f} steps/s"]

    def curve(self) -> Curve:
        return Curve(y=("expected_return", "J of the policy, in closed form"))

    def summary(self, rows: list[Row]) -> dict[str, Any]:
        return {"return_mean": rows[-1].get("return") if rows else None}

    def result(self, rows: list[Row], seconds: float) -> str:
        return f"return {rows[-1]['return']:.3f} in the last rollout, {rows[-1]['steps']:,.0f} steps in {seconds:.1f} s"
