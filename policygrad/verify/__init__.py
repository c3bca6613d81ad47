"""Every estimator and update held against the exact gradient of small worlds: is it right, and how noisy is it?

A row of a table is a credit, an objective and weights of the library, exactly as a method is made of them. What it
estimates on a batch of rows is the gradient of

    objective(decisions(rows, weights(mask), *credit(rows)))

in the policy's parameters. What it should expect comes from `policygrad.exact`, or is written out in `written_out.py`;
neither shares a line with what is under test. Every line of the table of methods has its rows.
`__init__.pyi` lists the names.
"""

from policygrad.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
