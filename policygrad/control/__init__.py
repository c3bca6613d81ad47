"""The world of control: Gymnasium environments, and policies for their spaces."""

from policygrad.control.environments import make_environments
from policygrad.control.evaluation import evaluate
from policygrad.control.normalization import ObservationNormalizer, RewardScaler
from policygrad.control.policies import Critic, Policy
from policygrad.control.sampler import Sampler

__all__ = ["Critic", "ObservationNormalizer", "Policy", "RewardScaler", "Sampler", "evaluate", "make_environments"]
