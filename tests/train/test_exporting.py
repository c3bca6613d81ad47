"""An exported graph acts as the run does, or nothing is written."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.distributions import Categorical

import policygrad as pg
from policygrad import cli
from policygrad.control.spaces import FlatActions
from policygrad.errors import Note, UserError
from policygrad.precision import without_autocast
from policygrad.train.exporting import TOLERANCE, observations

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

FEW: dict[str, Any] = {"iterations": 1, "num_envs": 2, "num_steps": 16, "epochs": 1, "minibatch_size": None,
                       "preset": "none", "progress": False}  # fmt: skip


class Odd(gymnasium.Env):
    """Observations drawn from their space, and actions that it has."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def drawn(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        obs = self.observation_space.sample()
        if isinstance(obs, dict) and "action_mask" in obs:
            obs["action_mask"][:] = 1
        return obs

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.drawn(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.drawn(), float(self.np_random.normal()), bool(self.np_random.random() < 0.1), False, {}


def float_box(*bounds: float) -> spaces.Box:
    return spaces.Box(np.array(bounds[::2], np.float32), np.array(bounds[1::2], np.float32))


IMAGE = spaces.Box(0, 255, (4, 3), np.uint8)
NUMBERS = float_box(-1, 1, 0, 1000, -np.inf, np.inf)
MASKED = spaces.Discrete(4, start=2)
CHOICES = spaces.MultiDiscrete([3, 2, 5], start=[0, 1, -2])
SPACES: list[tuple[spaces.Space, spaces.Space, dict[str, Any]]] = [
    (NUMBERS, spaces.Discrete(4, start=-1), {"normalize_observations": True}),
    (spaces.Discrete(5, start=2), spaces.Discrete(3), {}),
    (IMAGE, CHOICES, {"normalize_observations": True}),
    (IMAGE, spaces.MultiBinary([2, 2]), {}),
    (spaces.Box(0, 255, (9, 8, 3), np.uint8), spaces.Discrete(4), {}),
    (spaces.Box(0, 255, (2, 36, 40), np.uint8), float_box(-np.inf, np.inf), {"hidden": ()}),
    (NUMBERS, spaces.Box(-5, 5, (2,), np.int8), {}),
    (NUMBERS, float_box(-1, np.inf, 0, 3, -np.inf, np.inf), {"state_dependent_std": True}),
    (NUMBERS, float_box(-1, 2, 0, 3), {"distribution": "squashed", "normalize_observations": True}),
    (NUMBERS, float_box(-1, 2, 0, 3), {"distribution": "beta"}),
    (spaces.Box(-1, 1, (2,), np.float64), spaces.Box(-1, 1, (2, 2), np.float64), {}),
    (spaces.Dict(a=spaces.Discrete(3), b=NUMBERS), spaces.Discrete(2), {}),
    (spaces.Dict(action_mask=spaces.MultiBinary(4), b=NUMBERS), MASKED, {"normalize_observations": True}),
    (spaces.Dict(action_mask=spaces.MultiBinary(5), b=NUMBERS), spaces.MultiDiscrete([2, 3]), {}),
    (NUMBERS, spaces.Dict(a=CHOICES, b=spaces.Tuple([float_box(-1, 2, 0, 3), MASKED, spaces.MultiBinary(3)])), {}),
    (
        NUMBERS,
        spaces.Tuple([float_box(-1, 2, 0, 3), MASKED]),
        {"distribution": "squashed", "state_dependent_std": True},
    ),
    (spaces.Dict(action_mask=spaces.MultiBinary(6), b=NUMBERS), spaces.MultiBinary(3), {}),
]


def loaded(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function that a file is."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda obs: session.run(["action"], {"observation": obs})[0]
    program = torch.export.load(path).module()
    return lambda obs: program(torch.from_numpy(obs)).numpy()


def with_state(path: Path) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    """The function that a file of a policy with memory is."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda obs, state: session.run(["action", "next_state"], {"observation": obs, "state": state})
    program = torch.export.load(path).module()
    return lambda obs, state: [x.numpy() for x in program(torch.from_numpy(obs), torch.from_numpy(state))]


def check_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    if expected.dtype.kind == "f":
        assert found.shape == expected.shape
        assert (abs(found - expected) <= TOLERANCE * np.maximum(1, abs(expected))).all()
    else:
        np.testing.assert_array_equal(found, expected)


def taken(run: Any, obs: np.ndarray) -> np.ndarray:
    """The actions of a run, those that are a Dict or a Tuple as vectors."""
    space = run.world.action_space
    return space.vectors(run.act(obs)) if isinstance(space, FlatActions) else np.asarray(run.act(obs))


@pytest.mark.parametrize(("observation", "action", "options"), SPACES, ids=lambda x: str(x)[:40])
def test_the_graph_acts_as_the_run(
    tmp_path: Path, observation: spaces.Space, action: spaces.Space, options: dict[str, Any]
) -> None:
    """In both formats, for batches of any size, and after it has been read back from the disk."""
    run = pg.train("ppo", lambda: Odd(observation, action), out=tmp_path / "run", **FEW, **options)
    with torch.no_grad():  # actions that differ, as after training
        run.policy.network[-1].weight.mul_(100)
    for format, name in (("onnx", "policy.onnx"), ("torch-export", "policy.pt2")):
        path = pg.export(run, format=format)  # type: ignore[arg-type]
        assert path == tmp_path / "run" / name
        act, obs = loaded(path), observations(run.world)
        assert len(np.unique(taken(run, obs).reshape(len(obs), -1), axis=0)) > 1
        for count in (1, 2, 7, 1000):
            check_same(act(obs[-count:]), taken(run, obs[-count:]))
    assert not list(tmp_path.rglob("*.new"))


REMEMBERING: list[tuple[str, spaces.Space, spaces.Space, dict[str, Any]]] = [
    ("gru", NUMBERS, float_box(-1, 2, 0, 3), {"normalize_observations": True}),
    ("lstm", spaces.Dict(action_mask=spaces.MultiBinary(4), b=NUMBERS), MASKED, {}),
    ("transformer", spaces.Box(0, 255, (9, 8, 3), np.uint8), spaces.Dict(a=CHOICES, b=float_box(-1, 2)), {}),
]


@pytest.mark.parametrize(("memory", "observation", "action", "options"), REMEMBERING, ids=lambda x: str(x)[:20])
def test_with_memory_the_graph_takes_and_returns_the_state(
    tmp_path: Path, memory: str, observation: spaces.Space, action: spaces.Space, options: dict[str, Any]
) -> None:
    """Episodes stepped with the graph's own states, from zeros, and with the run's, which begin with None."""
    how = {**FEW, **options, "memory": memory, "memory_size": 8}
    run = pg.train("ppo", lambda: Odd(observation, action), out=tmp_path / "run", **how)
    with torch.no_grad():
        run.policy.network[-1].weight.mul_(100)
    for format in ("onnx", "torch-export"):
        act = with_state(pg.export(run, format=format))  # type: ignore[arg-type]
        for count in (1, 5):
            state, expected, differs = run.policy.initial(count).numpy(), None, False
            for obs in np.split(observations(run.world)[: 20 * count], 20):
                action_here, state = act(obs, state)
                wanted, expected = run.act(obs, expected)
                space = run.world.action_space
                wanted = space.vectors(wanted) if isinstance(space, FlatActions) else np.asarray(wanted)
                check_same(action_here, wanted)
                np.testing.assert_allclose(state, expected.numpy(), rtol=1e-4, atol=1e-4)
                forgetful, _ = act(obs, np.zeros_like(state))
                differs |= bool((forgetful != action_here).any())
            assert differs


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("export") / "run"
    own = {"normalize_observations": True, "hidden": (16, 8), "initial_log_std": -1.0}
    return pg.train("ppo", "Pendulum-v1", out=out, **FEW | {"iterations": 3, "epochs": 4}, **own)


def test_a_policy_in_bfloat16_becomes_a_graph_of_float32(tmp_path: Path) -> None:
    images, action = spaces.Box(0, 255, (9, 8, 3), np.uint8), float_box(-1, 2, 0, 3)
    run = pg.train("ppo", lambda: Odd(images, action), out=tmp_path / "run", autocast="bfloat16", **FEW)
    act, obs = loaded(pg.export(run)), observations(run.world)
    assert run.policy.encode.autocast == torch.bfloat16
    in_bfloat16 = taken(run, obs)
    with without_autocast(run.policy):
        check_same(act(obs), taken(run, obs))
        assert (taken(run, obs) != in_bfloat16).any()


def test_it_is_the_equation_of_the_policy(pendulum: Any) -> None:
    """clip(center + half_width net(clip((obs - mean) / std))), from the numbers in the run's file."""
    x = load_file(pendulum.directory / "policy.safetensors")
    generator = np.random.default_rng(5)
    obs = (x["observations.mean"] + 3 * generator.normal(size=(1000, 3))).astype(np.float32)
    h = np.clip((obs - x["observations.mean"]) / np.sqrt(x["observations.var"]), -10, 10)
    for layer in (0, 2):
        h = np.tanh(h @ x[f"policy.network.{layer}.weight"].T + x[f"policy.network.{layer}.bias"])
    mean = h @ x["policy.network.4.weight"].T + x["policy.network.4.bias"]
    found = loaded(pg.export(pendulum))(obs)
    assert abs(found - np.clip(2 * mean, -2, 2)).max() < 1e-5
    assert abs(found).max() > 1e-4


def test_a_dimension_that_has_not_varied_is_0(tmp_path: Path) -> None:
    still = float_box(-1, 1, 3, 3)
    run = pg.train("ppo", lambda: Odd(still, spaces.Discrete(3)), normalize_observations=True, **FEW)
    act = loaded(pg.export(run, out=tmp_path / "policy.onnx"))
    obs = np.array([[0.5, 3], [0.5, 7], [-0.5, 3]], np.float32)
    np.testing.assert_array_equal(act(obs), run.act(obs))
    assert act(obs)[0] == act(obs)[1]


def test_actions_beyond_the_bounds_are_clipped(tmp_path: Path) -> None:
    run = pg.train("ppo", "Pendulum-v1", **FEW)
    with torch.no_grad():
        run.policy.network[-1].bias.fill_(50.0)
    obs = np.zeros((2, 3), np.float32)
    for name, format in (("a.onnx", "onnx"), ("a.pt2", "torch-export")):
        assert loaded(pg.export(run, format=format, out=tmp_path / name))(obs).tolist() == [[2.0], [2.0]]  # type: ignore[arg-type]


def test_a_file_says_what_it_is(pendulum: Any) -> None:
    model = onnx.load(pg.export(pendulum.directory))
    assert [x.name for x in model.graph.input] == ["observation"]
    assert [x.name for x in model.graph.output] == ["action"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    said = {x.key: x.value for x in model.metadata_props}
    assert said["method"] == "ppo"
    assert said["environment"] == "Pendulum-v1"
    assert said["action"] == "Box(-2.0, 2.0, (1,), float32)"
    assert said["policy"].startswith("policy of iteration 3 (96 steps)")
    more = {"policygrad.json": ""}
    torch.export.load(pg.export(pendulum, format="torch-export"), extra_files=more)
    assert json.loads(more["policygrad.json"]) == said
    for name in ("policy.onnx", "policy.pt2"):  # no path of this machine
        content = (pendulum.directory / name).read_bytes()
        assert not any(x in content for x in (b".py", str(Path(pg.__file__).parent).encode(), b"stack_trace"))


# Networks of one's own


class Own(nn.Module):
    """A small network."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.net = nn.Linear(observation_space.shape[0], int(action_space.n))

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs))


class Noisy(Own):
    noise = 0.0

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs) + self.noise * torch.randn(2))


class Branching(Own):
    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs) if obs.sum() > 0 else -self.net(obs))


class ByItself(Categorical):
    def to_environment(self, action: Tensor) -> np.ndarray:
        return action.numpy()


class OfItsOwn(Own):
    def forward(self, obs: Tensor) -> ByItself:
        return ByItself(logits=self.net(obs))


class Value(nn.Module):
    def __init__(self, observation_space: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(observation_space.shape[0], 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


def test_networks_of_ones_own_are_exported_the_critic_apart(tmp_path: Path) -> None:
    run = pg.train("ppo", "CartPole-v1", policy=Own, critic=Value, **FEW)
    path = pg.export(run, out=tmp_path / "policy.onnx")
    obs = np.random.default_rng(3).normal(size=(1000, 4)).astype(np.float32)
    np.testing.assert_array_equal(loaded(path)(obs), run.act(obs))
    assert sum(np.prod(x.dims) for x in onnx.load(path).graph.initializer if x.data_type == 1) == 4 * 2 + 2


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Noisy, "the graph of onnx is not the policy, and is not written: its action differs on"),
        (Branching, "a Branching cannot be exported to onnx"),
        (OfItsOwn, "a ByItself maps its actions in a way of its own, outside of torch"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, policy: type[Own], said: str) -> None:
    run = pg.train("ppo", "CartPole-v1", policy=policy, **FEW)
    run.policy.noise = 1.0
    with pytest.raises(UserError) as error:
        pg.export(run, out=tmp_path / "policy.onnx")
    assert said in str(error.value)
    assert len(str(error.value)) <= 200
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# What is refused


def test_other_worlds_are_refused(tmp_path: Path, language: dict[str, Any]) -> None:
    chain = pg.train("ppo", "exact:chain", iterations=1, out=tmp_path / "chain", progress=False)
    with pytest.raises(UserError, match="export is for control, and this run is on exact:chain"):
        pg.export(chain)
    model = pg.train("grpo", out=tmp_path / "model", **language | {"iterations": 1})
    with pytest.raises(UserError, match=r"/model/model is in Hugging Face's layout already"):
        pg.export(model)


def test_a_request_that_makes_no_sense_is_one_line(pendulum: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="format is 'tflite': it must be one of onnx, torch-export"):
        pg.export(pendulum, format="tflite")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a file of onnx ends in \.onnx"):
        pg.export(pendulum, out=tmp_path / "policy.pt2")
    with pytest.raises(UserError, match="the run has no directory: give out"):
        pg.export(pg.train("ppo", "CartPole-v1", **FEW))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another file"):
        pg.export(pendulum, format="torch-export", out=tmp_path / "file" / "policy.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript must be installed for ONNX: pip install policygrad\[export\]"):
        pg.export(pendulum)


def test_a_run_of_elsewhere_is_data(tmp_path: Path) -> None:
    """The rules of eval: the module that a run names is not imported."""
    pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", **FEW)
    with pytest.raises(UserError, match="the run names what is not its own, environment 'probes:Known-v0'"):
        pg.export(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(tmp_path / "run"), "--format", "torch-export", "--environment", "probes:Known-v0"])
    assert stop.value.code == 0


def test_what_wrappers_change_before_the_graph_is_said(tmp_path: Path) -> None:
    """The graph's input is what the outermost wrapper gives: a user of it has to know."""
    run = pg.train("ppo", "CartPole-v1", wrap=["ClipReward:-1,1", "NormalizeObservation"], **FEW)
    with pytest.warns(Note, match=r"wrappers give them \(ClipReward, NormalizeObservation\)") as notes:
        path = pg.export(run, out=tmp_path / "policy.onnx")
    assert len(str(notes[0].message)) <= 200
    obs = observations(run.world)
    check_same(loaded(path)(obs), taken(run, obs))


def test_the_command_says_what_it_wrote_and_nothing_else(pendulum: Any, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(pendulum.directory)])
    assert stop.value.code == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        "policy of iteration 3 (96 steps) of a run that ended; its graph gives the same actions on 1,000 observations",
        f"export: {pendulum.directory / 'policy.onnx'}",
    ]
    assert logging.root.manager.disable == before
    assert os.path.getsize(pendulum.directory / "policy.onnx") < 100_000
