"""A report: one HTML page about one run or several. It needs no network, and takes nothing of a run as code."""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import LARGEST_JSON, as_path, check_file, damaged, parse_json, read_json, write_bytes
from policygrad.train.comparison import AXES, Recorded, recorded, runs_in
from policygrad.train.elo import KEPT as RATINGS
from policygrad.train.findings import SCORES, Course, Finding, findings
from policygrad.train.options import options_of

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d31")
SAMPLES = 8  # shown of a language model
TEXT = 600  # characters of a text shown
FILM = 8 * 2**20  # bytes of a video that is put into the page
PICTURES = {".mp4": "video/mp4", ".gif": "image/gif"}

# The charts in order: section, and its metrics with what they are. Others follow; those that never change are listed.
CHARTS: list[tuple[str, dict[str, str]]] = [
    ("Score", {
        "return": "mean return of the last 100 episodes", "evaluation": "mean return of evaluation episodes",
        "expected_return": "J of the policy, exactly", "reward": "mean reward of a completion in training",
        "held_out": "mean reward on held-out prompts", "success": "share of episodes that succeed",
        "reward_per_step": "mean reward of a decision", "length": "mean length of an episode, or of a completion",
        "reward_std": "standard deviation of the rewards",
    }),
    ("Policy", {
        "entropy": "nats a decision", "action_std": "in half-ranges of the bounds",
        "kl_old": "KL(old, new) of an update",
        "kl_ref": "KL(policy, reference) a token", "clip_fraction": "ratios outside the clip range",
        "clip_fraction_low": "gradients clipped away, below", "clip_fraction_high": "gradients clipped away, above",
        "effective_sample_size": "of the ratios", "bound_fraction": "actions at a bound",
    }),
    ("Critic", {
        "explained_variance": "1 is perfect, 0 the mean alone", "value_loss": "in the critic's unit, squared",
        "critic_gradient_norm": "before it is clipped",
    }),
    ("Update", {
        "gradient_norm": "before it is clipped", "gradient_snr": "signal to noise of a step",
        "noise_scale": "batch size at which they are equal",
        "objective": "what is maximized", "improvement": "of the surrogate",
        "accepted": "steps that the line search took", "step_fraction": "of the full natural step",
        "step_size": "alpha of the natural step",
    }),
    ("Completions", {
        "group_std": "mean standard deviation in a group", "flat_groups": "groups that teach nothing",
        "prompt_repeats": "completions that repeat their prompt", "cut_fraction": "cut at max_tokens",
        "unjudged": "to which no reward applies", "masked": "that count for nothing",
        "mismatch_kl": "KL(engine, learner)", "mismatch_ratio": "learner to engine", "mismatch_largest": "ratio",
    }),
    ("Speed", {
        "steps_per_second": "since the start", "sampling_tokens_per_second": "tokens a second",
        "learning_tokens_per_second": "tokens a second", "iteration_seconds": "s", "sampling_seconds": "s",
        "padding": "share of what is computed",
    }),
]  # fmt: skip
AXIS = {
    "steps": "steps",
    "completions": "completions",
    "episodes": "episodes",
    "seconds": "seconds",
    "row": "iterations",
}
UNDRAWN = {"steps", "completions", "episodes", "seconds", "updates", "epoch"}


@dataclass(frozen=True)
class Reported:
    """A run in a report: what it leaves, its illnesses, and its look."""

    run: Recorded
    name: str
    color: str
    ill: list[Finding]
    summary: dict[str, Any]
    versions: dict[str, Any]

    @property
    def score(self) -> str | None:
        """The name of its score."""
        return next((name for name in SCORES if any(name in row for row in self.run.rows)), None)


