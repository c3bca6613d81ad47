"""From options to pieces: what is put together, in what order, and what is refused. test_methods.py has each line."""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import Critic, Softmax
from torch import nn

import policygrad as pg
from policygrad.advantages import gae
from policygrad.credit import bootstrapped
from policygrad.critics import fit_critic
from policygrad.errors import UserError
from policygrad.rollout import Rollout
from policygrad.samplers import InUnits, KLCharged, Rescored, WholeRows, WithoutFlatGroups
from policygrad.train import compose
from policygrad.train.compose import Learner, adamw_8bit, assemble
from policygrad.train.methods import METHODS
from policygrad.train.options import OptionError, Options, has_critic, options_of, validate, with_values
from policygrad.updates import ascend, trust_region_step

Sample = Callable[..., Rollout]
every_method = pytest.mark.parametrize("method", METHODS)


def assembled(method: str, sample: Sample, make: Any = None, **values: Any) -> tuple[Learner, nn.Module, nn.Module]:
    torch.manual_seed(1)
    policy, critic = Softmax(), Critic()
    make = make or (lambda *x, **o: assemble(method, *x, **o))
    values |= (
        {"group_scale": "none"} if method == "maxrl" else {}
    )  # whose rewards must not be negative, as some are here
    return make(policy, lambda p: sample(p, rows=8, steps=4), critic=critic, **values), policy, critic


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@every_method
def test_every_method_trains_modules_of_ones_own(method: str, sample: Sample) -> None:
    learner, policy, critic = assembled(method, sample)
    before = flat(policy), flat(critic)
    rows = list(islice(learner, 2))
    assert all(torch.as_tensor(x).isfinite().all() for row in rows for x in row.values())
    assert not torch.equal(flat(policy), before[0])
    assert torch.equal(flat(critic), before[1]) != has_critic(options_of(method, "control")())


@pytest.mark.parametrize("method", ["dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus"])
def test_a_method_without_a_file_is_found_by_its_name(method: str, sample: Sample) -> None:
    results = []
    for make in (getattr(pg, method), None):
        learner, policy, _ = assembled(method, sample, make, learning_rate=0.01)
        next(iter(learner))
        results.append(flat(policy))
    assert torch.equal(*results)


def test_wrappers_stand_in_their_order(sample: Sample) -> None:
    everything: dict[str, Any] = {"ratio": "sequence", "sampling_rounds": 2, "old_logp": "recomputed"}
    everything |= {"kl_ref": "reward", "micro_batch": 3, "importance_bound": 1.5, "kl_ref_coefficient": 0.3}
    learner = assembled("grpo", sample, world="language", **everything)[0]
    found: list[Any] = [learner.sample]
    while hasattr(found[-1], "sample"):
        found.append(found[-1].sample)
    assert [type(x) for x in found[:-1]] == [KLCharged, Rescored, WithoutFlatGroups, WholeRows]
    charged, rescored, rounds = found[:3]
    assert (charged.micro_batch, rescored.micro_batch, rescored.bound, rounds.rounds) == (3, 3, 1.5, 2)
    assert charged.coefficient is learner.coefficients["kl_ref"]
    assert charged.coefficient.value == 0.3
    plain = assembled("grpo", sample)[0]
    assert not hasattr(plain.sample, "sample")


@pytest.mark.parametrize("method", ["ppo", "trpo", "actor_critic"])
def test_a_critic_with_a_scale_learns_the_unit_of_rewards_unless_they_are_scaled(method: str, sample: Sample) -> None:
    policy, critic = Softmax(), Critic()
    assert not hasattr(assemble(method, policy, sample, critic=critic).sample, "critic")
    critic.rescale = lambda square: None  # type: ignore[assignment]
    found: Any = assemble(method, policy, sample, critic=critic).sample
    assert type(found) is InUnits
    assert found.critic is critic
    assert not hasattr(assemble(method, policy, sample, critic=critic, scale_rewards=True).sample, "critic")


