"""A causal language model as a policy: prefixes -> the distribution of the next token, [B, T].

T counts the tokens of the completion. A left-padded prompt precedes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policygrad.language.distributions import CHUNK, TokenDistribution
from policygrad.language.packing import Row, by_group, cheapest, packed, padding
from policygrad.precision import precision
from policygrad.rollout import Parts


class Prefixes(NamedTuple):
    """What a language policy sees: at step t the prompt and completion[:, :t]. All have B rows.

    Prompts are padded on the left, completions on the right. prompt_mask is False at padding. completion_mask is True
    at decisions; the policy sees every token before a row's last decision, also inserted ones, where it is False.
    """

    prompt: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]

    def lengths(self) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """The tokens of each prompt, and the steps up to each row's last decision, at least 1."""
        steps = torch.arange(1, self.completion.shape[1] + 1, device=self.completion.device)
        return self.prompt_mask.sum(1), (steps * self.completion_mask).amax(1).clamp(min=1)

    def prompts(self) -> tuple[Int[Tensor, "N P"], Int[Tensor, " B"]]:
        """The different prompts, -1 at padding, and which of them each row has."""
        return self.prompt.where(self.prompt_mask, -1).unique(dim=0, return_inverse=True)

    @staticmethod
    def join(several: "Sequence[Prefixes]") -> "Prefixes":
        """The rows of several, one after the other; shorter prompts get more padding on the left."""
        width = max(x.prompt.shape[1] for x in several)
        prompts, masks, *completions = zip(*several, strict=True)
        wide = [[pad(x, (width - x.shape[1], 0)) for x in column] for column in (prompts, masks)]
        return Prefixes(*(torch.cat(list(column)) for column in (*wide, *completions)))


def prefixes(tokens: Int[Tensor, "B T"]) -> Prefixes:
    """Rows of tokens without padding, with a decision after every token: policy(y[:, :-1]).log_prob(y[:, 1:])."""
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)  # the last one is never read
    return Prefixes(tokens[:, :1], everywhere[:, :1], following, everywhere)


class LanguagePolicy(nn.Module):
    """pi(y_t | x, y_<t) of a Hugging Face causal language model, at a temperature that is part of the policy.

    model: any `AutoModelForCausalLM`, with or without a peft adapter. Its dropout is turned off for good, so that the
    policy scored is the policy sampled from. autocast: the type of the trunk's arithmetic (bfloat16); logits are
    raised to float32. chunk: the most logits held at once. shared: a prompt is computed once for its rows (can_share).

    Call it with `Prefixes`, or with rows of tokens [B, T] for the distribution of each next token.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        chunk: int = CHUNK,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.model = without_dropout(model)
        self.temperature = temperature
        self.autocast = autocast
        self.chunk = chunk
        self.plain_head = _head_is_plain(causal(model))

    def forward(self, obs: Prefixes | Tensor) -> TokenDistribution:
        """The distribution of the next token after every prefix."""
        obs = prefixes(obs) if isinstance(obs, Tensor) else obs
        return self.distribution(self.features(obs), obs.completion_mask)

    def features(self, obs: Prefixes) -> Float[Tensor, "B T H"]:
        """The `states` at the T positions that predict the completion's tokens."""
        if self.shared and not torch.compiler.is_compiling() and (several := _Shared.of(obs)) is not None:
            return several.states(self)
        return _over_steps(obs, self.states, self.autocast)

    def states(self, count: int, **inputs: Any) -> Float[Tensor, "B T H"]:
        """The last `count` hidden states of each row, or their logits if the head is more than a linear layer."""
        model = causal(self.model)
        if self.plain_head:
            return trunk(model)(**inputs).last_hidden_state[:, -count:]
        return model(**inputs, logits_to_keep=count).logits[:, -count:]

    def parts(self, obs: Prefixes, rows: int | None = None, tokens: int | None = None) -> Parts:
        """The rows to compute together, at most `rows` and `tokens` of them (packing). A rollout.Split.

        Its metric is `padding`, the share of padding in the tokens that are computed.
        """
        prompt, steps = (x.tolist() for x in obs.lengths())
        given = [Row(p, t - 1, i) for i, (p, t) in enumerate(zip(prompt, steps, strict=True))]
        parts = packed([row.prompt + row.rest for row in given], rows, tokens)
        if self.shared:
            given = [row._replace(group=k) for row, k in zip(given, obs.prompts()[1].tolist(), strict=True)]
            parts = cheapest(given, parts, by_group(given, rows, tokens))
        return [torch.tensor(part) for part in parts], {"padding": torch.tensor(padding(given, parts, self.shared))}

    def distribution(
        self, states: Float[Tensor, "B T H"], where: Bool[Tensor, "B T"] | None = None
    ) -> TokenDistribution:
        """The distribution of the next token, given `states`. Sampling and scoring both use it."""
        weight = bias = None
        if self.plain_head:
            head: Any = causal(self.model).get_output_embeddings()
            weight, bias = head.weight, head.bias
        return TokenDistribution(states, weight, bias, temperature=self.temperature, where=where, chunk=self.chunk)


