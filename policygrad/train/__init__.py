"""Training by any method on any world. The package is callable: `policygrad.train(...)` trains."""

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    """A callable module: importing the package binds it to the name of the function `policygrad.train`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from policygrad.train.training import train

        return train(*arguments, **options)

    @property
    def __signature__(self) -> Signature:
        """That of the function, for help() and notebooks."""
        from policygrad.train.training import train

        return signature(train)


sys.modules[__name__].__class__ = _Train
