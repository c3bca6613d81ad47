"""Small worlds in closed form: the ground truth for every estimator. `__init__.pyi` lists the names."""

from policygrad.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
