"""Training a policy on an environment: the caller's loop around an algorithm."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from policygrad.control import Critic, ObservationNormalizer, Policy, RewardScaler, Sampler, make_environments
from policygrad.control.environments import Environment
from policygrad.control.evaluation import time_limit
from policygrad.errors import UserError
from policygrad.runs import learners, presets
from policygrad.runs.checkpoints import save_policy, write_json
from policygrad.runs.options import ALGORITHMS, Options, Reinforce, algorithm_named, check_read, validate, with_values
from policygrad.runs.reports import Log, ProgressLine
from policygrad.runs.run import Run, label, make_directory

Module = nn.Module | Callable[..., nn.Module]
SAVE_SECONDS = 30.0  # between one save of the policy and the next


def train(
    algorithm: str,
    environment: Environment,
    *,
    out: Path | str | None = None,
    preset: str | None = None,
    policy: Module | None = None,
    critic: Module | None = None,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
    **values: Any,
) -> Run:
    """Train a policy.

    algorithm: reinforce, actor_critic (a2c), off_policy_actor_critic, npg, trpo or ppo. environment: a Gymnasium id,
    an environment, a callable that makes one, or a vector environment. out: a directory to write the run to; None
    writes nothing. preset: the name of tuned settings, "none", or by default the environment's own if there are any.
    policy, critic: modules of one's own, or callables that make them of (observation_space, action_space) and
    (observation_space). values: any option of the algorithm (see policygrad.runs.options), over the preset's.

    The seed decides all that is random: the same seed gives the same parameters, bit for bit, on the same machine with
    the same number of threads. torch's global generator is left as it was.

    Raises UserError for whatever the caller can mend, and when training turns NaN or infinite; what had been learned
    by then is in `out`.
    """
    algorithm = algorithm_named(algorithm)
    if isinstance(environment, gymnasium.Env | VectorEnv):
        count = getattr(environment, "num_envs", 1)
        if values.setdefault("num_envs", count) != count:
            raise UserError(f"num_envs is {values['num_envs']}, and the environment handed in is {count}: leave it out")
    preset, tuned = presets.choose(preset, algorithm, environment)
    defaults = with_values(ALGORITHMS[algorithm](), tuned, f"preset {preset}: ")
    options = with_values(defaults, values)
    validate(options)
    check_read(options, defaults)
    _check_shape_read(options, defaults, policy, critic)
    if preset is not None:
        announce(f"preset {preset}: " + ", ".join(f"{name}={getattr(options, name)}" for name in tuned))
    check_device(options.device)
    directory = None if out is None else Path(out)
    check_empty(directory)
    with ExitStack() as stack:
        environments = make_environments(environment, options.num_envs, vectorization=options.vectorization)
        if isinstance(environment, str) or not isinstance(environment, gymnasium.Env | VectorEnv):
            stack.callback(environments.close)
        stack.enter_context(seeded(options.seed, options.threads))
        sampler = _sampler(environments, options)
        policy, critic = _modules(policy, critic, environments, options)
        run = Run(algorithm, environment, options, preset, policy, critic, sampler.observation_normalizer, directory)
        if directory is not None:
            make_directory(directory)
            write_json(directory / "config.json", run.configuration())
            save_policy(directory, policy, critic, run.normalizer)
        _train(run, sampler, progress)
    return run


def _train(run: Run, sampler: Sampler, progress: bool) -> None:
    """The loop: iterate the algorithm, log, guard against what is not finite, and stop in good order."""
    options = run.options
    learner = learners.build(options, run.policy, run.critic, sampler)
    rates = [group["lr"] for optimizer in learner.optimizers for group in optimizer.param_groups]
    modules = nn.ModuleDict({"policy": run.policy, "critic": run.critic})
    good = _copy(modules)
    start, next_row, next_save = time.perf_counter(), 0.0, SAVE_SECONDS
    with ExitStack() as stack:
        log = None if run.directory is None else stack.enter_context(Log(run.directory))
        line = stack.enter_context(ProgressLine(f"{run.algorithm} {label(run.environment)}", options.steps, progress))
        stack.callback(_finish, run, sampler, start)
        stack.callback(_keep, modules, good)
        for iteration, metrics in enumerate(translated(learner.iterations)):
            row = {name: float(x) for name, x in metrics.items()}
            bad = [f"{name} is {x}" for name, x in row.items() if not math.isfinite(x)]
            bad += [f"the parameter {n} is not finite" for n, p in modules.named_parameters() if not p.isfinite().all()]
            if bad:
                modules.load_state_dict(good)
                raise UserError(
                    f"training stopped in iteration {iteration + 1}, after {sampler.steps:,} steps, because {bad[0]}; "
                    "the policy before it is kept. A lower learning_rate or scale_rewards may help"
                )
            good.update(_copy(modules))
            row["seconds"] = time.perf_counter() - start
            if run.directory is not None and row["seconds"] >= next_save:  # what even a killed process leaves
                save_policy(run.directory, run.policy, run.critic, run.normalizer)
                next_save = row["seconds"] + SAVE_SECONDS
            row["steps_per_second"] = row["steps"] / row["seconds"]
            solved = row["episodes"] >= 100 and row["return"] >= options.stop_at_return
            done = solved or row["steps"] >= options.steps
            if row["steps"] >= next_row or done:
                run.metrics.append(row)
                next_row = row["steps"] + options.steps / 1000
                if log is not None:
                    log.write(row)
            line.update(row)
            if done:
                break
            if options.learning_rate_schedule == "linear":
                left = 1 - row["steps"] / options.steps
                for group, rate in zip((g for o in learner.optimizers for g in o.param_groups), rates, strict=True):
                    group["lr"] = rate * left


def translated(iterations: Any) -> Any:
    """An algorithm's iterations, with torch's complaint of NaN in a distribution as one line for the user."""
    try:
        yield from iterations
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or re.search(r"\bnan\b", str(error), re.IGNORECASE) is None:
            raise
        raise UserError(f"training stopped: a probability turned NaN ({' '.join(str(error).split())[:80]})") from error


def _keep(modules: nn.Module, good: dict[str, Tensor]) -> None:
    """Where an iteration stopped half-way with parameters that are not finite, go back to those before it."""
    if not all(p.isfinite().all() for p in modules.parameters()):
        modules.load_state_dict(good)


def _finish(run: Run, sampler: Sampler, start: float) -> None:
    """Whatever ended the run, keep what was learned."""
    run.seconds = time.perf_counter() - start
    run.recent = [x for x, _ in sampler.finished]
    if run.directory is not None:
        run.save(run.directory)


def _sampler(environments: VectorEnv, options: Options) -> Sampler:
    whole = isinstance(options, Reinforce)
    steps = options.num_steps or time_limit(environments)
    if steps is None:
        raise UserError("the environment has no time limit: say how long an episode may be, with num_steps")
    space = environments.single_observation_space
    normalizer = ObservationNormalizer(space.shape or ()) if options.normalize_observations else None
    scaler = RewardScaler(environments.num_envs, options.gamma) if options.scale_rewards else None
    return Sampler(
        environments,
        steps,
        seed=options.seed,
        whole_episodes=whole,
        observation_normalizer=normalizer,
        reward_scaler=scaler,
        device=options.device,
    )


def _modules(
    policy: Module | None, critic: Module | None, environments: VectorEnv, options: Options
) -> tuple[nn.Module, nn.Module]:
    """The user's own modules where there are any, else perceptrons as the options say; on the device."""
    observation_space, action_space = environments.single_observation_space, environments.single_action_space
    shape: dict[str, Any] = {
        "hidden": options.hidden,
        "activation": options.activation,
        "orthogonal": options.orthogonal,
    }
    if policy is None:
        policy = Policy(
            observation_space,
            action_space,
            **shape,
            squash=options.squash,
            state_dependent_std=options.state_dependent_std,
            initial_log_std=options.initial_log_std,
        )
    else:
        policy = _own("policy", policy, observation_space, action_space)
    if critic is None:
        critic = Critic(observation_space, **shape)
    else:
        # Where policy and critic share an optimiser a critic that is given may be left as it is.
        critic = _own("critic", critic, observation_space, learns=hasattr(options, "critic_epochs"))
    return policy.to(options.device), critic.to(options.device)


