"""The variance-reduction story in one picture: the gradient's variance on CartPole, for each way of assigning credit.

    python benchmarks/variance.py            writes docs/variance.png and docs/variance.json

One policy, half-way trained, and a critic that was fitted to its returns on other episodes; both are then left alone.
Every estimator sees the same batches of 8 whole episodes, with gamma = 0.99. Its variance is E|g - E g|^2 over the
batches, g the gradient in all parameters. The GAE bars pay for their low variance with a bias that the critic's errors
decide; the others have none with respect to the objective without a discount on the states.
"""

import json
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from policygrad.advantages import gae, mean_baseline, no_baseline, time_mean_baseline
from policygrad.algorithms.ppo import PPOObjective, ppo
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.control import Critic, Policy, Sampler, make_environments
from policygrad.credit import baselined, bootstrapped
from policygrad.critics import fit_critic, optimal_baseline, value_baseline
from policygrad.linalg import flat_gradient
from policygrad.returns import reward_to_go, trajectory_return
from policygrad.rollout import decisions
from policygrad.updates import ascend
from policygrad.weights import per_episode

GAMMA, EPISODES, BATCHES = 0.99, 8, 200
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    environments = make_environments("CartPole-v1", EPISODES)
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    critic = Critic(environments.single_observation_space)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-3)
    training = Sampler(environments, 128, seed=0)
    credit = bootstrapped(critic, partial(gae, gamma=GAMMA, lam=0.95))
    update = ascend(optimizer, max_grad_norm=0.5)
    for metrics in ppo(training, credit, PPOObjective(policy, critic), update, minibatch_size=256):
        if metrics.get("return", 0) > 100:
            break

    sample = Sampler(environments, 500, seed=1, whole_episodes=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    to_go, whole = partial(reward_to_go, gamma=GAMMA), partial(trajectory_return, gamma=GAMMA)
    for _ in range(50):
        rollout = sample(policy)
        batch = decisions(rollout, per_episode(rollout.mask), *baselined(to_go)(rollout))
        fit_critic(critic, critic_optimizer, epochs=4, minibatch_size=256)(batch)

    optimal, learned = partial(optimal_baseline, policy=policy), partial(value_baseline, critic=critic)

    def by_gae(lam):
        return bootstrapped(critic, partial(gae, gamma=GAMMA, lam=lam))

    estimators = {
        "whole return": baselined(whole, no_baseline),
        "whole return, optimal constant": baselined(whole, optimal),
        "reward-to-go": baselined(to_go, no_baseline),
        "reward-to-go, mean baseline": baselined(to_go, mean_baseline),
        "reward-to-go, optimal constant": baselined(to_go, optimal),
        "reward-to-go, mean at each step": baselined(to_go, time_mean_baseline),
        "reward-to-go, learned value": baselined(to_go, learned),
        "GAE, lam = 0.95": by_gae(0.95),
        "GAE, lam = 0.8": by_gae(0.8),
        "GAE, lam = 0 (TD error)": by_gae(0.0),
    }
    objective, parameters = ReinforceObjective(policy), list(policy.parameters())
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in estimators}
    lengths = []
    for _ in range(BATCHES):
        rollout = sample(policy)
        lengths.append(rollout.mask.sum(1).double().mean().item())
        for name, assign in estimators.items():
            batch = decisions(rollout, per_episode(rollout.mask), *assign(rollout))
            gradients[name].append(flat_gradient(objective(batch)[0], parameters))
    variance = {}
    for name, rows in gradients.items():
        g = torch.stack(rows).double()
        variance[name] = ((g - g.mean(0)) ** 2).sum(1).mean().item() * BATCHES / (BATCHES - 1)
    DOCS.mkdir(exist_ok=True)
    (DOCS / "variance.json").write_text(json.dumps(variance, indent=1) + "\n")
    draw(variance, sum(lengths) / len(lengths), DOCS / "variance.png")
    for name, x in variance.items():
        print(f"{name:34} {x:12.4g}   1/{variance['whole return'] / x:,.1f}")


def draw(variance: dict[str, float], length: float, path: Path) -> None:
    names, values = list(variance), list(variance.values())
    colors = ["#b3452f" if "whole" in n else "#3a6ea5" if "to-go" in n else "#4d8f56" for n in names]
    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.hlines(range(len(names)), values, values[0], color=colors, linewidth=1.2, alpha=0.45)
    axes.scatter(values, range(len(names)), color=colors, s=70, zorder=3)
    axes.axvline(values[0], color=colors[0], linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 2)
    for i, x in enumerate(values[1:], 1):
        less = values[0] / x
        axes.text(x * 0.86, i, f"1/{less:,.0f}" if less > 10 else f"1/{less:.1f}", va="center", ha="right", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"variance of the gradient, E|g - E g|$^2$, over {BATCHES} batches of {EPISODES} episodes")
    axes.set_title(
        f"One policy, the same episodes of CartPole ({length:.0f} steps on average), ten ways to assign credit",
        loc="left",
        fontsize=11,
        fontweight="bold",
        x=-0.32,
    )
    figure.savefig(path)


if __name__ == "__main__":
    main()
