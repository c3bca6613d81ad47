"""Memory: cells by their definition, rows as steps one by one, resets, the states that rollouts keep, and gradients."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from probes import Counting
from torch import Tensor, nn
from torch.distributions import Categorical

import policygrad as pg
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.control import Critic, Policy, Sampler
from policygrad.control.acting import Mode
from policygrad.control.memory import GRU, LSTM, Memory, Rows, Transformer, make_memory, measured_memory, rows_of
from policygrad.credit import bootstrapped
from policygrad.critics import bootstrap_values
from policygrad.errors import UserError
from policygrad.linalg import fisher_vector_product, flat_gradient
from policygrad.rollout import Batch, Rollout, decisions, minibatches, state_size

KINDS = ["gru", "lstm", "transformer"]
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", MODES)
HOW: dict[str, Any] = {"memory_size": 4, "memory_window": 3, "hidden": (5,)}
BOX, TWO = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Discrete(2)


def larger(module: nn.Module) -> Any:
    """The module with parameters at which everything matters: a small last layer would hide the memory."""
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data = torch.empty_like(p).normal_(generator=generator)
    return module.eval()


def policy_of(kind: str, **options: Any) -> Policy:
    return larger(Policy(BOX, TWO, memory=kind, **HOW, **options))


def critic_of(kind: str, **options: Any) -> Critic:
    return larger(Critic(BOX, memory=kind, **HOW, **options))


def counting(mode: AutoresetMode = AutoresetMode.NEXT_STEP, count: int = 2) -> VectorEnv:
    lengths = [(2, 3), (4,), (1, 1, 5)]
    makers = [partial(Counting, lengths[i % 3]) for i in range(count)]
    return SyncVectorEnv(makers, autoreset_mode=mode)


# The memories themselves


def cell_by_cell(layer: Any, features: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own cell with the layer's parameters, which begins with zeros where an episode starts."""
    pairs, found = isinstance(layer, nn.LSTM), []
    cell = (nn.LSTMCell if pairs else nn.GRUCell)(layer.input_size, layer.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): x for name, x in layer.state_dict().items()})
    for t in range(features.shape[1]):
        state = state.where(~start[:, t : t + 1], 0.0)
        after: Any = cell(features[:, t], state.chunk(2, -1) if pairs else state)
        state = torch.cat(after, -1) if pairs else after
        found.append(after[0] if pairs else after)
    return torch.stack(found, 1), state


@pytest.mark.parametrize("make", [GRU, LSTM])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_layer_is_torchs_cell_step_by_step(make: Callable[..., Any], share: float, float64: None) -> None:
    """Step by step, and by the kernel of whole sequences: the same features, and the same gradients of everything."""
    memory = larger(make(3, 4))
    features, start = torch.randn(5, 7, 3, requires_grad=True), torch.rand(5, 7) < share
    state = torch.randn(5, memory.state_size, requires_grad=True)
    expected = cell_by_cell(memory.layer, features, start, state)
    for x, y in zip(memory.unrolled(features, start, state), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(memory(features, start, state), expected[0], rtol=0, atol=1e-13)
    leaves, weight = [features, state, *memory.parameters()], torch.randn(5, 7, 4)
    gradients = [
        torch.autograd.grad((found * weight).sum(), leaves)
        for found in (memory.unrolled(features, start, state)[0], memory(features, start, state))
    ]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [GRU, LSTM])
def test_the_kernel_of_float32_agrees_with_its_steps(make: Callable[..., Any]) -> None:
    memory = make(3, 8)
    features, start = torch.randn(5, 40, 3), torch.rand(5, 40) < 0.1
    state = torch.rand(5, memory.state_size)
    found, expected = memory(features, start, state), memory.unrolled(features, start, state)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=40 * torch.finfo().eps * 8)


