"""On a GPU: every method trains there, repeats itself, and gives the gradient of the CPU; a run is read without one."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Critic, Softmax
from language.conftest import END, PAD, prompts, tiny
from outcomes import DISTINCT, parameters, untimed
from problems import problem
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import policygrad as pg
from policygrad.errors import Note
from policygrad.language import decoding
from policygrad.language.completions import Request
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy
from policygrad.train.compose import assemble
from policygrad.train.options import EPISODIC, options_of
from policygrad.updates import ascend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 3, "num_steps": 8, "steps": 60, "minibatch_size": 7}


def short(method: str, task: str = "CartPole-v1", **options: Any) -> Any:
    known = options_of(method, "control")()
    small = SMALL | {"episode_steps": 8}
    small = {name: x for name, x in small.items() if hasattr(known, name)}
    small.pop("num_steps" if known.credit in EPISODIC else "episode_steps", None)
    return pg.train(method, task, progress=False, preset="none", device="cuda", **small | options)


@pytest.mark.parametrize("method", DISTINCT)
def test_a_method_trains_there_and_the_seed_decides(method: str) -> None:
    first, second = (short(method, normalize_observations=True) for _ in range(2))
    assert {p.device.type for p in first.policy.parameters()} == {"cuda"}
    assert torch.equal(parameters(first), parameters(second))
    assert untimed(first.metrics) == untimed(second.metrics)
    assert first.evaluate(3) == second.evaluate(3)


@pytest.mark.parametrize("task", ["Pendulum-v1", "exact:chain", "exact:tokens"])
@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_a_kind_of_world_trains_there(method: str, task: str) -> None:
    values: dict[str, Any] = {"num_envs": 8, "iterations": 2}
    run = pg.train(method, task, progress=False, preset="none", device="cuda", **values)
    assert parameters(run).isfinite().all()


@pytest.mark.parametrize("memory", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_a_memory_learns_there_and_the_seed_decides(method: str, memory: str) -> None:
    first, second = (short(method, "policygrad/TMaze-v0", memory=memory, memory_size=4) for _ in range(2))
    assert {p.device.type for p in first.policy.parameters()} == {"cuda"}
    assert torch.equal(parameters(first), parameters(second))
    assert first.evaluate(3) == second.evaluate(3)


@pytest.mark.parametrize("encoder", ["small", "impala"])
def test_images_are_learned_from_there(encoder: str) -> None:
    run = short("ppo", "policygrad/Catch-v0", encoder=encoder)
    assert {p.device.type for p in run.policy.parameters()} == {"cuda"}
    assert parameters(run).isfinite().all()
    assert run.evaluate(2).episodes == 2


NAMES = ["reinforce", "actor_critic", "ppo with all", "grpo to a reference", "dppo", "sapo", "vespo", "opmd"]


def compare(name: str, compiled: bool) -> None:
    """Three steps there and on the CPU."""
    torch.manual_seed(0)
    objective, batch = problem(name, "gaussian")
    found = []
    for device in ("cpu", "cuda"):
        here, part = deepcopy(objective).to(device), tree_map(lambda x, d=device: x.to(d), batch)
        reference = getattr(getattr(here, "anchor", None), "keywords", {}).get("reference")
        if reference is not None:
            reference.to(device)
        optimizer = torch.optim.Adam(here.parameters(), lr=0.01, fused=True)
        update = ascend(optimizer, max_grad_norm=0.3, compiled=compiled and device == "cuda")
        metrics = [update(here, part) for _ in range(3)]
        found.append((tree_map(lambda x: x.cpu(), metrics), [p.cpu() for p in here.parameters()]))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_there_is_the_step_of_the_cpu(name: str, float64: None) -> None:
    compare(name, compiled=False)


def compare_compiled() -> None:
    warnings.simplefilter("error", Note)  # a step that is not compiled says so
    torch.set_default_dtype(torch.float64)
    for name in NAMES:
        torch.compiler.reset()
        compare(name, compiled=True)


def test_a_compiled_step_there_is_the_step_of_the_cpu() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    tests = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    command = [sys.executable, "-c", f"import sys; sys.path += {tests}; import test_cuda; test_cuda.compare_compiled()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_from_there_is_read_and_continues_to_act_on_the_cpu(tmp_path: Path) -> None:
    run = short("ppo", out=tmp_path / "run")
    here = pg.load(tmp_path / "run")
    obs = run.world.observation_space.sample()
    assert here.act(obs) == run.act(obs)
    assert here.evaluate(3).line() == run.evaluate(3).line()


@pytest.mark.parametrize("method", DISTINCT)
def test_a_language_model_trains_there(method: str, language: dict[str, Any], tmp_path: Path) -> None:
    small = {"minibatch_size": 8} if hasattr(options_of(method, "language")(), "minibatch_size") else {}
    run = pg.train(method, out=tmp_path / "run", device="cuda", preset="none", **language, **small)
    assert parameters(run).isfinite().all()
    assert run.evaluate(1).score == pg.load(tmp_path / "run", trust=True).evaluate(1).score


@pytest.mark.parametrize("values", [{"lora_rank": 2}, {"dtype": "bfloat16"}], ids=["adapter", "bfloat16"])
def test_adapters_and_bfloat16_train_there(values: dict[str, Any], language: dict[str, Any]) -> None:
    run = pg.train("grpo", device="cuda", preset="none", **language, **values)
    assert parameters(run).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "qwen3"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_captured_step_draws_what_a_step_by_itself_draws(
    name: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    policy = LanguagePolicy(tiny(name).cuda(), temperature=1.7, autocast=autocast)
    prompt, mask = (x.cuda() for x in prompts(2, 6, 1, 4))
    monkeypatch.setattr(decoding, "BLOCK", 7)
    monkeypatch.setattr(decoding.Captured, "every", 5)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    done = []
    for captures in (True, False):
        if not captures:  # the same step, by itself
            monkeypatch.setattr(decoding.Captured, "_capture", lambda self: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Note)  # a step that is not captured says so
            generator = torch.Generator("cuda").manual_seed(0)
            done.append(generate(policy, prompt, mask, Request(6, 30, (END, 5), PAD), generator))
    assert len(replays) > 15
    for x, y in zip(vars(done[0]).values(), vars(done[1]).values(), strict=True):
        assert torch.equal(x, y)


def test_a_model_that_waits_for_the_gpu_is_not_captured_and_says_so() -> None:
    torch.manual_seed(0)
    prompt, mask = (x.cuda() for x in prompts(2, 6, 1, 4))
    done, drawn = [], []
    for waits in (False, True):
        model = tiny().cuda()
        if waits:
            model.model.layers[1].register_forward_hook(lambda module, given, out: out * float(out.isfinite().all()))
        generator = torch.Generator("cuda").manual_seed(0)
        torch.cuda.manual_seed(1)
        with pytest.warns(Note, match="not captured") if waits else nullcontext():
            done.append(generate(LanguagePolicy(model), prompt, mask, Request(4, 20, (END,), PAD), generator))
        assert torch.ones(3, device="cuda").sum().item() == 3, "the device goes on to work"
        drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(done[0].tokens, done[1].tokens)
    assert torch.equal(*drawn), "and so does its generator, from where it was"


def test_modules_of_ones_own_learn_there(sample: Any) -> None:
    policy, critic = Softmax().cuda(), Critic().cuda()
    before = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()

    def here(policy: Any) -> Any:
        return sample(deepcopy(policy).cpu(), rows=8, steps=4).to("cuda")

    next(iter(assemble("ppo", policy, here, critic=critic, gamma=0.9, minibatch_size=8)))
    assert not torch.equal(torch.nn.utils.parameters_to_vector(policy.parameters()), before)
