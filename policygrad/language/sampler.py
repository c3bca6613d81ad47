"""(policy) -> Rollout: a language model's answers to prompts, with their reward."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from policygrad import ranks
from policygrad.errors import NonFiniteError, UserError, listed
from policygrad.language.completions import Completions, Engine, Request
from policygrad.language.generation import generate
from policygrad.language.models import stop_tokens
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.language.rewards import Rewards, repeats, text_of
from policygrad.rollout import Rollout, at_last_decision

Judge = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # rewards.Rewards: the reward [B], or [B, W] by token
MULTIPLE = 16  # the width of prompts is one of few, so that shapes repeat
ERROR = "error: "  # how the answer to a call of a tool begins that could not be carried out
CUTS = ("kept", "masked", "penalized")  # what a completion cut at the limit is


@dataclass(frozen=True)
class Prompts:
    """Prompts as text, as tokens, and the other columns of the data set.

    tokens: those of all prompts, one after another, so that a long prompt costs its own length only. ends: where each
    prompt ends. origin: the place of its data set among those given. pad: fills the left of short prompts in a batch.
    openings: what the chat template has written of each completion, at the prompt's end. answers: the tokens of each
    prompt's completion, if they are demonstrations.
    """

    texts: list[Any]  # strings, or lists of messages
    tokens: Int[Tensor, " L"]
    ends: Int[Tensor, " N"]
    columns: dict[str, list[Any]]
    origin: Int[Tensor, " N"]
    pad: int
    openings: list[str]
    answers: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        texts: Sequence[Any],
        rows: Sequence[Sequence[int]],
        columns: Mapping[str, list[Any]] | None = None,
        *,
        pad: int,
        origin: Sequence[int] | None = None,
        openings: Sequence[str] | None = None,
        answers: Sequence[list[int]] = (),
    ) -> "Prompts":
        """From a row of tokens for each prompt."""
        tokens = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32)
        ends = torch.tensor(list(map(len, rows)), dtype=torch.long).cumsum(0)
        of_one = torch.zeros(len(rows), dtype=torch.long) if origin is None else torch.tensor(origin, dtype=torch.long)
        begun = [""] * len(rows) if openings is None else list(openings)
        return cls(list(texts), tokens, ends, dict(columns or {}), of_one, pad, begun, list(answers))

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """The tokens of each prompt."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def take(self, index: Int[Tensor, " n"]) -> "Prompts":
        """Some of them, in the order given."""
        rows = index.tolist()
        return Prompts(
            [self.texts[i] for i in rows],
            torch.cat([self._row(i) for i in rows] or [self.tokens[:0]]),
            self.lengths[index].cumsum(0),
            {name: [column[i] for i in rows] for name, column in self.columns.items()},
            self.origin[index],
            self.pad,
            [self.openings[i] for i in rows],
            [self.answers[i] for i in rows] if self.answers else [],
        )

    def padded(self) -> tuple[Int[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """The tokens padded on the left, and their mask. P is that of the longest, up to a multiple of MULTIPLE."""
        width = math.ceil(int(self.lengths.max()) / MULTIPLE) * MULTIPLE
        mask = torch.arange(width) >= width - self.lengths.unsqueeze(1)
        tokens = torch.full(mask.shape, self.pad)
        tokens[mask] = self.tokens.long()
        return tokens, mask

    def digest(self) -> str:
        """The SHA-256 of all of it, which is another one for other rows."""
        rows = json.dumps([self.texts, self.columns, self.openings, self.answers], default=repr)
        found = hashlib.sha256(rows.encode())
        for x in (self.tokens, self.ends, self.origin):
            found.update(x.numpy().tobytes())
        return found.hexdigest()

    def _row(self, i: int) -> Int[Tensor, " n"]:
        return self.tokens[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Answers:
    """Completions of prompts with their text and reward. B = prompts x completions; those of a prompt side by side."""

    prompts: Prompts  # each prompt once for each of its completions
    completions: Completions
    texts: list[str]
    reward: Float[Tensor, " B"]  # NaN where no reward function applies
    parts: dict[str, Tensor]  # each reward function's own, NaN where it does not apply
    earned: Float[Tensor, "B T"] | None = None  # the part of the reward that an environment gave, where it gave it
    by_token: Float[Tensor, "B T"] | None = None  # the part of the reward that functions gave, if by token
    state: Int[Tensor, "B T"] | None = None  # of the environment: see Rollout
    said: list[list[dict[str, Any]]] | None = None  # the messages of each conversation, after its prompt

    def rows(self, count: int | None = None) -> list[dict[str, Any]]:
        """The first `count` answers, or all, as rows of a table. tokens: the decisions of a completion.

        The completion of a conversation is its messages.
        """
        lengths, cut = self.completions.mask.sum(1).tolist(), self.completions.cut.tolist()
        return [
            {
                **{name: column[i] for name, column in self.prompts.columns.items()},
                **{name: (None if part[i].isnan() else float(part[i])) for name, part in self.parts.items()},
                "prompt": self.prompts.texts[i],
                "completion": self.texts[i] if self.said is None else self.said[i],
                "reward": None if self.reward[i].isnan() else float(self.reward[i]),
                "tokens": lengths[i],
                "cut": cut[i],
            }
            for i in range(len(self.texts))[:count]
        ]


def request_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, completions: int, max_tokens: int, **options: Any
) -> Request:
    """A request for completions of a model: where they end, and how tokens become text. options: see Request."""
    decode = partial(tokenizer.batch_decode, skip_special_tokens=False)
    stop, pad = stop_tokens(model, tokenizer), int(tokenizer.pad_token_id)
    return Request(completions, max_tokens, stop, pad, decode=decode, **options)


def answer(
    policy: LanguagePolicy,
    prompts: Prompts,
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    generator: torch.Generator,
    engine: Engine = generate,
) -> Answers:
    """Answer every prompt `request.completions` times and judge the answers.

    Raises UserError if the engine returns wrong shapes.
    """
    _check_columns(judge, prompts)
    device = next(policy.parameters()).device
    tokens, mask = (x.to(device) for x in prompts.padded())
    completions = engine(policy, tokens, mask, request, generator)
    _check_shapes(completions, len(prompts) * request.completions, request.max_tokens)
    repeated = prompts.take(torch.arange(len(prompts)).repeat_interleave(request.completions))
    texts = tokenizer.batch_decode(completions.ids(), skip_special_tokens=True)
    return judged(repeated, completions, texts, tokenizer, judge)


Answering = Callable[..., Answers]  # `answer`, or conversations.Dialogue: the same arguments


def judged(
    prompts: Prompts,
    completions: Completions,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    **more: list[Any],
) -> Answers:
    """Completions with the reward of their texts, which is 0 without a judge.

    prompts: that of each completion. more: further columns that the judge receives.
    """
    ids = completions.ids()
    raw = [a + b for a, b in zip(prompts.openings, tokenizer.batch_decode(ids), strict=True)]
    own = [row[: len(tokens)] for row, tokens in zip(completions.mask.tolist(), ids, strict=True)]
    columns = {**prompts.columns, "completion_ids": ids, "completion_mask": own, "completions_raw": raw}
    columns["cut"] = completions.cut.tolist()
    said: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts.texts, texts, strict=True)
    ]
    if judge is None:
        return Answers(prompts, completions, texts, torch.zeros(len(texts)), {})
    try:
        reward, parts = judge(prompts.texts, said, columns | more)
    except NonFiniteError as error:
        error.evidence = vars(completions)
        raise
    if reward.dim() == 1:
        return Answers(prompts, completions, texts, reward, parts)
    width = completions.mask.shape[1]
    by_token = torch.nn.functional.pad(reward.nan_to_num(0.0), (0, width - reward.shape[1])).to(completions.logp)
    astray = ((by_token != 0) & ~completions.mask).nonzero().tolist()
    if astray:
        i, t = astray[0]
        raise UserError(
            f"a reward by token is {float(by_token[i, t]):g} at token {t} of sample {i}, which is not the policy's: "
            "return 0 where completion_mask is False"
        )
    return Answers(prompts, completions, texts, reward.sum(1), parts, by_token=by_token)


