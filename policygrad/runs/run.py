"""A trained policy with its run: judged, saved, and found again."""

import dataclasses
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import nn

from policygrad.control import ObservationNormalizer, Policy, evaluate, make_environments
from policygrad.control.environments import Environment
from policygrad.control.spaces import describe, rebuild
from policygrad.errors import UserError
from policygrad.runs.checkpoints import load_policy, save_policy, write_json
from policygrad.runs.options import Options
from policygrad.runs.reports import Row, draw_curve


@dataclass
class Evaluation:
    """What a policy scored on whole episodes."""

    return_mean: float
    return_std: float
    length_mean: float
    episodes: int
    returns: list[float]


@dataclass
class Run:
    """A policy that was trained, with what is needed to use it, judge it and save it."""

    algorithm: str
    environment: Environment
    options: Options
    preset: str | None
    policy: nn.Module
    critic: nn.Module
    normalizer: ObservationNormalizer | None
    directory: Path | None
    metrics: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)  # returns of the last 100 episodes of training

    def evaluate(self, episodes: int = 10, *, seed: int = 1000, stochastic: bool = False) -> Evaluation:
        """Play whole episodes with the policy as it is: its mode, or with its noise if `stochastic`."""
        return play(
            self.policy,
            self.normalizer,
            self.environment,
            episodes,
            seed=seed,
            stochastic=stochastic,
            device=self.options.device,
        )

    def save(self, directory: Path | str) -> None:
        """Write the run directory: config.json, the policy, and curve.png."""
        directory = Path(directory)
        make_directory(directory)
        write_json(directory / "config.json", self.configuration())
        save_policy(directory, self.policy, self.critic, self.normalizer)
        if self.metrics:
            draw_curve(self.metrics, f"{self.algorithm} on {label(self.environment)}", directory / "curve.png")

    def configuration(self) -> dict[str, Any]:
        """All that the run was started with."""
        return {
            "algorithm": self.algorithm,
            "environment": self.environment if isinstance(self.environment, str) else None,
            "preset": self.preset,
            "options": {name: json_number(x) for name, x in dataclasses.asdict(self.options).items()},
            "versions": {"torch": torch.__version__, "gymnasium": gymnasium.__version__},
        }

    def summary(self) -> dict[str, Any]:
        """What `policygrad train --json` prints. return_mean and return_std are of the last 100 training episodes."""
        steps = int(self.metrics[-1]["steps"]) if self.metrics else 0
        returns = torch.tensor(self.recent, dtype=torch.float64)
        return {
            "run": None if self.directory is None else str(self.directory),
            "algorithm": self.algorithm,
            "environment": label(self.environment),
            "preset": self.preset,
            "steps": steps,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(steps / max(self.seconds, 1e-9), 1),
            "return_mean": returns.mean().item() if self.recent else None,
            "return_std": returns.std(correction=0).item() if self.recent else None,
            "episodes": int(self.metrics[-1]["episodes"]) if self.metrics else 0,
        }


def play(
    policy: nn.Module,
    normalizer: ObservationNormalizer | None,
    environment: Environment,
    episodes: int,
    *,
    seed: int,
    stochastic: bool,
    device: str = "cpu",
) -> Evaluation:
    """Evaluate a policy on an environment of its own, made for the purpose where it can be."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be 0 or more and less than 2**63")
    single = isinstance(environment, gymnasium.Env)
    environments = make_environments(environment, 1 if single else max(1, min(episodes, 16)))
    with ExitStack() as stack:
        if not isinstance(environment, gymnasium.Env | VectorEnv):
            stack.callback(environments.close)
        _check_spaces(policy, environments, label(environment))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        returns, lengths = evaluate(
            policy, environments, episodes, seed=seed, stochastic=stochastic, normalizer=normalizer, device=device
        )
    return Evaluation(
        float(returns.mean()), float(returns.std()), float(lengths.mean()), episodes, [float(x) for x in returns]
    )


def evaluate_run(
    directory: Path | str, episodes: int = 10, *, seed: int = 1000, stochastic: bool = False
) -> Evaluation:
    """Evaluate the policy in a run directory, on the environment that it was trained on."""
    directory = Path(directory)
    try:
        environment = json.loads((directory / "config.json").read_text())["environment"]
    except OSError as error:
        raise UserError(f"{directory} is no run directory ({error.strerror}): give one that train wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/config.json is damaged: {error}") from error
    if environment is None:
        raise UserError(
            f"{directory} was trained on an environment that has no id: load the policy from Python with "
            "policygrad.load_policy, and hand it to policygrad.evaluate"
        )
    policy, normalizer = load_policy(directory)
    return play(policy, normalizer, environment, episodes, seed=seed, stochastic=stochastic)


def _check_spaces(policy: nn.Module, environments: VectorEnv, name: str) -> None:
    """Raise UserError for an environment of other spaces than the policy's, as far as the policy looks at them."""
    if not isinstance(policy, Policy):
        return
    described: dict[str, Any] = policy.description
    unread = ("low", "high", "dtype")  # of observations
    for what, space in (
        ("observation", environments.single_observation_space),
        ("action", environments.single_action_space),
    ):
        own, other = described[f"{what}_space"], describe(space)
        if what == "observation":
            own, other = ({key: x for key, x in d.items() if key not in unread} for d in (own, other))
        if own != other:
            spaces = (rebuild(described[f"{what}_space"]), space)
            of_policy, of_environment = (" ".join(str(x).split()) for x in spaces)
            raise UserError(
                f"the {what} space of {name} is {of_environment}, and the policy's is {of_policy}: "
                "evaluate it on the environment that it was trained on"
            )


def label(environment: Environment) -> str:
    """The name of an environment."""
    if isinstance(environment, str):
        return environment
    spec = getattr(environment, "spec", None)
    if spec is not None:
        return spec.id
    return getattr(environment, "__name__", type(environment).__name__)


def make_directory(directory: Path) -> None:
    """Make a directory that can be written. Raises UserError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be written ({error.strerror}): choose another") from error


def json_number(x: Any) -> Any:
    """JSON has no infinity."""
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