def test_the_unit_of_rewards_is_the_tasks_and_not_that_of_a_kl_in_them(sample: Sample) -> None:
    critic = Critic()
    critic.rescale = lambda square: None  # type: ignore[assignment]
    found: Any = assemble("ppo", Softmax(), sample, critic=critic, kl_ref="reward").sample
    assert [type(found), type(found.sample)] == [KLCharged, InUnits]


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_reference_is_the_policy_as_it_was_or_the_one_handed_in(where: str, sample: Sample) -> None:
    options: dict[str, Any] = {"kl_ref": where, "learning_rate": 0.1}
    learner, policy, _ = assembled("grpo", sample, **options)
    start = deepcopy(policy)
    kl = [float(row["kl_ref"]) for row in islice(learner, 3)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-3
    torch.manual_seed(7)
    far = Softmax()
    learner = assembled("grpo", sample, reference=far, **options)[0]
    assert float(next(iter(learner))["kl_ref"]) > 1e-3
    assert not torch.equal(flat(far), flat(start))
    torch.manual_seed(7)
    assert torch.equal(flat(far), flat(Softmax())), "it is not trained"


def test_what_adapts_is_among_the_coefficients(sample: Sample) -> None:
    assert assembled("ppo", sample)[0].coefficients == {}
    both = {"kl_old_coefficient": 0.5, "kl_ref": "reward", "kl_ref_coefficient": 0.1}
    found = assembled("ppo", sample, **both)[0].coefficients
    assert {name: x.value for name, x in found.items()} == {"kl_old": 0.5, "kl_ref": 0.1}


def test_optimizers_have_what_can_be_trained_once(sample: Sample) -> None:
    policy = Softmax()
    policy.net[0].requires_grad_(False)
    for method, count in (("ppo", 1), ("reinforce", 2), ("trpo", 1), ("grpo", 1)):
        critic = Critic()
        if method == "ppo":
            critic.also = policy.net[2]
        learner = assemble(method, policy, sample, critic=critic)
        assert len(learner.optimizers) == count
        given = [p for x in learner.optimizers for group in x.param_groups for p in group["params"]]
        assert all(p.requires_grad for p in given)
        if method == "ppo":
            assert len(given) == len(set(given)) == 4


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("pppo", {}, "unknown method 'pppo'"),
        ("ppo", {"lam": 2.0}, "lam is 2.0"),
        ("ppo", {"n": 3}, "n is read only where credit is n_step"),
        ("ppo", {"clip": 0.2}, "no option 'clip'"),
        ("dapo", {"overlong_fraction": 0.1}, "overlong_fraction"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(method: str, values: dict[str, Any], said: str, sample: Sample) -> None:
    with pytest.raises(UserError, match=said) as raised:
        assembled(method, sample, **values)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@every_method
def test_credit_that_needs_a_critic_asks_for_one(method: str, sample: Sample) -> None:
    if not has_critic(options_of(method, "control")()):
        assemble(method, Softmax(), sample)
        return
    with pytest.raises(UserError, match="needs a critic: hand one in, or choose another credit"):
        assemble(method, Softmax(), sample)
    assemble(method, Softmax(), sample, credit="group")


CHOICES = {
    "weights": compose.WEIGHTS,
    "ratio": compose.RATIOS,
    "gain": compose.GAINS,
    "group_baseline": compose.GROUP_BASELINES,
    "group_scale": compose.GROUP_SCALES,
    "kl_ref_estimate": compose.DIVERGENCES,
}


@pytest.mark.parametrize("option", CHOICES)
def test_an_option_offers_the_pieces_there_are(option: str) -> None:
    assert set(get_args(get_type_hints(Options)[option])) == set(CHOICES[option])


@pytest.mark.parametrize("method", ["trpo", "npg"])
def test_a_critics_rate_is_a_number_where_the_policy_has_none(method: str) -> None:
    defaults = options_of(method, "control")()
    with pytest.raises(OptionError, match="critic_learning_rate is None") as raised:
        validate(with_values(defaults, {"critic_learning_rate": None}), defaults)
    assert raised.value.option == "critic_learning_rate"


# Who learns


class OnTrunk(nn.Module):
    """A head on a trunk."""

    def __init__(self, trunk: nn.Module, size: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4, size)

    def forward(self, obs: torch.Tensor) -> Any:
        out = self.head(self.trunk(obs))
        return out.squeeze(-1) if out.shape[-1] == 1 else torch.distributions.Categorical(logits=out)


def on_one_trunk() -> tuple[nn.Module, nn.Module]:
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    return OnTrunk(trunk, 4), OnTrunk(trunk, 1)


@pytest.mark.parametrize("method", ["trpo", "npg", "reinforce", "reinforce_plus_plus", "grpo"])
def test_a_critic_on_the_policys_trunk_is_not_fitted_alone(method: str, sample: Sample) -> None:
    policy, critic = on_one_trunk()
    values = {"baseline": "value"} if method == "reinforce_plus_plus" else {"credit": "gae"} if method == "grpo" else {}
    with pytest.raises(UserError, match=f"share parameters, and {method} fits its critic alone") as raised:
        assemble(method, policy, lambda p: sample(p), critic=critic, **values)
    assert len(str(raised.value)) <= 200
    for p in policy.trunk.parameters():
        p.requires_grad_(False)
    next(iter(assemble(method, policy, lambda p: sample(p), critic=critic, **values)))


@pytest.mark.parametrize("method", ["ppo", "actor_critic"])
def test_a_critic_on_the_policys_trunk_learns_with_it(method: str, sample: Sample) -> None:
    policy, critic = on_one_trunk()
    rows = list(islice(assemble(method, policy, lambda p: sample(p), critic=critic), 2))
    assert "critic_gradient_norm" not in rows[0]


def test_a_loop_by_hand_finds_the_shared_trunk_in_its_first_iteration(sample: Sample) -> None:
    policy, critic = on_one_trunk()
    fit = fit_critic(critic, torch.optim.Adam(critic.parameters(), fused=True))
    credit = bootstrapped(critic, partial(gae, gamma=0.9, lam=0.9))
    loops = {
        "trpo": pg.trpo(sample, credit, pg.SurrogateObjective(policy), trust_region_step(), fit=fit),
        "grpo": pg.grpo(
            sample, credit, pg.GRPOObjective(policy), ascend(torch.optim.Adam(policy.parameters())), fit=fit
        ),
    }
    for loop in loops.values():
        with pytest.raises(UserError, match="fitting the critic would move the policy"):
            next(iter(loop))


def test_a_loop_by_hand_without_a_critic_in_its_optimizer_is_refused(sample: Sample) -> None:
    policy, critic = Softmax(), Critic()
    loop = pg.ppo(
        sample,
        bootstrapped(critic, partial(gae, gamma=0.9, lam=0.9)),
        pg.PPOObjective(policy, critic),
        ascend(torch.optim.Adam(policy.parameters())),
    )
    with pytest.raises(UserError, match=r"the optimizer lacks 'critic\.net\.weight'"):
        next(iter(loop))


def test_budget_weights_know_the_limit_of_a_sampler_of_whole_episodes() -> None:
    class Limited:
        length = 50

        def __call__(self, policy: nn.Module) -> Rollout:
            raise NotImplementedError

    loop: Any = assemble("dr_grpo", Softmax(), Limited()).loop
    weight = loop.keywords["weights"](torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(weight, torch.full((2, 4), 1 / 100))


@every_method
def test_nothing_moves_where_no_decision_counts(method: str, sample: Sample) -> None:
    """Adam's moments would move the parameters."""
    masked = False

    def sampled(policy: nn.Module, **size: Any) -> Rollout:
        found = sample(policy, **size)
        return replace(found, mask=found.mask & (not masked))

    learner, policy, critic = assembled(method, sampled)
    run = iter(learner)
    next(run)
    for masked in (True, False):
        before = flat(policy), flat(critic)
        metrics = next(run)
        moved = not torch.equal(flat(policy), before[0]), not torch.equal(flat(critic), before[1])
        assert moved == ((False, False) if masked else (True, has_critic(options_of(method, "control")())))
        assert (metrics["gradient_norm"] == 0) == masked


@every_method
def test_returns_of_segments_are_refused(method: str, sample: Sample) -> None:
    learner, _, _ = assembled(method, sample)
    learner.sample = Segments(sample)
    if options_of(method, "control")().credit in ("reward_to_go", "trajectory_return"):
        with pytest.raises(UserError, match="rows end inside episodes"):
            next(iter(learner))
    else:
        next(iter(learner))


class Segments:
    whole_episodes = False

    def __init__(self, sample: Sample) -> None:
        self.inner = sample

    def __call__(self, policy: nn.Module) -> Rollout:
        return self.inner(policy, rows=8, steps=4)


# AdamW in 8 bits


def trained_in_8_bits(
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, torch.optim.Optimizer, Callable[[int], None]]:
    """A linear layer large enough for it, and a function that takes steps on it, the n-th always on the same batch."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(128, 64).to(dtype)
    optimizer = adamw_8bit(layer.parameters(), lr=1e-3, weight_decay=0.1)

    def step(n: int) -> None:
        torch.manual_seed(n)
        optimizer.zero_grad()
        x = torch.randn(32, 128, dtype=torch.float32)
        (layer(x.to(dtype)).float() - x[:, :64].sin()).square().mean().backward()
        optimizer.step()

    return layer, optimizer, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_in_8_bits_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    whole, before, step = trained_in_8_bits(dtype)
    for n in range(3):
        step(n)
    weights = {name: x.clone() for name, x in whole.state_dict().items()}
    saved = deepcopy(before.state_dict())
    assert {x.dtype for name, x in before.state[whole.weight].items() if name.startswith("state")} == {torch.uint8}
    for n in range(3, 6):
        step(n)
    again, after, step = trained_in_8_bits(dtype)
    again.load_state_dict(weights)
    after.load_state_dict(saved)
    for n in range(3, 6):
        step(n)
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))


def test_adamw_in_8_bits_is_near_adamw() -> None:
    mine, _, step = trained_in_8_bits()
    start = mine.weight.detach().clone()
    its = deepcopy(mine)
    adamw = torch.optim.AdamW(its.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-8)
    for n in range(20):
        step(n)
        torch.manual_seed(n)
        adamw.zero_grad()
        x = torch.randn(32, 128, dtype=torch.float32)
        (its(x) - x[:, :64].sin()).square().mean().backward()
        adamw.step()
    apart, moved = float((mine.weight - its.weight).detach().norm()), float((its.weight.detach() - start).norm())
    assert 0 < apart < 0.1 * moved
    assert torch.equal(mine.bias, its.bias) or float((mine.bias - its.bias).detach().norm()) < 1e-4


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes: pip install policygrad\[quantize\]"):
        adamw_8bit(nn.Linear(2, 2).parameters())
