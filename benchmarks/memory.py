"""Peak memory of a learning step with a large vocabulary: TokenDistribution against the plain computation.

    python benchmarks/memory.py              writes docs/memory.md

A head of 151,936 tokens on hidden states of width 896 (the sizes of Qwen2.5-0.5B), 4 rows of 512 tokens, float32. The
step: log-probabilities and entropies of the actions, the clipped surrogate of PPO with an entropy bonus, and the
gradients of hidden states and weight. "plain" holds the logits whole and calls log_softmax, as trainers do. Each runs
in a process of its own, REPETITIONS times in turn; medians. seconds: of the processor, all threads together, so that
other work on the machine does not count. The peak is what VmHWM rises above the VmRSS just before the step, when
hidden states and weight are in memory already (Linux). The gradients are compared on 64 tokens.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from policygrad.language.distributions import TokenDistribution
from policygrad.objectives import clipped_surrogate

VOCABULARY, WIDTH, ROWS, TOKENS, SMALL = 151_936, 896, 4, 512, 64
REPETITIONS = 3
GIB = 2**30
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "memory.md"


def plain(hidden: Tensor, weight: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


def chunked(hidden: Tensor, weight: Tensor, action: Tensor, chunk: int = 2**24) -> tuple[Tensor, Tensor]:
    distribution = TokenDistribution(hidden, weight, chunk=chunk)
    return distribution.log_prob(action), distribution.entropy()


def problem(rows: int, tokens: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    """hidden, weight, action, logp_old, advantage; the same in every process."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, tokens, WIDTH, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH).mul_(2 / WIDTH**0.5).requires_grad_()
    action = torch.randint(vocabulary, (rows, tokens))
    logp_old = (hidden.detach() * weight.detach()[action]).sum(-1) - 14 + 0.2 * torch.randn(rows, tokens)
    return hidden, weight, action, logp_old, torch.randn(rows, tokens)


def step(head, hidden: Tensor, weight: Tensor, action: Tensor, logp_old: Tensor, advantage: Tensor) -> float:
    logp, entropy = head(hidden, weight, action)
    gain = clipped_surrogate(logp, (logp - logp_old).exp(), advantage, low=0.2, high=0.2)
    objective = gain.mean() + 0.01 * entropy.mean()
    (-objective).backward()
    return objective.item()


def memory(field: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measured(name: str) -> dict[str, float]:
    """In this process: one step's peak and time."""
    head = {"plain": plain, "chunked": chunked}[name]
    step(head, *problem(1, 2, vocabulary=1_000))  # libraries loaded, threads started
    given = problem(ROWS, TOKENS)
    before, start = memory("VmRSS"), time.process_time()
    objective = step(head, *given)
    seconds = time.process_time() - start
    return {"peak": memory("VmHWM") - before, "seconds": seconds, "objective": objective}


def difference() -> dict[str, dict[str, float]]:
    """The largest error of a gradient's entries, relative to the largest entry, against the plain one in float64."""
    found = []
    for head, dtype in ((plain, torch.float64), (plain, torch.float32), (chunked, torch.float32)):
        hidden, weight, *others = problem(1, SMALL)
        given = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        step(partial(chunked, chunk=15 * VOCABULARY) if head is chunked else head, *given, *others)
        found.append([x.grad for x in given])
    exact, *rounded = found
    return {
        name: {
            of: ((a - b).abs().max() / a.abs().max()).item()
            for of, a, b in zip(("hidden", "weight"), exact, gradients, strict=True)
        }
        for name, gradients in zip(("plain", "chunked"), rounded, strict=True)
    }


def in_a_process(what: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    found = [{name: in_a_process(name) for name in ("plain", "chunked")} for _ in range(REPETITIONS)]
    result = {
        name: {key: statistics.median(x[name][key] for x in found) for key in ("peak", "seconds")} for name in found[0]
    }
    gradient = in_a_process("difference")
    lines = ["| | peak, GiB | of plain | seconds | of plain |", "|---|---|---|---|---|"]
    for name, x in result.items():
        share = x["peak"] / result["plain"]["peak"]
        slower = x["seconds"] / result["plain"]["seconds"]
        lines.append(f"| {name} | {x['peak'] / GIB:.2f} | {share:.2f} | {x['seconds']:.1f} | {slower:.2f} |")
    lines += [
        "",
        "| largest error, relative to the largest entry, of the gradient of | hidden | weight |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {x['hidden']:.1e} | {x['weight']:.1e} |" for name, x in gradient.items()]
    table = "\n".join(lines)
    print(table)
    DOCUMENT.write_text(f"""# Memory of a learning step

Written by `python benchmarks/memory.py`: log-probabilities, entropies, the clipped surrogate and the gradients of
hidden states and weight, for {ROWS} x {TOKENS} tokens, a vocabulary of {VOCABULARY:,} and hidden states of width
{WIDTH}, in float32. *plain* holds the logits whole; *chunked* is `TokenDistribution`, which takes a block of the
vocabulary at a time. Seconds are those of the processor, medians of {REPETITIONS}. The peak is the rise of resident
memory during the step. The weight's gradient, which both must return, is {VOCABULARY * WIDTH * 4 / GIB:.2f} GiB of it;
one copy of the logits is {ROWS * TOKENS * VOCABULARY * 4 / GIB:.2f} GiB.

{table}

Gradients are compared with those in float64, on {SMALL} tokens of the same vocabulary. CPU, {os.cpu_count()} cores,
{torch.get_num_threads()} threads, torch {torch.__version__.split("+")[0]}; other work may have run beside it.
""")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(difference() if sys.argv[1] == "difference" else measured(sys.argv[1])))
    else:
        main()
