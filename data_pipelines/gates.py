"""Gates of an audit: ``fail_on: [leakage>0, duplicates>0.05]`` ends the command with exit code 1 where one holds."""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

GATE = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|==|!=|>|<)\s*([0-9.eE+-]+)\s*")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Gate:
    """A figure of the audit and the bound from which on it is not passed."""

    name: str
    relation: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """From ``NAME>NUMBER``. Raises ValueError for anything else."""
        match = GATE.fullmatch(text)
        try:
            if match:
                return cls(match[1], match[2], float(match[3]))
        except ValueError:
            pass
        raise ValueError(
            f"'{text}' is no gate: write NAME>NUMBER, such as leakage>0, in quotes (the shell takes > for itself)"
        )

    def crossed(self, figures: Mapping[str, float]) -> str:
        """What was seen, where the gate is not passed; else empty."""
        seen = figures[self.name]
        return f"{self.name} is {seen:.6g} ({self})" if OPERATORS[self.relation](seen, self.bound) else ""

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.bound:g}"


def check_gates(gates: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if a gate is not written as one, or its name is not ``known``."""
    for text in gates:
        name = Gate.parse(text).name
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"'{text}': no figure '{name}'; {hint}")


def crossed(gates: Sequence[str], figures: Mapping[str, float]) -> list[str]:
    """What was seen at each gate that is not passed."""
    return [seen for seen in (Gate.parse(gate).crossed(figures) for gate in gates) if seen]
