"""A task without downloads or a GPU: addition with its working, for a language model to reason in.

    prompt      47+385=
    completion  7+5=12,4+8+1=13,0+3+1=4:432

The working goes from the last column to the first: digit + digit (+ carry) = sum. Demonstrations are imperfect: some
demonstrators forget to carry, and some of their columns are wrong. A model trained on them is right less than half of
the time. Only the reward says which of the two ways of working is right.
"""

import random
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policygrad.errors import UserError
from policygrad.language.models import HEADS, small_llama

CHARACTERS = "0123456789+=,:"
NUMBERS = 1000  # both numbers of a problem are below this
TRAINED_ON = 8000  # problems, in the demonstrations and in training
KEPT = 4096  # problems that are never trained on


@dataclass(frozen=True)
class Demonstrators:
    """How imperfect the demonstrations are."""

    forgets: float = 0.72  # the share of demonstrations without a single carry
    errs: float = 0.02  # the probability that a column's sum is wrong


def working(a: int, b: int, carries: bool = True, errs: float = 0.0, generator: random.Random | None = None) -> str:
    """The working of a + b by a demonstrator who does or does not carry."""
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
    """Distinct problems drawn with a seed, each with its prompt and answer as text; none of the prompts `exclude`."""
    generator = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        a, b = generator.randrange(NUMBERS), generator.randrange(NUMBERS)
        prompt = f"{a}+{b}="
        if prompt not in exclude:
            found[prompt] = {"prompt": prompt, "answer": str(a + b)}
    return list(found.values())


def splits(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Problems to train on, and held-out problems. The split is the same for all counts.

    Raises UserError if held_out is more than KEPT.
    """
    if held_out > KEPT:
        raise UserError(f"{held_out} problems cannot be held out of arithmetic: hold out at most {KEPT}")
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
    """The reward: 1 if the text after the colon is the sum, else 0."""
    return [float(text.rpartition(":")[1:] == (":", x)) for text, x in zip(completions, answer, strict=True)]


def preferences(
    examples: list[dict[str, Any]], seed: int, quality: Demonstrators | None = None, errs: float = 0.05
) -> list[dict[str, str]]:
    """Comparisons of two imperfect completions of a problem. The judge prefers the right one, with some errors.

    A problem has no comparison if both completions are right or both are wrong. By default the demonstrators make
    more mistakes here than in `demonstrations`. errs: the probability of an error by the judge.
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
    """A tokenizer with one token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<eos>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def configuration(hidden: int = 96, layers: int = 3, heads: int = HEADS) -> LlamaConfig:
    """The configuration of a small Llama. Raises UserError as small_llama does."""
    return small_llama(tokenizer(), hidden, layers, heads, context=64)


def model(hidden: int = 96, layers: int = 3, heads: int = HEADS) -> LlamaForCausalLM:
    """A small Llama with weights from torch's global generator."""
    return LlamaForCausalLM(configuration(hidden, layers, heads))
