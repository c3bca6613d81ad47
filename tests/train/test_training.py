"""A training run from Python: what it takes, what it leaves behind, and how it ends when it goes wrong."""

import copy
import io
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv
from outcomes import ANY_ACTION, WHOLE, parameters, strict, untimed
from probes import Broken, Known, limited
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import policygrad as pg
from policygrad.errors import UserError
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, tabular
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes, token_world, tree
from policygrad.train import compose, recording, training
from policygrad.train.compose import assemble
from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, has_critic, options_of
from policygrad.train.run import Run
from policygrad.train.worlds.control import ControlWorld

SHORT: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "steps": 100, "progress": False}
MINIBATCHES: dict[str, Any] = {"minibatch_size": 16}
SMALL: dict[str, Any] = {"hidden": (8,), **SHORT, **MINIBATCHES}


def on_disk(directory: Path) -> set[float]:
    tensors = load_file(directory / "policy.safetensors")
    return {x for name, tensor in tensors.items() if name.startswith("policy.") for x in tensor.flatten().tolist()}


def of(method: str, values: dict[str, Any], world: str = "control") -> dict[str, Any]:
    """Those that the method reads there."""
    chosen = options_of(method, world)()
    known = {f.name for f in fields(chosen)} | {"progress", "out"}
    known -= {"num_steps"} if chosen.credit in EPISODIC else set()
    return {name: x for name, x in values.items() if name in known}


# What it takes


def test_the_five_lines_of_the_readme_are_enough(tmp_path: Path) -> None:
    run = pg.train("ppo", "CartPole-v1", steps=600, seed=0, progress=False)
    assert isinstance(run.policy, nn.Module)
    assert run.evaluate(3).episodes == 3
    run.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "policy.safetensors").exists()


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = pg.train("ppo", "probes:Known-v0", **SMALL)
    assert run.directory is None
    assert list(tmp_path.iterdir()) == []


def test_an_environment_object_is_one_environment() -> None:
    run = pg.train("ppo", CartPoleEnv(), steps=10, num_steps=16, minibatch_size=16, progress=False)
    assert run.options.num_envs == 1
    with pytest.raises(UserError, match="num_envs"):
        pg.train("ppo", CartPoleEnv(), **SMALL)


def test_a_vector_environment_says_how_many_it_is() -> None:
    environments = SyncVectorEnv([limited(Known, 8)] * 3)
    run = pg.train("ppo", environments, steps=10, num_steps=16, minibatch_size=16, progress=False)
    assert run.options.num_envs == 3
    with pytest.raises(UserError, match="minibatch_size"):
        pg.train("ppo", environments, steps=10, num_steps=16, minibatch_size=49, progress=False)


@pytest.mark.parametrize("method", ANY_ACTION)
def test_modules_of_ones_own_take_the_place_of_policy_and_critic(method: str) -> None:
    class Own(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(3, outputs)

    class OwnPolicy(Own):
        def forward(self, obs: Tensor) -> Independent:
            return Independent(Normal(self.layer(obs), 1.0), 1)

    class OwnCritic(Own):
        def forward(self, obs: Tensor) -> Tensor:
            return self.layer(obs).squeeze(-1)

    policy, critic = OwnPolicy(2), OwnCritic(1)
    before = [p.clone() for m in (policy, critic) for p in m.parameters()]
    own = {"critic": critic} if has_critic(options_of(method, "control")()) else {}
    run = pg.train(method, "probes:Known-v0", policy=policy, **own, **of(method, SHORT | MINIBATCHES))
    assert run.policy is policy
    assert run.critic is own.get("critic")
    after = [p for m in (policy, critic) for p in m.parameters()]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, True] + 2 * [bool(own)]
    assert run.evaluate(2).episodes == 2


def test_callables_make_modules_of_the_spaces() -> None:
    run = pg.train(
        "ppo",
        "probes:Known-v0",
        policy=lambda observations, actions: pg.Policy(observations, actions, hidden=(3,)),
        critic=lambda observations: pg.Critic(observations, hidden=(5,)),
        **SHORT,
        **MINIBATCHES,
    )
    sizes = [p.shape[0] for m in (run.policy, run.critic) for n, p in m.named_parameters() if n == "network.0.weight"]
    assert sizes == [3, 5]


