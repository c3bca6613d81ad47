"""Side by side with TRL: methods and a task of several turns, on the same model, prompts, rewards and settings.

    python benchmarks/language.py --peer-python PYTHON    writes docs/language.md, docs/language.png, language.json here
    python benchmarks/language.py --peer-python PYTHON --cases gspo tools                    and keeps the other cases
    python benchmarks/language.py --peer-python PYTHON --quick      a smoke run, whose results stay in --work
    python benchmarks/language.py --draw                            the page and the picture from the results there are

PYTHON is a Python with TRL: `python -m venv PEER && PEER/bin/pip install trl==1.16.0`. Without it only our side runs,
and its results stay in --work.

A small Llama learns a task from imperfect demonstrations, once; every run starts from those weights. Each run is a
process of its own, and the libraries take turns. The same code judges both: the weights that a run saved answer
problems that no run has seen, sampled at temperature 1. In every run of TRL's GRPOTrainer one batch is captured with
TRL's gradient, and our objective is differentiated on the same batch at the same weights.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
LIBRARIES = {"policygrad": "#3a6ea5", "TRL": "#b3452f"}
SMOOTH = 10  # steps

JOB: dict[str, Any] = {
    "task": "arithmetic",
    "problems": [8000, 512],  # to train on, and held out
    "prompts": 16,  # a step
    "completions": 8,  # a prompt
    "max_tokens": 40,
    "steps": 60,  # a step is one rollout with its updates
    "epochs": 1,  # updates of a rollout, each on all of it
    "learning_rate": 3e-5,
    "adam_betas": [0.9, 0.999],
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "clip_low": 0.2,  # None: nothing is clipped below
    "clip_high": 0.2,
}


@dataclass(frozen=True)
class Case:
    """What is compared: a method with its settings, those of JOB unless said otherwise. peers/trl_run.py has TRL's."""

    title: str
    method: str
    about: str  # for the page
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "grpo": Case("GRPO", "grpo", 'as published (TRL: `loss_type="grpo"`, `scale_rewards="group"`)'),
    "rloo": Case("RLOO", "rloo", "without a normalization of advantages (TRL: `normalize_advantages=False`)"),
    "gspo": Case(
        "GSPO",
        "gspo",
        """the ratio of whole completions (TRL: `importance_sampling_level="sequence"`, `loss_type="grpo"`). At the
        first update of a rollout its gradient is GRPO's, so there are four, each on the whole rollout""",
        {"steps": 20, "epochs": 4, "clip_low": 0.01, "clip_high": 0.01},
    ),
    "cispo": Case(
        "CISPO",
        "cispo",
        """the ratio of a token weighs its log-probability, clipped from above (TRL: `loss_type="cispo"`, whose
        `epsilon_high` is the largest weight itself, here 1 + the clip), with four updates too""",
        {"steps": 20, "epochs": 4, "clip_low": None, "clip_high": 0.02},
    ),
    "tools": Case(
        "GRPO, several turns",
        "grpo",
        """the task `lookup` (`policygrad/language/lookup.py`): find the number at the end of a chain of one to three
        keys, each by a call of a tool, in at most four turns (TRL: `environment_factory`,
        `max_tool_calling_iterations=3`)""",
        {"task": "lookup", "problems": [2000, 512], "steps": 40, "max_tokens": 72, "learning_rate": 3e-4, "turns": 4},
    ),
}
SEVERAL_TURNS = [
    """policygrad: the environment `Lookup`, a class with `reset(seed)` and `step(text)`, whose `step` gives the reward
    of a turn; the chat template writes the contents of messages (`policygrad train grpo lookup`).""",
    """TRL: a class with `reset` whose public methods are the tools, a reward function that is given these environments,
    a chat template that writes `tool_calls` too, and a `response_template` that reads them, which is TRL's own for
    Qwen3 (`Chain` and `TEMPLATE` in `benchmarks/peers/trl_run.py`). The prompts have the same tokens.""",
    """Both append tokens and count only the policy's. A call that is no whole JSON is a text to TRL, which ends the
    conversation; here it is answered by an error.""",
]

