"""The reward of a completion: functions of prompts and completions, and their weighted sum.

A reward function is called with keywords, `reward(prompts=..., completions=..., **columns)`, and returns one number a
sample, or None where it does not apply. Prompts and completions are lists of text. For conversations they are lists of
message lists, and a completion is [{"role": "assistant", "content": text}]. The columns are those of the data set, one
entry a sample, with `completion_ids` (tokens), `completion_mask` (the policy chose the token), `completions_raw` (text
with special tokens) and `cut` (the length limit came before the end); see Rewards. It may return a list of numbers for
a sample too, one for each of its tokens.
"""

from policygrad.language.rewards.answers import repeats
from policygrad.language.rewards.builtin import (
    exact_match,
    final_answer,
    matches,
    math_equal,
    soft_overlong_penalty,
)
from policygrad.language.rewards.calling import Column, Reward, text_of
from policygrad.language.rewards.names import BUILT_IN, FORMS, is_function_spec, load_reward, near_function
from policygrad.language.rewards.weighted import Rewards

__all__ = [
    "BUILT_IN",
    "FORMS",
    "Column",
    "Reward",
    "Rewards",
    "exact_match",
    "final_answer",
    "is_function_spec",
    "load_reward",
    "matches",
    "math_equal",
    "near_function",
    "repeats",
    "soft_overlong_penalty",
    "text_of",
]