def _own(name: str, module: Any, *spaces: gymnasium.Space, learns: bool = True) -> nn.Module:
    """A module of the user's own. Raises UserError for what is none, or has nothing to learn."""
    made = module if isinstance(module, nn.Module) or not callable(module) else module(*spaces)
    if not isinstance(made, nn.Module):
        takes = "(observation_space, action_space)" if name == "policy" else "(observation_space)"
        raise UserError(f"{name} is {made!r}: hand in an nn.Module, or a function that makes one of {takes}")
    if learns and not any(p.requires_grad for p in made.parameters()):
        raise UserError(f"the {name} handed in has no parameter that requires a gradient: there is nothing to learn")
    return made


def _check_shape_read(options: Options, defaults: Options, policy: Module | None, critic: Module | None) -> None:
    """Raise UserError for an option of the networks made here where the user's own take their place."""
    own_policy, both = policy is not None, policy is not None and critic is not None
    unread = {"squash": own_policy, "state_dependent_std": own_policy, "initial_log_std": own_policy}
    unread |= {"hidden": both, "activation": both, "orthogonal": both}
    for name, ignored in unread.items():
        if ignored and getattr(options, name) != getattr(defaults, name):
            raise UserError(f"{name} shapes the networks made here, and you hand in your own: leave {name} out")


def check_device(name: str) -> None:
    """Raise UserError for a device that cannot be used here."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def seeded(seed: int, threads: int | None) -> Iterator[None]:
    """torch with a seed and a number of threads (None: as it is); afterwards both are what they were."""
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def check_empty(directory: Path | None) -> None:
    """Raise UserError for a directory that holds something."""
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty, and nothing is overwritten: choose another directory")


def _copy(modules: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in modules.state_dict().items()}
