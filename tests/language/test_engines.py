"""Engines in another process, compared with the learner's own model. vLLM needs an environment of its own."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from language.conftest import END, PAD, VOCABULARY, alone, picked, prompts, tiny
from policygrad.errors import Note, UserError
from policygrad.language import engine_worker
from policygrad.language.adapters import add_adapter
from policygrad.language.completions import Completions, Request
from policygrad.language.engines import ProcessEngine
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy, Prefixes

PYTHONS = {"transformers": sys.executable, "vllm": os.environ.get("POLICYGRAD_VLLM_PYTHON")}
SIZE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEMPERATURE = 0.7
FALSE, ECHO = (str(shutil.which(name)) for name in ("false", "echo"))  # one fails, one says something else


def model(**options: object) -> LanguagePolicy:
    """A policy with tied embeddings; heads of 32 features, as few as vLLM's attention on a CPU has."""
    return LanguagePolicy(tiny("llama", **SIZE, **options), temperature=TEMPERATURE)


def request(**options: object) -> Request:
    return Request(**({"completions": 3, "max_tokens": 12, "stop": (END, 2), "pad": PAD} | options))  # type: ignore[arg-type]


def moved(policy: LanguagePolicy, size: float = 0.05) -> LanguagePolicy:
    """The same after an update of every weight that learns."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(size * torch.randn_like(p) * p.requires_grad)
    return policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=PYTHONS)
def engine(request: pytest.FixtureRequest) -> Iterator[ProcessEngine]:
    """One process for all tests, since it takes long to start; each hands over weights of its own."""
    python = PYTHONS[request.param]
    if python is None:
        pytest.skip("POLICYGRAD_VLLM_PYTHON names no Python of an environment with vLLM")
    made = ProcessEngine(request.param, python, context=32)
    yield made
    made.close()


def check_log_probabilities(
    policy: LanguagePolicy, given: tuple[torch.Tensor, torch.Tensor], done: Completions
) -> None:
    """Of every token, against the model's own logits row by row, without padding."""
    rows = torch.arange(len(done.tokens)) // (len(done.tokens) // len(given[0]))
    obs = Prefixes(given[0][rows], given[1][rows], done.tokens, done.mask)
    with torch.no_grad():
        expected = picked(obs, alone(policy.model, obs, policy.temperature))  # type: ignore[arg-type]
    torch.testing.assert_close(done.logp, expected, rtol=0, atol=1e-4)


def test_log_probabilities_are_the_learners_before_and_after_updates(engine: ProcessEngine) -> None:
    """The prompts stay the same: keys and values kept of them would be those of other weights."""
    policy, given = model(), prompts(5, 2, 9)
    for _ in range(3):
        done = engine(policy, *given, request(), generator())
        check_log_probabilities(policy, given, done)
        assert engine.checked == engine.version == engine.loaded
        moved(policy)


def test_completions_end_at_a_stop_token_or_are_cut(engine: ProcessEngine) -> None:
    done = engine(model(), *prompts(5, 2, 9, 1, 7), request(completions=8), generator())
    lengths = done.mask.sum(1)
    assert (done.mask == (torch.arange(12) < lengths.unsqueeze(1))).all()
    ends = torch.isin(done.tokens, torch.tensor([END, 2])) & done.mask
    assert (ends.sum(1) == (~done.cut).long()).all()
    assert ends.take_along_dim(lengths.unsqueeze(1) - 1, 1).squeeze(1)[~done.cut].all()
    assert (lengths[done.cut] == 12).all()
    assert 0 < done.cut.sum() < 40
    assert (done.tokens[~done.mask] == PAD).all()
    assert (done.logp[~done.mask] == 0).all()


def test_tokens_are_drawn_from_the_policy(engine: ProcessEngine) -> None:
    """The first token of 3,000 completions of a prompt, against its exact probabilities."""
    policy, given = model(), prompts(4)
    done = engine(policy, *given, request(completions=3000, max_tokens=1), generator())
    with torch.no_grad():
        p = (policy.model(input_ids=given[0][:, -4:]).logits[0, -1].double() / TEMPERATURE).softmax(-1)
    seen = torch.bincount(done.tokens[:, 0], minlength=VOCABULARY)
    likely = p * 3000 >= 5
    counts = torch.cat([seen[likely], seen[~likely].sum().view(1)]).double()
    expected = torch.cat([p[likely], p[~likely].sum().view(1)]) * 3000
    square = ((counts - expected).square() / expected).sum()
    assert likely.sum() > 5
    assert torch.special.gammaincc(likely.sum() / 2, square / 2) > 1e-3  # so rare is a chi-square as large


