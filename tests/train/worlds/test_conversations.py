"""Conversations on the command line: environments, tools, limits, and what a run directory holds of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import parameters

import policygrad as pg
from policygrad import cli
from policygrad.errors import Note, UserError
from policygrad.language import lookup, models, warmup
from policygrad.train.names import outside
from policygrad.train.options import OptionError
from policygrad.train.run import Run
from policygrad.train.worlds import is_conversation, kind_of
from policygrad.train.worlds.language import environment_named

GAMES = '''
"""Environments to talk to."""

import time


class Long:
    """It wants long texts, three times."""

    def reset(self, seed):
        self.seed, self.turns = seed, 0
        return [{"role": "user", "content": f"find {seed}"}]

    def step(self, text):
        self.turns += 1
        return [{"role": "tool", "content": str(self.seed)}], len(text) / 10, self.turns == 3


class Few(Long):
    def __len__(self):
        return 6


class Plain(Long):
    def reset(self, seed):
        super().reset(seed)
        return f"find {seed}"

    def step(self, text):
        _, reward, end = super().step(text)
        return None if end else "tell", reward, end


class Having(Long):
    def __init__(self):
        self.tools = [shout]


class Hanging(Long):
    """It answers 40 times, and then no more."""

    answers = 0

    def step(self, text):
        Hanging.answers += 1
        while Hanging.answers > 40:
            time.sleep(1)
        return super().step(text)


class Needy:
    def __init__(self, more):
        pass


class Deaf:
    def reset(self, seed):
        return "hello"


def shout(text: str) -> str:
    """Shout.

    Args:
        text: What.
    """
    return text.upper()


def shouted(completions, **_):
    return [len(x[-1]["content"]) for x in completions]


def long(completions, conversation, **_):
    assert all(x[-1]["role"] == "assistant" for x in conversation)
    return [len(x[-1]["content"]) for x in completions]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the task lookup that has learned nothing, and environments."""
    folder = tmp_path_factory.mktemp("conversations")
    torch.manual_seed(0)
    models.save_model(lookup.model(hidden=16, layers=1), lookup.tokenizer(), folder / "model")
    (folder / "games.py").write_text(GAMES)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": f"find {i}"}]}) + "\n" for i in range(12))
    )
    (folder / "texts.jsonl").write_text("".join(json.dumps({"prompt": f"find {i}"}) + "\n" for i in range(12)))
    return folder


def values(place: Path, game: str = "Long", **more: Any) -> dict[str, Any]:
    options = {
        "task": f"{place}/games.py:{game}" if game else f"{place}/prompts.jsonl",
        "model": f"{place}/model",
        "iterations": 2,
        "prompts_per_rollout": 2,
        "completions": 3,
        "max_tokens": 60,
        "turn_tokens": 5,
        "starts": 8,
        "held_out": 2,
        "threads": 1,
        "learning_rate": 0.01,
        "progress": False,
    }
    return {name: x for name, x in (options | more).items() if x is not None}


@pytest.mark.parametrize("method", ["grpo", "ppo", "reinforce", "trpo"])
def test_every_kind_of_method_learns_in_conversations(method: str, place: Path) -> None:
    more = {"minibatch_size": 4} if method == "ppo" else {"learning_rate": None} if method == "trpo" else {}
    run = pg.train(method, **values(place, **more))
    start = models.load_model(f"{place}/model").state_dict()
    assert any(not torch.equal(x, start[name]) for name, x in run.policy.model.state_dict().items())
    assert run.metrics[-1]["turns"] == 3
    assert run.before is not None
    assert run.evaluate().score == run.evaluate().score


