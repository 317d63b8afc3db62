"""Nested lists of numbers in Python source, found in its syntax tree: the source is never run."""

import ast
import warnings
from dataclasses import dataclass
from typing import Any

from xcalib import _yaml

__all__ = ["Number", "python_tables"]

_WRAPPERS = {
    f"{module}.{name}"
    for module, names in {
        "torch": ("tensor", "as_tensor", "Tensor", "FloatTensor"),
        "np": ("array", "asarray"),
        "numpy": ("array", "asarray"),
    }.items()
    for name in names
}


MAX_CHARS = 2**19  # of source: a table of 128 layers and 128 heads has 0.4 million
MAX_COMMAS = 200_000  # a node of the tree takes a thousand times the bytes of its source


@dataclass(frozen=True)
class Number:
    """What stands where a number should: its value, or its source text where it is none, and its line."""

    value: Any
    line: int


def python_tables(text: str, file: str) -> dict[str | None, Any]:
    """Module-level ``NAME = [[...], ...]`` by name, with a :class:`Number` for every item of the rows.

    ``torch.tensor(...)``, ``np.array(...)`` and their like may stand around the list; their dtype and device are left
    aside. What else the source does is not looked at, but a table that it assigns twice or changes in place is refused.

    Raises:
        ProfileError: not Python source, too long, or such a table.
    """
    if len(text) > MAX_CHARS or text.count(",") > MAX_COMMAS:
        raise _yaml.fault(file, None, f"more than the {MAX_CHARS:,} characters or {MAX_COMMAS:,} commas that are read")
    try:
        with warnings.catch_warnings():  # the source's own faults of style are not ours to report
            warnings.simplefilter("ignore")
            module = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise _yaml.fault(file, line, f"not Python source: {getattr(error, 'msg', error)}") from None
    except (RecursionError, MemoryError):
        raise _yaml.fault(file, None, "not Python source: nested too deep") from None
    tables: dict[str | None, Any] = {}
    for statement in module.body:
        target, value = _assignment(statement)
        rows = None if value is None else _literal_list(value)
        if target is not None and rows is not None and rows.elts and all(_literal_list(row) for row in rows.elts[:1]):
            tables[target] = [_row(row) for row in rows.elts]
    _refuse_changes(module, tables, file)
    return tables


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if isinstance(statement, ast.Assign | ast.AnnAssign) and len(targets) == 1 and isinstance(targets[0], ast.Name):
        return targets[0].id, statement.value
    return None, None


def _literal_list(node: ast.expr) -> ast.List | ast.Tuple | None:
    if isinstance(node, ast.List | ast.Tuple):
        return node
    if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.List | ast.Tuple):
        plain = all(keyword.arg in ("dtype", "device") for keyword in node.keywords)
        return node.args[0] if plain and _dotted(node.func) in _WRAPPERS else None
    return None


def _dotted(node: ast.expr) -> str:
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )


def _row(node: ast.expr) -> Any:
    row = _literal_list(node)
    return _number(node) if row is None else [_number(item) for item in row.elts]


def _number(node: ast.expr) -> Number:
    inner, sign = node, 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner, sign = node.operand, -1 if isinstance(node.op, ast.USub) else 1
    value = inner.value if isinstance(inner, ast.Constant) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(sign * value, node.lineno)
    try:
        return Number(ast.unparse(node), node.lineno)
    except (RecursionError, ValueError):  # ValueError: an integer that Python refuses to print
        return Number("an expression", node.lineno)


def _refuse_changes(module: ast.Module, tables: dict[str | None, Any], file: str) -> None:
    assigned: dict[str, int] = {}
    for node in ast.walk(module):
        changed = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if isinstance(node, ast.Name) and changed and node.id in tables:
            if node.id in assigned:
                raise _yaml.fault(file, node.lineno, f"{node.id} is assigned a second time; leave one assignment")
            assigned[node.id] = node.lineno
        elif isinstance(node, ast.Subscript | ast.Attribute) and changed:
            root: ast.expr = node
            while isinstance(root, ast.Subscript | ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in tables:
                raise _yaml.fault(file, node.lineno, f"{root.id} is changed in place, and nothing here is run")