def test_policy_and_critic_may_share_a_trunk() -> None:
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())

    class Shared(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.trunk, self.last = trunk, nn.Linear(8, outputs)

    class Actor(Shared):
        def forward(self, obs: Tensor) -> Categorical:
            return Categorical(logits=self.last(self.trunk(obs)))

    class Judge(Shared):
        def forward(self, obs: Tensor) -> Tensor:
            return self.last(self.trunk(obs)).squeeze(-1)

    for method in ("ppo", "actor_critic"):
        size = of(method, SHORT | MINIBATCHES)
        pg.train(method, "CartPole-v1", preset="none", policy=Actor(2), critic=Judge(1), **size)


def test_reinforce_needs_to_know_how_long_an_episode_may_be() -> None:
    with pytest.raises(UserError, match="episode_steps"):
        pg.train("reinforce", Known, iterations=1, progress=False)
    for environment in (limited(Known, 8), "probes:Known-v0"):
        run = pg.train("reinforce", environment, iterations=1, progress=False)
        assert run.metrics[0]["length"] <= 8


def test_it_stops_at_a_return_once_a_hundred_episodes_have_reached_it() -> None:
    run = pg.train("actor_critic", "probes:Known-v0", steps=10_000, stop_at_return=-1e9, progress=False)
    assert 100 <= run.metrics[-1]["episodes"] < 200


# What it leaves behind


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("runs") / "deep" / "er"
    return pg.train("ppo", "probes:Known-v0", out=directory, normalize_observations=True, **SMALL)


def test_the_run_directory_holds_all_of_it(run: Run) -> None:
    assert run.directory is not None
    names = {path.name for path in run.directory.iterdir()}
    written = {"config.json", "metrics.jsonl", "policy.json", "policy.safetensors", "curve.png", "tensorboard"}
    assert names == written | {"summary.json", "checkpoints", "best", ".lock"}


def test_the_configuration_is_whole_and_strict_json(run: Run) -> None:
    assert run.directory is not None
    config = strict((run.directory / "config.json").read_text())
    assert config["method"] == "ppo"
    assert config["world"] == "control"
    assert config["task"] == "probes:Known-v0"
    assert config["preset"] is None
    assert config["versions"]["torch"] == torch.__version__
    options = config["options"]
    assert set(options) == set(vars(run.options))
    assert (options["hidden"], options["steps"], options["value_clip"]) == ([8], 100, "inf")


def test_a_directory_that_is_not_empty_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_or_a_link_to_nothing_in_its_place_is_named_before_an_environment_is_made(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("an environment was made")

    (tmp_path / "file").write_text("years of work")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is a file: choose another directory"):
            pg.train("ppo", never, out=tmp_path / name, **SMALL)
    assert (tmp_path / "file").read_text() == "years of work"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert (tmp_path / "config.json").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written|not a directory"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path / "file" / "below", **SMALL)


# How it ends when it goes wrong


# Of the others the credit is divided by its deviation, and nothing explodes.
DIVIDED = ("grpo", "dapo", "gspo", "cispo", "reinforce_plus_plus", "forking_tokens", "skywork_or1")
DIVIDED += ("clip_cov", "kl_cov")
EXPLODING = [name for name in ANY_ACTION if name not in DIVIDED]


@pytest.mark.parametrize("method", EXPLODING)
def test_training_that_explodes_is_one_line_and_keeps_a_finite_policy(method: str, tmp_path: Path) -> None:
    """Rewards of 1e30: the squared error of a critic overflows, or the parameters do."""

    class Huge(Known):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, 1e30 * reward, *rest

    explode = {"steps": 2000, "learning_rate": 1e30, "critic_learning_rate": 1e30}
    small = of(method, SMALL | explode)
    if "learning_rate" in small and not has_critic(options_of(method, "control")()):
        small.pop("critic_learning_rate")
    with pytest.raises(UserError, match=r"training stopped.*(nan|inf|NaN|finite)") as raised:
        pg.train(method, limited(Huge, 8), out=tmp_path, **small)
    assert len(str(raised.value)) <= 200
    assert "\n" not in str(raised.value)
    assert all(math.isfinite(x) for x in on_disk(tmp_path))
    pg.load_policy(tmp_path)


def test_a_policy_of_ones_own_that_checks_its_arguments_ends_the_same_way(tmp_path: Path) -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, obs: Tensor) -> Independent:
            return Independent(Normal(self.layer(obs), 1.0, validate_args=True), 1)

    policy = Checking()
    with pytest.raises(UserError, match="training stopped"):
        pg.train("ppo", limited(Known, 8), policy=policy, out=tmp_path, **(SMALL | {"learning_rate": 1e38}))
    assert all(math.isfinite(x) for x in on_disk(tmp_path))


def test_an_environment_that_fails_half_way_keeps_what_was_learned(tmp_path: Path) -> None:
    class Later(Broken):
        def step(self, action: Any) -> Any:
            if self.steps == 40:
                raise RuntimeError("the simulator crashed")
            self.steps += 1
            return self.observation(0), 1.0, False, False, {}

    with pytest.raises(UserError, match="the simulator crashed"):
        pg.train("ppo", Later, out=tmp_path, num_envs=2, num_steps=16, minibatch_size=16, steps=1000, progress=False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    pg.load_policy(tmp_path)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"policy": lambda observations, actions: None}, "policy is None: hand in an nn.Module"),
        ({"critic": lambda observations: 3}, "critic is 3"),
        ({"policy": nn.Identity()}, "the policy handed in has no parameter that requires a gradient"),
        ({"critic": nn.Linear(3, 1)}, r"the critic returned values of shape \(4, 16, 1\).*squeeze"),
    ],
    ids=["policy None", "critic 3", "nothing to learn", "critic of [B, T, 1]"],
)
def test_modules_that_cannot_be_trained_are_refused(modules: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("ppo", "probes:Known-v0", **SHORT, **MINIBATCHES, **modules)
    assert "\n" not in str(raised.value)


def test_a_frozen_critic_is_used_as_it_is_or_refused_where_it_is_fitted_alone() -> None:
    def make(space: Any) -> nn.Module:
        return pg.Critic(space, hidden=(4,)).requires_grad_(False)

    run = pg.train("ppo", "probes:Known-v0", **SHORT, **MINIBATCHES, critic=make)
    assert run.metrics
    for method in ("trpo", "npg", "reinforce"):
        with pytest.raises(UserError, match="the critic handed in has no parameter that requires a gradient"):
            pg.train(method, "probes:Known-v0", **of(method, SHORT), critic=make)


def test_a_critic_that_the_credit_has_no_use_for_is_refused() -> None:
    with pytest.raises(UserError, match="a critic is handed in, and credit group has no use for one"):
        pg.train("grpo", "probes:Known-v0", critic=lambda space: pg.Critic(space), **of("grpo", SHORT))


# Rows, one by one

EXACT: dict[str, Any] = {"num_envs": 8, "iterations": 3, "evaluate_every": 2, "learning_rate_schedule": "linear"}


def test_the_rows_of_an_iterator_are_those_of_train() -> None:
    """All that train reports, and besides them the rows that it does not keep."""
    rows = list(pg.Training("ppo", "probes:Known-v0", **(SMALL | {"progress": False})))
    run = pg.train("ppo", "probes:Known-v0", **SMALL)
    assert untimed(rows) == untimed(run.metrics)
    training_ = pg.Training("dapo", "exact:tokens", **EXACT)
    rows = list(training_)
    run = pg.train("dapo", "exact:tokens", progress=False, **EXACT)
    assert untimed(training_.run.metrics) == untimed(run.metrics)
    assert untimed(rows) == untimed(run.metrics)[1:], "the first is how good the policy was before"
    assert torch.equal(parameters(training_.run), parameters(run))
    with pytest.raises(StopIteration):
        next(training_)


@pytest.mark.parametrize("task", ["exact:chain", "probes:Known-v0"])
def test_between_rows_torch_is_as_it_was(task: str) -> None:
    """Its generator, the default dtype and the number of threads; and what is drawn there changes no row."""
    options: dict[str, Any] = {"num_envs": 4, "iterations": 3, "threads": 1, "epochs": 1}
    options |= {"num_steps": 16, "minibatch_size": 16} if task.startswith("probes") else {"episode_steps": 9}
    undisturbed = untimed(list(pg.Training("ppo", task, **options)))
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    made, rows = pg.Training("ppo", task, **options), []
    assert torch.equal(torch.get_rng_state(), state)
    for k, row in enumerate(made):
        assert torch.equal(torch.get_rng_state(), state)
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)
        torch.rand(k + 1)
        state = torch.get_rng_state()
        rows.append(row)
    assert untimed(rows) == undisturbed


