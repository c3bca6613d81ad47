"""The world of control: Gymnasium environments, and policies for their spaces."""

from policygrad.control.environments import make_environments
from policygrad.control.policies import Critic, Policy
from policygrad.control.sampler import Sampler

__all__ = ["Critic", "Policy", "Sampler", "make_environments"]
