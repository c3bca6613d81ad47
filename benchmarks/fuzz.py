"""Fuzzed commands: whatever is typed, found on disk or returned by an environment, the answer is right or one line.

    python benchmarks/fuzz.py                        2,000 cases, two at a time
    python benchmarks/fuzz.py --cases 100 --seed 7
    python benchmarks/fuzz.py --only 1234            one case, with all that it prints

A case is a command line, made from its seed alone, that runs in a child of this process with a directory, a time limit
and a memory limit of its own. Checked of each: an exit code of 0, 2, 130 or (verify, check, reproduce) 1; no traceback;
for code 2, one line on standard error of at most 200 characters; with --json and code 0, one JSON object on standard
output and nothing else; nothing written outside its directory. A case at its time limit gets SIGINT, and must end as an
interrupt does. Exits with 1 if anything is violated.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore::DeprecationWarning"}

LIMIT = 10.0  # seconds of a case
GRACE = 60.0  # seconds from SIGINT to the end: an interrupt waits until the compiler is done
MEMORY = 8 * 2**30  # bytes of address space
LINE = 200  # characters of a message
# Lines beside the message: the preset, what is tuned, the progress, a second fault when the environment is closed.
ASIDE = re.compile(r"(preset|tuned:|note:|before:|after:) |.* left$|.* \(the results are kept\)$")


def split(*lines: str) -> list[str]:
    """The words of the lines."""
    return " ".join(lines).split()


ODD = [
    *split("- -- 0 -1 1.5 1e400 -inf nan None none null True [] {} ' \" \\ é 日本語 🙂 ١٢ 0x10 1_000 1,2 ../.. /"),
    *split("/dev/null /dev/full /proc/self/mem /etc/passwd %s%n $(id) --help -h --json a=b a:b a:b:c :: file.py:f"),
    *split("os:system os:_exit sys:exit ~ . * @ = : exact:"), "x" * 300, "9" * 400,
    "", " ", "a b", "a\nb", "\t", "\0", "a\0b", "\udcff", "\ud800", "\x1b[31m",
]  # fmt: skip


def pick(chance: random.Random, usual: list[str], odd: float = 0.1) -> str:
    """One of the usual words, or now and then an odd one."""
    return chance.choice(ODD if chance.random() < odd else usual)


@dataclass
class Case:
    """A command, and what is done to its directory first."""

    kind: str
    words: list[str]
    prepare: Callable[[Path], None] | None = None


@dataclass
class Outcome:
    """What a case came to."""

    case: Case
    number: int
    code: int | None
    seconds: float
    out: str
    err: str
    wrong: list[str] = field(default_factory=list)


# What there is to use: small runs, models and files, made once


def furnish(place: Path) -> None:
    """A tiny language model, data, functions, and a run of each world."""
    from policygrad.language import arithmetic, models, warmup

    warmup.RECIPE.update(steps=2, rows=4)
    arithmetic_model = arithmetic.model(hidden=16, layers=1)
    models.save_model(arithmetic_model, arithmetic.tokenizer(), place / "model")
    rows = arithmetic.problems(24, seed=0)
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": "12", "rejected": "9"} for row in rows]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": \n')
    (place / "odd.jsonl").write_text('{"prompt": 3}\n{"prompt": null}\n[1]\n')
    (place / "binary.parquet").write_bytes(bytes(range(256)) * 10)
    (place / "latin.csv").write_bytes("prompt,answer\né,1\n".encode("latin-1"))
    (place / "mine.py").write_text(FUNCTIONS + TALKS + LOSSES)
    moves = [{"observation": [0.0, 0.1, 0.0, 0.1], "action": k % 2, "episode": k // 3} for k in range(9)]
    (place / "moves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moves))
    worse = [{"observation": [0.0, 0.1, 0.0], "action": 7}, {"observation": None, "action": "left"}]
    (place / "worse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse))
    answered = [{"prompt": row["prompt"], "completion": str(row["answer"])} for row in rows]
    (place / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    (place / "syntax.py").write_text("def f(:\n")
    (place / "quits.py").write_text("raise SystemExit(4)\n")
    for name, words in RUNS.items():
        code, out, err, _ = in_child([*words, "--out", name], place, 120)
        assert code == 0, (words, out, err)


FUNCTIONS = """
import asyncio, os, sys, time
import torch
def one(completions, **_): return [1.0] * len(completions)
def nothing(completions, **_): return [None] * len(completions)
def nan(completions, **_): return [float("nan")] * len(completions)
def few(completions, **_): return [1.0]
def text(completions, **_): return ["a"] * len(completions)
def no_list(completions, **_): return 3
def no_keywords(): return []
def raises(*_, **__): raise ValueError("out of luck " * 50)
def quits(*_, **__): sys.exit(3)
def quits_with_a_word(*_, **__): sys.exit("no")
def interrupts(*_, **__): raise KeyboardInterrupt
def sleeps(*_, **__): time.sleep(3600)
def deep(*_, **__): return deep()
def prints(completions, **_): print("x" * 1000); return [0.0] * len(completions)
def good(reward, value, terminated, ended, gamma):
    return reward + gamma * value[:, 1:].where(~terminated, 0.0) - value[:, :-1]