# Each of these runs in a process of its own, so that memory is a run's alone. torch is imported only there.


def warm_up(job: dict[str, Any]) -> dict[str, Any]:
    """The weights that every run starts from, which are those of `policygrad train grpo TASK`."""
    from policygrad.language.models import save_model
    from policygrad.language.warmup import OWN, warmed_up

    save_model(warmed_up(say, task=job["task"]), OWN[job["task"]].tokenizer(), Path(job["out"]))
    return judge(job)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of a run, judged; peers/trl_run.py is TRL's."""
    import torch

    from policygrad.language.models import load_model, load_tokenizer, save_model
    from policygrad.language.policies import LanguagePolicy

    torch.manual_seed(job["seed"])
    tokenizer = load_tokenizer(job["start"])
    policy = LanguagePolicy(load_model(job["start"]))
    sample, learner = learner_of(job, policy, tokenizer)
    steps = iter(learner)
    rewards, lengths, seconds, before_mb = [], [], [], peak_mb()
    for step in range(1, job["steps"] + 1):
        start = time.perf_counter()
        metrics = next(steps)
        seconds.append(time.perf_counter() - start)
        rewards.append(float(metrics["reward"]))
        lengths.append(float(metrics["length"]))
        if step % 10 == 0:
            clipped = sum(float(x) for name, x in metrics.items() if name.startswith("clip_fraction"))
            say(f"  step {step:4}: reward {rewards[-1]:.2f}, clipped {clipped:.2f}")
    result = {"reward": rewards, "length": lengths, "seconds": seconds, "before_mb": before_mb, "peak_mb": peak_mb()}
    save_model(policy.model, tokenizer, Path(job["out"]))
    result["prompts"] = digest(sample.last.prompts.texts)
    named = {name: version(name) for name in ("torch", "transformers", "policygrad")}
    return {**result, **judge(job), "versions": {"python": platform.python_version(), **named}}


