"""Training by any method on any world. The package is the function too: `policygrad.train(...)` trains."""

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    """The import system puts this package where the function of the same name is looked for, so it is callable."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from policygrad.train.training import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Train
