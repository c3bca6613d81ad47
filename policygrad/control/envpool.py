"""EnvPool: environments in C++ that a pool of threads steps together (Weng et al. 2022, arXiv 2206.10558)."""

import difflib
import warnings
from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from policygrad.errors import UserError, ending, shortened

NO_NUMBERS = ("env_id", "players", "elapsed_step")  # what EnvPool's info says of the pool itself


class EnvPool(VectorEnv):
    """`num_envs` copies of one of EnvPool's environments. Each resets on the step after its episode ends.

    name: an id that EnvPool knows. options go to envpool.make. A reset with seeds makes the pool anew, since EnvPool
    takes a seed at no other time; without one, every pool would begin with the same. Raises UserError if EnvPool is not
    installed or does not know the id.
    """

    def __init__(self, name: Any, num_envs: int, options: dict[str, Any]) -> None:
        try:
            import envpool
        except ImportError as error:
            raise UserError(
                "vectorization envpool needs EnvPool, which is not installed: pip install envpool, or choose auto"
            ) from error
        known = envpool.list_all_envs()
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "choose vectorization auto"
            raise UserError(f"EnvPool has no environment {ending(shortened(name), 60)}: {hint}")
        if "seed" in options:
            raise UserError("seed is no option of EnvPool's environments here: the seed of the run decides")
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.make = partial(envpool.make_gymnasium, name, num_envs=num_envs, **options)
        self.pool = self._seeded(np.random.SeedSequence())
        with warnings.catch_warnings(action="ignore"):  # of the precision of bounds
            self.single_observation_space = self.pool.single_observation_space
            self.single_action_space = self.pool.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.max_episode_steps = self.pool.spec.config.max_episode_steps

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """New episodes. seed: one for each copy, or one for all, from which theirs follow."""
        if seed is not None:
            self.pool.close()
            self.pool = self._seeded(np.random.SeedSequence(seed) if np.ndim(seed) == 0 else seed)
        obs, info = self.pool.reset()
        return obs, _numbers(info)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As Gymnasium's."""
        obs, reward, terminated, truncated, info = self.pool.step(actions)
        return obs, reward, terminated, truncated, _numbers(info)

    def _seeded(self, seed: Any) -> Any:
        drawn = isinstance(seed, np.random.SeedSequence)
        numbers = seed.generate_state(self.num_envs) // 2 if drawn else seed  # EnvPool's have 31 bits
        return self.make(seed=[int(x) for x in numbers])

    def close_extras(self, **options: Any) -> None:
        """End the threads."""
        self.pool.close()


def _numbers(info: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in info.items() if name not in NO_NUMBERS}
