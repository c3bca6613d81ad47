"""The command line. It imports torch only once there is work to do."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from policygrad.errors import UserError
from policygrad.runs import presets
from policygrad.runs.directories import file_name, run_directory
from policygrad.runs.language.options import LANGUAGE, LanguageOptions, RewardModelOptions
from policygrad.runs.options import ALGORITHMS, ALIASES, VARIANTS, Options, algorithm_named, nearest, with_values
from policygrad.runs.verify.options import VerifyOptions

USAGE = """\
policygrad: the policy-gradient family of reinforcement learning

  policygrad train ALGORITHM ENVIRONMENT [options]   train a policy; --help after the algorithm lists its options
  policygrad train ALGORITHM arithmetic [options]    train a language model: on a task that needs nothing else,
  policygrad train ALGORITHM --model M --dataset D --reward R [options]      or on prompts of your own
  policygrad reward-model [options]                  learn a reward from preferences
  policygrad eval RUN [options]                      play whole episodes, or answer held-out prompts
  policygrad verify [options]                        hold every estimator against the exact gradient
  policygrad list                                    algorithms, their variants and presets

for example:

  policygrad train ppo CartPole-v1 --steps 100000
  policygrad train grpo arithmetic
  policygrad train ppo --help
  policygrad eval runs/CartPole-v1/ppo-seed0 --episodes 20

--debug, anywhere, shows the traceback of an error.
"""

O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass
class Train(Generic[O]):
    """policygrad train."""

    environment: Annotated[str, Positional, arg(metavar="ENVIRONMENT")]
    """A Gymnasium id; `module:Id-v0` imports the module first."""
    algorithm: OmitArgPrefixes[O]
    out: Path | None = None
    """Directory of the run; by default runs/ENVIRONMENT/ALGORITHM-seedSEED."""
    preset: str | None = None
    """Tuned settings by name, or none; by default the environment's own. Options given here go before them."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object at the end, and nothing else."""


L = TypeVar("L", bound=LanguageOptions)


@dataclass
class TrainLanguage(Generic[L]):
    """policygrad train, of a language model."""

    algorithm: OmitArgPrefixes[L]
    task: Annotated[str | None, Positional, arg(metavar="TASK")] = None
    """arithmetic, or a data set of prompts as --dataset names it."""
    out: Path | None = None
    """Directory of the run; by default runs/TASK/ALGORITHM-seedSEED."""
    preset: str | None = None
    """Tuned settings by name, or none; by default the task's own. Options given here go before them."""
    samples: int = 4
    """Completions shown before and after training; 0: none."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object at the end, and nothing else."""