def test_threads_of_the_caller_come_back_between_rows() -> None:
    torch.set_num_threads(2)
    for _ in pg.Training("grpo", "exact:bandit", num_envs=4, iterations=2, threads=1):
        assert torch.get_num_threads() == 2


# Stopped and continued


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from disk, where only tensors, numbers and text can be."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_continued(method: str, task: Any, after: int = 2, **options: Any) -> None:
    whole = pg.Training(method, task, **options)
    rows = list(whole)
    first = pg.Training(method, task, **options)
    for _ in range(after):
        next(first)
    state = through_a_file(first.state_dict())
    second = pg.Training(method, task, **options)
    second.load_state_dict(state)
    assert untimed(list(second)) == untimed(rows)[after:]
    assert torch.equal(parameters(second.run), parameters(whole.run))


@pytest.mark.parametrize("task", ["exact:tokens", "exact:garnet"])
@pytest.mark.parametrize("method", WHOLE)
def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(method: str, task: str) -> None:
    extra = {"epochs": 2, "minibatch_size": 16, "kl_ref": "reward", "kl_ref_target": 0.01}
    extra |= {} if task == "exact:tokens" else {"episode_steps": 5}
    assert_continued(method, task, **of(method, EXACT | extra, "exact"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ppo", {"kl_old_coefficient": 1.0, "kl_old_target": 0.01}),
        ("grpo", {"kl_ref": "loss", "kl_ref_target": 0.01}),
        ("dapo", {"sampling_rounds": 3}),
    ],
    ids=str,
)
def test_coefficients_and_wrapped_samplers_are_continued(method: str, options: dict[str, Any]) -> None:
    assert_continued(method, "exact:tokens", **EXACT, **options)


