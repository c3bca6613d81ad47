"""Control: Gymnasium environments."""

import json
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from policygrad import ranks
from policygrad.control import Critic, ObservationNormalizer, Policy, RewardScaler, Sampler, make_environments
from policygrad.control.acting import act, shape_of
from policygrad.control.checks import called, check_memory
from policygrad.control.encoders import chosen, has_network, measured
from policygrad.control.environments import close, importable, label, unflattened
from policygrad.control.evaluation import Evaluation, evaluate, time_limit
from policygrad.control.memory import measured_memory, rows_of
from policygrad.control.memoryless import refuse_memory
from policygrad.control.players import agents_of
from policygrad.control.processes import Processes
from policygrad.control.replay import restore, state_of
from policygrad.control.seats import Frozen, Selves
from policygrad.control.separate import SeparateCritics, SeparatePolicies
from policygrad.control.spaces import describe, has_densities, is_image, kept_of, rebuild
from policygrad.control.wrappers import Learned, Wrappers
from policygrad.errors import Note, UserError, one_line, shortened, type_of
from policygrad.files import damaged, read_json, read_tensors
from policygrad.precision import autocast_to
from policygrad.rollout import state_size
from policygrad.train.checkpoints import (
    Stage,
    check_size,
    fits,
    normalizer_of,
    part_of,
    read_policy,
    save_policy,
)
from policygrad.train.options import EPISODIC, OptionError, compares_greedy, compares_groups, has_critic
from policygrad.train.reports import Curve, Row
from policygrad.train.worlds.world import DECISIONS, Own, World

# What a policy is rebuilt with, but its spaces and what weights begin with.
AS_SAVED = {
    *("encoder", "channels", "keys", "memory", "memory_size", "memory_window"),
    *("hidden", "activation", "distribution", "state_dependent_std"),
}
SELVES = "selves"  # the folder of a run's frozen selves, each of the number of its iteration


