"""Updates whose numbers are not finite: they stop the run, or are dropped and counted."""

import re
from typing import Any

from torch import Tensor

from policygrad.errors import NonFiniteError, UserError, one_line
from policygrad.rollout import Batch
from policygrad.updates import Metrics, Update


class Guard:
    """Wraps updates: where the objective, its gradient or a probability is NaN or infinite, nothing changes.

    An update does not change parameters or the optimizer's state before it has seen that both are finite. With
    `skip` it is then dropped: it returns no metrics, and `skipped` counts it. Otherwise it raises NonFiniteError, which
    names the first column of the batch that is not finite and has the batch as its `evidence`.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.skip, self.skipped = skip, 0

    def __call__(self, update: Update) -> Update:
        """The update, guarded."""

        def guarded(objective: Any, batch: Batch) -> Metrics:
            try:
                return update(objective, batch)
            except (ValueError, RuntimeError) as error:
                found = as_non_finite(error)
                if found is None:
                    raise
                if not self.skip:
                    blamed = NonFiniteError(f"{_first(batch)}{found}")
                    blamed.evidence = {
                        name: x
                        for name, x in batch._asdict().items()
                        if name not in ("charge", "imitation", "everywhere") or isinstance(x, Tensor)
                    }
                    raise blamed from error
            self.skipped += 1
            return {}

        return guarded


def as_non_finite(error: Exception) -> NonFiniteError | None:
    """The error, if it says that a number is not finite; torch's own are of distributions with a parameter of NaN."""
    if isinstance(error, NonFiniteError):
        return error
    if isinstance(error, UserError) or re.search(r"\bnan\b", str(error), re.IGNORECASE) is None:
        return None
    return NonFiniteError(f"a probability turned NaN ({one_line(error, 80)})")


def _first(batch: Batch) -> str:
    """The first column that is not finite where it counts, in words; empty if all are finite."""
    for name, x in batch._asdict().items():
        if isinstance(x, Tensor) and x.is_floating_point():
            wrong = ~x.isfinite().reshape(*batch.mask.shape, -1).all(-1) & batch.mask
            if count := int(wrong.sum()):
                return f"{name} is not finite in {count:,} of {int(batch.mask.sum()):,} decisions: "
    return ""
