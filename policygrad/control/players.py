"""Games of several players: PettingZoo's environments (Terry et al. 2021, arXiv 2009.14471).

In a parallel environment all agents act at once. There the rows of a vector environment are agents: one policy acts for
each of them from what that agent sees, so its parameters are shared.
"""

import difflib
import hashlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from policygrad.control.checks import checked_flag, checked_member, checked_number, finite_numbers
from policygrad.control.replay import LONGEST, digest
from policygrad.control.spaces import AGENT, MASK
from policygrad.errors import Note, UserError, listed, one_line, shortened

# Ids of PettingZoo's families: how they begin, the package of their modules, and what to install.
FAMILIES = {
    "atari": ("pettingzoo.atari", "pettingzoo[atari]"),
    "butterfly": ("pettingzoo.butterfly", "pettingzoo[butterfly]"),
    "classic": ("pettingzoo.classic", "pettingzoo[classic]"),
    "mpe2": ("mpe2", "mpe2"),
    "sisl": ("pettingzoo.sisl", "pettingzoo[sisl]"),
}


class GameFound(UserError):
    """A callable that should make a Gymnasium environment has made one of PettingZoo, which is `environment`."""

    def __init__(self, environment: Any) -> None:
        super().__init__("games of several agents are stepped one after another, not in processes: leave async out")
        self.environment = environment


def is_game(thing: Any) -> bool:
    """Whether an object is an environment as PettingZoo has them: its spaces are functions of the agent."""
    return all(callable(getattr(thing, x, None)) for x in ("reset", "step", "observation_space", "action_space"))


