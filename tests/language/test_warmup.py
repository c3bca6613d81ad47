"""The warm-up on demonstrations: what it climbs, and the cache."""

import hashlib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from language.conftest import picked
from policygrad.errors import UserError
from policygrad.language import arithmetic, warmup
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.language.warmup import cache_directory, demonstrations_batch, fit_demonstrations, warmed_up

TOKENIZER = arithmetic.tokenizer()
EXAMPLES = arithmetic.problems(12, seed=0)
TEXTS = arithmetic.demonstrations(EXAMPLES, seed=0)


@pytest.fixture
def policy() -> LanguagePolicy:
    return LanguagePolicy(arithmetic.model(hidden=16, layers=1))


def test_a_batch_of_demonstrations_holds_each_with_its_end() -> None:
    batch = demonstrations_batch(EXAMPLES, TEXTS, TOKENIZER)
    for i, (example, text) in enumerate(zip(EXAMPLES, TEXTS, strict=True)):
        assert TOKENIZER.decode(batch.obs.prompt[i][batch.obs.prompt_mask[i]]) == example["prompt"]
        assert TOKENIZER.decode(batch.action[i][batch.mask[i]]) == f"{text}<eos>"
    assert torch.equal(batch.action, batch.obs.completion)


def test_the_objective_is_the_mean_log_probability_of_a_token(policy: LanguagePolicy) -> None:
    """And the first step of AdamW goes uphill by the learning rate, with the gradient scaled to length 1."""
    batch = demonstrations_batch(EXAMPLES, TEXTS, TOKENIZER)
    before = deepcopy(policy)
    torch.manual_seed(1)
    after: list[LanguagePolicy] = []
    found, *_ = fit_demonstrations(policy, batch, 10, 5, 1e-3, progress=lambda *_: after.append(deepcopy(policy)))
    torch.manual_seed(1)
    index = torch.randint(12, (5,))
    obs = Prefixes(*(x[index] for x in batch.obs))
    rows = []
    for i in range(5):
        prompt, completion = obs.prompt[i][obs.prompt_mask[i]], obs.completion[i][obs.completion_mask[i]]
        logits = before.model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    objective = picked(obs, rows).sum() / obs.completion_mask.sum()
    assert found == pytest.approx(objective.item(), abs=1e-5)
    gradient = torch.autograd.grad(objective, list(before.parameters()))
    length = torch.stack([g.norm() for g in gradient]).norm().clamp(min=1)
    for p, q, g in zip(after[0].parameters(), before.parameters(), gradient, strict=True):
        g = g / length
        assert_close(p - q, 1e-3 / 25 * g / (g.abs() + 1e-8), rtol=1e-2, atol=1e-6)  # one cycle starts at 1/25


def test_the_likelihood_rises_and_progress_is_told(policy: LanguagePolicy) -> None:
    told: list[tuple[int, int, str]] = []
    batch = demonstrations_batch(EXAMPLES, TEXTS, TOKENIZER)
    history = fit_demonstrations(policy, batch, 40, 8, 3e-2, progress=lambda *x: told.append(x))
    assert history[-1] > history[0] + 0.5
    assert [x[:2] for x in told] == [(i, 40) for i in range(1, 41)]
    assert told[-1][2] == f"log-probability {history[-1]:.3f}"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A warm-up of a fraction of a second, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(warmup, "RECIPE", {"steps": 2, "rows": 4, "learning_rate": 2e-3})
    monkeypatch.setattr(arithmetic, "TRAINED_ON", 100)
    monkeypatch.setattr(arithmetic, "KEPT", 128)
    return tmp_path / "policygrad"


def weights(model: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for _, x in sorted(model.state_dict().items()))).hexdigest()


def test_a_warm_model_is_made_once(small: Path) -> None:
    said: list[str] = []
    torch.manual_seed(5)
    first = warmed_up(said.append)
    drawn = torch.rand(1)
    assert said == ["the arithmetic model learns from imperfect demonstrations first (kept for next time)"]
    (place,) = small.iterdir()
    assert place.name.startswith("arithmetic-")
    again = warmed_up(said.append)
    assert len(said) == 1
    assert weights(first) == weights(again)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "the caller's generator is left alone"


def test_another_recipe_makes_another_model(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = warmed_up()
    monkeypatch.setattr(warmup, "RECIPE", {"steps": 3, "rows": 4, "learning_rate": 2e-3})
    assert weights(warmed_up()) != weights(first)
    assert len(list(small.iterdir())) == 2


def test_the_cache_is_in_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "policygrad"


def test_models_with_other_heads_are_kept_side_by_side(small: Path) -> None:
    """Of 96 features, three heads have 32 each, the fewest that vLLM's attention on a CPU takes; four have 24."""
    four, three = warmed_up(), warmed_up(heads=3)
    assert [x.config.num_attention_heads for x in (four, three)] == [4, 3]
    assert three.model.layers[0].self_attn.head_dim == 32
    assert len(list(small.glob("arithmetic-*"))) == 2
    assert weights(warmed_up()) == weights(four) != weights(three)


@pytest.mark.parametrize("heads", [0, 5, 96])
def test_heads_that_do_not_share_the_features(heads: int) -> None:
    with pytest.raises(
        UserError, match=f"heads is {heads}, and 96 features cannot be shared evenly: give one of 1, 2, 3"
    ):
        arithmetic.model(heads=heads)
