"""Kuhn poker whose cards are looked at once: a game that needs memory, learned by self-play, with and without one.

python examples/kuhn.py [--steps N] [--seeds N] [--out FILE.json]    two minutes

Each of two players puts a chip into the pot and gets one of three cards. A player looks at it in its first move, and
sees it never again. Then the first one bets a chip or passes, and the other one answers: after a bet by a call or a
fold, after a pass by a bet, which the first one answers, or a pass. The higher card wins the pot.

The game is small enough for everything to be a sum (Kuhn 1950, "A simplified two-person poker"): the value of two
policies against each other, and a policy's worst case, its value against the opponent who answers it best. The best
worst case is 0, the mean of both seats (the first one loses 1/18 of a chip, the second one wins it). Who has forgotten
its card plays all cards alike, and then it is a loss of 1/3.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import permutations, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

import policygrad as pg

PASS, BET = 0, 1
ASKED = {"first": ("", "pb"), "second": ("p", "b")}  # the bets so far where a player is asked for one
OVER = ("pp", "pbp", "pbb", "bp", "bb")
SPACE = spaces.Dict({"observation": spaces.Box(0, 1, (7,), np.float32), "action_mask": spaces.MultiBinary(2)})
# Without a large reward for entropy, self-play ends where nobody bluffs, or goes in circles.
SETTINGS: dict[str, Any] = {
    "opponent": "self",
    "freeze_every": 1,
    "gamma": 1,
    "num_envs": 32,
    "num_steps": 16,
    "minibatch_size": 128,
    "epochs": 4,
    "hidden": (32,),
    "learning_rate": 3e-3,
    "learning_rate_schedule": "linear",
    "entropy_coefficient": 0.3,
    "compile": "off",
}
Plan = Mapping[tuple[int, str], float]  # (card, bets so far) -> the probability of a bet


class Kuhn:
    """As PettingZoo has games. Observation: the card, in the first move alone; then the bets so far, one of four.

    Actions: 0, pass or fold; 1, bet or call; in the first move 0 alone, which the mask says. Rewards are chips.
    """

    possible_agents: Any = ("first", "second")
    metadata: Any = MappingProxyType({"name": "kuhn", "render_modes": []})
    render_mode = None

    def observation_space(self, agent: str) -> spaces.Space:
        return SPACE

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(2)

    def reset(self, seed: int | None = None, options: Any = None) -> None:
        dealt = np.random.default_rng(seed).permutation(3)
        self.cards = {"first": int(dealt[0]), "second": int(dealt[1])}
        self.agents, self.agent_selection, self.bets = list(self.possible_agents), "first", ""
        self.looking = True  # nobody has seen a card, or only the first player

    def last(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        now, over = self.agent_selection, self.bets in OVER
        obs = seen(self.cards[now] if self.looking else None, self.bets)
        won = chips(self.bets, self.cards["first"], self.cards["second"]) if over else 0.0
        return obs, won if now == "first" else -won, over, False, {}

    def agent_iter(self) -> Any:
        raise NotImplementedError  # a mark of games with turns; the library asks `agent_selection`

    def step(self, action: int | None) -> None:
        now = self.agent_selection
        if self.bets in OVER:
            self.agents.remove(now)
        elif self.looking:
            self.looking = now == "first"
        else:
            self.bets += "pb"[int(action)]  # type: ignore[arg-type]
        self.agent_selection = "second" if now == "first" else "first"

    def close(self) -> None:
        pass


def seen(card: int | None, bets: str) -> dict[str, np.ndarray]:
    """What a player sees: a card at its first move, where it can only go on, and after that the bets so far."""
    shown = [card == x for x in range(3)] + [card is None and bets == x for x in ("", "p", "b", "pb")]
    return {"observation": np.array(shown, np.float32), "action_mask": np.array([1, card is None], np.int8)}


def chips(bets: str, first: int, second: int) -> float:
    """What the first player wins at the end."""
    if bets in ("bp", "pbp"):  # a fold
        return 1.0 if bets == "bp" else -1.0
    return (2.0 if bets.endswith("bb") else 1.0) * (1 if first > second else -1)


@torch.no_grad()
def plan(policy: Any) -> Plan:
    """A policy's probability of a bet, with each card and after all bets. A game begins with an empty memory."""
    found = {}
    for card, asked in product(range(3), [("", "pb"), ("p",), ("b",)]):  # what a player is asked in one game
        game = [seen(card, ""), *(seen(None, bets) for bets in asked)]
        obs = torch.from_numpy(np.stack([spaces.flatten(SPACE, x) for x in game])).to(torch.get_default_dtype())
        bet = policy(obs.unsqueeze(0)).probs[0, 1:, BET]
        found |= {(card, bets): float(x) for bets, x in zip(asked, bet, strict=True)}
    return found


def value(first: Plan, second: Plan) -> float:
    """The expected chips of the first player, over all deals and bets."""

    def after(bets: str, a: int, b: int) -> float:
        if bets in OVER:
            return chips(bets, a, b)
        bet = first[a, bets] if len(bets) % 2 == 0 else second[b, bets]
        return (1 - bet) * after(bets + "p", a, b) + bet * after(bets + "b", a, b)

    return float(np.mean([after("", a, b) for a, b in permutations(range(3), 2)]))


def pure(seat: str) -> Iterator[Plan]:
    """All plans of a seat that leave nothing to chance."""
    places = list(product(range(3), ASKED[seat]))
    for bets in product((0.0, 1.0), repeat=len(places)):
        yield dict(zip(places, bets, strict=True))


def worst(of: Plan) -> float:
    """The expected chips against the opponent who answers this plan best, the mean of both seats."""
    return (min(value(of, x) for x in pure("second")) - max(value(x, of) for x in pure("first"))) / 2


def against(one: Plan, other: Plan) -> float:
    """The expected chips of a plan against another, the mean of both seats."""
    return (value(one, other) - value(other, one)) / 2


def learned(memory: str, steps: int, seed: int = 0) -> Plan:
    """What self-play comes to."""
    size: dict[str, Any] = {"memory_size": 16} if memory != "none" else {}
    run = pg.train("ppo", Kuhn, steps=steps, seed=seed, memory=memory, progress=False, **size, **SETTINGS)
    return plan(run.policy)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"steps": arguments.steps, "worst": {"gru": [], "none": []}, "against": []}
    for seed in range(arguments.seeds):
        plans = {memory: learned(memory, arguments.steps, seed) for memory in found["worst"]}
        for memory, its in plans.items():
            found["worst"][memory].append(worst(its))
        found["against"].append(against(plans["gru"], plans["none"]))
        gru, none = (found["worst"][memory][-1] for memory in plans)
        print(f"seed {seed}, chips a game: with memory at worst {gru:.3f}, without {none:.3f}, ", end="")
        print(f"with against without {found['against'][-1]:+.3f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
