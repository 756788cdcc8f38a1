"""The rules of ``data filter``: a reason, and the condition on a document's findings under which it goes.

    remove:
      duplicate: not keep
      too short: words < 12
      not English: language not in [en, und] and characters > 200
      repetitive: top_2gram > 0.2 or "repeated_10gram" in gopher_repetition

A condition is written as in Python: findings are compared with values, joined by ``and``, ``or``, ``not`` and brackets;
a text in a finding is sought by ``in``. It is parsed, never run. A finding that was not made breaks no rule.
"""

import ast
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}


@dataclass(frozen=True)
class Rule:
    """A reason and its condition, parsed."""

    reason: str
    condition: ast.expr

    @classmethod
    def parse(cls, reason: str, condition: str) -> "Rule":
        """From its text. Raises ValueError, with what is wrong of it."""
        try:
            tree = ast.parse(condition.strip(), mode="eval").body
        except SyntaxError:
            raise ValueError(f"'{condition}' is no condition: write for example words < 12") from None
        _check_form(tree, condition)
        return cls(reason, tree)

    @functools.cached_property
    def findings(self) -> list[str]:
        """The columns that it looks at, in order, each once."""
        return list(dict.fromkeys(_columns(self.condition)))

    def check(self, columns: Sequence[str]) -> None:
        """Raise ValueError if a finding is not among ``columns``."""
        for name in self.findings:
            if name not in columns:
                near = difflib.get_close_matches(name, columns, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(columns)}"
                raise ValueError(f"{self.reason}: no finding '{name}'; {hint}")

    def holds(self, table: "pa.Table") -> Any:
        """One truth value a row. Raises ValueError where a finding cannot be compared with the value."""
        import pyarrow.compute as pc

        return pc.fill_null(_evaluate(self.condition, table), False)

    def seen(self, row: Mapping[str, Any]) -> str:
        """What the findings of a row are that it looks at."""
        return ", ".join(f"{name}={_shown(row[name])}" for name in self.findings)


def _check_form(node: ast.expr, condition: str) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_form(value, condition)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_form(node.operand, condition)
    elif isinstance(node, ast.Compare):
        if len(node.ops) > 1:
            raise ValueError(f"'{condition}': compare one by one, joined by 'and'")
        left, right = node.left, node.comparators[0]
        within = isinstance(node.ops[0], ast.In | ast.NotIn)
        if within and not isinstance(left, ast.Name) and isinstance(right, ast.Name):
            if not isinstance(_value(left, condition), str):
                raise ValueError(f"'{condition}': what is sought in a finding is a text, in quotes")
        elif not isinstance(left, ast.Name):
            raise ValueError(f"'{condition}': write the finding first, for example words < 12")
        elif within != isinstance(right, ast.List | ast.Tuple):
            raise ValueError(f"'{condition}': write a list after 'in', and one value after the others")
        else:
            for value in right.elts if isinstance(right, ast.List | ast.Tuple) else [right]:
                _value(value, condition)
            if not within and type(node.ops[0]) not in COMPARE:
                raise ValueError(f"'{condition}': compare by < <= > >= == != in, not in")
    elif not isinstance(node, ast.Name):
        raise ValueError(f"'{condition}' is no condition: write for example words < 12")


def _value(node: ast.expr, condition: str) -> str | bool | int | float:
    """A constant, or a word without quotes."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        value = None
    if not isinstance(value, str | int | float):  # a truth value is an int
        raise ValueError(f"'{condition}': '{ast.unparse(node)}' is neither number nor text")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"'{condition}': {value} is larger than any finding")
    return value


def _columns(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BoolOp):
        return [name for value in node.values for name in _columns(value)]
    if isinstance(node, ast.UnaryOp):
        return _columns(node.operand)
    if isinstance(node, ast.Compare):
        return _columns(node.left if isinstance(node.left, ast.Name) else node.comparators[0])
    assert isinstance(node, ast.Name)
    return [node.id]


def _evaluate(node: ast.expr, table: "pa.Table") -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(node, ast.BoolOp):
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        return functools.reduce(join, (_evaluate(value, table) for value in node.values))
    if isinstance(node, ast.UnaryOp):
        return pc.invert(_evaluate(node.operand, table))
    [name] = _columns(node)
    values = table[name]
    try:
        return _compare(node, values) if isinstance(node, ast.Compare) else pc.equal(values, pa.scalar(True))
    except (pa.ArrowException, TypeError) as error:
        text = ast.unparse(node)
        raise ValueError(f"'{text}': {name} is {values.type}: {str(error).splitlines()[0]}") from None


def _compare(node: ast.Compare, values: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    operation, right = node.ops[0], node.comparators[0]
    if not isinstance(operation, ast.In | ast.NotIn):
        return getattr(pc, COMPARE[type(operation)])(values, pa.scalar(_value(right, "")))
    if isinstance(right, ast.List | ast.Tuple):
        listed = [_value(each, "") for each in right.elts]
        found = pc.is_in(values, pa.array(listed) if listed else pa.array([], values.type))
    else:
        found = pc.match_substring(values, str(_value(node.left, "")))
    return pc.invert(found) if isinstance(operation, ast.NotIn) else found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
