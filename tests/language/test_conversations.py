"""Conversations: what was sampled is what is trained on, byte for byte, and what stands between turns is a hole."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from language.chat import FAMILIES, Echo, PlainEcho, tokenizer
from language.conftest import one_by_one
from policygrad.errors import UserError
from policygrad.language.completions import Completions, Request
from policygrad.language.conversations import Dialogue, Environment, Limited, from_seed, starts
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy
from policygrad.language.rewards import Rewards
from policygrad.language.sampler import CompletionSampler, request_of
from policygrad.language.tasks import prepared
from policygrad.rollout import Rollout
from policygrad.score import log_probabilities

families = pytest.mark.parametrize("family", FAMILIES)
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def policy_of(family: str, *, end: float = 2.0, seed: int = 0) -> LanguagePolicy:
    """A model that ends a turn about once in ten tokens."""
    words = tokenizer(family)
    common: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": words.eos_token_id}
    torch.manual_seed(seed)
    if family == "gpt2":
        size = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 512}
        model: Any = GPT2LMHeadModel(GPT2Config(**common, **size, bos_token_id=None))
    elif family == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**common, **SIZE, num_key_value_heads=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, **SIZE, num_key_value_heads=2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.dim() > 1 else None
        head = nn.Linear(16, len(words))
        head.weight.copy_(0.3 * torch.randn_like(head.weight))
        head.bias.zero_()[words.all_special_ids] = -30.0  # no marks in the middle of a text
        head.bias[words.eos_token_id] = end
        model.set_output_embeddings(head)
        model.config.tie_word_embeddings = False
    return LanguagePolicy(model.eval())


class Recorder:
    """The engine `generate`, with what it sampled."""

    def __init__(self) -> None:
        self.sampled: list[Completions] = []
        self.requests: list[Request] = []

    def __call__(self, *arguments: Any) -> Completions:
        self.sampled.append(generate(*arguments))
        self.requests.append(arguments[3])
        return self.sampled[-1]


def held(
    family: str,
    make: Callable[[], Environment] | None = None,
    *,
    max_tokens: int = 160,
    turns: int = 8,
    turn_tokens: int | None = 9,
    stop_texts: tuple[str, ...] = (),
    policy: LanguagePolicy | None = None,
    judge: Rewards | None = None,
    **options: Any,
) -> tuple[CompletionSampler, Recorder, Rollout, LanguagePolicy]:
    words, engine = tokenizer(family), Recorder()
    make = make or (PlainEcho if family == "gpt2" else Echo)
    policy = policy or policy_of(family)
    sampler = CompletionSampler(
        prepared(starts(make, 4), words),
        words,
        judge,
        request_of(policy.model, words, 3, max_tokens, stop_texts=stop_texts),
        prompts_per_rollout=2,
        answers=Dialogue(from_seed(make), turns, turn_tokens),
        engine=engine,
        **options,
    )
    return sampler, engine, sampler(policy), policy


def turns_of(rollout: Rollout, row: int) -> list[tuple[bool, list[int]]]:
    """A row as pieces: whether it is the policy's, and the tokens. What follows the last decision is left out."""
    pieces: list[tuple[bool, list[int]]] = []
    last = int(rollout.mask[row].nonzero().max())
    for token, mine in zip(rollout.action[row, : last + 1].tolist(), rollout.mask[row].tolist(), strict=False):
        if not pieces or pieces[-1][0] != mine:
            pieces.append((mine, []))
        pieces[-1][1].append(token)
    return pieces


@families
def test_what_was_sampled_is_what_is_trained_on(family: str) -> None:
    _, engine, rollout, policy = held(family)
    assert len(engine.sampled) == 3, "three turns, each of all conversations together"
    assert [x.completions for x in engine.requests] == [3, 1, 1], "a prompt is read once for its conversations"
    for i in range(6):
        mine = [ids for own, ids in turns_of(rollout, i) if own]
        assert mine == [x.ids()[i] for x in engine.sampled], "token by token, turn by turn"
        logp = torch.cat([x.logp[i][x.mask[i]] for x in engine.sampled])
        assert torch.equal(rollout.logp[i][rollout.mask[i]], logp)
    assert torch.equal(rollout.obs.completion_mask, rollout.mask)
    assert not bool(rollout.logp[~rollout.mask].any())
    # The log-probabilities of sampling are those of one pass over the sequence that is trained on.
    assert_close(log_probabilities(policy, rollout), rollout.logp, rtol=0, atol=1e-4)
    assert_close(one_by_one(policy.model, rollout.obs), rollout.logp, rtol=0, atol=1e-4)


