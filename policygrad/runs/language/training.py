"""Training a language model: the caller's loop around an algorithm."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.errors import UserError
from policygrad.language import models
from policygrad.language.generation import Engine, Request, generate
from policygrad.language.sampler import CompletionSampler
from policygrad.runs import presets
from policygrad.runs.checkpoints import write_json
from policygrad.runs.language import learners
from policygrad.runs.language.options import LANGUAGE, READ_UNDER, LanguageOptions, validate
from policygrad.runs.language.run import LanguageRun
from policygrad.runs.language.task import load_task
from policygrad.runs.learners import Learner
from policygrad.runs.options import check_read, nearest, with_values
from policygrad.runs.reports import Log, Row, progress_bar
from policygrad.runs.run import make_directory
from policygrad.runs.training import check_device, check_empty, seeded, translated


def train_language(
    algorithm: str,
    task: str | None = None,
    *,
    out: Path | str | None = None,
    preset: str | None = None,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
    engine: Engine = generate,
    watch: Callable[[LanguageRun], None] = lambda run: None,
    **values: Any,
) -> LanguageRun:
    """Train a language model.

    algorithm: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_plus_plus or ppo. task: arithmetic, which needs nothing
    else, or a data set of prompts, with `model` and `reward`. out: a directory to write the run to; None writes
    nothing. preset: the name of tuned settings, "none", or by default the task's own. engine: what samples. watch:
    called before training and after, with the evaluations there are. values: any option of the algorithm (see
    policygrad.runs.language.options), over the preset's.

    Raises UserError for whatever the caller can mend, and when training turns NaN or infinite; what had been learned
    by then is in `out`.
    """
    name = algorithm.replace("-", "_")
    if name not in LANGUAGE:
        raise UserError(f"{algorithm!r} does not train language models: {nearest(name, list(LANGUAGE))}")
    small = task == "arithmetic" and values.get("model") is None
    preset, tuned = presets.choose(preset, name, task if small else None)
    defaults = with_values(LANGUAGE[name](), tuned, f"preset {preset}: ")
    options = with_values(defaults, values)
    validate(name, options)
    check_read(options, defaults, READ_UNDER)
    if preset is not None:
        announce(f"preset {preset}: " + ", ".join(f"{key}={getattr(options, key)}" for key in tuned))
    check_device(options.device)
    directory = None if out is None else Path(out)
    check_empty(directory)
    with seeded(options.seed, options.threads), models.quiet():
        run = LanguageRun(name, load_task(task, options, announce, progress), options, preset, directory)
        sampler = _sampler(run, engine)
        learner = learners.build(options, run.policy, sampler)
        if directory is not None:
            make_directory(directory)
            write_json(directory / "config.json", run.configuration())
        if run.task.held_out is not None:
            run.before = run.evaluate()
        watch(run)
        _train(run, learner, progress)
        watch(run)
    return run


def _sampler(run: LanguageRun, engine: Engine) -> CompletionSampler:
    options, task = run.options, run.task
    stop = models.stop_tokens(task.policy.model, task.tokenizer)
    return CompletionSampler(
        task.train,
        task.tokenizer,
        task.judge,
        Request(options.completions, options.max_tokens, stop, int(task.tokenizer.pad_token_id)),
        prompts_per_rollout=options.prompts_per_rollout,
        cut=options.cut,
        cut_penalty=options.cut_penalty,
        engine=engine,
        seed=options.seed,
        device=options.device,
    )


def _train(run: LanguageRun, learner: Learner, progress: bool) -> None:
    """The loop: iterate the algorithm, log, guard against what is not finite, and stop in good order."""
    options, modules = run.options, nn.ModuleDict({"policy": run.policy})
    rates = [group["lr"] for optimizer in learner.optimizers for group in optimizer.param_groups]
    good = _trained(modules)
    start = time.perf_counter()
    with ExitStack() as stack:
        log = None if run.directory is None else stack.enter_context(Log(run.directory))
        stack.callback(_finish, run, start)
        label = f"{run.algorithm} {run.task.name}"
        advance = stack.enter_context(progress_bar(label, options.iterations, progress))
        iterations, last, tokens = translated(learner.iterations), start, 0.0
        for iteration in range(1, options.iterations + 1):
            row = {name: float(x) for name, x in next(iterations).items()}
            now = time.perf_counter()
            row |= _speeds(row, now - last, row["steps"] - tokens)
            _check(row, modules, good, iteration)
            good = _trained(modules)
            last_one = iteration == options.iterations
            if run.before is not None and (last_one or _due(options, iteration)):
                run.after = run.evaluate()
                row["held_out"] = run.after.reward
            if run.before is not None and iteration == 1:
                first: Row = {"completions": 0.0, "steps": 0.0, "held_out": run.before.reward}
                run.metrics.append(first)
            row["seconds"] = time.perf_counter() - start
            run.metrics.append(row)
            if log is not None:
                log.write(row)
            advance(_status(row))
            if options.learning_rate_schedule == "linear":
                groups = (group for optimizer in learner.optimizers for group in optimizer.param_groups)
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * (1 - iteration / options.iterations)
            last, tokens = time.perf_counter(), row["steps"]


def _due(options: LanguageOptions, iteration: int) -> bool:
    return options.evaluate_every > 0 and iteration % options.evaluate_every == 0


def _speeds(row: Row, seconds: float, tokens: float) -> Row:
    """Tokens per second of sampling and of learning, of one iteration."""
    sampling = row["sampling_seconds"] * row.get("sampling_rounds", 1.0)
    return {
        "iteration_seconds": seconds,
        "sampling_tokens_per_second": tokens / max(sampling, 1e-9),
        "learning_tokens_per_second": tokens / max(seconds - sampling, 1e-9),
    }


def _status(row: Row) -> str:
    """The newest numbers; a rollout that teaches nothing says so, since its loss of 0 would not."""
    parts = [f"reward {row['reward']:.3f}"]
    parts += [f"held-out {row['held_out']:.3f}"] if "held_out" in row else []
    parts += [f"KL(ref) {row['kl_reference']:.4f}"] if "kl_reference" in row else []
    parts += [f"length {row['length']:.0f}"]
    parts += ["all groups flat: nothing to learn"] if row.get("flat_groups") == 1 else []
    return "  ".join(parts)


def _check(row: Row, modules: nn.Module, good: dict[str, Tensor], iteration: int) -> None:
    """Raise UserError for a number that is not finite, with the parameters as they last were good."""
    bad = [f"{name} is {x}" for name, x in row.items() if not math.isfinite(x)]
    bad += [f"the parameter {n} is not finite" for n, p in modules.named_parameters() if not p.isfinite().all()]
    if bad:
        _restore(modules, good)
        raise UserError(
            f"training stopped in iteration {iteration}, because {bad[0]}; the policy before it is kept. "
            "A lower learning_rate may help"
        )


def _trained(modules: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in modules.named_parameters() if p.requires_grad}


def _restore(modules: nn.Module, good: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in modules.named_parameters():
            if name in good:
                p.copy_(good[name])


def _finish(run: LanguageRun, start: float) -> None:
    """Whatever ended the run, keep what was learned."""
    run.seconds = time.perf_counter() - start
    if run.directory is not None:
        run.save(run.directory)


def explanation(rows: list[Row]) -> str | None:
    """A line on an objective of 0, where there is something to explain."""
    flat = [row["flat_groups"] for row in rows if "flat_groups" in row]
    if flat and sum(flat) / len(flat) > 0.9:
        return (
            f"{sum(flat) / len(flat):.0%} of the groups were flat: all completions of a prompt had the same reward, "
            "and such a group has no gradient. Easier or harder prompts, more completions or a finer reward would help"
        )
    if rows and abs(rows[-1].get("objective", 1.0)) < 1e-3 and len(flat) > 0:
        return (
            "the objective is near 0 at every step because advantages are centred and the ratio starts at 1: look at "
            "reward and gradient_norm"
        )
    return None
