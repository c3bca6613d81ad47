"""The command line: parse, call, print. It imports torch only when there is work to do."""

import contextlib
import difflib
import errno
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from policygrad.errors import Kept, Note, UserError, one_line, shortened, within
from policygrad.train import presets
from policygrad.train.directories import file_name, run_directory
from policygrad.train.methods import ALIASES, CLONE, KNOWN, METHODS, TABLE, VARIANTS, method_named, nearest
from policygrad.train.names import trusting
from policygrad.train.options import Options, for_command_line, in_words, options_of, repeats, validate, with_values
from policygrad.train.reward_options import RewardModelOptions
from policygrad.train.search import searched
from policygrad.train.stopping import SIGNALS, Stopped
from policygrad.train.worlds import NO_PROMPTS, OWN_TASKS, kind_of
from policygrad.verify.options import VerifyOptions

LONGEST = 200  # characters of a message
# The options of eval that override what a run was trained with.
REPEATED = (
    "environment",
    "reward",
    "tool",
    "dataset",
    "split",
    "columns",
    "model",
    "critic",
    "trust_remote_code",
    "device",
)
_flat: Any = OmitArgPrefixes

USAGE = """\
policygrad: the policy-gradient family of reinforcement learning

  policygrad train METHOD TASK [options]    train a policy by any method, on any task:
                                              CartPole-v1       a Gymnasium environment
                                              arithmetic        a language model, on a task that needs nothing else
                                              lookup            the same, in conversations with a tool
                                              exact:chain       a small world in closed form
  policygrad train METHOD --model M --dataset D --reward R [options]     a language model, on prompts of your own
  policygrad train compose TASK [--update U] [options]   any credit, objective and update; its row of verify first
  policygrad clone TASK DATA [options]      learn from demonstrations; any method goes on from it, by --start
  policygrad clone --model M --dataset D [options]                       supervised fine-tuning of a language model
  policygrad reward-model [options]         learn a reward from preferences
  policygrad resume RUN [options]           go on with a run that was stopped, or killed, as if it had not been
  policygrad reproduce RUN [options]        train it again from its directory alone, and compare every bit
  policygrad eval RUN [options]             play whole episodes, or answer held-out prompts
  policygrad elo RUN [options]              how strong the selves of self-play are, by games between them
  policygrad watch RUN [options]            a video of its episodes, or a transcript
  policygrad tune METHOD TASK [options]     search for better options, and write them down as a preset
  policygrad export RUN [options]           its policy as one graph, for ONNX or torch.export
  policygrad compare RUN... [options]       methods and seeds side by side, with the uncertainty of few runs
  policygrad report RUN... [options]        a page with the curves of runs, and what they say
  policygrad push RUN NAME [options]        put a run on the Hugging Face hub; hub:NAME reads it from there
  policygrad check METHOD TASK [options]    does the gradient depend on how a batch is split?
  policygrad verify [options]               hold every method and estimator against the exact gradient
  policygrad list                           methods, their variants and presets

for example:

  policygrad train ppo CartPole-v1 --steps 100000
  policygrad train grpo arithmetic
  policygrad train ppo CartPole-v1 --help   every option, with the default that it has there
  policygrad eval runs/CartPole-v1/ppo-seed0 --episodes 20

Several processes train one run with torchrun --nproc-per-node N -m policygrad train ... (docs/scale.md).
--debug, anywhere, shows the traceback of an error.
"""


@dataclass
class Trained:
    """A run, what to play of it, and the names that it may follow out of its directory."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Directory of a run, as written by train, or hub:NAME[@REVISION]."""
    episodes: int | None = None
    """Number of episodes (control); by default 10, and 1 to watch."""
    max_steps: int | None = None
    """Maximum length of an episode (control); by default the task's time limit."""
    completions: int | None = None
    """Completions per prompt (language models), and the largest k of pass@k; by default as in training, 1 to watch."""
    greedy: FlagCreatePairsOff[bool] = False
    """Take the most likely action; the default in control."""
    sampled: FlagCreatePairsOff[bool] = False
    """Sample actions from the policy; the default for language models."""
    seed: int | None = None
    """Random seed of the environments and of sampling; 1000 by default."""
    samples: int | None = None
    """Number of completions to show (language models); 4 by default."""
    trust: FlagCreatePairsOff[bool] = False
    """Believe the run: import the code that it names, and read files of elsewhere. For runs of your own."""
    environment: str | None = None
    """Environment, if it is of a module or file (control, and language models that talk to one)."""
    reward: tuple[str, ...] = ()
    """Reward, if it is a function of yours or a reward model (language models). Repeatable."""
    tool: tuple[str, ...] = ()
    """Tool, if it is a function of yours, or python:unconfined (language models). Repeatable."""
    dataset: str | None = None
    """Prompts to evaluate on, in place of those that were held out from training (language models)."""
    split: str | None = None
    """Split of that data set, such as test[:100]; test by default. A file is one split."""
    columns: tuple[str, ...] = ()
    """Rename a column of that data set, new=old; by default as in training. Repeatable."""
    model: str | None = None
    """The model below an adapter (language models)."""
    critic: str | None = None
    """The model of the critic (language models)."""
    trust_remote_code: FlagCreatePairsOff[bool] = False
    """Run Python code that comes with the model (language models)."""
    device: str | None = None
    """Device of the policy; by default as in training."""


@dataclass
class Eval(Trained):
    """Play whole episodes with a trained policy, or answer held-out prompts, and report the score.

    A run directory is data: code that it names, and files of elsewhere, are used only if the name is repeated here, or
    with --trust.
    """

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""


@dataclass
class Watch(Trained):
    """Make a video of a trained policy's episodes; for language models and exact worlds, a transcript.

    A run directory is data, as for eval.
    """

    out: Path | None = None
    """File of the video, .mp4 or .gif (by default RUN/video.mp4), or of the transcript (by default the terminal)."""


@dataclass
class Push(Trained):
    """Evaluate a run and put it on the Hugging Face hub, with a card: its policy, configuration, metrics, held-out
    prompts (language models), pictures and video, no checkpoints. hub:NAME reads it from there, in place of RUN.

    A run directory is data, as for eval. The token is that of `hf auth login`, or HF_TOKEN.
    """

    name: Annotated[str | None, Positional, arg(metavar="NAME")] = None
    """USER/NAME on the hub, or NAME alone for the user of the token."""
    private: FlagCreatePairsOff[bool] = False
    """Only for those who may see it."""


