"""A task of its own, without a network or a GPU: addition with written-out working, for a language model to reason in.

    prompt      47+385=
    completion  7+5=12,4+8+1=13,0+3+1=4:432

The working goes from the last column to the first: digit + digit (+ carry) = sum. Demonstrations are imperfect: some
demonstrators forget to carry, and some of their columns are wrong. What a model learns from them is right less than
half of the time; which of the two ways of working is right, only the reward says.
"""

import random
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policygrad.errors import UserError

CHARACTERS = "0123456789+=,:"
NUMBERS = 1000  # each of the two is below this
KEPT = 4096  # problems kept from all training, for whoever holds some out


@dataclass(frozen=True)
class Demonstrators:
    """How imperfect the demonstrations are."""

    forgets: float = 0.72  # the share of demonstrations without a single carry
    errs: float = 0.02  # the probability that a column's sum is wrong


def working(a: int, b: int, carries: bool = True, errs: float = 0.0, generator: random.Random | None = None) -> str:
    """The written-out addition of a and b, as a demonstrator would who does or does not carry."""
    generator = generator or random.Random(0)
    carry, columns, digits = 0, [], []
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        if generator.random() < errs:
            total = generator.randrange(19)
        columns.append(f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}")
        last = place + 1 == width
        digits.append(str(total) if last else str(total % 10))
        carry = total // 10 if carries else 0
    return ",".join(columns) + ":" + "".join(reversed(digits))


def problems(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Different problems, drawn with a seed: a prompt, and the answer, as text. None of `exclude` is among them."""
    generator = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        a, b = generator.randrange(NUMBERS), generator.randrange(NUMBERS)
        prompt = f"{a}+{b}="
        if prompt not in exclude:
            found[prompt] = {"prompt": prompt, "answer": str(a + b)}
    return list(found.values())


def splits(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Problems to train on and problems that are in no demonstration and no rollout: the same, however many of each.

    Raises UserError for more than KEPT to hold out.
    """
    if held_out > KEPT:
        raise UserError(f"{held_out} problems cannot be held out of arithmetic: {KEPT} at most")
    kept = problems(KEPT, seed=seed + 1)
    return problems(train, seed=seed, exclude=frozenset(x["prompt"] for x in kept)), kept[:held_out]


def demonstrations(examples: list[dict[str, Any]], seed: int, quality: Demonstrators | None = None) -> list[str]:
    """One imperfect completion of each problem."""
    quality, generator = quality or Demonstrators(), random.Random(seed)
    texts = []
    for example in examples:
        a, b = (int(x) for x in example["prompt"][:-1].split("+"))
        texts.append(working(a, b, generator.random() >= quality.forgets, quality.errs, generator))
    return texts


def right(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward: 1 if what stands after the colon is the sum, else 0."""
    return [float(text.rpartition(":")[1:] == (":", x)) for text, x in zip(completions, answer, strict=True)]


def preferences(
    examples: list[dict[str, Any]], seed: int, quality: Demonstrators | None = None, errs: float = 0.05
) -> list[dict[str, str]]:
    """Comparisons: of two imperfect completions of a problem a judge prefers the right one, and errs now and then.

    Problems of which both completions are right, or neither is, have no comparison. By default the demonstrators are
    more careless here, so that their mistakes are of every kind. errs: the probability that the judge does.
    """
    quality, generator = quality or Demonstrators(forgets=0.5, errs=0.2), random.Random(seed)
    pairs = []
    for example in examples:
        two = demonstrations([example, example], generator.getrandbits(32), quality)
        first, second = right([example["prompt"]] * 2, two, [example["answer"]] * 2)
        mistaken = generator.random() < errs
        if first != second:
            chosen, rejected = two if (first > second) != mistaken else reversed(two)
            pairs.append({"prompt": example["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<eos>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def configuration(hidden: int = 96, layers: int = 3) -> LlamaConfig:
    """A small Llama's."""
    vocabulary = tokenizer()
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=vocabulary.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )


def model(hidden: int = 96, layers: int = 3) -> LlamaForCausalLM:
    """A small Llama, from its configuration; its weights are drawn from torch's global generator."""
    return LlamaForCausalLM(configuration(hidden, layers))