def wrong_shape(reward, value, *_): return value
def integers(reward, value, *_): return reward.long()
def truths(reward, value, *_): return reward > 0
def complex_numbers(reward, value, *_): return reward * 1j
def infinite(reward, value, *_): return reward / 0
def meta(reward, value, *_): return reward.to("meta")
def sparse(reward, value, *_): return reward.to_sparse()
def array(reward, value, *_): return reward.numpy()
def changes(reward, value, *_): reward.zero_(); return reward
def random(reward, value, *_): return torch.randn_like(reward)
def exits(*_): os._exit
number = 3
class Thing: pass
"""
TALKS = '''
class Talk:
    """An environment to talk to."""
    def reset(self, seed): self.seed, self.turns = seed, 0; return f"{seed % 7}+1="
    def step(self, text): self.turns += 1; return "and?", float(len(text)), self.turns == 2
class Chat(Talk):
    def reset(self, seed): return [{"role": "user", "content": super().reset(seed)}]
class Bare(Talk):
    def step(self, text): return text
class Mute(Talk):
    def step(self, text): return "", 0.0, False
class Nan(Talk):
    def step(self, text): return None, float("nan"), True
class Unjudged(Talk):
    def step(self, text): return None, None, True
class Never(Talk):
    def step(self, text): return "more" * 100, 0.0, False
class Raises(Talk):
    def step(self, text): raise ValueError("out of luck " * 50)
class Leaves(Talk):
    def step(self, text): sys.exit(3)
class Cancels(Talk):
    def reset(self, seed): raise asyncio.CancelledError("gone")
class Another(Talk):
    def reset(self, seed): return str(time.monotonic())
def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: one.
        b: the other.
    """
    return a + b
def untyped(a): return a
def slips(a: int) -> int:
    """Slip.

    Args:
        a: where.
    """
    raise asyncio.CancelledError("gone")
