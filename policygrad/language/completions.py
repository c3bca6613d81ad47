"""What an engine of completions is asked, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policygrad.language.policies import LanguagePolicy


@dataclass(frozen=True)
class Request:
    """A request to an engine for completions."""

    completions: int  # of each prompt
    max_tokens: int  # of a completion, its end-of-sequence token among them
    stop: Sequence[int]  # the end-of-sequence tokens
    pad: int  # fills a row after its end
    greedy: bool = False  # take the most likely token instead of a sample; for evaluation
    stop_texts: Sequence[str] = ()  # a completion ends once one of them stands in its text
    decode: Callable[[list[list[int]]], list[str]] | None = None  # tokens -> text, to find the stop texts
    micro_batch: int | None = None  # rows sampled at a time; None: all


@dataclass(frozen=True)
class Completions:
    """B completions of T = max_tokens tokens, those of a prompt side by side, padded on the right.

    mask: the policy chose this token. It may have holes: an engine may insert tokens between decisions, such as the
    output of a tool. The policy sees them and is not scored on them. A completion ends at its last decision.
    logp: of the distribution sampled from; 0 outside the mask. cut: the completion has neither an end-of-sequence token
    nor a stop text.
    """

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    cut: Bool[Tensor, " B"]

    def to(self, device: torch.device | str) -> "Completions":
        """The same on another device."""
        return Completions(*(x.to(device) for x in vars(self).values()))

    def ids(self) -> list[list[int]]:
        """The tokens of each completion up to its end, inserted ones among them."""
        whole = self.mask.flip(1).cumsum(1).flip(1) > 0  # up to the last decision
        return [row[kept].tolist() for row, kept in zip(self.tokens.cpu(), whole.cpu(), strict=True)]


@runtime_checkable
class Engine(Protocol):
    """A sampler of completions: `generate`, or another engine with the same weights.

    Every call hands over the policy, so an engine with its own copy of the weights can bring the copy up to date. Its
    log-probabilities are those of the distribution that it sampled from.
    """

    def __call__(
        self,
        policy: LanguagePolicy,
        prompt: Int[Tensor, "N P"],
        prompt_mask: Bool[Tensor, "N P"],
        request: Request,
        generator: torch.Generator,
    ) -> Completions: ...
