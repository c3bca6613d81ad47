"""Chat templates of model families with a tokenizer of one token a character, and environments to talk to."""

from typing import Any

from transformers import PreTrainedTokenizerFast

# As the families write them, without what no test reads (a default system message, dates).
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
FAMILIES: dict[str, tuple[str | None, str, str | None]] = {  # template, end of a turn, beginning of a text
    "qwen": (QWEN, "<|im_end|>", None),
    "llama": (LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "gpt2": (None, "<|endoftext|>", None),
}
MARKS = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a character, and one for each mark of the family's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    template, end, begin = FAMILIES[family]
    names = ["<pad>", *dict.fromkeys([end, *([begin] if begin else []), *MARKS]), *map(chr, range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    from tokenizers import Regex

    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    more: dict[str, Any] = {"bos_token": begin} if begin else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token=end, additional_special_tokens=MARKS, **more
    )
    made.chat_template = template
    return made


class Echo:
    """It repeats what it hears, for three turns, and pays by turn; text for tokenizers without a template."""

    plain = False

    def reset(self, seed: int) -> Any:
        self.seed, self.turns = seed, 0
        return f"say {seed}:" if self.plain else [{"role": "user", "content": f"say {seed}"}]

    def step(self, text: str) -> Any:
        self.turns += 1
        heard = f"({text[:3]})" if self.plain else [{"role": "tool", "content": f"heard {text[:3]!r}"}]
        return (None if self.turns == 3 else heard), self.turns / 10 + self.seed, self.turns == 3


class PlainEcho(Echo):
    plain = True