@pytest.mark.parametrize("method", ["grpo", "ppo", "trpo"])
def test_a_language_run_is_continued(method: str, language: dict[str, Any]) -> None:
    language |= {"iterations": 3, "learning_rate_schedule": "linear", "minibatch_size": 8, "critic_learning_rate": 1e-3}
    language |= {"learning_rate": 1e-3}
    used = {**of(method, language, "language"), "held_out": 4}
    if not has_critic(options_of(method, "language")()):
        used.pop("critic_learning_rate")
    assert_continued(method, language["task"], after=1, **{n: x for n, x in used.items() if n != "progress"})


def test_what_a_run_is_continued_from_is_all_that_changes() -> None:
    state = copy.deepcopy(pg.Training("ppo", "exact:bandit", **EXACT).state_dict())
    assert {"iteration", "clock", "random", "modules", "optimizers", "coefficients", "sample"} <= set(state)


# On modules of one's own


def pieces(greedy: bool = False) -> tuple[OnPrefixes, OnPrefixes, CompletionSampler]:
    """What train makes on exact:tokens: policy, critic and sampler."""
    world = token_world()
    states, actions = tree(world).reward.shape
    table, values = SoftmaxPolicy(tabular(states, actions)), TabularCritic(torch.zeros(states))
    return OnPrefixes(world, table), OnPrefixes(world, values), CompletionSampler(world, 8, 4, greedy=greedy)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_ones_own_modules_is_the_method_of_train(method: str, float64: None) -> None:
    """pg.dapo(policy, sample) has the defaults and the pieces of train: the same parameters, bit for bit."""
    run = pg.train(method, "exact:tokens", iterations=3, progress=False)
    policy, critic, sample = pieces(greedy=method == "remax")
    defaults = options_of(method, "exact")()
    own = {"critic": critic} if has_critic(defaults) else {}
    discount = {} if defaults.credit == "group" else {"gamma": 1.0}  # the world's own
    torch.manual_seed(0)
    learner = assemble(method, policy, sample, world="exact", **own, **discount)
    rows = [row for _, row in zip(range(3), learner, strict=False)]
    assert torch.equal(parameters(run), parameters(SimpleNamespace(policy=policy, critic=own.get("critic"))))
    for row, same in zip(rows, untimed(run.metrics)[1:], strict=True):
        assert {name: float(x) for name, x in row.items()} == {name: same[name] for name in row}


