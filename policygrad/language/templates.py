"""Chat templates, written in a child process with limits of time and memory.

A template comes with a tokenizer from elsewhere. Jinja's sandbox keeps it from files and code, and not from looping
without end or from filling the memory.
"""

import atexit
import contextlib
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError, listed, one_line, shortened

SECONDS, START_SECONDS = 30.0, 300.0  # for TOGETHER conversations, and for the start of the process
TOGETHER = 256
LONGEST = 10_000_000  # characters of a conversation
MEMORY = 4 * 2**30  # bytes
WRITE = f"""
import json, sys
from jinja2 import meta
from transformers.utils import chat_template_utils as utils
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass

def written(messages, ending):
    options = {{"add_generation_prompt": ending == "answer", "continue_final_message": ending == "open"}}
    options.update(asked["variables"], chat_template=asked["template"])
    text = utils.render_jinja_template([messages], **options)[0][0]
    return [text, None] if len(text) <= {LONGEST} else [None, "it writes more than {LONGEST:,} characters"]

def unread():
    environment = utils._compile_jinja_template(asked["template"]).environment
    return sorted(set(asked["given"]) - meta.find_undeclared_variables(environment.parse(asked["template"])))

print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = {{"unread": [], "texts": []}}
    try:
        answer["unread"] = unread() if asked["given"] else []
    except Exception:
        pass  # the same error comes with the first conversation
    for messages, ending in asked["conversations"]:
        try:
            answer["texts"].append(written(messages, ending))
        except Exception as error:
            answer["texts"].append([None, str(error) or type(error).__name__])
    print(json.dumps(answer), flush=True)
"""


def write(
    conversations: Sequence[tuple[list[dict[str, Any]], str]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[tuple[str | None, str | None]]:
    """Conversations as the tokenizer's chat template writes them: (text, None), or (None, the template's error).

    conversations: messages, and how their text ends: "answer", where the assistant's next message begins; "open", in
    the last message, to be continued; or "closed". variables: what else the template reads, such as enable_thinking.

    Raises UserError if there is no template, if it does not read a variable, or if it takes too much time or memory.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the data has conversations, and the tokenizer has no chat template: give plain text, or a tokenizer with "
            "one"
        )
    variables = dict(variables or {})
    check_variables(variables)
    special = {name: str(x) for name, x in tokenizer.special_tokens_map.items()}
    asked = {"template": tokenizer.get_chat_template(), "variables": special | variables, "given": list(variables)}
    texts: list[tuple[str | None, str | None]] = []
    for start in range(0, len(conversations), TOGETHER):
        some = conversations[start : start + TOGETHER]
        found = _writer({**asked, "conversations": [([_given(x) for x in messages], end) for messages, end in some]})
        if found is None:
            raise UserError(
                f"the chat template takes more than {SECONDS:g} s or too much memory: give a tokenizer with another one"
            )
        if found["unread"]:
            raise UserError(
                f"the chat template reads no variable {shortened(found['unread'][0])}: correct template_variables"
            )
        texts += [(text, None if error is None else one_line(error, 80)) for text, error in found["texts"]]
    return texts


def openings(
    conversations: Sequence[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """What the template writes into the assistant's turn before a completion, such as <think>; often nothing.

    That is the generation prompt without its header, which is what stands before the text of an assistant's turn in a
    conversation that goes on. A conversation whose last message is the assistant's is continued, without an opening.
    """
    mark = "policygrad-turn"
    turns = [{"role": "assistant", "content": mark}, {"role": "user", "content": mark}]
    asked = [x for x in conversations if x[-1]["role"] != "assistant"]
    forms = [(x, "closed") for x in asked] + [(x, "answer") for x in asked] + [([*x, *turns], "closed") for x in asked]
    texts = [text for text, _ in write(forms, tokenizer, variables)] if asked else []
    count = len(asked)
    found = iter(zip(texts[:count], texts[count : 2 * count], texts[2 * count :], strict=True))
    return ["" if x[-1]["role"] == "assistant" else _opening(*next(found), mark) for x in conversations]


def reads(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads a variable."""
    asked = {"template": tokenizer.get_chat_template(), "variables": {}, "given": [name], "conversations": []}
    found = _writer(asked)
    return found is not None and not found["unread"]


def between(
    conversations: Sequence[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """What the template writes between the text of the assistant's last message and its next one.

    That is the end of its turn, the messages after it, and the beginning of the next turn. Each conversation ends with
    messages of others. The text is replaced by a mark, so that nothing depends on how it would be written again.

    Raises UserError for a conversation that the template cannot write.
    """
    marked, marks = [], []
    for messages in conversations:
        place = max(i for i, x in enumerate(messages) if x["role"] == "assistant")
        mark = "policygrad-turn"
        while mark in str(messages):
            mark += "-turn"
        marks.append(mark)
        here = {"role": "assistant", "content": mark}
        marked.append(([*messages[:place], here, *messages[place + 1 :]], "answer"))
    found = []
    for mark, (text, error) in zip(marks, write(marked, tokenizer, variables), strict=True):
        if text is None or text.count(mark) != 1:
            said = error or "it leaves out or repeats the assistant's text"
            raise UserError(f"the chat template cannot write this conversation: {said}: give another model or template")
        found.append(text.partition(mark)[2])
    return found


def _opening(before: str | None, opened: str | None, whole: str | None, mark: str) -> str:
    if before is None or opened is None or whole is None:  # a template that refuses such a conversation
        return ""
    opened, header = opened.removeprefix(before), whole.removeprefix(before).partition(mark)[0]
    return opened.removeprefix(header) if opened.startswith(header) else ""


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise UserError for a name that is not the template's to read."""
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents"}
    taken = [name for name in variables if name in own | {"messages", "conversations"}]
    if taken:
        raise UserError(f"template_variables has {listed(taken)}, which is set for each prompt: leave it out")


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: a field of None is a field that is not there."""
    return {name: x for name, x in message.items() if x is not None}


class _Writer:
    """The child process. It starts at first use; a request that takes too long ends it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None if it took too much time or memory."""
        line = json.dumps(asked, default=str).encode() + b"\n"
        with self.lock:
            said = self._exchange(self.process or self._start(), line, SECONDS)
            if not said.endswith(b"\n"):
                self._end()
                return None
            return json.loads(said)

    def _start(self) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WRITE], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        if not self._exchange(self.process, b"", START_SECONDS):
            self._end()
            raise UserError("the process that writes chat templates cannot start: check jinja2 (pip install jinja2)")
        return self.process

    def _exchange(self, process: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> bytes:
        """Write a line and read one. The process ends if that takes longer."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return b""
        finally:
            timer.cancel()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None and not pipe.closed:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self.process = None


_writer = _Writer()
