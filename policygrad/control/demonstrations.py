"""Demonstrations: transitions of another policy, checked against the spaces of the environment, as rollouts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.control.checks import as_tensor, checked_distribution, checked_member, stored
from policygrad.control.masks import check_mask_space, check_masks, choices, is_box
from policygrad.control.memory import Rows
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.spaces import Flat, FlatActions, flat, from_environment
from policygrad.errors import UserError, listed, one_line, shortened, type_of
from policygrad.rollout import Rollout, in_parts, state_size

COLUMNS = ("observation", "action", "reward", "terminated", "truncated", "episode")
TOGETHER = 4096  # transitions that are computed at a time where nothing is learned from them


@dataclass(frozen=True)
class Transitions:
    """N decisions of a demonstrator, as the environment gives observations and takes actions.

    returns: the sum of rewards of each episode, if there are rewards. bounded: whether the data say where episodes
    end; if not, all are taken as one.
    """

    observation: np.ndarray  # [N, ...]
    action: np.ndarray  # [N, ...]
    episode: np.ndarray  # [N], the number of each one's episode, which does not decrease
    returns: np.ndarray | None
    bounded: bool

    def __len__(self) -> int:
        return len(self.episode)

    def digest(self) -> str:
        """The SHA-256 of all of them, which is another one for other transitions."""
        found = hashlib.sha256()
        for x in (self.observation, self.action, self.episode):
            found.update(f"{x.dtype} {x.shape} ".encode())
            found.update(np.ascontiguousarray(x).tobytes())
        return found.hexdigest()

    @property
    def episodes(self) -> int:
        """How many episodes they are, or parts of some."""
        return len(np.unique(self.episode))

    def take(self, index: np.ndarray) -> "Transitions":
        """Some of them."""
        return replace(
            self, observation=self.observation[index], action=self.action[index], episode=self.episode[index]
        )

    def split(self, share: float, seed: int) -> tuple["Transitions", "Transitions | None"]:
        """Those to learn from, and about a share of them for validation; whole episodes, if there are several.

        The second is None if the share is 0.
        """
        units = self.episode if self.episodes > 1 else np.arange(len(self))
        names = np.unique(units)
        if not share:
            return self, None
        if len(names) < 2:
            raise UserError("one transition cannot be learned from and held out, too: set validation to 0")
        count = min(max(1, round(share * len(names))), len(names) - 1)
        held = np.isin(units, np.random.default_rng(seed).permutation(names)[:count])
        return self.take(~held), self.take(held)


def transitions(
    columns: Mapping[str, Any], observation_space: spaces.Space, action_space: spaces.Space, *, masked: bool = True
) -> Transitions:
    """Columns of transitions, checked: every observation and action must be one of its space.

    columns: observation and action, [N, ...]; and reward, terminated, truncated and episode, [N], as far as they are
    known. Actions of a Dict are dicts, and those of a Tuple are lists; they become vectors [N, D], as FlatActions has
    them. An episode ends where one of the last three says so. The bounds of a Box hold for actions alone, as in
    sampling. masked: whether a part `action_mask` of an observation says which actions are allowed. Raises UserError
    that names the first row that is wrong, counted from 0.
    """
    if isinstance(action_space, spaces.Dict | spaces.Tuple):
        action_space = FlatActions(action_space)
    for name in COLUMNS[:2]:
        if name not in columns:
            raise UserError(f"the demonstrations have no column {name!r}, only {listed(columns)}: rename one")
    count = len(columns["action"])
    for name, column in columns.items():
        if not hasattr(column, "__len__") or len(column) != count:
            has = len(column) if hasattr(column, "__len__") else "no"
            raise UserError(
                f"the demonstrations' {shortened(name, 30)} has {has} rows, and action {count}: give one each"
            )
    if not count:
        raise UserError("the demonstrations have no rows: give at least one")
    if isinstance(observation_space, spaces.Box | spaces.Discrete):
        observation = checked_column("observation", columns["observation"], observation_space)
    else:
        observation = _flattened(columns["observation"], observation_space)
    if isinstance(action_space, FlatActions):
        action = _vectors("action", columns["action"], action_space.of)
    else:
        action = checked_column("action", columns["action"], action_space, bounded=True)
    if masked and not isinstance(observation_space, spaces.Box | spaces.Discrete):
        _check_allowed(observation, action, flat(observation_space), action_space)
    number = spaces.Box(-np.inf, np.inf, (), np.float64)
    flag = spaces.Discrete(2)
    ended = np.zeros(count, dtype=bool)
    for name in ("terminated", "truncated"):
        if name in columns:
            ended |= checked_column(name, columns[name], flag).astype(bool)
    begins = np.concatenate([[True], ended[:-1]])
    if "episode" in columns:
        named = [shortened(x) for x in columns["episode"]]
        begins[1:] |= np.array(named[1:]) != np.array(named[:-1])
    episode, returns = begins.cumsum() - 1, None
    if "reward" in columns:
        returns = np.bincount(episode, checked_column("reward", columns["reward"], number))
    return Transitions(observation, action, episode, returns, not columns.keys().isdisjoint(COLUMNS[3:]))


def checked_column(name: str, values: Any, space: spaces.Space, *, bounded: bool = False) -> np.ndarray:
    """The values as an array [N, ...] in the space's dtype. bounded: whether the bounds of a Box must hold.

    Raises UserError that names the first row that is no member of the space.
    """
    if space.shape is None or space.dtype is None:
        raise UserError(f"the {name} space is {type_of(space)}: demonstrations are for spaces of numbers; flatten it")
    if (found := _members(values, space, bounded)) is not None and isinstance(found, np.ndarray):
        return found
    for i, value in enumerate(values):
        if isinstance(wrong := _members([value], space, bounded), str):
            said = f"row {i} of the demonstrations: {name} {wrong}"
            raise UserError(f"{said}; {one_line(space, 195 - len(said))} is its space" if len(said) < 180 else said)
    raise UserError(f"the column {name} is no array of one type: give numbers, or lists of numbers")


def _flattened(values: Any, space: spaces.Space) -> np.ndarray:
    """Observations of a composite space as the environments here flatten them, [N, D]."""
    said = "row {} of the demonstrations has"
    rows: list[Any] = [spaces.flatten(space, checked_member(x, space, said.format(i))) for i, x in enumerate(values)]
    found = np.stack(rows)
    if not np.isfinite(found).all():
        i = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise UserError(f"{said.format(i)} an observation that is NaN or infinite: leave it out")
    return found


def _vectors(name: str, values: Sequence[Any], space: spaces.Space) -> np.ndarray:
    """Actions of a Dict or Tuple, nested as it may be, as vectors [N, D] of float64, each part checked as a column."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return checked_column(name, values, space, bounded=True).reshape(len(values), -1).astype(np.float64)
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else list(range(len(space.spaces)))
    for i, value in enumerate(values):
        own = (
            list(value) if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list | tuple) else ()
        )
        if isinstance(value, Mapping) != isinstance(space, spaces.Dict) or set(own) != set(keys):
            kind = (
                f"a dict with the keys {listed(map(str, keys), 60)}"
                if isinstance(space, spaces.Dict)
                else f"{len(keys)} parts"
            )
            raise UserError(f"row {i} of the demonstrations: {name} is {shortened(value, 40)}: give {kind}")
    return np.concatenate([_vectors(f"{name} {key}", [x[key] for x in values], space[key]) for key in keys], 1)  # type: ignore[index]


