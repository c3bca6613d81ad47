"""Language: Hugging Face causal language models on prompts with rewards."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from torch import nn

from policygrad import ranks
from policygrad.errors import Note, UserError, ending, listed, one_line
from policygrad.files import check_directory, damaged, read_metadata
from policygrad.functions import load_function
from policygrad.language import arithmetic, data, models, templates
from policygrad.language.adapters import check_mergeable, load_adapter
from policygrad.language.checks import check_scored_as_sampled, shares_prompts
from policygrad.language.completions import Request
from policygrad.language.conversations import (
    SECONDS,
    TURNS,
    Dialogue,
    Environment,
    Limited,
    begun,
    from_seed,
    starts,
    text_in,
    within,
)
from policygrad.language.engines import ProcessEngine
from policygrad.language.evaluation import Evaluation, evaluate_policy
from policygrad.language.generation import check_memory, generate
from policygrad.language.policies import LanguagePolicy, can_share, causal, reference_of
from policygrad.language.sampler import (
    Answering,
    CompletionSampler,
    DemonstrationSampler,
    Prompts,
    answer,
    request_of,
)
from policygrad.language.sharding import cut, is_sharded, shard, whole
from policygrad.language.tasks import (
    ARITHMETIC,
    LOOKUP,
    Task,
    critic_of,
    prepared,
    reward_functions,
    room_for_prompts,
    split_prompts,
    task_of,
)
from policygrad.language.tools import Tool, load_tool, schema_of, with_tools
from policygrad.language.warmup import OWN, RECIPE, warmed_up
from policygrad.precision import autocast_to
from policygrad.train.checkpoints import Stage, finite, part_of
from policygrad.train.hub import directory_of
from policygrad.train.methods import KNOWN
from policygrad.train.options import OptionError, compares_greedy, has_critic, with_rate
from policygrad.train.reports import Curve, Row, progress_bar
from policygrad.train.samples import HELD_OUT, read_examples, write_examples, write_samples
from policygrad.train.snapshots import digest
from policygrad.train.worlds import NO_PROMPTS, REASONING_GYM, ROWS, VERIFIERS, is_conversation
from policygrad.train.worlds.world import DECISIONS, Own, World

STARTS = 2048  # beginnings of conversations, of an environment that has no number of its own


class LanguageWorld(World):
    """A task that needs no files; prompts with a model and rewards; or an environment to talk to, with a model."""

    kind = "language"
    policy: LanguagePolicy
    prompts: Task
    last: Evaluation | None = None
    rows: Mapping[str, Any] = {}  # rows that were handed in, by the option that names a data set otherwise
    dropped: tuple[str, ...] = ()  # notes on prompts that were too long, and were left out
    needs_reward = True  # whether training judges completions
    reads: Callable[..., list[data.Example]] = staticmethod(data.load_examples)  # rows of training and of evaluation
    make: Callable[[], Environment] | None = None  # the environment to talk to, if there is one
    tools: Sequence[Tool] = ()
    process: ProcessEngine | None = None  # an engine in another process, if there is one
    anchor: nn.Module | None = None  # the reference, where it is sharded
    collected: Mapping[str, torch.Tensor] = {}  # the tensors of a sharded world, as they were when all ranks gave them
    teacher: str | None = None  # its digest, once it is read
    evaluated_on: Mapping[str, Any] | None = None  # another data set to evaluate a loaded run on, as for `examples`

    def __init__(self, task: Any, options: Any) -> None:
        super().__init__(task, with_rate(options))

    @property
    def name(self) -> str:
        if is_conversation(self.task):
            return self.task.rpartition(":")[2]
        return "+".join(Path(x).stem for x in ([self.task] if self.task else self.options.dataset))

    @property
    def judged(self) -> str | None:  # type: ignore[override]
        """The metric of evaluation, the mean reward on held-out prompts, if there are any."""
        return None if self.prompts.held_out is None else "held_out"

    def build(self, own: Own, progress: bool) -> None:
        if own.policy is not None or own.critic is not None:
            raise UserError(
                "modules of your own are for control: give model, and critic as copy, shared or a directory"
            )
        options, self.rows = self.options, own.data
        if getattr(options, "shard", False) and own.engine is not None:
            raise OptionError(
                "shard", "shard is for the library's own sampling, and an engine is handed in: leave it out"
            )
        with models.quiet():
            self.prompts = self._task(progress)
            self.policy, device = self.prompts.policy, options.device
            self._check_mergeable()
            self.process = self._process()
            if own.engine is None and self.process is None:
                check_scored_as_sampled(self.policy, self.prompts.train, options.max_tokens)
            self.policy.shared = self._shares_prompts()
            asked = self.rows_of_rank("prompts_per_rollout")
            self.sample = CompletionSampler(
                self.prompts.train,
                self.prompts.tokenizer,
                self.prompts.judge,
                self._request(options.completions, self.prompts.train, asked),
                prompts_per_rollout=options.prompts_per_rollout,
                answers=self._answers(),
                cut=options.cut,
                cut_penalty=options.cut_penalty,
                decouple_rewards=options.decouple_rewards,
                greedy=compares_greedy(options),
                dataset_weight=options.dataset_weight,
                engine=own.engine or self.process or generate,
                seed=options.seed,
                device=device,
            )
            if self.prompts.held_out is not None:
                self._request(options.evaluation_completions, self.prompts.held_out, 1)
            if has_critic(options):
                self.critic = self._critic()
            if getattr(options, "mix", None) is not None:
                self.demonstrations = self._mixed_in()

    def _process(self) -> ProcessEngine | None:
        """The engine in another process that the options ask for, with room for the longest prompt."""
        options = self.options
        if options.engine == "own":
            return None
        context = int(self.prompts.train.lengths.max()) + options.max_tokens
        python = options.engine_python or sys.executable
        how = {"tolerance": options.engine_tolerance, "time_limit": options.engine_time_limit}
        how |= {"adapter_alone": options.engine_adapter == "alone", "sleep": options.engine_sleep}
        return ProcessEngine(options.engine, python, context=context, **how)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()

    def _mixed_in(self) -> DemonstrationSampler:
        """The demonstrations that are mixed in. Raises UserError if they are not as `clone` takes them."""
        options, tokenizer = self.options, self.prompts.tokenizer
        self.rows_of_rank("mix_rows")
        found = data.load_demonstrations(options.mix, columns=options.columns)
        if options.system_prompt is not None:
            found = data.with_system_prompt(found, options.system_prompt)
        how: dict[str, Any] = {"long": options.long_prompts, "variables": self._variables(tokenizer)}
        room = room_for_prompts(causal(self.policy.model), options.max_tokens)
        kept = prepared(found, tokenizer, room, max_tokens=options.max_tokens, **how)
        self.dropped += _left_out("demonstrations that are mixed in", found, kept)
        if len(kept) < options.mix_rows:
            said = f"mix_rows is {options.mix_rows}, and mix has {len(kept)} rows"
            raise OptionError("mix_rows", f"{said}: lower it, or give more")
        each = {"prompts_per_rollout": options.mix_rows, "seed": options.seed, "device": options.device}
        return DemonstrationSampler(kept, options.max_tokens, **each)

    def _request(self, completions: int, prompts: Prompts, together: int) -> Request:
        """A request for completions. Raises UserError if those of `together` prompts do not fit in memory."""
        options = self.options
        request = request_of(
            self.policy.model,
            self.prompts.tokenizer,
            completions,
            options.max_tokens,
            stop_texts=options.stop,
            micro_batch=self._rows(prompts),
        )
        check_memory(self.policy, min(together, len(prompts)), int(prompts.lengths.max()), request)
        return request

    def _shares_prompts(self) -> bool:
        """Whether the prompt of a group is computed once. Raises OptionError if it shall be, and cannot."""
        wanted = getattr(self.options, "shared_prompts", "off")
        if getattr(self.options, "shard", False):  # passes through the model would be twice as many on some ranks
            return False
        if wanted == "off" or self.options.completions == 1:
            return False
        works, name = shares_prompts(self.policy, self.prompts.train), type(causal(self.policy.model)).__name__
        said = f"{name} cannot compute a prompt once for its completions here"
        if not works and wanted == "on":
            raise OptionError("shared_prompts", f"{said} (sliding windows, gradient checkpoints): leave it out")
        if not works:
            warnings.warn(f"{said}: it computes it for each of them", Note, stacklevel=2)
        return works

    def _check_mergeable(self) -> None:
        """Raise OptionError if the adapter is to be saved merged, and cannot be."""
        if self.options.save == "merged":
            try:
                check_mergeable(self.policy.model)
            except UserError as error:
                raise OptionError("save", str(error)) from error

    def _rows(self, prompts: Prompts) -> int | None:
        """The completions of these prompts to sample at a time; None: all."""
        rows, tokens = (getattr(self.options, name, None) for name in ("micro_batch", "micro_batch_tokens"))
        if tokens is None:
            return rows
        fitting = max(1, tokens // (int(prompts.lengths.max()) + self.options.max_tokens))
        return min(fitting, rows or fitting)

    def _task(self, progress: bool, saved: list[dict[str, Any]] | None = None) -> Task:
        """The task from the options. saved: the examples to evaluate on, if there is nothing to train on."""
        options = self.options
        if self.task is None and not options.dataset:
            raise OptionError("dataset", NO_PROMPTS)
        own = self.task in OWN
        source = self._source()
        self._environment()
        if not own and source is None:
            named = listed([self.task] if self.task else options.dataset)
            raise OptionError("model", f"there is no model to train on {named}: give model, a directory or a hub id")
        taught = getattr(options, "teacher", None) is not None
        if not own and self.make is None and not options.reward and self.needs_reward and not taught:
            raise OptionError(
                "reward", "nothing judges the completions: give reward, such as exact_match or my_rewards.py:function"
            )
        train: Sequence[Any] = []
        held_out: Sequence[Any] | None = saved
        if saved is None:
            find = self._beginnings if self.make else self._problems if self.task == ARITHMETIC else self._examples
            train, held_out = find()
        plain = without_reward if taught else unjudged
        functions: list[Any] | None = [arithmetic.right if self.task == ARITHMETIC else plain]
        if self.make is not None:
            functions = None
        if options.reward:
            trust = options.trust_remote_code
            functions = reward_functions(
                options.reward, device=options.device, trust_remote_code=trust, trust=options.trust
            )
        model, tokenizer = self._model(source, progress)
        limit = options.max_prompt_tokens
        if limit is None and options.long_prompts == "drop":
            limit = room_for_prompts(model, options.max_tokens)
        train, held_out = self._written(train, tokenizer), held_out and self._written(held_out, tokenizer)
        variables = self._variables(tokenizer)
        if "tools" in (variables or {}) and all(isinstance(x["prompt"], str) for x in (*train, *(held_out or ()))):
            raise OptionError("tool", "the chat template shows tools, and all prompts are text: give system_prompt too")
        settings: dict[str, Any] = {"long": options.long_prompts, "variables": variables}
        if not self.needs_reward and saved is None:
            settings["max_tokens"] = options.max_tokens  # of completions that are given
        prompts = prepared(train, tokenizer, limit, **settings)
        kept = prepared(held_out, tokenizer, limit, **settings) if held_out else None
        self.dropped = _left_out("prompts", train, prompts) + _left_out(
            "evaluation prompts", held_out or (), kept or ()
        )
        if held_out is None:
            prompts, kept = split_prompts(prompts, options.held_out)
        names = ["max_tokens", "reward_weight", "reward_time_limit", "overlong_fraction"]
        names += ["device", "temperature", "lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing"]
        given: dict[str, Any] = {name: getattr(options, name) for name in names if hasattr(options, name)}
        if self._natural():
            given["chunk"] = 2**40  # chunked logits have no second derivative
        return task_of(self.name, model, tokenizer, prompts, kept, functions, autocast=self._autocast(), **given)

    def _environment(self) -> None:
        """The environment and the tools, if any. Raises OptionError for an option of conversations without either."""
        options = self.options
        self.tools = [load_tool(x) for x in getattr(options, "tool", ())]
        if is_conversation(self.task):
            if not hasattr(options, "turns"):
                raise UserError(f"{options.method} learns from completions, and an environment has none: give dataset")
            self.make = environment_named(self.task, self._seconds())
        for name in ("turns", "turn_tokens", "starts", "step_time_limit", "state_weight", "turn_level"):
            talks = self.make is not None or (self.tools and name not in ("starts", "step_time_limit"))
            if getattr(options, name, None) not in (None, 0.0) and not talks:
                raise OptionError(
                    name, f"{name} is of conversations, and {self.name} is a data set of prompts: leave {name} out"
                )

    def _seconds(self) -> float:
        """The time of the environment's start, a reset or a step."""
        limit = self.options.step_time_limit
        return SECONDS if limit is None else limit

    def _limited(self) -> Callable[[], Environment]:
        """What makes the environment, within its time."""
        assert self.make is not None
        return partial(Limited, self.make, self._seconds())

    def _beginnings(self) -> tuple[list[data.Example], None]:
        """The beginnings of the environment's conversations."""
        self._makes_its_own("an environment begins its own conversations", "dataset", "dataset_weight", "columns")
        self._makes_its_own("held_out conversations of an environment are its own", "evaluation_dataset")
        make = self.make
        assert make is not None
        finite = hasattr(make, "__len__") or hasattr(type(make()), "__len__")
        there, wanted = (len(make()) if finite else None), self.options.starts  # type: ignore[arg-type]
        if there is not None and (wanted or 0) > there:
            raise OptionError("starts", f"starts is {wanted}, and the environment has {there}: lower it")
        examples, system = starts(self._limited(), wanted or there or STARTS), self.options.system_prompt
        return examples if system is None else data.with_system_prompt(examples, system), None

    def _makes_its_own(self, why: str, *names: str) -> None:
        """Raise OptionError if one of these options is given."""
        for name in names:
            if getattr(self.options, name) or name in self.rows:
                raise OptionError(name, f"{why}: leave {name} out")

    def _answers(self) -> Answering:
        """How prompts are answered: by completions, or in conversations."""
        if self.make is None and not self.tools:
            return answer
        begin = None if self.make is None else from_seed(self._limited())
        variables = self._variables(self.prompts.tokenizer)
        limits = {"turns": self.options.turns or TURNS, "turn_tokens": self.options.turn_tokens}
        return Dialogue(with_tools(begin, self.tools), variables=variables, **limits)

    def _written(self, examples: Sequence[Any], tokenizer: Any) -> Sequence[Any]:
        """Examples as the tokenizer can write them: of an environment without a chat template, their contents."""
        if self.make is None or tokenizer.chat_template is not None:
            return examples
        if any(not isinstance(x["prompt"], str) for x in examples):
            said = "the tokenizer has no chat template: the contents of messages stand one after another"
            warnings.warn(said, Note, stacklevel=2)
        return [data.with_columns(x, prompt=text_in(x["prompt"])) for x in examples]

    def _problems(self) -> tuple[list[data.Example], list[data.Example]]:
        """The arithmetic task's own prompts. Raises OptionError for an option of other data."""
        names = ("dataset", "dataset_weight", "columns", "system_prompt", "template_variables", "evaluation_dataset")
        self._makes_its_own("arithmetic makes its own problems", *names)
        train, held_out = arithmetic.splits(arithmetic.TRAINED_ON, self.options.held_out, seed=0)
        return [data.Example(x) for x in train], [data.Example(x) for x in held_out]

    def _examples(self) -> tuple[list[data.Example], list[data.Example] | None]:
        """The prompts to train on, and a data set of its own for evaluation, if there is one."""
        options = self.options
        if options.dataset and self.task is not None:
            raise OptionError("dataset", f"{ending(self.task)} and dataset are both data: give dataset for each set")
        source = self.rows.get("dataset", options.dataset or self.task)
        sets, weights = len(data.sets_of(source)), len(options.dataset_weight)
        if weights and sets == 1:
            raise OptionError(
                "dataset_weight", "dataset_weight is of several data sets, and there is one: leave it out"
            )
        if weights and weights != sets:
            said = f"there are {sets} data sets and {weights} weights: give one weight for each"
            raise OptionError("dataset_weight", said)
        train = self.examples(source, options.split)
        other = self.rows.get("evaluation_dataset", options.evaluation_dataset)
        return train, None if other == () else self.examples(other, options.evaluation_split)

    def examples(self, source: Any, split: str, columns: Sequence[str] | None = None) -> list[data.Example]:
        """The prompts of a data set, with this run's system prompt, and with its names of columns or the given ones."""
        if source == ROWS:
            raise UserError("the run was trained on rows of Python, which are not kept: give dataset")
        columns = [columns] if isinstance(columns, str) else self.options.columns if columns is None else columns
        found, system = self.reads(source, split=split, columns=columns), self.options.system_prompt
        return found if system is None else data.with_system_prompt(found, system)

    def _variables(self, tokenizer: Any) -> dict[str, Any] | None:
        """What the chat template reads: the user's variables, and the schemas of the tools."""
        text = self.options.template_variables
        given = None if text is None else json.loads(text)
        environment = None if self.make is None else started(self._limited())
        tools, own = [*self.tools, *getattr(environment, "tools", ())], [*getattr(environment, "schemas", ())]
        if self.tools and own:
            raise OptionError("tool", "the environment has tools, and answers their calls itself: leave tool out")
        if not (tools or own) or tokenizer.chat_template is None:
            return given
        if not templates.reads("tools", tokenizer):
            said = "the chat template shows no tools: say in system_prompt how to call them"
            warnings.warn(said, Note, stacklevel=2)
            return given
        return {**(given or {}), "tools": [*map(schema_of, tools), *own]}

    def _source(self) -> str | None:
        """The model to begin with: the one that is named, or that of another run; None: the task's own."""
        options = self.options
        if options.start is None:
            return options.model
        if options.model is not None:
            raise OptionError("start", "start and model are both the model to begin with: leave one of the two out")
        folder = directory_of(options.start) / "model"
        if not folder.is_dir():
            raise OptionError(
                "start", f"{ending(options.start, 80)} holds no model: give the directory of a language run"
            )
        return str(folder)

    def begin_from(self, directory: Path) -> None:
        """Take the critic of another run, if it fits: the model is read from there already."""
        path, said = directory / "critic.safetensors", "has no critic"
        if self.critic is None:
            return
        if path.exists():
            before = {name: x.clone() for name, x in self.critic.state_dict().items()}
            try:
                models.load_critic(self.critic, path, self.policy)  # type: ignore[arg-type]
                return
            except UserError as error:
                self.critic.load_state_dict(before)
                said = f"has a critic that does not fit ({one_line(error, 60)})"
        warnings.warn(f"{ending(str(directory), 60)} {said}: the critic begins anew", Note, stacklevel=2)

    def _model(self, source: str | None, progress: bool) -> tuple[nn.Module, Any]:
        options = self.options
        attention = options.attention
        if self._natural():
            if attention not in (None, "eager"):
                raise OptionError(
                    "attention",
                    f"attention is {attention}, which has no second derivative: {options.method} needs eager",
                )
            attention = "eager"
        for name in ("tokenizer", "base_model"):
            if source is None and getattr(options, name) is not None:
                raise OptionError(name, f"{name} is of a model of your own, and there is none: give model")
        if source is not None and options.heads is not None:
            raise OptionError(
                "heads", "heads is of the model that a task brings, and there is another: leave heads out"
            )
        if source is None:
            heads = models.HEADS if options.heads is None else options.heads
            source = str(warm_model(progress, options.device, self.task, heads).name_or_path)
        tokenizer = models.load_tokenizer(options.tokenizer or source, trust_remote_code=options.trust_remote_code)
        model = models.load_model(
            source,
            base_model=options.base_model,
            trust=options.trust,
            dtype=options.dtype,
            attention=attention,
            trust_remote_code=options.trust_remote_code,
            quantize=options.quantize == "4bit",
            compute=self._autocast(),
            device=options.device,
        )
        return model, tokenizer

    def _critic(self) -> nn.Module:
        options = self.options
        return critic_of(
            self.policy,
            options.critic,
            dtype=options.dtype,
            attention=options.attention,
            trust_remote_code=options.trust_remote_code,
            trust=options.trust,
            autocast=self._autocast(),
            gradient_checkpointing=options.gradient_checkpointing,
            device=options.device,
        )

    def _natural(self) -> bool:
        """Whether the update needs second derivatives."""
        return KNOWN[self.options.method].update != "ascend"

    def _autocast(self) -> torch.dtype | None:
        return autocast_to(self.options.autocast, self.options.device)

    def load(self, directory: Path) -> Stage:
        folder = directory / "model"
        stage = _stage(folder, directory)
        if self.options.lora_rank == 0 or self.options.save == "merged":
            here = {"model": str(folder), "tokenizer": str(folder), "base_model": None, "start": None, "heads": None}
            self.options = dataclasses.replace(self.options, **here)
        elif (self.options.model or self.options.start) is not None:  # the base of the adapter
            self.options = dataclasses.replace(self.options, tokenizer=str(folder))
        if self.evaluated_on is None:
            rows = read_examples(directory / HELD_OUT)
            saved: list[Any] = data.load_examples(rows) if rows else []
        elif is_conversation(self.task):
            raise UserError("dataset is of prompts, and this run talks to an environment: leave it out")
        else:
            saved = list(self.examples(**self.evaluated_on))
        with models.quiet():
            self.prompts = self._task(progress=False, saved=saved)
            self.policy = self.prompts.policy
            if self.options.lora_rank > 0 and self.options.save == "adapter":
                load_adapter(self.policy.model, folder)
            path = directory / "critic.safetensors"
            if path.exists():
                self.critic_stage = Stage.of(read_metadata(path), path)
                self.critic = self._critic()
                models.load_critic(self.critic, path, self.policy)  # type: ignore[arg-type]
        if not finite(self.modules()):
            raise damaged(folder, "a weight is not finite")
        if _stage(folder, directory) != stage:
            raise UserError(f"{ending(str(folder), 80)} changed while it was read: training goes on there; try again")
        return stage

    def save(self, directory: Path, stage: Stage) -> None:
        """Write model/ in the Hugging Face layout, critic.safetensors, the held-out examples and the last samples."""
        metadata = stage.metadata()
        how: dict[str, Any] = {"merged": self.options.save == "merged"}
        how |= {"weights": part_of(dict(self.collected), "policy.model.")} if self.sharded else {}
        models.save_model(self.policy.model, self.prompts.tokenizer, directory / "model", metadata, **how)
        if self.critic is not None:
            path, weights = directory / "critic.safetensors", {}
            if self.sharded:
                weights = {"weights": part_of(dict(self.collected), "critic.")}
            models.save_critic(self.critic, path, self.policy, metadata, **weights)  # type: ignore[arg-type]
        if not (directory / HELD_OUT).exists():
            write_examples(directory / HELD_OUT, examples_of(self.prompts.held_out))
        if self.last is not None:
            write_samples(directory / "samples.jsonl", self.last.rows)

    @property
    def sharded(self) -> bool:
        return is_sharded(getattr(self, "policy", None))

    def shard(self) -> None:
        options = self.options
        if not getattr(options, "shard", False):
            return
        if getattr(options, "kl_ref", "none") != "none":
            self.anchor = self.reference()
        if ranks.rank() == 0:
            self.collected = {name: x.detach().cpu().clone() for name, x in self.modules().state_dict().items()}
        for module in (self.policy, self.critic, self.anchor):
            if module is not None:
                shard(module, once_a_step=options.gradient_sync == "step")
        ranks.in_lockstep()

    def whole(self) -> AbstractContextManager[None]:
        return whole(self.policy)

    def cut(self) -> None:
        cut(self.policy, self.critic, self.anchor)

    def collect(self) -> dict[str, Any]:
        found = ranks.assembled(super().collect())
        if self.sharded:
            self.collected = found
        return found

    def reference(self) -> nn.Module:
        """The policy as it is now, frozen, or the teacher. Raises OptionError for one with other tokens."""
        if self.anchor is not None:
            return self.anchor
        options = self.options
        if options.teacher is None:
            return reference_of(self.policy)
        how = {name: getattr(options, name) for name in ("dtype", "trust", "trust_remote_code")}
        attention = "eager" if self._natural() else options.attention
        model = models.load_model(options.teacher, attention=attention, what="teacher", **how)
        tokenizer = models.load_tokenizer(options.teacher, trust_remote_code=options.trust_remote_code)
        words = [x.get_output_embeddings().weight.shape[0] for x in (model, causal(self.policy.model))]
        if tokenizer.get_vocab() != self.prompts.tokenizer.get_vocab() or words[0] != words[1]:
            said = f"the teacher {ending(options.teacher, 60)} has other tokens than the policy"
            raise OptionError("teacher", f"{said}: give a model of the same family")
        self.teacher, policy = digest(model.state_dict()), self.policy
        given: dict[str, Any] = {"temperature": policy.temperature, "autocast": policy.autocast, "chunk": policy.chunk}
        taught = LanguagePolicy(model, shared=policy.shared and can_share(LanguagePolicy(model)), **given)
        return taught.to(options.device).requires_grad_(False)

    def data_digests(self) -> dict[str, str]:
        samplers = {"training data": self.sample, "data that is mixed in": self.demonstrations}
        return {name: x.prompts.digest() for name, x in samplers.items() if x is not None}

    def beside(self) -> dict[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """Answer each held-out prompt `count` times, with samples unless `greedy`."""
        completions = getattr(self.options, "evaluation_completions", 4) if count is None else count
        if completions < 1:
            raise UserError(f"completions is {completions}: it must be at least 1")
        if self.prompts.held_out is None:
            raise UserError("no examples were held out to evaluate on: give dataset, or train with held_out above 0")
        self.last = evaluate_policy(
            self.policy,
            self.prompts.held_out,
            self.prompts.tokenizer,
            self.prompts.judge_held_out,
            completions=completions,
            max_tokens=self.options.max_tokens,
            seed=seed,
            greedy=bool(greedy),
            stop_texts=self.options.stop,
            micro_batch=self._rows(self.prompts.held_out),
            answers=self._answers(),
        )
        return self.last

    def watch(self, profile: Any, learner: Any) -> None:
        if self.sample.judge is not None:
            self.sample.judge = profile.timed("scoring", self.sample.judge)
        profile.watch(learner, self.sample, ("sampling", "scoring", "learning"))

    def speeds(self, row: Row, before: Row, seconds: float) -> Row:
        """Tokens per second of sampling and of learning in this iteration."""
        tokens, sampling = (
            row["steps"] - before.get("steps", 0.0),
            row["sampling_seconds"] * row.get("sampling_rounds", 1.0),
        )
        return {
            "iteration_seconds": seconds,
            "sampling_tokens_per_second": tokens / max(sampling, 1e-9),
            "learning_tokens_per_second": tokens / max(seconds - sampling, 1e-9),
        }

    def part(self, row: Row) -> Any:
        """With the mean square of rewards, of which the standard deviation of all ranks is made."""
        answers = self.sample.last
        judged = float((~answers.reward.isnan()).sum())
        of_reward = {"reward": judged, "reward_std": judged, "reward_square": judged}
        of_reward |= {
            name: float((~x.isnan()).sum()) for part, x in answers.parts.items() if (name := f"reward/{part}")
        }
        groups = dict.fromkeys(("group_std", "flat_groups"), len(answers.texts) / self.options.completions)
        square = {"reward_square": row["reward_std"] ** 2 + row["reward"] ** 2} if judged else {}
        return row | square, {DECISIONS: float(len(answers.texts)), **of_reward, **groups}

    def joined(self, parts: list[Any]) -> Row:
        joined = super().joined(parts)
        if "reward_square" in joined:
            joined["reward_std"] = max(joined.pop("reward_square") - joined["reward"] ** 2, 0.0) ** 0.5
        joined["sampling_seconds"] = max(row["sampling_seconds"] for row, _ in parts)
        return joined

    def status(self, row: Row) -> list[str]:
        """The newest numbers, with a note if all groups are flat, because the objective would not show it."""
        parts = [f"reward {row['reward']:.3f}"]
        parts += [f"held-out {row['held_out']:.3f}"] if "held_out" in row else []
        parts += [f"KL(ref) {row['kl_ref']:.4f}"] if "kl_ref" in row else []
        parts += [f"length {row['length']:.0f}"]
        if row.get("masked") == 1:
            return [*parts, "no completion counts: nothing to learn"]
        flat = row.get("flat_groups") == 1 and getattr(self.options, "teacher", None) is None
        return parts + (["all groups flat: nothing to learn"] if flat else [])

    def curve(self) -> Curve:
        return Curve(
            x=("completions", "completions"),
            y=("reward", "mean reward of a rollout"),
            points=("held_out", "held-out"),
            length_of="completion",
        )

    def summary(self, rows: list[Row]) -> dict[str, Any]:
        last = rows[-1] if rows else {}
        return {
            "completions": int(last.get("completions", 0)),
            "tokens": int(last.get("steps", 0)),
            "reward": last.get("reward"),
        }

    def result(self, rows: list[Row], seconds: float) -> str:
        last, found = rows[-1], self.summary(rows)
        return (
            f"reward {last['reward']:.3f} in the last rollout, {found['completions']:,} completions, "
            f"{found['tokens']:,} tokens in {seconds:.1f} s ({last['sampling_tokens_per_second']:,.0f} tokens/s "
            f"sampling, {last['learning_tokens_per_second']:,.0f} learning)"
        )

    def notes(self, run: Any) -> list[str]:
        return [*self.dropped, *self._notes_on_learning(run)]

    def _notes_on_learning(self, run: Any) -> list[str]:
        rows = run.metrics
        uncounted = _uncounted([row for row in rows if "masked" in row])
        flat = [row["flat_groups"] for row in rows if "flat_groups" in row]
        judged = [] if run.before is None or run.after is None else verdict(run.before, run.after)
        notes = uncounted + judged
        if getattr(self.options, "teacher", None) is not None:
            return notes
        if flat and sum(flat) / len(flat) > 0.9:
            notes.append(
                f"{sum(flat) / len(flat):.0%} of the groups were flat: all completions of a prompt had the same "
                "reward, and such a group has no gradient. Easier or harder prompts, more completions or a finer "
                "reward would help"
            )
        elif not uncounted and flat and abs(rows[-1].get("objective", 1.0)) < 1e-3:
            notes.append(
                "the objective is near 0 at every step because advantages are centered and the ratio starts at 1: look "
                "at reward and gradient_norm"
            )
        return notes

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "transformers": transformers.__version__}


