"""Side by side with TRL: GRPO and RLOO on the same language model, prompts, rewards and hyperparameters.

    python benchmarks/language.py --peer-python PYTHON    writes docs/language.md, docs/language.png, language.json here
    python benchmarks/language.py --peer-python PYTHON --quick      a smoke run, whose results stay in --work
    python benchmarks/language.py --draw                            the page and the picture from the results there are

PYTHON is a Python with TRL: `python -m venv PEER && PEER/bin/pip install trl==1.16.0`. Without it only our side runs,
and its results stay in --work.

A small Llama learns addition with written-out working from imperfect demonstrations, once; every run starts from those
weights. Each run is a process of its own, and the libraries take turns. The same code judges both: the weights that a
run saved answer problems that no run has seen, sampled at temperature 1.
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
METHODS = {"grpo": "GRPO", "rloo": "RLOO"}
LIBRARIES = {"policygrad": "#3a6ea5", "TRL": "#b3452f"}
SMOOTH = 10  # steps

JOB: dict[str, Any] = {
    "problems": [8000, 512],  # to train on, and held out
    "prompts": 16,  # a step
    "completions": 8,  # a prompt
    "max_tokens": 40,
    "learning_rate": 3e-5,
    "adam_betas": [0.9, 0.999],
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "clip": 0.2,
}
WARM_UP = {"steps": 800, "rows": 128, "learning_rate": 2e-3}


# Each of these runs in a process of its own, so that memory is a run's alone. torch is imported only there.


def warm_up(job: dict[str, Any]) -> dict[str, Any]:
    """Learn the demonstrations: the weights that every run starts from."""
    import torch

    from policygrad.language import arithmetic
    from policygrad.language.models import save_model
    from policygrad.language.policies import LanguagePolicy
    from policygrad.language.warmup import demonstrations_batch, fit_demonstrations

    def progress(done: int, total: int, status: str) -> None:
        if done % 100 == 0:
            say(f"  step {done:4}: {status}")

    torch.manual_seed(0)
    tokenizer = arithmetic.tokenizer()
    policy = LanguagePolicy(arithmetic.model())
    examples, _ = arithmetic.splits(*job["problems"], seed=0)
    batch = demonstrations_batch(examples, arithmetic.demonstrations(examples, seed=0), tokenizer)
    fit_demonstrations(policy, batch, job["steps"], job["rows"], job["learning_rate"], progress=progress)
    save_model(policy.model, tokenizer, Path(job["out"]))
    return {}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of a run; peers/trl_run.py is TRL's."""
    import torch

    from policygrad.language import arithmetic
    from policygrad.language.completions import Request
    from policygrad.language.models import load_model, load_tokenizer, save_model, stop_tokens
    from policygrad.language.policies import LanguagePolicy
    from policygrad.language.rewards import Rewards
    from policygrad.language.sampler import CompletionSampler
    from policygrad.train.compose import assemble

    torch.manual_seed(job["seed"])
    tokenizer, model = load_tokenizer(job["start"]), load_model(job["start"])
    policy = LanguagePolicy(model)
    examples, _ = arithmetic.splits(*job["problems"], seed=0)
    sample = CompletionSampler(
        prompts_of(examples, tokenizer),
        tokenizer,
        Rewards([arithmetic.right]),
        Request(job["completions"], job["max_tokens"], stop_tokens(model, tokenizer), tokenizer.pad_token_id),
        prompts_per_rollout=job["prompts"],
        seed=job["seed"],
    )
    learner = assemble(  # Adam is AdamW without weight decay; its betas are torch's defaults, which are the job's
        job["method"],
        policy,
        sample,
        world="language",
        kl_ref="none",
        clip_low=job["clip"],
        clip_high=job["clip"],
        learning_rate=job["learning_rate"],
        adam_epsilon=job["adam_epsilon"],
        max_grad_norm=job["max_grad_norm"],
    )
    steps = iter(learner)
    rewards, lengths, seconds, before_mb = [], [], [], peak_mb()
    for step in range(1, job["steps"] + 1):
        start = time.perf_counter()
        metrics = next(steps)
        seconds.append(time.perf_counter() - start)
        rewards.append(float(metrics["reward"]))
        lengths.append(float(metrics["length"]))
        if step % 20 == 0:
            say(f"  step {step:4}: reward {rewards[-1]:.2f}")
    result = {"reward": rewards, "length": lengths, "seconds": seconds, "before_mb": before_mb, "peak_mb": peak_mb()}
    save_model(policy.model, tokenizer, Path(job["out"]))
    result["prompts"] = digest(sample.last.prompts.texts)
    named = {name: version(name) for name in ("torch", "transformers", "policygrad")}
    return {**result, "versions": {"python": platform.python_version(), **named}}


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """The share of right answers to the held-out problems, four samples of each, by saved weights."""
    import torch

    from policygrad.language import arithmetic
    from policygrad.language.completions import Request
    from policygrad.language.models import load_model, load_tokenizer, stop_tokens
    from policygrad.language.policies import LanguagePolicy
    from policygrad.language.rewards import Rewards
    from policygrad.language.sampler import answer

    tokenizer, model = load_tokenizer(job["start"]), load_model(job["out"])
    _, held_out = arithmetic.splits(*job["problems"], seed=0)
    request = Request(4, job["max_tokens"], stop_tokens(model, tokenizer), tokenizer.pad_token_id)
    prompts, rewards = prompts_of(held_out, tokenizer), Rewards([arithmetic.right])
    generator = torch.Generator().manual_seed(0)
    answers = answer(LanguagePolicy(model), prompts, request, tokenizer, rewards, generator)
    return {"held_out": float(answers.reward.mean())}


