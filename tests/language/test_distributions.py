"""The distribution of the next token against torch's Categorical of whole logits, in one chunk and in many."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence
from torch.func import grad, vmap
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from policygrad.errors import UserError
from policygrad.language.distributions import TokenDistribution
from policygrad.linalg import fisher_vector_product, flat_gradient

B, T, H, V = 3, 5, 4, 11
# The most logits at once: fewer than a row's; a row; 2 rows, with a ragged last; 8 and 7 rows; just not all; all.
CHUNKS = [1, V, 2 * V + 3, 8 * V, B * T * V - 1, B * T * V]
ONE, MANY = CHUNKS[-1], CHUNKS[2]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias."""
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((B, T, H), (V, H), (V,)))


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0) -> Categorical:
    """What it must be equal to."""
    return Categorical(logits=linear(hidden, weight, bias) / temperature, validate_args=False)


def actions() -> Tensor:
    return torch.randint(V, (B, T))


def gradients(value: Tensor, inputs: Any, by: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of a random linear functional."""
    by = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value) if by is None else by
    return torch.autograd.grad((value * by).sum(), inputs, materialize_grads=True)


def both(distribution: Any, action: Tensor) -> Tensor:
    return torch.stack([distribution.log_prob(action), distribution.entropy()])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_it_is_the_categorical_of_whole_logits(chunk: int, with_bias: bool, temperature: float) -> None:
    inputs, action = tensors()[: 3 if with_bias else 2], actions()
    found = both(TokenDistribution(*inputs, temperature=temperature, chunk=chunk), action)
    expected = both(whole(*inputs, temperature=temperature), action)
    assert_close(found, expected, **EXACT)
    assert_close(gradients(found, inputs), gradients(expected, inputs), **EXACT)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_divergence_is_the_categoricals_with_gradients_to_both_sides(chunk: int) -> None:
    p, q = tensors(), tensors()
    found = kl_divergence(
        TokenDistribution(*p, temperature=0.7, chunk=chunk), TokenDistribution(*q, temperature=1.3, chunk=ONE)
    )
    expected = kl_divergence(whole(*p, temperature=0.7), whole(*q, temperature=1.3))
    assert_close(found, expected, **EXACT)
    assert_close(gradients(found, p + q), gradients(expected, p + q), **EXACT)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_divergence_of_two_heads_on_one_trunk_sums_their_gradients(chunk: int) -> None:
    (hidden, weight, bias), other = tensors(), tensors()[1]
    found = kl_divergence(
        TokenDistribution(hidden, weight, bias, chunk=chunk), TokenDistribution(hidden, other, bias, chunk=chunk)
    )
    expected = kl_divergence(whole(hidden, weight, bias), whole(hidden, other, bias))
    inputs = (hidden, weight, other, bias)
    assert_close(gradients(found, inputs), gradients(expected, inputs), **EXACT)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_in_float32(chunk: int) -> None:
    inputs, action = tensors(torch.float32), actions()
    found, expected = both(TokenDistribution(*inputs, chunk=chunk), action), both(whole(*inputs), action)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_gradcheck(chunk: int) -> None:
    action = actions()
    assert gradcheck(lambda *x: both(TokenDistribution(*x, temperature=0.8, chunk=chunk), action), tensors())
    q = tensors()
    assert gradcheck(
        lambda *x: kl_divergence(TokenDistribution(*x[:3], chunk=chunk), TokenDistribution(*x[3:], chunk=chunk)),
        (*tensors(), *q),
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_given_logits(chunk: int) -> None:
    logits, action = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True), actions()
    p = TokenDistribution.from_logits(logits, temperature=0.7, chunk=chunk)
    found, expected = both(p, action), both(Categorical(logits=logits / 0.7), action)
    assert_close(found, expected, **EXACT)
    assert_close(gradients(found, logits), gradients(expected, logits), **EXACT)
    hidden, weight, bias = tensors()
    found = kl_divergence(TokenDistribution(hidden, weight, bias, chunk=chunk), p)
    expected = kl_divergence(whole(hidden, weight, bias), Categorical(logits=logits / 0.7))
    assert_close(found, expected, **EXACT)
    assert_close(gradients(found, (logits, weight)), gradients(expected, (logits, weight)), **EXACT)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_probabilities_and_normalized_logits(chunk: int) -> None:
    inputs = tensors()
    p, expected = TokenDistribution(*inputs, temperature=0.7, chunk=chunk), whole(*inputs, temperature=0.7)
    assert (p.batch_shape, p.event_shape) == ((B, T), ())
    assert_close(p.logits, expected.logits, **EXACT)
    assert_close(p.probs, expected.probs, **EXACT)
    assert_close(gradients(p.logits, inputs), gradients(expected.logits, inputs), **EXACT)


# Where


@pytest.mark.parametrize("chunk", [1, MANY, 4 * V, ONE])
def test_what_stands_elsewhere_changes_nothing_and_gets_no_gradient(chunk: int) -> None:
    (hidden, weight, bias), other, action = tensors(), tensors(), actions()
    where = torch.rand(B, T) < 0.5
    where[0], where[1, 2] = False, True
    garbage = hidden.detach().where(where.unsqueeze(-1), torch.nan).requires_grad_()
    tokens = action.where(where, -100)
    inputs, clean = (garbage, weight, bias), (hidden, weight, bias)
    by = torch.randn(3, B, T, dtype=torch.float64)

    def three(p: Any, q: Any, action: Tensor) -> Tensor:
        return torch.cat([both(p, action), kl_divergence(p, q)[None]])

    found = three(
        TokenDistribution(*inputs, where=where, chunk=chunk),
        TokenDistribution(*other, where=where, chunk=chunk),
        tokens,
    )
    expected = three(whole(*clean), whole(*other), action).where(where, 0)
    assert_close(found, expected, **EXACT)
    assert (found[:, ~where] == 0).all()
    changed = gradients(found, (*inputs, *other), by)
    assert_close(changed, gradients(expected, (*clean, *other), by), **EXACT)
    assert (changed[0][~where] == 0).all()
    sample = TokenDistribution(*inputs, where=where, chunk=chunk).sample((7,))
    assert (sample[:, ~where] == 0).all()
    assert sample[:, where].any()


@pytest.mark.parametrize("chunk", [1, ONE])
def test_a_divergence_is_taken_where_both_are_computed(chunk: int) -> None:
    p, q = tensors(), tensors()
    expected = kl_divergence(whole(*p), whole(*q))
    here, there = torch.rand(B, T) < 0.6, torch.rand(B, T) < 0.6
    for a, b in ((here, there), (here, None), (None, there)):
        found = kl_divergence(TokenDistribution(*p, where=a, chunk=chunk), TokenDistribution(*q, where=b, chunk=chunk))
        both = (here if a is not None else True) & (there if b is not None else torch.tensor(True))
        assert_close(found, expected.where(both, 0), **EXACT)


@pytest.mark.parametrize("chunk", [1, ONE])
def test_nowhere(chunk: int) -> None:
    inputs, nowhere = tensors(), torch.zeros(B, T, dtype=torch.bool)
    p = TokenDistribution(*inputs, where=nowhere, chunk=chunk)
    found = both(p, torch.full((B, T), -100))
    assert (found == 0).all()
    assert all((g == 0).all() for g in gradients(found, inputs))
    assert (p.sample() == 0).all()


# Derivatives beyond the first, and transforms


@pytest.mark.parametrize("chunk", [ONE, 2 * ONE])
def test_a_fisher_vector_product(chunk: int) -> None:
    hidden, weight, bias = tensors()
    v = torch.randn(weight.numel() + bias.numel(), dtype=torch.float64)
    with torch.no_grad():
        old = deepcopy(TokenDistribution(hidden, weight, bias, chunk=chunk))
    found = fisher_vector_product(
        lambda: kl_divergence(old, TokenDistribution(hidden, weight, bias, chunk=chunk)).mean(), [weight, bias]
    )(v)
    p = whole(hidden, weight, bias).probs.detach()
    # F = E[h h^T] (diag p - p p^T), with the bias as one more hidden unit that is always 1
    h = torch.cat([hidden.detach(), torch.ones(B, T, 1, dtype=torch.float64)], -1)
    direction = torch.cat([v[: V * H].view(V, H), v[V * H :, None]], 1)
    change = linear(h, direction)
    change = p * (change - (p * change).sum(-1, keepdim=True))
    product = torch.einsum("btv,bth->vh", change, h) / (B * T)
    assert_close(found, torch.cat([product[:, :H].reshape(-1), product[:, H]]), **EXACT)


def test_a_second_derivative_in_many_chunks_is_refused_rather_than_wrong() -> None:
    # Above a trunk it would not fail by itself: the trunk's own part of it would come out, alone.
    hidden, weight, bias = tensors()
    p = TokenDistribution(hidden.tanh(), weight, bias, chunk=MANY)
    with pytest.raises(UserError, match="chunk"):
        flat_gradient(p.entropy().sum(), [hidden], create_graph=True)


def test_gradients_per_row_by_vmap() -> None:
    (hidden, weight, bias), action = tensors(), actions()

    def of_row(weight: Tensor, hidden: Tensor, action: Tensor) -> Tensor:
        p = TokenDistribution(hidden[None], weight, bias)
        return (p.log_prob(action[None]) + 0.1 * p.entropy()).sum()

    found = vmap(grad(of_row), in_dims=(None, 0, 0))(weight, hidden, action)
    for row in range(B):
        p = whole(hidden[row], weight, bias)
        (expected,) = torch.autograd.grad((p.log_prob(action[row]) + 0.1 * p.entropy()).sum(), weight)
        assert_close(found[row], expected, **EXACT)


def trace() -> None:
    """One graph of all of it, or an error where it breaks."""
    p, q, action = tensors(), tensors(), actions()
    where = torch.rand(B, T) < 0.5
    p[0].data[~where], action[~where] = torch.nan, -100

    def objective(*inputs: Tensor) -> Tensor:
        distribution = TokenDistribution(*inputs, temperature=0.7, where=where)
        kl = kl_divergence(TokenDistribution(*q), distribution)
        return (distribution.log_prob(action).exp() + 0.1 * distribution.entropy() - kl).sum()

    expected = gradients(objective(*p), p, torch.ones(()))
    traced = torch.compile(objective, fullgraph=True, backend="aot_eager")
    assert_close(gradients(traced(*p), p, torch.ones(())), expected, **EXACT)
    functional = torch.compile(grad(objective, argnums=(0, 1, 2)), fullgraph=True, backend="eager")
    assert_close(functional(*p), expected, **EXACT)


def test_it_traces_into_one_graph() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    command = [sys.executable, "-c", "from tests.language.test_distributions import trace; trace()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# Sampling


@pytest.mark.parametrize("chunk", [1, MANY, ONE])
@pytest.mark.parametrize("many", [True, False])
def test_the_frequencies_of_samples_are_the_probabilities(many: bool, chunk: int) -> None:
    hidden, weight, bias = (x.detach().float() for x in tensors())
    p = TokenDistribution(hidden, weight, bias, temperature=1.5, chunk=chunk)
    n = 4_000
    if many:
        token = p.sample((n,))
    else:  # one for each of many equal rows
        rows = hidden[None].expand(n, B, T, H).reshape(n * B, T, H)
        token = TokenDistribution(rows, weight, bias, temperature=1.5, chunk=max(chunk, n * V)).sample().view(n, B, T)
    assert (token.dtype, token.shape) == (torch.long, (n, B, T))
    found = torch.nn.functional.one_hot(token, V).float().mean(0)
    std = (p.probs * (1 - p.probs) / n).sqrt()
    assert ((found - p.probs).abs() < 4.5 * std + 1 / n).all()


def test_samples_come_from_the_global_generator() -> None:
    p = TokenDistribution(*tensors(), chunk=MANY)
    state = torch.get_rng_state()
    first, second = p.sample(), p.sample()
    torch.set_rng_state(state)
    assert torch.equal(p.sample(), first)
    assert torch.equal(p.sample(), second)
    assert p.sample().shape == (B, T)
    assert p.sample((2, 6)).shape == (2, 6, B, T)


# What is kept, and copies


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass over the logits."""
    import policygrad.language.distributions as module

    done, evaluate = [], module._evaluate

    def counted(*args: Any) -> Any:
        done.append(1)
        return evaluate(*args)

    def counted_blocks(*args: Any) -> Any:
        done.append(1)
        return by_blocks(*args)

    by_blocks = module._ByVocabulary.apply
    monkeypatch.setattr(module, "_evaluate", counted)
    monkeypatch.setattr(module._ByVocabulary, "apply", counted_blocks)
    return done


@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_one_pass_computes_both(chunk: int, passes: list[int]) -> None:
    inputs, action = tensors(), actions()
    p, expected = TokenDistribution(*inputs, chunk=chunk), whole(*inputs)
    logp = p.log_prob(action)
    assert p.log_prob(action) is logp
    assert_close(p.entropy(), expected.entropy(), **EXACT)
    assert len(passes) == 1
    other = (action + 1) % V
    assert_close(p.log_prob(other), expected.log_prob(other), **EXACT)
    assert_close(p.log_prob(action), logp, **EXACT)
    assert len(passes) == 3
    q = TokenDistribution(*inputs, chunk=chunk)
    assert q.entropy() is q.entropy()
    assert_close(q.log_prob(action), logp, **EXACT)
    assert len(passes) == 5


@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_what_was_computed_without_a_graph_is_not_returned_for_one_with(chunk: int) -> None:
    inputs, action = tensors(), actions()
    p = TokenDistribution(*inputs, chunk=chunk)
    with torch.no_grad():
        assert not p.log_prob(action).requires_grad
        assert not p.entropy().requires_grad
    assert p.log_prob(action).requires_grad
    with torch.no_grad():
        assert not p.entropy().requires_grad
    assert p.entropy().requires_grad


@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_what_is_made_without_gradient_is_a_constant(chunk: int) -> None:
    inputs, other = tensors(), tensors()
    with torch.no_grad():
        reference = TokenDistribution(*inputs, chunk=chunk)
    assert not reference.log_prob(actions()).requires_grad
    kl_divergence(reference, TokenDistribution(*other, chunk=chunk)).sum().backward()
    assert all(x.grad is None for x in inputs)
    assert all(x.grad is not None for x in other)


@pytest.mark.parametrize("copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_a_copy_stays_when_the_weight_moves(chunk: int, copy: Callable[[Any], Any]) -> None:
    (hidden, weight, bias), action = tensors(), actions()
    with torch.no_grad():
        p = TokenDistribution(2 * hidden, weight, bias, temperature=0.7, where=action > 3, chunk=chunk)
    before = both(p, action)
    old = copy(p)
    with torch.no_grad():
        weight += 1
        bias *= 2
    assert_close(both(old, action), before)
    assert old.weight.data_ptr() != weight.data_ptr()
    assert (both(copy(p), action) - before).abs().max() > 0.01


def test_a_copy_leaves_results_behind() -> None:
    hidden, weight, bias = tensors()
    p = TokenDistribution(hidden.detach(), weight, bias)
    assert p.entropy().requires_grad  # a tensor inside a graph cannot be copied
    assert_close(deepcopy(p).entropy(), p.entropy())


# What is not computed


@pytest.mark.parametrize("chunk", [ONE, MANY])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_gradients_that_are_needed(trained: tuple[int, ...], chunk: int) -> None:
    inputs, action = tensors(), actions()
    for i, x in enumerate(inputs):
        x.requires_grad_(i in trained)
    both(TokenDistribution(*inputs, chunk=chunk), action).sum().backward()
    assert [x.grad is not None for x in inputs] == [i in trained for i in range(3)]
    expected = gradients(both(whole(*inputs), action), [inputs[i] for i in trained], torch.ones(()))
    assert_close(tuple(inputs[i].grad for i in trained), expected, **EXACT)


def test_no_sum_for_a_frozen_weight_and_one_in_place_for_a_trained_one() -> None:
    for train in (True, False):
        sizes = sizes_made(chunk=4 * VOCABULARY, train=train)
        assert sizes.count(VOCABULARY * WIDTH) == int(train)


def test_the_logits_are_never_whole() -> None:
    for at_once in (8 * VOCABULARY, ROWS * VOCABULARY):
        assert max(sizes_made(chunk=at_once, train=True)) == at_once


def test_an_entropy_nobody_asks_for_has_no_backward() -> None:
    counts = []
    for scale in (0.0, 1.0):
        hidden, weight, bias = tensors()
        p = TokenDistribution(hidden, weight, bias, chunk=MANY)
        gain = p.log_prob(actions()).sum()
        gain = gain if scale == 0 else gain + p.entropy().sum()
        with Allocations() as made:
            gain.backward()
        counts.append(sum(name.startswith("aten::mul_") for name in made.names))
    assert 2 * counts[0] == counts[1] > 0, "the entropy's gradient has a product of its own in every block"


class Allocations(TorchDispatchMode):
    """The operations, and the size of every tensor that one of them makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        if not func.is_view and not func._schema.is_mutable:
            self.sizes += [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


ROWS, VOCABULARY, WIDTH = 64, 1_000, 7


def sizes_made(*, chunk: int, train: bool) -> list[int]:
    """By forward and backward of a distribution."""
    hidden = torch.randn(2, ROWS // 2, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=train)
    action = torch.randint(VOCABULARY, (2, ROWS // 2))
    with Allocations() as made:
        p = TokenDistribution(hidden, weight, chunk=chunk, temperature=0.9)
        (p.log_prob(action) + p.entropy()).sum().backward()
    return made.sizes


# Other types


@pytest.fixture(params=[ONE, MANY])
def bfloat16(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, int]:
    return (*(x.bfloat16().detach().requires_grad_() for x in tensors()), request.param)


def test_bfloat16_is_raised_to_float32_before_the_softmax(bfloat16: tuple[Tensor, Tensor, Tensor, int]) -> None:
    *inputs, chunk = bfloat16
    action = actions()
    exact = tuple(x.detach().float().requires_grad_() for x in inputs)
    found, expected = both(TokenDistribution(*inputs, chunk=chunk), action), both(whole(*exact), action)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0.02, atol=0.04)
    changed = gradients(found, inputs)
    assert all(x.dtype == torch.bfloat16 for x in changed)
    assert_close(tuple(x.float() for x in changed), gradients(expected, exact), rtol=0.05, atol=0.1)


def test_a_float32_weight_under_a_bfloat16_trunk(bfloat16: tuple[Tensor, Tensor, Tensor, int]) -> None:
    hidden, weight, bias, chunk = bfloat16
    action, raised = actions(), weight.detach().float().requires_grad_()
    found = both(TokenDistribution(hidden, raised, bias, chunk=chunk), action)
    assert_close(found, both(TokenDistribution(hidden, weight, bias, chunk=chunk), action))
    (changed,) = gradients(found, (raised,))
    assert changed.dtype == torch.float32


@pytest.mark.parametrize("chunk", [ONE, MANY])
def test_autocast_changes_nothing(chunk: int) -> None:
    inputs, action = tensors(torch.float32), actions()
    expected = both(TokenDistribution(*inputs, chunk=chunk), action)
    with torch.autocast("cpu", torch.bfloat16):
        found = both(TokenDistribution(*inputs, chunk=chunk), action)
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=0, atol=0)


def test_a_bfloat16_weights_gradient_adds_up_in_float32() -> None:
    hidden, weight = torch.randn(1, 512, 8).bfloat16(), torch.randn(50, 8).bfloat16().requires_grad_()
    action = torch.randint(50, (1, 512))
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(whole(hidden.double(), exact).log_prob(action).sum(), exact)
    (found,) = torch.autograd.grad(TokenDistribution(hidden, weight, chunk=100).log_prob(action).sum(), weight)
    assert (found - expected).norm() / expected.norm() < 3e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        TokenDistribution(*tensors(), temperature=temperature)