def learner_of(job: dict[str, Any], policy: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The task's sampler, and the method on it."""
    from policygrad.language.sampler import CompletionSampler, request_of
    from policygrad.train.compose import assemble

    train, _, answers, rewards = task_of(job, tokenizer)
    sample = CompletionSampler(
        train,
        tokenizer,
        rewards,
        request_of(policy.model, tokenizer, job["completions"], job["max_tokens"]),
        answers=answers,
        prompts_per_rollout=job["prompts"],
        seed=job["seed"],
    )
    learner = assemble(  # Adam is AdamW without weight decay; its betas are torch's defaults, which are the job's
        job["method"],
        policy,
        sample,
        world="language",
        kl_ref="none",
        epochs=job["epochs"],
        clip_low=float("inf") if job["clip_low"] is None else job["clip_low"],
        clip_high=job["clip_high"],
        learning_rate=job["learning_rate"],
        adam_epsilon=job["adam_epsilon"],
        max_grad_norm=job["max_grad_norm"],
    )
    return sample, learner


def task_of(job: dict[str, Any], tokenizer: Any) -> tuple[Any, Any, Any, Any]:
    """(prompts to train on, held-out prompts, how they are answered, the reward; None: the environment's)."""
    from policygrad.language import arithmetic
    from policygrad.language.conversations import Dialogue, from_seed, starts
    from policygrad.language.lookup import Lookup
    from policygrad.language.rewards import Rewards
    from policygrad.language.sampler import answer
    from policygrad.language.tasks import prepared

    count, held_out = job["problems"]
    if job["task"] == "arithmetic":
        train, kept = (prepared(x, tokenizer) for x in arithmetic.splits(count, held_out, seed=0))
        return train, kept, answer, Rewards([arithmetic.right])
    train, kept = (prepared(starts(Lookup, n, first), tokenizer) for n, first in ((count, 0), (held_out, count)))
    return train, kept, Dialogue(from_seed(Lookup), job["turns"]), None


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """The share of right answers to the held-out problems, four samples of each, by saved weights."""
    import torch

    from policygrad.language.generation import generate
    from policygrad.language.models import load_model, load_tokenizer
    from policygrad.language.policies import LanguagePolicy
    from policygrad.language.sampler import request_of

    tokenizer, policy = load_tokenizer(job["start"]), LanguagePolicy(load_model(job["out"]))
    _, held_out, answers, rewards = task_of(job, tokenizer)
    request, generator = request_of(policy.model, tokenizer, 4, job["max_tokens"]), torch.Generator().manual_seed(0)
    found = answers(policy, held_out, request, tokenizer, rewards, generator, generate)
    captured = Path(job["out"]) / "captured.pt"
    return {"held_out": float(found.reward.mean()), **(compare(job, captured) if captured.exists() else {})}


def compare(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """|our gradient - TRL's| / |TRL's| on a batch of TRL's, with the same of the advantages from TRL's rewards.

    clipped: the share of the batch that is beyond a clip. token_gradient: the distance of GRPO's gradient, with its
    clip of 0.2 and every token a decision, on the same batch: what the first number would be for another method.
    """
    import torch

    from policygrad import advantages
    from policygrad.language.models import load_model, load_tokenizer
    from policygrad.language.policies import LanguagePolicy, Prefixes
    from policygrad.rollout import Batch

    captured = torch.load(path)
    policy, x = LanguagePolicy(load_model(job["start"])), captured["batch"]
    policy.model.load_state_dict(captured["weights"], strict=False)  # a tied head is left out
    every = x["completion_mask"].bool()
    mask = every & x["tool_mask"].bool() if "tool_mask" in x else every
    advantage = x["advantages"].unsqueeze(1)
    theirs = torch.cat([captured["gradient"][name].flatten() for name, _ in policy.model.named_parameters()])

    def distance(job: dict[str, Any], mask: torch.Tensor) -> tuple[float, dict[str, Any]]:
        _, learner = learner_of(job, policy, load_tokenizer(job["start"]))
        obs = Prefixes(x["prompt_ids"], x["prompt_mask"].bool(), x["completion_ids"], mask)
        old = x.get("old_per_token_logps")  # none if the policy is the one that sampled
        old = policy(obs).log_prob(obs.completion).detach() if old is None else old
        zero, weight = torch.zeros(mask.shape), learner.loop.keywords["weights"](mask)
        shared = advantage.where(mask, zero)
        batch = Batch(obs, obs.completion, old.where(mask, zero), mask, weight, shared, zero, zero)
        value, metrics = learner.objective(batch)
        gradient = torch.autograd.grad(-value, list(policy.model.parameters()))
        mine = torch.cat([x.flatten() for x in gradient])
        return float((mine - theirs).norm() / theirs.norm()), metrics

    apart, metrics = distance(job, mask)
    other, _ = distance({**job, "method": "grpo", "clip_low": 0.2, "clip_high": 0.2}, every)
    reward, given = captured["rewards"], captured["advantages"]
    group = torch.arange(len(reward)) // job["completions"]
    scaled = (reward - advantages.group_mean(reward, group)) / advantages.group_scale(reward, group)
    return {
        "gradient": apart,
        "token_gradient": other,
        "advantage": float((scaled - given).norm() / given.norm()),
        "clipped": sum(float(x) for name, x in metrics.items() if name.startswith("clip_fraction")),
    }


def digest(prompts: list[Any]) -> str:
    """A digest of the last step's prompts, to see that both libraries had the same."""
    texts = {x if isinstance(x, str) else x[-1]["content"] for x in prompts}
    return hashlib.sha256(" ".join(sorted(texts)).encode()).hexdigest()[:12]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


WORKERS = {"warm_up": warm_up, "train": train, "judge": judge}


# The runs are started here, one after the other.


def in_process(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own, without a network."""
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    done = subprocess.run(
        [*command, json.dumps(job)], env={**os.environ, **threads, **quiet}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit("the run failed, see above; --resume keeps the runs before it")
    return json.loads(done.stdout.splitlines()[-1])


def ours(worker: str, job: dict[str, Any]) -> dict[str, Any]:
    return in_process([sys.executable, __file__, "--worker", worker], job)


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All runs of the cases, the libraries taking turns. The results are written after every run."""
    results: dict[str, Any] = {"commands": [], "cases": {}, "versions": {}, "runs": []}
    results = json.loads(path.read_text()) if path.exists() else results
    given = sys.argv[1:]
    for name in ("--peer-python", "--work"):  # whose values are this machine's
        if name in given:
            given[given.index(name) + 1] = name.removeprefix("--peer-").removeprefix("--").upper()
    command = " ".join(["python benchmarks/language.py", *given])
    results["commands"] = [*(x for x in results["commands"] if x != command), command]
    sides = {"policygrad": [sys.executable, __file__, "--worker", "train"]}
    if arguments.peer_python:
        sides["TRL"] = [arguments.peer_python, str(HERE / "peers" / "trl_run.py")]
    else:
        say("no --peer-python: only our side runs, and the results stay in --work")
    for name in arguments.cases:
        case, short = CASES[name], {"steps": 4} if arguments.quick else {}
        settings = {**JOB, "method": case.method, **case.settings, **short}
        start = str(arguments.work / f"start-{settings['task']}")
        job = {**settings, "case": name, "seed": 0, "threads": arguments.threads, "start": start, "out": start}
        before = ours("warm_up", job)["held_out"]
        say(f"{case.title}, before: {before:.1%} of the held-out problems right")
        of = {"settings": settings, "threads": arguments.threads, "cores": os.cpu_count(), "before": round(before, 5)}
        if not arguments.resume or results["cases"].get(name) != of:
            results["runs"] = [run for run in results["runs"] if run["case"] != name]
        results["cases"][name] = of
        done = {(run["library"], run["seed"]) for run in results["runs"] if run["case"] == name}
        for seed, library in product(range(arguments.seeds), sides):
            if (library, seed) in done:
                continue
            say(f"{library}, {case.title}, seed {seed}")
            with tempfile.TemporaryDirectory() as out:
                this = {**job, "seed": seed, "out": out}
                run = {"library": library, "case": name, "seed": seed, **in_process(sides[library], this)}
                run |= {} if "held_out" in run else ours("judge", this)
            say(f"  {median_seconds([run]):.3f} s a step, {run['held_out']:.1%} of the held-out problems right")
            if arguments.busy:
                run = {key: x for key, x in run.items() if key not in ("seconds", "before_mb", "peak_mb")}
            results["versions"][library] = run.pop("versions")
            results["runs"].append(run)
            write(results, path)
    return results


def write(results: dict[str, Any], path: Path) -> None:
    """As JSON, a run a line."""
    runs = ",\n  ".join(json.dumps({k: rounded(x) for k, x in run.items()}) for run in results["runs"])
    rest = json.dumps({**results, "runs": []}, indent=1)
    path.write_text(rest.replace('"runs": []', f'"runs": [\n  {runs}\n ]') + "\n")


def rounded(x: Any) -> Any:
    """Six digits of every number."""
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.6g}") if isinstance(x, float) else x


# The results become a page and a picture here.


def runs_of(results: dict[str, Any], case: str, library: str) -> list[dict[str, Any]]:
    runs = [run for run in results["runs"] if (run["case"], run["library"]) == (case, library)]
    return sorted(runs, key=lambda run: run["seed"])


def pair(results: dict[str, Any], case: str) -> list[list[dict[str, Any]]]:
    """Our runs and TRL's, of the seeds that both have."""
    sides = [runs_of(results, case, library) for library in LIBRARIES]
    both = set.intersection(*({run["seed"] for run in runs} for runs in sides))
    return [[run for run in runs if run["seed"] in both] for runs in sides]


def median_seconds(runs: list[dict[str, Any]]) -> float:
    """Over all steps but the first three of each run."""
    return float(np.median(np.concatenate([run["seconds"][3:] for run in runs])))


def curves(runs: list[dict[str, Any]], smooth: int = SMOOTH) -> np.ndarray:
    """[seeds, steps - smooth + 1]: the reward, as the mean of `smooth` steps."""
    width = min(smooth, len(runs[0]["reward"]))
    return np.array([np.convolve(run["reward"], np.ones(width) / width, "valid") for run in runs])


def largest_difference(difference: np.ndarray) -> tuple[int, float, float]:
    """Where the mean over seeds of a difference [seeds, steps] is largest, what it is, and in standard errors.

    The variance between seeds is pooled over the steps: that of five numbers alone would often be small by chance.
    """
    mean = difference.mean(0)
    error = np.sqrt(difference.var(0, ddof=1).mean() / len(difference))
    where = int(np.abs(mean).argmax())
    return where, float(mean[where]), float(np.abs(mean[where]) / error) if error else 0.0


def as_large_by_chance(difference: np.ndarray) -> tuple[int, int]:
    """In how many of the ways to swap the libraries' names within seeds the largest difference is as large: k of n."""
    observed = largest_difference(difference)[2]
    ways = [np.array(signs)[:, None] * difference for signs in product((1, -1), repeat=len(difference))]
    return sum(largest_difference(way)[2] >= observed - 1e-9 for way in ways), len(ways)


def spread(values: list[float] | np.ndarray) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 120), ""]


