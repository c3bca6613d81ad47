"""Whether a policy or a critic has memory: does its output at a step depend on the rest of the row?"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from policygrad.errors import UserError

ROWS, STEPS = 8, 16  # how much of a rollout the comparison reads

_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def refuse_memory(module: nn.Module, obs: Tensor, name: str = "policy") -> None:
    """Raise UserError if the module has memory and no state to keep it in: acting step by step would lose it."""
    if has_memory(module, obs):
        raise UserError(
            f"the {name}'s output at a step depends on other steps of its row, and it has no state to remember them: "
            "give it initial and unrolled (rollout.state_size says how)"
        )


@torch.no_grad()
def has_memory(module: nn.Module, obs: Tensor) -> bool:
    """Whether a policy or a critic gives other numbers for rows [B, T] than for the same steps alone, [B T, 1].

    obs: [B, T, ...], where the observations of a row differ. Rows of one step, or of equal observations, may not show
    memory; any other answer is remembered for as long as the module lives.

    The module is compared in evaluation mode as it is, and with larger parameters, because a layer that starts at 0
    hides everything before it. Its parameters, its mode and torch's random generators do not change.
    """
    if module in _found:
        return _found[module]
    obs = obs[:ROWS, :STEPS]
    if obs.shape[1] < 2:
        return False
    training = [x for x in module.modules() if x.training]
    module.eval()
    try:
        with torch.random.fork_rng([obs.device] if obs.is_cuda else []):
            module_alone = getattr(module, "_orig_mod", module)  # other shapes would compile it again
            found = _differs(module_alone, obs) or _differs_if_larger(module_alone, obs)
    finally:
        for x in training:
            x.training = True
    if found or bool((obs != obs[:, :1]).any()):
        _found[module] = found
    return found


def _differs(forward: Callable[[Tensor], Any], obs: Tensor) -> bool:
    """Whether rows and single steps differ by more than rounding: by sqrt(eps) of the dtype, relatively."""
    rows, steps = forward(obs), forward(obs.flatten(0, 1).unsqueeze(1))
    if not isinstance(rows, Tensor):  # distributions: compare log pi of the same actions
        action = rows.sample()
        rows, steps = rows.log_prob(action), steps.log_prob(action.flatten(0, 1).unsqueeze(1))
    tolerance = torch.finfo(rows.dtype).eps ** 0.5 * (1 + rows.abs())
    return bool(((rows - steps.view_as(rows)).abs() > tolerance).any())  # False for NaN


def _differs_if_larger(module: nn.Module, obs: Tensor) -> bool:
    """The same with 0 to 0.1 added to every parameter; False where the module cannot be computed that way."""
    larger = {name: x + 0.1 * torch.rand_like(x) for name, x in module.named_parameters() if x.is_floating_point()}
    try:
        return _differs(lambda obs: functional_call(module, larger, (obs,)), obs)
    except (RuntimeError, ValueError):  # compiled by TorchScript, or a distribution refuses its parameters
        return False