def can_share(policy: LanguagePolicy) -> bool:
    """Whether the keys and values of a prompt can be computed once, with their gradient, for several completions.

    They can in a cache of full-attention layers, and without gradient checkpoints, which allow no cache.
    """
    model = causal(policy.model)
    if "past_key_values" not in signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return plain and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class _Shared(NamedTuple):
    """Rows some of which have the same prompt: each prompt once, on the left of its rows' completions."""

    prompt: Int[Tensor, "N P"]
    prompt_mask: Bool[Tensor, "N P"]
    row: Int[Tensor, " B"]  # whose prompt each completion follows
    completion: Int[Tensor, "B t"]  # up to the last decision of all rows
    steps: int

    @staticmethod
    def of(obs: Prefixes) -> "_Shared | None":
        """The rows so; None if each has a prompt of its own."""
        prompt, row = obs.prompts()
        if len(prompt) == len(row):
            return None
        seen, count = prompt >= 0, int(obs.lengths()[1].max())
        first = int(seen.any(0).int().argmax())
        prompt, seen = prompt[:, first:].clamp(min=0), seen[:, first:]
        return _Shared(prompt, seen, row, obs.completion[:, :count], obs.completion.shape[1])

    def states(self, policy: LanguagePolicy) -> Float[Tensor, "B T H"]:
        """As those of _over_steps. The gradient of a prompt's keys and values is the sum over its completions."""
        cache, seen = DynamicCache(config=causal(policy.model).config), self.prompt_mask
        place, count = positions(seen), self.completion.shape[1]
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        masks = [seen, seen[self.row]]
        masks[1] = torch.cat([masks[1], masks[1].new_ones(len(self.row), count - 1)], 1)
        inputs = [{} if bool(seen.all()) else {"attention_mask": mask.long()} for mask in masks]
        with precision(seen.device, policy.autocast):
            out = policy.states(1, input_ids=self.prompt, position_ids=place, **inputs[0], **given)[self.row]
            if count > 1:
                cache.reorder_cache(self.row)  # type: ignore[arg-type]
                following = place[self.row, -1:] + torch.arange(1, count, device=seen.device)
                tokens = self.completion[:, :-1]
                rest = policy.states(count - 1, input_ids=tokens, position_ids=following, **inputs[1], **given)
                out = torch.cat([out, rest], 1)
        return pad(out, (0, 0, 0, self.steps - count))


class AdapterOff(nn.Module):
    """A policy without its adapter: the reference of LoRA, without a second copy of the model."""

    def __init__(self, policy: LanguagePolicy) -> None:
        super().__init__()
        self.policy = (policy,)  # not a submodule: its parameters are the policy's

    def forward(self, obs: Prefixes | Tensor) -> TokenDistribution:
        """The distribution of the base model."""
        (policy,) = self.policy
        with torch.no_grad(), policy.model.disable_adapter():  # type: ignore[operator]
            return policy(obs)


def reference_of(policy: LanguagePolicy) -> nn.Module:
    """The policy as it is now, frozen: a copy, or the base model under its adapter, which must be untrained."""
    if hasattr(policy.model, "disable_adapter"):
        return AdapterOff(policy)
    return deepcopy(policy).requires_grad_(False)


