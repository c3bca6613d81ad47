"""What several ranks learn, each from its own rows, and what one process learns from the rows of all."""

import socket
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from policygrad import ranks
from policygrad.control import Critic, Policy
from policygrad.rollout import Rollout
from policygrad.train.compose import assemble
from policygrad.train.methods import METHODS
from policygrad.train.options import has_critic, options_of

OBSERVATIONS, ACTIONS = spaces.Box(-1, 1, (3,)), spaces.Discrete(4)
EXACT: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.3, "minibatch_size": None, "max_grad_norm": 0.5}
FITTED: dict[str, Any] = {"critic_learning_rate": 0.1, "critic_epochs": 1, "critic_minibatch_size": 1000}
WEIGHTS = ("token", "row", "episode", "budget")
# Rows of two and three ranks, in groups of two; a negative number of rows is masked whole; `cut` parts a group.
LAYOUTS: dict[str, tuple[int, ...]] = {
    "even": (4, 4),
    "uneven": (6, 2),
    "empty": (6, -2),
    "cut": (5, 3),
    "three": (2, 4, -2),
}
ONCE = {"dapo": {"sampling_rounds": 1}}  # several ranks fill their rows apart, and sample more
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo, adaptive penalty": ("ppo", {"kl_old_coefficient": 1.0, "kl_old_target": 1e-3, "target_kl": 0.02}),
    "ppo, micro-batches": ("ppo", {"micro_batch": 3}),
    "ppo, Adam": ("ppo", {"optimizer": "adam"}),
    "ppo of groups": ("ppo", {"credit": "group"}),
    "grpo to a reference": ("grpo", {"kl_ref": "loss", "kl_ref_target": 0.01, "epochs": 2}),
    "grpo, KL in the reward": ("grpo", {"kl_ref": "reward", "kl_ref_target": 0.01}),
    "actor-critic, standardized": ("actor_critic", {"normalize_advantages": "batch", "entropy_coefficient": 0.1}),
    "reinforce, mean": ("reinforce", {"baseline": "mean"}),
    "reinforce, time mean": ("reinforce", {"baseline": "time_mean"}),
    "reinforce, optimal": ("reinforce", {"baseline": "optimal"}),
    "reinforce, entropy": ("reinforce", {"entropy_coefficient": 0.1}),
    "npg, learning rate": ("npg", {"step_rule": "learning_rate"}),
    "grpo, exact noise": ("grpo", {"gradient_noise": "exact"}),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} by {x}": (name, {"weights": x, **ONCE.get(name, {})}) for name in METHODS for x in WEIGHTS},
    **MORE,
}


class Problem:
    """A policy, a critic, and the rows of each rank, all decided by a seed."""

    def __init__(self, layout: str) -> None:
        torch.manual_seed(7)
        self.policy, self.critic = Policy(OBSERVATIONS, ACTIONS, hidden=(5,)), Critic(OBSERVATIONS, hidden=(5,))
        self.parts: list[Rollout] = []
        first = 0
        for i, rows in enumerate(LAYOUTS[layout]):
            self.parts.append(self._rows(abs(rows), 5 - i % 2, first, counts=rows > 0))
            first += abs(rows)

    def _rows(self, rows: int, steps: int, first: int, counts: bool) -> Rollout:
        obs, mask = torch.randn(rows, steps, 3), torch.rand(rows, steps) < 0.7
        mask = mask.index_fill(1, torch.tensor(0), True) & counts
        with torch.no_grad():
            action = self.policy(obs).sample()
            logp = self.policy(obs).log_prob(action) + 0.2 * torch.randn(rows, steps)
        ended = torch.zeros(rows, steps, dtype=torch.bool)
        ended[:, -1] = True  # longer rows get holes after it
        group = (first + torch.arange(rows)) // 2
        columns = (obs, action, logp, torch.randn(rows, steps), ended, ended, mask, group)
        return Rollout(*columns, memoryless=False, greedy=torch.arange(first, first + rows) / 10)

    def learner(self, case: str, rollout: Rollout) -> Any:
        """The method on a copy of the policy, always on this rollout."""
        method, values = CASES[case]
        values = (
            {"epochs": 2, **values} if "epochs" in {f.name for f in fields(options_of(method, "control"))} else values
        )
        kind = options_of(method, "control")
        known = {name: x for name, x in EXACT.items() if hasattr(kind(), name)}
        if has_critic(kind(**{name: x for name, x in values.items() if name in ("credit", "baseline")})):
            known |= {name: x for name, x in FITTED.items() if hasattr(kind(), name)}
            known |= {} if hasattr(kind(), "critic_epochs") else {"critic_learning_rate": 0.1}
        if not hasattr(kind(), "learning_rate") and "critic_learning_rate" not in known:
            known.pop("optimizer", None)
        if values.get("optimizer") == "adam":
            known["learning_rate"] = 0.01
        if method == "maxrl":  # which takes no negative rewards
            rollout = replace(rollout, reward=rollout.reward.abs())
        policy, critic = deepcopy((self.policy, self.critic))
        return assemble(method, policy, lambda _: replace(rollout), critic=critic, **(known | values)), policy, critic


def learned(learner: Any, *modules: nn.Module) -> tuple[Tensor, list[dict[str, float]]]:
    """The parameters after two iterations, and their metrics."""
    rows, iterator = [], iter(learner)
    for _ in range(2):
        metrics = next(iterator)
        if learner.meter is not None:
            metrics = {**metrics, **learner.meter.found}
            learner.meter.begin()
        rows.append({name: float(x) for name, x in metrics.items()})
    return torch.cat([p.detach().reshape(-1) for module in modules for p in module.parameters()]), rows


def alone(case: str, layout: str) -> tuple[Tensor, list[dict[str, float]]]:
    """What one process learns from all rows."""
    problem = Problem(layout)
    return learned(*problem.learner(case, Rollout.join(problem.parts)))


def as_rank(case: str, layout: str) -> tuple[Tensor, list[dict[str, float]]]:
    """What this rank has learned from its own rows."""
    problem = Problem(layout)
    return learned(*problem.learner(case, problem.parts[ranks.rank()]))


class Messages(TorchDispatchMode):
    """Counts what torch.distributed is asked for inside the block: calls by their kind, and the bytes handed in."""

    SENT = {"allreduce_": 0, "allgather_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = dict.fromkeys(self.SENT, 0), dict.fromkeys(self.SENT, 0)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.partition("::")[2]
            given = arguments[self.SENT[name]]  # a kind that is not known is an error
            self.calls[name] += 1
            self.bytes[name] += sum(x.nbytes for x in (given if isinstance(given, list | tuple) else [given]))
        return function(*arguments, **(options or {}))


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def spawned(work: Callable[[], Any], place: Path) -> list[dict[str, Any]]:
    """What two ranks, each a process, make of the work. place: a directory of their own."""
    torch.multiprocessing.spawn(worker, (free_port(), str(place), work), nprocs=2)
    return [torch.load(place / str(i), weights_only=False) for i in range(2)]


def worker(rank: int, port: int, place: str, work: Callable[[], Any]) -> None:
    """A process of a group: what it makes of the work is in a file of its own."""
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks.join()
    torch.save(work(), f"{place}/{rank}")
    ranks.leave()
