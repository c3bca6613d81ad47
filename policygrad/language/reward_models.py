"""Reward models: trained on comparisons, used as reward functions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from policygrad.errors import UserError, ending
from policygrad.language import models, templates
from policygrad.language.data import encode_texts, place_of
from policygrad.language.policies import evaluating
from policygrad.language.rewards import Column
from policygrad.rollout import Batch
from policygrad.weights import average, per_row

Pair = tuple[list[int], list[int]]  # a prompt with the chosen completion, and with the rejected one, as tokens


def bradley_terry(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log P(chosen > rejected) = log sigma(r_chosen - r_rejected), to be maximized.

    [B] -> [B]. Bradley & Terry 1952; in deep RL Christiano et al. 2017 (arXiv 1706.03741), eq. 1; for language models
    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    """
    return logsigmoid(chosen - rejected)


def centered(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """-(r_chosen + r_rejected)^2: pulls the mean of a pair to 0, since comparisons leave the rewards' zero open.

    [B] -> [B]. Eisenstein et al. 2023, arXiv 2312.09244, eq. 4.
    """
    return -((chosen + rejected) ** 2)


class RewardModel:
    """r(x, y) of a sequence classifier with one label, as a reward function.

    The score is read at the last token of prompt and completion, the end-of-sequence token unless the completion was
    cut. A text is tokenized with its prompt as a whole; a conversation is written by the chat template. Rows are scored
    `rows` at a time, without dropout; padding changes nothing.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "reward_model", rows: int = 64
    ) -> None:
        if model.config.num_labels != 1:
            raise UserError(
                f"{ending(name)} has {model.config.num_labels} labels: give a reward model, which has one, the reward"
            )
        models.check_pair(model, tokenizer, 0)
        model.config.get_text_config().pad_token_id = (
            tokenizer.pad_token_id
        )  # the model's own class finds the end by it
        self.model, self.tokenizer, self.rows, self.__name__ = model, tokenizer, rows, name
        self.head = score_head(model)

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        device: str = "cpu",
        trust_remote_code: bool = False,
        trust: bool = False,
        dtype: str = "auto",
    ) -> "RewardModel":
        """From a directory or a hub id. Raises UserError, also for a model without a trained head."""
        model, missing = classifier(spec, dtype=dtype, trust_remote_code=trust_remote_code, trust=trust)
        if missing:
            raise UserError(
                f"{ending(spec)} is no reward model, since it has no {ending(missing[-1], 40)}: "
                "train one from it with policygrad reward-model --model"
            )
        tokenizer = models.load_tokenizer(spec, trust_remote_code=trust_remote_code)
        return cls(model.to(device), tokenizer, name=Path(spec).name)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, prompts: Column, completions: Column, cut: Column | None = None, **_: Any) -> list[float]:
        """The reward of each completion. cut: a limit stopped it, so it has no end-of-sequence token."""
        cut = [False] * len(completions) if cut is None else cut
        rows = [encode(*x, self.tokenizer) for x in zip(prompts, completions, cut, strict=True)]
        models.check_pair(self.model, self.tokenizer, max(map(len, rows), default=0))
        with evaluating(self.model):
            parts = [self.score(rows[i : i + self.rows]) for i in range(0, len(rows), self.rows)]
        return [reward for part in parts for reward in part.tolist()]

    def score(self, rows: Sequence[list[int]]) -> Float[Tensor, " B"]:
        """r of rows of tokens, in one batch, with its gradient."""
        device = next(self.model.parameters()).device
        length = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(int(length.max()), device=device) < length.unsqueeze(1)
        tokens = torch.full(mask.shape, int(self.tokenizer.pad_token_id), device=device)
        tokens[mask] = torch.tensor([token for row in rows for token in row], device=device)
        inputs = {"input_ids": tokens, "attention_mask": mask.long()}
        if self.head is None:
            return self.model(**inputs).logits[:, 0].float()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return self.head(hidden[torch.arange(len(rows), device=device), length - 1])[:, 0].float()


def encode(prompt: Any, completion: Any, cut: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt and its completion as tokens, with an end unless it was cut. Both are text, or lists of messages.

    Raises UserError for messages without a chat template, and if there are no tokens.
    """
    if not isinstance(prompt, str):
        return _conversation([*prompt, *completion], cut, tokenizer)
    row = encode_texts([prompt + completion], tokenizer)[0]
    if not cut and row[-1:] != [tokenizer.eos_token_id]:
        row.append(int(tokenizer.eos_token_id))
    if not row:
        raise UserError("a prompt and its completion are both empty: leave the row out, or give it a text")
    return row


def encode_pairs(
    examples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[Pair]:
    """Each prompt with its chosen and its rejected completion, as tokens. Raises UserError about all longer pairs."""
    pairs = []
    for example in examples:
        chosen, rejected = (encode(example["prompt"], example[x], False, tokenizer) for x in ("chosen", "rejected"))
        pairs.append((chosen, rejected))
    lengths = [max(map(len, pair)) for pair in pairs]
    long = [i for i, length in enumerate(lengths) if max_length is not None and length > max_length]
    if long:
        raise UserError(
            f"{len(long):,} of {len(pairs):,} pairs are longer than {max_length} tokens, the first in "
            f"{place_of(examples, long[0])} with {lengths[long[0]]}: raise max_length, or leave them out"
        )
    return pairs


def as_batch(count: int, device: torch.device | str = "cpu") -> Batch:
    """Pairs as the rows of a batch, all with the same weight; obs is the number of a pair."""
    number, zero = torch.arange(count, device=device), torch.zeros(count, 1, device=device)
    everywhere = torch.ones(count, 1, dtype=torch.bool, device=device)
    return Batch(number, zero, zero, everywhere, per_row(everywhere), zero, zero, zero)


def preference_objective(
    model: RewardModel, pairs: Sequence[Pair], *, center_coefficient: float = 0.0
) -> Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]:
    """E[log sigma(r_chosen - r_rejected) - c (r_chosen + r_rejected)^2] over the pairs of a batch, as an objective.

    Its metrics are the objective, the accuracy (see `accuracy`) and the margin, E[r_chosen - r_rejected].
    """

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = scores(model, [pairs[i] for i in batch.obs.tolist()])
        gain = bradley_terry(chosen, rejected) + center_coefficient * centered(chosen, rejected)
        columns = {"objective": gain, "accuracy": accuracy(chosen, rejected), "margin": chosen - rejected}
        means = {name: average(x.unsqueeze(1), batch.weight) for name, x in columns.items()}
        return means["objective"], {name: x.detach() for name, x in means.items()}

    return objective


def scores(model: RewardModel, pairs: Sequence[Pair]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """r_chosen and r_rejected of every pair, in one pass."""
    both = model.score([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])
    return both[: len(pairs)], both[len(pairs) :]


def accuracy(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 where the chosen completion scores higher, 1/2 where both score the same, else 0: [B] -> [B]."""
    return ((chosen - rejected).sign() + 1) / 2


def classifier(spec: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier by path or hub id, with the names of missing weights, now random. Raises UserError."""
    missing: list[str] = []

    class Auto:
        @staticmethod
        def from_pretrained(*arguments: Any, **named: Any) -> Any:
            model, loading = AutoModelForSequenceClassification.from_pretrained(*arguments, **named)
            missing.extend(sorted(loading["missing_keys"]))
            return model, loading

    return models.load_model(spec, kind=Auto, what="reward model", **options), missing


@torch.no_grad()
def score_head(model: PreTrainedModel) -> nn.Module | None:
    """The head if the model scores the state of the last token; None if it scores another one.

    A decoder's own class looks for the last token that is not padding. If the padding is the end-of-sequence token,
    as it often is, it finds the token before the end. So RewardModel finds the place. Encoders score the first token.
    """
    head, body = getattr(model, "score", None), model.base_model
    if not isinstance(head, nn.Module) or body is model:
        return None
    padding = model.config.get_text_config().pad_token_id
    tokens = torch.tensor([[x for x in range(3) if x != padding]], device=next(model.parameters()).device)
    with evaluating(model):
        logits, hidden = model(input_ids=tokens).logits, body(input_ids=tokens).last_hidden_state
        return head if torch.allclose(head(hidden[:, -1]), logits, rtol=1e-2, atol=1e-4) else None


def _conversation(messages: list[dict[str, Any]], cut: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Messages as the chat template writes them; a cut one without its end, if the template allows that."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompts are conversations, and the reward model's tokenizer has no chat template: give prompts as "
            "plain text, or a tokenizer with one"
        )
    (text, error), *_ = templates.write([(messages, "open" if cut else "closed")], tokenizer)
    if text is None and cut:  # the template changes a message's text
        (text, error), *_ = templates.write([(messages, "closed")], tokenizer)
    if text is None:
        raise UserError(f"the chat template cannot write a conversation: {error}; change the template or the row")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
