"""From a name to a reward function."""

import difflib
import re

from policygrad.errors import UserError, ending, shortened
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


def near_function(spec: str) -> str | None:
    """The built-in function, or its form with two parts, that a misspelled name is near to; None if it is near none."""
    kind, colon, rest = spec.partition(":")
    if "/" in kind:
        return None
    plain = re.sub(r"[-_ .]", "", kind).casefold()
    known = ("format", "overlong") if colon else tuple(BUILT_IN)
    near = difflib.get_close_matches(plain, [x.replace("_", "") for x in known], n=1, cutoff=0.75)
    found = next((x for x in known if [x.replace("_", "")] == near), None)
    return found and (f"{found}:{rest}" if colon else found)


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
    near = near_function(spec)
    if is_function_spec(spec):
        try:
            return load_function(spec, what="reward function")
        except UserError as error:
            if near is None or kind.endswith(".py"):
                raise
            raise UserError(
                f"there is no reward function {shortened(spec, 40)}: did you mean {ending(near)}?"
            ) from error
    advice = f"did you mean {ending(near)}?" if near else f"give one of {', '.join(FORMS)}"
    raise UserError(f"there is no reward function {shortened(spec, 40)}: {advice}")
