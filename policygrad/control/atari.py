"""Atari 2600 games (`ALE/Pong-v5`) as they are learned from: gray, 84 x 84, four frames at a time.

ale-py's own vector environment preprocesses in C++. One environment gets the same here from Gymnasium's wrappers, with
the same options, so that a policy fits both.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import AtariPreprocessing, ClipReward, FrameStackObservation

NATIVE = "ale_py.vector_env:AtariVectorEnv"
# What is of training alone: a policy is judged by whole games and the game's own score.
JUDGED = {"episodic_life": False, "reward_clipping": False}


def is_preprocessed(spec: EnvSpec | None) -> bool:
    """Whether a specification is of a game that ale-py can preprocess."""
    return spec is not None and spec.vector_entry_point == NATIVE


def judged(environment: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of an environment in an evaluation: of `ALE/` ids, whole games with rewards that are not clipped."""
    of_ale = isinstance(environment, str) and environment.rpartition(":")[2].startswith("ALE/")
    return {**(options or {}), **(JUDGED if of_ale else {})}


def preprocessed(
    spec: EnvSpec,
    *,
    img_height: int = 84,
    img_width: int = 84,
    grayscale: bool = True,
    stack_num: int = 4,
    frameskip: int = 4,
    noop_max: int = 30,
    episodic_life: bool = False,
    reward_clipping: bool = True,
    use_fire_reset: bool = True,
    **options: Any,
) -> gymnasium.Env:
    """One game with observations [stack_num, img_height, img_width]. The names and defaults are ale-py's own.

    noop_max: the most actions without effect that a game begins with. episodic_life: a lost life ends the episode.
    reward_clipping: rewards from -1 to 1. use_fire_reset: press fire where that starts the game. options: of the game,
    such as repeat_action_probability.
    """
    environment = gymnasium.make(spec, frameskip=1, **options)
    if use_fire_reset and "FIRE" in environment.unwrapped.get_action_meanings()[:2]:  # type: ignore[attr-defined]
        environment = FireReset(environment)
    environment = AtariPreprocessing(
        environment, noop_max, frameskip, (img_width, img_height), episodic_life, grayscale_obs=grayscale
    )
    environment = ClipReward(environment, -1, 1) if reward_clipping else environment
    return FrameStackObservation(environment, stack_num, padding_type="zero")


class FireReset(gymnasium.Wrapper):
    """Presses fire once after each reset."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment's."""
        self.env.reset(**options)
        obs, _, _, _, info = self.env.step(1)
        return obs, info
