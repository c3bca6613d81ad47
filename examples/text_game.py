"""One game, played by a perceptron on numbers and by a language model in text, through the same method object.

python examples/text_game.py [--iterations N] [--seeds N] [--out FILE]    some minutes; writes docs/text_game.png

A walker on a field of 4 x 4 is paid 1 for reaching its goal within 8 steps. The perceptron sees four numbers and has
four actions. The language model, which begins with random weights, reads the four digits and answers by a word of its
own choice; only n, e, s and w are moves.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.optim import Adam
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import policygrad as pg
from policygrad.control.environments import make_environments
from policygrad.language.conversations import Dialogue, from_seed, starts, text_in
from policygrad.language.games import TextGame
from policygrad.language.policies import LanguagePolicy
from policygrad.language.sampler import CompletionSampler, request_of
from policygrad.language.tasks import prepared

SIDE, STEPS, TURNS = 4, 8, 10
GROUPS, SIZE = 16, 8  # groups of a rollout, and episodes of a group
WORDS = ["<pad>", "<eos>", *"0123", "n", "e", "s", "w", ">", "?"]
MOVES = {"n": 0, "e": 1, "s": 2, "w": 3}
FILE = Path(__file__).resolve().parent.parent / "docs" / "text_game.png"


class Walk(gymnasium.Env[Any, Any]):
    """The walker's place and its goal; 1 for getting there."""

    observation_space, action_space = MultiDiscrete([SIDE] * 4), Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            self.place, self.goal = self.np_random.integers(SIDE, size=(2, 2))
            if (self.place != self.goal).any():
                return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = np.clip(self.place + [(0, 1), (1, 0), (0, -1), (-1, 0)][int(action)], 0, SIDE - 1)
        there = bool((self.place == self.goal).all())
        return self._seen(), float(there), there, False, {}

    def _seen(self) -> Any:
        return np.concatenate([self.place, self.goal])


def game() -> gymnasium.Env[Any, Any]:
    """The game as numbers."""
    return gymnasium.wrappers.TimeLimit(Walk(), STEPS)


def in_text() -> TextGame:
    """The same game in text."""
    return TextGame(game, say=lambda seen: "".join(map(str, seen)) + ">", actions=MOVES, again="?")


def perceptron(seed: int) -> tuple[Any, Any]:
    """A policy on numbers, and its sampler."""
    environments = make_environments(game, GROUPS * SIZE)
    policy = pg.Policy(environments.single_observation_space, environments.single_action_space)
    return policy, pg.Sampler(environments, STEPS, seed=seed, whole_episodes=True, groups=SIZE)


def language_model(seed: int) -> tuple[Any, Any]:
    """A small Llama with random weights, and its sampler of conversations."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **shape))
    beginnings = [dict(x, prompt=text_in(x["prompt"])) for x in starts(in_text, 1000)]
    sampler = CompletionSampler(
        prepared(beginnings, words),
        words,
        None,  # the game judges
        request_of(model, words, SIZE, TURNS * 7),
        prompts_per_rollout=GROUPS,
        answers=Dialogue(from_seed(in_text), TURNS, turn_tokens=1),
        seed=seed,
    )
    return LanguagePolicy(model), sampler


def curve(method: Any, made: tuple[Any, Any], rate: float, iterations: int) -> list[float]:
    """The mean return of each rollout."""
    policy, sample = made
    update = pg.updates.ascend(Adam(policy.parameters(), lr=rate), max_grad_norm=1.0)
    returns: list[float] = []

    def recorded(policy: Any) -> Any:
        rollout = sample(policy)
        returns.append(rollout.reward.sum(1).mean().item())
        return rollout

    rows = method(recorded, objective=pg.GRPOObjective(policy), update=update)
    for _ in zip(range(iterations), rows, strict=False):
        pass
    return returns[:iterations]


def main() -> None:
    """Train both, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=140)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    method = partial(
        pg.grpo, credit=pg.credit.grouped(), epochs=2, minibatch_size=64
    )  # the one object that both learn by
    kinds = {"perceptron, numbers": (perceptron, 3e-3), "language model, text": (language_model, 3e-3)}
    figure = Figure(figsize=(6.4, 3.6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, (make, rate)), color in zip(kinds.items(), ("#3B6FB6", "#E07B39"), strict=True):
        for seed in range(given.seeds):
            torch.manual_seed(seed)
            returns = curve(method, make(seed), rate, given.iterations)
            print(f"{name}, seed {seed}: {np.mean(returns[:5]):.3f} at first, {np.mean(returns[-5:]):.3f} at last")
            episodes = GROUPS * SIZE * np.arange(1, len(returns) + 1)
            axes.plot(episodes, returns, color=color, alpha=0.8, lw=1.2, label=name if seed == 0 else None)
    axes.set_xlabel("episodes")
    axes.set_ylabel("return")
    axes.set_ylim(0, 1)
    axes.set_title("The same game, by the same GRPO", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