@dataclass
class Export:
    """Write a trained policy as one graph, from the environment's observation to its action (control).

    Normalizer, network, the mode of the distribution and the clipping of actions are in it. It is written only after it
    has given the actions of the run on 1,000 observations. A run directory is data, as for eval.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Directory of a run, as written by train."""
    format: Literal["onnx", "torch-export"] = "onnx"
    """onnx: for ONNX Runtime; torch-export: for torch.export.load."""
    out: Path | None = None
    """File; by default RUN/policy.onnx, or RUN/policy.pt2."""
    trust: FlagCreatePairsOff[bool] = False
    """Believe the run: import the code that it names, and read files of elsewhere. For runs of your own."""
    environment: str | None = None
    """Environment, if it is of a module or file."""


@dataclass
class Elo:
    """Let the frozen selves of a run of self-play, and a random player, play each other, and rate them.

    The random player is 0; 400 points more are odds of 10 to 1. All sample their actions. A run directory is data, as
    for eval.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Directory of a run with --opponent self, as written by train."""
    games: int = 20
    """Games of each pair, half of them in each seat."""
    players: int = 12
    """The most players to compare, evenly from the first to the last."""
    seed: int = 1000
    """Random seed of all games."""
    trust: FlagCreatePairsOff[bool] = False
    """Believe the run: import the code that it names, and read files of elsewhere. For runs of your own."""
    environment: str | None = None
    """Environment, if it is of a module or file."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""


@dataclass
class Report:
    """Write an HTML page about runs: their curves, and the known illnesses of training that these show; their
    configuration, evaluation, samples and video. The page needs no network."""

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN")] = ()
    """Directories of runs, or that hold runs, such as a study's; or hub:NAME."""
    out: Path | None = None
    """File of the page; by default RUN/report.html, and report.html for several."""
    live: FlagCreatePairsOff[bool] = False
    """Serve the page on this machine (127.0.0.1) instead, and follow the runs as they go on."""
    port: int = 0
    """Port of --live; by default any that is free."""


@dataclass
class Compare:
    """Compare runs: for each method and task the interquartile mean, mean and median of the final scores with their
    bootstrap intervals, learning curves, performance profiles, and the probability that one method beats another.

    Runs are grouped by what they are: the method, and the options that differ, all but the seed.
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN")] = ()
    """Directories of runs, or that hold runs, such as a study's; or hub:NAME."""
    out: Path | None = None
    """Directory for comparison.png, comparison.md and comparison.json."""
    score: Literal["auto", "training", "evaluation"] = "auto"
    """training: the last return of training (language models: reward); evaluation: the last held-out reward, or J on
    exact worlds; auto: evaluation if every run has it, training if none has."""
    at: int | None = None
    """Compare the scores at this many steps (language models: completions); by default the last."""
    unfinished: FlagCreatePairsOff[bool] = False
    """Count runs that have not finished, too."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""


@dataclass
class Reproduce:
    """Train a run again from its directory alone, compare every number, and say where it parts. Nothing is written.

    A run directory is data: code that it names, and models and data sets of elsewhere, are used only if the name is
    repeated here, or with --trust.
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Directory of a run, as written by train."""
    trust: FlagCreatePairsOff[bool] = False
    """Believe the run: import the code that it names, and read files of elsewhere. For runs of your own."""
    environment: str | None = None
    """Environment, if it is of a module or file (control, and language models that talk to one)."""
    reward: tuple[str, ...] = ()
    """Reward, if it is a function of yours or a reward model (language models). Repeatable."""
    tool: tuple[str, ...] = ()
    """Tool, if it is a function of yours, or python:unconfined (language models). Repeatable."""
    dataset: tuple[str, ...] = ()
    """Prompts of training (language models). Repeatable."""
    evaluation_dataset: tuple[str, ...] = ()
    """Prompts of evaluation (language models). Repeatable."""
    demonstrations: str | None = None
    """Transitions that were cloned (control)."""
    model: str | None = None
    """Model that training began with (language models)."""
    base_model: str | None = None
    """Base of that model, if it is an adapter (language models)."""
    tokenizer: str | None = None
    """Tokenizer of training (language models)."""
    critic: str | None = None
    """Model of the critic (language models)."""
    trust_remote_code: FlagCreatePairsOff[bool] = False
    """Run Python code that comes with the model (language models)."""
    device: str | None = None
    """Device; by default as before."""
    threads: int | None = None
    """CPU threads of torch; by default as before."""
    ray: str | None = None
    """Address of the Ray cluster that has the samplers; by default as before."""
    engine_python: str | None = None
    """Python of the environment that has the engine (language models)."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object at the end, and nothing else."""


@dataclass
class Resume(Reproduce):
    """Go on with a run that was stopped or killed, from its last checkpoint, as if it had not been.

    A run directory is data: code that it names, and models and data sets of elsewhere, are used only if the name is
    repeated here, or with --trust.
    """

    steps: int | None = None
    """Train for so many steps more than the run was to have."""
    iterations: int | None = None
    """Train for so many iterations more than the run was to have."""


SEARCH = """\
Search for the options with the highest score, by Optuna, and write them to preset.toml, which train takes.

The score is that of compare: the last evaluation in training (control: with --evaluate-every; language: held-out
prompts; exact worlds: J), else the last return or reward of training. Trials whose learning curve is below the median
of the others are stopped early. An option that is given here is fixed. The others are tuned, from what they are without
tuning:"""


class Helped(Exception):
    """Help was asked for, and printed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `policygrad`. An error that the user can fix is printed as one line, with exit code 2."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in rest
    rest = [x for x in rest if x != "--debug"]
    code: int | None
    try:
        with _stopped_by_signals():
            code = _dispatch(rest) if _alone() else _dispatch_rank(rest)
    except BaseException as error:  # code of the user's may raise what is no Exception, such as CancelledError
        code, line = _ending(error)
        if code is None:
            _of_ranks(f"{type(error).__name__}: {one_line(error, 90)}; its traceback is above", error)
            raise
        if debug and line is not None:
            traceback.print_exc()
        line = line if _alone() else _of_ranks(line, error)
        if line is not None:
            print(f"policygrad: {within(line, LONGEST if code == 2 else 10 * LONGEST)}", file=sys.stderr)
    sys.exit(code)


def _alone() -> bool:
    """Whether this process is one by itself, not one of several that torchrun has started."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1")


