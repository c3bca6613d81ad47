"""policygrad push: a run on the Hugging Face hub, with a card: what it is, what it scores and how to load it."""

import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from policygrad.errors import Note, UserError, one_line
from policygrad.files import check_real
from policygrad.machine import described
from policygrad.train import presets
from policygrad.train.hub import PREFIX, VIDEOS, check_installed, check_name, explained, wanted
from policygrad.train.names import trusting
from policygrad.train.options import options_of, with_values
from policygrad.train.run import Run
from policygrad.train.statistics import CONFIDENCE, estimate, mean

CARD = "README.md"


def push(run: Run | Path | str, name: str, *, private: bool = False, trust: bool = False, **evaluation: Any) -> str:
    """Evaluate a run and put it on the Hugging Face hub, with a card. Returns its address.

    run: a run with a directory, or its directory. name: USER/NAME, or NAME for the user of the token. private: for a
    new repository. trust: as for Run.load. evaluation: the arguments of `Run.evaluate`. What is on the hub afterwards
    is this run, in one commit: its configuration, policy, metrics, held-out prompts (language), pictures and card, no
    checkpoint and nothing pickled. Raises UserError if NAME holds something else than a run.
    """
    check_installed()
    check_name(name)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UserError("push needs a token that may write: hf auth login, or HF_TOKEN")
    run = run if isinstance(run, Run) else Run.load(run, trust=trust)
    if run.directory is None or not (run.directory / "config.json").is_file():
        raise UserError("a run is pushed from its directory, and this one has none: save it, by run.save(directory)")
    files = {x: run.directory / x for x in _names(run.directory) if wanted(x)}
    check_real(run.directory)
    try:
        result = run.evaluate(**evaluation)
    except UserError as error:
        result = None
        warnings.warn(f"the card has no evaluation: {one_line(error, 150)}", Note, stacklevel=2)
    api = HfApi(library_name="policygrad")
    with explained(name, "written"):
        repository = api.create_repo(name, private=private, exist_ok=True)
        name = repository.repo_id
        info = api.model_info(name)
        there = {x.rfilename for x in info.siblings or ()}
        if private and not info.private:
            raise UserError(f"{name} is public already: choose another name, or make it private in its settings")
        its_run = "config.json" in there and bool({"policy.json", "held_out.jsonl"} & there)
        if there - {CARD, ".gitattributes"} and not its_run:
            raise UserError(f"{name} holds something else than a run: choose another name")
        content = card(run, name, str(repository), result, [x for x in VIDEOS if x in files])
        operations: list[Any] = [CommitOperationAdd(x, y) for x, y in sorted(files.items())]
        operations += [CommitOperationAdd(CARD, content.encode())]
        operations += [CommitOperationDelete(x) for x in sorted(there) if wanted(x) and x not in files]
        api.create_commit(name, operations, commit_message=f"{run.method} on {run.world.name}")
    return str(repository)


def _names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix()


def card(run: Run, name: str, url: str, result: Any, videos: list[str]) -> str:
    """The model card: its header for the hub, how to load the run, the evaluation, and how it was trained."""
    from huggingface_hub import EvalResult, ModelCardData

    task, title = run.world.name, f"{run.method} on {run.world.name}"
    scores = [] if result is None else _scores(result)
    tags = ["policygrad", "reinforcement-learning", run.method, *([task] if re.fullmatch(r"[\w.-]+", task) else [])]
    results = []
    if result is not None:
        found = estimate(mean, [np.array(scores)])
        metric = "mean_return" if run.world.kind != "language" else "mean_reward"
        of = {"control": "episodes", "language": "prompts"}.get(run.world.kind)  # J is exact
        about: dict[str, Any] = {} if of is None else {of: len(scores)}
        if found.low is not None:
            about |= {"interval": [found.low, found.high], "confidence": CONFIDENCE}
        results = [EvalResult(
            task_type="reinforcement-learning", dataset_type=task, dataset_name=task, metric_type=metric,
            metric_value=result.score, metric_name=metric.replace("_", " "), metric_args=about or None,
        )]  # fmt: skip
        between = (
            ""
            if found.low is None
            else f" (the mean's {CONFIDENCE:.0%} interval: {found.low:,.4g} to {found.high:,.4g})"
        )
    data = ModelCardData(
        library_name="policygrad", tags=tags, model_name=title, eval_results=results or None,
        pipeline_tag="reinforcement-learning" if run.world.kind != "language" else "text-generation",
    )  # fmt: skip
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", ""]
    if result is not None:
        lines += [f"{result.line()}{between}; {run.standing()}.", ""]
    trust = ", trust=True" if trusting(run.world.kind, run.world.stored(), run.options) else ""
    lines += ["```python", "import policygrad as pg", f'run = pg.load("{PREFIX}{name}"{trust})', "```", ""]
    if run.world.kind == "language":
        lines += [f'For transformers: `from_pretrained("{name}", subfolder="model")`.', ""]
    for video in videos:
        place = f"{url}/resolve/main/{video}"
        shown = f"![an episode]({place})" if video.endswith(".gif") else f'<video controls loop src="{place}"></video>'
        lines += [shown, ""]
    lines += ["![the learning curve](curve.png)", ""] if (Path(str(run.directory)) / "curve.png").is_file() else []
    lines += ["Trained by", "", "```sh", command(run), "```", ""]
    about_machine = {**run.world.versions(), **described()}
    lines += ["| | |", "|---|---|", *(f"| {x} | {y} |" for x, y in about_machine.items()), ""]
    return "\n".join(lines)


def _scores(result: Any) -> list[float]:
    """The independent parts of an evaluation: returns of episodes, mean rewards of prompts, or J alone."""
    if hasattr(result, "returns"):
        return [float(x) for x in result.returns]
    if not hasattr(result, "rows"):
        return [result.score]
    rewards = [x["reward"] for x in result.rows]
    count = result.completions
    parts = [[y for y in rewards[i : i + count] if y is not None] for i in range(0, len(rewards), count)]
    return [sum(x) / len(x) for x in parts if x]


def command(run: Run) -> str:
    """The command that trains a run like this one: its options, as far as they are not the defaults."""
    kind, preset = run.world.kind, run.preset
    defaults = options_of(run.method, kind)()
    with suppress(UserError):  # a preset of another version
        if preset is not None:
            defaults = with_values(defaults, presets.settings(presets.load(preset), run.method, kind))
    task = run.world.stored()
    words = ["policygrad", "train", run.method, *([] if task is None else [task])]
    own = presets.choose(None, run.method, task, {"model": getattr(run.options, "model", None)})[0]
    if preset != own:
        words += ["--preset", preset or "none"]
    for f in fields(run.options):
        x = getattr(run.options, f.name)
        if x == getattr(defaults, f.name):
            continue
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(x, bool):
            words.append(flag if x else f"--no-{flag.removeprefix('--')}")
        elif isinstance(x, tuple) and f.name != "hidden":
            words += [word for y in x for word in (flag, str(y))]
        else:
            words += [flag, *map(str, x if isinstance(x, tuple) else (x,))]
    return shlex.join(words)
