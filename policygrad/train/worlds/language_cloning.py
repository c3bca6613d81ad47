"""Supervised fine-tuning: a language model and completions to learn."""

from typing import Any

from policygrad.errors import UserError
from policygrad.language import arithmetic, data, models
from policygrad.language.evaluation import Evaluation
from policygrad.language.sampler import DemonstrationSampler, demonstrated
from policygrad.language.tasks import ARITHMETIC
from policygrad.rollout import Rollout
from policygrad.train.worlds.cloning import Cloning
from policygrad.train.worlds.language import LanguageWorld
from policygrad.train.worlds.world import Own


class ClonedLanguage(Cloning, LanguageWorld):
    """A data set of prompts with completions, or the task `arithmetic` with imperfect ones of its own."""

    needs_reward = False

    def build(self, own: Own, progress: bool) -> None:
        if own.policy is not None or own.critic is not None or own.engine is not None:
            raise UserError("policy, critic and engine are of other methods and worlds: give model alone")
        options, self.rows, self.reads = self.options, own.data, data.load_demonstrations
        with models.quiet():
            self.prompts = self._task(progress)
            self.policy = self.prompts.policy
            self._check_mergeable()
            self.rows_of_rank("prompts_per_rollout")
            self.sample = DemonstrationSampler(
                self.prompts.train,
                options.max_tokens,
                prompts_per_rollout=options.prompts_per_rollout,
                dataset_weight=options.dataset_weight,
                seed=options.seed,
                device=options.device,
            )

    def _problems(self) -> tuple[list[data.Example], list[data.Example]]:
        both = super()._problems()
        for examples in both:
            completions = arithmetic.demonstrations(list(examples), seed=0)
            for example, completion in zip(examples, completions, strict=True):
                example["completion"] = completion
        return both

    def validates(self) -> bool:
        return self.prompts.held_out is not None

    def held_out(self) -> Rollout:
        assert self.prompts.held_out is not None
        return demonstrated(self.prompts.held_out, self.options.device)

    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """As other language runs, by a reward that the run or the user names."""
        if not self.options.reward and self.task != ARITHMETIC:
            raise UserError("nothing judges the completions of this run: give reward, such as --reward exact_match")
        return super().evaluate(count, seed=seed, greedy=greedy)

    def notes(self, run: Any) -> list[str]:
        return list(self.dropped)