def _dispatch_rank(rest: list[str]) -> int:
    """A command in one of several processes, which must all have the same. Rank 0 speaks for them."""
    if rest[:1] not in (["train"], ["clone"], ["resume"]):
        if os.environ.get("RANK", "0") != "0":
            return 2
        said = f"{shortened(rest[0])[1:-1]} runs" if rest else "this runs"
        raise UserError(f"{said} in one process: start it without torchrun, which is for train, clone and resume")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what it warns of, with its stack, is said here in one line
    from policygrad import ranks

    ranks.join()
    words = {f"argument {i}": x for i, x in enumerate(rest, 1)}
    ranks.check_alike("the command's", words | {"version of Python, torch or the code": _code()})
    if ranks.rank() == 0:
        code = _dispatch(rest)
    else:
        warnings.simplefilter("ignore", Note)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            code = _dispatch(rest)
    ranks.leave()
    return code


def _code() -> str:
    """What the numbers of a run depend on, besides its options."""
    import hashlib

    import torch

    here = Path(__file__).parent
    found = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.rglob("*.py"))))
    return f"{sys.version.split()[0]} {torch.__version__} {found.hexdigest()[:12]}"


def _of_ranks(line: str | None, error: BaseException) -> str | None:
    """The line that this rank prints of what ended it, if it is the one to speak."""
    if line is None or "policygrad.ranks" not in sys.modules:
        return line
    from policygrad import ranks

    speaks, line = ranks.speaks(line, error)
    with contextlib.suppress(RuntimeError):
        ranks.leave()  # the system's threads would abort a process that ends without
    return line if speaks else None


def _ending(error: BaseException) -> tuple[int | None, str | None]:
    """The exit code and the message of an error; no exit code if the error is a bug."""
    if isinstance(error, Helped):
        return 0, None
    chain = [error]  # cleanup after the first error may raise another one
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    kept = next((str(x) for one in chain for x in getattr(one, "__notes__", ()) if isinstance(x, Kept)), None)
    stops = [x for x in chain if isinstance(x, KeyboardInterrupt)]
    if stops:
        number = next((x.number for x in stops if isinstance(x, Stopped)), int(signal.SIGINT))
        return 128 + number, f"stopped; {kept or 'nothing was saved'}"
    told = [x for x in chain if isinstance(x, UserError)]

    def fixable(line: str) -> tuple[int, str]:
        return 2, f"{line}; {kept}" if kept is not None and len(line) + len(kept) <= LONGEST - 2 else line

    if told and isinstance(error, UserError | OSError | EOFError):
        return fixable(str(told[0]))
    if isinstance(error, SystemExit):
        said = f"ended the program, by exit({shortened(error.code, 40)})"
        return fixable(f"code that was called{_where(error)} {said}: let it return or raise")
    if not isinstance(error, Exception):
        said = f"raised {type(error).__name__} ({one_line(error, 40)}), which is no Exception"
        return fixable(f"code that was called{_where(error)} {said}: let it raise another error")
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        said = one_line(error, 80)
        return fixable(
            f"there is not enough memory ({said}): lower num_envs, num_steps, hidden, completions or another size"
        )
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, None
    if isinstance(error, OSError):
        said = " ".join(str(error).split()) or type(error).__name__
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return fixable(within(said, 150) + ": make room, or choose another place" * full)
    return None, None


def _where(error: BaseException) -> str:
    """The user's function that raised an error, as the end of a phrase; nothing if none is on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
        return ""
    last = frames[-1]
    return f" ({one_line(last.name, 30)}, {one_line(Path(last.filename).name, 40)} line {last.lineno})"


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stopped, once: a second signal ends the process at once.

    While a run trains, the first one only asks it to stop, and these come into effect with the second. A signal that is
    ignored stays so (nohup), and processes forked here behave as usual.
    """
    main, owner = threading.current_thread() is threading.main_thread(), os.getpid()
    before = {x: signal.getsignal(x) for x in SIGNALS if main and signal.getsignal(x) is not signal.SIG_IGN}

    def stop(number: int, frame: Any) -> None:
        for x in before:
            signal.signal(x, signal.SIG_DFL)
        if os.getpid() == owner:
            raise Stopped(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    for x in before:
        signal.signal(x, stop)
    try:
        yield
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)


def _dispatch(rest: list[str]) -> int:
    commands = {
        "train": _train,
        "clone": _clone,
        "resume": _resume,
        "reproduce": _reproduce,
        "reward-model": _reward_model,
        "eval": _eval,
        "elo": _elo,
        "watch": _watch,
        "export": _export,
        "tune": _tune,
        "compare": _compare,
        "report": _report,
        "push": _push,
        "check": _check,
        "verify": _verify,
        "list": _list,
    }
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if rest[0] == "--version":
        from policygrad import __version__

        print(__version__)
        return 0
    for word in rest:
        if "\0" in word or not _is_unicode(word):
            raise UserError(
                f"the argument {shortened(word)} is no text: it has a null byte or bytes that are not UTF-8"
            )
        if not word:
            raise UserError("an argument is empty (a variable of the shell that is not set?): give it, or leave it out")
    if rest[0] not in commands:
        raise UserError(f"unknown command {shortened(rest[0])}: {nearest(rest[0].lower(), list(commands))}")
    return commands[rest[0]](rest[1:])


def _is_unicode(word: str) -> bool:
    try:
        return bool(word.encode()) or not word
    except UnicodeEncodeError:
        return False


@dataclass
class Asked:
    """A method on a task with options, as train and tune are given them."""

    name: str
    task: str | None
    preset: str | None
    tuned: dict[str, Any]  # the preset's values
    command: Any
    values: dict[str, Any]  # of all options
    named: set[str]  # what is given
    options: Any  # without what is given


