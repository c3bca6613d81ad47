"""Sampling a Gymnasium vector environment: (policy) -> Rollout."""

import math
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.control.acting import Mode
from policygrad.control.actors import Actor, PerceptronActor, actor, not_finite
from policygrad.control.checks import Arrays, as_tensor, check_entropy, check_memory, stored_dtype
from policygrad.control.distributions import ClippedNormal, JointActions, ScaledBeta, SquashedNormal
from policygrad.control.memory import Rows
from policygrad.control.memoryless import STEPS, refuse_memory
from policygrad.control.normalization import ObservationNormalizer, RewardScaler, RunningStatistics
from policygrad.control.spaces import Flat, FlatActions, to_environment, units
from policygrad.control.stepping import Stepping
from policygrad.control.tensor_sampling import TensorActor, TensorStepping
from policygrad.control.tensors import TensorEnvironments
from policygrad.errors import NonFiniteError, UserError, one_line
from policygrad.rollout import Rollout, state_size

CAPACITY = 128  # steps that rows of whole episodes have room for at first


class Sampler:
    """Steps a vector environment and returns its experience as rows of `steps` steps, one row per environment.

    With `whole_episodes` every row is one episode from its start, masked after its end, and cut at `steps`; rows are as
    long as the longest episode, and one step more for its final observation if `steps` allows. Otherwise episodes
    continue from one rollout to the next, and a row goes on with the next episode. The step on which an environment
    resets is no decision: it is masked, it cuts every trace (`ended`), and no statistic counts it.

    groups: None makes every row its own group, "all" puts all rows of all ranks in one, and k (with whole_episodes)
    makes groups of k rows that start from the same state. seed: of the environments and of the actions' noise; without
    one, torch's generator decides the noise. (A policy of the user's own class draws from that in any case.)
    observation_normalizer and reward_scaler: running statistics, part of the state. The policy is put in evaluation
    mode: with dropout the scored policy would differ from the sampled one.

    greedy: with whole_episodes, before each rollout the policy's mode plays an episode from every start that follows
    (Rollout.greedy); it counts in no metric or statistic.

    packed: keep observations with images among other numbers as bytes (see Flat), which policygrad's own policies and
    critics read; others get vectors of floats, with one for each pixel.

    Of a policy with memory, observations are Rows. sequence_length: rows may be cut into pieces of so many steps, each
    with the memory before it; None: they stay whole. critic: one with memory of its own, which Rows then have too.

    Rollout.metrics: steps (decisions so far); over the last 100 episodes return and length, unscaled, and the numbers
    in their infos; reward_per_step of this rollout, unscaled; where groups have several rows, group_std and flat_groups
    of the rows' total rewards; for a Box, those of action_metrics. Raises UserError if the environment raises or
    returns an invalid value, if the policy returns no distribution of actions, if one or its log-probability is not
    finite, and if the policy's output depends on other steps of its row, but it has no `initial` (memory.state_size).
    """

    def __init__(
        self,
        environments: VectorEnv,
        steps: int,
        *,
        seed: int | np.random.SeedSequence | None = None,
        whole_episodes: bool = False,
        groups: int | str | None = None,
        observation_normalizer: ObservationNormalizer | None = None,
        reward_scaler: RewardScaler | None = None,
        sequence_length: int | None = None,
        critic: nn.Module | None = None,
        greedy: bool = False,
        packed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if steps < 1:
            raise UserError(f"steps is {steps}: a rollout needs at least one")
        if sequence_length is not None and (whole_episodes or steps % sequence_length):
            rows = "whole episodes" if whole_episodes else f"{steps} steps"
            raise UserError(f"sequence_length is {sequence_length}, which does not divide rows of {rows}")
        if greedy and not whole_episodes:
            raise UserError("greedy plays whole episodes beside others: it needs whole_episodes=True")
        if not isinstance(environments, VectorEnv):
            given = one_line(environments, 40)
            raise UserError(f"{given} is no vector environment: make one of it, with make_environments")
        count, space = environments.num_envs, environments.single_observation_space
        self.group_size, self.one_group = _group_size(groups, count, whole_episodes), groups == "all"
        self.length, self.whole_episodes, self.device = steps, whole_episodes, torch.device(device)
        self.pieces, self.critic, self.greedy = steps // (sequence_length or steps), critic, greedy
        self.states: list[Tensor] | None = None  # memory after the last rollout, the policy's and the critic's
        self.busy = threading.RLock()
        self.of_tensors = isinstance(environments.unwrapped, TensorEnvironments)
        packs = packed and isinstance(space, Flat) and space.mixed and not self.of_tensors
        self.pack: Callable[[Any], Any] = space.packed if packs else lambda obs: obs  # type: ignore[attr-defined]
        self._stepping = (TensorStepping if self.of_tensors else Stepping)(
            environments,
            seed=seed,
            whole_episodes=whole_episodes,
            group_size=1 if groups == "all" else self.group_size,
            observation_normalizer=observation_normalizer,
            reward_scaler=reward_scaler,
        )
        if seed is None:  # then torch's generator decides
            seed = int(torch.randint(2**62, ()))
        self.noise = np.random.default_rng(_of_actions(seed))
        if not whole_episodes:  # the rows of those are as long as their episodes, and not as long as they may be
            dtype = np.dtype(np.uint8 if packs else space.dtype or np.float32)  # packed ones are mostly pixels
            numbers = math.prod(space.shape or ()) * dtype.itemsize + 24
            said = f"a rollout of {count} environments and {steps} steps"
            check_memory(numbers * count * steps, said, "lower num_envs or the number of steps")

    @property
    def stepping(self) -> Stepping:
        """The environments and their statistics, as no other thread is changing them: this waits for a rollout."""
        with self.busy:
            return self._stepping

    def draws_its_own(self, policy: nn.Module) -> bool:
        """Whether sampling from a policy leaves torch's global generator alone."""
        return isinstance(self._actor(policy), PerceptronActor)

    def observed(self, obs: Any) -> Any:
        """The observations of a rollout of which a checkpoint holds the tensors: of a policy with memory, Rows."""
        return Rows(*obs) if isinstance(obs, tuple) else obs

    @property
    def steps(self) -> int:
        """The number of decisions so far."""
        return self.stepping.steps

    @torch.no_grad()
    def __call__(self, policy: nn.Module, critic: nn.Module | None = None) -> Rollout:
        """Sample one rollout. critic: as it was when the rollout began; by default the sampler's, as it is."""
        with self.busy:
            return self._sampled(policy, self.critic if critic is None else critic)

    def _sampled(self, policy: nn.Module, critic: nn.Module | None) -> Rollout:
        policy.eval()
        of_mode = self._of_mode(policy) if self.greedy else None
        stepping, act = self.stepping, self._actor(policy)
        memories = _Memories(self, critic, act) if state_size(policy) else None
        stepping.reward_sum, stepping.reward_count = 0.0, 0
        columns = _Columns(
            stepping.environments.num_envs, self.length, CAPACITY if self.whole_episodes else self.length
        )
        stepping.reset() if self.whole_episodes else stepping.go_on()
        t, failed = self._stepped(act, columns, memories)
        if t + 1 < self.length:  # where the episodes that ended last stopped
            columns.write(
                t + 1, obs=self.pack(stepping.now()), **({} if memories is None else {"start": stepping.starting})
            )
        found: dict[str, Any] = columns.tensors(self.device)
        final_obs = as_tensor(self.pack(stepping.now()), self.device)
        logp = act.log_probabilities(found["action"][:, : t + 1])
        found["logp"] = pad(logp, (0, columns.written - t - 1))
        _check_likely(found)
        if memories is None and not isinstance(act, PerceptronActor):  # the check draws from torch's generator
            refuse_memory(policy, found["obs"][:, : t + 1])
        found["ended"] |= ~found["mask"]
        if memories is not None:
            memories.finish(found, t + 1, as_tensor(stepping.starting, self.device))
        if stepping.same_step:
            found, final_obs = next_step_layout(found, found.pop("final"), final_obs)
        stop: Any = final_obs
        if memories is not None:
            found["obs"], stop = memories.rows(found["obs"], found.pop("start"), final_obs)
        stepping.steps += int(found["mask"].sum())
        failed = torch.as_tensor(failed).cpu().numpy()
        group = self._grouped(found, failed)
        metrics = stepping.metrics() | _group_metrics(found["reward"].sum(1), self.group_size, failed)
        space = stepping.environments.single_action_space
        distribution = policy(tree_map(lambda x: x[:, :1], found["obs"]))
        check_entropy(distribution)
        metrics |= action_metrics(distribution, found["action"][found["mask"]], space)
        pieces = 1 if memories is None else self.pieces
        return Rollout(
            **found,
            group=group,
            final_obs=stop,
            memoryless=memories is None,
            pieces=pieces,
            metrics=metrics,
            greedy=of_mode,
        )

    def _stepped(self, act: Actor, columns: "_Columns", memories: "_Memories | None") -> tuple[int, Any]:
        """Step all environments until the columns are full. Returns the last step, and where episodes failed, [B]."""
        stepping = self.stepping
        failed: Any = stepping.resetting & False
        for t in range(self.length):
            obs, mask = stepping.now(), ~stepping.resetting
            if memories is not None:
                memories.before(t)
                columns.write(t, start=stepping.starting)
            try:
                action, taken = act(obs, mask, stepping.starting)
            except NonFiniteError as error:
                error.evidence = {"obs": obs, "mask": mask}
                raise
            restarts, step = stepping.restarts, stepping.step(taken)
            columns.write(
                t, obs=self.pack(obs), action=action, mask=step.counts, reward=step.reward, terminated=step.terminated,
                ended=step.ended, final=None if step.final is None else self.pack(step.final),
            )  # fmt: skip
            if stepping.restarts > restarts:
                cut = mask & ~step.counts
                failed = failed | cut
                if t:  # obs is where these episodes were cut, by their environments
                    columns.columns["ended"][cut, t - 1] = True
            if self.whole_episodes and stepping.resetting.all():
                break
        if self.whole_episodes:
            stepping.finish(~stepping.resetting)  # these episodes are cut at `steps`
        return t, failed

    def _grouped(self, found: dict[str, Any], failed: np.ndarray) -> Tensor:
        """The group of each row [B]. Where an episode failed, its row counts for nothing, in a group of its own."""
        rows = torch.arange(len(found["mask"]), device=self.device)
        group = rows // self.group_size
        if not self.one_group:
            group = ranks.apart(group)
        if self.whole_episodes and failed.any():  # the return of a part of an episode is none
            out = torch.from_numpy(failed).to(self.device)
            found["mask"] &= ~out.unsqueeze(1)
            group = torch.where(out, ranks.apart(len(rows) + rows), group)
        return group

    def _of_mode(self, policy: nn.Module) -> Tensor:
        """The return of the policy's mode from each start of the next rollout, [B]. Nothing else has happened."""
        stepping = self.stepping
        stepping.seeded = True  # so that both resets draw their seeds, and the same
        before = deepcopy(stepping.state_dict())
        total, _, _ = self.play(Mode(policy))
        stepping.load_state_dict(before)
        return torch.as_tensor(total, dtype=torch.get_default_dtype(), device=self.device)

    def fresh(self) -> list[Any]:
        """What the running statistics have seen since the last `share`."""
        return [one.fresh() for one in self.statistics()]

    def share(self, seen: Sequence[list[Any]]) -> None:
        """Make the running statistics those of all ranks: each has merged only what it has seen itself."""
        for i, one in enumerate(self.statistics()):
            one.share([each[i] for each in seen])

    def statistics(self) -> list[RunningStatistics]:
        """The running statistics: of observations, and of returns, as far as there are any."""
        stepping = self.stepping
        return [x.statistics for x in (stepping.observation_normalizer, stepping.reward_scaler) if x is not None]

    @torch.no_grad()
    def play(self, policy: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One whole episode per environment without storing its steps: returns, lengths, whether each ended; [B]."""
        assert self.whole_episodes
        policy.eval()
        stepping, act, seen = self.stepping, self._actor(policy, keep=False), []
        may_remember = not isinstance(act, PerceptronActor) and not state_size(policy)
        stepping.reset()
        total: Any = 0.0
        length: Any = 0
        for t in range(self.length):
            length = length + ~torch.as_tensor(stepping.resetting)
            if may_remember and t < STEPS:
                seen.append(torch.as_tensor(stepping.now()).to(self.device))
            _, taken = act(stepping.now(), ~stepping.resetting, stepping.starting)
            reward = torch.as_tensor(stepping.step(taken).reward)
            total = total + reward.to(torch.get_default_dtype()).double()  # as a rollout stores it
            if stepping.resetting.all():
                break
        if may_remember:
            refuse_memory(policy, torch.stack(seen, 1))
        stepping.steps += int(length.sum())
        return tuple(torch.as_tensor(x).cpu().numpy().copy() for x in (total, length, stepping.resetting))  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes here, as tensors, numbers and strings. The environments' own state is not in it."""
        state = {**self.stepping.state_dict(), "noise": self.noise.bit_generator.state}
        return state if self.states is None else {**state, "states": list(self.states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        self.stepping.load_state_dict(state)
        self.noise.bit_generator.state = state["noise"]
        self.states = [x.to(self.device) for x in state["states"]] if "states" in state else None

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """Go on from the states of another number of ranks, in new episodes (as samplers.Wrapper.divide_anew)."""
        self.stepping.divide_anew(states, seed)
        self.noise, self.states = np.random.default_rng(_of_actions(seed)), None

    def _actor(self, policy: nn.Module, *, keep: bool = True) -> Actor:
        environments = self.stepping.environments
        space, rows = environments.single_action_space, environments.num_envs
        if self.of_tensors:
            return TensorActor(policy, space, self.device, rows, keep=keep)
        return actor(policy, space, self.device, rows, self.length, self.noise, keep=keep)


def _check_likely(found: dict[str, Any]) -> None:
    """Raise NonFiniteError for a log-probability that is not finite where it counts."""
    if not found["logp"][found["mask"]].isfinite().all():
        unsound = not_finite("log-probability", found["logp"], found["mask"])
        unsound.evidence = {name: found[name] for name in ("obs", "action", "logp", "mask")}
        raise unsound


class _Memories:
    """What policy and critic remember before each piece of a rollout, and after the last.

    The critic's is computed afterwards, by one pass over all steps. Where environments reset in the same step, a row's
    steps move (next_step_layout), and a piece may begin before any of them: then the memory before every step is kept.
    """

    def __init__(self, sampler: Sampler, critic: nn.Module | None, act: Actor) -> None:
        self.sampler, self.act, self.critic = sampler, act, critic
        self.same_step, self.pieces = sampler.stepping.same_step, sampler.pieces
        none = act.state[:, :0]
        first = [act.state, none if self.critic is None else self.critic.initial(len(none))]  # type: ignore[operator]
        if sampler.states is not None and [x.shape for x in sampler.states] == [x.shape for x in first]:
            first = sampler.states
        act.state, self.of_critic = first
        self.every = 1 if self.same_step else sampler.length // self.pieces
        self.held: list[list[Tensor]] = [[], []]

    def before(self, t: int) -> None:
        """Step t of the policy comes next."""
        if t % self.every == 0:
            self.held[0].append(self.act.state)

    def finish(self, columns: dict[str, Tensor], steps: int, starting: Tensor) -> None:
        """All steps are taken. columns: [B, T, ...], as they were sampled; starting: [B], of what comes next."""
        self.ended = columns["ended"]
        self.start = torch.cat([columns["start"][:, :steps], starting.unsqueeze(1)], 1)
        for t in range(0, steps, self.every):
            self.held[1].append(self.of_critic)
            if self.critic is not None:
                obs, start = (columns[name][:, t : min(t + self.every, steps)] for name in ("obs", "start"))
                state = self.of_critic.unsqueeze(1)
                _, self.of_critic = self.critic.unrolled(Rows(obs, start, state[..., :0], state))  # type: ignore[operator]
        self.sampler.states = [self.act.state, self.of_critic]
        for held, last in zip(self.held, self.sampler.states, strict=True):
            held.append(last)

    def rows(self, obs: Tensor, start: Tensor, final_obs: Tensor) -> tuple[Rows, Rows]:
        """The rows [B, T, ...] in next-step layout, and where each stops."""
        rows, bounds = torch.arange(len(obs), device=obs.device), torch.arange(self.pieces + 1, device=obs.device)
        index, last = bounds.expand(len(obs), -1), torch.full_like(rows, self.start.shape[1] - 1)
        going_on = torch.ones_like(start[:, 0])
        if self.same_step:
            slot = _slots(self.ended).unsqueeze(-1)
            index = (slot < bounds * (obs.shape[1] // self.pieces)).sum(1).clamp(max=self.start.shape[1] - 1)
            last = index[:, -1]
            going_on = ~self.ended[rows, (last - 1).clamp(min=0)]
        states = [torch.stack(held, 1)[rows.unsqueeze(1), index] for held in self.held]
        final = Rows(final_obs, self.start[rows, last] & going_on, *(x[:, -1] for x in states))
        return Rows(obs, start, *(x[:, :-1] for x in states)), final


class _Columns:
    """The columns [B, T, ...] of a rollout, filled in place, T the steps that were written.

    They begin with room for `capacity` steps, and have twice as much whenever that is full, up to `length`. They are
    moved to the device once per rollout.
    """

    def __init__(self, rows: int, length: int, capacity: int) -> None:
        self.rows, self.length, self.capacity, self.written = rows, length, min(capacity, length), 0
        self.columns: dict[str, Arrays] = {}

    def write(self, t: int, **values: Arrays | None) -> None:
        """Store values [B, ...] at step t, the next one."""
        if t == self.capacity:
            self.capacity = min(2 * self.capacity, self.length)
            for name, x in self.columns.items():
                self.columns[name] = self._allocated(x[:, 0])
                self.columns[name][:, :t] = x
        self.written = t + 1
        for name, value in values.items():
            if value is not None:
                if name not in self.columns:
                    self.columns[name] = self._allocated(value)
                self.columns[name][:, t] = value

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The columns on the device."""
        return {name: torch.as_tensor(x[:, : self.written]).to(device) for name, x in self.columns.items()}

    def _allocated(self, like: Arrays) -> Arrays:
        """A column of zeros for values like these, [B, ...]."""
        if isinstance(like, Tensor):
            dtype = torch.get_default_dtype() if like.dtype == torch.float64 else like.dtype
            return like.new_zeros((self.rows, self.capacity, *like.shape[1:]), dtype=dtype)
        kept = stored_dtype(like.dtype) if like.dtype == np.float64 else like.dtype
        kind = torch.from_numpy(np.zeros(0, kept)).dtype
        return torch.zeros((self.rows, self.capacity, *like.shape[1:]), dtype=kind).numpy()  # as in as_tensor


def next_step_layout(columns: dict[str, Tensor], final: Tensor, last: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Rows sampled with same-step auto-reset in the layout of next-step auto-reset.

    After each end there is one more step, masked, with the final observation. Steps that no longer fit the row are
    dropped. columns: [B, T, ...]; final: [B, T, ...], the observations before the resets; last: [B, ...], the
    observations after the last step. Returns the columns and the observations where each row now stops.
    """
    ended, device = columns["ended"], last.device
    length = ended.shape[1]
    slot = _slots(ended)
    rows, steps = (slot < length).nonzero(as_tuple=True)
    result = {name: torch.zeros_like(column) for name, column in columns.items()}
    for name, column in columns.items():
        result[name][rows, slot[rows, steps]] = column[rows, steps]
    rows, steps = (ended & (slot + 1 < length)).nonzero(as_tuple=True)
    result["obs"][rows, slot[rows, steps] + 1] = final[rows, steps]
    result["ended"] |= ~result["mask"]
    rows, kept = torch.arange(len(ended), device=device), (slot < length).sum(1) - 1
    following = torch.cat([columns["obs"], last.unsqueeze(1)], 1)[rows, kept + 1]
    stopped = ended[rows, kept].reshape(-1, *[1] * (last.ndim - 1))
    return result, torch.where(stopped, final[rows, kept], following)


def _slots(ended: Tensor) -> Tensor:
    """Where each step [B, T] is in next-step layout: later by one for every earlier end."""
    return torch.arange(ended.shape[1], device=ended.device) + ended.cumsum(1) - ended.long()


def _of_actions(seed: int | np.random.SeedSequence) -> np.random.SeedSequence:
    """The seed of the actions' noise, another one than that of the environments."""
    whole = np.random.SeedSequence(seed) if isinstance(seed, int) else seed
    return np.random.SeedSequence(whole.entropy, spawn_key=(*whole.spawn_key, 3))


def _group_size(groups: Any, count: int, whole_episodes: bool) -> int:
    """Rows per group. Raises UserError for groups that cannot be made."""
    if groups is None:
        return 1
    if groups != "all" and (not isinstance(groups, int) or groups < 1 or count % groups):
        raise UserError(f'groups is {groups!r}: choose None, "all", or a number that divides the {count} environments')
    if not whole_episodes:
        raise UserError(f"groups={groups!r} compares the returns of episodes: it needs whole_episodes=True")
    return count if groups == "all" else groups


def _group_metrics(score: Tensor, size: int, out: np.ndarray) -> dict[str, float]:
    """The mean standard deviation (n - 1) of score [B] in groups of `size` rows, and the share of groups with none.

    Of the groups that are whole: no row is `out` [B].
    """
    whole = ~out.reshape(-1, size).any(1)
    if size == 1 or not whole.any():
        return {}
    rows = score.double().cpu().numpy().reshape(-1, size)[whole]
    std = (rows - rows[:, :1]).std(1, ddof=1)  # exactly 0 where all are equal
    return {"group_std": float(std.mean()), "flat_groups": float((std == 0).mean())}


def action_metrics(distribution: Any, action: Tensor, space: spaces.Space) -> dict[str, float]:
    """How widely a policy explores a Box, by a distribution of its own and its actions [N, ...].

    action_std: the mean standard deviation of a Gaussian or a Beta, in units where the bounds are -1 and 1.
    bound_fraction: the share of the numbers that reached the environment at a bound, or within a thousandth of the
    range of one; not of integers, of which few may lie between. Of a Dict or Tuple, their means over its Boxes.
    """
    if isinstance(distribution, JointActions):
        found = [
            action_metrics(part, x, one)
            for part, x, (one, _) in zip(
                distribution.parts, distribution.of_parts(action), distribution.space.parts, strict=True
            )
        ]
        names = dict.fromkeys(name for one in found for name in one)
        return {name: float(np.mean([one[name] for one in found if name in one])) for name in names}
    if not isinstance(space, spaces.Box) or isinstance(space, FlatActions):
        return {}
    unit, metrics = units(space), {}
    inner = distribution.normal if isinstance(distribution, SquashedNormal) else distribution
    inner = inner.base_dist if isinstance(inner, Independent) else inner
    if isinstance(inner, Normal | ScaledBeta):
        own = isinstance(distribution, ClippedNormal | SquashedNormal | ScaledBeta)  # already in these units
        width = np.ones_like(unit.half_width) if own else unit.half_width
        std = inner.stddev.double().cpu().numpy().reshape(-1, len(width))
        metrics["action_std"] = float((std[:, width > 0] / width[width > 0]).mean())
    if space.dtype.kind == "f" and unit.bounded.any() and len(action):
        owned = hasattr(distribution, "to_environment")
        taken = distribution.to_environment(action) if owned else to_environment(action.cpu().numpy(), space)
        u = (taken.reshape(len(action), -1) - unit.center)[:, unit.bounded] / unit.half_width[unit.bounded]
        metrics["bound_fraction"] = float((np.abs(u) >= 0.999).mean())
    return metrics