def test_a_method_without_a_file_of_its_own_is_a_name_of_the_package(float64: None) -> None:
    policy, _, sample = pieces()
    first = parameters(SimpleNamespace(policy=policy, critic=None))
    next(iter(pg.dapo(policy, sample, world="exact", epochs=2)))
    assert not torch.equal(first, parameters(SimpleNamespace(policy=policy, critic=None)))
    assert all(callable(getattr(pg, name)) for name in METHODS)


# What is computed, and when it ends


def test_a_diagnosis_is_computed_only_for_a_row_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return after_update(*arguments, **options)

    after_update = compose.after_update
    monkeypatch.setattr(compose, "after_update", watched)
    for rows in (4, 1000):
        monkeypatch.setattr(training, "ROWS", rows)
        for method, options in (("ppo", {"epochs": 1}), ("trpo", {}), ("reinforce", {}), ("actor_critic", {})):
            for every, expected in ((0, 8 if rows == 1000 else 5), (1, 8)):  # what is judged is kept too
                calls.clear()
                settings = {"num_envs": 8, "iterations": 8, "evaluate_every": every, **options}
                kept = pg.train(method, "exact:bandit", progress=False, **settings).metrics[1:]
                assert len(calls) == len(kept) == expected
                assert all("kl_old" in row for row in kept)


def test_a_penalty_that_adapts_reads_the_diagnosis_of_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROWS", 2)
    penalty = {"kl_old_coefficient": 1.0, "kl_old_target": 1e-9}
    run = pg.train("ppo", "exact:bandit", num_envs=8, iterations=8, progress=False, **penalty)
    assert run.metrics[-1]["kl_old_coefficient"] == 2.0**7


@pytest.mark.parametrize(
    ("limits", "rows"),
    [({"steps": 100}, 4), ({"iterations": 3, "steps": None}, 3), ({"iterations": 2, "steps": 100}, 2),
     ({"iterations": 9, "steps": 100}, 4), ({"iterations": 9, "steps": 1}, 1)],
    ids=str,
)  # fmt: skip
def test_it_ends_with_the_steps_or_the_iterations_whichever_come_first(limits: dict[str, Any], rows: int) -> None:
    found = list(pg.Training("ppo", "exact:bandit", num_envs=32, **limits))
    assert len(found) == rows
    assert found[-1]["steps"] == 32 * rows
    assert [row["steps"] for row in found] == [32 * (k + 1) for k in range(rows)]


@pytest.mark.parametrize("method", ["ppo", "reinforce", "actor_critic", "trpo", "grpo"])
@pytest.mark.parametrize("limits", [{"steps": 90, "iterations": None}, {"iterations": 5}], ids=str)
def test_a_linear_schedule_ends_at_0(method: str, limits: dict[str, Any]) -> None:
    """The rate of each iteration is what is left of the run when it begins."""
    made = pg.Training(method, "exact:bandit", num_envs=20, learning_rate_schedule="linear", **limits)

    def rates() -> list[float]:
        return [group["lr"] for optimizer in made.learner.optimizers for group in optimizer.param_groups]

    first, count = rates(), 0
    assert min(first) > 0
    for row in made:
        count += 1
        left = max(0.0, 1 - (row["steps"] / 90 if "steps" in limits else count / 5))
        assert rates() == pytest.approx([rate * left for rate in first])
    assert count == 5
    assert set(rates()) == {0.0}


def test_a_constant_rate_stays() -> None:
    made = pg.Training("ppo", "exact:bandit", num_envs=8, iterations=2)
    list(made)
    assert [g["lr"] for o in made.learner.optimizers for g in o.param_groups] == made.rates


# However it ends, what was learned is kept