def _check_columns(judge: Judge | None, prompts: Prompts) -> None:
    """Raise UserError for a column of the data that what a reward receives would hide."""
    if isinstance(judge, Rewards):
        judge.check_columns(prompts.columns)


def check_judged(answers: Sequence[Answers]) -> None:
    """Raise UserError if no reward applies to any of the completions."""
    if all(bool(x.reward.isnan().all()) for x in answers):
        count, names = sum(len(x.texts) for x in answers), listed(answers[0].parts)
        raise UserError(
            f"no reward applies to any of {count} completions: {names} returned None for each; give the examples what "
            "it reads, such as `answer`, or another reward"
        )


def _check_shapes(completions: Completions, rows: int, width: int) -> None:
    for name, wanted in {"tokens": (rows, width), "logp": (rows, width), "mask": (rows, width), "cut": (rows,)}.items():
        found = tuple(getattr(completions, name).shape)
        if found != wanted:
            raise UserError(f"the engine returned {name} of shape {found}: return {wanted}, as the request says")


class PromptSampler:
    """Prompts in random order, `prompts_per_rollout` at a time; all of them come before one comes again. Several ranks
    with the same seed take them in the same order, each its share of them.

    dataset_weight: see CompletionSampler. Raises UserError if one rollout takes more prompts than there are.
    """

    def __init__(
        self, prompts: Prompts, *, prompts_per_rollout: int, dataset_weight: Sequence[float] = (), seed: int = 0
    ) -> None:
        if len(prompts) < prompts_per_rollout:
            raise UserError(
                f"there are {len(prompts)} prompts to train on, and a rollout takes {prompts_per_rollout}: "
                "lower prompts_per_rollout or give more prompts"
            )
        self.prompts, self.prompts_per_rollout = prompts, prompts_per_rollout
        self.sets = _shares(prompts.origin, dataset_weight)
        self.order_generator = torch.Generator().manual_seed(seed)
        self.order = torch.zeros(0, dtype=torch.long)
        self.steps = self.completions = self.used = 0

    def _next(self) -> Prompts:
        if len(self.order) < self.prompts_per_rollout:
            self.order = torch.cat([self.order, self._epoch()])
        index, self.order = self.order[: self.prompts_per_rollout], self.order[self.prompts_per_rollout :]
        self.used += len(index)
        return self.prompts.take(index[ranks.share(len(index))])

    def _epoch(self) -> Int[Tensor, " N"]:
        """The prompts of an epoch, in random order: all of them, or each data set's share."""
        if not self.sets:
            return torch.randperm(len(self.prompts), generator=self.order_generator)
        drawn = [_drawn(index, count, self.order_generator) for index, count in self.sets]
        together = torch.cat(drawn)
        return together[torch.randperm(len(together), generator=self.order_generator)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "order_generator": self.order_generator.get_state(),
            "order": self.order.clone(),
            "steps": self.steps,
            "completions": self.completions,
            "used": self.used,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order_generator.set_state(state["order_generator"])
        self.order = state["order"].clone()
        self.steps, self.completions, self.used = state["steps"], state["completions"], state["used"]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """Go on from the states of another number of ranks (as Wrapper.divide_anew): the prompts that all ranks take
        together come in the same order."""
        counts = {name: ranks.portion(sum(x[name] for x in states)) for name in ("steps", "completions")}
        PromptSampler.load_state_dict(self, states[0] | counts)


class CompletionSampler(PromptSampler):
    """Each call answers the next `prompts_per_rollout` prompts; the completions of a prompt are a group.

    answers: how prompts are answered: `answer`, or a Dialogue, which holds conversations with environments. There a
    reward stands at the last decision of the turn that it is for.

    The prompts come in random order, and all of them come before one comes again. The reward stands at a completion's
    last decision. A completion cut at the limit has no end-of-sequence token; `cut` says how it counts:

    kept       it has its reward
    masked     none of its decisions counts, and its group is judged without it (DAPO's overlong filtering)
    penalized  it has its reward minus `cut_penalty`

    With `dataset_weight`, one for each data set, an epoch has as many prompts as there are, each set its share of them:
    of a large set other prompts in each epoch, those of a small set several times.

    decouple_rewards: see decoupled; what an environment gave is one of the rewards, and all stand at the last decision.
    Metrics are of the rewards as they were. greedy: each prompt is answered once more, by the most likely tokens
    (Rollout.greedy, and the metric greedy_reward); a cut or unjudged answer counts as others.

    A completion to which no reward applies counts neither in the update nor in its group and the metrics of reward.
    P of a rollout is that of its longest prompt, up to a multiple of MULTIPLE, and T is the token limit. Raises
    UserError if one rollout takes more prompts than there are, or if no reward applies to any of its completions.
    """

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        judge: Judge | None,
        request: Request,
        *,
        prompts_per_rollout: int,
        answers: Answering = answer,
        cut: str = "kept",
        cut_penalty: float = 1.0,
        decouple_rewards: bool = False,
        greedy: bool = False,
        dataset_weight: Sequence[float] = (),
        engine: Engine = generate,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(prompts, prompts_per_rollout=prompts_per_rollout, dataset_weight=dataset_weight, seed=seed)
        _check_columns(judge, prompts)
        if cut not in CUTS:
            raise UserError(f"cut is {cut!r}: give {', '.join(CUTS[:-1])} or {CUTS[-1]}")
        self.tokenizer, self.judge, self.request, self.engine = tokenizer, judge, request, engine
        self.answers, self.cut, self.cut_penalty = answers, cut, cut_penalty
        self.decouple_rewards, self.greedy = decouple_rewards, greedy
        self.generator = torch.Generator(device=device).manual_seed(ranks.seed(seed))
        self.last: Answers | None = None

    def __call__(self, policy: nn.Module) -> Rollout:
        """Answer the next prompts with the policy, a LanguagePolicy, as it is now."""
        assert isinstance(policy, LanguagePolicy)
        start = time.perf_counter()
        prompts, how = self._next(), (self.tokenizer, self.judge, self.generator, self.engine)
        answers = self.answers(policy, prompts, self.request, *how)
        once = replace(self.request, completions=1, greedy=True)
        likely = self.answers(policy, prompts, once, *how) if self.greedy else None
        seconds = time.perf_counter() - start
        check_judged([answers])
        self.last = answers
        self.steps += int(answers.completions.mask.sum())
        self.completions += len(answers.texts)
        metrics = {**self._metrics(answers), "sampling_seconds": seconds}
        if self.decouple_rewards:
            answers = self._decoupled(answers)
        found = as_rollout(answers, self.request.completions, self.cut, self.cut_penalty, metrics)
        if likely is None:
            return found
        of_mode = as_rollout(likely, 1, self.cut, self.cut_penalty, {}).reward.sum(1)
        metrics["greedy_reward"] = float(likely.reward.nanmean())
        return replace(found, greedy=of_mode.repeat_interleave(self.request.completions), metrics=metrics)

    def draws_its_own(self, policy: nn.Module) -> bool:
        """Whether sampling leaves torch's global generator alone: it has its own. See samplers.Overlapped."""
        return True

    def observed(self, obs: Sequence[Tensor]) -> Prefixes:
        """The observations of a rollout of which a checkpoint holds the tensors."""
        return Prefixes(*obs)

    def _decoupled(self, answers: Answers) -> Answers:
        """Answers whose reward is that of `decoupled`, at their last decision. What an environment gave is one reward
        more, of weight 1. Completions that do not count are in no group."""
        parts, weights = [*answers.parts.values()], [*getattr(self.judge, "weights", [1.0] * len(answers.parts))]
        if answers.earned is not None:
            parts, weights = [*parts, answers.earned.sum(1).to(answers.reward)], [*weights, 1.0]
        each = torch.stack(parts, 1)
        out = answers.reward.isnan() | ((self.cut == "masked") & answers.completions.cut.to(each.device))
        each = each.where(~out.unsqueeze(1), torch.nan)
        reward = decoupled(each, torch.tensor(weights, dtype=each.dtype), self.request.completions)
        return replace(answers, reward=reward, earned=None, by_token=None)

    def _metrics(self, answers: Answers) -> dict[str, float]:
        done, reward = answers.completions, answers.reward.double()
        lengths, cut = done.mask.sum(1).double(), done.cut.cpu()
        judged = ~reward.isnan()
        counts = judged & ~cut if self.cut == "masked" else judged
        means = {f"reward/{name}": float(part.nanmean()) for name, part in answers.parts.items()}
        repeated = [
            repeats(text, text_of(prompt)) for text, prompt in zip(answers.texts, answers.prompts.texts, strict=True)
        ]
        return {
            "reward": float(reward[judged].mean()),
            "reward_std": float(reward[judged].std(correction=0)),
            **(_spreads(reward, counts, self.request.completions) if self.request.completions > 1 else {}),
            **({} if len(means) < 2 else {name: x for name, x in means.items() if x == x}),
            "length": float(lengths.mean()),
            "cut_fraction": float(cut.double().mean()),
            **({} if answers.said is None else _of_conversations(answers.said)),
            "unjudged": 1 - float(judged.double().mean()),
            "masked": 1 - float(counts.double().mean()),
            "prompt_repeats": sum(repeated) / len(repeated),
            "steps": float(self.steps),
            "completions": float(self.completions),
            "epoch": self.used / len(self.prompts),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        super().load_state_dict(state)

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        super().divide_anew(states, seed)
        self.generator.manual_seed(seed)


class DemonstrationSampler(PromptSampler):
    """Each call returns the next `prompts_per_rollout` prompts with their own answers: for credit.demonstrated.

    prompts: with `answers`. length: the most tokens that an answer may have.
    """

    def __init__(self, prompts: Prompts, length: int, *, device: torch.device | str = "cpu", **how: Any) -> None:
        super().__init__(prompts, **how)
        self.length, self.device = length, device

    def __call__(self, policy: nn.Module) -> Rollout:
        """The next ones; the policy is not asked."""
        rollout = demonstrated(self._next(), self.device)
        self.steps += int(rollout.mask.sum())
        self.completions += len(rollout.mask)
        metrics = {
            "steps": float(self.steps),
            "completions": float(self.completions),
            "epoch": self.used / len(self.prompts),
            "length": float(rollout.mask.sum(1).double().mean()),
        }
        return replace(rollout, metrics=metrics)


def demonstrated(prompts: Prompts, device: torch.device | str = "cpu") -> Rollout:
    """Prompts with their answers as a rollout: every token of an answer is a decision, and no other token is."""
    lengths = torch.tensor([len(row) for row in prompts.answers])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    tokens = torch.full(mask.shape, prompts.pad)
    tokens[mask] = torch.tensor(list(chain.from_iterable(prompts.answers)))
    last = torch.arange(mask.shape[1]) == lengths.unsqueeze(1) - 1
    obs = Prefixes(*prompts.padded(), tokens, mask)
    nothing = torch.zeros(mask.shape)
    return Rollout(obs, tokens, nothing, nothing, last, last, mask, torch.arange(len(mask))).to(device)


def decoupled(parts: Float[Tensor, "B N"], weights: Float[Tensor, " N"], size: int) -> Float[Tensor, " B"]:
    """sum_n w_n (r_n - mean of the group) / std of the group, for each of N rewards apart (GDPO, arXiv 2601.05242).

    Of a sum of rewards with different scales the group's deviation is that of the largest; here each has a deviation of
    1. size: consecutive rows are a group. A reward that is NaN or that all of a group share adds 0; NaN where all are.
    """
    each = parts.double().view(-1, size, parts.shape[1])
    known = ~each.isnan()
    count = known.sum(1, keepdim=True)
    origin = each.nan_to_num(-torch.inf, neginf=-torch.inf).amax(1, keepdim=True)  # equal rewards become exactly 0
    centered = (each - origin).where(known, 0.0)
    centered = (centered - centered.sum(1, keepdim=True) / count.clamp(min=1)).where(known, 0.0)
    std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    scaled = (centered / std).where(known & (std > 2 * torch.finfo(torch.double).eps * origin.abs()), 0.0)
    total = (scaled * weights.double()).sum(-1).flatten()
    return total.where(known.any(-1).flatten(), torch.nan).to(parts.dtype)


def _spreads(reward: Float[Tensor, " B"], counts: Bool[Tensor, " B"], size: int) -> dict[str, float]:
    """The mean standard deviation within a group, and the share of groups without any; of the rows that count."""
    groups = [x[c] for x, c in zip(reward.split(size), counts.split(size), strict=True) if c.any()]
    if not groups:
        return {}
    spread = torch.stack([x.std(correction=0) for x in groups])
    return {"group_std": float(spread.mean()), "flat_groups": float((spread == 0).double().mean())}


def _of_conversations(said: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The mean number of turns of the policy in a conversation, and of calls of tools, with the share that failed."""
    roles = [x["role"] for messages in said for x in messages]
    calls = [x for messages in said for x in messages if x["role"] == "tool"]
    failed = sum(str(x["content"]).startswith(ERROR) for x in calls)
    told = {"tool_calls": len(calls) / len(said), "tool_errors": failed / len(calls)} if calls else {}
    return {"turns": roles.count("assistant") / len(said), **told}


def _shares(origin: Int[Tensor, " N"], weight: Sequence[float]) -> list[tuple[Int[Tensor, " n"], int]]:
    """The prompts of each data set, and how many of them an epoch has; empty without weights.

    The counts add up to N: the largest remainders are rounded up.
    """
    if not weight:
        return []
    sets = [(origin == k).nonzero().squeeze(1) for k in range(len(weight))]
    if not all(map(len, sets)):
        raise UserError("a data set with a weight has no prompt to train on: hold out fewer, or leave it out")
    exact = [len(origin) * x / sum(weight) for x in weight]
    counts = [math.floor(x) for x in exact]
    for k in sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])[: len(origin) - sum(counts)]:
        counts[k] += 1
    return list(zip(sets, counts, strict=True))


def _drawn(index: Int[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """`count` of these in random order; all of them come before one comes again."""
    rounds = [index[torch.randperm(len(index), generator=generator)] for _ in range(math.ceil(count / len(index)))]
    return torch.cat([index[:0], *rounds])[:count]


def as_rollout(answers: Answers, group_size: int, cut: str, cut_penalty: float, metrics: dict[str, float]) -> Rollout:
    """Answers as a rollout. Each row terminates at its last decision, and the reward stands there.

    What an environment gave stands where it gave it, and a reward by token at its token. A cut completion terminates
    too: its reward is for the text as it is, so no value lies beyond. A row without a reward, or cut and masked, has no
    decision that counts, and is a group of its own.
    """
    done, device = answers.completions, answers.completions.tokens.device
    mask, reward = done.mask, answers.reward.to(device)
    out = reward.isnan() | done.cut if cut == "masked" else reward.isnan()
    if cut == "penalized":
        reward = reward - cut_penalty * done.cut
    earned = torch.zeros_like(done.logp)
    for part in (answers.earned, answers.by_token):
        earned = earned if part is None else earned + part
    reward = at_last_decision((reward - earned.sum(1)).nan_to_num(0.0), mask) + earned
    last = at_last_decision(torch.ones(len(mask), device=device), mask).bool()
    mask = mask & ~out.unsqueeze(1)
    row = torch.arange(len(mask), device=device)
    group = ranks.apart(torch.where(out, len(mask) + row, row // group_size))
    prompt, prompt_mask = (x.to(device) for x in answers.prompts.padded())
    obs = Prefixes(prompt, prompt_mask, done.tokens, mask)
    return Rollout(
        obs=obs,
        action=done.tokens,
        logp=done.logp,
        reward=reward,
        terminated=last,
        ended=last,
        mask=mask,
        group=group,
        memoryless=False,
        metrics=metrics,
        state=answers.state,
    )