'''
LOSSES = """
def plain(log_probs, old_log_probs, advantages, action_mask):
    return -((log_probs - old_log_probs).exp() * advantages * action_mask).sum() / action_mask.sum()
def of_trl(per_token_logps, old_per_token_logps, advantages, completion_mask):
    return -(per_token_logps * advantages[:, None] * completion_mask).sum(), {}
def no_gradient(log_probs, old_log_probs, advantages, action_mask): return log_probs.detach().sum()
def a_vector(log_probs, old_log_probs, advantages, action_mask): return log_probs.sum(1)
def a_nan(log_probs, old_log_probs, advantages, action_mask): return log_probs.sum() * float("nan")
def cancelled(log_probs, old_log_probs, advantages, action_mask): raise asyncio.CancelledError("gone")
def leaves(log_probs, old_log_probs, advantages, action_mask): sys.exit(3)
def in_place(log_probs, old_log_probs, advantages, action_mask):
    advantages.zero_(); action_mask.zero_(); return log_probs.sum()
class Module(torch.nn.Module):
    def forward(self, log_probs, old_log_probs, advantages, action_mask): return -(log_probs * advantages).sum()
"""
NAMED = r"^(?:def|class) (\w+)"
FUNCTION_NAMES = re.findall(NAMED, FUNCTIONS, re.MULTILINE) + ["number", "absent"]
TALK_NAMES, LOSS_NAMES = (re.findall(NAMED, x, re.MULTILINE) for x in (TALKS, LOSSES))
TINY = split("--model @model --dataset @prompts.jsonl --reward exact_match")
SMALL = {
    "control": split("iterations=1 num_envs=2 num_steps=8 minibatch_size=8 hidden=4 epochs=1 episode_steps=8",
                     "critic_epochs=1 critic_minibatch_size=8"),
    "exact": split("iterations=1 num_envs=2 minibatch_size=4 epochs=1 episode_steps=8",
                   "critic_epochs=1 critic_minibatch_size=8"),
    "language": split("iterations=1 prompts_per_rollout=2 completions=2 max_tokens=3 held_out=2 minibatch_size=2",
                      "epochs=1 evaluation_completions=1 critic_epochs=1 critic_minibatch_size=2"),
}  # fmt: skip
GRPO = split(
    "--iterations 1 --prompts-per-rollout 2 --completions 2 --max-tokens 3 --held-out 2 --evaluation-completions 1"
)
RUNS = {
    "control-run": split("train ppo CartPole-v1 --preset none --iterations 1 --num-envs 2 --num-steps 32 --hidden 4"),
    "exact-run": split("train ppo exact:bandit --iterations 1 --num-envs 2 --minibatch-size 2"),
    "language-run": ["train", "grpo", *TINY, *GRPO],
    "reward-run": split("reward-model --model @model --dataset @pairs.jsonl --held-out 4 --batch-size 8"),
    "memory-run": split(
        "train ppo policygrad/TMaze-v0 --preset none --memory gru --memory-size 4 --iterations 1",
        "--num-envs 2 --num-steps 32 --hidden 4",
    ),
    "wrapped-run": split(
        "train ppo CartPole-v1 --preset none --wrap NormalizeObservation --wrap TimeLimit:20",
        "--iterations 1 --num-envs 2 --num-steps 32 --hidden 4",
    ),
    "talk-run": [
        "train",
        "grpo",
        "@mine.py:Talk",
        "--model",
        "@model",
        "--tool",
        "@mine.py:add",
        "--starts",
        "8",
        *GRPO[:6],
        "--max-tokens",
        "24",
        *GRPO[8:],
    ],
    "cloned-run": split("clone CartPole-v1 @moves.jsonl --iterations 2 --hidden 4"),
}
TASKS = {
    "control": split("CartPole-v1 Pendulum-v1 FrozenLake-v1 Acrobot-v1 CliffWalking-v1 MountainCarContinuous-v0"),
    "exact": split("exact:chain exact:bandit exact:cliff exact:garnet exact:two_states exact:tokens"),
}
WRONG_TASKS = split(
    "cartpole-v1 CartPole CartPole-v9 ALE/Pong-v5 MiniGrid-Empty-5x5-v0 exact: exact:chian absent:Env-v0 @mine.py",
    "@mine.py:Thing @mine.py:number @mine.py:absent @syntax.py:f @quits.py:f @prompts.jsonl @empty.jsonl @model faulty",
    "faulty: :CartPole-v1 CartPole-v1: policygrad train ppo arithmetics",
)
PATHS = split(
    "@control-run @exact-run @language-run @reward-run @model @prompts.jsonl @nowhere @mine.py @",
    "@memory-run @wrapped-run @talk-run @cloned-run",
)
WRAPS = split(
    "TimeLimit:5 RescaleAction:-1,1 NormalizeObservation NormalizeReward FrameStackObservation:2 ClipReward:0,1",
    "RecordVideo:1 TimeLimit TimeLimit:[ FrameStackObservation:999999999999 StickyAction:0.5 timelimit:3 os:system",
)
# Values that fit an option by its name, where its type says too little.
USUAL = {
    "wrap": WRAPS, "tool": split("python @mine.py:add @mine.py:untyped @mine.py:slips @mine.py:absent os:system"),
    "memory": split("gru lstm transformer"), "policy_keys": split("x observation"), "critic_keys": split("x"),
    "demonstrations": split("@moves.jsonl @worse.jsonl"), "env_options": split("{} {\"x\":1} [ 3"),
    "log": split("wandb mlflow trackio"), "start": split("@control-run @nowhere"),
}  # fmt: skip


# Cases


def make(number: int, seed: int) -> Case:
    """The case of a number."""
    chance = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    case = kind(chance)
    case.kind = kind.__name__
    if chance.random() < 0.03 and case.words:
        case.words.insert(chance.randrange(len(case.words) + 1), chance.choice(ODD))
    return case


def usage(chance: random.Random) -> Case:
    """Words in no order."""
    from policygrad.train.methods import ALIASES, METHODS

    commands = [
        *split("train eval list verify reward-model clone resume reproduce elo watch export tune compare report push"),
        *split("check compose"),
        "trian",
        "help",
        "TRAIN",
        "--version",
        "-v",
        "--debug",
        "--help",
    ]
    words = [chance.choice(commands)]
    others = [
        *METHODS,
        *ALIASES,
        *TASKS["control"],
        *TASKS["exact"],
        *commands,
        *ODD,
        *PATHS,
        "PPO",
        "Dr-GRPO",
        "--help",
        "--steps",
    ]
    words += [chance.choice(others) for _ in range(chance.randrange(4))]
    return Case("", words if chance.random() < 0.97 else [])


def method(chance: random.Random) -> tuple[str, str]:
    """A method as typed, and its name."""
    from policygrad.train.methods import METHODS

    name = chance.choice(list(METHODS))
    typed = chance.choice([name, name, name.upper(), name.replace("_", "-"), name.title()])
    return (chance.choice(["pppo", "dqn", "", "ppo ", "p po", *ODD]), name) if chance.random() < 0.03 else (typed, name)


def train(chance: random.Random, world: str, task: list[str], most: int = 3, **more: str) -> Case:
    """Training with a small budget and a few options, of which some are good. more: another budget."""
    from policygrad.train.options import EPISODIC, Options, has_critic, options_of

    typed, name = method(chance)
    known = {f.name: f for f in fields(options_of(name, world))}
    given = {x: value for x, value in (pair.split("=") for pair in SMALL[world]) if x in known} | more
    if known["credit"].default in EPISODIC:
        given.pop("num_steps", None)
    else:
        given.pop("episode_steps", None)
    if not has_critic(options_of(name, world)()):
        given = {x: value for x, value in given.items() if "critic" not in x}
    words = ["train", typed, *task]
    for _ in range(chance.randrange(most + 1)):
        f = chance.choice(list(known.values()) if chance.random() < 0.9 else fields(Options))
        value = good(chance, f) if chance.random() < 0.75 else bad(chance, f)
        if chance.random() < 0.95:
            given[f.name] = value
        else:
            words += [flag(f.name), str(value)]
    for x, value in given.items():
        words += (
            [flag(x)]
            if value is None
            else [f"{flag(x)}={value}"]
            if chance.random() < 0.2
            else [flag(x), *value.split(" ")]
        )
    if "seed" in known and "seed" not in given and chance.random() < 0.5:
        words += ["--seed", str(chance.randrange(100))]
    some = {"--json": 0.3, "--debug": 0.0, "--help": 0.03, "--preset": 0.3, "--out": 0.2, "--samples": 0.05}
    for word, share in some.items():
        if chance.random() < share:
            words.append(word)
            if word == "--preset":
                words.append(pick(chance, ["none", "none", "none", "CartPole-v1", "arithmetic", "absent"]))
            if word == "--out":
                words.append(pick(chance, ["run", "run", "deep/down/run", "full", "file", "run/", "/dev/null/run"]))
            if word == "--samples":
                words.append(chance.choice(["0", "1", "-1", "x"]))
    if chance.random() < 0.02:
        chance.shuffle(words)
    if chance.random() < 0.03:
        words.pop(chance.randrange(len(words)))
    return Case("", words, occupied)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def good(chance: random.Random, f: Any) -> str | None:
    """A value that fits the option's type, often within its bounds; None for a switch."""
    kind, text = f.type, str(f.type)
    if kind is bool or kind == "bool":
        return None
    if f.name in USUAL:
        return chance.choice(USUAL[f.name])
    if get_origin(kind) is not None and "Literal" in text:
        return str(chance.choice([x for x in get_args(kind) if isinstance(x, str)] or ["x"]))
    if "tuple" in text:
        return chance.choice(["4", "4 8", "1"]) if "int" in text else chance.choice(["1.0", "exact_match", "format:a+"])
    if "int" in text:
        return str(chance.choice([1, 2, 3, 4, 8, 16]))
    if "float" in text:
        return str(chance.choice([0.0, 0.1, 0.5, 0.9, 0.99, 1.0, 1.5, 0.001, 1e-8, 3, "inf"]))
    return chance.choice(["cpu", "sdpa", "train", "copy", "shared", "@model", "@prompts.jsonl"])


def bad(chance: random.Random, f: Any) -> str:
    """A value of the wrong type, or an extreme one."""
    return chance.choice(
        [*ODD, "-5", "10000000000", "-0.0", "1e308", "5e-324", "2147483648", "99999999999999999999", "1e9"]
    )


def occupied(place: Path) -> None:
    """What may be in the way: a file, and a directory that holds something."""
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "notes").write_text("mine")


def control(chance: random.Random) -> Case:
    """Gymnasium's environments."""
    wrong = chance.random() < 0.15
    return train(chance, "control", [pick(chance, WRONG_TASKS if wrong else TASKS["control"], 0.02)])


def exact(chance: random.Random) -> Case:
    """Worlds in closed form."""
    return train(chance, "exact", [chance.choice(TASKS["exact"])])


def language(chance: random.Random) -> Case:
    """A tiny language model."""
    task = chance.choice(
        [TINY, TINY, TINY, ["arithmetic"], ["@prompts.jsonl", "--model", "@model", "--reward", "exact_match"]]
    )
    task = list(task)
    if chance.random() < 0.5 and len(task) > 1:
        at = chance.randrange(len(task))
        rewards = [f"@mine.py:{name}" for name in FUNCTION_NAMES] + [
            "math_equal",
            "format:(",
            "overlong:1",
            "exact_mach",
            "@reward-run",
        ]
        files = [
            f"@{x}"
            for x in ("empty.jsonl", "broken.jsonl", "odd.jsonl", "binary.parquet", "latin.csv", "pairs.jsonl", "model")
        ]
        for name, choices in (("--reward", rewards), ("--dataset", files), ("--model", [*PATHS, "org/absent"])):
            if name in task and chance.random() < 0.5:
                task[task.index(name) + 1] = pick(chance, choices)
        if chance.random() < 0.1:
            task[at] = chance.choice(ODD)
    return train(chance, "language", task, most=2)


def environments(chance: random.Random) -> Case:
    """Environments that fail."""
    import faulty

    name = chance.choice(faulty.NAMES)
    case = train(chance, "control", [f"faulty:{name}-v0"], most=1)
    if name == "stuck":  # without a time limit it takes for ever, as it must
        case.words += ["--vectorization", "async", "--step-time-limit", "2"]
    elif chance.random() < 0.2:
        case.words += ["--vectorization", chance.choice(["sync", "async"])]
    return case


def evaluation(chance: random.Random) -> Case:
    """Options of eval on good runs and on paths that are none."""
    words = ["eval", pick(chance, [*PATHS, *PATHS[:3], *PATHS[:3]])]
    if words[1] == "@control-run" and chance.random() < 0.7:
        words += ["--episodes", "1"]
    for word in ("--episodes", "--completions", "--seed", "--samples"):
        if chance.random() < 0.15:
            words += [word, pick(chance, ["1", "1", "2", "0", "-1", "x"])]
    words += [word for word in ("--greedy", "--sampled", "--json", "--help", "--trust") if chance.random() < 0.15]
    return Case("", words)


def conversations(chance: random.Random) -> Case:
    """Environments to talk to, of which most fail, and tools."""
    task = pick(chance, ["lookup", *(f"@mine.py:{x}" for x in TALK_NAMES), "@mine.py:Talk", "@mine.py:Thing"], 0.05)
    model = [] if task == "lookup" else ["--model", "@model"]
    case = train(chance, "language", [task, *model], most=1, max_tokens=chance.choice(["24", "60"]))
    if chance.random() < 0.4:
        case.words += ["--tool", pick(chance, USUAL["tool"])]
    if chance.random() < 0.3:
        case.words += [chance.choice(["--turns", "--turn-tokens", "--starts"]), pick(chance, ["1", "3", "8", "0", "x"])]
    return case


def compositions(chance: random.Random) -> Case:
    """Methods put together, whose rows of verify come first."""
    case = train(chance, *chance.choice([("exact", ["exact:bandit"]), ("control", ["CartPole-v1"])]), most=3)
    case.words[1] = chance.choice(["compose", "compose", "Compose"])
    if chance.random() < 0.4:
        case.words += ["--update", pick(chance, split("ascend natural trust_region sideways"))]
    return Case("", [*case.words, *(["--anyway"] if chance.random() < 0.7 else [])], occupied)


def losses(chance: random.Random) -> Case:
    """Losses of one's own."""
    words = ["verify", "--loss", pick(chance, [*(f"@mine.py:{x}" for x in LOSS_NAMES), "@mine.py:one", "@quits.py:f"])]
    return Case("", [*words, *(["--json"] if chance.random() < 0.3 else [])])


def cloning(chance: random.Random) -> Case:
    """Demonstrations, of an environment and of a language model."""
    if chance.random() < 0.6:
        words = ["clone", pick(chance, [*TASKS["control"][:2], "CartPole-v1", "exact:chain"])]
        words += [pick(chance, split("@moves.jsonl @moves.jsonl @worse.jsonl @empty.jsonl @binary.parquet @nowhere"))]
        words += split("--iterations 2 --hidden 4")
    else:
        words = [
            "clone",
            "--model",
            "@model",
            "--dataset",
            pick(chance, split("@answered.jsonl @prompts.jsonl @odd.jsonl")),
        ]
        words += split("--iterations 2 --prompts-per-rollout 2 --held-out 2 --max-tokens 5")
    more = {"--validation": ["0", "0.5", "1"], "--seed": ["1", "-1"], "--out": ["run", "full", "file"], "--wrap": WRAPS}
    more["--columns"] = ["completion=answer", "a=b", "x"]
    for word, values in more.items():
        if chance.random() < 0.15:
            words += [word, pick(chance, values)]
    words += ["--json"] if chance.random() < 0.3 else []
    return Case("", words, occupied)


def checks(chance: random.Random) -> Case:
    """Whether a gradient depends on how its batch is split."""
    case = train(chance, "exact" if chance.random() < 0.3 else "control", ["CartPole-v1"], most=1)
    case.words[0] = "check"
    if chance.random() < 0.3:
        case.words += [chance.choice(["--ranks", "--tolerance"]), pick(chance, ["1", "2", "0", "1e-30", "x"])]
    return case


def searches(chance: random.Random) -> Case:
    """Trials, and seeds that make no sense."""
    case = train(chance, "control", ["CartPole-v1"], most=1)
    if chance.random() < 0.5:
        case.words += ["--seeds", pick(chance, split("-1 3-1 x 0-99999999 0,0 , 1-2-3 --"), 0.3)]
    else:
        case.words[0] = "tune"
        case.words += ["--trials", pick(chance, ["1", "0", "-1", "x"])]
    return case


# What is done with a run, besides eval, and words that belong to it.
USES = {
    "resume": ["--iterations 1", "--steps 64", "--json", "--trust", "--device cpu"],
    "reproduce": ["--json", "--trust", "--threads 1"],
    "compare": ["run", "--json", "--out here", "--at 64", "--score training", "--score evaluation", "--unfinished"],
    "report": ["run", "--out page.html", "--out here/"],
    "export": ["--format onnx", "--format torch-export", "--out here", "--trust"],
    "watch": ["--out film.gif", "--max-steps 3", "--episodes 1", "--seed 3", "--greedy", "--sampled", "--trust"],
    "elo": ["--games 2", "--players 2", "--json", "--trust"],
    "push": ["me/run", "--private", "--episodes 1", "--trust"],
}


IN_CONTROL = split("memory-run wrapped-run cloned-run")
NEWER = [*IN_CONTROL, "talk-run"]


def runs(chance: random.Random) -> Case:
    """Options of the commands on runs, on a good run and on paths that are none."""
    name = chance.choice(list(USES))
    run = chance.choice(["control-run", "control-run", *split("exact-run language-run"), *NEWER])
    words = [name, "run" if chance.random() < 0.8 else chance.choice([*ODD, "nowhere", "@reward-run", "@mine.py"])]
    words += [word for word in USES[name] if chance.random() < 0.3]
    if chance.random() < 0.2:
        words += [chance.choice(["--iterations", "--steps", "--at", "--seed", "--episodes", "--port", "--out"])]
        words += [chance.choice([*ODD, "0", "-1", "x", "10**9"])]
    flat = [x for word in words for x in (word.split(" ") if word.startswith("--") else [word])]
    return Case("", flat, lambda place: copied(place, run))


def copied(place: Path, run: str) -> None:
    """A run to write to."""
    shutil.copytree(FURNITURE / run, place / "run")


def hostile(chance: random.Random) -> Case:
    """A run's directory that is damaged, or that somebody else has written."""
    run = chance.choice(["control-run", "control-run", "exact-run", "language-run", "reward-run", *NEWER])
    seed = chance.random()
    words = ["eval", "run", *(["--episodes", "1"] if run in (*IN_CONTROL, "control-run") else [])]
    words += ["--trust"] if run == "talk-run" and chance.random() < 0.7 else []
    if run == "reward-run":
        words = ["train", "grpo", *TINY[:4], "--reward", "run", *GRPO]
    elif run == "language-run" and chance.random() < 0.3:
        words = ["train", "grpo", "--model", "run", *TINY[2:], *GRPO]
    elif chance.random() < 0.6:
        name = chance.choice(list(USES))
        words = [name, "run", *{"resume": ["--iterations", "1"], "watch": ["--out", "film.gif"]}.get(name, [])]
    if words[0] in ("eval", "train", "resume", "reproduce", "compare") and chance.random() < 0.3:
        words.append("--json")
    return Case("", words, lambda place: damage(place, run, random.Random(seed)))


VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "x" * 10**5, [], [1], [[]], {}, {"a": 1}, "inf", "nan", "\0", "\ud800",
    "../../etc/passwd", "os:system", "evil.py:f", ["evil.py:f"], "ppo", "control", "language", "exact",
    1e308, [10**9] * 2, "CartPole-v1",
]  # fmt: skip


def damage(place: Path, run: str, chance: random.Random) -> None:
    """A copy of a run with one to three things done to its files."""
    copied(place, run)
    there = place / "run"
    (place / "evil.py").write_text("open('ran', 'w')\ndef f(*_, **__): return [1.0]\n")
    for _ in range(chance.randint(1, 3)):
        paths = sorted(path for path in there.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        likely = [path for path in paths if path.suffix in (".json", ".safetensors")]
        if not likely:
            return
        path = chance.choice(likely)
        data = path.read_bytes()
        match chance.randrange(12):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(data[: chance.randrange(len(data) + 1)])
            case 2:
                at = chance.randrange(len(data) + 1)
                path.write_bytes(data[:at] + chance.randbytes(8) + data[at + 8 :])
            case 3:
                path.unlink()
                path.mkdir()
            case 4:
                path.unlink()
                os.mkfifo(path)
            case 5:
                path.unlink()
                path.symlink_to(chance.choice([path.name, "/dev/zero", "/etc/passwd", "absent"]))
            case 6:
                path.write_text(
                    chance.choice(["[" * 100_000, "{}", "[]", "null", "3", '"x"', "NaN", "{", "", "\0", "é" * 1000])
                )
            case 7:
                path.chmod(0)
            case _ if path.suffix == ".json" and not path.is_symlink():
                with contextlib.suppress(ValueError, RecursionError):  # it may be damaged already
                    path.write_text(json.dumps(altered(json.loads(data), chance)))
            case _:
                path.write_bytes(chance.randbytes(64) + data[64:])


def altered(content: Any, chance: random.Random) -> Any:
    """JSON with one value exchanged, dropped or added."""
    if isinstance(content, dict) and content and chance.random() < 0.9:
        key = chance.choice(list(content))
        match chance.randrange(6):
            case 0:
                return {k: x for k, x in content.items() if k != key}
            case 1:
                return content | {"trust_remote_code": True, "other": chance.choice(VALUES)}
        return content | {
            key: altered(content[key], chance) if isinstance(content[key], dict | list) else chance.choice(VALUES)
        }
    if isinstance(content, list) and content and chance.random() < 0.8:
        at = chance.randrange(len(content))
        return [altered(x, chance) if i == at else x for i, x in enumerate(content)]
    return chance.choice(VALUES)


def lists(chance: random.Random) -> Case:
    """What there is."""
    topics = ["methods", "variants", "presets", "environments", "--help", "method", "PRESETS"]
    return Case("", ["list", *(pick(chance, topics) for _ in range(chance.randrange(3)))])


def verification(chance: random.Random) -> Case:
    """Estimators of one's own on the smallest worlds."""
    words = ["verify", "--world", pick(chance, ["bandit"] * 8 + ["tokens", "chian"], 0.03), "--samples", "1000"]
    if chance.random() < 0.8:
        words += [
            "--estimator",
            pick(chance, [*(f"@mine.py:{name}" for name in FUNCTION_NAMES), "@syntax.py:f", "@quits.py:f"]),
        ]
    for word, values in (("--samples", ["999", "1e3", "10**4"]), ("--seed", ["0", "1", "-1", "1" * 40])):
        if chance.random() < 0.15:
            words += [word, pick(chance, values)]
    return Case("", [*words, *(["--json"] if chance.random() < 0.3 else [])])


def reward_models(chance: random.Random) -> Case:
    """Preferences."""
    from policygrad.train.reward_options import RewardModelOptions

    given: dict[str, str | None] = {"model": "@model", "dataset": "@pairs.jsonl", "held_out": "4", "batch_size": "8"}
    for _ in range(chance.randrange(3)):
        f = chance.choice(fields(RewardModelOptions))
        given[f.name] = good(chance, f) if chance.random() < 0.4 else bad(chance, f)
    if chance.random() < 0.3:
        files = [
            "empty.jsonl",
            "broken.jsonl",
            "odd.jsonl",
            "binary.parquet",
            "latin.csv",
            "prompts.jsonl",
            "model",
            "nowhere",
        ]
        given["dataset"] = f"@{chance.choice(files)}"
    words = [x for name, value in given.items() for x in ([flag(name)] if value is None else [flag(name), value])]
    words += ["--json"] if chance.random() < 0.3 else []
    return Case("", ["reward-model", *words, *(["--out", "run"] if chance.random() < 0.5 else [])])


KINDS = [usage] * 2 + [control] * 5 + [exact] * 2 + [language] * 3 + [environments] * 3 + [evaluation] * 2
KINDS += [hostile] * 6 + [runs] * 3 + [lists] + [verification] + [reward_models] * 2
KINDS += [conversations] * 2 + [compositions] + [losses] + [cloning] * 2 + [checks] + [searches]

# Running them

FURNITURE = Path()  # where everything that a case may use lies; @name in a command stands for a path in it


def start(words: list[str], place: Path) -> int:
    """Start the command in a child of this process, and return the child's number."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.setsid()
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place.with_name(f"{place.name}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w")  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1)  # noqa: SIM115
        sys.argv = ["policygrad", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = command(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(words: list[str]) -> int:
    """The exit code of the command."""
    from policygrad.cli import main

    try:
        main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 98  # main always exits


def in_child(words: list[str], place: Path, limit: float) -> tuple[int, str, str, float]:
    """Run a command to its end: its exit code (or minus a signal), output, errors and seconds."""
    (place / "tmp").mkdir(exist_ok=True)
    begin = time.monotonic()
    child = start([x.replace("@", f"{FURNITURE}/") if x.startswith("@") else x for x in words], place)
    code = waited(child, begin + limit)
    if code is None:
        os.kill(child, signal.SIGINT)
        code = waited(child, time.monotonic() + GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
        code = -signal.SIGKILL
    said = [place.with_name(f"{place.name}.{name}").read_text(errors="replace") for name in ("stdout", "stderr")]
    return code, said[0], said[1], time.monotonic() - begin


def waited(child: int, until: float) -> int | None:
    """The child's exit code, or None if it still runs at that time."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def outcome(number: int, seed: int) -> Outcome:
    """Run a case in a directory of its own, and say what is wrong with it."""
    case, place = make(number, seed), Path(tempfile.mkdtemp(prefix=f"{number}-", dir=FURNITURE.parent))
    if case.prepare is not None:
        case.prepare(place)
    before = state(FURNITURE)
    code, out, err, seconds = in_child(case.words, place, LIMIT)
    found = Outcome(case, number, code, seconds, out, err)
    found.wrong = violations(found)
    if state(FURNITURE) != before:
        found.wrong.append("a file outside its directory has changed")
    if (place / "ran").exists():
        found.wrong.append("code of the directory has run")
    for path in place.rglob("*"):
        with contextlib.suppress(OSError):
            path.chmod(0o700, follow_symlinks=False) if not path.is_symlink() else None
    shutil.rmtree(place, ignore_errors=True)
    for name in ("stdout", "stderr"):
        place.with_name(f"{place.name}.{name}").unlink(missing_ok=True)
    return found


def state(place: Path) -> list[tuple[str, int, int]]:
    """Every file there, with its size and time."""
    found = [(str(path), path.lstat()) for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts]
    return [(name, x.st_size, x.st_mtime_ns) for name, x in found if not Path(name).is_dir()]


def violations(o: Outcome) -> list[str]:
    """What is wrong with the answer."""
    words, found = o.case.words, []
    message = [line for line in o.err.splitlines() if line.strip() and not ASIDE.match(line)]
    allowed = {0, 2, 130} | ({1} if {"verify", "reproduce", "check"} & set(words) else set())
    if o.code not in allowed:
        found.append(f"exit code {o.code}")
    if "Traceback (most recent call last)" in o.out + o.err and "--debug" not in words:
        found.append("a traceback")
    if o.code in (2, 130) and "--debug" not in words and not o.err.startswith("usage:"):
        mine = [line for line in message if line.startswith("policygrad: ")]
        loud = "faulty:loud-v0" in words or any("prints" in x for x in words)
        loud |= "compose" in map(str.lower, words)  # whose row of verify stands before everything else
        if len(mine) != 1 or (len(message) > 1 and not loud):
            found.append(f"{len(message)} lines on standard error")
        elif len(mine[0]) - len("policygrad: ") > LINE:
            found.append(f"a message of {len(mine[0]) - len('policygrad: ')} characters")
        elif not mine[0].isprintable():
            found.append("a message with characters that do not print")
    if o.code == 0 and "--json" in words and not {"-h", "--help", "--version"} & set(words) and words[0] != "list":
        try:
            assert o.out.count("\n") == 1
            json.loads(o.out, parse_constant=lambda word: 1 / 0)
        except (ValueError, AssertionError, ZeroDivisionError):
            found.append("standard output is not one JSON object")
    if o.code == 0 and re.search(r"\bWarning\b", o.err):
        found.append("a warning")
    return found


def main() -> int:
    global FURNITURE
    parser = argparse.ArgumentParser(description="Fuzz the command line.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kind", help="only the cases of this kind")
    parser.add_argument("--show", action="store_true", help="print every case with its message")
    parser.add_argument("--only", type=int, help="run this case alone, and print all that it prints")
    options = parser.parse_args()
    FURNITURE = Path(tempfile.mkdtemp(prefix="policygrad-fuzz-")).resolve() / "furniture"
    FURNITURE.mkdir()
    os.environ |= {"HOME": str(FURNITURE.parent / "home"), "XDG_CACHE_HOME": str(FURNITURE.parent / "home")}
    begin = time.monotonic()
    try:
        import faulty  # noqa: F401, everything heavy is imported once, before the children are made
        import torch

        torch.set_num_threads(1)
        import policygrad.language.tasks
        import policygrad.train.reward_model
        import policygrad.train.training
        import policygrad.verify.command  # noqa: F401

        furnish(FURNITURE)
        if options.only is not None:
            found = outcome(options.only, options.seed)
            print(f"{found.case.kind}: {found.case.words}\n{found.out}{found.err}exit code {found.code}, {found.wrong}")
            return int(bool(found.wrong))
        numbers = [k for k in range(options.cases) if options.kind in (None, KINDS[k % len(KINDS)].__name__)]
        outcomes = shared(numbers, options.seed, options.jobs, options.show)
    finally:
        shutil.rmtree(FURNITURE.parent, ignore_errors=True)
    return report(outcomes, time.monotonic() - begin)


def shared(numbers: list[int], seed: int, jobs: int, show: bool) -> list[Outcome]:
    """All cases, by some processes that take every `jobs`-th each."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        outcomes = []
        for k, done in enumerate(as_completed([pool.submit(run_one, number, seed) for number in numbers]), 1):
            found = done.result()
            outcomes.append(found)
            for wrong in found.wrong or ["right"] * show:
                said = found.err.strip()[-300:]
                print(
                    f"{found.number} {found.case.kind}: {wrong}: {found.case.words!r}\n    {found.code}: {said!r}",
                    flush=True,
                )
            if k % 200 == 0:
                print(f"{k} of {len(numbers)}", file=sys.stderr, flush=True)
    return sorted(outcomes, key=lambda x: x.number)


def run_one(number: int, seed: int) -> Outcome:
    found = outcome(number, seed)
    found.case.prepare = None  # which does not travel between processes
    return found


def report(outcomes: list[Outcome], seconds: float) -> int:
    """A table of kinds and exit codes. Returns 1 if anything is violated."""
    codes = sorted({x.code for x in outcomes}, key=str)
    print(
        f"\n{'kind':16}{'cases':>7}"
        + "".join(f"{f'code {code}':>10}" for code in codes)
        + f"{'violated':>10}{'seconds':>9}"
    )
    for kind in dict.fromkeys(x.case.kind for x in outcomes):
        these = [x for x in outcomes if x.case.kind == kind]
        count = Counter(x.code for x in these)
        line = f"{kind:16}{len(these):7}" + "".join(f"{count[code]:10}" for code in codes)
        print(f"{line}{sum(bool(x.wrong) for x in these):10}{sum(x.seconds for x in these):9.0f}")
    wrong = sum(bool(x.wrong) for x in outcomes)
    print(f"{len(outcomes)} cases in {seconds:.0f} s, {wrong} violated")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