def test_a_window_is_attention_to_the_last_steps_of_the_episode(float64: None) -> None:
    """The definition written out: two blocks, each over the last steps of the episode, in loops."""
    memory, steps = larger(Transformer(3, 4, window=3)), 9
    features, start = torch.randn(1, steps, 3), torch.zeros(1, steps, dtype=torch.bool)
    start[0, [0, 5]] = True
    x = memory.embed(features)[0]
    for block in memory.blocks:
        after = []
        for t in range(steps):
            first = max(t - 2, 5 if t >= 5 else 0)
            seen = block.norm(x[first : t + 1])
            q = block.query(block.norm(x[t])).view(block.heads, -1)
            k, v = (y.reshape(len(seen), block.heads, -1) for y in block.keys(seen).chunk(2, -1))
            heads = []
            for h in range(block.heads):
                ago = [t - i for i in range(first, t + 1)]
                share = (k[:, h] @ q[h] / math.sqrt(q.shape[1]) + block.bias[h, ago]).softmax(0)
                heads.append(share @ v[:, h])
            y = x[t] + block.out(torch.cat(heads))
            after.append(y + block.narrow(block.wide(block.norm_after(y)).relu()))
        x = torch.stack(after)
    found = memory(features, start, torch.zeros(1, memory.state_size))
    torch.testing.assert_close(found[0], x, rtol=0, atol=1e-12)


def memories() -> dict[str, Memory]:
    return {kind: larger(make_memory(kind, 3, 4, 3, True)) for kind in KINDS}


@each_kind
def test_a_row_is_its_steps_one_by_one_or_in_pieces(kind: str, float64: None) -> None:
    memory = memories()[kind]
    features, start = torch.randn(5, 8, 3), torch.rand(5, 8) < 0.3
    state = memory.unrolled(
        torch.randn(5, 6, 3), torch.zeros(5, 6, dtype=torch.bool), torch.zeros(5, memory.state_size)
    )[1]
    whole, last = memory.unrolled(features, start, state)
    for size in (1, 3, 4):
        parts, now = [], state
        for x, begins in zip(features.split(size, 1), start.split(size, 1), strict=True):
            found, now = memory.unrolled(x, begins, now)
            parts.append(found)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(now, last, rtol=0, atol=1e-12)
    assert not torch.allclose(memory(features, start, torch.zeros_like(state))[~start[:, 0], 0], whole[~start[:, 0], 0])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_row_with_resets_is_its_steps_to_the_bit(kind: str) -> None:
    """Where the inputs' projection is exact, in eighths, all else is the same operations on the same shapes."""
    memory = memories()[kind]
    for p in (memory.layer.weight_ih_l0, memory.layer.bias_ih_l0):
        p.data = (8 * p.data).round() / 8
    features, start = torch.randint(-8, 9, (5, 9, 3)) / 8, torch.rand(5, 9) < 0.3
    state = torch.rand(5, memory.state_size)
    whole, last = memory.unrolled(features, start, state)
    for t in range(9):
        found, state = memory.unrolled(features[:, t : t + 1], start[:, t : t + 1], state)
        assert torch.equal(found[:, 0], whole[:, t])
    assert torch.equal(state, last)


@each_kind
def test_nothing_passes_a_start_to_the_bit(kind: str) -> None:
    """Whatever came before, in the row or in its state: from a start on, every bit is the same, and so is the end."""
    memory = memories()[kind]
    features, start = torch.randn(4, 9, 3), torch.zeros(4, 9, dtype=torch.bool)
    start[:, 4] = True
    other = torch.cat([torch.randn(4, 4, 3), features[:, 4:]], 1)
    found, last = memory.unrolled(features, start, torch.zeros(4, memory.state_size))
    changed, last_changed = memory.unrolled(other, start, torch.rand(4, memory.state_size))
    assert torch.equal(found[:, 4:], changed[:, 4:])
    assert not torch.equal(found[:, :4], changed[:, :4])
    assert torch.equal(found[:, -1], changed[:, -1])
    assert torch.equal(last, last_changed)


