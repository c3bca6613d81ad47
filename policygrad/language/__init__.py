"""Hugging Face causal language models as policies: the model, generation, rewards, data, and the sampler.

`__init__.pyi` lists the names. Each is imported at first use.
"""

from policygrad.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
