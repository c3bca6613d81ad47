"""policygrad: the policy-gradient family of reinforcement learning in one PyTorch library.

`__init__.pyi` lists the public names. Each is imported at first use, so `import policygrad` is instant.
"""

import sys

# `python -m policygrad` puts the working directory first on the path, where its files would hide installed modules.
if sys.argv[:1] == ["-m"] and "policygrad" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]

from functools import partial
from typing import Any

from policygrad.lazy import attach

__version__ = "0.1.0"

_imported, __dir__, __all__ = attach(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A public name, or a method that is only a line in the table of methods: `assemble` builds it."""
    try:
        return _imported(name)
    except AttributeError:
        from policygrad.train.methods import METHODS

        if name not in METHODS:
            raise
    return partial(_imported("assemble"), name)
