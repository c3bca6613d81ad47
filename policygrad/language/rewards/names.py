"""From a name to a reward function."""

import difflib
import re

from policygrad.errors import UserError, shortened
from policygrad.functions import load_function
from policygrad.language.rewards.builtin import exact_match, matches, math_equal, soft_overlong_penalty
from policygrad.language.rewards.calling import Reward

BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "math_equal": math_equal}
FORMS = [*BUILT_IN, "format:REGEX", "overlong:MAX,BUFFER", "module:function", "path/file.py:function"]


def is_function_spec(spec: str) -> bool:
    """Whether a name is that of a function, not of a reward model."""
    kind, colon, rest = spec.rpartition(":")
    named = bool(colon) and rest.isidentifier() and (kind.endswith(".py") or re.fullmatch(r"\w+(\.\w+)*", kind))
    return spec in BUILT_IN or spec.split(":")[0] in ("format", "overlong") or spec.endswith(".py") or bool(named)


def load_reward(spec: str) -> Reward:
    """A reward function by its name, one of FORMS. Raises UserError if there is none."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    kind, _, rest = spec.partition(":")
    if kind == "format":
        if not rest:
            raise UserError(f"reward {spec!r} lacks its regular expression: write format:REGEX")
        return matches(rest)
    if kind == "overlong":
        counts = re.fullmatch(r"(\d+),(\d+)", rest)
        if counts is None:
            raise UserError(f"reward {shortened(spec)} lacks its two numbers: write overlong:MAX,BUFFER, in tokens")
        return soft_overlong_penalty(int(counts[1]), int(counts[2]))
    if is_function_spec(spec):
        return load_function(spec, what="reward function")
    near = difflib.get_close_matches(spec, BUILT_IN, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(FORMS)}"
    raise UserError(f"there is no reward function {shortened(spec, 40)}: {advice}")