class ControlWorld(World):
    """A Gymnasium id, an environment, a callable that makes one or its name, or a vector environment."""

    kind = "control"
    environments: VectorEnv | None = None
    wrappers: Wrappers | None = None  # of the open environments
    statistics: Learned | None = None  # what wrappers had learned when they were last in reach
    normalizer: ObservationNormalizer | None = None
    observation_space: gymnasium.Space  # as the policy takes it
    action_space: gymnasium.Space
    trained_on = "an environment"  # its name, where it is all that is known
    unflattened: gymnasium.Space | None = None  # as the environment gives it
    processes = 0  # that step the environments because that measured as faster
    selves: Selves | None = None  # the opponents of self-play
    packed = False  # whether all that reads observations takes packed ones, too
    finished: list[tuple[float, int]] | None = None  # the last episodes of all ranks

    def __init__(self, task: Any, options: Any) -> None:
        super().__init__(task, options)
        self.written: set[Path] = set()  # the directories of frozen selves

    @property
    def name(self) -> str:
        return self.trained_on if self.task is None else label(self.task)

    @property
    def mine(self) -> bool:
        """Whether the environments are made here, and not handed in."""
        return not isinstance(self.task, gymnasium.Env | VectorEnv)

    @property
    def judged(self) -> str | None:  # type: ignore[override]
        """The metric of evaluation in training, the mean return of its episodes, if there is to be one."""
        return "evaluation" if self.options.evaluate_every else None

    def _environments(self) -> VectorEnv:
        """The environments of training."""
        options = self.options
        if self.judged and not self.mine:
            raise OptionError(
                "evaluate_every",
                "evaluate_every plays in environments of its own, and the one handed in is made already: hand in a "
                "function that makes it",
            )
        vectorization = options.vectorization
        if ranks.size() > 1 and not self.mine:
            raise UserError("several ranks need environments of their own: hand in a function that makes one")
        together = getattr(options, "group_size", None) or 1
        remote = getattr(options, "samplers", None) is not None  # then nothing is sampled here
        count = together if remote else self.rows_of_rank("num_envs", together)
        check_memory(2**11 * count, f"{count} environments", "lower num_envs")
        limit = {"step_time_limit": options.step_time_limit} if vectorization == "async" else {}
        if options.restart_envs and (not self.mine or vectorization == "envpool"):
            raise OptionError(
                "restart_envs",
                "restart_envs makes environments anew one by one: hand in a function that makes one, not with envpool",
            )
        how: dict[str, Any] = {"vectorization": vectorization, "restarts": options.restart_envs, **limit}
        how["native"] = getattr(options, "group_size", None) is None  # a group has a seed of its own
        if options.opponent == "random":
            return self._made(count, **how)
        self.selves = Selves()
        environments = self._made(count, opponents=self.selves, **how)
        if not self.selves.seats:
            close(environments)
            raise OptionError(
                "opponent", f"{one_line(self.name, 60)} is no game whose players take turns: leave opponent out"
            )
        return environments

    def build(self, own: Own, progress: bool) -> None:
        options, self.environments = self.options, self._environments()
        base = self.environments.unwrapped
        if options.vectorization == "auto" and self.mine and isinstance(base, Processes):
            self.processes = len(base.processes)
        of_users = own.policy, own.critic, getattr(options, "symmetry", None)
        self.packed = not self._separate and all(x is None for x in of_users)
        self.wrappers = Wrappers(self.environments)
        self.unflattened = unflattened(self.environments)
        self.sample = self._sampler(self.environments)
        observation_space = self.observation_space = self.environments.single_observation_space
        action_space = self.action_space = self.environments.single_action_space
        if own.policy is None:
            heads = ("distribution", "state_dependent_std", "initial_log_std")
            of_boxes = {name: getattr(options, name) for name in heads}
            try:
                self._check_networks(observation_space)
                keys = options.policy_keys
                how = self._shape() | self._memory() | of_boxes
                self.policy = (SeparatePolicies if self._separate else Policy)(
                    observation_space, action_space, keys=keys, **how
                )
            except UserError as error:
                named = ("encoder", "channels", *heads)
                name = next((x for x in named if str(error).startswith(x)), None)
                if str(error).startswith("keys"):
                    raise OptionError("policy_keys", f"policy_{error}") from error
                if name is None:
                    raise
                raise OptionError(name, str(error)) from error
        else:
            if self._memory():
                raise OptionError("memory", "memory is of the policy made here, and one is handed in: leave memory out")
            self.policy = own_module("policy", own.policy, observation_space, action_space)
        self.policy.to(options.device)
        self._check_memory()
        self._check_probabilities()
        self._build_critic(own)
        networks = [self.policy] if self.critic is None else [self.policy, self.critic]
        if options.autocast != "none" and not any(map(has_network, networks)):
            said = "autocast is of the encoder of images, and these observations have none: leave autocast out"
            raise OptionError("autocast", said)

    def _build_critic(self, own: Own) -> None:
        options, observation_space = self.options, self.observation_space
        if not has_critic(options):
            if getattr(options, "critic_keys", ()):
                said = f"critic_keys is for a critic, and credit {options.credit} has none: leave it out"
                raise OptionError("critic_keys", said)
            if own.critic is not None:
                credit = getattr(options, "credit", "of demonstrations")
                raise UserError(f"a critic is handed in, and credit {credit} has no use for one: leave it out")
            return
        if own.critic is None:
            try:
                self.critic = self._critic(observation_space)
            except OptionError:
                raise
            except UserError as error:
                raise OptionError("critic_keys", f"critic_{error}") from error
        else:
            # A critic without a fit of its own may be frozen.
            learns = hasattr(options, "critic_epochs")
            self.critic = own_module("critic", own.critic, observation_space, learns=learns)
        self.critic.to(options.device)
        if own.critic is not None:
            obs = observations(observation_space).to(options.device)
            given: Any = rows_of(obs, state_size(self.policy)) if state_size(self.policy) else obs
            with torch.no_grad(), torch.random.fork_rng():
                value = called(self.critic, given, "critic")
            if not isinstance(value, Tensor):
                raise UserError(f"the critic returned {type_of(value)}: return a tensor of values [B, T]")
            if not state_size(self.policy) and not state_size(self.critic):
                refuse_memory(self.critic, obs, "critic")
        self.sample.critic = self.critic if state_size(self.critic) else None

    def _made(self, num_envs: int, **how: Any) -> VectorEnv:
        """The task's environments, with the options of the environment."""
        return make_environments(self.task, num_envs, **self.how() | how)

    def how(self, another: Any = None) -> dict[str, Any]:
        """How the run's environment is made, or another one in its place, as make_environments takes it.

        The options of the environment are the task's own, and so is EnvPool, whose environments may have other spaces.
        """
        options = self.options
        if isinstance(another, gymnasium.Env) and getattr(another, "is_prepared", False):
            return {}  # it was made by this, to be filmed
        if options.wrap and isinstance(self.task if another is None else another, gymnasium.Env | VectorEnv):
            raise OptionError(
                "wrap", "wrap is of environments made here, and this one is made: wrap it, or hand in a function"
            )
        how: dict[str, Any] = {"wrap": options.wrap, "action_mask": options.action_mask}
        how |= {"agents": "separate"} if self._separate else {}
        if another is None:
            how |= {"env_options": json.loads(options.env_options or "{}")}
            how |= {"vectorization": "envpool"} if options.vectorization == "envpool" else {}
        return how

    @property
    def _separate(self) -> bool:
        """Whether each agent of a game has parameters of its own."""
        return getattr(self.options, "agents", "shared") == "separate"

    def _memory(self) -> dict[str, Any]:
        """The options of the memory, those that are read."""
        if getattr(self.options, "memory", "none") == "none":
            return {}
        return {name: getattr(self.options, name) for name in ("memory", "memory_size", "memory_window")}

    def _check_memory(self) -> None:
        """Raise UserError for options that need a memory that the policy has not."""
        if not state_size(self.policy) and getattr(self.options, "sequence_length", None) is not None:
            said = "sequence_length cuts rows of a policy with memory, and this one has none: leave it out"
            raise OptionError("sequence_length", said)

    def _check_probabilities(self) -> None:
        """Raise OptionError for options that read probabilities, where actions have densities or are several."""
        options, space = self.options, self.action_space
        mask = getattr(options, "divergence_mask", "none")
        if mask in ("binary_tv", "binary_kl") and has_densities(space):
            said = f"divergence_mask {mask} is of actions that have probabilities, and these have densities: use kl"
            raise OptionError("divergence_mask", said)
        single = isinstance(space, spaces.Discrete)
        if mask == "tv" and not single:
            raise OptionError("divergence_mask", "divergence_mask tv is of one Discrete action: use kl")
        if compares_groups(options) and getattr(options, "baseline", "") == "token" and not single:
            raise OptionError("baseline", "baseline token is of one Discrete action: use length_weighted or mean")

    def _critic(self, space: gymnasium.Space) -> Critic | SeparateCritics:
        """A critic as the options say."""
        how = self._memory()
        option = "critic_memory" if how else "critic_encoder"
        kind = self.options.critic_memory if how else self._encoder_of_critic()
        if kind == "shared":
            if self.options.critic_keys:
                raise UserError(f"keys is of an encoder of the critic's own, and {option} is shared: leave one out")
            how, of = {}, cast(Any, self.policy)
        else:
            how, of = how if kind == "own" else {}, None
        kind = SeparateCritics if self._separate else Critic
        return kind(space, keys=self.options.critic_keys, of=of, **self._shape(), **how)

    def _encoder_of_critic(self) -> str:
        """critic_encoder. Raises OptionError where there is nothing to share."""
        kind = getattr(self.options, "critic_encoder", "own")
        if kind == "shared":
            made_here = isinstance(self.policy, Policy | SeparatePolicies)
            if not made_here:
                said = "critic_encoder shared is the encoder of a policy made here, and one is handed in: leave it out"
                raise OptionError("critic_encoder", said)
            one: Any = self.policy.policies[0] if isinstance(self.policy, SeparatePolicies) else self.policy
            if not any(p.requires_grad for p in one.encode.parameters()):
                said = "critic_encoder shared is of images: the encoder of these observations learns nothing: use own"
                raise OptionError("critic_encoder", said)
        return kind

    def _shape(self) -> dict[str, Any]:
        """The options that policy and critic share."""
        shared = ("encoder", "channels", "hidden", "activation", "orthogonal")
        autocast = autocast_to(self.options.autocast, self.options.device)
        return {name: getattr(self.options, name) for name in shared} | {"autocast": autocast}

    def _check_networks(self, space: gymnasium.Space) -> None:
        """Raise UserError if the networks do not fit the observations, or the memory, before they are made."""
        options = self.options
        encoder, channels = chosen(space, options.encoder, options.channels)
        if is_image(space) and options.normalize_observations:
            raise OptionError(
                "normalize_observations", "the encoder scales images to [0, 1]: leave normalize_observations out"
            )
        weights, features = measured(space, encoder, channels, options.policy_keys)
        more, features = measured_memory(features, self._memory())
        advice = "lower memory_size" + (" or memory_window" if self._memory().get("memory") == "transformer" else "")
        check_memory(4 * 2 * 4 * more, f"a memory of {one_line(features, 40)} features", advice)
        weights, sizes = weights + more, [features, *options.hidden]
        weights += sum(inputs * outputs for inputs, outputs in pairwise(sizes))
        said = f"networks with hidden {one_line(list(options.hidden), 40)}"
        check_memory(4 * 2 * 4 * weights, said, "lower hidden")  # with gradient and Adam's

    def _sampler(self, environments: VectorEnv) -> Sampler:
        options, space = self.options, environments.single_observation_space
        whole = options.credit in EPISODIC
        steps = (options.episode_steps or time_limit(environments)) if whole else options.num_steps
        if steps is None:
            raise OptionError(
                "episode_steps", "the environment has no time limit: say how long an episode may be, with episode_steps"
            )
        self.normalizer = self._normalizer(space) if options.normalize_observations else None
        groups: Any = None
        if compares_groups(options):
            groups = options.group_size or "all"
            if options.group_size and agents_of(environments) > 1:
                raise OptionError(
                    "group_size",
                    "group_size starts copies of one environment alike, and rows here are agents: leave it out",
                )
        return Sampler(
            environments,
            steps,
            seed=ranks.seed(options.seed),
            whole_episodes=whole,
            groups=groups,
            observation_normalizer=self.normalizer,
            reward_scaler=RewardScaler(environments.num_envs, options.gamma) if options.scale_rewards else None,
            sequence_length=None if whole else options.sequence_length,
            greedy=compares_greedy(options),
            packed=self.packed,
            device=options.device,
        )

    @staticmethod
    def _normalizer(space: gymnasium.Space) -> ObservationNormalizer:
        """A new normalizer of observations, which leaves action masks and images as they are."""
        return ObservationNormalizer(space.shape or (), kept_of(space))

    def begin_from(self, directory: Path) -> None:
        """As the base class, with the statistics that normalize observations, and those of wrappers in reach.

        Raises OptionError where the policy there is of another architecture, also if its weights would fit.
        """
        self._check_beginning(directory)
        super().begin_from(directory)
        path = directory / "policy.safetensors"
        tensors, _ = read_tensors(path)
        seen = {name: x.numpy() for name, x in part_of(tensors, "observations.").items()}
        if bool(seen) != (self.normalizer is not None):
            how = "normalizes" if seen else "does not normalize"
            said = f"the run to begin from {how} observations, and its policy expects them so"
            raise OptionError("normalize_observations", f"{said}: set normalize_observations to {bool(seen)}")
        if self.normalizer is not None:
            try:
                self.normalizer.statistics = normalizer_of(seen, self.observation_space.shape).statistics
            except (KeyError, ValueError) as error:
                raise damaged(path, f"the statistics of observations make no sense: {one_line(error)}") from error
        learned = {name: x.numpy() for name, x in part_of(tensors, "wrappers.").items()}
        if self.wrappers is not None and not self.wrappers.take(learned) and learned:
            warnings.warn("the wrappers of the environment learn in processes: theirs begin anew", Note, stacklevel=2)

    def _check_beginning(self, directory: Path) -> None:
        """Raise OptionError for an option that made the policy in a directory another one than this one."""
        path = directory / "policy.json"
        description = read_json(path) if path.exists() else None
        saved = description.get("policy") if isinstance(description, dict) else None
        if not isinstance(saved, dict) or not isinstance(self.policy, Policy) or self.policy.description is None:
            return
        for name, x in self.policy.description.items():
            if name in AS_SAVED and name in saved and saved[name] != x:
                option = {"keys": "policy_keys"}.get(name, name)
                was, now = (one_line(y, 40) for y in (saved[name], x))
                said = f"the run to begin from has {option} {was}, and this one {now}: set {option} to {was}"
                raise OptionError(option, said)

    def load(self, directory: Path, policy: Any = None) -> Stage:
        if policy is not None:
            environments = self._made(1)
            self.observation_space = environments.single_observation_space
            self.action_space, self.unflattened = environments.single_action_space, unflattened(environments)
            close(environments)
            policy = own_module("policy", policy, self.observation_space, self.action_space, learns=False)
        saved = read_policy(directory, policy)
        self.policy, self.normalizer = saved.policy.to(self.options.device), saved.normalizer
        self.statistics, self.trained_on = saved.learned, saved.environment
        if self.normalizer is not None and policy is not None:
            self.normalizer.kept = kept_of(self.observation_space)
        if isinstance(self.policy, Policy | SeparatePolicies):
            self.observation_space, self.action_space = self.policy.observation_space, self.policy.action_space
        if has_critic(self.options) and saved.critic:
            space: Any = describe(self.observation_space)
            with suppress(ValueError):  # it is of the user's own class, which is larger or smaller
                encoded = chosen(self.observation_space, self.options.encoder, self.options.channels)
                how = self._memory() if getattr(self.options, "critic_memory", "none") == "own" else {}
                check_size(space, *encoded, self.options.critic_keys, how, [*self.options.hidden, 1], saved.critic)
                critic = self._critic(rebuild(space))
                if fits(critic, saved.critic):
                    critic.load_state_dict(saved.critic)
                    self.critic = critic.to(self.options.device)
        return Stage.of(saved.metadata, directory / "policy.safetensors")

    def after(self, iteration: int) -> None:
        """Freeze the policy as an opponent, if it is time."""
        if self.selves is not None and iteration % self.options.freeze_every == 0:
            self.selves.take(self._frozen(iteration, self.sample.steps))

    def _frozen(self, iteration: int, steps: int) -> Frozen:
        """The policy as it is now, as a player."""
        assert self.unflattened is not None
        policy, normalizer = deepcopy(self.policy), deepcopy(self.normalizer)
        return Frozen(iteration, steps, policy, normalizer, self.unflattened, self.action_space)

    def _write_selves(self, directory: Path) -> None:
        """Write the selves that this process has not yet written there, each as a policy's directory."""
        for one in () if self.selves is None else self.selves.frozen:
            place = directory / SELVES / str(one.iteration)
            if place not in self.written:
                place.mkdir(parents=True, exist_ok=True)
                stage = Stage(one.iteration, one.steps)
                save_policy(place, one.policy, None, one.normalizer, stage, None, self.name)
                self.written.add(place)

    def save(self, directory: Path, stage: Stage) -> None:
        self._settle()
        if stage.run != "best":
            self._write_selves(directory)
        save_policy(directory, self.policy, self.critic, self.normalizer, stage, self.learned(), self.name)

    def _settle(self) -> None:
        """Wait for a rollout that is sampled beside: it changes statistics that are part of the run."""
        if hasattr(self, "sample"):
            _ = self.sample.stepping

    def fingerprint(self) -> list[float]:
        if getattr(self.options, "overlap", False):  # statistics change at any time
            return super().fingerprint()
        seen = [] if self.normalizer is None else [self.normalizer.statistics.count]
        learned = self.learned() if self.statistics else None  # as of the last save: most environments learn nothing
        return [*super().fingerprint(), *seen, *(float(np.sum(x)) for x in (learned or {}).values())]

    def stored(self) -> str | None:
        """The id, or the name of a class or function, with the whole path of its file; None without one."""
        name = self.task if isinstance(self.task, str) else importable(self.task)
        place, colon, last = (name or "").rpartition(":")
        return f"{Path(place).resolve()}:{last}" if colon and place.endswith(".py") else name

    def learned(self) -> Learned | None:
        """What the wrappers inside the environments have learned so far; part of the run."""
        if self.wrappers is not None and not self.wrappers.environments.closed:
            try:
                self.statistics = self.wrappers.learned()
            except Exception:  # an environment that has failed; what it learned before is kept
                pass
            except KeyboardInterrupt as stop:
                if type(stop) is not KeyboardInterrupt:  # not that of an environment's process
                    raise
        return self.statistics

    def act(self, obs: Any, state: Any = None, *, greedy: bool = True) -> Any:
        """The action for one observation or a batch, as the environment gives and takes them; see acting.act."""
        space = self.observation_space
        shape = None if isinstance(obs, dict | tuple) else shape_of(obs)
        if shape is None or space.shape not in (shape, shape[1:]):
            space = self.seen_by_players()
        how: dict[str, Any] = {"state": state, "greedy": greedy, "normalizer": self.normalizer}
        return act(self.policy, obs, space, self.action_space, **how)

    def seen_by_players(self) -> gymnasium.Space:
        """The space of observations as the environment gives them."""
        if self.unflattened is None:
            environments = self._made(1)
            self.unflattened = unflattened(environments)
            close(environments)
        return self.unflattened

    def evaluate(
        self,
        count: int | None = None,
        *,
        seed: int = 1000,
        greedy: bool | None = None,
        environment: Any = None,
        max_steps: int | None = None,
    ) -> Evaluation:
        """Play `count` whole episodes with the policy's mode, or with samples if not `greedy`.

        environment: another one than that of training. max_steps: cuts every episode. What wrappers learned in training
        is used, and does not change.
        """
        self._settle()
        played = self.task if environment is None else environment
        if played is None:
            raise UserError(
                f"the environment of this run, {self.name}, has no name to find it by: in Python, "
                f"policygrad.Run.load(RUN).evaluate(environment=...) takes {self.name} itself"
            )
        learned = self.learned()
        found = evaluate(
            self.policy,
            played,
            getattr(self.options, "evaluation_episodes", 10) if count is None else count,
            seed=seed,
            stochastic=greedy is False,
            normalizer=self.normalizer,
            learned=learned,
            max_steps=getattr(self.options, "episode_steps", None) if max_steps is None else max_steps,
            threads=self.options.threads,
            device=self.options.device,
            **self.how(environment),
        )
        if played is self.task and not self.mine and self.environments is not None and hasattr(self.sample, "stepping"):
            self.sample.stepping.obs = None  # its episodes were cut: training goes on with new ones
        return found

    def watch(self, profile: Any, learner: Any) -> None:
        stepping = self.sample.stepping
        for name in ("step", "reset"):
            setattr(stepping, name, profile.timed("environment", getattr(stepping, name)))
        super().watch(profile, learner)

    def surroundings(self) -> dict[str, Any]:
        """The environments as they stand, and their spaces."""
        stepping = self.sample.stepping
        held = state_of(stepping.environments) if stepping.begun and stepping.obs is not None else None
        return {"spaces": self._spaces(), "environments": held, "selves": self._selves()}

    def _selves(self) -> list[dict[str, Any]]:
        """The frozen selves, for a checkpoint."""
        found: list[dict[str, Any]] = []
        for one in () if self.selves is None else self.selves.frozen:
            statistics = {} if one.normalizer is None else one.normalizer.statistics.state_dict()
            known = {"iteration": one.iteration, "steps": one.steps}
            found.append({**known, "policy": one.policy.state_dict(), "observations": statistics})
        return found

    def _restore_selves(self, held: list[dict[str, Any]]) -> None:
        assert self.selves is not None
        self.selves.frozen.clear()
        for x in held:
            one = self._frozen(int(x["iteration"]), int(x["steps"]))
            one.policy.load_state_dict(x["policy"])
            if one.normalizer is not None:
                one.normalizer.statistics.load_state_dict(x["observations"])
            self.selves.take(one)

    def restore_common(self, surroundings: dict[str, Any]) -> None:
        for what, was, now in zip(("observation", "action"), surroundings["spaces"], self._spaces(), strict=True):
            if was != now:
                said = f"the {what} space was {shortened(was, 50)}, and is {shortened(now, 50)}"
                raise UserError(f"{said}: resume with the environment of training")
        if self.selves is not None:
            self._restore_selves(surroundings["selves"])

    def restore(self, surroundings: dict[str, Any]) -> str | None:
        self.restore_common(surroundings)
        stepping, held = self.sample.stepping, surroundings["environments"]
        stepping.begun = held is not None and restore(stepping.environments, held)
        if self.selves is not None:
            self.selves.tell()  # games that were played again drew from the selves of their time
        if stepping.begun:
            return None
        how = "has no state that can be saved" if held is None else "did not repeat its episode"
        return f"{self.name} {how}: new episodes begin, and the numbers will not be those of an unbroken run"

    def _spaces(self) -> list[str]:
        return [repr(self.observation_space), repr(self.action_space)]

    def part(self, row: Row) -> Any:
        """With the last episodes, of which the mean of all ranks is taken."""
        stepping, sample = self.sample.stepping, self.sample
        endings = {"success": ("success", "is_success")}
        own = {
            name: sum(
                any(x in one for x in endings.get(name, (name.removeprefix("info/"),))) for one in stepping.endings
            )
            for name in row
            if name == "success" or name.startswith("info/")
        }
        groups = max(1, stepping.environments.num_envs // sample.group_size)
        own |= {"group_std": groups, "flat_groups": groups}
        return row, {DECISIONS: float(stepping.reward_count), **own}, list(stepping.finished)

    def joined(self, parts: list[Any]) -> Row:
        joined = super().joined([part[:2] for part in parts])
        self.finished = [x for *_, finished in parts for x in finished]
        if self.finished:
            returns, lengths = zip(*self.finished, strict=True)
            joined |= {"return": float(np.mean(returns)), "length": float(np.mean(lengths))}
        return joined

    def solved(self, row: Row) -> bool:
        return row["episodes"] >= 100 and row["return"] >= self.options.stop_at_return

    def status(self, row: Row) -> list[str]:
        parts = [f"return {row['return']:,.1f}"] if "return" in row else [f"{row['reward_per_step']:.4g} reward/step"]
        parts += [f"evaluation {row['evaluation']:,.1f}"] if "evaluation" in row else []
        parts += [f"success {row['success']:.2f}"] if "success" in row else []
        parts += [f"KL {row['kl_old']:.4f}"] if "kl_old" in row else []
        return [*parts, f"{row['steps_per_second']:,.0f} steps/s"]

    def curve(self) -> Curve:
        points = ("evaluation", "mean return of an evaluation") if self.judged else None
        if self._recent():
            return Curve(points=points)
        return Curve(points=points, y=("reward_per_step", "mean reward of a step in a rollout"))

    def summary(self, rows: list[Row]) -> dict[str, Any]:
        """return_mean, return_std and success cover the last 100 training episodes."""
        recent, last = np.array(self._recent()), rows[-1] if rows else {}
        return {
            "episodes": int(rows[-1]["episodes"]) if rows else 0,
            "return_mean": float(recent.mean()) if len(recent) else None,
            "return_std": float(recent.std()) if len(recent) else None,
            "reward_per_step": last.get("reward_per_step"),
            "success": last.get("success"),
        }

    def result(self, rows: list[Row], seconds: float) -> str:
        found, steps = self.summary(rows), rows[-1]["steps"] if rows else 0
        score = "no episode has ended"
        if found["return_mean"] is not None:
            spread = f"{found['return_mean']:,.1f} +- {found['return_std']:,.1f}"
            score = f"return {spread} (last {len(self._recent())} episodes)"
        elif found["reward_per_step"] is not None:
            score = f"{found['reward_per_step']:.4g} reward per step (no episode has ended)"
        if found["success"] is not None:
            score += f", success {found['success']:.2f}"
        speed = f"{steps:,.0f} steps in {seconds:.1f} s ({steps / max(seconds, 1e-9):,.0f} steps/s)"
        return f"{score}, {speed}"

    def notes(self, run: Any) -> list[str]:
        """What a user should know: processes nobody asked for, and a policy that explores no more, or only wildly."""
        rows = [row for row in run.metrics if "entropy" in row]
        notes = []
        if self.processes:
            notes.append(
                f"{self.processes} processes stepped the environments, which measured as faster; vectorization sync "
                "keeps them in this one, with the same numbers"
            )
        quiet = since(rows, lambda row: row.get("action_std", math.inf) < 1e-3 or _certain(row))
        if quiet is not None and (quiet < 0.25 or not _has_improved(rows)):
            notes.append(
                f"the policy has not explored since step {_step_at(rows, quiet):,.0f}: its actions are near certain; "
                "if the return is too low, lower learning_rate or raise entropy_coefficient"
            )
        wide = since(rows, lambda row: row.get("action_std", 0.0) > 3 * max(1.0, rows[0].get("action_std", 1.0)))
        if wide is not None:
            notes.append(
                f"the actions are mostly noise since step {_step_at(rows, wide):,.0f}: standard deviation "
                f"{rows[-1]['action_std']:.3g} where the bounds are -1 and 1"
                + (f", {rows[-1]['bound_fraction']:.0%} of them at a bound" if "bound_fraction" in rows[-1] else "")
                + ". Lower entropy_coefficient or learning_rate"
            )
        return notes

    def _recent(self) -> list[float]:
        return [x for x, _ in (self.sample.stepping.finished if self.finished is None else self.finished)]

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "gymnasium": gymnasium.__version__}

    def close(self) -> None:
        if self.environments is not None and not self.environments.closed:
            self._settle()
            self.learned()
            if self.mine:
                close(self.environments)