def environment_named(task: str, seconds: float = SECONDS) -> Callable[[], Environment]:
    """What makes the environment of a task. Raises UserError if there is none, or if it starts for so long."""
    if task == LOOKUP:
        return OWN[LOOKUP].Lookup
    if task.startswith(REASONING_GYM):
        from policygrad.language.reasoning import reasoning_gym

        return reasoning_gym(task.removeprefix(REASONING_GYM))
    if task.startswith(VERIFIERS):
        from policygrad.language.verifiers import verifiers_environment

        load = partial(verifiers_environment, task.removeprefix(VERIFIERS))
        loaded: Callable[[], Environment] = within(load, seconds, f"the start of {ending(task, 40)}")
        return loaded
    make = load_function(task, what="environment")
    try:
        made = within(make, seconds, f"the start of {ending(task, 40)}")
    except UserError:
        raise
    except Exception as error:
        said = one_line(error, 60) or "no message"
        raise UserError(
            f"{ending(task, 40)} raised {type(error).__name__} ({said}): it is called without arguments"
        ) from error
    if not isinstance(made, Environment):
        raise UserError(f"{ending(task, 40)} makes no environment to talk to: give it reset(seed) and step(text)")
    return make


def started(make: Callable[[], Environment]) -> Environment:
    """An environment at the beginning of its first conversation."""
    environment = make()
    begun(environment, 0)
    return environment


