"""What `policygrad verify` may be asked. No torch here: the command line reads it before anything is computed."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VerifyOptions:
    """Hold every estimator, method and update against the exact gradient of small worlds."""

    estimator: str | None = None
    """Your own advantage function, `module:function` or `file.py:function`, put into the same tables. It is
    called as the library's are, `my_advantage(reward, value, terminated, ended, gamma)`, and returns [B, T]; value is
    [B, T + 1]."""

    loss: str | None = None
    """Your own loss, `module:function` or `file.py:function`, with the arguments of verl's, OpenRLHF's or TRL's: its
    gradient on the world of tokens, which method has the same, and what it must not depend on."""

    world: Literal["all", "random", "cliff", "chain", "bandit", "tokens", "conversations"] = "all"
    """The world whose rows are shown; `all` runs every one, and the updates too."""

    samples: int = 20_000
    """Episodes drawn where a world is too large to enumerate, and the number at which z is given."""

    seed: int = 0
    """Of the random world, the policies and the samples."""

    json: bool = False
    """Print one JSON object instead of the tables."""
