"""From a name to a reward function."""

from pathlib import Path

import pytest

from language.rewards.conftest import judged
from policygrad.errors import UserError
from policygrad.language.rewards import exact_match, is_function_spec, load_reward, math_equal, near_function


def test_built_in_functions_by_name() -> None:
    assert load_reward("exact_match") is exact_match
    assert load_reward("math_equal") is math_equal
    assert load_reward("format:a:b+")(prompts=[], completions=["a:bb", "a"]) == [1.0, 0.0]
    assert load_reward("overlong:10,4")(prompts=[], completions=[], completion_ids=[[0] * 8]) == [-0.5]


def test_a_users_function_by_file(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text("def always(completions):\n    return [1.0] * len(completions)\n")
    assert judged(load_reward(f"{file}:always"))[0].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mach", "there is no reward function 'exact_mach': did you mean exact_match?"),
        ("math_equl", "there is no reward function 'math_equl': did you mean math_equal?"),
        ("exact-match", "there is no reward function 'exact-match': did you mean exact_match?"),
        ("MathEqual", "there is no reward function 'MathEqual': did you mean math_equal?"),
        ("formt:x", "there is no reward function 'formt:x': did you mean format:x?"),
        ("Format:x+", "there is no reward function 'Format:x+': did you mean format:x+?"),
        ("overlng:10,4", "there is no reward function 'overlng:10,4': did you mean overlong:10,4?"),
        ("zzz", "there is no reward function 'zzz': give one of exact_match, math_equal, format:REGEX, overlong:"),
        ("format:", "reward 'format:' lacks its regular expression: write format:REGEX"),
        ("format:(", "the regular expression '(' cannot be read: "),
        ("overlong:10", "reward 'overlong:10' lacks its two numbers: write overlong:MAX,BUFFER, in tokens"),
        ("overlong:4,10", "the overlong penalty has a buffer of 10 tokens and a longest completion of 4: "),
        ("no_such_package.rewards:f", "there is no module 'no_such_package.rewards' for the reward function: "),
        ("file.py", "reward function 'file.py' is a file: add the function's name"),
    ],
)
def test_functions_that_cannot_be_loaded(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reward(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    ("spec", "is_function"),
    [
        ("exact_match", True),
        ("format:x/y", True),
        ("overlong", True),
        ("package.module:f", True),
        ("./some/file.py:f", True),
        ("file.py", True),
        ("gpt2", False),
        ("organisation/reward-model", False),
        ("./models/reward", False),
        ("organisation/model:f", False),
    ],
)
def test_is_function_spec(spec: str, is_function: bool) -> None:
    assert is_function_spec(spec) is is_function


def test_names_of_hub_models_are_near_no_function() -> None:
    names = ["gpt2", "organisation/reward-model", "./models/math_equal", "organisation/math_equl", "judge", "a:b"]
    assert list(map(near_function, names)) == [None] * len(names)