def since(rows: list[Row], holds: Callable[[Row], bool]) -> float | None:
    """The share of the rows before the last ones that fulfil the condition; None if the very last does not."""
    count = 0
    while count < len(rows) and holds(rows[-1 - count]):
        count += 1
    return (len(rows) - count) / len(rows) if count else None


def _step_at(rows: list[Row], share: float) -> float:
    return rows[round(share * len(rows))]["steps"]


def _certain(row: Row) -> bool:
    """Whether a discrete policy's entropy is all but 0. A density's may be any number, and has no such meaning."""
    return "action_std" not in row and abs(row["entropy"]) < 1e-3


def _has_improved(rows: list[Row]) -> bool:
    """Whether the last return is nearer to the best one than to the first."""
    returns = [row["return"] for row in rows if "return" in row]
    return bool(returns) and returns[-1] - returns[0] > max(returns) - returns[-1]


def own_module(name: str, module: Any, *spaces: gymnasium.Space, learns: bool = True) -> nn.Module:
    """The user's own module. Raises UserError if it is not a module or has nothing to learn."""
    takes = "(observation_space, action_space)" if name == "policy" else "(observation_space)"
    try:
        made = module if isinstance(module, nn.Module) or not callable(module) else module(*spaces)
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the {name} could not be made of {takes}: {said}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} is {str(made)[:60]}: hand in an nn.Module, or a function that makes one of {takes}")
    if learns and not any(p.requires_grad for p in made.parameters()):
        raise UserError(f"the {name} handed in has no parameter that requires a gradient: there is nothing to learn")
    return made


def observations(space: gymnasium.Space, rows: int = 4, steps: int = 4) -> Tensor:
    """Random observations [rows, steps, ...] of a space. The space's own generator is left unchanged."""
    generator = np.random.default_rng(0)
    shape = (rows, steps, *(space.shape or ()))
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.from_numpy(generator.integers(space.start, space.start + space.n, shape))
    drawn = generator.normal(size=shape)
    if isinstance(space, gymnasium.spaces.Box):
        drawn = np.clip(drawn, space.low, space.high)
        if not np.issubdtype(space.dtype, np.floating):
            return torch.from_numpy(generator.integers(0, 2, shape).astype(space.dtype))
    return torch.from_numpy(drawn).to(torch.get_default_dtype())
