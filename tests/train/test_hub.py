"""hub:NAME, by huggingface_hub itself, from a server that speaks the hub's protocol: every reader takes it, and what a
stranger has put there runs nothing and reaches nothing."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from outcomes import parameters

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import hub
from policygrad.train.hub import directory_of, wanted

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 8, "hidden": (4, 4), "minibatch_size": 8, "epochs": 1, "iterations": 3,
    "compile": "off", "preset": "none", "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pg.train("ppo", "CartPole-v1", out=tmp_path_factory.mktemp("runs") / "pole", **SMALL)


@pytest.fixture
def files(run: Any) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in run.directory.iterdir() if x.is_file() and not x.name.startswith(".")}


def test_every_reader_takes_it(server: Hub, run: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    server.put("some.one/pole", files)
    place = "hub:some.one/pole"
    policy, _ = pg.load_policy(place)
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), run.policy.parameters(), strict=True))
    assert pg.load(Path(place)).evaluate(2).returns == run.evaluate(2).returns
    here, there = (pg.compare(x, score="training").summary() for x in (run.directory, place))
    assert json.dumps(here).replace(str(run.directory), "") == json.dumps(there).replace(str(directory_of(place)), "")
    assert "pole" in pg.report(place, out=tmp_path / "page.html").read_text()
    assert pg.reproduce(place, progress=False).first is None
    started = pg.train("ppo", "CartPole-v1", start=place, **SMALL | {"iterations": 1, "learning_rate": 1e-9})
    torch.testing.assert_close(parameters(started), parameters(run), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"hub:some\.one/pole is no run directory"):
        pg.resume(place)


def test_one_commit_is_one_directory_of_real_files(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    first = server.put("me/pole", files).head
    place = directory_of("hub:me/pole")
    assert place.is_relative_to(tmp_path / "home")
    assert not any(path.is_symlink() for path in (tmp_path / "home").rglob("*"))
    assert {x.name: x.read_bytes() for x in place.iterdir()} == {x: y for x, y in files.items() if wanted(x)}
    server.calls.clear()
    assert directory_of(f"hub:me/pole@{first}") == place
    assert not [x for x in server.calls if "resolve" in x], "it is here"
    server.put("me/pole", files | {"config.json": b"{}"})
    newer = directory_of("hub:me/pole")
    assert newer != place
    assert (newer / "config.json").read_bytes() == b"{}"
    assert (place / "config.json").read_bytes() == files["config.json"]
    assert directory_of(f"hub:me/pole@{first}") == place


def test_an_interrupted_download_begins_again(server: Hub, files: dict[str, bytes]) -> None:
    server.put("me/pole", files)
    server.missing = "policy.safetensors"
    with pytest.raises(UserError, match="hub:me/pole cannot be read"):
        directory_of("hub:me/pole")
    server.missing = None
    assert pg.load("hub:me/pole").method == "ppo"


def test_without_a_network_it_is_the_copy_on_this_machine(
    server: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("me/pole", files)
    server.put("me/new", files)
    place = directory_of("hub:me/pole")
    for name, x, why in (
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
        ("ENDPOINT", "http://127.0.0.1:9", "ConnectError"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(f"huggingface_hub.constants.{name}", x)
            with pytest.warns(UserWarning, match=f"hub:me/pole cannot be read: {why}.*; the copy on this machine"):
                assert directory_of("hub:me/pole") == place
            with pytest.raises(UserError, match=f"hub:me/new cannot be read: {why}") as said:
                directory_of("hub:me/new")
            assert len(str(said.value)) <= 200


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hub:me/none", "hub:me/none is not on the hub, or private: check the name"),
        ("hub:me/pole@gone", "hub:me/pole@gone has no such revision"),
        ("hub:me/pole@", "names no revision: give one after @"),
        ("hub:", "'' is no name on the hub: write USER/NAME"),
        ("hub:../../etc", "is no name on the hub"),
        ("hub:me/pole/checkpoints", "is no name on the hub"),
        ("hub:me/data", "hub:me/data holds no run: give one that policygrad push wrote"),
    ],
)
def test_what_is_not_there_is_one_line(server: Hub, files: dict[str, bytes], place: str, said: str) -> None:
    server.put("me/pole", files)
    server.put("me/data", {"data.csv": b"1", "README.md": b""})
    with pytest.raises(UserError, match=said) as raised:
        pg.load(place)
    assert len(str(raised.value)) <= 200


def test_without_the_library_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the hub needs huggingface_hub: pip install policygrad\[hub\]"):
        pg.load("hub:me/pole")


@pytest.mark.parametrize(
    "name",
    [
        "../config.json", "model/../../evil.json", "/etc/x.json", "model/../x.json", "..", "model/a/b.json", "",
        "policy.py", "policy.pt", "policy.bin", "model/pytorch_model.bin", "model/modeling.py", "checkpoints/1.json",
        "a/config.json", "model\\..\\x.json", "model/..\\x.json", ".lock", "Model/x.json",
    ],
)  # fmt: skip
def test_only_a_runs_own_files_are_taken(name: str) -> None:
    assert not wanted(name)


def test_a_hostile_repository_runs_nothing_and_reaches_nothing(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Code, pickles, paths that lead out, what git has for a link, and a configuration that names code and files."""
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    code = f"open({str(trap)!r}, 'w')".encode()
    config = json.loads(files["config.json"])
    config["task"] = "evil:Evil-v0"
    hostile = files | {
        "evil.py": code, "model/modeling_evil.py": code, "policy.pkl": pickle.dumps(Trap()), "../escaped.json": b"{}",
        "model/../../escaped.json": b"{}", "/escaped.json": b"{}", "config.json": json.dumps(config).encode(),
        "policy.safetensors": b"../../../../etc/passwd",
    }  # fmt: skip
    server.put("me/evil", hostile)
    place = directory_of("hub:me/evil")
    assert {x.relative_to(place).as_posix() for x in place.rglob("*")} == {x for x in hostile if wanted(x)}
    assert not list(tmp_path.rglob("escaped.json"))
    with pytest.raises(UserError, match="the run names what is not its own, environment 'evil:Evil-v0'"):
        pg.load("hub:me/evil")
    with pytest.raises(UserError, match=r"policy\.safetensors is damaged"):
        pg.load_policy("hub:me/evil")
    with pytest.raises(UserError, match=r"evil"):  # believed, and there is no such module: none of it is on the path
        pg.load("hub:me/evil", trust=True).evaluate(1)
    assert not trap.exists()


def test_a_hub_that_names_a_strange_commit_writes_nowhere_else(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    repository = server.put("me/pole", files)
    repository.commits = {"../../../evil": files}
    with pytest.raises(UserError):
        directory_of("hub:me/pole")
    assert not list(tmp_path.rglob("evil"))
    assert hub._commit("../../../evil") == "none"
    assert hub._commit(40 * "a") == 40 * "a"