def test_greedy_completions_are_those_of_the_own_engine(engine: ProcessEngine) -> None:
    policy, given = model(), prompts(5, 2, 9)
    asked = request(completions=2, greedy=True)
    done, own = engine(policy, *given, asked, generator()), generate(policy, *given, asked, generator())
    for name in ("tokens", "mask", "cut"):
        assert torch.equal(getattr(done, name), getattr(own, name))
    torch.testing.assert_close(done.logp, own.logp, rtol=0, atol=1e-4)


def test_the_generator_decides_the_samples(engine: ProcessEngine) -> None:
    policy, given = model(), prompts(5, 2, 9)
    first, again, other = (engine(policy, *given, request(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.unique(dim=0).shape[0] > 6  # the completions of a prompt are not one


def test_an_adapter_is_merged(engine: ProcessEngine) -> None:
    policy, given = LanguagePolicy(add_adapter(model().model, 2), temperature=TEMPERATURE), prompts(5, 2)
    for _ in range(2):
        moved(policy, 0.1)
        done = engine(policy, *given, request(), generator())
        rows = torch.arange(6) // 3
        obs = Prefixes(given[0][rows], given[1][rows], done.tokens, done.mask)
        with torch.no_grad():
            own = policy(obs).log_prob(obs.completion)
        torch.testing.assert_close(done.logp[done.mask], own[done.mask], rtol=0, atol=1e-4)
    engine.sent = None  # of another model, for the other tests


def test_an_adapter_alone_is_the_merged_one() -> None:
    """Weights are handed over once. Samples have the policy's own log-probabilities; after a death they stay."""
    python = PYTHONS["vllm"]
    if python is None:
        pytest.skip("POLICYGRAD_VLLM_PYTHON names no Python of an environment with vLLM")
    policy, given = LanguagePolicy(add_adapter(model().model, 2), temperature=TEMPERATURE), prompts(5, 2)
    made = ProcessEngine("vllm", python, context=32, adapter_alone=True)
    drawn = []
    for size in (0.1, 0.1, 0.0):
        moved(policy, size)
        dies = nullcontext() if size else pytest.warns(Note, match="the vllm engine was ended by signal 9")
        if not size:
            assert made.process is not None
            os.kill(made.process.pid, signal.SIGKILL)
        with dies:
            done = made(policy, *given, request(), generator())
        drawn.append(done.tokens)
        rows = torch.arange(6) // 3
        obs = Prefixes(given[0][rows], given[1][rows], done.tokens, done.mask)
        with torch.no_grad():
            own = policy(obs).log_prob(obs.completion)
        torch.testing.assert_close(done.logp[done.mask], own[done.mask], rtol=0, atol=1e-4)
        assert made.directory is not None
        files = {x.relative_to(made.directory).as_posix() for x in made.directory.rglob("*.safetensors")}
        assert files == {"base/model.safetensors", f"version-{made.version}/adapter_model.safetensors"}
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])
    assert made.version == 2
    made.close()


def test_an_adapter_alone_is_for_vllm_and_of_a_policy_that_has_one() -> None:
    for more in ({"adapter_alone": True}, {"sleep": True}):
        with pytest.raises(UserError, match="adapters alone and sleep are of vllm, and the engine is transformers"):
            ProcessEngine("transformers", sys.executable, context=32, **more)  # type: ignore[arg-type]
    made = ProcessEngine("vllm", sys.executable, context=32, adapter_alone=True)
    with pytest.raises(UserError, match="the policy has no adapter to hand over alone"):
        made(model(), *prompts(3), request(), generator())
    made.close()


def test_vllm_sleeps_after_each_answer_and_is_woken_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of vLLM, in its order, since it sleeps on a GPU alone."""
    did: list[str] = []

    class Recording:
        def __init__(self, **settings: object) -> None:
            assert settings["enable_sleep_mode"]

        def __getattr__(self, name: str) -> object:
            return lambda *_, **__: did.append(name) or ([] if name == "generate" else True)

    class Gpu:
        def is_cpu(self) -> bool:
            return False

    fake, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    fake.LLM, fake.SamplingParams, platforms.current_platform = Recording, dict, Gpu()  # type: ignore[attr-defined]
    for name, module in (("vllm", fake), ("vllm.platforms", platforms)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine_worker.Vllm, "_load_weights", lambda *_: did.append("load"))
    made = engine_worker.Vllm("", "float32", 32, sleep=True)
    asked: dict[str, object] = {"completions": 1, "greedy": False, "max_tokens": 1, "temperature": 1.0, "stop": []}
    made.generate([[1]], [0], **asked)
    made.load("")
    made.generate([[1]], [0], **asked)
    made.generate([[1]], [0], **asked)
    assert did == [
        *("generate", "sleep"),
        *("wake_up", "load", "reset_prefix_cache", "generate", "sleep"),
        *("wake_up", "generate", "sleep"),
    ]


def test_vllm_on_a_cpu_refuses_to_sleep() -> None:
    """It would free nothing there, and not answer any more: it stops its scheduler, and then ignores the rest."""
    python = PYTHONS["vllm"]
    if python is None:
        pytest.skip("POLICYGRAD_VLLM_PYTHON names no Python of an environment with vLLM")
    made = ProcessEngine("vllm", python, context=32, sleep=True)
    with pytest.raises(
        UserError, match="the vllm engine cannot start: RuntimeError: vLLM sleeps on GPUs alone, leave en"
    ):
        made(model(), *prompts(3), request(), generator())
    made.close()


def test_a_stop_text_ends_a_completion_as_in_the_own_engine(engine: ProcessEngine) -> None:
    def decode(rows: list[list[int]]) -> list[str]:
        return ["".join(chr(ord("a") + x) for x in row) for row in rows]

    policy, given = model(), prompts(5, 2, 9, 1)
    likely = generate(policy, *given, request(completions=1, greedy=True), generator())
    text = decode([likely.tokens[0, 2:4].tolist()])[0]
    asked = request(completions=1, greedy=True, stop_texts=(text,), decode=decode)
    done, own = engine(policy, *given, asked, generator()), generate(policy, *given, asked, generator())
    assert own.mask[0].sum() <= 4
    assert not own.cut[0]
    for name in ("tokens", "mask", "cut"):
        assert torch.equal(getattr(done, name), getattr(own, name))


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_process_that_is_killed_costs_time_only(engine: ProcessEngine, when: str) -> None:
    """SIGKILL before it is asked, or while it samples: the samples are those of an engine that lives."""
    policy, given = model(), prompts(5, 2, 9)
    expected = engine(policy, *given, request(), generator())
    assert engine.process is not None
    number = engine.process.pid
    if when == "before":
        os.kill(number, signal.SIGKILL)
    else:
        os.kill(number, signal.SIGSTOP)

        def kill() -> None:
            time.sleep(0.5)  # asked by now
            os.kill(number, signal.SIGKILL)

        threading.Thread(target=kill).start()
    with pytest.warns(Note, match=f"the {engine.kind} engine was ended by signal 9: it is started again"):
        done = engine(policy, *given, request(), generator())
    assert engine.process.pid != number
    assert torch.equal(done.tokens, expected.tokens)
    assert torch.equal(done.logp, expected.logp)


def test_a_process_that_answers_nothing_costs_time_only(engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, and a question longer than what a pipe holds: it would be waited for in writing, too."""
    policy, given = model(), tuple(x.repeat(6000, 1) for x in prompts(5))
    asked = request(completions=1, max_tokens=1)
    expected = engine(policy, *given, asked, generator())
    assert engine.process is not None
    number, start = engine.process.pid, ProcessEngine._start
    os.kill(number, signal.SIGSTOP)

    def start_in_time(self: ProcessEngine) -> None:
        self.time_limit = 600.0
        start(self)

    monkeypatch.setattr(ProcessEngine, "_start", start_in_time)
    engine.time_limit = 1.0
    with pytest.warns(Note, match=f"the {engine.kind} engine did not answer within 1 s: it is started again"):
        done = engine(policy, *given, asked, generator())
    assert engine.process.pid != number
    assert torch.equal(done.tokens, expected.tokens)


def test_a_time_limit_that_is_never_met_is_one_line() -> None:
    made = ProcessEngine("transformers", sys.executable, context=32, time_limit=0.05)
    with pytest.raises(
        UserError, match=r"did not answer within 0.05 s before it had started.*: raise engine_time_limit"
    ):
        made(model(), *prompts(3), request(), generator())
    made.close()


def test_an_engine_that_hangs_again_and_again_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ask = ProcessEngine("transformers", sys.executable, context=32), ProcessEngine._ask

    def stopped(self: ProcessEngine, **asked: object) -> dict[str, object]:
        assert self.process is not None
        if asked["do"] == "generate":
            self.time_limit = 0.2
            os.kill(self.process.pid, signal.SIGSTOP)
        else:
            self.time_limit = 600.0
        return ask(self, **asked)

    monkeypatch.setattr(ProcessEngine, "_ask", stopped)
    with pytest.warns(Note), pytest.raises(UserError) as error:
        made(model(), *prompts(3), request(), generator())
    made.close()
    assert str(error.value).startswith("the transformers engine did not answer within 0.2 s, 3 times in a row")
    assert str(error.value).endswith(": raise engine_time_limit")
    assert len(str(error.value)) <= 200


def test_another_distribution_than_the_learners_is_refused(engine: ProcessEngine) -> None:
    """The learner scales its states, which the engine does not know of."""
    policy, given = moved(model()), prompts(5, 2, 9)
    hook = policy.model.model.norm.register_forward_hook(lambda module, inputs, out: 1.01 * out)  # type: ignore
    with pytest.raises(
        UserError, match=r"engine and learner differ by .* nats on a token, more than engine_tol"
    ) as error:
        engine(policy, *given, request(), generator())
    assert len(str(error.value)) <= 200
    hook.remove()
    check_log_probabilities(policy, given, engine(policy, *given, request(), generator()))


@pytest.mark.parametrize(
    ("kind", "python", "message"),
    [
        ("vllm", "/nowhere/bin/python", "engine_python /nowhere/bin/python cannot be run (No such file or directory)"),
        ("vllm", FALSE, "the vllm engine ended with code 1 before it had started: give engine_python"),
        ("vllm", ECHO, f"engine_python {ECHO} answers '-I "),
        ("vllm", sys.executable, "the vllm engine cannot start: ModuleNotFoundError: No module named 'vllm'"),
    ],
)
def test_what_cannot_start_is_an_error_of_one_line(kind: str, python: str, message: str) -> None:
    made = ProcessEngine(kind, python, context=32)
    with pytest.raises(UserError) as error:
        made(model(), *prompts(3), request(), generator())
    made.close()
    assert str(error.value).startswith(message)
    assert len(str(error.value)) <= 200


def test_what_a_process_said_before_it_ended_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question cannot be written to it any more: the same error as if it could."""
    start = ProcessEngine._start

    def start_and_wait(self: ProcessEngine) -> None:
        start(self)
        assert self.process is not None
        self.process.wait()

    monkeypatch.setattr(ProcessEngine, "_start", start_and_wait)
    test_what_cannot_start_is_an_error_of_one_line("vllm", ECHO, f"engine_python {ECHO} answers '-I ")
    test_what_cannot_start_is_an_error_of_one_line("vllm", FALSE, "the vllm engine ended with code 1 before it had")


def test_closing_ends_the_process_and_the_call_of_another_thread_and_removes_its_files() -> None:
    made = ProcessEngine("transformers", sys.executable, context=32)
    made(model(), *prompts(3), request(), generator())
    assert made.process is not None
    assert made.directory is not None
    process, directory = made.process, Path(made.directory)
    assert [x.name for x in directory.glob("version-*")] == ["version-1"]
    os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(made, model(), *prompts(3), request(), generator())
        time.sleep(0.5)  # it has asked by now
        made.close()
        with pytest.raises(UserError, match="the transformers engine was closed while it sampled"):
            waiting.result()
    assert process.poll() is not None
    assert not directory.exists()
    with pytest.raises(UserError, match="the transformers engine is closed"):
        made(model(), *prompts(3), request(), generator())