def test_a_window_forgets_and_torchs_cells_do_not() -> None:
    steps = 12
    for kind, memory in memories().items():
        features, start = torch.randn(1, steps, 3), torch.zeros(1, steps, dtype=torch.bool)
        features.requires_grad_(True)
        found = memory(features, start, torch.zeros(1, memory.state_size))
        (gradient,) = torch.autograd.grad(found[0, -1].sum(), features)
        reach = gradient[0].abs().sum(-1) > 0
        assert not reach[: steps - 5].any() if kind == "transformer" else reach.all()
        assert reach[steps - 5 :].all()


# Policies and critics


@each_kind
def test_observations_alone_are_rows_that_start_an_episode(kind: str) -> None:
    policy, critic, obs = policy_of(kind), critic_of(kind), torch.randn(3, 5, 2)
    start = torch.zeros(3, 5, dtype=torch.bool)
    start[:, 0] = True
    garbage = [torch.rand(3, 1, state_size(module)) for module in (policy, critic)]
    rows = Rows(obs, start, *garbage)
    torch.testing.assert_close(policy(obs).logits, policy(rows).logits)
    torch.testing.assert_close(critic(obs), critic(rows))


def test_a_critic_has_memory_of_its_own_or_the_policys_or_none() -> None:
    policy = policy_of("gru")
    own, shared, none = critic_of("lstm"), larger(Critic(BOX, of=policy, hidden=(5,))), critic_of("none")
    assert [state_size(x) for x in (own, shared, none)] == [8, 0, 0]
    assert shared.memory is policy.memory
    assert shared.encode is policy.encode
    rows = rows_of(torch.randn(3, 5, 2), 4)._replace(start=torch.zeros(3, 5, dtype=torch.bool))
    states = [torch.rand(3, 1, 4), torch.rand(3, 1, 8)]
    for critic, changes in ((own, [False, True]), (shared, [True, False]), (none, [False, False])):
        value = critic(rows._replace(state=0 * states[0], critic_state=0 * states[1]))
        for i, name in enumerate(("state", "critic_state")):
            other = rows._replace(state=0 * states[0], critic_state=0 * states[1])._replace(**{name: states[i]})
            assert torch.equal(critic(other), value) != changes[i]


# What a rollout keeps


def relived(rollouts: list[Rollout], module: Any, of: str) -> Tensor:
    """What a module says of rollouts that follow each other, in one pass over all of their steps."""
    obs, start = (torch.cat([getattr(x.obs, name) for x in rollouts], 1) for name in ("obs", "start"))
    rows = Rows(obs, start, *(torch.zeros(len(obs), 1, state_size(module)) for _ in range(2)))
    found = module(rows)
    return found if of == "value" else found.log_prob(torch.cat([x.action for x in rollouts], 1))