def game(name: str, options: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What makes the environment of an id such as `sisl/pursuit-v5`; None for the id of another library.

    A family's module is imported by this rule alone: FAMILY/NAME-vN is parallel_env, or else env, of its module
    NAME_vN. Raises UserError for one that is unknown or not installed.
    """
    family, _, last = name.partition("/")
    if family not in FAMILIES or ":" in name:
        return None
    package, extra = FAMILIES[family]
    if find_spec(package.partition(".")[0]) is None:
        raise UserError(f"unknown environment {shortened(name)}: install its package, with pip install {extra}")
    module = last.replace("-", "_")
    known = [x.name for x in pkgutil.iter_modules(import_module(package).__path__) if re.search(r"_v\d+$", x.name)]
    if module not in known:
        near = difflib.get_close_matches(module, known, n=1, cutoff=0.5) or known
        ids = [f"{family}/{'-v'.join(x.rsplit('_v', 1))}" for x in near]
        raise UserError(f"unknown environment {shortened(name)}: did you mean {listed(ids, 90)}?")
    try:
        found = import_module(f"{package}.{module}")
    except ImportError as error:
        said = f"{name} needs a package that is not installed ({one_line(error, 60)})"
        raise UserError(f"{said}: pip install '{extra}'") from error
    return partial(getattr(found, "parallel_env", None) or found.env, **options)


def takes_turns(thing: Any) -> bool:
    """Whether the agents of a game act one after another (PettingZoo's agent environment cycle)."""
    return is_game(thing) and callable(getattr(thing, "last", None)) and callable(getattr(thing, "agent_iter", None))


def shared_space(environment: Any, agents: list[Any], what: str) -> spaces.Space:
    """The space of every agent's observations or actions. Raises UserError if they differ, or if there is no agent."""
    if not agents:
        raise UserError("the environment's possible_agents names no agent: list there all that may ever act")
    pad = "pad_observations_v0" if what == "observation" else "pad_action_space_v0"
    found = [getattr(environment, f"{what}_space")(x) for x in agents]
    for agent, space in zip(agents, found, strict=True):
        if space != found[0]:
            shown = [f"{one_line(x, 16)} {one_line(y, 26)}" for x, y in ((agents[0], found[0]), (agent, space))]
            said = f"agents share one policy, and their {what} spaces differ ({', '.join(shown)})"
            raise UserError(f"{said}: pad them, as by supersuit.{pad}")
    return found[0]


class Game:
    """One game of a parallel environment: what each agent saw last, which of them act next, and how to play it again.

    alive [A]: the agents that act in the next step; none once the game is over. Each reset has a seed of this game's
    own generator, so that a game follows from that number and its actions.
    """

    def __init__(self, environment: Any, agents: list[Any], space: spaces.Space) -> None:
        self.environment, self.agents, self.space = environment, agents, space
        self.generator = np.random.default_rng()
        self.alive = np.zeros(len(agents), dtype=bool)
        self.obs: list[Any] = []  # of each agent; of one that does not act, any in the space
        self.seed, self.total = 0, 0.0
        self.actions: list[np.ndarray] | None = []  # since the reset, [A, ...] each; None if they are not kept

    def reset(self, seed: int | None = None) -> list[dict[str, Any]]:
        """A new game, by default of the generator's next seed. Returns the info of each agent."""
        self.seed = int(self.generator.integers(2**31)) if seed is None else seed
        self.total, self.actions = 0.0, []
        obs, infos = self.environment.reset(seed=self.seed)
        self.alive = self._alive()
        if not self.alive.any():
            raise UserError("no agent is in the environment's agents after reset: add those that act first")
        seen = {i: self._seen(obs, i, "reset") for i in np.flatnonzero(self.alive).tolist()}
        self.obs = [seen.get(i, next(iter(seen.values()))) for i in range(len(self.agents))]
        return self._infos(infos)

    def step(
        self, actions: list[Any], numbers: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Reward, terminated and truncated [A], and infos; 0 and False for agents that did not act.

        actions: one for each agent. numbers: the same as one array, to be kept.
        """
        if numbers is None or self.actions is None or len(self.actions) >= LONGEST:
            self.actions = None
        else:
            self.actions.append(numbers.copy())
        acting = self.alive
        chosen = {self.agents[i]: actions[i] for i in np.flatnonzero(acting)}
        obs, rewards, terminations, truncations, infos = self.environment.step(chosen)
        self.alive = self._alive()
        reward = np.zeros(len(self.agents))
        terminated, truncated = np.zeros_like(acting), np.zeros_like(acting)
        for i in np.flatnonzero(acting).tolist():
            reward[i] = checked_number(self._of(rewards, i, "step", "reward"))
            terminated[i] = checked_flag(self._of(terminations, i, "step", "terminated"), "terminated")
            truncated[i] = checked_flag(self._of(truncations, i, "step", "truncated"), "truncated")
            if (over := bool(terminated[i] or truncated[i])) == self.alive[i]:
                how = "has ended and is still" if over else "has not ended and is no longer"
                raise UserError(f"agent {self._name(i)} {how} in the environment's agents: fix its step")
        for i in np.flatnonzero(acting | self.alive).tolist():
            last = acting[i] and terminated[i]  # from which no value comes
            if not last or (isinstance(obs, Mapping) and self.agents[i] in obs):
                self.obs[i] = self._seen(obs, i, "step")
        self.total += float(reward.sum())
        return reward, terminated, truncated, self._infos(infos)

    def state_dict(self) -> dict[str, Any]:
        """The game so far, to be played again."""
        kept = None if self.actions is None else np.array(self.actions)
        drawn = self.generator.bit_generator.state
        return {"generator": drawn, "seed": self.seed, "actions": kept, "reached": self._reached()}

    def load_state_dict(self, state: dict[str, Any], action_space: spaces.Space) -> bool:
        """Play a game again. Returns whether it came to where it was. action_space: of all agents together."""
        self.generator.bit_generator.state = state["generator"]
        if state["actions"] is None:
            return False
        self.reset(int(state["seed"]))
        for numbers in np.asarray(state["actions"]):
            self.step(list(iterate(action_space, numbers)), numbers)
        return self._reached() == state["reached"]

    def _reached(self) -> str:
        found = hashlib.sha256(repr((self.total, self.alive.tolist())).encode())
        digest(self.obs, found.update)
        return found.hexdigest()

    def _alive(self) -> np.ndarray:
        now = self.environment.agents
        if (other := [x for x in now if x not in self.agents]) != []:
            raise UserError(
                f"agent {shortened(other[0], 40)} is not in the environment's possible_agents: name all agents there"
            )
        return np.array([x in now for x in self.agents])

    def _seen(self, obs: Any, i: int, method: str) -> Any:
        found = self._of(obs, i, method, "observation")
        return checked_member(found, self.space, f"the environment's {method} returned, for agent {self._name(i)},")

    def _of(self, found: Any, i: int, method: str, what: str) -> Any:
        """Agent i's entry in one of the dicts that the environment returned."""
        try:
            return found[self.agents[i]]
        except (KeyError, TypeError, IndexError) as error:
            said = f"the environment's {method} returned no {what} for agent {self._name(i)}"
            raise UserError(f"{said}: return dicts with an entry for each agent that acts") from error

    def _infos(self, infos: Any) -> list[dict[str, Any]]:
        return [(infos.get(x) if isinstance(infos, Mapping) else None) or {} for x in self.agents]

    def _name(self, i: int) -> str:
        return one_line(self.agents[i], 40)


class Agents(VectorEnv):
    """Games of a PettingZoo parallel environment, side by side. Each row is an agent: those of the first game first.

    environments: one for each game. A row acts while its agent lives; the next game of its own begins when the last of
    the agents has ended, in the step after that. waiting [B]: rows that the next step does not ask for a decision,
    since their agents have ended, are not there yet, or are in a game that is over. separate: observations say whose
    they are, in the key `agent_index` of a Dict beside their own keys (or `observation`), so that each agent may have a
    policy of its own.

    The seed of a reset decides all games to come. Raises UserError for agents of different spaces, and for an
    environment that breaks PettingZoo's rules about who is in `agents`.
    """

    def __init__(self, environments: list[Any], separate: bool = False) -> None:
        first = environments[0]
        self.agents = list(getattr(first, "possible_agents", ()))
        of_agent = shared_space(first, self.agents, "observation")
        self.separate, self.single_observation_space = separate, of_agent
        if separate:
            keys = of_agent.spaces if isinstance(of_agent, spaces.Dict) else {"observation": of_agent}
            self.single_observation_space = spaces.Dict({**keys, AGENT: spaces.Discrete(len(self.agents))})
        self.single_action_space = shared_space(first, self.agents, "action")
        self.games = [Game(x, self.agents, of_agent) for x in environments]
        self.num_envs, self.metadata = len(self.games) * len(self.agents), {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.max_episode_steps = getattr(getattr(first, "unwrapped", first), "max_cycles", None)
        self.waiting = np.ones(self.num_envs, dtype=bool)
        self.acted: np.ndarray | None = np.zeros(len(self.agents), dtype=bool)  # None: that was said

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """New games. seed: one for all, from which those of the games follow."""
        if seed is not None:
            for one, its in zip(self.games, np.random.SeedSequence(seed).spawn(len(self.games)), strict=True):
                one.generator = np.random.default_rng(its)
        infos = [info for one in self.games for info in one.reset()]
        self._mark()
        return self._batch(), self._together(infos, np.zeros(self.num_envs, bool))

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As Gymnasium's; the reward of a row that did not act is 0."""
        each, count = list(iterate(self.action_space, actions)), len(self.agents)
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = []
        for k, one in enumerate(self.games):
            its = slice(k * count, (k + 1) * count)
            if not one.alive.any():
                infos += one.reset()
                continue
            if self.acted is not None:
                self.acted |= one.alive
            numbers = actions[its] if isinstance(actions, np.ndarray) else None
            reward[its], terminated[its], truncated[its], of_game = one.step(each[its], numbers)
            infos += of_game
            if not one.alive.any():
                self._over()
        self._mark()
        return self._batch(), reward, terminated, truncated, self._together(infos, terminated | truncated)

    def state_dict(self) -> dict[str, Any]:
        """The games so far, to be played again."""
        return {"games": [x.state_dict() for x in self.games]}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Play the games of a state_dict again. Returns whether they came to where they were."""
        space = batch_space(self.single_action_space, len(self.agents))
        same = [x.load_state_dict(one, space) for x, one in zip(self.games, state["games"], strict=True)]
        self._mark()
        return all(same)

    def _over(self) -> None:
        """A game has ended: the first time, say which agents have not acted in any."""
        if self.acted is not None and not self.acted.all():
            idle = [str(x) for x, acted in zip(self.agents, self.acted, strict=True) if not acted]
            said = f"{listed(idle, 60)} of the environment's possible_agents did not act in the first game"
            warnings.warn(f"{said}: rows of agents that never act count for nothing", Note, stacklevel=5)
        self.acted = None

    def _mark(self) -> None:
        self.waiting = ~np.concatenate([x.alive for x in self.games])

    def _batch(self) -> Any:
        rows = [x for one in self.games for x in one.obs]
        if self.separate:
            parts = ((x if isinstance(x, Mapping) else {"observation": x}) for x in rows)
            rows = [{**x, AGENT: k % len(self.agents)} for k, x in enumerate(parts)]
        empty: Any = create_empty_array(self.single_observation_space, len(rows))
        return concatenate(self.single_observation_space, rows, empty)

    def _together(self, infos: list[dict[str, Any]], ended: np.ndarray) -> dict[str, Any]:
        """The numbers of infos at the ends of episodes, and masks of actions, as Gymnasium has them."""
        found: dict[str, Any] = {}
        for i in np.flatnonzero(ended):
            found = self._add_info(found, finite_numbers(infos[i]), int(i))
        if any(MASK in x for x in infos):
            found |= {MASK: [x.get(MASK) for x in infos], f"_{MASK}": np.array([MASK in x for x in infos])}
        return found

    def close_extras(self, **options: Any) -> None:
        """Close the games."""
        for one in self.games:
            one.environment.close()


def agents_of(environments: VectorEnv) -> int:
    """How many rows of a vector environment are of one game."""
    base = environments.unwrapped
    return len(base.agents) if isinstance(base, Agents) else 1
