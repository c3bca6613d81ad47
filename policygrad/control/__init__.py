"""The world of control: Gymnasium environments, and policies for their spaces."""

from policygrad.control.environments import label, make_environments
from policygrad.control.evaluation import Evaluation, evaluate
from policygrad.control.memoryless import has_memory, refuse_memory
from policygrad.control.normalization import ObservationNormalizer, RewardScaler
from policygrad.control.policies import Critic, Policy
from policygrad.control.sampler import Sampler
from policygrad.control.tensors import TensorEnvironments

__all__ = [
    "Critic",
    "Evaluation",
    "ObservationNormalizer",
    "Policy",
    "RewardScaler",
    "Sampler",
    "TensorEnvironments",
    "evaluate",
    "has_memory",
    "label",
    "make_environments",
    "refuse_memory",
]
