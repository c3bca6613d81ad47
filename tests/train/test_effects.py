"""What the options of a method do to it, by their own definition."""

import dataclasses
import math
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.spaces import Box
from outcomes import parameters

import policygrad as pg
from policygrad.control import Policy
from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.train.compose import optimizers_of
from policygrad.train.options import EPISODIC, options_of, with_values
from policygrad.train.run import Run


def small(method: str, **options: Any) -> dict[str, Any]:
    """Options of a run that takes a fraction of a second, as far as the method has them."""
    size = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "steps": 128, "minibatch_size": 16, "epochs": 4}
    rate = {"learning_rate": 0.01, "critic_learning_rate": 0.01}
    kind = options_of(method, "control")
    known = {f.name for f in dataclasses.fields(kind)}
    if options.get("credit", kind().credit) in EPISODIC:
        known.remove("num_steps")
    if not (options.get("baseline", "value") == "value" and kind().credit != "group"):
        known.remove("critic_learning_rate")
    if "minibatch_size" not in known:
        size.pop("epochs")
    return {name: x for name, x in {**size, **rate}.items() if name in known} | {"progress": False} | options


def run(method: str, **options: Any) -> Run:
    return pg.train(method, "probes:Known-v0", **small(method, **options))


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.metrics]


def test_the_penalty_doubles_while_kl_is_above_its_target() -> None:
    beta = column(run("ppo", kl_old_coefficient=0.1, kl_old_target=1e-9), "kl_old_coefficient")
    assert beta == pytest.approx([0.1 * 2**k for k in range(len(beta))])


def test_the_penalty_halves_while_kl_is_below_its_target() -> None:
    beta = column(run("ppo", kl_old_coefficient=0.1, kl_old_target=1e9), "kl_old_coefficient")
    assert beta == pytest.approx([0.1 / 2**k for k in range(len(beta))])


def test_the_penalty_follows_the_kl_of_the_whole_update() -> None:
    """With one minibatch the KL measured in the step is 0, whatever the step does (Schulman et al. 2017, section 4)."""
    one = {"epochs": 1, "minibatch_size": 64}
    rows = run("ppo", **one, kl_old_coefficient=0.1, kl_old_target=1e-9).metrics
    assert all(row["kl_old"] > 1e-6 and row["effective_sample_size"] < 1 for row in rows)
    assert [row["kl_old_coefficient"] for row in rows] == pytest.approx([0.1 * 2**k for k in range(len(rows))])


def test_overlap_learns_from_a_policy_that_is_one_update_old() -> None:
    assert column(run("ppo", overlap=True), "policy_lag") == [0.0, 1.0, 1.0]
    first, again, plain = (parameters(run("ppo", overlap=x, steps=256)) for x in (True, True, False))
    assert torch.equal(first, again), "the seed decides"
    assert not torch.equal(first, plain)


def test_overlap_and_a_profile_exclude_each_other() -> None:
    with pytest.raises(UserError, match="leave one of the two out"):
        run("ppo", overlap=True, profile=True)


