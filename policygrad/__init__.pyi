"""The public names. `__init__.py` imports each from where it stands here, at first use; type checkers read them here.

A module is a namespace, as in `policygrad.advantages.gae`. The methods at the end have no file of their own: each is a
line in the table of methods, put together by `assemble`.
"""

from typing import Protocol, Unpack

from torch import nn

from policygrad import (
    advantages as advantages,
    control as control,
    credit as credit,
    critics as critics,
    diagnostics as diagnostics,
    divergences as divergences,
    exact as exact,
    language as language,
    linalg as linalg,
    objectives as objectives,
    ranks as ranks,
    returns as returns,
    samplers as samplers,
    score as score,
    symmetry as symmetry,
    turns as turns,
    updates as updates,
    verify as verify,
    weights as weights,
)
from policygrad.advantages import gae as gae
from policygrad.algorithms.actor_critic import (
    ActorCriticObjective as ActorCriticObjective,
    actor_critic as actor_critic,
    off_policy_actor_critic as off_policy_actor_critic,
)
from policygrad.algorithms.grpo import GRPOObjective as GRPOObjective, grpo as grpo
from policygrad.algorithms.ppo import PPOObjective as PPOObjective, ppo as ppo
from policygrad.algorithms.reinforce import ReinforceObjective as ReinforceObjective, reinforce as reinforce
from policygrad.algorithms.trpo import SurrogateObjective as SurrogateObjective, npg as npg, trpo as trpo
from policygrad.control import (
    Critic as Critic,
    ObservationNormalizer as ObservationNormalizer,
    Policy as Policy,
    RewardScaler as RewardScaler,
    Sampler as Sampler,
    evaluate as evaluate,
    make_environments as make_environments,
)
from policygrad.credit import Credit as Credit
from policygrad.critics import fit_critic as fit_critic
from policygrad.divergences import AdaptiveCoefficient as AdaptiveCoefficient
from policygrad.errors import UserError as UserError
from policygrad.language.policies import (
    LanguagePolicy as LanguagePolicy,
    Prefixes as Prefixes,
    ValueModel as ValueModel,
    reference_of as reference_of,
)
from policygrad.language.rewards import Rewards as Rewards
from policygrad.language.sampler import CompletionSampler as CompletionSampler
from policygrad.rollout import Batch as Batch, Rollout as Rollout, decisions as decisions, minibatches as minibatches
from policygrad.samplers import (
    KLCharged as KLCharged,
    Overlapped as Overlapped,
    Rescored as Rescored,
    Sample,
    WholeRows as WholeRows,
    WithoutFlatGroups as WithoutFlatGroups,
)
from policygrad.train.checkpoints import load_policy as load_policy
from policygrad.train.comparison import Comparison as Comparison, compare as compare
from policygrad.train.page import report as report
from policygrad.train.compose import Learner as Learner, assemble as assemble
from policygrad.train.elo import Rating as Rating, elo as elo
from policygrad.train.exporting import export as export
from policygrad.train.keywords import Keywords as Keywords
from policygrad.train.publishing import push as push
from policygrad.train.reproduce import reproduce as reproduce
from policygrad.train.run import Run as Run
from policygrad.train.studies import Study as Study, study as study
from policygrad.train.training import Training as Training, clone as clone, resume as resume, train as train
from policygrad.train.tuning import Tuning as Tuning, tune as tune
from policygrad.train.watching import watch as watch
from policygrad.updates import Objective as Objective
from policygrad.weights import (
    average as average,
    per_budget as per_budget,
    per_episode as per_episode,
    per_row as per_row,
    per_token as per_token,
)

load = Run.load

class _Assembled(Protocol):
    def __call__(
        self,
        policy: nn.Module,
        sample: Sample,
        *,
        critic: nn.Module | None = ...,
        reference: nn.Module | None = ...,
        world: str = ...,
        **values: Unpack[Keywords],
    ) -> Learner: ...

dr_grpo: _Assembled
dapo: _Assembled
gspo: _Assembled
cispo: _Assembled
rloo: _Assembled
reinforce_plus_plus: _Assembled
dppo: _Assembled
sapo: _Assembled
gmpo: _Assembled
gspo_token: _Assembled
luspo: _Assembled
vespo: _Assembled
maxrl: _Assembled
pass_at_k: _Assembled
lite_ppo: _Assembled
gdpo: _Assembled
opo: _Assembled
otb: _Assembled
two_sided_grpo: _Assembled
masked_grpo: _Assembled
forking_tokens: _Assembled
skywork_or1: _Assembled
clip_cov: _Assembled
kl_cov: _Assembled
opmd: _Assembled
remax: _Assembled
dro: _Assembled
reinforce_plus_plus_baseline: _Assembled

__version__: str
