"""An update whose numbers are not finite stops the run with its batch, or is dropped as if it had never been."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from policygrad.critics import fit_critic
from policygrad.diagnostics import mean_metrics
from policygrad.divergences import AdaptiveCoefficient, kl
from policygrad.errors import NonFiniteError, UserError
from policygrad.guards import Guard, as_non_finite
from policygrad.objectives import surrogate
from policygrad.rollout import Batch
from policygrad.score import token_ratio
from policygrad.updates import Measured, Metrics, Update, ascend, kl_radius, natural_step, trust_region_step
from policygrad.weights import average

pytestmark = pytest.mark.usefixtures("float64")


class Surrogate(Measured):
    """The surrogate of a softmax policy on three features."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(3, 4)

    def of(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.policy(obs))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logp = self.of(batch.obs).log_prob(batch.action)
        gain = surrogate(logp, token_ratio(logp, batch.logp, batch.mask), batch.advantage)
        return average(gain, batch.weight), {"mean_logp": logp.mean().detach()}

    def divergence(self, batch: Batch) -> Any:
        with torch.no_grad():
            old = self.of(batch.obs)
        return lambda: average(kl(old, self.of(batch.obs)), batch.weight)


def batch(objective: Surrogate) -> Batch:
    obs, mask = torch.randn(8, 1, 3), torch.ones(8, 1, dtype=torch.bool)
    with torch.no_grad():
        action = objective.of(obs).sample()
        logp, advantage = objective.of(obs).log_prob(action), torch.randn(8, 1)
    return Batch(obs, action, logp, mask, mask / 8.0, advantage, advantage, torch.zeros(8, 1))


def spoiled(x: Batch) -> Batch:
    advantage = x.advantage.clone()
    advantage[2], advantage[5] = math.nan, math.inf
    return x._replace(advantage=advantage)


def beyond(x: Batch) -> Batch:
    """Observations at which the policy's logits are NaN: torch's distribution says so."""
    return x._replace(obs=torch.full_like(x.obs, math.inf))