@families
def test_what_stands_between_two_turns(family: str) -> None:
    rollout = held(family)[2]
    words = tokenizer(family)
    end, seen = words.eos_token, set()
    for i in range(6):
        pieces = turns_of(rollout, i)
        assert [own for own, _ in pieces] == [True, False] * 2 + [True]
        for k in (0, 2):
            ids = pieces[k][1]
            cut = ids[-1] != words.eos_token_id
            seen.add(cut)
            heard = words.decode([x for x in ids if x != words.eos_token_id], skip_special_tokens=True)[:3]
            closing = end if cut else ""  # a turn with its end gets no second one; a cut one gets it as a hole
            expected = {
                "qwen": f"{closing}\n<|im_start|>user\n<tool_response>\nheard {heard!r}\n</tool_response>{end}\n"
                "<|im_start|>assistant\n",
                "llama": f"{closing}<|start_header_id|>ipython<|end_header_id|>\n\nheard {heard!r}{end}"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "gpt2": f"{closing}({heard})",
            }[family]
            assert words.decode(pieces[k + 1][1]) == expected
    assert seen == {True, False}, "some turns are cut, some are not"


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_a_conversation_is_what_the_template_writes_of_it(family: str) -> None:
    sampler, _, rollout, _ = held(family)
    words = tokenizer(family)
    assert sampler.last is not None
    assert sampler.last.said is not None
    compared = 0
    for i in range(6):
        messages = sampler.last.prompts.texts[i] + sampler.last.said[i]
        last = int(rollout.mask[i].nonzero().max())
        prompt = rollout.obs.prompt[i][rollout.obs.prompt_mask[i]]
        text = words.decode([*prompt.tolist(), *rollout.action[i, : last + 1].tolist()])
        whole = words.apply_chat_template(messages, tokenize=False)
        if all(m["content"] == m["content"].strip() for m in sampler.last.said[i]):  # a template may trim
            compared += 1
            assert whole.startswith(text.removesuffix(words.eos_token))
        assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert compared


@families
def test_rewards_stand_at_the_last_decision_of_their_turn(family: str) -> None:
    sampler, _, rollout, _ = held(family)
    assert sampler.last is not None
    for i in range(6):
        seed = sampler.last.prompts.columns["seed"][i]
        places, at = [], 0
        for own, ids in turns_of(rollout, i):
            at += len(ids)
            if own:
                places.append(at - 1)
        assert_close(rollout.reward[i, places], torch.tensor([0.1, 0.2, 0.3]) + seed)
        assert rollout.reward[i].nonzero().flatten().tolist() == places
        assert sampler.last.reward[i].item() == pytest.approx(0.6 + 3 * seed)
        assert rollout.terminated[i].nonzero().tolist() == [[places[-1]]]
    assert rollout.metrics["turns"] == 3
    assert rollout.metrics["length"] == pytest.approx(rollout.mask.sum(1).double().mean().item())
    assert rollout.metrics["reward"] == pytest.approx(sampler.last.reward.mean().item())


def test_a_judge_sees_the_last_turn_and_its_reward_stands_at_the_last_decision() -> None:
    given: dict[str, Any] = {}

    def judge(completions: list[Any], conversation: list[Any], seed: list[int], **_: Any) -> list[float]:
        given.update(completions=completions, conversation=conversation, seed=seed)
        return [5.0] * len(completions)

    sampler, _, rollout, _ = held("qwen", judge=Rewards([judge]))
    plain = held("qwen")[2]
    assert_close(rollout.reward.sum(1), plain.reward.sum(1) + 5)
    changed = (rollout.reward - plain.reward).abs() > 1e-5
    assert torch.equal(changed, rollout.terminated)
    for i in range(6):
        assert given["completions"][i] == [given["conversation"][i][-1]]
        assert len(given["conversation"][i]) == 5
    assert sampler.last is not None
    assert set(sampler.last.parts) == {"judge"}


