"""Policies for every space: their actions are in the space, and the scored action is the sampled one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call

from policygrad.control import Critic, Policy
from policygrad.control.memory import Rows
from policygrad.control.policies import ACTIVATIONS
from policygrad.critics import both
from policygrad.divergences import kl
from policygrad.errors import UserError

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
NESTED = spaces.MultiDiscrete(np.array([[2, 3], [1, 4]]), start=np.array([[0, 5], [-2, 1]]))

POLICIES: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(4), {}),
    "discrete from -3": (spaces.Discrete(4, start=-3), {}),
    "clipped": (BOX, {}),
    "clipped, matrix": (spaces.Box(-0.1, 0.1, (2, 2), np.float32), {"initial_log_std": 1.0}),
    "clipped, unbounded": (spaces.Box(-np.inf, np.inf, (2,), np.float32), {}),
    "clipped, float64": (spaces.Box(0.0, 1.0, (1,), np.float64), {}),
    "clipped, state-dependent std": (BOX, {"state_dependent_std": True}),
    "squashed": (BOX, {"distribution": "squashed"}),
    "squashed, state-dependent std": (BOX, {"distribution": "squashed", "state_dependent_std": True}),
    "beta": (BOX, {"distribution": "beta"}),
    "beta, matrix": (spaces.Box(-0.1, 0.1, (2, 2), np.float32), {"distribution": "beta"}),
    "multi-discrete": (spaces.MultiDiscrete([2, 5, 3]), {}),
    "multi-discrete, nested, from a start": (NESTED, {}),
    "multi-binary": (spaces.MultiBinary(5), {}),
    "multi-binary, matrix": (spaces.MultiBinary((2, 3)), {}),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def made(name: str, scale: float = 1.0) -> Policy:
    """A policy whose last layer is not small, so that its distributions differ from each other."""
    space, options = POLICIES[name]
    policy = Policy(OBSERVATIONS, space, hidden=(16,), **options)
    with torch.no_grad():
        policy.network[-1].weight.mul_(100 * scale)  # type: ignore[operator, union-attr]
    return policy


@every_policy
def test_distributions_are_rows_of_steps(name: str) -> None:
    distribution = made(name)(torch.randn(4, 6, 3))
    action = distribution.sample()
    assert distribution.batch_shape == (4, 6)
    assert action.shape[:2] == (4, 6)
    assert distribution.log_prob(action).shape == distribution.entropy().shape == distribution.mode.shape[:2] == (4, 6)


@every_policy
def test_what_the_environment_gets_is_in_its_space(name: str) -> None:
    space = POLICIES[name][0]
    policy = made(name, 10.0)
    distribution = policy(10 * torch.randn(200, 1, 3))
    for action in (distribution.sample(), distribution.mode):
        for one in distribution.to_environment(action[:, 0]):  # type: ignore[attr-defined]
            assert space.contains(one if np.ndim(one) else space.dtype.type(one)), one  # type: ignore[union-attr]


@every_policy
def test_every_action_of_a_finite_space_and_both_bounds_of_a_box_are_reached(name: str) -> None:
    space, options = POLICIES[name]
    wide = isinstance(space, spaces.Box) and options.get("distribution") != "beta"
    policy = Policy(OBSERVATIONS, space, **(options | ({"initial_log_std": 2.0} if wide else {})))
    if "beta" in name:
        nn.init.constant_(policy.network[-1].bias, -9.0)  # type: ignore[arg-type]  # uniform
    distribution: Any = policy(torch.zeros(4000, 1, 3))
    action = distribution.to_environment(distribution.sample()[:, 0]).reshape(4000, -1)
    if isinstance(space, spaces.Box):
        low, high = space.low.reshape(-1), space.high.reshape(-1)
        if np.isfinite(low).all():
            np.testing.assert_allclose(action.min(0), low, atol=0.02)
            np.testing.assert_allclose(action.max(0), high, atol=0.02)
    else:
        counts = {
            spaces.Discrete: lambda: [space.n],
            spaces.MultiDiscrete: lambda: space.nvec.reshape(-1),
            spaces.MultiBinary: lambda: [2] * int(np.prod(space.shape)),
        }[type(space)]()
        start = np.reshape(getattr(space, "start", 0), -1)
        for column, n, first in zip(action.T, counts, np.broadcast_to(start, len(counts)), strict=True):
            assert sorted(set(column.tolist())) == list(range(int(first), int(first) + int(n)))


@every_policy
def test_the_ratio_is_1_on_the_policys_own_samples(name: str, float64: None) -> None:
    policy, obs = made(name), torch.randn(5, 7, 3)
    with torch.no_grad():
        action = policy(obs).sample()
        logp = policy(obs).log_prob(action)
    flat = lambda x: x.flatten(0, 1).unsqueeze(1)  # noqa: E731
    again = policy(flat(obs)).log_prob(flat(action))
    torch.testing.assert_close((again - flat(logp)).exp(), torch.ones(35, 1), rtol=0, atol=1e-12)


@every_policy
def test_log_probabilities_of_all_actions_add_up_to_1(name: str, float64: None) -> None:
    space, _ = POLICIES[name]
    if isinstance(space, spaces.Box):
        pytest.skip("a density: see test_distributions")
    match space:
        case spaces.Discrete():
            actions = torch.arange(int(space.n))
        case spaces.MultiDiscrete():
            actions = torch.cartesian_prod(*[torch.arange(int(n)) for n in space.nvec.reshape(-1)])
        case _:
            actions = torch.cartesian_prod(*[torch.arange(2.0)] * int(np.prod(space.shape)))
    obs = torch.randn(1, 1, 3).expand(len(actions), 1, 3)
    logp = made(name)(obs).log_prob(actions.unsqueeze(1))
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-12)


@every_policy
def test_the_entropy_and_the_divergence_are_the_means_over_samples(name: str, float64: None) -> None:
    p, q = made(name)(torch.randn(1, 1, 3)), made(name)(torch.randn(1, 1, 3))
    u = p.sample((100_000,))
    logp, logq = p.log_prob(u), q.log_prob(u)
    for exact, samples in ((p.entropy(), -logp), (kl(p, q), logp - logq)):
        assert exact.item() == pytest.approx(samples.mean().item(), abs=5 * samples.std().item() / 100_000**0.5 + 1e-3)


@every_policy
def test_the_divergence_has_gradients_of_its_gradients(name: str, float64: None) -> None:
    """What a Fisher-vector product needs; 0 at the old policy to first order, and no NaN where a logit is padding."""
    policy, obs = made(name), torch.randn(5, 1, 3)
    with torch.no_grad():
        old = policy(obs)
    parameters = list(policy.parameters())
    gradient = torch.autograd.grad(kl(old, policy(obs)).mean(), parameters, create_graph=True)
    assert max(g.abs().max().item() for g in gradient) < 1e-12
    product = torch.autograd.grad(sum(g.sum() for g in gradient), parameters, materialize_grads=True)
    assert all(x.isfinite().all() for x in product)
    assert any(x.abs().max() > 0 for x in product)


@every_policy
def test_entropy_and_log_probability_have_finite_gradients(name: str, float64: None) -> None:
    policy = made(name)
    distribution = policy(torch.randn(5, 1, 3))
    (distribution.entropy() + distribution.log_prob(distribution.sample())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def score(policy: Callable[[Tensor], Any], obs: Tensor, old: Any, action: Tensor) -> Tensor:
    """Everything that an objective computes from a policy."""
    distribution = policy(obs)
    return distribution.log_prob(action) + distribution.entropy() + kl(old, distribution)


def scored(name: str) -> tuple[Policy, tuple[Tensor, Any, Tensor]]:
    policy, obs = made(name), torch.randn(4, 2, 3)
    with torch.no_grad():
        old = policy(obs)
        return policy, (obs, old, old.sample())


@every_policy
def test_a_policy_is_a_function_of_its_parameters(name: str) -> None:
    policy, given = scored(name)
    before = score(policy, *given)
    parameters = {name: 2 * x for name, x in policy.named_parameters()}
    found = score(lambda obs: functional_call(policy, parameters, (obs,)), *given)
    with torch.no_grad():
        for x in policy.parameters():
            x.mul_(2)
    torch.testing.assert_close(found, score(policy, *given))
    assert not torch.equal(found, before)


def trace() -> None:
    """One graph of each policy, or an error where it breaks."""
    for name in POLICIES:
        torch.compiler.reset()
        policy, given = scored(name)
        expected = score(policy, *given)  # first: torch looks up the KL of two kinds once, which does not trace
        torch.testing.assert_close(torch.compile(score, fullgraph=True, backend="eager")(policy, *given), expected)


def test_every_policy_traces_into_one_graph() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    command = [sys.executable, "-c", "from tests.control.test_policies import trace; trace()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_several_choices_are_their_separate_categoricals(float64: None) -> None:
    nvec = [2, 5, 1, 3]
    policy = Policy(OBSERVATIONS, spaces.MultiDiscrete(nvec), hidden=(8,))
    nn.init.normal_(policy.network[-1].weight)  # type: ignore[arg-type]
    obs, other = torch.randn(4, 1, 3), torch.randn(4, 1, 3)

    def single(obs: Tensor) -> list[Categorical]:
        return [Categorical(logits=x) for x in policy.network(obs).split(nvec, -1)]

    p, q = policy(obs), policy(other)
    action = p.sample()
    torch.testing.assert_close(
        p.log_prob(action), sum(c.log_prob(a) for c, a in zip(single(obs), action.unbind(-1), strict=True))
    )
    torch.testing.assert_close(p.entropy(), sum(c.entropy() for c in single(obs)))
    torch.testing.assert_close(
        kl(p, q), sum(kl_divergence(a, b) for a, b in zip(single(obs), single(other), strict=True))
    )


def test_squashing_onto_a_single_number_is_refused() -> None:
    space = spaces.Box(np.array([-1.0, 0.5], np.float32), np.array([1.0, 0.5], np.float32))
    with pytest.raises(UserError, match=r"distribution squashed needs low < high .* low = high = 0.5"):
        Policy(OBSERVATIONS, space, distribution="squashed")
    clipped: Any = Policy(OBSERVATIONS, space)(torch.zeros(1, 1, 3))
    assert clipped.to_environment(torch.tensor([[0.0, 9.0]])).tolist() == [[0, 0.5]]


def test_the_standard_deviation_depends_on_the_state_where_it_is_asked_to() -> None:
    obs = torch.randn(2, 1, 3)
    for state_dependent in (False, True):
        policy = Policy(OBSERVATIONS, BOX, state_dependent_std=state_dependent, initial_log_std=-1.0)
        nn.init.normal_(policy.network[-1].weight)  # type: ignore[arg-type]
        std = policy(obs).stddev
        assert torch.equal(std[0], std[1]) != state_dependent
    fresh = Policy(OBSERVATIONS, BOX, state_dependent_std=True, initial_log_std=-1.0)
    torch.testing.assert_close(
        fresh(obs).stddev, torch.full((2, 1, 2), np.exp(-1.0)), rtol=0.1, atol=0, check_dtype=False
    )


@pytest.mark.parametrize(
    ("space", "options", "said"),
    [
        (spaces.Dict({"a": BOX}), {}, "Dict"),
        (spaces.Tuple((BOX,)), {}, "Tuple"),
        (spaces.Text(5), {}, "Text"),
        (spaces.Graph(BOX, None), {}, "Graph"),
        (spaces.Sequence(BOX), {}, "Sequence"),
        (spaces.Discrete(2), {"distribution": "squashed"}, r"distribution.*Discrete"),
        (spaces.MultiBinary(2), {"state_dependent_std": True}, r"state_dependent_std.*MultiBinary"),
        (spaces.Discrete(2), {"initial_log_std": -1.0}, r"initial_log_std.*Discrete"),
        (spaces.Box(-np.inf, np.inf, (2,)), {"distribution": "squashed"}, r"distribution squashed needs finite.*Box"),
        (spaces.Box(0, np.inf, (2,)), {"distribution": "beta"}, r"distribution beta needs finite .* choose normal"),
        (BOX, {"distribution": "beta", "initial_log_std": -1.0}, r"initial_log_std .* distribution is beta"),
        (BOX, {"distribution": "beta", "state_dependent_std": True}, r"state_dependent_std .* distribution is beta"),
        (BOX, {"distribution": "gamma"}, r"distribution is 'gamma'|distribution is gamma"),
        (spaces.Box(0, np.inf, (2,)), {"distribution": "squashed"}, r"distribution squashed needs finite.*Box"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_an_action_space_that_it_cannot_take_is_named(space: spaces.Space, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Policy(OBSERVATIONS, space, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("space", [spaces.Dict({"a": BOX}), spaces.Graph(BOX, None), spaces.MultiBinary(3)])
@pytest.mark.parametrize("make", [Critic, lambda space: Policy(space, BOX)], ids=["critic", "policy"])
def test_an_observation_space_that_it_cannot_take_is_named(make: Any, space: spaces.Space) -> None:
    with pytest.raises(UserError, match=type(space).__name__):
        make(space)


@pytest.mark.parametrize("make", [Critic, lambda space, **o: Policy(space, spaces.Discrete(2), **o)])
@pytest.mark.parametrize(
    ("space", "obs", "size"),
    [
        (spaces.Box(0, 255, (4, 3, 2), np.int16), torch.randint(256, (5, 6, 4, 3, 2)), 24),
        (spaces.Box(-1, 1, (), np.float32), torch.randn(5, 6), 1),
        (spaces.Discrete(7, start=-2), torch.randint(-2, 5, (5, 6)), 7),
    ],
    ids=["rank 3", "rank 0", "discrete"],
)
def test_observations_of_any_rank_are_flattened_and_numbers_made_one_hot(
    make: Any, space: spaces.Space, obs: Tensor, size: int
) -> None:
    module = make(space)
    features = module.encode(obs)
    assert features.shape == (5, 6, size)
    if isinstance(space, spaces.Discrete):
        assert torch.equal(features.argmax(-1), obs + 2)
        assert torch.equal(features.sum(-1), torch.ones(5, 6))
    out = module(obs)
    assert (out if isinstance(out, Tensor) else out.entropy()).shape == (5, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool])
def test_integers_give_the_same_numbers_as_their_floats(dtype: torch.dtype) -> None:
    policy = Policy(spaces.Box(0, 255, (4, 4), np.uint8), spaces.Discrete(3), hidden=(8,), orthogonal=False)
    obs = torch.randint(256, (2, 3, 4, 4)).to(dtype)
    assert torch.equal(policy(obs).entropy(), policy(obs.float()).entropy())


def test_a_policy_of_another_precision_takes_observations_of_its_own() -> None:
    policy = Policy(OBSERVATIONS, spaces.Discrete(3)).double()
    assert policy(torch.zeros(1, 1, 3, dtype=torch.float64)).entropy().dtype == torch.float64


@every_policy
def test_a_description_survives_json_and_rebuilds_the_policy(name: str) -> None:
    policy = made(name)
    text = json.dumps(policy.description, allow_nan=False)
    again = Policy.from_description(json.loads(text))
    again.load_state_dict(policy.state_dict())
    assert again.description == policy.description
    obs = torch.randn(4, 3, 3)
    a: Any = policy(obs)
    b: Any = again(obs)
    assert torch.equal(a.mode, b.mode)
    assert torch.equal(a.entropy(), b.entropy())
    np.testing.assert_array_equal(a.to_environment(a.mode[:, 0]), b.to_environment(b.mode[:, 0]))


def test_hidden_says_how_many_layers_there_are_and_how_wide() -> None:
    for hidden in ((), (5,), (7, 6)):
        for module in (Policy(OBSERVATIONS, spaces.Discrete(2), hidden=hidden), Critic(OBSERVATIONS, hidden=hidden)):
            layers = [x for x in module.network if isinstance(x, nn.Linear)]
            assert tuple(x.out_features for x in layers[:-1]) == hidden


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_stands_between_the_layers(activation: str) -> None:
    module = Critic(OBSERVATIONS, hidden=(4, 4), activation=activation)
    assert [type(x) for x in module.network] == [nn.Linear, ACTIVATIONS[activation]] * 2 + [nn.Linear]


def test_orthogonal_layers_have_the_gains_of_the_field(float64: None) -> None:
    for module, last in (
        (Policy(OBSERVATIONS, spaces.Discrete(3), hidden=(8, 8)), 0.01),
        (Critic(OBSERVATIONS, hidden=(8, 8)), 1.0),
    ):
        *first, end = [x.weight for x in module.network if isinstance(x, nn.Linear)]
        for weight, gain in (*((w, 2**0.5) for w in first), (end, last)):
            square = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)))
        assert all((x.bias == 0).all() for x in module.network if isinstance(x, nn.Linear))


def test_without_orthogonal_the_layers_are_torchs_own() -> None:
    torch.manual_seed(3)
    module = Policy(OBSERVATIONS, spaces.Discrete(2), hidden=(4,), orthogonal=False)
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def test_the_first_policy_is_nearly_uniform() -> None:
    p = Policy(OBSERVATIONS, spaces.Discrete(4))(torch.randn(100, 1, 3))
    torch.testing.assert_close(p.probs, torch.full((100, 1, 4), 0.25), rtol=0, atol=0.02)


# Units


@pytest.mark.parametrize(("low", "high"), [(0.0, 1000.0), (-2.0, 2.0), (99.0, 101.0), (-1e-6, 1e-6), (-1e6, 0.0)])
def test_a_gaussian_explores_the_same_share_of_any_range(low: float, high: float) -> None:
    space = spaces.Box(low, high, (1,), np.float64)
    for log_std in (0.0, -2.0):
        distribution: Any = Policy(OBSERVATIONS, space, initial_log_std=log_std)(torch.zeros(1, 1, 3))
        u = torch.tensor([[-1.0], [-0.5], [0.0], [0.5], [1.0], [7.0]])
        share = (distribution.to_environment(u) - low) / (high - low)
        np.testing.assert_allclose(share[:, 0], [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-9)
        assert distribution.stddev.item() == pytest.approx(np.exp(log_std))


def test_between_minus_1_and_1_the_action_is_the_gaussians_own_bit_for_bit() -> None:
    policy = Policy(OBSERVATIONS, spaces.Box(-1, 1, (2,), np.float32))
    distribution: Any = policy(torch.randn(50, 1, 3))
    u = distribution.sample()[:, 0]
    np.testing.assert_array_equal(distribution.to_environment(u), u.clamp(-1, 1).numpy())


@pytest.mark.parametrize("distribution", ["normal", "squashed"])
@pytest.mark.parametrize("log_std", [-20.0, -3.0, 3.0, 10.0])
def test_the_initial_standard_deviation_is_effective_and_can_be_learned(log_std: float, distribution: str) -> None:
    for state_dependent in (False, True):
        options: dict[str, Any] = {"distribution": distribution, "state_dependent_std": state_dependent}
        policy = Policy(OBSERVATIONS, BOX, hidden=(4,), initial_log_std=log_std, **options)
        made: Any = policy(torch.randn(5, 1, 3))
        base = made.normal if distribution == "squashed" else made
        torch.testing.assert_close(base.stddev.log(), torch.full((5, 1, 2), log_std), atol=0.1, rtol=0)
        base.entropy().sum().backward()
        last: Any = policy.network[-1].bias
        slope = last.grad[2:] if state_dependent else policy.head.log_std.grad
        torch.testing.assert_close(slope, torch.full((2,), 5.0))


@pytest.mark.parametrize("log_std", [-20.1, 10.1, np.nan, np.inf])
def test_a_standard_deviation_beyond_its_bounds_is_refused(log_std: float) -> None:
    with pytest.raises(UserError, match=r"initial_log_std is .* between -20 and 10"):
        Policy(OBSERVATIONS, BOX, initial_log_std=log_std)


def test_squashing_onto_bounds_that_no_number_reaches_is_refused() -> None:
    with pytest.raises(UserError, match="distribution squashed needs finite bounds"):
        Policy(OBSERVATIONS, spaces.Box(-3.4e38, 3.4e38, (2,), np.float32), distribution="squashed")


def rescaled(critic: Critic, *rewards: Tensor) -> Critic:
    for reward in rewards:
        critic.rescale(reward.square().mean())
    return critic


def test_a_critic_follows_the_size_of_the_rewards_and_keeps_its_values(float64: None) -> None:
    critic, obs = Critic(OBSERVATIONS, hidden=(8,)), torch.randn(5, 2, 3)
    first = critic(obs)
    assert first.abs().max() > 0.1
    rescaled(critic, torch.full((4,), -3.0))
    value = critic(obs)
    torch.testing.assert_close(value, 3 * first)
    for k in range(30):
        rescaled(critic, 100 * k + 5 * torch.randn(1000))
        torch.testing.assert_close(critic(obs), value)
    rescaled(critic, *[700 + 5 * torch.randn(1000) for _ in range(200)])
    torch.testing.assert_close(critic(obs), value)
    assert critic.scale.item() == pytest.approx(700, abs=1)


def test_the_first_rewards_set_the_scale_and_rewards_of_nothing_say_nothing(float64: None) -> None:
    critic = rescaled(Critic(OBSERVATIONS), torch.zeros(3), torch.tensor([torch.inf, 1.0]), torch.tensor([torch.nan]))
    assert critic.scale.item() == 1
    rescaled(critic, torch.tensor([3e-9, 4e-9]))
    assert critic.scale.item() == pytest.approx(12.5**0.5 * 1e-9)


def test_the_scale_of_a_critic_is_part_of_its_state() -> None:
    critic, obs = rescaled(Critic(OBSERVATIONS), torch.randn(9) + 50), torch.randn(5, 2, 3)
    nn.init.normal_(critic.network[-1].weight)  # type: ignore[arg-type]
    again = Critic(OBSERVATIONS)
    again.load_state_dict(critic.state_dict())
    assert torch.equal(again(obs), critic(obs))
    more = torch.randn(9)
    assert torch.equal(rescaled(again, more).scale, rescaled(critic, more).scale)


# What policy and critic share


PICTURE = spaces.Box(0, 255, (3, 5, 5), np.uint8)


def shared_pairs() -> list[Any]:
    """(policy, critic on its encoder, observations, the module that both have)."""
    pictures = torch.randint(0, 256, (4, 6, 3, 5, 5), dtype=torch.uint8)
    vectors = torch.randn(4, 6, 3)
    start = torch.rand(4, 6) < 0.3
    rows = Rows(vectors, start, torch.randn(4, 1, 5), torch.zeros(4, 1, 0))
    images = Policy(PICTURE, spaces.Discrete(3), hidden=())
    memory = Policy(spaces.Box(-1, 1, (3,)), spaces.Discrete(3), memory="gru", memory_size=5)
    return [
        (images, Critic(PICTURE, hidden=(), of=images), pictures, images.encode),
        (memory, Critic(spaces.Box(-1, 1, (3,)), of=memory), rows, memory.memory),
    ]


@pytest.mark.parametrize("case", [0, 1], ids=["encoder", "memory"])
def test_what_policy_and_critic_share_is_computed_once_and_has_the_gradient_of_both(case: int) -> None:
    policy, critic, obs, inner = shared_pairs()[case]
    action = torch.randint(0, 3, (4, 6))

    def gradients(distribution: Any, value: Tensor) -> list[Tensor]:
        total = distribution.log_prob(action).sum() + (value**2).sum()
        return list(torch.autograd.grad(total, [*policy.parameters(), *critic.network.parameters()]))

    expected = gradients(policy(obs), critic(obs))
    calls: list[int] = []
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(*both(policy, critic, obs))
    assert len(calls) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_critic_beside_another_policy_than_its_own_computes_its_own_layers() -> None:
    policy, critic, obs, _ = shared_pairs()[0]
    other = Policy(PICTURE, spaces.Discrete(3), hidden=())
    distribution, value = both(other, critic, obs)
    assert torch.equal(value, critic(obs))
    assert torch.equal(distribution.logits, other(obs).logits)
    assert not torch.equal(distribution.logits, policy(obs).logits)
