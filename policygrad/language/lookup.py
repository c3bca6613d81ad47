"""A task without downloads or a GPU that needs a tool: find the number at the end of a chain of keys.

    user        find q3
    assistant   <tool_call> {"name": "lookup", "arguments": {"key": "q3"}} </tool_call>
    tool        x7
    assistant   <tool_call> {"name": "lookup", "arguments": {"key": "x7"}} </tool_call>
    tool        583
    assistant   583

Each conversation has a chain of its own, of one to three keys, so no weight can know the number. Demonstrations are
imperfect: at each key many demonstrators lose patience and make up a number. A model trained on them looks up too
little. Only the reward says that it pays to go on.
"""

import random
import re

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policygrad.language import data
from policygrad.language.completions import Completions, Request
from policygrad.language.conversations import Dialogue, Message, Messages, from_seed, starts
from policygrad.language.models import HEADS, small_llama
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.language.sampler import request_of
from policygrad.language.tasks import prepared
from policygrad.language.tools import answers_to_calls
from policygrad.rollout import Batch

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
LONGEST = 3  # keys in a chain
TURNS = LONGEST + 1
DEMONSTRATED = 4000  # conversations, with seeds that training never sees
IMPATIENT, ERRS = 0.45, 0.02  # the share of demonstrators that give up at a key, and of digits that are copied wrongly
MAX_TOKENS = 72  # of a conversation after its prompt
ABOVE_ALL = 10**9  # the first seed of demonstrations
BEGIN, END = "<|im_start|>", "<|im_end|>"
CALL, CALLED = '<tool_call>\n{"name": "lookup", "arguments": {"key": "', '"}}\n</tool_call>'
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Lookup:
    """The environment: it pays 1 for the number at the end of the chain, and ends at the first turn without a call."""

    def reset(self, seed: int) -> Messages:
        """A new chain."""
        drawn = random.Random(seed)
        keys = drawn.sample([letter + digit for letter in LETTERS for digit in DIGITS], drawn.randint(1, LONGEST))
        self.number = str(drawn.randrange(100, 1000))
        self.chain = dict(zip(keys, [*keys[1:], self.number], strict=True))
        return [{"role": "user", "content": f"find {keys[0]}"}]

    def lookup(self, key: str) -> str:
        """Look up what stands at a key: another key, or the number.

        Args:
            key: The key.
        """
        return self.chain.get(key, "nothing")

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """What stands at the key, or whether the number is right."""
        answers: list[Message] = answers_to_calls(text, [self.lookup])
        return (answers, 0.0, False) if answers else (None, float(text == self.number), True)


def demonstrated(said: str, drawn: random.Random) -> str:
    """The turn of an imperfect demonstrator who has heard this last: a key or a number."""
    if said[:1].isalpha() and drawn.random() >= IMPATIENT:
        return f"{CALL}{said}{CALLED}"
    number = said if said.isdigit() else str(drawn.randrange(100, 1000))
    return "".join(drawn.choice(DIGITS) if drawn.random() < ERRS else digit for digit in number)


def demonstrations(policy: LanguagePolicy, count: int = DEMONSTRATED) -> Batch:
    """Conversations of demonstrators as decisions, to raise their log-probability. policy: where it is computed."""
    words, drawn = tokenizer(), random.Random(0)

    def demonstrators(
        policy: LanguagePolicy, prompt: Tensor, prompt_mask: Tensor, request: Request, generator: torch.Generator
    ) -> Completions:
        """An engine that lets demonstrators answer the newest message."""
        texts = words.batch_decode([row[seen] for row, seen in zip(prompt, prompt_mask, strict=True)])
        newest = [text.split(BEGIN)[-2].partition("\n")[2].partition(END)[0] for text in texts]
        said = [demonstrated(text.removeprefix("find "), drawn) for text in newest]
        rows = [[*row, int(words.eos_token_id)] for row in data.as_tokens(said, words)]
        tokens = torch.tensor([row + [request.pad] * (request.max_tokens - len(row)) for row in rows])
        chosen = torch.arange(request.max_tokens) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        return Completions(tokens, torch.zeros(chosen.shape), chosen, torch.zeros(len(rows), dtype=torch.bool))

    prompts = prepared(starts(Lookup, count, first=ABOVE_ALL), words)
    request = request_of(policy.model, words, 1, MAX_TOKENS)
    dialogue = Dialogue(from_seed(Lookup), TURNS)
    done = dialogue(policy, prompts, request, words, None, torch.Generator(), demonstrators).completions
    device = next(policy.parameters()).device
    obs = Prefixes(*(x.to(device) for x in (*prompts.padded(), done.tokens, done.mask)))
    zero = torch.zeros(done.mask.shape, device=device)
    return Batch(obs, obs.completion, zero, obs.completion_mask, zero, zero, zero, zero)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character, mark, role, and part of a call, and a chat template (ChatML)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    whole = [CALL, CALLED, "find ", "nothing", *(f"{role}\n" for role in ("user", "assistant", "tool"))]
    names = ["<pad>", BEGIN, END, *whole, *map(chr, range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    pattern = "|".join([*map(re.escape, whole), r"[\s\S]"])
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token=END, additional_special_tokens=[BEGIN]
    )
    made.chat_template = TEMPLATE
    return made


def configuration(hidden: int = 64, layers: int = 2, heads: int = HEADS) -> LlamaConfig:
    """The configuration of a small Llama. Raises UserError as small_llama does."""
    return small_llama(tokenizer(), hidden, layers, heads, context=192)


def model(hidden: int = 64, layers: int = 2, heads: int = HEADS) -> LlamaForCausalLM:
    """A small Llama with weights from torch's global generator."""
    return LlamaForCausalLM(configuration(hidden, layers, heads))