def report(*runs: Any, out: Path | str = "report.html") -> Path:
    """Write a page about runs, or about all runs in directories: configuration, curves, illnesses, samples, video.

    out: a file, .html or .htm, or a directory. Returns its path. Raises UserError for a directory that holds no run or
    is damaged, and if `out` cannot be written.
    """
    place = as_path(out)
    if place.is_dir():
        place = place / "report.html"
    if place.suffix not in (".html", ".htm"):  # a file of another kind is something else's, and would be lost
        raise UserError(f"out is {shortened(str(out))}: a report is an .html file")
    content = html_of(gathered(runs))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, content.encode())
    except OSError as error:
        said = f"{ending(str(place), 80)} cannot be written ({error.strerror})"
        raise UserError(f"{said}: give another place by out, or make room") from error
    return place


def gathered(places: Sequence[Any]) -> list[Reported]:
    """The runs at these places, in order."""
    notes: list[str] = []
    found = [recorded(run) for run in runs_in(places, notes)]
    if not found:
        raise UserError("there is no run to report on: give the directories of runs")
    names = _names([run.place for run in found])
    made = []
    for i, (run, name) in enumerate(zip(found, names, strict=True)):
        place = Path(run.place)
        summary, config = (_object(place / x) for x in ("summary.json", "config.json"))
        versions = config.get("versions")
        made.append(
            Reported(
                run, name, COLORS[i % len(COLORS)], findings(Course(run.method, run.world, run.options, run.rows)),
                summary, versions if isinstance(versions, dict) else {},
            )
        )  # fmt: skip
    return made


def html_of(runs: Sequence[Reported], live: bool = False) -> str:
    """The page."""
    methods = sorted({f"{one.run.method} on {one.run.task}" for one in runs})
    title = methods[0] if len(methods) == 1 else f"{len(runs)} runs"
    if len(methods) == 1 and len(runs) > 1:
        title += f", {len(runs)} runs"
    subtitle = "a report by policygrad" + (", while the run goes on" if live else "")
    rest = "".join(
        [
            _unchanged(runs),
            _films(runs),
            _evaluations(runs),
            _ratings(runs),
            _samples(runs),
            _configuration(runs),
            _machine(runs),
        ]
    )
    parts = {
        "title": escape(title), "subtitle": subtitle, "cards": _cards(runs), "findings": _findings(runs), "rest": rest,
        "data": _script(data_of(runs, live)),
    }  # fmt: skip
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + tail for name, tail in (piece.split("}}", 1) for piece in pieces[1:]))


def data_of(runs: Sequence[Reported], live: bool = False) -> dict[str, Any]:
    """What the page draws: the columns of every run, and the charts in order."""
    drawn, ill = [], {found.metric for one in runs for found in one.ill}
    for one in runs:
        rows = one.run.rows
        xs = {axis: [row.get(axis) for row in rows] for axis in AXIS if axis != "row"}
        xs = {axis: x for axis, x in xs.items() if any(v is not None for v in x)} | {
            "row": list(range(1, len(rows) + 1))
        }
        ys = {name: [_short(row.get(name)) for row in rows] for name in _metrics([one])}
        drawn.append({"name": one.name, "color": one.color, "x": xs, "y": ys})
    own = AXES[runs[0].run.world][0]
    axes = sorted({axis for run in drawn for axis in run["x"]}, key=lambda x: (x != own, list(AXIS).index(x)))
    sections = [[title, [[name, about, name in ill] for name, about in charts]] for title, charts in _charts(runs)]
    return {"runs": drawn, "axes": [[x, AXIS[x]] for x in axes], "sections": sections, "live": live}