def _choices_of(action: np.ndarray, space: spaces.Space) -> np.ndarray:
    """What was chosen in each part of actions [N, ...] that has choices, from 0, [N, parts]; a Box has none."""
    if not isinstance(space, FlatActions):
        return from_environment(action, space).reshape(len(action), -1).astype(int)
    parts = [_choices_of(action[:, where], part) for part, where in space.parts if not is_box(part)]
    return np.concatenate(parts, 1)


def _check_allowed(observation: np.ndarray, action: np.ndarray, space: spaces.Space, action_space: Any) -> None:
    """Raise UserError for masks of actions that make no sense, and for an action that its mask forbids."""
    if not isinstance(space, Flat) or space.mask is None:
        return
    check_mask_space(space, action_space)
    check_masks(observation, np.ones(len(action), dtype=bool), space, action_space, "row")
    first = np.cumsum([0, *choices(action_space)[:-1]])  # the place of each part's first choice
    chosen = first + _choices_of(action, action_space)
    allowed = np.take_along_axis(observation[:, space.mask], chosen, 1).all(1)
    if not allowed.all():
        i = int(np.flatnonzero(~allowed)[0])
        raise UserError(
            f"row {i} of the demonstrations: action is {shortened(action[i].tolist(), 40)}, which its action_mask "
            "forbids: leave it out, or set action_mask off"
        )


def _members(values: Any, space: spaces.Space, bounded: bool) -> np.ndarray | str:
    """Values as an array of members of a space, or what is wrong with the one value."""
    shown = shortened(values[0], 40)
    try:
        array = np.asarray(values)
    except ValueError:
        return f"is {shown}, whose lists differ in length"
    if array.dtype.kind not in "biuf":
        return f"is {shown}, which is no number"
    if array.shape[1:] != space.shape:
        return f"has shape {array.shape[1:]}, not {space.shape}"
    if not np.isfinite(array).all():
        return f"is {shown}, which is not finite"
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(space.dtype)
        changed = np.isinf(cast) if cast.dtype.kind == "f" else cast != array
    if changed.any():
        return f"is {shown}, which is no {cast.dtype} number"
    low, high = _bounds(space, bounded)
    return cast if bool(((cast >= low) & (cast <= high)).all()) else f"is {shown}, which is outside"


