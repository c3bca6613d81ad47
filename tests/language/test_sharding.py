"""A model that is sharded over two ranks learns what it learns whole, and each rank holds half of it."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from rank_cases import Messages, spawned
from tiny_models import tiny
from torch import nn

from policygrad import ranks
from policygrad.language import models, sharding
from policygrad.language.policies import LanguagePolicy, Prefixes, ValueModel, trunk
from policygrad.rollout import Rollout
from policygrad.train.compose import assemble

EXACT: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.05, "micro_batch": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl_ref": "loss", "epochs": 2}),
    "grpo, KL in the reward": ("grpo", {"kl_ref": "reward"}),
    "ppo": ("ppo", {"epochs": 2, "minibatch_size": 4, "critic_learning_rate": 0.3}),
    "ppo, Adam": ("ppo", {"optimizer": "adam", "learning_rate": 0.01, "critic_learning_rate": 0.01}),
    "reinforce": ("reinforce", {}),
    "grpo, activations computed again": ("grpo", {"gradient_checkpointing": True, "epochs": 2}),
    "ppo, activations computed again": ("ppo", {"gradient_checkpointing": True, "epochs": 2}),
    "grpo, one part": ("grpo", {"kl_ref": "loss", "epochs": 2, "micro_batch": None}),
    "grpo, summed once a step": ("grpo", {"kl_ref": "loss", "epochs": 2, "gradient_sync": "step"}),
    "ppo, summed once a step": ("ppo", {"epochs": 2, "critic_learning_rate": 0.3, "gradient_sync": "step"}),
}  # fmt: skip
# One step: after it, weights that differ by a rounding of float32 may be other numbers of bfloat16.
IN_BFLOAT16: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}, bfloat16": (name, {**CASES[name][1], "epochs": 1, "minibatch_size": 100}) for name in ("grpo", "ppo")
}
ROWS = (6, 2)  # of the ranks: one has three micro-batches, the other one


def rollout_of(rank: int) -> Rollout:
    """A rank's rows, in groups of two, some of them longer than others."""
    draw, count = torch.Generator().manual_seed(rank), ROWS[rank]
    prompt, completion = (torch.randint(2, 16, (count, n), generator=draw) for n in (3, 5))
    mask = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=draw)
    last = mask & ~torch.cat([mask[:, 1:], mask[:, :1] & False], 1)
    reward = torch.randn(count, 5, generator=draw) * last
    logp = torch.full((count, 5), -2.7) + 0.3 * torch.randn(count, 5, generator=draw)
    obs = Prefixes(prompt, torch.ones_like(prompt, dtype=torch.bool), completion, mask)
    group = ranks.apart(torch.arange(count) // 2)
    return Rollout(obs, completion, logp, reward, last, last, mask, group, memoryless=False)


def learned(case: str, shard: bool) -> dict[str, Any]:
    """The parameters after two iterations, and their metrics, and the numbers that this rank holds.

    In bfloat16 weights are numbers of it: of a whole model in its type, and the optimizer keeps float32 copies; and
    of shards in float32. A weight that is used twice would have its gradients added in bfloat16 in a shard, and in
    float32 in the other.
    """
    method, values = (CASES | IN_BFLOAT16)[case]
    low = torch.bfloat16 if case in IN_BFLOAT16 else None
    torch.set_default_dtype(torch.float64 if low is None else torch.float32)
    torch.manual_seed(3)
    policy = LanguagePolicy(tiny(tie_word_embeddings=low is None).to(torch.get_default_dtype()), autocast=low)
    reference = deepcopy(policy).requires_grad_(False)
    for p in policy.parameters():
        p.data += 0.05 * torch.randn_like(p)
    if values.get("gradient_checkpointing"):
        models.checkpoint_gradients(policy.model)
    critic = ValueModel(deepcopy(trunk(policy.model)), autocast=low) if method == "ppo" else None
    modules = [x for x in (policy, critic, reference) if x is not None]
    numbers = sum(p.numel() for x in modules for p in x.parameters())
    for p in () if low is None else (p for x in modules for name, p in x.named_parameters() if "head." not in name):
        p.data = p.data.to(low).float() if shard else p.data.to(low)
    if shard:
        for module in modules:
            sharding.shard(module, once_a_step=values.get("gradient_sync") == "step")
    ranks.in_lockstep(shard)
    rollout = rollout_of(ranks.rank())
    given = {**EXACT, "minibatch_size": 100, **values, "prompts_per_rollout": 100, "world": "language", "shard": shard}
    given = given if shard else {x: y for x, y in given.items() if x != "gradient_sync"}
    given = given if method in ("grpo", "ppo") else {x: y for x, y in given.items() if x != "minibatch_size"}
    learner = assemble(method, policy, lambda _: rollout, critic=critic, reference=reference, **given)
    iterator, rows, seen = iter(learner), [], set()
    for block in sharding.blocks(policy):
        block.register_forward_pre_hook(lambda block, given: seen.add((given[0].dtype, next(block.parameters()).dtype)))
    with Messages() as messages:
        for _ in range(2 if low is None else 1):
            rows.append({name: float(x) for name, x in next(iterator).items()})
            sharding.cut(*modules)
    held = sum(ranks.local(p).numel() for x in modules for p in x.parameters())
    moments = sum(
        ranks.local(x).numel() for one in learner.optimizers for s in one.state.values() for x in s.values() if x.ndim
    )
    copies = {p: s["master"] for one in learner.optimizers for p, s in one.state.items() if "master" in s}
    held_in = {p.dtype for x in modules for p in x.parameters()}
    found = [p.full_tensor() if ranks.is_shard(p) else copies.get(p, p) for x in modules for p in x.parameters()]
    return {
        "computed in": seen,
        "held in": held_in,
        "parameters": torch.cat([x.detach().reshape(-1).to(torch.get_default_dtype()) for x in found]),
        "rows": rows,
        "calls": messages.calls,
        "bytes": messages.bytes,
        "numbers": [sum(p.numel() for p in x.parameters()) for x in modules],
        "share": held / numbers,
        "moments": moments / sum(p.numel() for x in modules[:2] for p in x.parameters()),
    }


def in_a_process() -> dict[str, Any]:
    """Each case, sharded and whole, as one of two ranks."""
    return {f"{case}, {shard}": learned(case, shard) for case in CASES | IN_BFLOAT16 for shard in (True, False)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have found, started once."""
    return spawned(in_a_process, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_learns_what_a_whole_one_does(case: str, processes: list[dict[str, Any]]) -> None:
    """Parameters after clipped steps, and so gradients and norms, with unequal numbers of micro-batches."""
    sharded, whole = (processes[0][f"{case}, {x}"] for x in (True, False))
    torch.testing.assert_close(sharded["parameters"], whole["parameters"], rtol=0, atol=1e-9)
    assert torch.equal(processes[1][f"{case}, True"]["parameters"], sharded["parameters"])
    for row, other in zip(sharded["rows"], whole["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-7, abs=1e-9)
    assert whole["rows"][0]["gradient_norm"] > 0.05  # it is clipped


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half(case: str, processes: list[dict[str, Any]]) -> None:
    """Of policy, critic and reference, and of Adam's two moments."""
    for found in processes:
        assert found[f"{case}, True"]["share"] == pytest.approx(0.5, abs=0.01)
        assert found[f"{case}, False"]["share"] == 1
    if case == "ppo, Adam":
        whole = processes[0][f"{case}, False"]["moments"]
        assert [x[f"{case}, True"]["moments"] / whole for x in processes] == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_in_bfloat16_shards_learn_what_weights_with_float32_copies_do(
    case: str, processes: list[dict[str, Any]]
) -> None:
    """The same arithmetic."""
    sharded, whole = (processes[0][f"{case}, {x}"] for x in (True, False))
    assert sharded["computed in"] == whole["computed in"] == {(torch.bfloat16, torch.bfloat16)}
    assert sharded["held in"] == {torch.float32}
    torch.testing.assert_close(sharded["parameters"], whole["parameters"], rtol=0, atol=1e-6)
    assert torch.equal(processes[1][f"{case}, True"]["parameters"], sharded["parameters"])


def test_micro_batches_send_their_gradient_or_once_a_step_for_all(processes: list[dict[str, Any]]) -> None:
    """2 iterations of 2 epochs: the gradient of each micro-batch, or of each step, by blocks and the root."""
    policy = LanguagePolicy(tiny())
    most = max(len(policy.parts(rollout_of(rank).obs, rows=2)[0]) for rank in range(2))
    assert most > 1
    each, once = (processes[0][f"{case}, True"] for case in ("grpo", "grpo, summed once a step"))
    parts = len(sharding.blocks(policy)) + 1
    for found, sums in ((each, 2 * 2 * most), (once, 2 * 2)):
        assert found["calls"]["_reduce_scatter_base_"] == sums * parts
        sent = found["bytes"]["_reduce_scatter_base_"]
        assert sent == pytest.approx(sums * 8 * found["numbers"][0], rel=0.02)  # and some padding
    for name in ("allreduce_", "allgather_", "_allgather_base_"):
        assert once["calls"][name] == each["calls"][name]


def test_whole_models_send_their_gradient_once_a_step(processes: list[dict[str, Any]]) -> None:
    """In one message, with all metrics; those without micro-batches send as often."""
    found = processes[0]["grpo, False"]
    with_one = processes[0]["grpo, one part, False"]
    assert found["calls"] == with_one["calls"]
    assert found["bytes"] == with_one["bytes"]


def test_blocks_are_those_of_the_longest_list() -> None:
    policy = LanguagePolicy(tiny())
    assert sharding.blocks(policy) == list(trunk(policy.model).layers)  # type: ignore[arg-type]
    assert sharding.blocks(nn.Linear(2, 2)) == []


def test_what_is_not_sharded_stays_as_it_is() -> None:
    x = torch.randn(3)
    module = nn.Linear(2, 2)
    assert ranks.local(x) is x
    assert ranks.cut_as(x, x) is x
    assert ranks.assembled({"a": x})["a"] is x
    assert ranks.as_often([1, 2]) == [1, 2]
    assert not sharding.is_sharded(module)
    with sharding.whole(module):
        sharding.cut(module, None)


def test_ranks_compute_as_often_as_each_other_if_a_model_is_sharded() -> None:
    def work(count: int) -> list[int]:
        return ranks.as_often(list(range(count)), lambda x: -1 if x is None else x)

    ranks.in_lockstep()
    try:
        assert ranks.simulated([lambda: work(2), lambda: work(3), lambda: work(0)]) == [
            [0, 1, 1], [0, 1, 2], [-1, -1, -1],
        ]  # fmt: skip
    finally:
        ranks.in_lockstep(False)
    assert ranks.simulated([lambda: work(2), lambda: work(3)]) == [[0, 1], [0, 1, 2]]
