"""A process that samples completions for a learner: one JSON object a line in, and one a line out.

    python -I engine_worker.py vllm 2       # what samples, and the threads of the CPU

It runs in the engine's own environment, so it imports nothing of policygrad. Weights come as safetensors in a directory
of the Hugging Face layout; nothing is unpickled. What libraries print goes to stderr. It ends when its input ends.

    {"do": "start", "version": 0, "directory": "...", "dtype": "float32", "context": 64}
    {"do": "load", "version": 1, "directory": "..."}
    {"do": "generate", "version": 1, "prompts": [[5, 6]], "completions": 2, "seeds": [7], "max_tokens": 3,
     "temperature": 1.0, "stop": [1], "greedy": false}

answered by {}; by {"tokens": [[8, 1], [9, 9, 9]], "logp": [[-0.5, -1.0], ...]}, the completions of each prompt side by
side, with the log-probability of each token under the distribution that it was sampled from; or by {"error": "..."}.
With "adapter": "..." in the first line, a directory in PEFT's layout, vLLM gets that beside the weights, and `load` is
of other adapters. With "sleep": true it gives back the GPU's memory after each answer.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

Sampled = tuple[list[list[int]], list[list[float]]]  # tokens and log-probabilities of each completion


class Engine(Protocol):
    """What samples."""

    def __init__(self, directory: str, dtype: str, context: int) -> None:
        """Read a model. context: the most tokens of a prompt and its completion together."""

    def load(self, directory: str) -> None:
        """Take other weights of the same model."""

    def generate(self, prompts: list[list[int]], seeds: list[int], **how: Any) -> Sampled:
        """Sample `completions` of each prompt, which share its seed. how: as in the line that asks for them."""


class Vllm:
    """vLLM in this process. Its cache of prompts is emptied with each version of the weights."""

    def __init__(
        self, directory: str, dtype: str, context: int, adapter: str | None = None, sleep: bool = False
    ) -> None:
        self.context, self.adapted, self.sleeps, self.asleep = context, adapter is not None, sleep, False
        self.adapters, self.adapter = 0, None  # how many there were, and the newest as vLLM asks for one
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, x in {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}.items():
            os.environ.setdefault(name, x)
        from vllm import LLM
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {}
        if adapter is not None:
            settings = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": self._rank(adapter)}
        if sleep:
            settings["enable_sleep_mode"] = True
        if current_platform.is_cpu():
            if sleep:
                raise RuntimeError("vLLM sleeps on GPUs alone, leave engine_sleep out")
            if adapter is None:
                self._keep_weights()
            settings["distributed_executor_backend"] = "uni"
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                settings["kv_cache_memory_bytes"] = 2**30
        self.llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            generation_config="vllm",  # nothing of the model's file truncates the distribution
            logprobs_mode="processed_logprobs",
            dtype=dtype,
            max_model_len=context,
            enforce_eager=True,
            **settings,
        )
        if adapter is not None:
            self.load(adapter)

    @staticmethod
    def _rank(adapter: str) -> int:
        """The least rank that vLLM has room for and the adapter fits."""
        from typing import get_args

        from vllm.config.lora import MaxLoRARanks

        rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
        return int(min(x for x in get_args(MaxLoRARanks) if x >= rank))

    @staticmethod
    def _keep_weights() -> None:
        """Linear layers that read their weights: others pack a copy once, which later weights would not reach."""
        from vllm import _custom_ops
        from vllm.model_executor.layers import utils

        for owner, name in ((_custom_ops, "_supports_onednn"), (utils, "check_cpu_sgl_kernel")):
            if not hasattr(owner, name):
                raise RuntimeError(f"this version of vLLM has no {owner.__name__}.{name} to turn off")
        _custom_ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *_: False

    def load(self, directory: str) -> None:
        self._wake()
        if self.adapted:
            from vllm.lora.request import LoRARequest

            self.adapters += 1  # under a number that there was, vLLM goes on with what it had
            self.adapter = LoRARequest(f"adapter-{self.adapters}", self.adapters, directory)
        else:
            self._load_weights(directory)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the weights before")

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _load_weights(self, directory: str) -> None:
        from safetensors.torch import load_file

        weights = load_file(Path(directory) / "model.safetensors")
        # reload_weights is silently wrong where embeddings are tied (0.32)
        self.llm.apply_model(lambda model: len(model.load_weights(weights.items())))

    def generate(self, prompts: list[list[int]], seeds: list[int], **how: Any) -> Sampled:
        from vllm import SamplingParams

        self._wake()
        greedy = how["greedy"]
        each = [
            SamplingParams(
                n=1 if greedy else how["completions"],
                seed=seed,
                temperature=0.0 if greedy else how["temperature"],
                max_tokens=min(how["max_tokens"], self.context - len(prompt)),  # of conversations, what is left
                stop_token_ids=how["stop"],
                ignore_eos=True,  # what the model's file says; `stop` has it
                logprobs=0,  # of the token itself
                detokenize=False,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        copies = how["completions"] if greedy else 1  # vLLM gives one of them
        answers = self.llm.generate(given, each, use_tqdm=False, lora_request=self.adapter)
        done = [x for out in answers for x in out.outputs * copies]
        tokens = [list(x.token_ids) for x in done]
        logp = [[at[t].logprob for at, t in zip(x.logprobs, x.token_ids, strict=True)] for x in done]
        if self.sleeps:
            self.llm.sleep(level=1)  # weights wait in the memory of the CPU: an adapter's base does not come again
            self.asleep = True
        return tokens, logp


class Transformers:
    """The generate of transformers: a prompt at a time, so that each has its own random numbers."""

    def __init__(self, directory: str, dtype: str, context: int) -> None:
        self.dtype, self.context = dtype, context
        self.load(directory)

    def load(self, directory: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        how: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "use_safetensors": True}
        self.model = AutoModelForCausalLM.from_pretrained(directory, **how).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model.generation_config = GenerationConfig()  # nothing of the model's file truncates the distribution

    def generate(self, prompts: list[list[int]], seeds: list[int], **how: Any) -> Sampled:
        import torch

        tokens: list[list[int]] = []
        logp: list[list[float]] = []
        sampling = {"do_sample": True, "temperature": how["temperature"], "top_k": 0, "top_p": 1.0}
        for prompt, seed in zip(prompts, seeds, strict=True):
            torch.manual_seed(seed)
            ids = torch.tensor([prompt] * how["completions"], device=self.model.device)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(how["max_tokens"], self.context - len(prompt)),
                eos_token_id=how["stop"],
                pad_token_id=how["stop"][0],
                return_dict_in_generate=True,
                output_scores=True,
                **({"do_sample": False} if how["greedy"] else sampling),
            )
            drawn = out.sequences[:, len(prompt) :]
            each = torch.stack(out.scores, 1).log_softmax(-1).gather(2, drawn.unsqueeze(2)).squeeze(2)
            for row, found in zip(drawn.tolist(), each.tolist(), strict=True):
                length = next((t + 1 for t, x in enumerate(row) if x in how["stop"]), len(row))
                tokens.append(row[:length])
                logp.append(found[:length])
        return tokens, logp


KINDS: dict[str, type[Engine]] = {"vllm": Vllm, "transformers": Transformers}


def main() -> None:
    """Answer until the input ends."""
    kind, threads = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to the learner
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    engine: Engine | None = None
    version = -1
    for line in sys.stdin:
        asked = json.loads(line)
        do, given = asked.pop("do"), asked.pop("version")
        reply: dict[str, Any] = {}
        try:
            if do == "start" or engine is None:
                engine = KINDS[kind](**asked)
                version = given
            elif do == "load":
                engine.load(**asked)
                version = given
            elif given != version:
                raise RuntimeError(f"the engine has version {version} of the weights, not {given}")
            else:
                reply["tokens"], reply["logp"] = engine.generate(**asked)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
