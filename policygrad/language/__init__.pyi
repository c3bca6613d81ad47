"""Hugging Face causal language models as policies: the model, generation, rewards, data, and the sampler."""

from policygrad.language import (
    arithmetic as arithmetic,
    conversations as conversations,
    data as data,
    distributions as distributions,
    evaluation as evaluation,
    games as games,
    generation as generation,
    lookup as lookup,
    models as models,
    policies as policies,
    reward_models as reward_models,
    rewards as rewards,
    sampler as sampler,
    sandbox as sandbox,
    tasks as tasks,
    tools as tools,
    warmup as warmup,
)
from policygrad.language.data import load_examples as load_examples, load_preferences as load_preferences
from policygrad.language.distributions import TokenDistribution as TokenDistribution
from policygrad.language.evaluation import (
    Evaluation as Evaluation,
    evaluate_policy as evaluate_policy,
    pass_at_k as pass_at_k,
)
from policygrad.language.completions import Completions as Completions, Engine as Engine, Request as Request
from policygrad.language.conversations import Dialogue as Dialogue, Environment as Environment
from policygrad.language.generation import generate as generate
from policygrad.language.models import (
    load_model as load_model,
    load_tokenizer as load_tokenizer,
    save_model as save_model,
    stop_tokens as stop_tokens,
)
from policygrad.language.policies import (
    LanguagePolicy as LanguagePolicy,
    Prefixes as Prefixes,
    ValueModel as ValueModel,
    reference_of as reference_of,
)
from policygrad.language.reward_models import RewardModel as RewardModel
from policygrad.language.rewards import (
    Rewards as Rewards,
    exact_match as exact_match,
    load_reward as load_reward,
    math_equal as math_equal,
)
from policygrad.language.sampler import CompletionSampler as CompletionSampler, Prompts as Prompts