def prompts_of(examples: list[dict[str, Any]], tokenizer: Any) -> Any:
    from policygrad.language.data import columns_of, encode_prompts
    from policygrad.language.sampler import Prompts

    rows = encode_prompts(examples, tokenizer)
    return Prompts.of([x["prompt"] for x in examples], rows, columns_of(examples), pad=tokenizer.pad_token_id)


def digest(prompts: list[str]) -> str:
    """A digest of the last step's prompts, to see that both libraries had the same."""
    return hashlib.sha256(" ".join(sorted(set(prompts))).encode()).hexdigest()[:12]


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


def starting_weights(work: Path, threads: int, steps: int) -> Path:
    """The directory of the warmed-up model, made if there is none of this task and these settings."""
    job = {**WARM_UP, "steps": steps, "problems": JOB["problems"]}
    task = HERE.parent / "policygrad" / "language" / "arithmetic.py"
    made_of = task.read_text() + inspect.getsource(warm_up) + json.dumps(job)
    out = work / f"start-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    if not (out / "tokenizer.json").exists():  # the last file that is written
        say(f"warming up, {steps} steps")
        ours("warm_up", {**job, "threads": threads, "out": str(out)})
    return out


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All runs, the libraries taking turns. The results are written after every run."""
    start = starting_weights(arguments.work, arguments.threads, arguments.warm_up)
    job = {**JOB, "steps": arguments.steps, "threads": arguments.threads, "start": str(start)}
    settings = {**JOB, "steps": arguments.steps, "warm_up": {**WARM_UP, "steps": arguments.warm_up}}
    machine = {"threads": arguments.threads, "cores": os.cpu_count()}
    results = {"settings": settings, "machine": machine, "versions": {}, "runs": []}
    if arguments.resume and path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != settings or found["machine"] != machine:
            sys.exit(f"{path.name} was measured with other settings: run without --resume")
        results = found
    results["before"] = ours("judge", {**job, "out": str(start)})["held_out"]
    say(f"before: {results['before']:.1%} of the held-out problems right")
    done = {(run["library"], run["method"], run["seed"]) for run in results["runs"]}
    sides = {"policygrad": [sys.executable, __file__, "--worker", "train"]}
    if arguments.peer_python:
        sides["TRL"] = [arguments.peer_python, str(HERE / "peers" / "trl_run.py")]
    else:
        say("no --peer-python: only our side runs, and the results stay in --work")
    plan = [(seed, method, library) for seed in range(arguments.seeds) for method in METHODS for library in sides]
    for number, (seed, method, library) in enumerate(plan, 1):
        if (library, method, seed) in done:
            continue
        say(f"{number}/{len(plan)}  {library}, {METHODS[method]}, seed {seed}")
        with tempfile.TemporaryDirectory() as out:
            this = {**job, "method": method, "seed": seed, "out": out}
            run = {"library": library, "method": method, "seed": seed, **in_process(sides[library], this)}
            run |= ours("judge", this)
        results["versions"][library] = run.pop("versions")
        results["runs"].append(run)
        say(f"  {median_seconds([run]):.3f} s a step, {run['held_out']:.1%} of the held-out problems right")
        write(results, path)
    return results


def write(results: dict[str, Any], path: Path) -> None:
    """As JSON, a run a line."""
    runs = ",\n  ".join(json.dumps({k: rounded(x) for k, x in run.items()}) for run in results["runs"])
    rest = json.dumps({**results, "runs": []}, indent=1)
    path.write_text(rest.replace('"runs": []', f'"runs": [\n  {runs}\n ]') + "\n")


def rounded(x: Any) -> Any:
    return [round(y, 5) for y in x] if isinstance(x, list) else round(x, 5) if isinstance(x, float) else x


# The results become a page and a picture here.


def runs_of(results: dict[str, Any], method: str, library: str) -> list[dict[str, Any]]:
    runs = [run for run in results["runs"] if (run["method"], run["library"]) == (method, library)]
    return sorted(runs, key=lambda run: run["seed"])


def run_prompts(results: dict[str, Any], library: str) -> list[str]:
    return [run["prompts"] for method in METHODS for run in runs_of(results, method, library)]


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


def write_page(results: dict[str, Any], path: Path) -> None:
    settings, machine, libraries = results["settings"], results["machine"], list(results["versions"])
    seeds = len({run["seed"] for run in results["runs"]})
    pairs = zip(*(run_prompts(results, library) for library in libraries), strict=True)
    same = "; the prompts of a step are the same in both libraries"
    same = same if len(libraries) > 1 and all(len(set(pair)) == 1 for pair in pairs) else ""
    command = f"python benchmarks/language.py --seeds {seeds} --steps {settings['steps']} --peer-python PYTHON"
    lines = [
        "# Side by side with TRL",
        "",
        *paragraph(f"Written by `{command}`, where PYTHON is a Python with TRL."),
        *paragraph(
            f"""The task is addition of numbers below 1000 with written-out working
            (`policygrad/language/arithmetic.py`), the model a small Llama that learned it from imperfect demonstrations
            for {settings["warm_up"]["steps"]} steps. Every run starts from those weights, which are right on
            {results["before"]:.1%} of the held-out problems. A step answers {settings["prompts"]} prompts
            {settings["completions"]} times, with at most {settings["max_tokens"]} tokens at temperature 1, and makes
            one update of them all: AdamW, learning rate {settings["learning_rate"]:g}, constant, betas
            {" and ".join(map(str, settings["adam_betas"]))}, eps {settings["adam_epsilon"]:g}, no weight decay,
            gradient norm at most {settings["max_grad_norm"]:g}, clip {settings["clip"]:g}, no KL penalty, float32. The
            reward is 1 for a right sum and else 0. The seeds vary the samples and the order of the prompts{same}. GRPO
            is the published one (TRL: `loss_type="grpo"`, `scale_rewards="group"`), RLOO without a normalization of
            advantages. TRL's gradient checkpointing and bfloat16, on by default, are off."""
        ),
        "![Training reward of both libraries](language.png)",
        "",
        "| method | library | training reward, last 10 steps | held-out accuracy | seconds a step | tokens an answer | "
        "peak memory (before training) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name in METHODS.items():
        for library in libraries:
            runs = runs_of(results, method, library)
            ratio = median_seconds(runs) / median_seconds(runs_of(results, method, libraries[0]))
            times = f" ({ratio:.2f} times)" if library != libraries[0] else ""
            peak, before = (np.median([run[key] for run in runs]) for key in ("peak_mb", "before_mb"))
            cells = [
                name,
                library,
                spread([np.mean(run["reward"][-10:]) for run in runs]),
                spread([run["held_out"] for run in runs]),
                f"{median_seconds(runs):.3f}{times}",
                f"{np.mean([run['length'] for run in runs]):.1f}",
                f"{peak:,.0f} MB ({before:,.0f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *paragraph(
            f"""Mean ± standard deviation over {seeds} seeds. Held-out accuracy: {settings["problems"][1]} problems,
        four samples of each at temperature 1; the same code judges the weights that either library saved. Seconds: the
        median over all steps but each run's first three; a step is sampling, reward and update, without TRL's logging.
        Memory: the process's largest resident set, and what it was before the first step. The libraries took turns,
        run by run."""
        ),
    ]
    if "TRL" in libraries:
        lines += ["## Do the curves agree?", "", *(agreement(results) if seeds > 1 else []), ""]
        lines += ["## Is a step faster?", "", *speed(results), ""]
    lines += [
        "## Versions",
        "",
        f"{machine['cores']} cores, {machine['threads']} threads in either library.",
        "",
        "| | " + " | ".join(libraries) + " |",
        "|---|" + "---|" * len(libraries),
    ]
    for name in dict.fromkeys(name for versions in results["versions"].values() for name in versions):
        lines.append(f"| {name} | " + " | ".join(results["versions"][x].get(name, "") for x in libraries) + " |")
    path.write_text("\n".join(lines) + "\n")