@each_mode
@each_kind
@pytest.mark.parametrize("pieces", [1, 3])
def test_segments_go_on_with_the_memory_of_before(kind: str, mode: AutoresetMode, pieces: int) -> None:
    """Log-probabilities of whole rows, of pieces, and of two rollouts in one go are those of acting; so are values."""
    policy, critic = policy_of(kind), critic_of(kind)
    sampler = Sampler(counting(mode, 3), 6, seed=0, sequence_length=6 // pieces, critic=critic)
    rollouts = [sampler(policy) for _ in range(3)]
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-4)
    for rollout in rollouts:
        assert rollout.obs.state.shape == (3, pieces, policy.memory.state_size)
        close(policy(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0), rollout.logp)
        batch = decisions(rollout, torch.ones_like(rollout.logp), critic(rollout.obs))
        assert batch.mask.shape == (3 * pieces, 6 // pieces)
        close(policy(batch.obs).log_prob(batch.action).where(batch.mask, 0.0), batch.logp)
        close(critic(batch.obs).where(batch.mask, 0.0), batch.advantage)
    if mode is AutoresetMode.NEXT_STEP:  # no steps are dropped between rollouts
        logp = torch.cat([x.logp for x in rollouts], 1)
        mask = torch.cat([x.mask for x in rollouts], 1)
        close(relived(rollouts, policy, "logp").where(mask, 0.0), logp)
        values = [bootstrap_values(critic, x) for x in rollouts]
        close(relived(rollouts, critic, "value"), torch.cat([x[:, :-1] for x in values], 1))
        for one, other in pairwise(values):  # where a row stops, the next one goes on
            close(one[:, -1], other[:, 0])


@each_kind
def test_both_ways_of_resetting_give_the_same_rows(kind: str) -> None:
    """Same steps, states and values, as far as the rows of the first rollout reach; and what comes after them."""
    found = []
    for mode in MODES:
        policy, critic = policy_of(kind), critic_of(kind)
        sampler = Sampler(counting(mode, 3), 12, sequence_length=4, critic=critic, seed=1)
        rollout = sampler(policy.requires_grad_(False))
        found.append((rollout, bootstrap_values(critic, rollout)))
    (one, values), (other, other_values) = found
    assert torch.equal(one.obs.obs, other.obs.obs)
    assert torch.equal(one.obs.start, other.obs.start)
    assert torch.equal(one.mask, other.mask)
    read = torch.cat([torch.ones_like(one.mask), one.mask[:, -1:]], 1)  # after a step that only resets, V is not read
    torch.testing.assert_close(values[read], other_values[read], rtol=0, atol=1e-4)
    starts = one.obs.start[:, ::4]
    for name in ("state", "critic_state"):
        x, y = (getattr(r.obs, name)[~starts] for r in (one, other))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_an_end_is_valued_with_the_memory_of_its_episode() -> None:
    """The masked step after an end goes on with the episode's memory, and the step after that starts anew."""
    policy, critic = policy_of("gru"), critic_of("gru")
    rollout = Sampler(SyncVectorEnv([partial(Counting, (3,), (True,))]), 8, critic=critic, seed=0)(policy)
    assert rollout.obs.start[0].tolist() == [True, False, False, False, True, False, False, False]
    assert rollout.mask[0].tolist() == [True, True, True, False, True, True, True, False]
    alone = rows_of(rollout.obs.obs[:, :4], 4)
    torch.testing.assert_close(critic(rollout.obs)[:, :4], critic(alone))
    assert rollout.final_obs.start.tolist() == [True]


@each_kind
def test_whole_episodes_start_with_an_empty_memory(kind: str) -> None:
    policy = policy_of(kind)
    sampler = Sampler(counting(count=3), 7, whole_episodes=True, seed=0)
    for _ in range(2):
        rollout = sampler(policy)
        assert rollout.obs.start[:, 0].all()
        alone = policy(rollout.obs.obs).log_prob(rollout.action)
        for i, n in enumerate(rollout.mask.sum(1).tolist()):
            torch.testing.assert_close(alone[i, :n], rollout.logp[i, :n], rtol=0, atol=1e-4)
    joined = Rollout.join([sampler(policy), sampler(policy)])
    assert joined.obs.state.shape == (6, 1, policy.memory.state_size)
    torch.testing.assert_close(
        policy(joined.obs).log_prob(joined.action).where(joined.mask, 0.0), joined.logp, rtol=0, atol=1e-4
    )


def test_the_state_of_a_sampler_has_the_memory() -> None:
    policy, critic = policy_of("lstm"), critic_of("gru")
    sampler = Sampler(counting(), 3, critic=critic, seed=0)
    sampler(policy)
    state = sampler.state_dict()
    assert [x.shape[1] for x in state["states"]] == [8, 4]
    following = sampler(policy).obs
    sampler.load_state_dict(state)
    sampler.stepping.begun = True
    assert torch.equal(sampler.states[0].unsqueeze(1), following.state)
    assert torch.equal(sampler.states[1].unsqueeze(1), following.critic_state)


# Gradients


def test_the_gradient_is_that_of_the_expected_return_of_a_task_that_needs_memory(float64: None) -> None:
    """A sign, then nothing, then a choice: J by all rows that can be, and PPO's gradient as their expectation."""
    for kind in KINDS:
        policy = larger(Policy(spaces.Box(-1, 1, (2,)), TWO, memory=kind, **HOW)).train()
        signs, steps = torch.tensor([1.0, -1.0]), 3
        actions = torch.tensor(list(itertools.product(range(2), repeat=steps))).repeat(2, 1)
        sign = signs.repeat_interleave(2**steps)
        obs = torch.zeros(len(sign), steps, 2)
        obs[:, 0, 0], obs[:, :, 1] = sign, torch.arange(float(steps))
        right = (actions[:, -1] == (sign > 0)).double() + 0.5 * (actions[:, 0] == 1).double()
        logp = policy(obs).log_prob(actions)
        exact = (logp.sum(1).exp() * right / 2).sum()
        gradient = flat_gradient(exact, list(policy.parameters()))
        weight = (logp.sum(1).exp() / 2).detach().unsqueeze(1).expand(-1, steps)
        advantage = right.unsqueeze(1).expand(-1, steps)
        mask = torch.ones_like(actions, dtype=torch.bool)
        nothing = torch.zeros_like(weight)
        batch = Batch(
            rows_of(obs, state_size(policy)), actions, logp.detach(), mask, weight, advantage, nothing, nothing
        )
        found, _ = PPOObjective(policy, None)(batch)
        estimate = flat_gradient(found, list(policy.parameters()))
        torch.testing.assert_close(estimate, gradient, rtol=0, atol=1e-12)
        assert gradient.norm() > 1e-3


@each_kind
def test_a_fisher_vector_product_goes_through_time(kind: str, float64: None) -> None:
    """That of all actions' scores, written out: F v = E sum_a p(a) grad log p(a) (grad log p(a) . v)."""
    policy = larger(Policy(BOX, TWO, memory=kind, **HOW))
    parameters = list(policy.parameters())
    obs = rows_of(torch.randn(2, 4, 2), state_size(policy))
    obs.start[:, 2] = True
    weight = torch.full((2, 4), 1 / 8)
    nothing, ones = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    batch = Batch(obs, torch.zeros(2, 4), nothing, ones, weight, nothing, nothing, nothing)
    product = fisher_vector_product(SurrogateObjective(policy).divergence(batch), parameters)
    v = torch.randn(sum(p.numel() for p in parameters))
    logp = policy(obs).logits.flatten(0, 1)  # log-probabilities
    expected = torch.zeros_like(v)
    for row in logp:
        for one in row:
            score = flat_gradient(one, parameters, retain_graph=True)
            expected += one.exp().detach() * score * (score @ v) / 8
    torch.testing.assert_close(product(v), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [GRU, LSTM])
def test_the_kernel_of_float32_has_a_second_derivative(make: Callable[..., Any]) -> None:
    """oneDNN has a kernel of its own for an LSTM of float32: a Fisher-vector product takes its gradient twice."""
    memory = larger(make(3, 16))
    features, start, state = torch.randn(4, 20, 3), torch.rand(4, 20) < 0.1, torch.zeros(4, memory.state_size)
    parameters, found = list(memory.parameters()), []
    v = torch.randn(sum(p.numel() for p in parameters))
    for y in (memory(features, start, state), memory.unrolled(features, start, state)[0]):
        gradient = flat_gradient(y.square().mean(), parameters, create_graph=True)
        found.append(flat_gradient(gradient @ v, parameters))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


def test_minibatches_are_whole_rows_or_pieces() -> None:
    policy, critic = policy_of("gru"), critic_of("gru")
    sampler = Sampler(counting(count=3), 6, sequence_length=2, critic=critic, seed=0)
    rollout = sampler(policy)
    batch = decisions(rollout, torch.ones_like(rollout.logp), *bootstrapped(critic, torch_gae)(rollout))
    for part in minibatches(batch, 4):
        assert part.mask.shape == (4, 2)
        assert part.obs.state.shape == (4, 1, 4)
        close = policy(part.obs).log_prob(part.action).where(part.mask, 0.0)
        torch.testing.assert_close(close, part.logp.where(part.mask, 0.0), rtol=0, atol=1e-4)


def torch_gae(reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor) -> Tensor:
    return reward + value[:, 1:] - value[:, :-1]


# Acting


@each_kind
@pytest.mark.parametrize("greedy", [True, False])
def test_act_hands_the_memory_on(kind: str, greedy: bool) -> None:
    policy = policy_of(kind)
    rollout = Sampler(counting(), 6, whole_episodes=True, seed=0)(Mode(policy))
    state = None
    for t in range(int(rollout.mask[0].sum())):
        action, state = policy.act(rollout.obs.obs[0, t].numpy(), state, greedy=greedy)
        if greedy:
            assert action == rollout.action[0, t]
    assert state.shape == (1, policy.memory.state_size)
    batch, states = policy.act(rollout.obs.obs[:, 0].numpy())
    assert batch.shape == (2,)
    assert states.shape == (2, policy.memory.state_size)


def test_act_refuses_another_state() -> None:
    obs = np.zeros(2, np.float32)
    with pytest.raises(UserError, match=r"act got a state of \[2, 4\], and the memory is \[1, 4\]"):
        policy_of("gru").act(obs, torch.zeros(2, 4))
    with pytest.raises(UserError, match=r"act got a state of 3, and the memory is \[1, 4\]"):
        policy_of("gru").act(obs, 3)
    with pytest.raises(UserError, match="the policy has no memory"):
        policy_of("none").act(obs, torch.zeros(1, 4))


class Remembering(nn.Module):
    """A policy of one's own: it remembers the sum of all observations."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(2, 2)

    def initial(self, batch: int) -> Tensor:
        return torch.zeros(batch, 2)

    def unrolled(self, rows: Any) -> tuple[Categorical, Tensor]:
        rows, state, sums = rows_of(rows, 2), None, []
        state = rows.state[:, 0]
        for t in range(rows.obs.shape[1]):
            state = state.where(~rows.start[:, t : t + 1], 0.0) + rows.obs[:, t]
            sums.append(state)
        return Categorical(logits=self.logits(torch.stack(sums, 1))), state

    def forward(self, rows: Any) -> Categorical:
        return self.unrolled(rows)[0]


def test_a_policy_of_ones_own_may_remember() -> None:
    policy, sampler = Remembering(), Sampler(counting(), 5, seed=0)
    for _ in range(2):
        rollout = sampler(policy)
        logp = policy(rollout.obs).log_prob(rollout.action)
        torch.testing.assert_close(logp.where(rollout.mask, 0.0), rollout.logp)
    run = pg.train("reinforce", Counting, policy=Remembering(), steps=20, num_envs=2, episode_steps=5, progress=False)
    assert run.metrics


def test_a_memory_is_measured_before_it_is_made() -> None:
    for kind, memory in memories().items():
        weights = sum(p.numel() for p in memory.parameters())
        assert measured_memory(3, {"memory": kind, "memory_size": 4, "memory_window": 3}) == (weights, 4)
    assert measured_memory(3, {}) == (0, 3)
    for kind in ("gru", "lstm", "transformer"):  # of so many that torch cannot count the bytes
        weights, _ = measured_memory(3, {"memory": kind, "memory_size": 10**12, "memory_window": 3})
        assert weights > 10**18
    with pytest.raises(UserError, match="memory is nothing: choose none, gru, lstm or transformer"):
        make_memory("nothing", 3, 4, 3, True)