def _asked(verb: str, rest: list[str], command_of: Any, more: set[str]) -> Asked | None:
    """The method, the task and their options from the command line; None if there is nothing but help to give.

    command_of: the dataclass of the command, for the options of a method on a world. more: its own options.
    """
    if not rest or rest[0] in ("-h", "--help"):
        with contextlib.nullcontext() if rest else contextlib.redirect_stdout(sys.stderr):
            print(f"usage: policygrad {verb} METHOD TASK [options]\n       policygrad {verb} METHOD TASK --help\n")
            _list(["methods"])
        return None
    (method, task, *_), rest = _free_first(rest)
    if method is None:
        raise UserError(f"there is no method: write policygrad {verb} METHOD TASK; policygrad list shows the methods")
    first, second = (str(x).lower().replace("-", "_") for x in (method, task))
    if second in {*KNOWN, *ALIASES} and first not in {*KNOWN, *ALIASES}:
        raise UserError(f"the method comes first: policygrad {verb} {one_line(task, 60)} {one_line(method, 60)}")
    if task is None and first not in {*KNOWN, *ALIASES} and _is_task(method):
        said = one_line(method, 60)
        raise UserError(
            f"the method is missing: write policygrad {verb} METHOD {said}, such as policygrad {verb} ppo {said}"
        )
    name, rest = method_named(method).name, rest[1:]
    asked = {"-h", "--help"} & set(rest)
    flags = {x.split("=")[0].removeprefix("--").replace("-", "_") for x in rest if x.startswith("--")}
    known = {f.name for f in fields(Options)}
    named = {x if x in known else x.removeprefix("no_") for x in flags}
    known |= {"help", *more}
    if task is None and named - known:  # its value may have been meant as the task
        raise UserError(_no_option(as_flag(min(flags - known)), map(as_flag, known)))
    kind = (
        "control"
        if asked and task is None and not named & {"model", "dataset"}
        else kind_of(task, dict.fromkeys(named, True))
    )
    options = options_of(name, kind)()
    elsewhere = {f.name for f in fields(Options)} - {f.name for f in fields(options)}
    with_values(options, dict.fromkeys(elsewhere & named))  # raises an error that says where it applies
    preset = None
    if not asked:
        first = _parse(command_of(options), rest, f"{verb} {name}")
        task, preset = first.task, first.preset
        if kind == "language" and task is None and not first.options.dataset:
            raise UserError(NO_PROMPTS)
    preset, tuned = presets.choose(preset, name, task, {"model": "model" in named or None})
    options = with_values(options, tuned, f"preset {preset}: ")
    command = _parse(command_of(options), rest, f"{verb} {name}")
    values = {f.name: getattr(command.options, f.name) for f in fields(command.options)}
    if kind == "language":
        _language_installed()
    with presets.blamed(preset, tuned, {name for name, x in values.items() if x != getattr(options, name)}):
        validate(with_values(options, values), options)
    return Asked(name, task, preset, tuned, command, values, named, options)


# What `train compose` starts from, by its --update: a line of the table with that update.
COMPOSED = {"ascend": "grpo", "natural": "npg", "trust_region": "trpo"}

OF_COMPOSE = """\
usage: policygrad train compose TASK [--update ascend|natural|trust_region] [--anyway] [options]

Any credit, objective and update that fit together. Before it trains it prints its row of verify.
  --update   what is done with the gradient; ascend by default
  --anyway   train although the row says WRONG

With this update it starts from {0}, whose options and defaults follow.
"""


def _composed(rest: list[str]) -> tuple[list[str], bool]:
    """`train compose TASK --update U` as `train METHOD TASK`, and whether --anyway was said."""
    words, update = list(rest), "ascend"
    for i, word in enumerate(words):
        if word == "--update" or word.startswith("--update="):
            several = word == "--update"
            update = word.removeprefix("--update=") if not several else (words[i + 1 :] or [""])[0]
            del words[i : i + 1 + several]
            break
    if update not in COMPOSED:
        raise UserError(f"--update is {shortened(update)}: it must be one of {', '.join(COMPOSED)}")
    anyway = "--anyway" in words
    return [COMPOSED[update], *(x for x in words if x != "--anyway")], anyway


def _train(rest: list[str]) -> int:
    composes, anyway = [x.lower() for x in rest[:1]] == ["compose"], False
    if composes:
        rest, anyway = _composed(rest[1:])
        if {"-h", "--help"} & set(rest):
            print(OF_COMPOSE.format(rest[0]))
    found = _asked("train", rest, _command, {"out", "preset", "json", "samples", "seeds", "processes"})
    if found is None:
        return 0 if rest else 2
    if composes:
        from policygrad.verify.composed import shown

        shown(with_values(found.options, found.values), anyway)
    command, values, options = found.command, found.values, found.options
    label = Path(found.task or values["dataset"][0]).stem if options.world == "language" else found.task
    default = Path("runs") / file_name(str(label)) / f"{found.name}-seed{values['seed']}"
    with presets.blamed(found.preset, found.tuned, {x for x, y in values.items() if y != getattr(options, x)}):
        if command.seeds is not None:
            if not _alone():
                raise UserError("seeds is of a study, whose runs have a process each: start it without torchrun")
            return _study(found)
        if command.processes is not None:
            raise UserError("processes is of a study: give its seeds, such as --seeds 0-9, or leave it out")
        with _aside(command.json), _directory(command.out, default) as out:
            _quiet()
            run = _run(found, out)
    return _trained(run, out, command.json)


@contextlib.contextmanager
def _directory(given: Path | None, default: Path) -> Iterator[Path]:
    """The directory of a run. Of several ranks, rank 0 makes it and tells the others where it is."""
    if _alone():
        with run_directory(given, default) as out:
            yield out
        return
    from policygrad import ranks

    if given is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
        raise UserError("torchrun --max-restarts goes on from checkpoints, which need a place: give --out DIRECTORY")
    with contextlib.ExitStack() as stack:
        yield ranks.from_first(lambda: stack.enter_context(run_directory(given, default)))


