"""Token sequences: the list of completions, the tree, and the policy of tokens say the same."""

import pytest
import torch

from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return, kl_by_state, optimal_return, visitation
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, tabular
from policygrad.exact.tokens import (
    END,
    OnPrefixes,
    TokenWorld,
    completions,
    expected_reward,
    groups,
    log_likelihood,
    prefix_state,
    sequence_kl,
    token_world,
    tree,
)

WORLD = TokenWorld(2, 3, 3, lambda prompt, y: prompt + 0.1 * sum(y) - 0.3 * len(y) + float(y == (1, 2, END)))


def random_policy(seed):
    features = tabular(*tree(WORLD).reward.shape)
    return SoftmaxPolicy(features, torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def policy():
    return random_policy(0)


@pytest.fixture
def everything(policy):
    return completions(WORLD, probabilities(policy))


def test_every_completion_is_listed_once_with_its_probability(policy, everything):
    rollout, probability = everything
    said = {(int(x[0]), *y[m].tolist()) for x, y, m in zip(rollout.obs, rollout.action, rollout.mask, strict=True)}
    assert len(said) == len(probability) == 2 * (1 + 2 + 4 * 3)  # END, aEND, and aa followed by any of three
    logp = OnPrefixes(WORLD, policy)(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0).sum(1)
    torch.testing.assert_close(probability, logp.exp().detach() / 2)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-14)


def test_a_cut_completion_has_no_end_in_it(everything):
    rollout, _ = everything
    cut = (rollout.mask.sum(1) == 3) & (rollout.action[:, 2] != END)
    assert cut.sum() == 2 * 8
    assert (rollout.action.where(rollout.mask, 9)[cut] != END).all()
    by_hand = [WORLD.reward(int(g), tuple(y[m].tolist())) for g, y, m in
               zip(rollout.group, rollout.action, rollout.mask, strict=True)]  # fmt: skip
    torch.testing.assert_close(rollout.reward.sum(1), torch.tensor(by_hand))


def test_list_and_tree_have_the_same_j_and_kl_and_their_gradients(policy, everything):
    rollout, _ = everything
    states, prompt = prefix_state(WORLD, rollout.obs), torch.full((len(rollout.mask),), 0.5)
    reference, world = probabilities(random_policy(1)).detach(), tree(WORLD)
    log_p = log_likelihood(rollout, probabilities(policy), states)
    j, kl = (
        expected_reward(log_p, prompt, rollout.reward.sum(1)),
        sequence_kl(log_p, log_likelihood(rollout, reference, states), prompt),
    )
    probs = probabilities(policy)
    of_tree = expected_return(world, probs), visitation(world, probs, 1.0) @ kl_by_state(probs, reference)
    for listed, solved in ((j, of_tree[0]), (kl, of_tree[1])):
        torch.testing.assert_close(listed, solved)
        gradients = [torch.autograd.grad(x, policy.theta, retain_graph=True)[0] for x in (listed, solved)]
        torch.testing.assert_close(*gradients)


def test_the_policy_sees_the_whole_prefix_and_nothing_behind_it(policy):
    model = OnPrefixes(WORLD, policy)
    obs = torch.tensor([[3, 1, 2], [3, 2, 2], [3, 1, 1]])
    logits = model(obs).logits
    assert not torch.equal(logits[0, 2], logits[1, 2])  # the same last token after another first
    assert torch.equal(logits[0, :2], logits[2, :2])  # causal
    assert OnPrefixes(WORLD, TabularCritic(torch.arange(26.0)))(obs).shape == (3, 3)


def test_groups_are_of_one_prompt_and_sum_to_one(everything):
    rollout, probability = everything
    index, weight = groups(rollout, probability, 2)
    assert len(index) == 2 * 15**2
    assert (rollout.group[index][:, 0] == rollout.group[index][:, 1]).all()
    assert float(weight.sum()) == pytest.approx(1, abs=1e-14)
    shares = torch.zeros(len(probability)).index_add(0, index[:, 0], weight)
    torch.testing.assert_close(shares, probability)  # what a member is, alone


def test_too_large_is_refused(everything):
    with pytest.raises(UserError, match="prefixes are too many"):
        tree(TokenWorld(3, 50, 6, lambda prompt, y: 0.0))
    with pytest.raises(UserError, match="too many"):
        groups(*everything, 6)


def test_the_usual_world_can_be_solved():
    assert optimal_return(tree(token_world())) == pytest.approx(1.5)