def item(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, initial_indent="- ", subsequent_indent="  ")


def last_reward(run: dict[str, Any]) -> float:
    return float(np.mean(run["reward"][-SMOOTH:]))


def in_errors(a: list[float], b: list[float]) -> str:
    """The difference of two means, and how many pooled standard errors that is."""
    difference, error = np.mean(a) - np.mean(b), np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / len(a))
    return f"{difference:+.3f} ({abs(difference) / error if error else 0:.1f})"


def write_page(results: dict[str, Any], path: Path) -> None:
    cases = {name: case for name, case in CASES.items() if name in results["cases"]}
    libraries = [library for library in LIBRARIES if library in results["versions"]]
    every = [run["prompts"] for name in cases for library in libraries for run in pair(results, name)[0]]
    theirs = [run["prompts"] for name in cases for library in libraries for run in pair(results, name)[1]]
    same = "; the prompts of a step are the same in both libraries" if every and every == theirs else ""
    lines = [
        "# Side by side with TRL",
        "",
        "Written by these commands, where PYTHON is a Python with TRL:",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
        *paragraph(
            f"""Both libraries train the same small Llama, which has learned a task from imperfect demonstrations, on
            the same prompts and the same reward, 1 for a right answer and else 0. The task is addition of numbers below
            1000 with written-out working (`policygrad/language/arithmetic.py`) unless said otherwise. A step answers
            {JOB["prompts"]} prompts {JOB["completions"]} times at temperature 1, and makes one update of them all or,
            where said, several: AdamW at a constant rate, betas {" and ".join(map(str, JOB["adam_betas"]))}, eps
            {JOB["adam_epsilon"]:g}, no weight decay, gradient norm at most {JOB["max_grad_norm"]:g}, no KL penalty,
            float32. The seeds vary the samples and the order of the prompts{same}. TRL's gradient checkpointing and
            bfloat16, on by default, are off."""
        ),
        *(item(f"**{case.title}**: {case.about}. {described(results['cases'][name])}") for name, case in cases.items()),
        "",
        "![Training reward of both libraries](language.png)",
        "",
        "| case | library | seeds | training reward, last 10 steps | held-out accuracy | seconds a step "
        "| tokens an answer | peak memory (before training) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        for library in libraries:
            runs = runs_of(results, name, library)
            if not runs:
                continue
            seconds, memory = "", ""
            if "seconds" in runs[0]:
                ratio = median_seconds(runs) / median_seconds(runs_of(results, name, libraries[0]))
                times = f" ({ratio:.2f} times)" if library != libraries[0] else ""
                peak, before = (np.median([run[key] for run in runs]) for key in ("peak_mb", "before_mb"))
                seconds, memory = f"{median_seconds(runs):.3f}{times}", f"{peak:,.0f} MB ({before:,.0f})"
            cells = [
                case.title,
                library,
                str(len(runs)),
                spread([last_reward(run) for run in runs]),
                spread([run["held_out"] for run in runs]),
                seconds,
                f"{np.mean([run['length'] for run in runs]):.1f}",
                memory,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *paragraph(
            f"""Mean ± standard deviation over the seeds. Held-out accuracy: {JOB["problems"][1]} problems, four samples
            of each at temperature 1; the same code judges the weights that either library saved. Seconds: the median
            over all steps but each run's first three; a step is sampling, reward and update, without TRL's logging.
            Memory: the process's largest resident set, and what it was before the first step. Neither is given where
            other work shared the machine. The libraries took turns, run by run."""
        ),
    ]
    if "TRL" in libraries:
        lines += ["## Do the curves agree?", "", *agreement(results), ""]
        lines += ["## Is the gradient the same?", "", *gradients(results), ""]
        lines += ["## Is a step faster?", "", *speed(results), ""]
        lines += ["## Several turns: what either side is given", "", *map(item, SEVERAL_TURNS), ""] * ("tools" in cases)
    lines += ["## Versions", "", "| | " + " | ".join(libraries) + " |", "|---|" + "---|" * len(libraries)]
    for name in dict.fromkeys(name for versions in results["versions"].values() for name in versions):
        lines.append(f"| {name} | " + " | ".join(results["versions"][x].get(name, "") for x in libraries) + " |")
    path.write_text("\n".join(lines) + "\n")


def described(case: dict[str, Any]) -> str:
    """The settings of a case in words."""
    x = case["settings"]
    clips = f"{'nothing' if x['clip_low'] is None else x['clip_low']} below and {x['clip_high']:g} above"
    epochs = "one update" if x["epochs"] == 1 else f"{x['epochs']} updates"
    threads = f"{case['threads']} thread" + "s" * (case["threads"] > 1)
    own = f" (after {x['warm_up']['steps']} steps of demonstrations, not the task's own 600)" if "warm_up" in x else ""
    return (
        f"Before: {case['before']:.1%} of the held-out problems right{own}. {x['steps']} steps of {epochs}, learning "
        f"rate {x['learning_rate']:g}, clip {clips}, at most {x['max_tokens']} tokens, {threads}."
    )


def agreement(results: dict[str, Any]) -> list[str]:
    lines = paragraph(
        f"""Differences are policygrad's mean minus TRL's; in parentheses, in standard errors, from the variance between
        the seeds of either side. For the curve, take the reward as the mean of {SMOOTH} steps, and of each seed the
        difference of the two libraries, and look where its mean over the seeds is largest. In units of its standard
        error (from the variance between seeds, pooled over the steps) that is the largest of many differences, so it is
        not small by itself. Beside it stands in how many of the ways to swap the libraries within seeds it is as
        large."""
    )
    lines += [
        f"| case | last {SMOOTH} steps | held-out accuracy | largest of the curve | where | as large by swapping |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        ours, theirs = pair(results, name) if name in results["cases"] else ([], [])
        if len(ours) < 2:
            continue
        curve = curves(ours) - curves(theirs)
        where, difference, units = largest_difference(curve)
        k, n = as_large_by_chance(curve)
        cells = [
            case.title,
            in_errors([last_reward(run) for run in ours], [last_reward(run) for run in theirs]),
            in_errors([run["held_out"] for run in ours], [run["held_out"] for run in theirs]),
            f"{difference:+.3f} ({units:.1f})",
            f"steps {where + 1} to {where + SMOOTH}",
            f"{k} of {n} ways",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gradients(results: dict[str, Any]) -> list[str]:
    lines = paragraph(
        """Of each of TRL's runs one batch was captured, that of the second step's last update, with the weights before
        it and TRL's gradient. Our objective was differentiated on the same batch at the same weights. The distance is
        |ours - TRL's| / |TRL's|, the largest of the seeds; beside it that of another objective, GRPO's with a clip of
        0.2 and every token a decision, to show what a difference looks like. Advantages: the same distance between ours
        and TRL's, from the same rewards; TRL adds 1e-4 to a group's standard deviation, and this library does not."""
    )
    lines += [
        "| case | distance of the gradients | the other objective's | beyond a clip, of that batch | advantages |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        runs = [run for run in runs_of(results, name, "TRL") if "gradient" in run]
        if runs:
            most = {key: max(run[key] for run in runs) for key in ("gradient", "advantage")}
            other = min(run["token_gradient"] for run in runs)
            clipped = np.mean([run["clipped"] for run in runs])
            cells = f"{most['gradient']:.1e} | {other:.2g} | {clipped:.0%} | {most['advantage']:.1e}"
            lines.append(f"| {case.title} | {cells} |")
    return lines


def speed(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, case in CASES.items():
        a, b = pair(results, name) if name in results["cases"] else ([], [])
        if not a or "seconds" not in a[0]:
            continue
        ratios = [median_seconds([y]) / median_seconds([x]) for x, y in zip(a, b, strict=True)]
        lines.append(
            item(
                f"""{case.title}: a step of TRL takes {np.median(ratios):.2f} times as long (the median of {len(ratios)}
                pairs of runs, one after the other; {min(ratios):.2f} to {max(ratios):.2f})."""
            )
        )
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each case: the reward while training, the mean over seeds and one standard deviation around it."""
    cases = {name: case for name, case in CASES.items() if name in results["cases"]}
    columns = min(3, len(cases))
    figure = Figure(figsize=(4.6 * columns, 3.7 * -(-len(cases) // columns)), layout="constrained", dpi=130)
    panels = figure.subplots(-(-len(cases) // columns), columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.axis("off")
    for axes, (name, case) in zip(panels, cases.items(), strict=False):
        for library, color in LIBRARIES.items():
            if not (runs := runs_of(results, name, library)):
                continue
            y = curves(runs)
            x = np.arange(y.shape[1]) + (len(runs[0]["reward"]) - y.shape[1]) / 2 + 1
            mean, deviation = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
            axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
            seconds = f", {median_seconds(runs):.2f} s a step" if "seconds" in runs[0] else ""
            label = f"{library} {results['versions'][library][library.lower()]}{seconds}"
            axes.plot(x, mean, color=color, linewidth=2, label=label)
        axes.set_title(f"{case.title}, {len(runs_of(results, name, 'policygrad'))} seeds", loc="left")
        axes.set_xlabel("step")
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_xlim(1, results["cases"][name]["settings"]["steps"])
    panels[0].set_ylim(top=1)
    panels[0].set_ylabel(f"training reward, mean of {SMOOTH} steps")
    figure.suptitle("The same model, prompts, reward and settings: mean and standard deviation over seeds", fontsize=11)
    figure.savefig(path)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the others keep their results")
    parser.add_argument("--busy", action="store_true", help="other work is running: keep no times, and no memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "policygrad" / "benchmark-language")
    parser.add_argument("--quick", action="store_true", help="two seeds of four steps")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in the results already")
    parser.add_argument("--draw", action="store_true", help="only write the page and the picture again")
    parser.add_argument("--worker", nargs=2, metavar=("WORKER", "JOB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import torch

        worker, job = arguments.worker[0], json.loads(arguments.worker[1])
        torch.set_num_threads(job["threads"])
        print(json.dumps(WORKERS[worker](job)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    path, docs = HERE / "language.json", DOCS
    if arguments.quick:
        arguments.seeds = 2
    if arguments.quick or not (arguments.peer_python or arguments.draw):
        path, docs = arguments.work / "language.json", arguments.work
    results = json.loads(path.read_text()) if arguments.draw else measure(arguments, path)
    write_page(results, docs / "language.md")
    draw(results, docs / "language.png")
    say(f"{path}, {docs / 'language.md'}, {docs / 'language.png'}")


if __name__ == "__main__":
    main()