def test_a_run_holds_its_conversations_and_is_loaded_again(place: Path, tmp_path: Path) -> None:
    run = pg.train("grpo", **values(place), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [x["role"] for x in rows[0]["completion"]] == ["assistant", "tool"] * 3
    assert rows[0]["prompt"][0]["role"] == "user"
    assert {"seed", "reward", "tokens", "cut"} <= set(rows[0])
    with pytest.raises(UserError, match=r"the run names what is not its own, environment .*games.py:Long"):
        Run.load(tmp_path / "run")
    for more in ({"trust": True}, {"environment": f"{place}/games.py:Long"}):
        loaded = Run.load(tmp_path / "run", **more)
        assert loaded.evaluate() == run.evaluate()
    assert loaded.world.name == "Long"
    text = pg.watch(loaded)
    assert "assistant: " in text
    assert "tool: " in text
    with pytest.raises(UserError, match="this run talks to an environment"):
        Run.load(tmp_path / "run", trust=True, dataset=str(place / "prompts.jsonl"))


def test_a_run_that_is_stopped_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    whole = pg.train("grpo", **values(place, iterations=3), out=tmp_path / "whole")
    pg.train("grpo", **values(place, iterations=2), out=tmp_path / "broken")
    again = pg.resume(tmp_path / "broken", trust=True, iterations=1, progress=False)
    assert torch.equal(parameters(whole), parameters(again))


@pytest.mark.parametrize(
    ("name", "x"), [("turns", 2), ("turn_tokens", 3), ("starts", 5), ("tool", ("{}/games.py:shout",))]
)
def test_every_option_of_conversations_changes_something(name: str, x: Any, place: Path) -> None:
    x = tuple(y.format(place) for y in x) if isinstance(x, tuple) else x
    plain, other = (pg.train("grpo", **values(place, **more)) for more in ({}, {name: x}))
    if name == "tool":  # without a call in any text a tool is heard of in the template only
        assert [t.__name__ for t in other.world.tools] == ["shout"]
        return
    assert not torch.equal(parameters(plain), parameters(other))


@pytest.mark.parametrize("tool", [None, "{}/games.py:shout"])
def test_an_environment_that_hangs_ends_the_run_and_keeps_what_was_learned(
    tool: str | None, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    game = f"{place}/games.py:Hanging"
    words = ["train", "grpo", game, "--model", f"{place}/model", "--step-time-limit", "0.5", "--iterations", "3"]
    words += ["--prompts-per-rollout", "2", "--completions", "3", "--max-tokens", "60", "--starts", "8"]
    words += ["--turn-tokens", "5", "--held-out", "1", "--evaluation-completions", "1", "--out", str(tmp_path / "run")]
    words += [] if tool is None else ["--tool", tool.format(place)]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    line = next(x for x in said if "did not finish" in x)
    assert "step of Hanging did not finish within 0.5 s: fix it, or raise step_time_limit" in line
    assert len(line.partition("; the policy of iteration 2 (")[0]) <= 120
    assert Run.load(tmp_path / "run", trust=True).stage.iteration == 2, "what was learned is kept"


def test_a_limit_of_a_step_is_of_environments(place: Path) -> None:
    more = {"reward": f"{place}/games.py:long", "starts": None, "turn_tokens": None, "step_time_limit": 5.0}
    for tool in (None, f"{place}/games.py:shout"):
        with pytest.raises(OptionError, match="step_time_limit is of conversations"):
            pg.train("grpo", **values(place, "", **more, tool=tool))


def test_tools_without_an_environment_serve_prompts_that_are_judged(place: Path) -> None:
    more = {"reward": f"{place}/games.py:long", "tool": f"{place}/games.py:shout", "starts": None}
    with pytest.warns(Note, match="the chat template shows no tools"):
        run = pg.train("grpo", **values(place, "", **more))
    assert run.metrics[-1]["turns"] == 1, "no text holds a call"
    assert run.metrics[-1]["reward"] > 0


def test_the_schemas_of_tools_stand_in_the_prompt(place: Path, tmp_path: Path) -> None:
    words = lookup.tokenizer()
    words.chat_template = "{% for t in tools or [] %}{{ t.function.name }}:{% endfor %}" + lookup.TEMPLATE
    models.save_model(models.load_model(f"{place}/model"), words, tmp_path / "model")
    with pg.Training("grpo", **values(place, "Having", model=tmp_path / "model")) as training:
        next(training)
        prompts = training.run.world.prompts.train
        assert words.decode(prompts.tokens[: int(prompts.ends[0])]).startswith("shout:<|im_start|>user")
    texts = {"task": f"{place}/texts.jsonl", "reward": f"{place}/games.py:long", "starts": None}
    with pytest.raises(OptionError, match="the chat template shows tools, and all prompts are text"):
        pg.train("grpo", **values(place, **texts, model=tmp_path / "model", tool=f"{place}/games.py:shout"))


def test_an_environment_may_have_a_number_of_beginnings(place: Path) -> None:
    with pg.Training("grpo", **values(place, "Few", starts=None)) as training:
        world: Any = training.run.world
        assert sorted(world.prompts.train.columns["seed"] + world.prompts.held_out.columns["seed"]) == list(range(6))
    with pytest.raises(OptionError, match="starts is 7, and the environment has 6: lower it"):
        pg.train("grpo", **values(place, "Few", starts=7))


def test_messages_without_a_template_are_plain_text(place: Path, tmp_path: Path) -> None:
    words = lookup.tokenizer()
    words.chat_template = None
    models.save_model(models.load_model(f"{place}/model"), words, tmp_path / "model")
    with pytest.warns(Note, match="the contents of messages stand one after another"):
        run = pg.train("grpo", **values(place, model=tmp_path / "model"))
    plain = pg.train("grpo", **values(place, "Plain", model=tmp_path / "model"))
    assert run.metrics[-1]["turns"] == plain.metrics[-1]["turns"] == 3


@pytest.mark.parametrize(
    ("game", "more", "message"),
    [
        ("Needy", {}, "games.py:Needy raised TypeError"),
        ("Deaf", {}, "games.py:Deaf makes no environment to talk to: give it reset(seed) and step(text)"),
        ("Lang", {}, "has no function or class 'Lang': did you mean Long"),
        ("Long", {"model": None, "turns": 3}, "there is no model to train on"),
        ("Long", {"dataset": "x.jsonl"}, "an environment begins its own conversations: leave dataset out"),
        ("Long", {"evaluation_dataset": "x.jsonl", "held_out": None}, "leave evaluation_dataset out"),
        ("", {"reward": "math_equal"}, "is of conversations, and prompts is a data set of prompts: leave"),
        ("Long", {"tool": ("json:nothing",)}, "json has no function 'nothing'"),
    ],
)
def test_what_a_user_can_do_wrong(game: str, more: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(UserError) as caught:
        pg.train("grpo", **values(place, game, **more))
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def test_an_environment_has_no_demonstrations(place: Path) -> None:
    given = {"task": f"{place}/games.py:Long", "model": f"{place}/model", "progress": False}
    with pytest.raises(UserError, match="clone learns from completions, and an environment has none"):
        pg.train("clone", **given)


def test_which_tasks_are_conversations() -> None:
    assert all(is_conversation(x) for x in ("lookup", "a/b.py:Game", "games.text:Game", "reasoning_gym:chain_sum"))
    others = ("arithmetic", "x.jsonl", "rows", None, "CartPole-v1", "org/name:main", "module:Id-v0", "exact:chain-2")
    assert not any(is_conversation(x) for x in others)
    assert is_conversation("verifiers:org/some-name")
    assert kind_of("lookup", {}) == kind_of("reasoning_gym:chain_sum", {}) == "language"
    assert kind_of("verifiers:org/some-name", {}) == "language"
    assert kind_of("a:B", {}) == "control"
    assert (
        kind_of("a:B", {"model": "m"}) == kind_of("a:B", {"turns": 2}) == kind_of("a:B", {"tool": ("f",)}) == "language"
    )


def test_code_that_a_run_names_is_not_believed() -> None:
    class Plain:
        tool = ("python", "evil:f")

    assert outside("language", "evil:Game", Plain()) == {"environment": ["evil:Game"], "tool": ["evil:f"]}
    Plain.tool = ("python:unconfined",)
    assert outside("language", "lookup", Plain()) == {"tool": ["python:unconfined"]}
    Plain.tool = ()
    assert outside("language", "verifiers:evil", Plain()) == {"environment": ["verifiers:evil"]}


def test_the_task_lookup_needs_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(warmup.RECIPE, "steps", 3)
    monkeypatch.setitem(warmup.RECIPE, "rows", 8)
    monkeypatch.setattr(lookup, "DEMONSTRATED", 16)
    small = {"iterations": 1, "prompts_per_rollout": 2, "completions": 2, "held_out": 4, "starts": 12, "threads": 1}
    run = pg.train("grpo", "lookup", **small, out=tmp_path / "run", progress=False)
    assert run.preset == "lookup"
    assert 1 <= run.metrics[-1]["turns"] <= 4
    assert Run.load(tmp_path / "run").evaluate() == run.evaluate()


@pytest.mark.parametrize(("method", "option"), [("ppo", {"turn_level": True}), ("grpo", {"state_weight": 1.0})])
def test_credit_by_turns_changes_something(method: str, option: dict[str, Any], place: Path) -> None:
    size = {"minibatch_size": 4} if method == "ppo" else {}
    plain, other = (pg.train(method, **values(place, **size, **more)) for more in ({}, option))
    assert not torch.equal(parameters(plain), parameters(other))


def test_states_are_of_conversations(place: Path) -> None:
    more = {"reward": f"{place}/games.py:shouted", "starts": None, "turn_tokens": None, "state_weight": 1.0}
    with pytest.raises(OptionError, match="state_weight is of conversations"):
        pg.train("grpo", **values(place, "", **more))
    with pytest.raises(OptionError, match="discounted counts tokens"):
        pg.train("ppo", **values(place, turn_level=True, discounted=True))
    with pytest.raises(OptionError, match="turn_level"):
        pg.train("ppo", "CartPole-v1", turn_level=True, progress=False)


def test_eval_repeats_the_names_of_a_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    game, tool = f"{place}/games.py:Long", f"{place}/games.py:shout"
    pg.train("grpo", **values(place, tool=tool, iterations=1), out=tmp_path / "run")
    for names, code in (([], 2), (["--environment", game], 2), (["--environment", game, "--tool", tool], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", str(tmp_path / "run"), *names])
        assert (stop.value.code or 0) == code, capsys.readouterr().err
    assert "tool:" in capsys.readouterr().out


SAYING = '''
import verifiers as vf
from datasets import Dataset


def length(completion):
    return len(completion[-1]["content"]) / 10


def count(text: str) -> int:
    """Count letters."""
    return len(text)


def load_environment():
    data = Dataset.from_list([{"question": f"say {i}"} for i in range(6)])
    return KIND(dataset=data, rubric=vf.Rubric(funcs=[length]))
'''


def test_verifiers_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(UserError, match=r"verifiers below 0.4 is not installed: pip install policygrad\[verifiers\]"):
        environment_named("verifiers:nothing")


def test_an_environment_of_verifiers_is_a_task(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("verifiers")
    (tmp_path / "saying_it.py").write_text(SAYING.replace("KIND(", "vf.SingleTurnEnv("))
    (tmp_path / "tooled_it.py").write_text(SAYING.replace("KIND(", "vf.ToolEnv(tools=[count], "))
    monkeypatch.syspath_prepend(tmp_path)
    task = {"task": "verifiers:saying-it", "starts": None}
    pg.train("grpo", **values(place, **task), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {x["prompt"][0]["content"] for x in rows} <= {f"say {i}" for i in range(6)}
    assert [x["reward"] for x in rows] == pytest.approx([len(x["completion"][-1]["content"]) / 10 for x in rows])
    with pytest.raises(UserError, match="the environment has tools, and answers their calls itself"):
        pg.train("grpo", **values(place, **task | {"task": "verifiers:tooled-it"}, tool=f"{place}/games.py:shout"))
    for names, code in (([], 2), (["--environment", "verifiers:saying-it"], 0), (["--trust"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", str(tmp_path / "run"), *names])
        assert (stop.value.code or 0) == code, capsys.readouterr().err