def _bounds(space: Any, bounded: bool) -> tuple[Any, Any]:
    """The least and the largest numbers of a space."""
    match space:
        case spaces.Discrete():
            return space.start, space.start + space.n - 1
        case spaces.MultiDiscrete():
            return space.start, space.start + space.nvec - 1
        case spaces.MultiBinary():
            return 0, 1
        case spaces.Box() if bounded:
            return space.low, space.high
    return -np.inf, np.inf


class Layout(NamedTuple):
    """Where transitions stand in the rows of a rollout."""

    which: np.ndarray  # [B, T], the number of each; any behind the mask
    start: np.ndarray  # [B, T], whether an episode starts here
    mask: np.ndarray  # [B, T]

    def share(self) -> "Layout":
        """The rows of this rank."""
        return Layout(*(x[ranks.share(len(self.mask))] for x in self))

    def of(self, x: Tensor) -> Tensor:
        """What each transition has [N, ...], as rows [B, T, ...]. Rows of one step are a view: they are in order."""
        if self.which.shape[1] == 1:
            return x[self.which[0, 0] : self.which[-1, 0] + 1].unsqueeze(1)
        return x[torch.from_numpy(self.which).to(x.device)]


def layout_of(policy: nn.Module, found: Transitions, sequence_length: int | None = None) -> Layout:
    """Rows of one transition each; of a policy with memory whole episodes, as in_rows says.

    Raises UserError for a policy with memory if nothing says where episodes start.
    """
    if not state_size(policy):
        everywhere = np.ones((len(found), 1), bool)
        return Layout(np.arange(len(found))[:, None], everywhere, everywhere)
    if not found.bounded:
        raise UserError(
            "a policy with memory needs to know where episodes start: give the demonstrations a column episode, "
            "terminated or truncated"
        )
    return in_rows(found.episode, width_of(found, sequence_length))


