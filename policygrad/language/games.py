"""Gymnasium's environments as conversations: observations are said, and turns are read as actions."""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from policygrad.errors import UserError, ending, type_of
from policygrad.language.conversations import Messages


class TextGame:
    """An environment of Gymnasium to talk to: reset with the conversation's seed, a step for each turn of the policy.

    game: an id, or what makes the environment. say: (observation) -> text; by default the observation is text.
    actions: (text) -> action, or a dict of them by their names; by default the action is the text. A turn that is no
    action (None, or no name) is answered by `again`, without a step or a reward. rules: said before the first
    observation.

    Raises UserError for an environment of no text without `say` or `actions`.
    """

    def __init__(
        self,
        game: str | Callable[[], gymnasium.Env],
        *,
        say: Callable[[Any], str] | None = None,
        actions: Callable[[str], Any] | Mapping[str, Any] | None = None,
        rules: str = "",
        again: str = "That is no action.",
    ) -> None:
        self.game: gymnasium.Env = gymnasium.make(game) if isinstance(game, str) else game()
        for space, given, what in (
            (self.game.observation_space, say, "say"),
            (self.game.action_space, actions, "actions"),
        ):
            if given is None and not isinstance(space, Text):
                raise UserError(f"{ending(str(game), 40)} has no text but {type_of(space)}: give {what}")
        self.say = str if say is None else say
        self.actions = actions.get if isinstance(actions, Mapping) else actions or str
        self.rules, self.again = rules, again

    def reset(self, seed: int) -> Messages:
        """The rules and the first observation."""
        observation, _ = self.game.reset(seed=seed)
        return [{"role": "user", "content": self.rules + self.say(observation)}]

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """The observation after the action that the text is. A time limit is an end too."""
        action = self.actions(text.strip())
        if action is None:
            return [{"role": "user", "content": self.again}], 0.0, False
        observation, reward, terminated, truncated, _ = self.game.step(action)
        if terminated or truncated:
            return None, float(reward), True
        return [{"role": "user", "content": self.say(observation)}], float(reward), False
