"""Small worlds in closed form: the ground truth for every estimator."""

from policygrad.exact import (
    closed_form as closed_form,
    enumeration as enumeration,
    environment as environment,
    expected as expected,
    policies as policies,
    sampler as sampler,
    tokens as tokens,
    worlds as worlds,
)
from policygrad.exact.closed_form import (
    action_value as action_value,
    advantage as advantage,
    expected_return as expected_return,
    fisher as fisher,
    lower_bound as lower_bound,
    mean_kl as mean_kl,
    natural_gradient as natural_gradient,
    optimal_return as optimal_return,
    performance_difference as performance_difference,
    policy_gradient as policy_gradient,
    state_value as state_value,
    visitation as visitation,
)
from policygrad.exact.enumeration import batches as batches, trajectories as trajectories
from policygrad.exact.environment import TabularEnv as TabularEnv
from policygrad.exact.policies import (
    SoftmaxPolicy as SoftmaxPolicy,
    TabularCritic as TabularCritic,
    probabilities as probabilities,
)
from policygrad.exact.sampler import EpisodeSampler as EpisodeSampler
from policygrad.exact.worlds import (
    World as World,
    bandit as bandit,
    chain as chain,
    cliff as cliff,
    garnet as garnet,
    two_states as two_states,
    with_clock as with_clock,
    with_history as with_history,
)