class Stop:
    """Something that a policy does in its third rollout, when it is asked for a distribution."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, do: Any, calls: int = 150) -> None:
        self.do, self.left, self.forward = do, calls, pg.Policy.forward
        monkeypatch.setattr(pg.Policy, "forward", lambda policy, obs: self.called(policy, obs))

    def called(self, policy: nn.Module, obs: Tensor) -> Any:
        self.left -= 1
        if self.left == 0:
            self.do(policy)
        return self.forward(policy, obs)


def interrupt(policy: nn.Module) -> None:
    raise KeyboardInterrupt


def fault(policy: nn.Module) -> None:
    raise RuntimeError("a bug of this library")


def poison(policy: nn.Module) -> None:
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)


def poison_and_interrupt(policy: nn.Module) -> None:
    poison(policy)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("do", "error"), [(interrupt, KeyboardInterrupt), (fault, RuntimeError)])
def test_an_error_half_way_keeps_what_was_learned_and_is_not_hidden(
    do: Any, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Stop(patch, do)
        with pytest.raises(error):
            pg.train("ppo", "probes:Known-v0", out=tmp_path / "a", **(SMALL | {"steps": 10_000}))
    rows = [strict(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 1
    assert (tmp_path / "a" / "curve.png").exists()
    kept = on_disk(tmp_path / "a")
    pg.train("ppo", "probes:Known-v0", out=tmp_path / "b", **(SMALL | {"steps": None, "iterations": 1}))
    assert kept != on_disk(tmp_path / "b") or len(rows) == 1
    assert all(math.isfinite(x) for x in kept)


@pytest.mark.parametrize(("do", "error"), [(poison, UserError), (poison_and_interrupt, KeyboardInterrupt)])
def test_parameters_that_are_not_finite_do_not_overwrite_what_was_saved(
    do: Any, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Stop(patch, do)
        with pytest.raises(error):
            pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", **(SMALL | {"steps": 10_000}))
    assert all(math.isfinite(x) for x in on_disk(tmp_path / "run"))
    pg.load_policy(tmp_path / "run")


def test_a_training_that_failed_goes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    Stop(monkeypatch, fault, calls=6)
    made = pg.Training("ppo", "probes:Known-v0", **{n: x for n, x in SMALL.items() if n != "progress"})
    with pytest.raises(RuntimeError, match="a bug"):
        next(made)
    assert list(made) == []


def test_the_policy_is_saved_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what it had learned, not what it began with."""
    saved: list[bytes] = []
    save = ControlWorld.save

    def watch(world: ControlWorld, directory: Path, stage: Any) -> None:
        save(world, directory, stage)
        saved.append((directory / "policy.safetensors").read_bytes())

    monkeypatch.setattr(ControlWorld, "save", watch)
    monkeypatch.setattr(recording, "SAVE_SHARE", math.inf)
    for seconds, count, different in ((0.0, 1 + 2 + 1, 4), (1e9, 2, 2)):
        monkeypatch.setattr(recording, "SAVE_SECONDS", seconds)
        saved.clear()
        pg.train(
            "ppo",
            "probes:Known-v0",
            out=tmp_path / str(seconds),
            **(SMALL | {"steps": None, "iterations": 2}),
            keep_best=False,
        )
        assert len(saved) == count
        assert len(set(saved)) == different


def test_environments_of_ones_own_are_left_open_and_others_are_closed() -> None:
    mine = SyncVectorEnv([limited(Known, 8)] * 2)
    list(pg.Training("ppo", mine, num_steps=16, minibatch_size=16, iterations=1))
    assert not mine.closed
    made = pg.Training("ppo", "probes:Known-v0", num_steps=16, minibatch_size=16, iterations=1)
    list(made)
    assert made.world.environments.closed


@pytest.mark.parametrize("seed", [-1, "one"])
def test_a_run_that_cannot_be_made_leaves_nothing_behind(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", seed=seed, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_training_without_a_task() -> None:
    with pytest.raises(UserError, match="there is no task"):
        pg.train("ppo")


def test_names_are_taken_in_any_case() -> None:
    assert pg.train("A2C", "exact:bandit", iterations=1, progress=False).method == "actor_critic"
    assert pg.train("Dr-GRPO", "exact:bandit", iterations=1, progress=False).method == "dr_grpo"