def width_of(found: Transitions, sequence_length: int | None) -> int:
    """The steps of a row of whole episodes: those of the longest, and up to whole pieces of `sequence_length`."""
    longest = int(np.unique(found.episode, return_counts=True)[1].max())
    return longest if sequence_length is None else -(-longest // sequence_length) * sequence_length


def in_rows(episode: np.ndarray, width: int) -> Layout:
    """Whole episodes in rows of `width` steps, in their order: each goes after the one before if there is room.

    Fewer than half of all steps are behind the mask, but for the last row. episode: [N], the number of each
    transition's, which does not decrease.
    """
    _, first, lengths = np.unique(episode, return_index=True, return_counts=True)
    places, row, used = np.empty_like(first), 0, 0
    for i, length in enumerate(lengths):
        if used + length > width:
            row, used = row + 1, 0
        places[i] = row * width + used
        used += length
    index = np.zeros((row + 1) * width, int)
    start, mask = np.zeros_like(index, bool), np.zeros_like(index, bool)
    place = np.repeat(places - first, lengths) + np.arange(len(episode))
    index[place], start[places], mask[place] = np.arange(len(episode)), True, True
    index = np.maximum.accumulate(index)  # behind the mask, the one before: any observation of the space
    return Layout(*(x.reshape(row + 1, width) for x in (index, start, mask)))


class Demonstrations:
    """A sampler that returns the same transitions each time, each in a row of its own: for credit.demonstrated. Of
    several ranks, each returns its share of the rows.

    Of a policy with memory rows are whole episodes, one after another where there is room, so that the gradient is that
    of the likelihood of whole episodes. sequence_length: rows may be cut into pieces of so many steps, each with the
    memory that the policy of this call has before it; None: they stay whole.

    normalizer: its statistics are those of the transitions, until others are loaded; observations are normalized by
    them as they are at the first call. Rollout.metrics: steps, the decisions so far. Raises UserError for a policy with
    memory if the transitions do not say where episodes start.
    """

    whole_episodes = False

    def __init__(
        self,
        found: Transitions,
        action_space: spaces.Space,
        *,
        normalizer: ObservationNormalizer | None = None,
        sequence_length: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.found, self.action_space, self.normalizer = found, action_space, normalizer
        self.length = width_of(found, sequence_length)  # of rows of a policy with memory
        self.pieces = self.length // (sequence_length or self.length)
        self.sequence_length, self.device, self.steps = sequence_length, torch.device(device), 0
        self.rollout: Rollout | None = None
        if normalizer is not None:
            normalizer(found.observation, np.ones(len(found), dtype=bool))

    def __call__(self, policy: nn.Module) -> Rollout:
        """All of them."""
        policy.eval()
        if self.rollout is None:
            layout = layout_of(policy, self.found, self.sequence_length)
            own = self.action_space, self.normalizer, self.device
            self.rollout = demonstrated(policy, self.found, *own, layout.share())
        rollout = self.rollout
        self.steps += int(rollout.mask.sum())
        rollout.metrics["steps"] = float(self.steps)
        if rollout.memoryless or self.pieces == 1:
            return rollout
        return replace(rollout, obs=with_states(policy, rollout.obs, self.pieces), pieces=self.pieces)

    def state_dict(self) -> dict[str, Any]:
        """The number of decisions so far, and the statistics of observations."""
        seen = {} if self.normalizer is None else self.normalizer.statistics.state_dict()
        return {"steps": self.steps, "observations": {name: torch.from_numpy(x) for name, x in seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        self.steps, self.rollout = state["steps"], None
        if self.normalizer is not None:
            self.normalizer.statistics.load_state_dict({name: np.array(x) for name, x in state["observations"].items()})

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """Go on from the states of another number of ranks. Nothing is drawn: each has its share of the transitions."""
        self.load_state_dict(states[0] | {"steps": ranks.portion(sum(x["steps"] for x in states))})


@torch.no_grad()
def demonstrated(
    policy: nn.Module,
    found: Transitions,
    action_space: spaces.Space,
    normalizer: ObservationNormalizer | None = None,
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
) -> Rollout:
    """Transitions as rows, their actions as the policy's distribution scores them. layout: by default layout_of's.

    Raises UserError for a distribution that changes actions on the way to the environment, and not back.
    """
    observation = found.observation
    if normalizer is not None:
        observation = normalizer(observation, np.zeros(len(found), dtype=bool))
    layout = layout_of(policy, found) if layout is None else layout
    start, mask = (torch.from_numpy(x).to(device) for x in (layout.start, layout.mask))
    obs: Any = layout.of(as_tensor(stored(observation), torch.device(device)))
    if size := state_size(policy):
        empty = policy.initial(len(mask)).unsqueeze(1)  # type: ignore[operator]
        obs = Rows(obs, start, empty, empty[..., :0])
    distribution = checked_distribution(policy(tree_map(lambda x: x[:1, :1], obs)), 1, action_space)
    if hasattr(distribution, "from_environment"):
        action = distribution.from_environment(found.action)
    elif hasattr(distribution, "to_environment"):
        raise UserError(
            f"the policy's {type(distribution).__name__} has to_environment and not its inverse: give it "
            "from_environment(action [B, ...]) -> [B, D]"
        )
    else:
        action = from_environment(found.action, action_space)
    numbers = torch.from_numpy(action)
    numbers = numbers.to(torch.get_default_dtype()) if numbers.is_floating_point() else numbers
    numbers = layout.of(numbers.to(device).reshape(len(found), *distribution.event_shape))
    nothing = torch.zeros(mask.shape, device=device)
    ended = ~mask | (start | ~mask).roll(-1, 1)  # a row's first step is a start: the last one ends before it
    return Rollout(
        obs, numbers, nothing, nothing, ended, ended, mask,
        group=torch.arange(len(mask), device=device), memoryless=not size,
    )  # fmt: skip


@torch.no_grad()
def with_states(policy: nn.Module, rows: Rows, pieces: int) -> Rows:
    """Rows from the empty memory on, with the policy's memory before each of so many equal pieces of them."""

    def before(rows: Rows) -> Tensor:
        found, width = [rows.state[:, 0]], rows.start.shape[1] // pieces
        for k in range(pieces - 1):
            part = slice(k * width, (k + 1) * width)
            state = found[-1].unsqueeze(1)
            _, after = policy.unrolled(Rows(rows.obs[:, part], rows.start[:, part], state, state[..., :0]))  # type: ignore[operator]
            found.append(after)
        return torch.stack(found, 1)

    states = in_parts(before, max(1, TOGETHER // rows.start.shape[1]), rows)
    return rows._replace(state=states, critic_state=states[..., :0])


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of transitions as columns. Raises UserError for a row that lacks a column of the first one."""
    names = list(rows[0]) if rows else []
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            name = min(row.keys() ^ rows[0].keys())
            which = (i, "has no") if name in names else (i, "alone has")
            raise UserError(f"row {which[0]} of the demonstrations {which[1]} {shortened(name, 40)}: give all the same")
    return {name: [row[name] for row in rows] for name in names}
