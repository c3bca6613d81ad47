"""The report page: what stands in it, that it takes nothing from a run as code, and that a real browser draws it."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train.page import gathered, html_of, serve

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of PPO, one of them with a learning rate that is far too high."""
    place = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"steps": 4000, "progress": False, "compile": "off", "hidden": (16,)}
    pg.train("ppo", "CartPole-v1", out=place / "well", seed=0, **small)
    pg.train("ppo", "CartPole-v1", out=place / "ill", seed=1, learning_rate=1.0, **small)
    return place


class Parsed(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are closed in order"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data = self.data or data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)


def test_the_page_holds_what_the_runs_hold(runs: Path, tmp_path: Path) -> None:
    page = Parsed(pg.report(runs, out=tmp_path / "report.html").read_text())
    assert not page.open
    data = json.loads(page.data)
    assert [run["name"] for run in data["runs"]] == ["ill", "well"]
    for run in data["runs"]:
        rows = [json.loads(line) for line in (runs / run["name"] / "metrics.jsonl").read_text().splitlines()]
        for name in ("return", "entropy", "kl_old"):
            known = [row.get(name) for row in rows]
            assert [x is None for x in run["y"][name]] == [x is None for x in known]
            drawn = [x for x in run["y"][name] if x is not None]
            assert drawn == pytest.approx([x for x in known if x is not None], rel=1e-5)
        assert run["x"]["steps"] == [row["steps"] for row in rows]
    charts = {metric for _, section in data["sections"] for metric, *_ in section}
    assert {"return", "entropy", "kl_old", "explained_variance", "gradient_norm"} <= charts
    said = " ".join(page.texts)
    assert not charts & {"steps", "seconds", "updates"}
    assert "learning_rate" in said
    seen = [found.seen for one in gathered([runs]) for found in one.ill]
    assert seen
    assert all(x in said for x in seen)
    best = json.loads((runs / "well" / "summary.json").read_text())["best"]
    at = f"in iteration {best['iteration']} ({best['steps']:,} steps), kept in best/"
    assert re.search(rf"well, best return: [\d.]+, {re.escape(at)}", said)


def test_an_illness_is_said_beside_its_run(runs: Path) -> None:
    ill, well = gathered([runs])
    assert {found.name for found in ill.ill} & {
        "entropy collapsed",
        "updates go too far",
        "the critic explains nothing",
    }
    assert not {found.name for found in well.ill} & {"entropy collapsed", "updates go too far", "the score fell"}
    assert "known illness" not in html_of([ill])
    assert "no known illness" in html_of([replace(ill, ill=[])])


def test_the_page_needs_no_network(runs: Path) -> None:
    page = html_of(gathered([runs]))
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page)
    assert all(x.startswith(("#", "data:")) for x in addresses)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"


def test_texts_of_a_run_are_no_elements(runs: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    for path in (runs / "well").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["task"] = evil
    config["versions"] = {evil: evil}
    config["options"]["activation"] = evil
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) | {f"info/{evil}": float(i)} for i, line in enumerate(
        (tmp_path / "metrics.jsonl").read_text().splitlines()
    )]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"prompt": evil, "completion": evil, "reward": 1.0}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (tmp_path / "video.mp4").symlink_to("/etc/hostname")
    page = html_of(gathered([tmp_path]))
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert not [tag for tag, _ in parsed.elements if tag in ("img", "video")]
    assert evil in json.loads(parsed.data)["sections"][0][1][-1][0]
    assert sum(evil[:20] in text for text in parsed.texts) >= 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"options": {"seed": 0, "target_kl": "evil", "delta": [], "steps": {}}}),
        ("config.json", {"versions": ["torch"]}),
        ("config.json", {"versions": {"torch": {"a": 1}}}),
        ("summary.json", {"best": {"metric": ["x"], "score": "high", "iteration": 1, "steps": 2}}),
        ("summary.json", {"best": {"metric": ["x"], "score": 1e300, "iteration": True, "steps": -2.5}}),
        ("summary.json", {"best": [1]}),
        ("summary.json", {"ended": "finished", "before": 3, "after": {"reward": "high", "pass_at_k": [1]}}),
    ],
    ids=str,
)
def test_what_no_run_has_written_is_shown_as_it_is_or_left_out(
    name: str, content: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "well", tmp_path / "run")
    held = json.loads((tmp_path / "run" / name).read_text())
    (tmp_path / "run" / name).write_text(json.dumps(held | content))
    assert Parsed(html_of(gathered([tmp_path / "run"]))).open == []


@pytest.mark.parametrize(
    "sample", ['{"prompt": 3, "completion": "", "reward": 1}', '{"reward": "x"}', "[]", "{"], ids=str
)
def test_damaged_samples_are_one_line(sample: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "well", tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").write_text(sample + "\n")
    with pytest.raises(UserError, match=r"samples.jsonl is damaged") as raised:
        html_of(gathered([tmp_path / "run"]))
    assert len(str(raised.value)) <= 200


def test_a_conversation_is_shown_by_its_messages(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "well", tmp_path / "run")
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1?"}]
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "2", "reward": None}))
    said = " ".join(Parsed(html_of(gathered([tmp_path / "run"]))).texts)
    assert "system: be brief\nuser: 1 + 1?" in said
    assert "none" in said


def test_it_is_written_beside_the_run_and_errors_are_one_line(runs: Path, tmp_path: Path) -> None:
    assert pg.report(runs / "well", out=tmp_path) == tmp_path / "report.html"
    with pytest.raises(UserError, match="holds no run"):
        pg.report(tmp_path)
    with pytest.raises(UserError, match="there is no run"):
        pg.report()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pg.report(runs, out=tmp_path / "file" / "report.html")


def test_a_run_that_goes_on_is_served_to_this_machine_alone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "well", tmp_path / "well")
    with serve([tmp_path / "well"]) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            with urllib.request.urlopen(address) as answer:
                page = answer.read().decode()
            assert json.loads(Parsed(page).data)["live"]
            before = len(json.loads(Parsed(page).data)["runs"][0]["x"]["steps"])
            lines = (tmp_path / "well" / "metrics.jsonl").read_text().splitlines()
            with (tmp_path / "well" / "metrics.jsonl").open("a") as file:
                file.write(lines[-1] + "\n")
            with urllib.request.urlopen(f"{address}/data") as answer:
                found = json.load(answer)
            assert len(found["data"]["runs"][0]["x"]["steps"]) == before + 1
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}/../config.json")
            elsewhere = urllib.request.Request(f"{address}/data", headers={"Host": "elsewhere.example"})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(elsewhere)
        finally:
            server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_a_browser_draws_every_curve(runs: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    page = pg.report(runs, out=tmp_path / "report.html")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    drawn = Parsed(done.stdout.replace("<!DOCTYPE html>", ""))
    charts = json.loads(drawn.data)["sections"]
    names = [metric for _, section in charts for metric, *_ in section]
    figures = [x["data-metric"] for tag, x in drawn.elements if tag == "figure"]
    assert figures == names
    lines = [x for tag, x in drawn.elements if tag == "path"]
    assert len(lines) >= 2 * len(names) - 2, "a line for each run in each chart"
    assert all(re.fullmatch(r"M[-\d. ]+(L[-\d. ]+)*", x["d"] or "") for x in lines)
