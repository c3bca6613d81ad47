"""A user's loss: whose gradient it has, what it must not depend on, and what is said of one that fails."""

from pathlib import Path

import pytest
import torch

from policygrad.errors import UserError
from policygrad.functions import load_function
from policygrad.verify import losses
from policygrad.verify.command import run, verify
from policygrad.verify.losses import Configuration, adapter_of
from policygrad.verify.options import VerifyOptions

LOSSES = """
import torch

def verl(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None):
    ratio = (log_prob - old_log_prob).exp()
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    return (losses * response_mask).sum() / response_mask.sum(), {"pg_clipfrac": 0.0}

class OpenRLHF:
    def __call__(self, log_probs, old_log_probs, advantages, action_mask=None):
        ratio = (log_probs - old_log_probs).exp().clamp(max=1.28).detach()
        return -((ratio * advantages * log_probs * action_mask).sum() / action_mask.sum()), None

openrlhf = OpenRLHF()

class Module(torch.nn.Module):
    def __init__(self, clip=0.2):
        super().__init__()
        self.clip = clip

    def forward(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None):
        r = (log_probs - old_log_probs).exp()
        gain = torch.min(r * advantages, r.clamp(1 - self.clip, 1 + self.clip) * advantages)
        return -(gain * action_mask).sum() / action_mask.sum(), None, None, None

class Unmade:
    def __init__(self, clip):
        self.clip = clip

def trl(per_token_logps, old_per_token_logps, advantages, completion_mask):
    r, a = (per_token_logps - old_per_token_logps).exp(), advantages.unsqueeze(1)
    losses = -torch.min(r * a, r.clamp(0.8, 1.2) * a)
    return ((losses * completion_mask).sum(1) / completion_mask.sum(1)).mean()

def over_padding(log_probs, old_log_probs, advantages, action_mask=None):
    return -(torch.exp(log_probs - old_log_probs) * advantages * action_mask).mean()

def behind(log_probs, old_log_probs, advantages, action_mask=None):
    centered = advantages - advantages.mean()
    return -(torch.exp(log_probs - old_log_probs) * centered * action_mask).sum(1).mean() / 3

def split(log_probs, old_log_probs, advantages, action_mask=None):
    gain = (torch.exp(log_probs - old_log_probs) * advantages * action_mask).sum()
    return -gain / (action_mask.sum() + 5)

def raises(log_probs, old_log_probs, advantages, action_mask=None):
    raise RuntimeError("out of luck")

def of_each(log_probs, old_log_probs, advantages, action_mask=None):
    return log_probs * advantages

def constant(log_probs, old_log_probs, advantages, action_mask=None):
    return torch.zeros(())

def infinite(log_probs, old_log_probs, advantages, action_mask=None):
    return (log_probs * advantages).sum() / 0

def exits(log_probs, old_log_probs, advantages, action_mask=None):
    raise SystemExit("no license")

def hangs(log_probs, old_log_probs, advantages, action_mask=None):
    while True:
        pass

def others(logits, labels):
    return logits.sum()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(LOSSES)
    return str(path)


def report(file: str, name: str):
    named = f"{file}:{name}"
    return verify(VerifyOptions(loss=named), loss=load_function(named, what="loss"))


@pytest.mark.parametrize(
    ("name", "method"), [("verl", "skywork_or1"), ("openrlhf", "cispo"), ("trl", "grpo"), ("Module", "skywork_or1")]
)
def test_a_loss_is_known_by_its_gradient_on_and_off_policy(file: str, name: str, method: str) -> None:
    """Clipped and averaged by token, clipped weights by token, clipped and averaged by row."""
    found = report(file, name)
    assert [(f.name, f.verdict, f.reason) for f in found.findings] == [
        (f"{name}, {where} policy", "biased", f"as {method}") for where in ("on", "off")
    ]
    assert all(check.holds for check in found.checks)
    assert found.wrong == 0


@pytest.mark.parametrize(("name", "which"), [("over_padding", [0]), ("behind", [0, 1, 2]), ("split", [2])])
def test_what_a_loss_must_not_depend_on_is_found(file: str, name: str, which: list[int]) -> None:
    found = report(file, name)
    assert [i for i, check in enumerate(found.checks) if not check.holds] == which
    assert {f.reason for f in found.findings} == {"as no line of the table"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raised RuntimeError: out of luck: fix the loss"),
        ("of_each", r"returned \[\d+, 3\]: return one number that has a gradient"),
        ("constant", r"returned \[\]: return one number that has a gradient"),
        ("infinite", "returned a number that is not finite"),
        ("exits", "raised SystemExit: no license: fix the loss"),
        ("hangs", "raised TimeoutError: a call took more than 1 seconds: fix the loss"),
        ("Unmade", r"Unmade\(\) raised TypeError"),
        ("others", "has no argument log_prob .verl., log_probs .OpenRLHF. or per_token_logps .TRL."),
    ],
)
def test_one_that_fails_is_one_line(file: str, name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CALL_SECONDS", 1.0)
    with pytest.raises(UserError, match=said) as raised:
        report(file, name)
    assert len(str(raised.value)) <= 200
    assert "\n" not in str(raised.value)


def test_it_is_of_the_world_of_tokens(file: str) -> None:
    options = VerifyOptions(loss=f"{file}:trl", world="chain")
    with pytest.raises(UserError, match="--world is chain"):
        verify(options, loss=load_function(f"{file}:trl"))
    with pytest.raises(UserError, match="ask for one at a time"):
        verify(VerifyOptions(loss="x:y", estimator="x:z"), lambda *_: torch.zeros(1), load_function(f"{file}:trl"))


def test_the_command_prints_it_and_ends_with_1_where_something_is_wrong(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VerifyOptions(loss=f"{file}:trl")) == 0
    assert "biased: as grpo" in capsys.readouterr().out
    assert run(VerifyOptions(loss=f"{file}:over_padding", json=True)) == 1
    assert '"wrong": 1' in capsys.readouterr().out


def test_a_configuration_has_ppos_clip_and_no_other_option() -> None:
    config = Configuration()
    assert (config.clip_ratio, config.get("clip_ratio_c", 20.0), config.entropy_coeff) == (0.2, 3.0, None)


def test_verls_own_arguments_are_given_only_where_they_are_taken() -> None:
    def plain(old_log_prob, log_prob, advantages, response_mask):
        return (log_prob * advantages * response_mask).sum()

    x = torch.ones(2, 3)
    assert adapter_of("plain", plain)(plain, x, x, x, x.bool()) == 6