def _restarted() -> bool:
    """Whether torchrun has started this process again, after one of the ranks had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _begun(out: Path) -> bool:
    """Whether the run of a process that was restarted has begun; what one left that had not is removed."""
    from policygrad import ranks
    from policygrad.train.directories import release
    from policygrad.train.training import WRITTEN

    def look() -> bool:
        if not (out / "config.json").exists():
            release(out, [], WRITTEN)
            return False
        return True

    return bool(ranks.from_first(look))


def _clone(rest: list[str]) -> int:
    """`policygrad clone TASK DATA` is `policygrad train clone TASK --demonstrations DATA`."""
    (task, data, *_), words = _free_first(rest)
    if data is not None and re.search(r"\.(jsonl|parquet|hdf5)$", task) and not re.search(r"\.\w+$", data):
        raise UserError(f"the task comes first: policygrad clone {one_line(data, 60)} {one_line(task, 60)}")
    if data is not None:
        del words[1]
        words.append(f"--demonstrations={data}")
    return _train([CLONE.name, *words])


def _trained(run: Any, out: Path, as_json: bool) -> int:
    """Print what a run has come to."""
    if as_json:
        print(json.dumps(run.summary()))
        return 0
    for note in run.world.notes(run):
        print(f"note: {note}")
    print(f"{run.method} on {run.world.name}: {run.world.result(run.metrics, run.seconds)}")
    if run.profile is not None:
        print(run.profile.table())
    flags = trusting(run.world.kind, run.world.stored(), run.options)
    if run.world.kind == "language" and not run.world.judged:
        flags += " --dataset PROMPTS"
    if (
        run.method == CLONE.name
        and run.world.kind == "language"
        and not run.options.reward
        and run.world.task not in OWN_TASKS
    ):
        flags += " --reward REWARD"
    best = run.best
    if best is not None and best["iteration"] < run.stage.iteration and (out / "best").is_dir():
        said = f"{best['metric']} {best['score']:,.4g}, iteration {best['iteration']:,} of {run.stage.iteration:,}"
        print(f"best: {said} (evaluate: policygrad eval {shlex.quote(str(out / 'best'))}{flags})")
    print(f"run: {out} (evaluate: policygrad eval {shlex.quote(str(out))}{flags})")
    return 0


def _tune(rest: list[str]) -> int:
    """Search for better options, and print the best trials."""
    found = _asked("tune", rest, _tune_command, {"out", "preset", "json", "trials"})
    if found is None:
        return 0 if rest else 2
    command = found.command
    with _aside(command.json):
        _quiet()
        from policygrad.train.reports import at_terminal
        from policygrad.train.tuning import tune

        given = {x: y for x, y in found.values.items() if x in found.named}
        result = tune(
            found.name,
            found.task,
            trials=command.trials,
            out=command.out,
            preset=command.preset,
            progress=not command.json or at_terminal(),
            **given,
        )
    if command.json:
        print(json.dumps(result.summary()))
        return 0
    print(f"maximized: {result.maximized}")
    result.show()
    print(f"preset: {result.preset}\ntrain with it: {result.command()}")
    return 0


def _study(found: Asked) -> int:
    """Train several seeds, and print what they come to."""
    name, task, command, values, preset = found.name, found.task, found.command, found.values, found.preset
    from policygrad.train.reports import at_terminal
    from policygrad.train.studies import seeds_of, study

    for option in sorted({"seed", "samples"} & found.named):
        raise UserError(f"{option} is of one run, and seeds of a study: leave one of the two out")
    common = {x: y for x, y in values.items() if x != "seed"}
    with _aside(command.json):
        _quiet()
        if preset is not None:
            options = with_values(options_of(name, kind_of(task, values))(), values)
            print(presets.said(preset, found.tuned, options), flush=True)
        result = study(
            name,
            task,
            seeds=seeds_of(command.seeds),
            out=command.out,
            processes=command.processes,
            preset=preset or "none",
            progress=not command.json or at_terminal(),
            **common,
        )
    if command.json:
        print(json.dumps(result.summary()))
    elif result.comparison is not None:
        result.comparison.show()
        print(f"study: {result.directory} (comparison.png; compare it: policygrad compare {result.directory} RUN...)")
    for seed, said in result.failed.items():
        print(f"policygrad: {within(f'seed {seed} failed: {said}')}", file=sys.stderr)
    return 2 if result.failed else 0


def _resume(rest: list[str]) -> int:
    command = _parse(Resume, rest, "resume", UseAppendAction)
    if (command.steps or command.iterations) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
        raise UserError("each restart would add steps and iterations once more: leave --max-restarts out, or them")
    with _aside(command.json):
        _quiet()
        from policygrad.train.recording import complete
        from policygrad.train.reports import at_terminal
        from policygrad.train.training import Training

        progress = not command.json or at_terminal()
        with Training.resume(command.run, progress=progress, **_given(command)) as training:
            if not command.json:
                print(f"goes on from iteration {training.iteration:,} ({training.run.stage.steps:,} steps)", flush=True)
            complete(training, progress, signals=True)
    return _trained(training.run, command.run, command.json)


def _reproduce(rest: list[str]) -> int:
    command = _parse(Reproduce, rest, "reproduce", UseAppendAction)
    with _aside(command.json):
        _quiet()
        from policygrad.train.reports import at_terminal
        from policygrad.train.reproduce import reproduce

        found = reproduce(command.run, progress=not command.json or at_terminal(), **_given(command))
    print(json.dumps(found.summary()) if command.json else "\n".join(found.lines()))
    return int(found.first is not None)


def _given(command: Any) -> dict[str, Any]:
    """What the user says of a run, beside its directory."""
    values = {f.name: getattr(command, f.name) for f in fields(command) if f.name not in ("run", "json")}
    return {name: x for name, x in values.items() if x is not None and x is not False and x != ()}


def _is_task(word: str) -> bool:
    """Whether a word can only be a task: an id with its version, a file, a module's name, or one of this library's."""
    return word in OWN_TASKS or ":" in word or re.search(r"-v\d+$|\.(py|jsonl?|csv|parquet)$", word) is not None


def _free_first(words: list[str]) -> tuple[list[Any], list[str]]:
    """The method, the task and whatever else is no option or value of one, or None; and the words in that order."""
    kinds = {f.name: str(f.type) for f in fields(Options)} | {"json": "bool"}
    free, options, waiting = list[str](), list[str](), list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            free.append(word)
            continue
        options.append(word)
        kind = kinds.get(word.removeprefix("--").replace("-", "_"), "")
        if "=" in word or kind == "bool" or word in ("-h", "--help"):
            continue
        if waiting and not waiting[0].startswith("--"):
            options.append(waiting.pop(0))
        while "tuple[int" in kind and waiting and waiting[0].isdigit():
            options.append(waiting.pop(0))
    return [*free, None, None], free + options


def _run(found: Asked, out: Path) -> Any:
    """Train, and print the preset and the evaluations before and after."""
    from policygrad.train.recording import complete
    from policygrad.train.reports import at_terminal
    from policygrad.train.samples import samples_table
    from policygrad.train.training import Training

    def judged(when: str, result: Any) -> None:
        if result is not None and not command.json:
            print(f"{when} {result.line()}", flush=True)
            if hasattr(result, "rows"):
                samples_table(result.rows[:: result.completions], limit=command.samples)

    name, task, command, values, preset = found.name, found.task, found.command, found.values, found.preset
    if preset is not None:
        options = with_values(options_of(name, kind_of(task, values))(), values)
        print(presets.said(preset, found.tuned, options), flush=True)
    progress = not command.json or at_terminal()  # beside one JSON object a bar, but no lines in a log
    if _restarted() and _begun(out):
        with Training.resume(out, trust=True, progress=progress) as training:
            print(f"restarted from iteration {training.iteration:,} ({training.run.stage.steps:,} steps)", flush=True)
            complete(training, progress, signals=True)
            judged("after: ", training.run.after)
        return training.run
    with Training(name, task, out=out, preset=preset or "none", progress=progress, **values) as training:
        judged("before:", training.run.before)
        complete(training, progress, signals=True)
        judged("after: ", training.run.after)
    return training.run


def _shared(options: Any, out: str, preset: str) -> list[Any]:
    """The fields that train and tune share, with these options as defaults."""
    kind = for_command_line(type(options))
    default = kind(**{f.name: getattr(options, f.name) for f in fields(options)})
    task = (
        "A Gymnasium id (`module:Id-v0` imports the module first), a class or function that makes an environment "
        "(my_env.py:MyEnv or module:MyEnv; with --model one to talk to), arithmetic, lookup, a file of prompts, or "
        "exact:chain."
    )
    return [
        ("task", Annotated[str | None, Positional, arg(metavar="TASK", help=task)], field(default=None)),
        ("options", _flat[kind], field(default=default)),
        ("out", Annotated[Path | None, arg(help=out)], field(default=None)),
        ("preset", Annotated[str | None, arg(help=preset)], field(default=None)),
        ("json", Annotated[FlagCreatePairsOff[bool], arg(help="Print one JSON object at the end, and nothing else.")],
         field(default=False)),
    ]  # fmt: skip


def _command(options: Any) -> Any:
    """The dataclass of `policygrad train` with these options as defaults."""
    made = _shared(
        options,
        "Directory for the run; by default runs/TASK/METHOD-seedSEED.",
        "Tuned settings: a preset's name, a file such as tune writes (FILE.toml), or none; by default the task's own. "
        "Options given here override them.",
    )
    made += [
        ("seeds", Annotated[str | None, arg(help="Train a run for each of these seeds, such as 0-9 or 0,3,7: a study, "
         "in as many processes as cores. Once more, it trains those that have not finished.")], field(default=None)),
        ("processes", Annotated[int | None, arg(help="Processes of a study; by default as the cores allow.")],
         field(default=None)),
    ]  # fmt: skip
    if options.world == "language":
        made.append(
            (
                "samples",
                Annotated[int, arg(help="Completions shown before and after training; 0: none.")],
                field(default=4),
            )
        )
    command = make_dataclass("Train", made)
    command.__doc__ = type(options).__doc__
    return command


def _tune_command(options: Any) -> Any:
    """The dataclass of `policygrad tune` with these options as defaults."""
    made = _shared(
        options,
        "Directory of the study; by default runs/TASK/METHOD-tune. The same command goes on with the study there.",
        "Settings to begin from: a preset's name, a file, or none; by default the task's own.",
    )
    trials = "Runs in all, one after the other; trial k has the seed SEED + k."
    made.append(("trials", Annotated[int, arg(help=trials)], field(default=20)))
    command = make_dataclass("Tune", made)
    ranges = "\n".join(f"- {name}: {how}" for name, how in searched(options, ()).items())
    command.__doc__ = f"{SEARCH}\n\n{ranges}"
    return command


def _check_command(options: Any) -> Any:
    """The dataclass of `policygrad check` with these options as defaults."""
    made = [one for one in _shared(options, "", "Tuned settings: a preset's name, a file, or none.") if one[0] != "out"]
    tolerance = (
        "Largest difference relative to a parameter's gradient; by default 1e-6, 1e-3 in float32, 5e-2 in 16 bits."
    )
    made += [
        ("tolerance", Annotated[float | None, arg(help=tolerance)], field(default=None)),
        ("ranks", Annotated[int, arg(help="Ranks to compare with, simulated by threads.")], field(default=2)),
    ]
    command = make_dataclass("Check", made)
    command.__doc__ = (
        "Sample one rollout, and compare its gradient, whole, with that of micro-batches, packing, padding and ranks."
    )
    return command


def _language_installed() -> None:
    """Raise UserError if a package for language models is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "datasets", "peft", "math_verify") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for language models: pip install policygrad[language]")


