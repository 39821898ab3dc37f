"""Whole numbers and lists that a text computes, read and never run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from picotron.errors import PlanError
from picotron.planner.validators import shown

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST = 10_000  # of a list, and of an expression's text


def expression(text: str) -> int | list[int]:
    """The whole number or list that ``[0]*3+[1]*58`` or ``8 * (2 + 1)`` stands for, read and never run.

    Raises PlanError for anything but whole numbers, lists of them, brackets and + - * / %.
    """
    refused = PlanError(f"an expression must have whole numbers, lists and + - * / % only, got {shown(text)}")
    if len(text) > _LONGEST:
        raise refused
    try:
        value: int | list[int] = _computed(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise refused from None
    return value


def _computed(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_computed(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _computed(node.left), _computed(node.right)
        for one, other in ((left, right), (right, left)):
            if isinstance(one, list) and isinstance(other, int) and len(one) * other > _LONGEST:
                raise ValueError
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError
