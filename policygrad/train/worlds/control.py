"""Control: Gymnasium environments."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from policygrad.control import Critic, ObservationNormalizer, Policy, RewardScaler, Sampler, make_environments
from policygrad.control.environments import label
from policygrad.control.evaluation import Evaluation, evaluate_on, time_limit
from policygrad.control.memory import refuse_memory
from policygrad.control.spaces import rebuild
from policygrad.errors import UserError
from policygrad.train.checkpoints import load_critic, load_policy, save_policy
from policygrad.train.options import EPISODIC, OptionError, has_critic
from policygrad.train.reports import Curve, Row
from policygrad.train.worlds.world import Own, World


class ControlWorld(World):
    """A Gymnasium id, an environment, a callable that makes one, or a vector environment."""

    kind = "control"
    environments: VectorEnv | None = None
    normalizer: ObservationNormalizer | None = None

    @property
    def name(self) -> str:
        return label(self.task)

    def build(self, own: Own, progress: bool) -> None:
        options = self.options
        vectorization = options.vectorization
        if getattr(options, "group_size", None) is not None and vectorization == "auto":
            vectorization = "sync"  # a native vector environment takes one seed for all
        self.environments = make_environments(self.task, options.num_envs, vectorization=vectorization)
        self.sample = self._sampler(self.environments)
        self.normalizer = self.sample.stepping.observation_normalizer
        observation_space = self.environments.single_observation_space
        action_space = self.environments.single_action_space
        if own.policy is None:
            gaussian = {name: getattr(options, name) for name in ("squash", "state_dependent_std", "initial_log_std")}
            self.policy = Policy(observation_space, action_space, **self._shape(), **gaussian)
        else:
            self.policy = own_module("policy", own.policy, observation_space, action_space)
        self.policy.to(options.device)
        if not has_critic(options):
            if own.critic is not None:
                raise UserError(f"a critic is handed in, and credit {options.credit} has no use for one: leave it out")
            return
        if own.critic is None:
            self.critic = Critic(observation_space, **self._shape())
        else:
            # A critic without a fit of its own may be frozen.
            learns = hasattr(options, "critic_epochs")
            self.critic = own_module("critic", own.critic, observation_space, learns=learns)
        self.critic.to(options.device)
        if own.critic is not None:
            refuse_memory(self.critic, observations(observation_space).to(options.device), "critic")

    def _shape(self) -> dict[str, Any]:
        """The options that policy and critic share."""
        return {name: getattr(self.options, name) for name in ("hidden", "activation", "orthogonal")}

    def _sampler(self, environments: VectorEnv) -> Sampler:
        options, space = self.options, environments.single_observation_space
        whole = options.credit in EPISODIC
        steps = (options.episode_steps or time_limit(environments)) if whole else options.num_steps
        if steps is None:
            raise OptionError(
                "episode_steps", "the environment has no time limit: say how long an episode may be, with episode_steps"
            )
        groups: Any = None
        if options.credit == "group":
            groups = options.group_size or "all"
        return Sampler(
            environments,
            steps,
            seed=options.seed,
            whole_episodes=whole,
            groups=groups,
            observation_normalizer=ObservationNormalizer(space.shape or ()) if options.normalize_observations else None,
            reward_scaler=RewardScaler(environments.num_envs, options.gamma) if options.scale_rewards else None,
            device=options.device,
        )

    def load(self, directory: Path) -> None:
        self.policy, self.normalizer = load_policy(directory)
        self.policy.to(self.options.device)
        if has_critic(self.options):
            assert isinstance(self.policy, Policy)  # load_policy has refused any other
            description: dict[str, Any] = self.policy.description
            critic = Critic(rebuild(description["observation_space"]), **self._shape())
            if load_critic(directory, critic):  # else it is the user's own class
                self.critic = critic.to(self.options.device)

    def save(self, directory: Path) -> None:
        save_policy(directory, self.policy, self.critic, self.normalizer)

    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """Play `count` whole episodes (10 by default) with the policy's mode, or with samples if not `greedy`."""
        if self.task is None:
            raise UserError(
                "this run was trained on an environment without an id: load the policy with policygrad.load_policy, "
                "and hand it to policygrad.evaluate"
            )
        return evaluate_on(
            self.policy,
            self.normalizer,
            self.task,
            10 if count is None else count,
            seed=seed,
            stochastic=greedy is False,
            device=self.options.device,
        )

    def solved(self, row: Row) -> bool:
        return row["episodes"] >= 100 and row["return"] >= self.options.stop_at_return

    def status(self, row: Row) -> list[str]:
        parts = [f"return {row['return']:,.1f}"] if "return" in row else []
        parts += [f"KL {row['kl_old']:.4f}"] if "kl_old" in row else []
        return [*parts, f"{row['steps_per_second']:,.0f} steps/s"]

    def curve(self) -> Curve:
        return Curve()

    def summary(self, rows: list[Row]) -> dict[str, Any]:
        """return_mean and return_std cover the last 100 training episodes."""
        recent = np.array(self._recent())
        return {
            "episodes": int(rows[-1]["episodes"]) if rows else 0,
            "return_mean": float(recent.mean()) if len(recent) else None,
            "return_std": float(recent.std()) if len(recent) else None,
        }

    def result(self, rows: list[Row], seconds: float) -> str:
        found, steps = self.summary(rows), rows[-1]["steps"] if rows else 0
        score = "no episode has ended"
        if found["return_mean"] is not None:
            spread = f"{found['return_mean']:,.1f} +- {found['return_std']:,.1f}"
            score = f"return {spread} (last {len(self._recent())} episodes)"
        speed = f"{steps:,.0f} steps in {seconds:.1f} s ({steps / max(seconds, 1e-9):,.0f} steps/s)"
        return f"{score}, {speed}"

    def notes(self, run: Any) -> list[str]:
        """Says since when a policy has not explored, or has done little but go to the bounds, and what to change."""
        rows = [row for row in run.metrics if "entropy" in row]
        notes = []
        quiet = since(rows, lambda row: row.get("action_std", math.inf) < 1e-3 or _certain(row))
        if quiet is not None and (quiet < 0.25 or not _has_improved(rows)):
            notes.append(
                f"the policy has not explored since step {_step_at(rows, quiet):,.0f}: its actions are all but certain, "
                "and it learns no more. If the return is too low, lower learning_rate or raise entropy_coefficient"
            )
        wide = since(rows, lambda row: row.get("action_std", 0.0) > 3 * max(1.0, rows[0]["action_std"]))
        if wide is not None:
            notes.append(
                f"the actions are mostly noise since step {_step_at(rows, wide):,.0f}: standard deviation "
                f"{rows[-1]['action_std']:.3g} where the bounds are -1 and 1"
                + (f", {rows[-1]['bound_fraction']:.0%} of them at a bound" if "bound_fraction" in rows[-1] else "")
                + ". Lower entropy_coefficient or learning_rate"
            )
        return notes

    def _recent(self) -> list[float]:
        return [x for x, _ in self.sample.stepping.finished]

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "gymnasium": gymnasium.__version__}

    def close(self) -> None:
        mine = isinstance(self.task, str) or not isinstance(self.task, gymnasium.Env | VectorEnv)
        if self.environments is not None and mine:
            self.environments.close()