@pytest.mark.parametrize("judged", [False, True])
def test_what_an_environment_gives_is_one_of_the_decoupled_rewards(judged: bool) -> None:
    """With a judge, or alone: each standardized within its group, and their sum at the last decision."""

    class Drawn(Echo):
        def step(self, text: str) -> Any:
            heard, _, end = super().step(text)
            return heard, float(sum(map(ord, text)) % 97), end

    def first(completions: list[Any], **_: Any) -> list[float]:
        return [float(ord((x[0]["content"] + " ")[0])) for x in completions]

    judge = Rewards([first], [0.5]) if judged else None
    sampler, _, rollout, _ = held("qwen", Drawn, judge=judge, decouple_rewards=True)
    assert sampler.last is not None
    assert sampler.last.earned is not None
    own = sampler.last.earned.sum(1).view(2, 3)
    assert own.std(1).min() > 0

    def apart(x: Tensor) -> Tensor:
        return ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).flatten()

    wanted = apart(own) + (0.5 * apart(sampler.last.parts["first"].view(2, 3)) if judged else 0.0)
    assert_close(rollout.reward.sum(1), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(rollout.reward != 0, rollout.terminated)


@families
@pytest.mark.parametrize("max_tokens", [5, 40, 60])
def test_a_conversation_that_meets_a_limit_is_cut(family: str, max_tokens: int) -> None:
    sampler, _, rollout, policy = held(family, max_tokens=max_tokens)
    assert rollout.mask.shape[1] == max_tokens
    assert sampler.last is not None
    assert sampler.last.said is not None
    turns = [sum(m["role"] == "assistant" for m in x) for x in sampler.last.said]
    cut = sampler.last.completions.cut
    for i in range(6):
        assert turns[i] == 3 or bool(cut[i])
        assert turns_of(rollout, i)[-1][0], "it ends with a decision"
        assert rollout.reward[i].count_nonzero() == turns[i], "every turn was judged"
    assert min(turns) < 3 or max_tokens == 60 or family == "gpt2"
    assert_close(log_probabilities(policy, rollout), rollout.logp, rtol=0, atol=1e-4)


def test_the_limit_of_turns() -> None:
    sampler, engine, rollout, _ = held("qwen", turns=2)
    assert len(engine.sampled) == 2
    assert sampler.last is not None
    assert sampler.last.completions.cut.all()
    assert rollout.metrics["turns"] == 2
    assert held("qwen", turns=2, cut="penalized", cut_penalty=9.0)[2].reward.sum() < rollout.reward.sum() - 50


def test_turns_without_a_limit_of_their_own_have_what_room_there_is() -> None:
    _, engine, rollout, _ = held("qwen", max_tokens=90, turn_tokens=None)
    assert engine.requests[0].max_tokens == 90
    assert engine.requests[-1].max_tokens < 90 or len(engine.requests) == 1
    assert rollout.mask.shape[1] == 90


def test_a_stop_text_ends_a_turn_of_plain_text_and_closes_one_that_was_cut() -> None:
    rollout = held("gpt2", stop_texts=("e", "a"), policy=policy_of("gpt2", end=-9.0), turn_tokens=12)[2]
    words, closed = tokenizer("gpt2"), set()
    for i in range(6):
        pieces = turns_of(rollout, i)
        for k in (0, 2):
            said, heard = words.decode(pieces[k][1]), words.decode(pieces[k + 1][1])
            ended = said[-1] in "ea"
            closed.add(ended)
            assert heard == ("" if ended else "e") + f"({said[:3]})"
    assert closed == {True, False}


def test_another_end_of_a_turn_is_kept_as_it_was_sampled() -> None:
    """Llama 3.1 ends calls of tools with <|eom_id|>: the template's own end does not follow it."""
    words, policy = tokenizer("llama"), policy_of("llama", end=-30.0)
    other = words.convert_tokens_to_ids("<|eom_id|>")
    policy.model.generation_config.eos_token_id = [words.eos_token_id, other]
    with torch.no_grad():
        policy.model.get_output_embeddings().bias[other] = 2.5
    _, _, rollout, _ = held("llama", policy=policy)
    found = [turns_of(rollout, i) for i in range(6)]
    ended = [(x[k][1], x[k + 1][1]) for x in found for k in (0, 2) if x[k][1][-1] == other]
    assert ended
    assert all(words.decode(after).startswith("<|start_header_id|>ipython") for _, after in ended)


def test_a_template_may_write_a_space_before_the_end() -> None:
    """Llama 2 does: a turn with its end gets neither."""
    words = tokenizer("qwen")
    words.chat_template = (
        "{% for m in messages %}{{ m.content + ' ' + eos_token if m.role == 'assistant' else '[' + m.content + ']' }}"
        "{% endfor %}"
    )
    sampler, _, _, policy = held("qwen")
    sampler.tokenizer = words
    rollout, seen = sampler(policy), set()
    for i in range(6):
        pieces = turns_of(rollout, i)
        for k in (0, 2):
            cut = pieces[k][1][-1] != words.eos_token_id
            seen.add(cut)
            assert words.decode(pieces[k + 1][1]).startswith(" <|im_end|>[heard" if cut else "[heard")
    assert seen == {True, False}


def test_decisions_have_the_state_of_the_environment_in_which_they_were_made() -> None:
    sampler, _, rollout, _ = held("qwen")
    assert rollout.state is not None
    assert sampler.last is not None
    assert sampler.last.said is not None
    heard: dict[int, set[str]] = {}
    for i in range(6):
        at = 0
        said = [sampler.last.prompts.texts[i], *([m] for m in sampler.last.said[i] if m["role"] == "tool")]
        for own, ids in turns_of(rollout, i):
            if own:
                states = rollout.state[i, at : at + len(ids)].unique().tolist()
                assert len(states) == 1
                heard.setdefault(states[0], set()).add(str(said.pop(0)))
            at += len(ids)
    assert all(len(x) == 1 for x in heard.values()), "one state, one observation"
    assert len(set.union(*heard.values())) == len(heard), "and the other way round"


def test_the_same_seed_gives_the_same_conversations_also_after_a_stop() -> None:
    sampler, _, first, policy = held("qwen")
    state = deepcopy(sampler.state_dict())
    second = sampler(policy)
    again = held("qwen")[0]
    again.load_state_dict(state)
    third = again(policy)
    for name in ("action", "logp", "reward", "mask", "state"):
        assert torch.equal(getattr(second, name), getattr(third, name))
        assert torch.equal(getattr(first, name), getattr(held("qwen")[2], name))


def test_messages_are_plain_text_one_after_another_without_a_template() -> None:
    """A user's environment speaks in messages; the text of a prompt decides, and later messages follow it."""

    class Mixed(PlainEcho):
        def step(self, text: str) -> Any:
            heard, reward, end = super().step(text)
            return (None if heard is None else [{"role": "user", "content": heard}]), reward, end

    plain, mixed = held("gpt2")[2], held("gpt2", Mixed)[2]
    assert torch.equal(plain.action, mixed.action)


class Wrong(Echo):
    """An environment that does what is asked of it in `answer`, in its second turn."""

    answer: Any = None

    def step(self, text: str) -> Any:
        found = super().step(text)
        if self.turns < 2:
            return found
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (KeyError("move"), "step of Wrong raised KeyError: 'move': fix it (--debug shows where)"),
        ("hello", "step returned 'hello': return (messages or None, reward, whether it is the end)"),
        ((None, 0.0, False), "step returned no messages, and not the end either: return what is said next, or end"),
        (("", 0.0, False), "step returned an empty text: say something, or end the conversation"),
        (("x", float("nan"), False), "step returned the reward nan: return a finite number"),
        (("x", "much", False), "step returned the reward 'much': return a number"),
        (([{"role": "user"}], 0.0, False), "step returned messages: what it returned has the message"),
        (([{"role": "assistant", "content": "x"}], 0.0, False), "step returned a message of the assistant, which is"),
    ],
)
def test_what_an_environment_may_not_do(answer: Any, message: str) -> None:
    class Here(Wrong):
        pass

    Here.answer, Here.__name__ = answer, "Wrong"
    with pytest.raises(UserError) as caught:
        held("qwen", Here)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def test_a_beginning_depends_on_its_seed_alone() -> None:
    count = [0]

    class Moody(Echo):
        def reset(self, seed: int) -> Any:
            count[0] += 1
            return f"{count[0]}"

    with pytest.raises(UserError, match="gives another beginning the second time"):
        starts(Moody, 3)

    class Broken(Echo):
        def reset(self, seed: int) -> Any:
            return 1 / 0

    with pytest.raises(UserError, match="reset of Broken raised ZeroDivisionError: division by zero: fix it"):
        starts(Broken, 3)