def _reward_model(rest: list[str]) -> int:
    kind = for_command_line(RewardModelOptions)
    made: list[Any] = [
        ("options", _flat[kind], field(default=kind())),
        ("out", Annotated[Path | None, arg(help="Directory; by default runs/DATASET/reward-model-seedSEED.")],
         field(default=None)),
        ("json", Annotated[FlagCreatePairsOff[bool], arg(help="Print one JSON object at the end, and nothing else.")],
         field(default=False)),
    ]  # fmt: skip
    command_of = make_dataclass("RewardModel", made)
    command_of.__doc__ = RewardModelOptions.__doc__
    command = _parse(command_of, rest, "reward-model", UseAppendAction)
    _language_installed()
    options = command.options
    default = Path("runs") / file_name(Path(options.dataset).stem) / f"reward-model-seed{options.seed}"
    with _aside(command.json), run_directory(command.out, default) as out:
        _quiet()
        from policygrad.train.reward_model import train_reward_model

        values = {f.name: getattr(options, f.name) for f in fields(options)}
        result = train_reward_model(out=out, announce=(lambda line: None) if command.json else print, **values)
    if command.json:
        print(json.dumps(result.summary()))
        return 0
    print(
        f"reward model of {options.dataset}: {result.pairs:,} pairs, {len(result.metrics):,} updates in "
        f"{result.seconds:.1f} s"
    )
    print(result.verdict())
    return 0