@dataclass
class Eval:
    """Play whole episodes with a trained policy, or answer held-out prompts, and report what it scored."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The directory that train wrote."""
    episodes: int = 10
    """How many."""
    seed: int = 1000
    """Of the environments, and of the noise of a stochastic policy."""
    stochastic: FlagCreatePairsOff[bool] = False
    """Sample the actions; by default each is the mode of the policy's distribution."""
    completions: int | None = None
    """Language models: of each prompt, sampled; by default as in training. pass@k is known up to it."""
    greedy: FlagCreatePairsOff[bool] = False
    """Language models: the likeliest token each time, instead of samples."""
    samples: int = 4
    """Language models: completions to show."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object, and nothing else."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `policygrad`. Exit code 2 for what the user can mend, which is said in one line."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in rest
    rest = [x for x in rest if x != "--debug"]
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the user's own is found where the command is run
    try:
        sys.exit(_dispatch(rest))
    except (Exception, KeyboardInterrupt) as error:
        code, line = _ending(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        if line is not None:
            print(f"policygrad: {line}", file=sys.stderr)
        sys.exit(code)


def _ending(error: BaseException) -> tuple[int | None, str | None]:
    """The exit code of an error that ends the command, and its line; no code if it is a fault of ours."""
    chain = [error]  # closing what was open when it came may raise again, on top of it
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    if any(isinstance(x, KeyboardInterrupt) for x in chain):
        return 130, "stopped; what was learned so far is kept"
    told = [x for x in chain if isinstance(x, UserError)]
    if told and isinstance(error, UserError | OSError | EOFError):
        return 2, str(told[0])
    if isinstance(error, BrokenPipeError):  # who reads has seen enough, as `head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, None
    if isinstance(error, OSError):
        return 2, " ".join(str(error).split()) or type(error).__name__
    return None, None


def _dispatch(rest: list[str]) -> int:
    commands = {"train": _train, "reward-model": _reward_model, "eval": _eval, "verify": _verify, "list": _list}
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if rest[0] == "--version":
        from importlib.metadata import version

        print(version("policygrad"))
        return 0
    if rest[0] not in commands:
        raise UserError(f"unknown command {rest[0]!r}: there are {', '.join(commands)}")
    return commands[rest[0]](rest[1:])


def _train(rest: list[str]) -> int:
    if not rest or rest[0] in ("-h", "--help"):
        with contextlib.nullcontext() if rest else contextlib.redirect_stdout(sys.stderr):
            print("usage: policygrad train ALGORITHM ENVIRONMENT [options]\n       policygrad train ALGORITHM --help\n")
            _list(["algorithms"])
        return 0 if rest else 2
    name, rest = _algorithm(rest[0]), rest[1:]
    if name not in ALGORITHMS or (name in LANGUAGE and _of_language(rest)):
        return _train_language(name, rest)
    defaults = ALGORITHMS[name]()
    if not {"-h", "--help"} & set(rest):
        first = _parse(Train[type(defaults)], rest, f"train {name}", _required(defaults))  # type: ignore[misc]
        environment, preset = first.environment, first.preset
    else:  # the help shows the defaults of the environment's preset, if it is named first
        environment = rest[0] if not rest[0].startswith("-") else None
        preset = None
    preset, tuned = presets.choose(preset, name, environment)
    defaults = with_values(defaults, tuned, f"preset {preset}: ")
    command = _parse(Train[type(defaults)], rest, f"train {name}", _required(defaults))  # type: ignore[misc]
    default = Path("runs") / file_name(command.environment) / f"{name}-seed{command.algorithm.seed}"
    values = {f.name: getattr(command.algorithm, f.name) for f in fields(command.algorithm)}
    with _aside(command.json), run_directory(command.out, default) as out, _blaming(preset, tuned, values):
        _quiet()
        from policygrad.runs.training import train

        run = train(name, command.environment, out=out, preset=preset or "none", announce=print, **values)
    summary = run.summary()
    if command.json:
        print(json.dumps(summary))
        return 0
    score = "no episode has ended"
    if summary["return_mean"] is not None:
        score = (
            f"return {summary['return_mean']:,.1f} +- {summary['return_std']:,.1f} (last {len(run.recent)} episodes)"
        )
    print(
        f"{name} on {command.environment}: {score}, {summary['steps']:,} steps in {summary['seconds']:.1f} s "
        f"({summary['steps_per_second']:,.0f} steps/s)"
    )
    print(f"run: {out} (curve.png, metrics.jsonl, policy.safetensors; evaluate: policygrad eval {out})")
    return 0


def _algorithm(name: str) -> str:
    """The name of an algorithm in full, of control or language. Raises UserError with the nearest names."""
    known = [*ALGORITHMS, *ALIASES, *LANGUAGE]
    full = name.replace("-", "_")
    if full not in known:
        raise UserError(f"unknown algorithm {name!r}: {nearest(name, list(dict.fromkeys(known)))}")
    return full if full in LANGUAGE else algorithm_named(name)


def _of_language(rest: list[str]) -> bool:
    """Does the command line of an algorithm of both worlds mean a language model?"""
    return rest[:1] == ["arithmetic"] or any(x.split("=")[0] in ("--model", "--dataset") for x in rest)


def _train_language(name: str, rest: list[str]) -> int:
    defaults = LANGUAGE[name]()
    kind: Any = TrainLanguage[type(defaults)]  # type: ignore[misc]
    config = (UseAppendAction,)
    if {"-h", "--help"} & set(rest):
        task, preset = rest[0] if not rest[0].startswith("-") else None, None
        own = True
    else:
        first = _parse(kind, rest, f"train {name}", TrainLanguage(defaults), config)
        task, preset, own = first.task, first.preset, first.algorithm.model is None
    preset, tuned = presets.choose(preset, name, task if own else None)
    defaults = with_values(defaults, tuned, f"preset {preset}: ")
    command = _parse(kind, rest, f"train {name}", TrainLanguage(defaults), config)
    label = Path(command.task or command.algorithm.dataset or "arithmetic").stem
    default = Path("runs") / file_name(label) / f"{name}-seed{command.algorithm.seed}"
    values = {f.name: getattr(command.algorithm, f.name) for f in fields(command.algorithm)}
    _language_installed()

    def watch(run: Any) -> None:
        result = run.after or run.before
        if result is not None and not command.json:
            print(f"{'after ' if run.after else 'before'}: {result.line()}", flush=True)
            samples_table(result.rows[:: result.completions], limit=command.samples)

    with _aside(command.json), run_directory(command.out, default) as out, _blaming(preset, tuned, values):
        from policygrad.language.evaluation import samples_table
        from policygrad.runs.language.training import explanation, train_language

        chosen: dict[str, Any] = {"out": out, "preset": preset or "none", "announce": print, "watch": watch}
        run = train_language(name, command.task, **chosen, **values)
    summary = run.summary()
    if command.json:
        print(json.dumps(summary | {"preset": run.preset}))
        return 0
    why = explanation(run.metrics)
    if why is not None:
        print(f"note: {why}")
    last = run.metrics[-1]
    print(
        f"{name} on {run.task.name}: reward {last['reward']:.3f} in the last rollout, {summary['completions']:,} "
        f"completions, {summary['tokens']:,} tokens in {summary['seconds']:.1f} s "
        f"({last['sampling_tokens_per_second']:,.0f} tokens/s sampling, "
        f"{last['learning_tokens_per_second']:,.0f} learning)"
    )
    print(f"run: {out} (model/, samples.jsonl, curve.png, metrics.jsonl; evaluate: policygrad eval {out})")
    return 0


def _language_installed() -> None:
    """Raise UserError where the packages of language models are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "datasets", "peft", "math_verify") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for language models: pip install policygrad[language]")


