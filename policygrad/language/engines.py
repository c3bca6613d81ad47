"""Engines in a process and an environment of their own: vLLM, or the generate of transformers."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policygrad.errors import Note, UserError, ending, one_line, shortened
from policygrad.language import engine_worker
from policygrad.language.adapters import merged_weights, weights_without
from policygrad.language.completions import Completions, Request
from policygrad.language.decoding import stopped_at
from policygrad.language.models import quiet
from policygrad.language.policies import LanguagePolicy, Prefixes, causal, evaluating

CHECKED = 64  # tokens
BASE = "base"  # the directory of the weights under an adapter
RESTARTS = 3  # of one call
TIME_LIMIT = 1800.0  # seconds for an answer, by default


class Ended(Exception):
    """The engine's process ended before it answered, by itself or by a signal."""


class Late(Ended):
    """It took longer than the time limit, and was ended for that."""


class ProcessEngine:
    """An Engine in another process; engine_worker.py has what the two say to each other.

    kind: vllm or transformers. python: the interpreter of an environment that has it; it needs nothing of policygrad.
    context: the most tokens of a prompt and its completion together. tolerance: see below, in nats. time_limit: seconds
    for each answer: the start, new weights, the completions of a rollout. adapter_alone: vLLM gets the weights under an
    adapter once, and then adapters; False: an adapter is merged into the weights. sleep: vLLM gives back the memory of
    its GPU after each answer.

    The process starts at the first call. A call hands over the policy's weights if they are others than before
    (parameters without gradient are taken to stay), as safetensors in a temporary directory. A prompt's completions
    have one seed, from the generator, so that it decides the samples. A process that ends, or exceeds the time limit,
    is started again and asked the same: that costs time only. Stop texts are looked for here, in samples that went on.

    After the start and each change of the weights, the learner computes the log-probabilities of the first 64 tokens
    sampled, which must be within the tolerance of the engine's: other weights and other settings show so. Those of
    greedy completions are always the learner's, since an engine's are not at the policy's temperature.

    Raises UserError if adapter_alone or sleep is for another kind. A call raises it if the process cannot start, says
    that it cannot do what it is asked, or ends again and again, and if engine and learner do not agree.
    """

    def __init__(
        self,
        kind: str,
        python: str,
        *,
        context: int,
        tolerance: float = 1e-3,
        time_limit: float = TIME_LIMIT,
        adapter_alone: bool = False,
        sleep: bool = False,
    ) -> None:
        if (adapter_alone or sleep) and kind != "vllm":
            raise UserError(f"adapters alone and sleep are of vllm, and the engine is {kind}: leave them out")
        self.kind, self.python, self.context, self.tolerance = kind, python, context, tolerance
        self.time_limit, self.adapter_alone, self.sleep = time_limit, adapter_alone, sleep
        self.process: subprocess.Popen[str] | None = None
        self.directory: Path | None = None  # of the weights and what the process prints
        self.sent: list[Tensor] | None = None  # the parameters, as they were written last
        self.closed = False
        self.version = self.loaded = self.checked = 0  # of the weights: written, in the process, and compared

    @torch.no_grad()
    def __call__(
        self,
        policy: LanguagePolicy,
        prompt: Int[Tensor, "N P"],
        prompt_mask: Bool[Tensor, "N P"],
        request: Request,
        generator: torch.Generator,
    ) -> Completions:
        """Completions of every prompt: see Engine."""
        count = len(prompt)
        drawn = torch.randint(2**62, (0 if request.greedy else count,), device=generator.device, generator=generator)
        asked = {
            "do": "generate",
            "prompts": [row[seen].tolist() for row, seen in zip(prompt, prompt_mask, strict=True)],
            "completions": request.completions,
            "seeds": drawn.tolist() or [0] * count,
            "max_tokens": request.max_tokens,
            "temperature": policy.temperature,
            "stop": list(request.stop),
            "greedy": request.greedy,
        }
        reply = self._answered(policy, asked)
        done = _completions(reply["tokens"], reply["logp"], request).to(prompt.device)
        rows = torch.arange(len(done.tokens), device=prompt.device) // request.completions
        obs = Prefixes(prompt[rows], prompt_mask[rows], done.tokens, done.mask)
        if request.greedy:
            done.logp.copy_(_scored(policy, obs, request.micro_batch))
        elif self.checked != self.version:
            self._check(policy, obs, done.logp)
            self.checked = self.version
        return done

    def close(self) -> None:
        """End the process and remove its files. A call in another thread (lag) fails, and later ones do."""
        self.closed = True
        self._end()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None

    def _answered(self, policy: LanguagePolicy, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question about this policy, by as many processes as it takes."""
        for left in reversed(range(RESTARTS)):
            try:
                if self.closed:
                    raise UserError(f"the {self.kind} engine is closed: make another one")
                self._write(policy)
                self._bring_up_to_date(policy)
                return self._ask(**asked)
            except Ended as end:
                if self.closed:
                    raise UserError(f"the {self.kind} engine was closed while it sampled") from end
                self._end()
                if not left:
                    said = f"the {self.kind} engine {end}, {RESTARTS} times in a row{self._last_words()}"
                    raise UserError(f"{said}: {advice(end, 'see to that first')}") from end
                said = f"the {self.kind} engine {end}: it is started again, and samples the same again"
                warnings.warn(said, Note, stacklevel=3)
        raise AssertionError

    def _write(self, policy: LanguagePolicy) -> None:
        """Write the policy's weights as the next version, if they are not those of the last one."""
        now = [p.detach() for p in policy.parameters() if p.requires_grad]
        if self.sent is not None and all(torch.equal(a, b.cpu()) for a, b in zip(self.sent, now, strict=True)):
            return
        if self.directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="policygrad-engine-"))
            weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)  # of one that nobody closed
        self.version += 1
        model: Any = policy.model
        how, place = dict[str, Any](), self._weights()
        adapted = hasattr(model, "peft_config")
        if self.adapter_alone:
            if not adapted:
                raise UserError("the policy has no adapter to hand over alone: give it one, or merge")
            with quiet():
                model.save_pretrained(place, save_embedding_layers=False)
            place, how["state_dict"] = self.directory / BASE, weights_without(model)
        elif adapted:
            how["state_dict"] = merged_weights(model)
        if not place.is_dir() or not self.adapter_alone:
            with quiet():
                causal(model).save_pretrained(place, max_shard_size="1000TB", **how)
        self.sent = [p.to("cpu", copy=True) for p in now]

    def _weights(self) -> Path:
        assert self.directory is not None
        return self.directory / f"version-{self.version}"

    def _bring_up_to_date(self, policy: LanguagePolicy) -> None:
        """A process that has the newest version of the weights."""
        assert self.directory is not None
        place = str(self._weights())
        if self.process is None:
            self._start()
            dtype = str(policy.autocast or next(policy.parameters()).dtype).removeprefix("torch.")
            asked = {"directory": place, "dtype": dtype, "context": self.context}
            if self.adapter_alone:
                asked |= {"directory": str(self.directory / BASE), "adapter": place}
            if self.sleep:
                asked |= {"sleep": True}
            try:
                self._ask(do="start", **asked)
            except Ended as end:
                said = f"the {self.kind} engine {end} before it had started{self._last_words()}"
                raise UserError(
                    f"{said}: {advice(end, 'give engine_python of an environment in which it runs')}"
                ) from end
            self.checked = 0
        elif self.loaded != self.version:
            self._ask(do="load", directory=place)
        self.loaded = self.version
        for other in self._weights().parent.glob("version-*"):
            if other != self._weights():
                shutil.rmtree(other)

    def _start(self) -> None:
        assert self.directory is not None
        command = [self.python, "-I", engine_worker.__file__, self.kind, str(torch.get_num_threads())]
        try:
            with (self.directory / "log").open("w") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # the terminal's interrupt is the learner's, which ends it
                )
        except OSError as error:
            said = f"engine_python {ending(self.python)} cannot be run ({error.strerror})"
            raise UserError(f"{said}: give the python of the engine's environment") from error

    def _ask(self, **asked: Any) -> dict[str, Any]:
        """What the process answers. Raises Ended."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()  # which ends what it reads and writes, in the middle of a line too

        timer = threading.Timer(min(self.time_limit, threading.TIMEOUT_MAX), end)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # what it said before it ended can still be read
                process.stdin.write(json.dumps(asked | {"version": self.version}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            code = process.wait()
            if late.is_set():
                raise Late(f"did not answer within {self.time_limit:g} s")
            raise Ended(f"was ended by signal {-code}" if code < 0 else f"ended with code {code}")
        try:
            reply: Any = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            self._end()
            said = f"engine_python {ending(self.python)} answers {shortened(line.rstrip(), 40)}"
            raise UserError(f"{said}, and is no engine's: give the python of the engine's environment")
        if "error" in reply:
            self._end()
            raise UserError(f"the {self.kind} engine cannot {asked['do']}: {one_line(reply['error'], 140)}")
        return reply

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # of what it never read
                    pipe.close()

    def _last_words(self) -> str:
        """The last line that the process printed."""
        assert self.directory is not None
        said = (self.directory / "log").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "")
        return f" ({one_line(last, 80)})" if last else ""

    def _check(self, policy: LanguagePolicy, obs: Prefixes, logp: Float[Tensor, "B T"]) -> None:
        """Raise UserError if the learner gives the first tokens sampled another log-probability."""
        enough = int((obs.completion_mask.sum(1).cumsum(0) < CHECKED).sum()) + 1
        obs = Prefixes(*(x[:enough] for x in obs))
        difference = _scored(policy, obs, None) - logp[:enough]
        largest = float(difference[obs.completion_mask][:CHECKED].abs().max())
        if not largest <= self.tolerance:
            raise UserError(
                f"engine and learner differ by {largest:.2g} nats on a token, more than engine_tolerance "
                f"{self.tolerance:g}: raise it only for another arithmetic, with old_logp recomputed"
            )


def advice(end: Ended, otherwise: str) -> str:
    """What to do about a process that ended."""
    return "raise engine_time_limit" if isinstance(end, Late) else otherwise


def _completions(tokens: list[list[int]], logp: list[list[float]], request: Request) -> Completions:
    """Rows as tensors, each up to its stop text, if it has one."""
    shape = (len(tokens), request.max_tokens)
    found = Completions(
        torch.full(shape, request.pad),
        torch.zeros(shape, dtype=torch.float32),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape[0], dtype=torch.bool),
    )
    for i, (row, each) in enumerate(zip(tokens, logp, strict=True)):
        end = stopped_at(row, request)
        length = len(row) if end is None else end
        found.tokens[i, :length] = torch.tensor(row[:length])
        found.logp[i, :length] = torch.tensor(each[:length])
        found.mask[i, :length] = True
        found.cut[i] = end is None and row[-1] not in request.stop
    return found


def _scored(policy: LanguagePolicy, obs: Prefixes, rows: int | None) -> Float[Tensor, "B T"]:
    """The learner's log-probability of each decision, 0 elsewhere. rows: computed at a time; None: all."""
    parts = []
    with evaluating(policy.model):
        for index in torch.arange(len(obs.prompt), device=obs.prompt.device).split(rows or len(obs.prompt)):
            part = Prefixes(*(x[index] for x in obs))
            parts.append(policy(part).log_prob(part.completion).where(part.completion_mask, 0.0))
    return torch.cat(parts)