class Slow(Echo):
    """It takes too long where its place says so, and cannot be told to end."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.tools = place, ["a tool"]
        self.wait("start")

    def wait(self, here: str) -> None:
        while here == self.place:
            try:
                time.sleep(5)
            except Exception:
                continue

    def reset(self, seed: int) -> Any:
        self.wait("reset")
        return super().reset(seed)

    def step(self, text: str) -> Any:
        self.wait("step")
        return super().step(text)


@pytest.mark.parametrize("place", ["start", "reset", "step"])
def test_an_environment_that_takes_too_long_ends_in_one_line(place: str) -> None:
    begin = from_seed(partial(Limited, partial(Slow, place), 0.3))
    began = time.monotonic()
    with pytest.raises(UserError, match=f"{place} of Slow did not finish within 0.3 s: .* raise step_time_limit"):
        begin({"seed": 1}).step("hello")
    assert 0.3 <= time.monotonic() - began < 3


def test_a_limit_of_time_changes_nothing_else() -> None:
    made, plain = Limited(partial(Slow, "nowhere"), 60.0), Echo()
    assert (made.reset(3), made.step("hi"), made.tools) == (plain.reset(3), plain.step("hi"), ["a tool"])

    class Left(Echo):
        def step(self, text: str) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Limited(Left, 60.0).step("hi")


def test_a_template_that_cannot_write_the_conversation() -> None:
    words = tokenizer("qwen")
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    sampler = held("qwen")[0]
    sampler.tokenizer = words
    with pytest.raises(UserError) as caught:
        sampler(policy_of("qwen"))
    assert str(caught.value) == (
        "the chat template cannot write this conversation: no tools here: give another model or template"
    )


def test_an_engine_of_ones_own_may_insert_tokens_too() -> None:
    def engine(policy: Any, prompt: Tensor, mask: Tensor, request: Request, generator: Any) -> Completions:
        done = generate(policy, prompt, mask, request, generator)
        first = done.mask & (torch.arange(request.max_tokens) == 0)  # the first token is not the policy's
        done = replace(done, mask=done.mask & (~first | (done.mask.sum(1, keepdim=True) == 1)))
        return replace(done, logp=done.logp.where(done.mask, 0.0))

    sampler = held("qwen")[0]
    sampler.engine = engine
    policy = policy_of("qwen")
    rollout = sampler(policy)
    assert_close(log_probabilities(policy, rollout), rollout.logp, rtol=0, atol=1e-4)


def test_calls_of_tools_are_counted_and_those_that_failed() -> None:
    class Failing(Echo):
        def step(self, text: str) -> Any:
            heard, reward, end = super().step(text)
            return heard and [{"role": "tool", "content": "error: no" if self.turns == 1 else "fine"}], reward, end

    metrics = held("qwen", Failing)[2].metrics
    assert (metrics["turns"], metrics["tool_calls"], metrics["tool_errors"]) == (3, 2, 0.5)
    assert "tool_calls" not in held("gpt2")[2].metrics


def test_a_column_of_the_data_does_not_hide_the_conversation() -> None:
    words, policy = tokenizer("qwen"), policy_of("qwen")
    prompts = prepared([dict(x, conversation=1) for x in starts(Echo, 2)], words)
    request = request_of(policy.model, words, 1, 40)
    with pytest.raises(UserError, match="the data has a column 'conversation'") as caught:
        Dialogue(from_seed(Echo))(policy, prompts, request, words, None, torch.Generator(), generate)
    assert len(str(caught.value)) <= 200