def _reward_model(rest: list[str]) -> int:
    options = _parse(RewardModelOptions, rest, "reward-model", None)
    _language_installed()
    default = Path("runs") / file_name(Path(options.dataset).stem) / f"reward-model-seed{options.seed}"
    with _last_line_alone(options.json), run_directory(options.out, default) as out:
        from policygrad.runs.language.reward_model import run

        return run(replace(options, out=out))


def _required(options: O) -> Train[O]:
    """The defaults of a command whose environment has none."""
    command = Train("", options)
    command.environment = tyro.MISSING
    return command


def _eval(rest: list[str]) -> int:
    command = _parse(Eval, rest, "eval", None)
    if _is_language(command.run):
        return _eval_language(command)
    with _aside(command.json):
        _quiet()
        from policygrad.runs.run import evaluate_run

        result = evaluate_run(command.run, command.episodes, seed=command.seed, stochastic=command.stochastic)
    if command.json:
        print(json.dumps(vars(result)))
    else:
        print(
            f"return {result.return_mean:,.1f} +- {result.return_std:,.1f}, length {result.length_mean:,.1f}, "
            f"{result.episodes} episodes"
        )
    return 0


def _is_language(run: Path) -> bool:
    """Is it the directory of a run on a language model? One that cannot be read is left to those who say why."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((run / "config.json").read_text()).get("kind") == "language"
    return False


def _eval_language(command: Eval) -> int:
    _language_installed()
    with _aside(command.json):
        from policygrad.language.evaluation import samples_table
        from policygrad.runs.language.run import evaluate_language_run

        result = evaluate_language_run(command.run, command.completions, seed=command.seed, greedy=command.greedy)
    if command.json:
        print(json.dumps(result.summary()))
        return 0
    print(result.line())
    samples_table(result.rows[:: result.completions], limit=command.samples)
    return 0


def _verify(rest: list[str]) -> int:
    options = _parse(VerifyOptions, rest, "verify", None)
    with _last_line_alone(options.json):
        from policygrad.runs.verify.command import run

        return run(options)


def _list(rest: list[str]) -> int:
    topics = {
        "algorithms": _algorithms,
        "variants": _variants,
        "presets": _presets,
        "environments": _environments,
    }
    if rest and rest[0] in ("-h", "--help"):
        print(f"usage: policygrad list [{'|'.join(topics)}]")
        return 0
    if rest and rest[0] not in topics:
        raise UserError(f"nothing to list under {rest[0]!r}: there are {', '.join(topics)}")
    print("\n".join(line for topic in rest or ["algorithms", "variants", "presets"] for line in topics[topic]()))
    return 0


def _algorithms() -> list[str]:
    other = {full: alias for alias, full in ALIASES.items()}
    names = {name: name + (f" ({other[name]})" if name in other else "") for name in ALGORITHMS}
    width = max(map(len, [*names.values(), *LANGUAGE]))
    lines = [f"  {names[name]:{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in ALGORITHMS.items()]
    language = [f"  {name:{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in LANGUAGE.items()]
    return ["algorithms:", *lines, "algorithms for language models:", *language]


def _variants() -> list[str]:
    width = max(len(how) for _, how, _ in VARIANTS)
    return ["variants:"] + [f"  {how:{width}}  {name}: {what}" for name, how, what in VARIANTS]


def _presets() -> list[str]:
    width = max(map(len, presets.names()), default=0)
    return ["presets:"] + [f"  {name:{width}}  {', '.join(presets.load(name))}" for name in presets.names()]


def _environments() -> list[str]:
    import gymnasium

    return [f"  {name}" for name in sorted(gymnasium.registry)]


def _parse(kind: Any, arguments: list[str], name: str, default: Any, config: Sequence[Any] = ()) -> Any:
    """tyro's parse, with its framed error as one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=f"policygrad {name}",
                args=arguments,
                config=config,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [re.sub(r"[\s\u2500-\u257f]+", " ", line).strip() for line in said.getvalue().splitlines()]
        # without its frame, which where there is no Unicode is of dashes
        title, *lines = [line for line in lines if line.strip("-")] or ["bad arguments"]
        if title == "Required options":
            raise UserError(f"{lines[1].split()[0]} is missing: see policygrad {name} --help") from None
        meant = [line.split()[0] for line in lines if line.startswith("--")]
        hint = f"did you mean {meant[0]}? " if "Perhaps you meant:" in lines and meant else ""
        raise UserError(f"{lines[0] if lines else title}: {hint}see policygrad {name} --help") from None