class ValueModel(nn.Module):
    """V(x, y_<t): the trunk of a language model and a linear head that starts at 0. obs [B, T] -> [B, T].

    trunk: a copy of the policy's, the policy's own (then both train it), or that of another model with the same tokens.
    """

    def __init__(self, trunk: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.trunk = without_dropout(trunk)
        self.autocast = autocast
        weight = next(trunk.parameters())
        self.head = nn.Linear(width(trunk), 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, obs: Prefixes | Tensor) -> Float[Tensor, "B T"]:
        """The value after every prefix; 0 where there is no decision."""
        obs = prefixes(obs) if isinstance(obs, Tensor) else obs
        return self._value(obs, hidden_states(self.trunk, obs, self.autocast))

    def with_policy(self, policy: nn.Module, obs: Prefixes | Tensor) -> tuple[Any, Float[Tensor, "B T"]]:
        """The policy's distribution and V, and a trunk that both have computed once (critics.both)."""
        if not (isinstance(policy, LanguagePolicy) and policy.plain_head and self.trunk is trunk(policy.model)):
            return policy(obs), self(obs)
        if self.autocast != policy.autocast:
            return policy(obs), self(obs)
        obs = prefixes(obs) if isinstance(obs, Tensor) else obs
        hidden = policy.features(obs)
        return policy.distribution(hidden, obs.completion_mask), self._value(obs, hidden)

    def _value(self, obs: Prefixes, hidden: Float[Tensor, "B T H"]) -> Float[Tensor, "B T"]:
        value = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return value.where(obs.completion_mask, 0.0)


def causal(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside an adapter's wrapper; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def trunk(model: nn.Module) -> nn.Module:
    """A causal language model without its head."""
    return causal(model).base_model


@torch.no_grad()
def width(trunk: nn.Module) -> int:
    """The size of the hidden states that a trunk returns; some models project them after the last layer."""
    tokens = torch.tensor([[0, 1]], device=next(trunk.parameters()).device)
    with evaluating(trunk):
        return int(trunk(input_ids=tokens).last_hidden_state.shape[-1])


def hidden_states(trunk: nn.Module, obs: Prefixes, autocast: torch.dtype | None = None) -> Float[Tensor, "B T H"]:
    """The trunk's last hidden state at the T positions that predict the completion's tokens."""
    return _over_steps(obs, lambda count, **inputs: trunk(**inputs).last_hidden_state[:, -count:], autocast)


def _over_steps(obs: Prefixes, states: Callable[..., Tensor], autocast: torch.dtype | None) -> Float[Tensor, "B T H"]:
    """The states at the T positions that predict the completion's tokens. states: (count, **inputs) -> the last ones.

    Each row is moved to the left, and the columns after the longest row's last decision are left out: attention, which
    is causal, then needs no mask for padding, and a long prompt beside a long completion of another row costs nothing.
    The shapes of a rollout are fixed, the work is not.
    """
    (prompt, steps), (rows, width) = obs.lengths(), obs.prompt.shape
    tokens = torch.cat([obs.prompt, obs.completion[:, :-1]], 1)
    longest, shortest = tokens.shape[1], 1
    if not torch.compiler.is_compiling():
        longest, shortest = int((prompt + steps).max()) - 1, max(1, int(prompt.min()))
    place = torch.arange(longest, device=tokens.device)
    last = (prompt + steps - 2).clamp(min=0).unsqueeze(1)  # repeated: a row has no token of padding to warn of
    moved = place.minimum(last) + (width - prompt).unsqueeze(1)
    with precision(tokens.device, autocast):
        out = states(
            longest - shortest + 1,  # from the end of the shortest prompt on
            input_ids=tokens.gather(1, moved),
            position_ids=place.expand(rows, -1),
            use_cache=False,
        )
    step = torch.arange(obs.completion.shape[1], device=tokens.device)
    index = ((prompt - shortest).unsqueeze(1) + step).clamp(0, out.shape[1] - 1)
    return out.take_along_dim(index.unsqueeze(2), 1)


def positions(seen: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """0, 1, 2, ... from each row's first token, so that padding on the left moves nothing."""
    return (seen.long().cumsum(1) - 1).clamp(min=0)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout at 0, in place. With dropout the ratio of a policy to itself would not be 1.

    Evaluation mode would turn off gradient checkpointing too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _without_noise(module)
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            _without_noise(module.config)  # some layers read it there; it is saved with the model
    return model


def _without_noise(owner: Any) -> None:
    """Set to 0 every number that makes a model noisy in training, under all names that transformers uses."""
    for name, value in vars(owner).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("jitter_noise")):
            setattr(owner, name, 0.0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: generation needs the cache, and gradient checkpointing forbids it."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


@torch.no_grad()
def _head_is_plain(model: PreTrainedModel) -> bool:
    """Whether the logits are a linear function of the last hidden state. Some models cap or scale them."""
    head, body = model.get_output_embeddings(), trunk(model)
    if type(head) is not nn.Linear or body is model:
        return False
    passed: list[tuple[Tensor, Tensor]] = []  # the head's input and output

    def enlarge(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        large = torch.linspace(-1e4, 1e4, logits.numel()).to(
            logits
        )  # a new model's logits are too small to reach a cap
        passed.append((inputs[0], large.view_as(logits)))
        return passed[-1][1]

    tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    hook = head.register_forward_hook(enlarge)
    try:
        with evaluating(model):
            hidden, logits = body(input_ids=tokens).last_hidden_state, model(input_ids=tokens).logits
    finally:
        hook.remove()
    if len(passed) != 1:
        return False
    given, large = passed[0]
    return torch.equal(logits.float(), large.float()) and torch.allclose(given, hidden, rtol=1e-3, atol=1e-3)
