"""Conditions over a config's dotted keys, as ``when:`` and ``constraints:`` of a search space have them.

    adapter.alpha >= adapter.rank and batch_size * max_length <= 16384
    method == 'lora'
    quantization in ['nf4', 'none']

Written as in Python: comparisons and sums over keys, numbers and quoted texts, joined by ``and``, ``or``, ``not`` and
brackets. A condition is parsed, never run.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

EXAMPLE = "write for example adapter.alpha >= adapter.rank"

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}
COMPUTE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
WORDS = {"true": True, "false": False, "null": None}
"""YAML's constants, beside Python's."""


@dataclass(frozen=True)
class Condition:
    """A condition, parsed; ``keys`` are the dotted keys that it looks at, in order, each once."""

    text: str
    tree: ast.expr
    keys: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """From its text. Raises ValueError, with what is wrong of it."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            raise ValueError(f"'{text}' is no condition: {EXAMPLE}") from None
        return cls(text, tree, tuple(dict.fromkeys(_keys(tree, text))))

    def check(self, known: Collection[str]) -> None:
        """Raise ValueError for a key that is not among ``known``, naming the nearest."""
        for key in self.keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise ValueError(f"'{self.text}': no key '{key}'; {hint}A text stands in quotes")

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of ``values``, by dotted key. Raises ValueError where they cannot be compared."""
        try:
            return bool(_value(self.tree, values))
        except (TypeError, ArithmeticError) as error:
            seen = ", ".join(f"{key}={values[key]!r}" for key in self.keys)
            raise ValueError(f"'{self.text}' with {seen}: {error}") from None


def _keys(node: ast.AST, text: str) -> list[str]:
    """The keys below ``node``. Raises ValueError for what a condition may not have."""
    if isinstance(node, ast.Attribute | ast.Name):
        key = _dotted(node, text)
        return [] if key in WORDS else [key]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return []
    allowed = (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.List, ast.Tuple)
    computes = isinstance(node, ast.BinOp) and type(node.op) in COMPUTE
    compares = not isinstance(node, ast.Compare) or all(type(each) in COMPARE for each in node.ops)
    inverts = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert)
    if not (computes or isinstance(node, allowed)) or not compares or inverts:
        raise ValueError(f"'{text}': '{ast.unparse(node)}' is nothing that a condition may have; {EXAMPLE}")
    parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return [key for part in parts for key in _keys(part, text)]


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise ValueError(f"'{text}': '{ast.unparse(node)}' is no dotted key; {EXAMPLE}")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute | ast.Name):
        key = _dotted(node, "")
        return WORDS[key] if key in WORDS else values[key]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, values) for each in node.elts]
    if isinstance(node, ast.BoolOp):
        results = (bool(_value(each, values)) for each in node.values)
        return all(results) if isinstance(node.op, ast.And) else any(results)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, values)
        if isinstance(node.op, ast.Not):
            return not inner
        return -inner if isinstance(node.op, ast.USub) else +inner
    if isinstance(node, ast.BinOp):
        return COMPUTE[type(node.op)](_value(node.left, values), _value(node.right, values))
    assert isinstance(node, ast.Compare)
    left = _value(node.left, values)
    for comparison, right in zip(node.ops, (_value(each, values) for each in node.comparators), strict=True):
        if not COMPARE[type(comparison)](left, right):
            return False
        left = right
    return True