@contextlib.contextmanager
def _blaming(preset: str | None, tuned: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """An error about a value that is the preset's and not the user's says so."""
    try:
        yield
    except UserError as error:
        blamed = presets.blamed(str(error), preset, tuned, values)
        if not blamed:
            raise
        raise UserError(f"{error}{blamed}") from error


@contextlib.contextmanager
def _aside(asked: bool) -> Iterator[None]:
    """With --json: standard output becomes standard error, for Python, for C and for processes started meanwhile."""
    if not asked:
        yield
        return
    saved = None
    if sys.stdout is not None and sys.stderr is not None:  # neither is closed
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)


def _flush() -> None:
    """What Python and C hold back of standard output goes to where it leads now."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.__stdout__.flush()  # type: ignore[union-attr]
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def _last_line_alone(asked: bool) -> Iterator[None]:
    """As `_aside`, around a command that prints its JSON itself, as the last line."""
    if not asked:
        yield
        return
    said = io.StringIO()
    try:
        with _aside(asked), contextlib.redirect_stdout(said):
            yield
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    *before, last = said.getvalue().splitlines(keepends=True) or [""]
    sys.stderr.write("".join(before))
    sys.stdout.write(last)


def _quiet() -> None:
    """Gymnasium's own warnings are for those who write environments."""
    import gymnasium

    gymnasium.logger.min_level = logging.CRITICAL


if __name__ == "__main__":
    main()