def since(rows: list[Row], holds: Callable[[Row], bool]) -> float | None:
    """The share of the run's rows before the last ones, all of which fulfil the condition; None if the last does not."""
    count = 0
    while count < len(rows) and holds(rows[-1 - count]):
        count += 1
    return (len(rows) - count) / len(rows) if count else None


def _step_at(rows: list[Row], share: float) -> float:
    return rows[round(share * len(rows))]["steps"]


def _certain(row: Row) -> bool:
    """Whether a discrete policy's entropy is all but 0. A density's may be any number, and has no such meaning."""
    return "action_std" not in row and abs(row["entropy"]) < 1e-3


def _has_improved(rows: list[Row]) -> bool:
    """Whether the last return is nearer to the best one than to the first."""
    returns = [row["return"] for row in rows if "return" in row]
    return bool(returns) and returns[-1] - returns[0] > max(returns) - returns[-1]


def own_module(name: str, module: Any, *spaces: gymnasium.Space, learns: bool = True) -> nn.Module:
    """The user's own module. Raises UserError if it is not a module or has nothing to learn."""
    made = module if isinstance(module, nn.Module) or not callable(module) else module(*spaces)
    if not isinstance(made, nn.Module):
        takes = "(observation_space, action_space)" if name == "policy" else "(observation_space)"
        raise UserError(f"{name} is {str(made)[:60]}: hand in an nn.Module, or a function that makes one of {takes}")
    if learns and not any(p.requires_grad for p in made.parameters()):
        raise UserError(f"the {name} handed in has no parameter that requires a gradient: there is nothing to learn")
    return made


def observations(space: gymnasium.Space, rows: int = 4, steps: int = 4) -> Tensor:
    """Random observations [rows, steps, ...] of a space. The space's own generator is left unchanged."""
    generator = np.random.default_rng(0)
    shape = (rows, steps, *(space.shape or ()))
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.from_numpy(generator.integers(space.start, space.start + space.n, shape))
    drawn = generator.normal(size=shape)
    if isinstance(space, gymnasium.spaces.Box):
        drawn = np.clip(drawn, space.low, space.high)
        if not np.issubdtype(space.dtype, np.floating):
            return torch.from_numpy(generator.integers(0, 2, shape).astype(space.dtype))
    return torch.from_numpy(drawn).to(torch.get_default_dtype())