def agreement(results: dict[str, Any]) -> list[str]:
    lines = paragraph(
        f"""Of each run take the reward as the mean of {SMOOTH} steps, and of each seed the difference of the two
        libraries; then look where its mean over the seeds is largest. In units of its standard error (from the variance
        between seeds, pooled over the steps) that is the largest of many differences, so it is not small by itself.
        Beside it stands in how many of the ways to swap the libraries within seeds it is as large."""
    )
    for method, name in METHODS.items():
        a, b = (curves(runs_of(results, method, library)) for library in LIBRARIES)
        where, difference, units = largest_difference(a - b)
        k, n = as_large_by_chance(a - b)
        lines.append(
            item(
                f"""{name}: at most {units:.1f} standard errors, which are {abs(difference):.3f} of reward, policygrad
                being {"above" if difference > 0 else "below"} TRL, at steps {where + 1} to {where + SMOOTH}; as large
                in {k} of {n} ways."""
            )
        )
    return lines


def speed(results: dict[str, Any]) -> list[str]:
    lines = []
    for method, name in METHODS.items():
        a, b = (runs_of(results, method, library) for library in LIBRARIES)
        ratios = [median_seconds([y]) / median_seconds([x]) for x, y in zip(a, b, strict=True)]
        lines.append(
            item(
                f"""{name}: a step of TRL takes {np.median(ratios):.2f} times as long (the median of {len(ratios)} pairs
                of runs, one after the other; {min(ratios):.2f} to {max(ratios):.2f})."""
            )
        )
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Two panels: the reward while training, the mean over seeds and one standard deviation around it."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (method, name) in zip(panels, METHODS.items(), strict=True):
        for library in results["versions"]:
            runs, color = runs_of(results, method, library), LIBRARIES[library]
            y = curves(runs)
            x = np.arange(y.shape[1]) + (len(runs[0]["reward"]) - y.shape[1]) / 2 + 1
            mean, deviation = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
            axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
            label = f"{library} {results['versions'][library][library.lower()]}, {median_seconds(runs):.2f} s a step"
            axes.plot(x, mean, color=color, linewidth=2, label=label)
        axes.set_title(name, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_xlim(1, len(runs[0]["reward"]))
        axes.set_ylim(top=1)
    panels[0].set_ylabel(f"training reward, mean of {SMOOTH} steps")
    seeds = len({run["seed"] for run in results["runs"]})
    figure.suptitle(
        f"The same model, prompts, reward and settings: mean and standard deviation of {seeds} seeds", fontsize=11
    )
    figure.savefig(path)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warm-up", type=int, default=WARM_UP["steps"], help="steps of supervised learning before")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "policygrad" / "benchmark-language")
    parser.add_argument("--quick", action="store_true", help="two seeds of four steps from a model that knows nothing")
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
        arguments.seeds, arguments.steps, arguments.warm_up = 2, 4, 4
    if arguments.quick or not (arguments.peer_python or arguments.draw):
        path, docs = arguments.work / "language.json", arguments.work
    results = json.loads(path.read_text()) if arguments.draw else measure(arguments, path)
    write_page(results, docs / "language.md")
    draw(results, docs / "language.png")
    say(f"{path}, {docs / 'language.md'}, {docs / 'language.png'}")


if __name__ == "__main__":
    main()