def unjudged(completions: list[Any], **_: Any) -> list[None]:
    """No reward for any completion."""
    return [None] * len(completions)


def without_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward of 0: a teacher alone is learned from."""
    return [0.0] * len(completions)


def examples_of(prompts: Prompts | None) -> list[dict[str, Any]]:
    """Prompts as rows of a data set, as they were before they became tokens."""
    if prompts is None:
        return []
    columns = {"prompt": prompts.texts, **prompts.columns}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]


def _left_out(what: str, found: Sized, kept: Sized) -> tuple[str, ...]:
    """A note on prompts that were dropped, if any were."""
    count = len(found) - len(kept)
    return (f"{count:,} of {len(found):,} {what} were too long and were left out",) if count else ()


def _uncounted(rows: list[Row]) -> list[str]:
    """Notes about completions that did not count, that were cut, and that repeat their prompt."""
    notes: list[str] = []
    if not rows:
        return notes
    unjudged = sum(row["unjudged"] for row in rows) / len(rows)
    empty = sum(row["masked"] == 1 for row in rows) / len(rows)
    first, last = rows[0]["prompt_repeats"], rows[-1]["prompt_repeats"]
    if unjudged:
        notes.append(f"no reward applied to {unjudged:.1%} of the completions, and they were left out of the update")
    if empty:
        notes.append(
            f"in {empty:.0%} of the iterations no completion counted, because each was cut and masked or had no "
            "reward: nothing was learned from them. Raise max_tokens, or use cut kept or penalized"
        )
    if rows[-1]["cut_fraction"] > 0.5:
        notes.append(
            f"{rows[-1]['cut_fraction']:.0%} of the completions of the last rollout were cut at max_tokens: raise it, "
            "unless the model should learn to be shorter"
        )
    if last > 0.5:
        notes.append(
            f"{last:.0%} of the completions of the last rollout repeat their prompt ({first:.0%} of the first): read "
            "samples.jsonl, for the reward may be earned without an answer"
        )
    return notes


def _stage(folder: Path, directory: Path) -> Stage:
    """The stage of a model's weights. Raises UserError for a damaged folder, and for weights of two iterations."""
    check_directory(folder, directory)
    stages = {Stage.of(read_metadata(path), path) for path in folder.glob("*.safetensors")}
    if len(stages) != 1:
        raise damaged(folder, "its weights are of different iterations" if stages else "it holds no weights")
    return stages.pop()