@pytest.mark.parametrize("method", ["reinforce", "actor_critic"])
def test_overlap_is_refused_where_nothing_corrects_for_it(method: str) -> None:
    with pytest.raises(UserError, match="one update old"):
        run(method, overlap=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"normalize_observations": True}, "normalized ones"),
        ({"memory": "gru"}, "whole episodes"),
        ({"symmetry": "probes:Known"}, "it takes .obs, action."),
        ({"symmetry": "probes:mirrored"}, "did you mean mirror"),
    ],
)
def test_symmetry_is_refused_where_nothing_can_be_reflected(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        run("ppo", **{"symmetry": "probes:mirror"} | values)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(("method", "values"), [("grpo", {}), ("ppo", {"credit": "reward_to_go"})])
def test_symmetry_goes_with_memory_where_rows_are_whole_episodes(method: str, values: dict[str, Any]) -> None:
    values = values | {"memory": "gru", "memory_size": 4}
    plain, both = (parameters(run(method, **values, **x)) for x in ({}, {"symmetry": "probes:mirror"}))
    assert not torch.equal(plain, both)


def test_symmetry_of_a_policy_of_ones_own_with_memory_needs_whole_episodes_too() -> None:
    known = gymnasium.make("probes:Known-v0")
    own = Policy(known.observation_space, known.action_space, memory="gru", memory_size=4, hidden=(8,))
    with pytest.raises(UserError, match="whole episodes") as raised:
        pg.train("ppo", known, policy=own, symmetry="probes:mirror", steps=64, progress=False)
    assert len(str(raised.value)) <= 200


def test_the_penalty_stays_without_a_target() -> None:
    assert set(column(run("ppo", kl_old_coefficient=0.5), "kl_old_coefficient")) == {0.5}


def test_a_strong_penalty_keeps_the_policy_near() -> None:
    free, held = (run("ppo", clip_low=math.inf, clip_high=math.inf, kl_old_coefficient=beta) for beta in (1e-9, 100.0))
    assert max(column(held, "kl_old")) < 0.2 * max(column(free, "kl_old"))


def test_a_target_kl_ends_the_epochs_early() -> None:
    full = column(run("ppo"), "updates")
    assert set(full) == {4 * 4}
    assert set(column(run("ppo", target_kl=1e-9), "updates")) <= {2, 3, 4}, "the first minibatch is at the old policy"


def test_clipping_nothing_is_a_very_wide_clip() -> None:
    assert torch.equal(
        parameters(run("ppo", clip_low=math.inf, clip_high=math.inf)),
        parameters(run("ppo", clip_low=1e9, clip_high=1e9)),
    )


def test_bounds_of_infinity_are_bounds_that_are_never_reached() -> None:
    plain = parameters(run("ppo"))
    for option in ("value_clip", "dual_clip", "max_grad_norm"):
        infinite, wide = parameters(run("ppo", **{option: math.inf})), parameters(run("ppo", **{option: 1e9}))
        assert torch.equal(infinite, wide), option
        assert torch.equal(infinite, plain) == (option != "max_grad_norm"), option


def test_each_normalize_advantages_is_its_own() -> None:
    results = [parameters(run("ppo", normalize_advantages=x)) for x in ("minibatch", "batch", "none")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(results[i], results[j])


def test_over_one_minibatch_that_is_the_batch_both_normalizations_agree() -> None:
    one = {"minibatch_size": 64, "epochs": 1, "steps": 1}
    a, b = (parameters(run("ppo", normalize_advantages=x, **one)) for x in ("minibatch", "batch"))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_normalized_advantages_do_not_care_for_the_scale_of_the_objective() -> None:
    for method, off in (("trpo", {"normalize_advantages": "none"}), ("npg", {"normalize_advantages": "none"})):
        a, b = run(method, steps=1), run(method, steps=1, **off)
        assert not torch.equal(parameters(a), parameters(b))
        assert column(a, "improvement")[0] < column(b, "improvement")[0], "these rewards spread by more than 1"


@pytest.mark.parametrize("method", ["ppo", "reinforce", "actor_critic", "off_policy_actor_critic", "trpo", "dr_grpo"])
@pytest.mark.parametrize(
    ("schedule", "warmup", "factor"),
    [
        ("constant", 0.0, lambda done: 1.0),
        ("constant", 0.5, lambda done: min(1.0, done / 150)),
        ("linear", 0.0, lambda done: max(0.0, 1 - done / 300)),
        ("linear", 0.5, lambda done: done / 150 if done < 150 else max(0.0, 2 - done / 150)),
        ("cosine", 0.0, lambda done: 0.5 + 0.5 * math.cos(math.pi * min(1.0, done / 300))),
        ("cosine", 0.5, lambda d: d / 150 if d < 150 else 0.5 + 0.5 * math.cos(math.pi * (min(d, 300) / 150 - 1))),
    ],
)
def test_the_rates_follow_their_schedule(method: str, schedule: str, warmup: float, factor: Any) -> None:
    """The rate of each iteration is by the steps that are done when it begins."""
    values = small(method, steps=300, learning_rate_schedule=schedule, warmup=warmup)
    with pg.Training(method, "probes:Known-v0", **values) as training:
        groups = [group for optimizer in training.learner.optimizers for group in optimizer.param_groups]
        found, done = [[group["lr"] for group in groups]], [0.0]
        for row in training:
            done.append(row["steps"])
            found.append([group["lr"] for group in groups])
    assert len(found) > 4
    assert len(groups) >= 1
    for rates, steps in zip(found, done, strict=True):
        assert rates == pytest.approx([0.01 * factor(steps)] * len(groups), abs=1e-12)


def step_of(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters of a policy before and after one step on one rollout."""
    values = small("actor_critic", iterations=1, steps=None, value_coefficient=0.0, **options)
    with pg.Training("actor_critic", "probes:Known-v0", **values) as training:
        before = parameters(training.run)
        next(training)
        return before, parameters(training.run)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_sgd_steps_by_the_rate_times_the_gradient() -> None:
    sgd = {"optimizer": "sgd", "critic_learning_rate": None}
    (before, after), (_, double) = (step_of(**sgd, learning_rate=x) for x in (0.1, 0.2))
    close(double - before, 2 * (after - before))
    _, decayed = step_of(**sgd, learning_rate=0.1, weight_decay=0.5)
    close(after - decayed, 0.05 * before)


def test_the_decay_of_adamw_and_muon_is_apart_from_the_gradient() -> None:
    for name in ("adamw", "muon"):
        (before, after), (_, decayed) = (step_of(optimizer=name, weight_decay=x) for x in (0.0, 0.5))
        close(after - decayed, 0.01 * 0.5 * before)
    assert torch.equal(step_of(optimizer="adam")[1], step_of(optimizer="adamw")[1])
    assert not torch.equal(step_of(optimizer="adam", weight_decay=0.5)[1], step_of(optimizer="adam")[1])


def test_momentum_repeats_the_steps_before() -> None:
    """The second step of SGD with momentum m is m times the first and its own."""
    for name, default in (("sgd", 0.0), ("muon", 0.95)):
        plain, given, other = (
            parameters(run("actor_critic", optimizer=name, **momentum))
            for momentum in ({}, {"momentum": default}, {"momentum": 0.5})
        )
        assert torch.equal(plain, given)
        assert not torch.equal(plain, other)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    policy, model = pg.Policy(Box(-1, 1, (3,)), Box(-1, 1, (2,))), arithmetic.model(hidden=16, layers=1)
    for module, excluded in ((policy, set()), (model, {id(model.get_input_embeddings().weight)})):
        options = with_values(options_of("ppo", "control")(), {"optimizer": "muon"})
        muon, adamw = optimizers_of(options, [(module, 0.01)])
        assert isinstance(muon, torch.optim.Muon)
        assert isinstance(adamw, torch.optim.AdamW)
        held = [{id(p) for group in x.param_groups for p in group["params"]} for x in (muon, adamw)]
        matrices = {id(p) for p in module.parameters() if p.ndim == 2} - excluded
        assert held == [matrices, {id(p) for p in module.parameters()} - matrices]
        assert all(held)


def test_the_gradient_is_scaled_down_to_its_bound() -> None:
    a, b = run("actor_critic", max_grad_norm=1e-4, steps=1), run("actor_critic", max_grad_norm=1e9, steps=1)
    assert column(a, "gradient_norm") == column(b, "gradient_norm"), "it is reported as it was"
    assert not torch.equal(parameters(a), parameters(b))


def test_an_entropy_bonus_keeps_the_policy_random() -> None:
    for method in ("ppo", "actor_critic", "off_policy_actor_critic", "reinforce"):
        plain, bonus = (run(method, entropy_coefficient=c) for c in (0.0, 10.0))
        assert column(bonus, "entropy")[-1] > column(plain, "entropy")[-1]


def test_reinforce_with_the_factor_gamma_to_the_t_is_the_same_only_if_gamma_is_1() -> None:
    for gamma in (1.0, 0.5):
        a, b = (run("reinforce", gamma=gamma, discounted=x, baseline="none") for x in (False, True))
        assert torch.equal(parameters(a), parameters(b)) == (gamma == 1.0)


def test_a_trajectory_return_is_not_discounted_twice() -> None:
    with pytest.raises(UserError, match="discounted"):
        run("reinforce", discounted=True, credit="trajectory_return")


def test_n_step_with_n_beyond_the_row_is_monte_carlo() -> None:
    a = run("actor_critic", credit="n_step", n=99)
    b = run("actor_critic", credit="monte_carlo")
    c = run("actor_critic", credit="gae", lam=1.0)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-4, atol=1e-5)
    assert torch.equal(parameters(b), parameters(c))


def test_n_step_of_1_is_gae_with_lambda_0() -> None:
    a, b = run("actor_critic", credit="n_step", n=1), run("actor_critic", credit="gae", lam=0.0)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-4, atol=1e-5)


def test_the_step_rules_of_the_natural_gradient_meet_where_their_steps_are_equal() -> None:
    radius = run("npg", steps=1)
    alpha = column(radius, "step_size")[0]
    plain = run("npg", steps=1, step_rule="learning_rate", natural_learning_rate=alpha)
    torch.testing.assert_close(parameters(radius), parameters(plain), rtol=1e-5, atol=1e-6)
    assert column(radius, "kl_old")[0] == pytest.approx(0.01, rel=0.5), "KL is delta to second order, less the damping"
    assert set(column(run("npg", step_rule="learning_rate", natural_learning_rate=0.125), "step_size")) == {0.125}


def test_off_policy_credit_with_one_epoch_is_on_policy() -> None:
    """The ratio is 1 then, and V-trace with bounds of 1 is the lambda-return."""
    a = run("off_policy_actor_critic", epochs=1, steps=1)
    b = run("actor_critic", lam=1.0, steps=1)
    torch.testing.assert_close(column(a, "value_loss"), column(b, "value_loss"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(column(a, "entropy"), column(b, "entropy"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["grpo", "rloo", "dapo", "cispo", "reinforce_plus_plus"])
def test_kl_is_that_of_the_update_also_where_it_is_one_step(method: str) -> None:
    given = {"baseline": "none"} if method == "reinforce_plus_plus" else {}
    assert all(row["kl_old"] > 1e-9 and row["effective_sample_size"] < 1 for row in run(method, **given).metrics)


@pytest.mark.parametrize(("method", "optimizer"), [("ppo", "adamw"), ("actor_critic", "muon"), ("dro", "adam")])
def test_in_its_warm_up_only_the_critic_learns(method: str, optimizer: str) -> None:
    values = small(method, iterations=4, steps=None, critic_warmup=2, optimizer=optimizer, weight_decay=0.1)
    with pg.Training(method, "probes:Known-v0", **values) as training:
        policy, critic = training.world.policy, training.world.critic
        moved = []
        for _ in range(4):
            before = [torch.nn.utils.parameters_to_vector(x.parameters()).detach().clone() for x in (policy, critic)]
            next(training)
            after = [torch.nn.utils.parameters_to_vector(x.parameters()) for x in (policy, critic)]
            moved.append([not torch.equal(x, y) for x, y in zip(before, after, strict=True)])
    assert moved == [[False, True], [False, True], [True, True], [True, True]]


def test_a_warm_up_is_of_a_run_and_of_a_critic() -> None:
    with pytest.raises(UserError, match="critic_warmup is a critic's"):
        run("grpo", critic_warmup=1)
    with pytest.raises(UserError, match="critic_warmup counts the iterations of a run"):
        pg.assemble("ppo", torch.nn.Linear(1, 1), lambda policy: policy, critic=torch.nn.Linear(1, 1), critic_warmup=1)
