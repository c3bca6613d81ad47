"""Methods that are another with one piece exchanged. Each line is the difference."""

from functools import partial

from torch import inf

from policygrad.advantages import batch_advantage, group_advantage, leave_one_out, unit_scale
from policygrad.algorithms.grpo import grpo
from policygrad.objectives import clipped_weight
from policygrad.score import sequence_ratio
from policygrad.weights import per_budget, per_episode, per_token

# Liu et al. 2025, arXiv 2503.20783: neither 1/std nor 1/|y|, which favour some prompts and long wrong answers.
dr_grpo = partial(grpo, credit=partial(group_advantage, scale=unit_scale), weights=per_budget)

# Yu et al. 2025, arXiv 2503.14476: clip-higher and the loss by token. Its dynamic sampling is
# samplers.WithoutFlatGroups, its overlong shaping a reward.
dapo = partial(grpo, clip=(0.2, 0.28), weights=per_token)

# Zheng et al. 2025, arXiv 2507.18071: the ratio of whole completions, by the length's root.
gspo = partial(grpo, ratio=sequence_ratio, clip=(3e-4, 4e-4))

# MiniMax 2025, arXiv 2506.13585: clips the weight instead of the gradient; no bound below.
cispo = partial(grpo, gain=clipped_weight, clip=(inf, 0.28), weights=per_token)

# Ahmadian et al. 2024, arXiv 2402.14740: the mean of the others as the baseline, unbiased.
rloo = partial(grpo, credit=partial(group_advantage, baseline=leave_one_out, scale=unit_scale), weights=per_episode)

# Hu 2025, arXiv 2501.03262: no groups; the batch is the baseline, the KL to the reference is charged in the reward.
reinforce_plus_plus = partial(grpo, credit=batch_advantage, weights=per_token)