def warm_model(progress: bool, device: str, task: str = ARITHMETIC, heads: int = models.HEADS) -> Any:
    """A task's own model after its demonstrations, with a progress bar if it is trained now."""
    with progress_bar("learning from demonstrations", int(RECIPE["steps"]), progress) as advance:
        return warmed_up(progress=lambda done, total, status: advance(status), task=task, heads=heads, device=device)


def verdict(before: Evaluation, after: Evaluation) -> list[str]:
    """What two evaluations on the same prompts say of training, unless the reward rose by more than their noise.

    The noise is two standard errors of the mean over prompts of the change of a prompt's mean reward.
    """
    pairs = zip(_by_prompt(before), _by_prompt(after), strict=True)
    changes = [y - x for x, y in pairs if x is not None and y is not None]
    if len(changes) < 2:
        return []
    change, noise = fmean(changes), 2 * stdev(changes) / len(changes) ** 0.5
    said = f"the held-out reward changed by {change:+.3f}, and the noise of that is {noise:.3f}"
    if change < -noise:
        return [f"{said}: the policy is worse than before; a lower learning_rate may help"]
    if change <= noise:
        return [f"{said}: nothing that can be told from chance was learned; more iterations or learning_rate may help"]
    return []


def _by_prompt(evaluation: Evaluation) -> list[float | None]:
    """The mean reward of each prompt's completions; None if none has a reward."""
    rewards, count = [row["reward"] for row in evaluation.rows], evaluation.completions
    groups = [[x for x in rewards[i : i + count] if x is not None] for i in range(0, len(rewards), count)]
    return [fmean(group) if group else None for group in groups]


def card(run: Any) -> str:
    """The model card: what the model is, how it was trained, and its scores."""
    options = run.configuration()["options"]
    if options["model"]:
        options = options | {"model": models.located(options["model"])}
    base = options["model"] or f"the small model of the task {run.world.name}"
    judged = (("before", run.before), ("after", run.after))
    scores = [f"- {when}: {x.line()}" for when, x in judged if x is not None]
    lines = [
        "---",
        "library_name: " + ("peft" if options["lora_rank"] and options["save"] == "adapter" else "transformers"),
        *([f"base_model: {options['model']}"] if options["model"] else []),
        "tags: [policygrad, reinforcement-learning]",
        "---",
        "",
        f"# {run.method} on {run.world.name}",
        "",
        f"Trained by `{run.method}` with policygrad, from {base}.",
        *(["", "On held-out prompts:", "", *scores] if scores else []),
        "",
        "```json",
        json.dumps({k: v for k, v in options.items() if v not in (None, [], ())}, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)