def made(name: str, objective: Surrogate) -> tuple[Update, list[torch.optim.Optimizer]]:
    if name in ("trust_region_step", "natural_step"):
        step = trust_region_step() if name == "trust_region_step" else natural_step(step_size=_radius)
        return step, []
    kinds: dict[str, Any] = {
        "adam": lambda p: torch.optim.AdamW(p, lr=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    }
    optimizer = kinds[name.split()[0]](objective.policy.parameters())
    return ascend(optimizer, micro_batch=3 if name.endswith("parts") else None, max_grad_norm=0.1), [optimizer]


def _radius(slope: Tensor) -> Tensor:
    return kl_radius(slope, delta=0.01)


@pytest.mark.parametrize("damage", [spoiled, beyond])
@pytest.mark.parametrize("first", [False, True], ids=["later", "the very first"])
@pytest.mark.parametrize("name", ["adam", "adam in parts", "sgd", "natural_step", "trust_region_step"])
def test_a_step_that_is_skipped_leaves_no_trace(name: str, first: bool, damage: Any) -> None:
    """Parameters and moments are those of a run without it, bit for bit."""
    torch.manual_seed(0)
    one = Surrogate()
    two = deepcopy(one)
    batches = [batch(one) for _ in range(3)]
    guard = Guard(skip=True)
    (plain, its), (update, own) = made(name, one), made(name, two)
    update = guard(update)
    given = [damage(batches[0]), *batches] if first else [batches[0], damage(batches[1]), *batches[1:]]
    found = [update(two, x) for x in given]
    expected = [plain(one, x) for x in batches]
    assert [bool(x) for x in found] == ([False, True, True, True] if first else [True, False, True, True])
    assert guard.skipped == 1
    assert all(map(torch.equal, two.parameters(), one.parameters()))
    assert str([x.state_dict() for x in own]) == str([x.state_dict() for x in its])
    kept = [x for x in found if x]
    assert all(torch.equal(x[k], y[k]) for x, y in zip(kept, expected, strict=True) for k in y)


@pytest.mark.parametrize("name", ["adam", "trust_region_step"])
def test_a_step_that_stops_names_the_column_and_has_the_batch(name: str) -> None:
    torch.manual_seed(0)
    objective = Surrogate()
    bad = spoiled(batch(objective))
    guard, theta = Guard(), [p.clone() for p in objective.parameters()]
    with pytest.raises(
        NonFiniteError, match=r"^advantage is not finite in 2 of 8 decisions: the objective is "
    ) as raised:
        guard(made(name, objective)[0])(objective, bad)
    assert raised.value.evidence.keys() == set(Batch._fields) - {"charge", "imitation", "everywhere"}
    assert torch.equal(raised.value.evidence["obs"], bad.obs)
    assert guard.skipped == 0
    assert all(map(torch.equal, objective.parameters(), theta))
    with pytest.raises(NonFiniteError, match=r"^obs is not finite in 8 of 8 decisions: "):
        guard(made(name, objective)[0])(objective, beyond(bad))


def test_what_counts_for_nothing_is_not_blamed() -> None:
    torch.manual_seed(0)
    objective = Surrogate()
    bad = spoiled(batch(objective))
    mask = bad.advantage.isfinite()
    logp = bad.logp.index_fill(0, torch.tensor([1, 2]), math.nan)
    with pytest.raises(NonFiniteError, match=r"^logp is not finite in 1 of 6 decisions"):
        Guard()(made("adam", objective)[0])(objective, bad._replace(mask=mask, logp=logp))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("error", [UserError("nan is a number here"), RuntimeError("shapes"), KeyError("nan")], ids=str)
def test_other_errors_pass(error: Exception, skip: bool) -> None:
    def update(objective: Any, batch: Batch) -> Metrics:
        raise error

    with pytest.raises(type(error)) as raised:
        Guard(skip=skip)(update)(None, batch(Surrogate()))
    assert raised.value is error


def test_torch_says_nan_in_more_than_one_way() -> None:
    assert as_non_finite(ValueError("Expected parameter logits but found invalid values: tensor([nan])")) is not None
    assert as_non_finite(RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")) is not None
    assert as_non_finite(ValueError("financial")) is None


def test_a_line_search_that_fails_in_its_midst_leaves_the_parameters() -> None:
    class Failing(Surrogate):
        calls = 0

        def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().forward(batch)

    torch.manual_seed(0)
    for name in ("trust_region_step", "natural_step"):
        objective = Failing()
        theta = [p.clone() for p in objective.parameters()]
        with pytest.raises(KeyboardInterrupt):
            made(name, objective)[0](objective, batch(objective))
        assert all(map(torch.equal, objective.parameters(), theta))


def test_the_means_are_of_the_steps_that_were_taken() -> None:
    rows = [{"loss": torch.tensor(1.0)}, {}, {"loss": torch.tensor(4.0)}]
    assert mean_metrics(rows)["loss"] == 2.5
    assert mean_metrics([{}, {}]) == {}


def test_a_coefficient_stays_where_no_update_was_measured() -> None:
    coefficient = AdaptiveCoefficient(1.0, 0.1)
    assert coefficient.adapt({}, "kl_old").keys() == {"kl_old_coefficient"}
    assert coefficient.value == 1
    coefficient.adapt({"kl_old": torch.tensor(1.0)}, "kl_old")
    assert coefficient.value == 2


def test_a_critics_steps_are_guarded_too() -> None:
    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, obs: Tensor) -> Tensor:
            return self.layer(obs).squeeze(-1)

    torch.manual_seed(0)
    critic, guard = Value(), Guard(skip=True)
    given = batch(Surrogate())
    bad = given._replace(target=given.target.index_fill(0, torch.tensor(3), math.nan))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    metrics = fit_critic(critic, optimizer, epochs=2, minibatch_size=4, guard=guard)(bad)
    assert guard.skipped == 2  # one minibatch of each epoch holds the target
    assert metrics["value_loss"].isfinite()
    assert all(p.isfinite().all() for p in critic.parameters())
