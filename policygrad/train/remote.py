"""Remote samplers: actors of Ray that each hold a share of the environments, here or on other machines.

A sampler samples what a rank would: it has the same share of the rows, the same seed and the same random numbers. Ray
starts the actors, carries weights and rollouts, sees when an actor has died, and starts it again. What goes from one
process to another is names, numbers and arrays; each process makes its world and policy from the options.
"""

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.errors import NonFiniteError, Note, UserError, one_line, shortened
from policygrad.machine import share
from policygrad.rollout import Rollout, state_size
from policygrad.samplers import Wrapper
from policygrad.train.generators import Generators
from policygrad.train.options import OptionError
from policygrad.train.run import arithmetic
from policygrad.train.training import contents
from policygrad.train.worlds import world_of
from policygrad.train.worlds.world import Own, World

STARTING = 300.0  # seconds that all samplers may take to start
REACHED = 10.0  # seconds for a connection to the head of a cluster
TRIES = 5  # times that one rollout is begun, in actors that die of it
QUIET = {  # read by Ray when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Sampling:
    """What an actor does: it makes the world as one of several ranks would, and samples its share.

    Nothing is made before the first call, so that whatever fails is that call's error.
    """

    def __init__(self, rank: int, size: int, kind: str, task: str, options: Any, dtype: torch.dtype) -> None:
        self.rank, self.size, self.kind, self.task, self.options, self.dtype = rank, size, kind, task, options, dtype
        self.world: World | None = None

    def begin(self) -> tuple[dict[str, str], dict[str, Any]]:
        """What must be here as it is at the learner, and the state."""
        world = self._made()
        return _alike(world), self._state(world)

    def sample(
        self, weights: dict[str, Any], statistics: list[Any], state: dict[str, Any] | None
    ) -> tuple[Any, Any, Any, Any, list[str]]:
        """One rollout. statistics: the running ones of all. state: where to go on; None: where the last one stopped.

        Returns the rollout's columns, its metrics as `World.part` has them, what its running statistics have seen (of
        a sampler that is alone: what they are), the state after it, and notes.
        """
        world = self._made()
        with warnings.catch_warnings(record=True, action="always") as seen:
            with self.random.inside(), arithmetic(world, self.options.threads):
                if state is not None and (lost := self._restore(world, state)):
                    warnings.warn(lost, Note, stacklevel=1)
                running = _statistics(world)
                for one, x in zip(running, statistics, strict=True):
                    one.load_state_dict(x)
                for name, x in weights.items():
                    getattr(world, name).load_state_dict(_tensors(x))
                rollout: Rollout = world.sample(world.policy)
            notes = [str(x.message) for x in seen if issubclass(x.category, Note)]
        part = world.part({name: float(x) for name, x in rollout.metrics.items()})
        columns = {x.name: _arrays(getattr(rollout, x.name)) for x in fields(Rollout) if x.name != "metrics"}
        seen = [x.state_dict() if self.size == 1 else x.fresh() for x in running]
        return columns, part, seen, self._state(world), notes

    def _made(self) -> World:
        """The world, made as Training makes it, with the seeds of this rank."""
        if self.world is None:
            ranks.sample_as(self.rank, self.size)
            share(self.size)  # at most: they may be on several machines
            torch.set_default_dtype(self.dtype)
            self.random = Generators(self.options.seed)
            world = world_of(self.kind, self.options.method)(self.task, self.options)
            with self.random.inside(), arithmetic(world, self.options.threads):
                world.build(Own(), False)
            self.random = Generators(ranks.seed(self.options.seed))
            self.world = world
        return self.world

    def _state(self, world: World) -> dict[str, Any]:
        own = {"sample": world.sample.state_dict(), "surroundings": world.surroundings()}
        return {**own, "random": self.random.state_dict()}

    def _restore(self, world: World, state: dict[str, Any]) -> str | None:
        """Go on from a state. Returns why that cannot be done as if nothing had happened."""
        lost = world.restore(state["surroundings"])
        world.sample.load_state_dict(state["sample"])
        self.random.load_state_dict(state["random"])
        return lost


class Remote(Wrapper):
    """Several samplers, in actors of Ray, as one.

    With lag 0 each samples its share by the current policy, and the rollout is their rows in order: those of as
    many ranks, bit for bit. With lag k they do not wait for each other: a rollout has the rows of those that are
    ready first, also twice of one that is quick, and none of a policy that is more than k versions old. Nothing is
    dropped (IMPALA: Espeholt et al. 2018, arXiv 1802.01561). Adds the metric policy_lag, the mean number of versions.

    An actor that dies is started again by Ray, and samples its rollout again from the state before it: a synchronous
    run comes out as if nothing had happened. The state is that of all samplers after the last rollouts that were
    learned from. Running statistics (of observations and rewards) are those of all samplers when a rollout begins, and
    within it a sampler goes on with what it sees itself, as a rank does. Raises UserError for what a sampler raises, if
    it dies of one rollout again and again, and if it does not answer within `limit` seconds.
    """

    def __init__(self, world: World, count: int, *, lag: int = 0, address: str | None = None, limit: float) -> None:
        super().__init__(world.sample)
        task = world.stored()
        if task is None:
            raise UserError("samplers make environments by name: give an id or module:name, or leave samplers out")
        if getattr(world, "learned", dict)():
            raise UserError("a wrapper of the environment learns, and samplers share no statistics: leave one out")
        self.world, self.lag, self.limit, self.version = world, lag, limit, 0
        for name in ("length", "pieces", "whole_episodes"):  # what a rollout is like
            if hasattr(world.sample, name):
                setattr(self, name, getattr(world.sample, name))
        self.ray, self.own = _started(count, address)
        options = replace(world.options, samplers=None, ray=None, lag=0, device="cpu")
        actor = self.ray.remote(num_cpus=1, max_restarts=-1)(Sampling)
        made = [actor.remote(i, count, world.kind, task, options, torch.get_default_dtype()) for i in range(count)]
        self.actors: list[Any] = made
        self.pending: dict[int, tuple[Any, int]] = {}  # the rollout that a sampler is at, and its policy's version
        self.weights: Any = None  # of the newest version, in Ray's object store
        self.statistics: list[Any] = []  # the running ones that a sampler begins with
        self.parts: dict[int, Any] = {}  # the metrics of each sampler's last rollout
        self.anew: set[int] = set()  # samplers that go on from `states`, and not from where they are
        try:
            began = [self._answer(i, x.begin.remote(), STARTING) for i, x in enumerate(made)]
            for i, (found, _) in enumerate(began):
                _check_alike(i, _alike(world), found)
        except self.ray.exceptions.RayActorError as error:
            self.close()
            raise UserError(f"a sampler cannot start: {one_line(str(error).strip().splitlines()[-1], 150)}") from error
        except BaseException:
            self.close()
            raise
        self.states = [state for _, state in began]

    @property
    def steps(self) -> int:
        """The number of decisions so far."""
        return int(sum(part[0]["steps"] for part in self.parts.values()))

    def __call__(self, policy: nn.Module) -> Rollout:
        critic = self.world.critic
        modules = {"policy": policy} | ({"critic": critic} if critic is not None and state_size(critic) else {})
        self.weights = self.ray.put({name: _arrays(x.state_dict()) for name, x in modules.items()})
        self.version += 1
        self.statistics = [x.state_dict() for x in _statistics(self.world)]
        for i in range(len(self.actors)):
            if i not in self.pending:
                self._begin(i)
        found = self._first() if self.lag else [self._taken(i) for i in range(len(self.actors))]
        rollout = Rollout.join([x for x, _ in found]).to(next(policy.parameters()).device)
        metrics = self.world.joined([part for _, part in sorted(self.parts.items())])
        if self.lag:
            metrics["policy_lag"] = sum(lag for _, lag in found) / len(found)
        return replace(rollout, metrics=metrics)

    def _first(self) -> list[tuple[Rollout, int]]:
        """As many rollouts as there are samplers, those first that could not be used the next time, then the ready.

        A sampler goes on at once with the newest policy.
        """
        found: list[tuple[int, Rollout, int]] = []
        while len(found) < len(self.actors):
            due = [i for i, (_, version) in self.pending.items() if version <= self.version - self.lag]
            among = {self.pending[i][0]: i for i in due or self.pending}
            ready, _ = self.ray.wait(list(among), num_returns=1, timeout=self.limit)
            i = among[ready[0]] if ready else next(iter(among.values()))  # whose time is then over
            found.append((i, *self._taken(i)))
            self.statistics = [x.state_dict() for x in _statistics(self.world)]
            self._begin(i)
        return [x for _, *x in sorted(found, key=lambda x: x[0])]  # type: ignore[misc]

    def _begin(self, i: int) -> None:
        """Let a sampler begin a rollout by the newest policy."""
        state = self.states[i] if i in self.anew else None
        self.anew.discard(i)
        self.pending[i] = self.actors[i].sample.remote(self.weights, self.statistics, state), self.version

    def _taken(self, i: int) -> tuple[Rollout, int]:
        """The rollout that a sampler is at, and how many versions old its policy is."""
        for _ in range(TRIES):
            answer, version = self.pending[i]
            try:
                columns, self.parts[i], seen, self.states[i], notes = self._answer(i, answer, self.limit)
            except self.ray.exceptions.RayActorError:
                warnings.warn(f"sampler {i} has died: it starts again, with the same rollout", Note, stacklevel=3)
                self._wait_for(i)
                self.anew.add(i)
                self._begin(i)
                continue
            del self.pending[i]
            self._merge(seen)
            for note in notes:
                warnings.warn(f"sampler {i}: {note}", Note, stacklevel=3)
            return Rollout(**_tensors(columns)), self.version - version
        raise UserError(f"sampler {i} has died of one rollout {TRIES} times: sample without samplers to see why")

    def _merge(self, seen: list[Any]) -> None:
        """Take what a sampler's running statistics have seen into those of all, which are the world's here."""
        for one, x in zip(_statistics(self.world), seen, strict=True):
            if isinstance(x, dict):
                one.load_state_dict(x)
            elif x[0]:
                one.merge(*x)

    def _wait_for(self, i: int) -> None:
        """Until an actor that has died is there again: before that Ray refuses what it is asked, at once."""
        end = time.monotonic() + self.limit
        while True:
            try:
                self.ray.get(self.actors[i].__ray_ready__.remote(), timeout=max(0.0, end - time.monotonic()))
                return
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() >= end:
                    said = f"sampler {i} has died, and did not start again within {self.limit:,.0f} s"
                    raise UserError(f"{said}: rank_time_limit is how long it is waited for") from error
                time.sleep(0.1)

    def _answer(self, i: int, answer: Any, limit: float) -> Any:
        """What a sampler returns. Raises UserError for its error, and where there is no answer in time."""
        try:
            return self.ray.get(answer, timeout=limit)
        except self.ray.exceptions.GetTimeoutError as error:
            have = self.ray.cluster_resources().get("CPU", 0)
            raise UserError(
                f"no answer of sampler {i} within {limit:,.0f} s: {len(self.actors)} samplers need a CPU each, and Ray "
                f"has {have:.0f}; a long rollout needs rank_time_limit"
            ) from error
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            said = cause if isinstance(cause, UserError) else f"{type(cause).__name__}: {one_line(cause, 150)}"
            own = (NonFiniteError if isinstance(cause, NonFiniteError) else UserError)(f"sampler {i}: {said}")
            if isinstance(own, NonFiniteError):
                own.evidence = cause.evidence
            raise own from error

    def state_dict(self) -> dict[str, Any]:
        own = [x.state_dict() for x in _statistics(self.world)]
        parts = [self.parts.get(i) for i in range(len(self.actors))]
        return {"samplers": list(self.states), "parts": parts, "statistics": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = list(state["samplers"])
        self.parts = {i: part for i, part in enumerate(state["parts"]) if part is not None}
        self.pending, self.anew = {}, set(range(len(self.actors)))
        for one, x in zip(_statistics(self.world), state["statistics"], strict=True):
            one.load_state_dict(x)
        if self.parts:
            self.world.joined(list(self.parts.values()))  # which takes note of the last episodes

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for x in self.actors if self.ray.is_initialized() else ():
            self.ray.kill(x)
        self.actors = []
        if self.own:
            self.ray.shutdown()


def _started(count: int, address: str | None) -> tuple[Any, bool]:
    """Ray, and whether it was started here. Raises OptionError if it is not installed or cannot be reached."""
    for name, x in QUIET.items():
        os.environ.setdefault(name, x)
    try:
        import ray
    except ImportError as error:
        said = "samplers are actors of Ray, which is not installed: pip install policygrad[ray]"
        raise OptionError("samplers", said) from error
    if ray.is_initialized():
        if address is not None:
            raise OptionError("ray", "this process has begun with Ray, and samplers use that: leave ray out")
        return ray, False
    ray._private.worker._worker_logs_enabled = False  # it prints that a worker has died, which is said here
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Here the samplers are the only actors: each has its CPU, or a part of one.
    here = {"num_cpus": max(count, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    try:
        host, _, port = address.rpartition(":")
        if host:  # where nothing listens, Ray tries for 20 minutes
            socket.create_connection((host, int(port)), REACHED).close()
        with _quiet():
            ray.init(address, log_to_driver=False, logging_level="CRITICAL", **here)
    except Exception as error:  # of several kinds
        ray.shutdown()  # of what was started so far
        said = f"Ray at {shortened(address, 50)} cannot be reached ({one_line(error, 60)})"
        raise OptionError("ray", f"{said}: start it there, and give HOST:PORT, or auto on its machine") from error
    return ray, True


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is printed to standard error, also by code in C++. What went wrong is an exception besides."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _alike(world: World) -> dict[str, str]:
    """What must be the same at a sampler and its learner: versions, and code of the user's."""
    return {**world.versions(), **contents(world.stored(), *vars(world.options).values())}


def _check_alike(i: int, here: dict[str, str], there: dict[str, str]) -> None:
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{one_line(name, 40)} is {one_line(here.get(name), 40)}, and {one_line(there.get(name), 40)} at "
                f"sampler {i}: make them alike"
            )


def _statistics(world: World) -> list[Any]:
    """The running statistics of a world's sampler, which has them in the same order everywhere."""
    return getattr(world.sample, "statistics", list)()


def _arrays(tree: Any) -> Any:
    """Tensors as NumPy's arrays, which Ray puts into its store and takes from there without a copy."""
    return tree_map(lambda x: x.detach().cpu().numpy() if isinstance(x, Tensor) else x, tree)


def _tensors(tree: Any) -> Any:
    """Arrays as tensors that share their memory. It belongs to Ray's store: nothing may be written there."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch says so, too
        return tree_map(lambda x: torch.from_numpy(x) if hasattr(x, "dtype") else x, tree)
