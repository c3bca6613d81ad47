"""Whether two formulas are equal, by math-verify: a program that reads [gold, answer] and writes true, false or null.

mathematics.py runs this file in a child process. It imports nothing of the package, so it starts fast.
"""

import json
import sys
from typing import Any

from math_verify import parse, verify
from sympy import Add, Basic, Function, Integer, Mul, Pow, preorder_traversal
from sympy.functions.elementary.exponential import ExpBase, exp, log
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.functions.elementary.trigonometric import InverseTrigonometricFunction, TrigonometricFunction
from sympy.matrices.matrixbase import MatrixBase

FAMILIES = {
    (exp, log, ExpBase): "exponential",
    (TrigonometricFunction, HyperbolicFunction): "trigonometric",
    InverseTrigonometricFunction: "inverse trigonometric",
}
UNEVALUATED = ("Integral", "Sum", "Product", "Derivative", "Limit", "Subs")


def kinds(expression: Any) -> set[str]:
    """What an expression is made of beyond sums and products of its symbols, as it is written.

    Arithmetic that could be carried out (7 + 5), roots, quotients of symbols, functions by their family, and what is
    left unevaluated, such as an integral.
    """
    if isinstance(expression, MatrixBase):
        return set().union(*map(kinds, expression))
    if not isinstance(expression, Basic):
        return set()
    return {kind for node in preorder_traversal(expression) if (kind := _kind(node))}


def equal(gold: str, answer: str) -> bool | None:
    """Whether an answer is equal to the gold and of no more kinds; None if the gold is no formula."""
    wanted, found = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    if not wanted:
        return None
    if not found or not verify(wanted, found, timeout_seconds=None):
        return False
    return kinds(found[0]) <= kinds(wanted[0])


def _kind(node: Any) -> str | None:
    if isinstance(node, Add | Mul):
        constants = [x for x in node.args if not x.free_symbols and x.is_rational]
        if isinstance(node, Mul):  # a fraction is no arithmetic, unless it is a whole number; nor is a sign
            under = [x for x in constants if isinstance(x, Pow) and x.exp == -1]
            whole = len(constants) == len(node.args) and bool(under) and node.doit().is_Integer
            constants = [x for x in constants if x not in (1, -1) and x not in under[:1]] + [node] * 2 * whole
        return "arithmetic" if len(constants) > 1 else None
    if isinstance(node, Pow):
        if node.exp.free_symbols:
            return "exponential"
        if not isinstance(node.exp, Integer):
            return "root"
        if not node.base.free_symbols:
            return "arithmetic" if node.exp != -1 and node.base.is_rational else None
        return "quotient" if node.exp.is_negative else None
    family = next((name for family, name in FAMILIES.items() if isinstance(node, family)), None)
    if family or isinstance(node, Function) or type(node).__name__ in UNEVALUATED:
        return family or type(node).__name__
    return None


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), flush=True)