def serve(places: Sequence[Any], port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on this machine alone (127.0.0.1), which reads the runs again for every look."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """/ is the page, /data what changes in it. Requests by a name of elsewhere are refused."""
            _, own = self.connection.getsockname()
            if self.headers.get("Host") not in (f"127.0.0.1:{own}", f"localhost:{own}"):
                self.send_error(403)
                return
            try:
                runs = gathered(places)
                if self.path == "/":
                    kind, content = "text/html", html_of(runs, live=True)
                elif self.path == "/data":
                    parts = {"cards": _cards(runs), "findings": _findings(runs), "data": data_of(runs, live=True)}
                    kind, content = "application/json", json.dumps(parts)
                else:
                    self.send_error(404)
                    return
            except UserError as error:  # a file that is being replaced: the next look finds it
                self.send_error(503, one_line(error, 150))
                return
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    gathered(places)  # an error of the user's is said before anything is served
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise UserError(f"port {port} cannot be served ({error.strerror}): choose another one by port") from error


def _names(places: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(place).parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(places)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a run, empty if there is none."""
    if not path.is_file():
        return {}
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _metrics(runs: Sequence[Reported]) -> list[str]:
    """The metrics of all runs that may be drawn, in their order."""
    names = dict.fromkeys(name for one in runs for row in one.run.rows for name in row)
    return [name for name in names if name not in UNDRAWN]


def _charts(runs: Sequence[Reported]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The sections with their charts. A metric that is the same number everywhere has no chart."""
    names = [name for name in _metrics(runs) if not _constant(runs, name)]
    listed = set()
    for title, known in CHARTS:
        own = [(name, about) for name, about in known.items() if name in names]
        if title == "Score":
            own += [(name, "a part of the reward") for name in names if name.startswith("reward/")]
            own += [(name, "mean at the end of episodes") for name in names if name.startswith("info/")]
        listed |= {name for name, _ in own}
        if own:
            yield title, own
    if others := [(name, "") for name in names if name not in listed]:
        yield "Others", others


def _constant(runs: Sequence[Reported], name: str) -> bool:
    """Whether a metric is the same number everywhere, to rounding."""
    found = [row[name] for one in runs for row in [*_before(one), *one.run.rows] if name in row]
    return max(found) - min(found) <= 1e-6 * max(1.0, *map(abs, found))


def _before(one: Reported) -> list[dict[str, float]]:
    """The score on held-out prompts before training, as a row."""
    found = one.summary.get("before")
    score = found.get("reward") if isinstance(found, dict) else None
    known = type(score) in (int, float) and any("held_out" in row for row in one.run.rows)
    return [{"steps": 0, "completions": 0, "seconds": 0, "held_out": score}] if known else []  # type: ignore[dict-item]


def _unchanged(runs: Sequence[Reported]) -> str:
    """The metrics that have no chart."""
    last = runs[0].run.rows[-1] if runs[0].run.rows else {}
    found = [f"{name} {_number(last[name])}" for name in _metrics(runs) if _constant(runs, name) and name in last]
    return f'<p class="soft">Unchanged: {escape(", ".join(found))}.</p>' if found else ""


def _cards(runs: Sequence[Reported]) -> str:
    return f'<div class="cards">{"".join(map(_card, runs))}</div>'


def _card(one: Reported) -> str:
    """A run in a few numbers."""
    last = one.run.rows[-1] if one.run.rows else {}
    facts = {"seed": f"{one.run.seed}", "ended": one.run.ended or "not yet"}
    for name in ("steps", "completions", "episodes"):
        if name in last:
            facts[name] = f"{last[name]:,.0f}"
    if "seconds" in last:
        facts["time"] = _duration(last["seconds"])
    big = ""
    if one.score is not None:
        values = [row[one.score] for row in one.run.rows if one.score in row]
        facts[f"best {one.score}"] = _number(max(values))
        big = f'<b class="big">{_number(values[-1])}</b><span class="soft">{escape(one.score)}, last</span>'
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(one_line(x, 80))}</dd>" for name, x in facts.items())
    about = f"{escape(one.run.method)} on {escape(one_line(one.run.task, 60))}"
    return (
        f'<div class="card" style="--run:{one.color}"><b>{escape(one.name)}</b><div class="soft">{about}</div>{big}'
        f"<dl>{listed}</dl></div>"
    )


def _findings(runs: Sequence[Reported]) -> str:
    """What the metrics say, of each run that says something."""
    parts = ["<h2>What the metrics say</h2>"]
    for one in runs:
        dot = f'<span class="dot" style="--run:{one.color}"></span>{escape(one.name)}: ' if len(runs) > 1 else ""
        for found in one.ill:
            link = f'<a href="#metric-{escape(found.metric)}">{escape(found.metric)}</a>'
            parts.append(
                f'<div class="finding">{dot}<b>{escape(found.name)}</b> ({link}). {escape(found.seen)}.<br>'
                f'<span class="soft">{escape(found.advice)}.</span></div>'
            )
    well = [one.name for one in runs if not one.ill]
    if well:
        who = "" if len(runs) == 1 else f"{escape(', '.join(well))}: "
        parts.append(f'<div class="finding well">{who}<b>no known illness</b> shows in the metrics.</div>')
    return "".join(parts)


def _films(runs: Sequence[Reported]) -> str:
    """The videos that `policygrad watch` left in the runs."""
    parts = []
    for one in runs:
        for ending_, kind in PICTURES.items():
            path = Path(one.run.place) / f"video{ending_}"
            if not path.is_file() or path.is_symlink() or path.stat().st_size > FILM:
                continue
            source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            shown = (
                f'<video controls loop src="{source}"></video>' if ending_ == ".mp4" else f'<img src="{source}" alt="">'
            )
            parts.append(f'<div class="soft">{escape(one.name)}</div>{shown}')
            break
    return f"<h2>Episodes</h2>{''.join(parts)}" if parts else ""


def _evaluations(runs: Sequence[Reported]) -> str:
    """The scores before and after training, where a run has them, and its best one."""
    columns: dict[str, dict[str, Any]] = {}
    best = "".join(f'<p class="soft">{_best(one, len(runs) > 1)}</p>' for one in runs if _best(one, False))
    for one in runs:
        for when in ("before", "after"):
            found = one.summary.get(when)
            if isinstance(found, dict):
                columns[f"{one.name}, {when}" if len(runs) > 1 else f"{when} training"] = found
    if not columns:
        return f"<h2>Evaluation</h2>{best}" if best else ""
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows = []
    for name in names:
        cells = [found.get(name) for found in columns.values()]
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in cells):
            rows.append([name, *map(_number, cells)])
        elif all(isinstance(x, dict) for x in cells):
            keys = dict.fromkeys(key for x in cells for key in x)  # type: ignore[union-attr]
            plain = [key for key in keys if all(isinstance(x.get(key), int | float) for x in cells)]  # type: ignore
            rows += [[f"{name} {key}", *(_number(x[key]) for x in cells)] for key in plain]  # type: ignore[index]
    return "<h2>Evaluation</h2>" + _table(["", *columns], rows) + best


def _ratings(runs: Sequence[Reported]) -> str:
    """The ratings that `policygrad elo` has left, of the selves of each run."""
    names, parts = ("player", "elo", "games", "wins", "draws", "losses"), []
    for one in runs:
        found = _object(Path(one.run.place) / RATINGS).get("ratings")
        rows = [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []
        numbers = [[x.get(name) for name in names] for x in rows]
        sound = [x for x in numbers if all(isinstance(y, int | float) for y in x[1:])]
        if sound:
            title = f"<h3>{escape(one.name)}</h3>" if len(runs) > 1 else ""
            lines = [[one_line(x[0], 40), f"{x[1]:.0f}", *map(_number, x[2:])] for x in sound]
            parts.append(title + _table(("player", "Elo", *names[2:]), lines, text=1))
    return f"<h2>Elo ratings of earlier selves</h2>{''.join(parts)}" if parts else ""


def _best(one: Reported, named: bool) -> str:
    """The best score of a run in words, and where its policy is; empty if there is none."""
    found = one.summary.get("best")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), int | float) for name in ("score", "iteration", "steps")
    ):
        return ""
    kept = ", kept in best/" if (Path(one.run.place) / "best").is_dir() else ""
    at = f"in iteration {found['iteration']:,} ({found['steps']:,} steps)"
    said = f"best {found.get('metric')}: {_number(found['score'])}, {at}{kept}"
    return escape(f"{one.name}, {said}" if named else said)


def _samples(runs: Sequence[Reported]) -> str:
    """The first samples of a language model's last evaluation."""
    parts = []
    for one in runs:
        path = Path(one.run.place) / "samples.jsonl"
        if not path.is_file():
            continue
        check_file(path, path.parent, LARGEST_JSON)
        rows = []
        try:
            with path.open(encoding="utf-8") as file:
                for line, _ in zip(file, range(SAMPLES), strict=False):
                    row = parse_json(line.encode())
                    said = [_said(row[name])[:TEXT] for name in ("prompt", "completion")]
                    rows.append([*said, _number(row["reward"])])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, one_line(error)) from error
        title = f'<div class="soft">{escape(one.name)}</div>' if len(runs) > 1 else ""
        parts.append(title + _table(["prompt", "completion", "reward"], rows, text=2))
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _said(text: Any) -> str:
    """A text, or a conversation with a line for each message."""
    return text if isinstance(text, str) else "\n".join(f"{x['role']}: {x['content']}" for x in text)


def _configuration(runs: Sequence[Reported]) -> str:
    """The options: first those that differ between runs or from their defaults, then the others."""
    names = list(dict.fromkeys(name for one in runs for name in one.run.options))
    important: list[tuple[list[str], bool]] = []
    others: list[tuple[list[str], bool]] = []
    for name in names:
        cells = [json.dumps(one.run.options.get(name)) for one in runs]
        usual = all(cell == _default(one, name) for cell, one in zip(cells, runs, strict=True))
        differ = len(set(cells)) > 1 and name != "seed"
        (others if usual and not differ else important).append(([name, *cells], differ))
    head = ["option", *(one.name for one in runs)] if len(runs) > 1 else ["option", "value"]
    shown = _table(head, [row for row, _ in important], bold=[differ for _, differ in important])
    hidden = _table(head, [row for row, _ in others])
    count = f"{len(others)} options at their defaults"
    return f"<h2>Configuration</h2>{shown}<details><summary>{count}</summary>{hidden}</details>"


def _default(one: Reported, name: str) -> str:
    """An option's default, as JSON; empty if there is no such option."""
    try:
        kind = options_of(one.run.method, one.run.world)
    except (UserError, KeyError):
        return ""
    if name not in {f.name for f in fields(kind)}:
        return ""
    found = getattr(kind(), name)
    return json.dumps("inf" if found == math.inf else list(found) if isinstance(found, tuple) else found, default=str)


def _machine(runs: Sequence[Reported]) -> str:
    names = dict.fromkeys(name for one in runs for name in one.versions)
    rows = [[name, *(str(one.versions.get(name, "")) for one in runs)] for name in names]
    head = ["", *(one.name for one in runs)] if len(runs) > 1 else ["", "version"]
    return f"<h2>Versions</h2>{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0, bold: Sequence[bool] = ()) -> str:
    """A table whose first columns are texts."""
    kinds = [' class="text"' if i < text else "" if i == 0 or not text else ' class="number"' for i in range(len(head))]
    top = "".join(f"<th>{escape(one_line(x, 60) if x else '')}</th>" for x in head)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(str(x))}</td>" for kind, x in zip(kinds, row, strict=True))
        lines.append(f'<tr class="other">{cells}</tr>' if i < len(bold) and bold[i] else f"<tr>{cells}</tr>")
    return f'<div class="box"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _script(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(x: float | None) -> float | None:
    """Six digits, and nothing that JSON has not."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


def _number(x: Any) -> str:
    if x is None:
        return "none"
    return f"{x:,.0f}" if float(x).is_integer() and abs(x) >= 10 else f"{x:,.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