def _loaded(kind: Any, name: str, rest: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """A command on a trained run, the run, and how it is played: seed and greedy."""
    known = {f.name for f in fields(kind)}
    named = [x.split("=")[0].removeprefix("--").replace("-", "_") for x in rest if x.startswith("--")]
    unread = [x for x in named if x not in known and x in {f.name for f in fields(Options)}]
    if unread:
        raise UserError(f"{name} does not read {unread[0]}, which the run has from training: leave it out")
    command = _parse(kind, rest, name, UseAppendAction)
    if command.greedy and command.sampled:
        raise UserError("--greedy and --sampled exclude each other: give one")
    with _aside(getattr(command, "json", False)):
        _quiet()
        from policygrad.train.run import Run

        repeated = {name: x for name in REPEATED if (x := getattr(command, name))}
        run = Run.load(command.run, trust=command.trust, **repeated)
    worlds = {"episodes": "control", "max_steps": "control", "completions": "language", "samples": "language"}
    for option, world in worlds.items():
        if getattr(command, option) is not None and world != run.world.kind:
            raise UserError(f"{as_flag(option)} is for {world}, and {command.run} on {run.world.name}: leave it out")
    greedy = True if command.greedy else False if command.sampled else None
    return command, run, {"seed": 1000 if command.seed is None else command.seed, "greedy": greedy}


def _eval(rest: list[str]) -> int:
    command, run, how = _loaded(Eval, "eval", rest)
    with _aside(command.json):
        from policygrad.train.samples import samples_table

        if command.seed is not None and run.world.kind == "exact":
            raise UserError(f"{run.world.name} is evaluated exactly, without random numbers: leave --seed out")
        count = command.completions if command.episodes is None else command.episodes
        result: Any = run.evaluate(count, max_steps=command.max_steps, **how)
    if command.json:
        print(json.dumps({**result.summary(), "policy": vars(run.stage)}))
        return 0
    print(f"{result.line()}; {run.standing()}")
    if hasattr(result, "rows"):
        samples_table(result.rows[:: result.completions], limit=4 if command.samples is None else command.samples)
    return 0


def _elo(rest: list[str]) -> int:
    command = _parse(Elo, rest, "elo")
    with _aside(command.json):
        _quiet()
        from policygrad.files import write_json
        from policygrad.train.elo import KEPT, elo, summary, table
        from policygrad.train.hub import on_hub
        from policygrad.train.run import Run

        repeated = {} if command.environment is None else {"environment": command.environment}
        run = Run.load(command.run, trust=command.trust, **repeated)
        ratings = elo(run, games=command.games, players=command.players, seed=command.seed)
        if not on_hub(command.run):
            write_json(command.run / KEPT, summary(ratings))
    print(json.dumps(summary(ratings)) if command.json else table(ratings))
    return 0


def _watch(rest: list[str]) -> int:
    command, run, how = _loaded(Watch, "watch", rest)
    from policygrad.train.hub import on_hub
    from policygrad.train.watching import transcript, video

    if run.world.kind == "control":
        out = command.out or (Path() if on_hub(command.run) else command.run) / "video.mp4"
        episodes = 1 if command.episodes is None else command.episodes
        found = video(run, out, episodes, max_steps=command.max_steps, **how)
        print(f"{found.line()}; {run.standing()}\nvideo: {out}")
        return 0
    text = transcript(run, command.samples, command.completions, out=command.out, **how)
    print(text if command.out is None else f"transcript: {command.out}")
    return 0


def _push(rest: list[str]) -> int:
    command, run, how = _loaded(Push, "push", rest)
    if command.name is None:
        raise UserError("push needs a name on the hub: policygrad push RUN USER/NAME")
    if command.samples is not None:
        raise UserError("push shows no samples: leave --samples out")
    from policygrad.train.publishing import push

    count = command.completions if command.episodes is None else command.episodes
    played = {"count": count, "max_steps": command.max_steps, **how}
    address = push(run, command.name, private=command.private, **played)
    print(f"pushed: {address} (evaluate: policygrad eval hub:{'/'.join(address.split('/')[-2:])})")
    return 0


def _export(rest: list[str]) -> int:
    command = _parse(Export, rest, "export")
    _quiet()
    from policygrad.train.exporting import OBSERVATIONS, export
    from policygrad.train.run import Run

    repeated = {} if command.environment is None else {"environment": command.environment}
    run = Run.load(command.run, trust=command.trust, **repeated)
    path = export(run, format=command.format, out=command.out)
    print(f"{run.standing()}; its graph gives the same actions on {OBSERVATIONS:,} observations\nexport: {path}")
    return 0


def _report(rest: list[str]) -> int:
    command = _parse(Report, rest, "report")
    if not command.runs:
        raise UserError("report needs runs: policygrad report RUN...")
    if command.live and command.out is not None:
        raise UserError("--live serves the page and --out writes it: give one of the two")
    if command.port and not command.live:
        raise UserError("--port is of --live: add that, or leave it out")
    if not 0 <= command.port < 2**16:
        raise UserError(f"port is {command.port}: it must be 0 to 65535")
    from policygrad.train.page import report, serve

    if not command.live:
        alone = len(command.runs) == 1 and command.runs[0].is_dir()
        print(f"report: {report(*command.runs, out=command.out or (command.runs[0] if alone else 'report.html'))}")
        return 0
    with serve(command.runs, command.port) as server:
        print(f"report: http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _compare(rest: list[str]) -> int:
    command = _parse(Compare, rest, "compare")
    from policygrad.train.comparison import compare

    found = compare(*command.runs, out=command.out, score=command.score, at=command.at, unfinished=command.unfinished)
    if command.json:
        print(json.dumps(found.summary()))
        return 0
    found.show()
    if command.out is not None:
        print(f"comparison: {command.out} (comparison.png, comparison.md, comparison.json)")
    return 0


def _check(rest: list[str]) -> int:
    """Whether the gradient of a method depends on how its batch is split: exit code 1 if it does."""
    found = _asked("check", rest, _check_command, {"preset", "json", "tolerance", "ranks"})
    if found is None:
        return 0 if rest else 2
    command = found.command
    with _aside(command.json):
        _quiet()
        from policygrad.train.checking import check

        how = {"tolerance": command.tolerance, "count": command.ranks, "preset": found.preset or "none"}
        result = check(found.name, found.task, **how, **found.values)
    print(json.dumps(result.summary()) if command.json else "\n".join(result.lines()))
    return int(not result.passed)


def _verify(rest: list[str]) -> int:
    options = _parse(VerifyOptions, rest, "verify")
    with _last_line_alone(options.json):
        from policygrad.verify.command import run

        return run(options)


def _list(rest: list[str]) -> int:
    topics = {"methods": _methods, "variants": _variants, "presets": _presets, "environments": _environments}
    if {"-h", "--help"} & set(rest):
        print(f"usage: policygrad list [{'|'.join(topics)}]")
        return 0
    for topic in rest:
        if topic not in topics:
            raise UserError(f"nothing to list under {shortened(topic)}: {nearest(topic.lower(), list(topics))}")
    print("\n".join(line for topic in rest or ["methods", "variants", "presets"] for line in topics[topic]()))
    return 0


def _methods() -> list[str]:
    other = {full: alias for alias, full in ALIASES.items()}
    names = {name: name + (f" ({other[name]})" if name in other else "") for name in METHODS}
    width = max(map(len, names.values()))
    return ["methods:"] + [f"  {names[method.name]:{width}}  {method.summary} ({method.source})" for method in TABLE]


def _variants() -> list[str]:
    width = max(len(how) for _, how, _ in VARIANTS)
    return ["variants:"] + [f"  {how:{width}}  {name}: {what}" for name, how, what in VARIANTS]


def _presets() -> list[str]:
    width = max(map(len, presets.names()), default=0)
    return ["presets:"] + [f"  {name:{width}}  {', '.join(presets.load(name))}" for name in presets.names()]


def _environments() -> list[str]:
    import gymnasium

    return [f"  {name}" for name in sorted(gymnasium.registry)]


def _parse(kind: Any, arguments: list[str], name: str, *config: Any) -> Any:
    """Parse with tyro, and turn its framed error message into one line. An option is given once, or it is a list."""
    lists = {f.name for f in fields(Options) if repeats(f.type)}
    flags = [x.split("=")[0].removeprefix("--") for x in arguments if x.startswith("--")]
    given = [x.removeprefix("no-").replace("-", "_") for x in flags]
    twice = [x for i, x in enumerate(given) if x in given[:i] and x not in lists]
    if twice:
        raise UserError(f"--{twice[0].replace('_', '-')} is given more than once: give it once")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"policygrad {name}", args=arguments, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise Helped from None
        raise UserError(f"{_complaint(kind, arguments, said.getvalue())} See policygrad {name} --help.") from None


def _complaint(kind: Any, arguments: list[str], said: str) -> str:
    """What tyro says in a frame, in a few words."""
    kinds = _kinds(kind)
    said = " ".join(re.sub(r"[\s\u2500-\u257f]+|-{3,}", " ", said).split())
    if unknown := re.search(r"Unrecognized options: ([^\s,]*)", said):
        return _no_option(unknown[1], kinds)
    named = next((x for x in re.findall(r"--[\w-]+", said) if x in kinds), None)
    if named is None:
        return "RUN is missing." if "Required options" in said else one_line(said, 120)
    given = [x.removeprefix(f"{named}=") for x in arguments if x.startswith(f"{named}=")]
    given += [after for x, after in pairwise(arguments) if x == named and after not in kinds]
    if "Missing value" in said or not given:
        return f"{named} has no value: it must be {in_words(kinds[named])}."
    value = next((x for x in given if repr(x) in said), given[-1])
    return f"{named} is {shortened(value)}: it must be {in_words(kinds[named])}."


def _no_option(word: str, flags: Iterable[str]) -> str:
    """What is said of a word that nothing takes."""
    if not word.startswith("-"):
        return f"{shortened(word)} belongs to no option: leave it out."
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
    return f"there is no option {shortened(name)[1:-1]}: " + (f"did you mean {near[0]}?" if near else "leave it out.")


def _kinds(kind: Any) -> dict[str, Any]:
    """The flags of a command, each with the type of its value."""
    hints = get_type_hints(kind)
    parts = {name: get_args(x)[0] if get_origin(x) is Annotated else x for name, x in hints.items()}
    nested = [_kinds(x) for x in parts.values() if is_dataclass(x)]
    own = {
        as_flag(x): kind
        for x, kind in parts.items()
        if not is_dataclass(kind) and x not in ("task", "run", "runs", "name")
    }
    return {name: kind for kinds in (*nested, own) for name, kind in kinds.items()}


def as_flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def _aside(asked: bool) -> Iterator[None]:
    """With --json, send standard output to standard error: Python's, C's and that of child processes."""
    if not asked:
        yield
        return
    saved = None
    if sys.stdout is not None and sys.stderr is not None:  # both are open
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
    """Flush standard output's buffers in Python and C to its current destination."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.__stdout__.flush()  # type: ignore[union-attr]
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def _last_line_alone(asked: bool) -> Iterator[None]:
    """Like `_aside`, for a command that prints its own JSON as the last line."""
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
    """Silence Gymnasium's warnings, which are for authors of environments, and print notes in one line."""
    import gymnasium

    gymnasium.logger.min_level = logging.CRITICAL
    others = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], *place: Any) -> str:
        return f"policygrad: {message}\n" if issubclass(category, Note) else others(message, category, *place)

    warnings.formatwarning = formatted  # type: ignore[assignment]


if __name__ == "__main__":
    main()
