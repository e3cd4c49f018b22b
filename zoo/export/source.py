"""One module of the zoo as a bundler sees it: its statements, where its names come from, and what can be cut."""

from __future__ import annotations

import ast
import bisect
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.export.names import Use, uses

# modules of the zoo that an exported file has something shorter for
STAND_INS = {
    f"zoo.{name}": f"zoo.export.portable.{name.rpartition('.')[2]}"
    for name in (
        "registry",
        "segments",
        "kernels.dispatch",
        "kernels.linear",
        "kernels.native",
        "kernels.grouped_mm.external",
        "kernels.grouped_mm.tokens",
    )
}
REGISTRATIONS = ("register", "register_flop_formula")  # decorators that tell the zoo, or a counter, of a definition
Key = tuple[str, str]  # module, name


@dataclass
class Unit:
    """A statement of the top level with its uses; of a class, those of each method for itself, and of each attribute
    of a class that is no dataclass or the like."""

    node: ast.stmt
    shell: list[Use] = field(default_factory=list)
    methods: dict[str, list[tuple[ast.stmt, list[Use]]]] = field(default_factory=dict)


class Source:
    """The module `name`, read from its file (or from that of its stand-in)."""

    def __init__(self, name: str):
        self.name = name
        spec = importlib.util.find_spec(STAND_INS.get(name, name))
        assert spec is not None and spec.origin is not None, name
        self.text = Path(spec.origin).read_bytes()
        self.tree = ast.parse(self.text)
        self.starts = [0, *(i + 1 for i, byte in enumerate(self.text) if byte == 10)]
        self.lines = self.text.split(b"\n")
        self.units: dict[str, Unit] = {}
        self.attached: dict[str, list[Unit]] = {}  # statements that only do something with a definition
        self.external: dict[str, tuple[str, str | None]] = {}  # local name -> module, name in it
        self.ours: dict[str, tuple[str, str | None]] = {}
        self.rows: list[ast.Call] = []
        self.cuts: list[tuple[int, int]] = []  # bytes that are left out wherever they stand
        self._cut_slices()
        for node in self.tree.body:
            self._statement(node)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and _of_zoo(node.module) and node not in self.tree.body:
                self._import(node)
                self.cuts.append(self.whole_lines(node))

    # ------------------------------------------------------------------------------------- positions
    def at(self, line: int, column: int) -> int:
        """Offset in bytes of a place."""
        return self.starts[line - 1] + column

    def span(self, node: Any) -> tuple[int, int]:
        """Where a node stands, in bytes."""
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def first_line(self, node: Any) -> int:
        """Line where a statement begins, its decorators and the comment right above it included."""
        line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while line > 1 and self.lines[line - 2].strip().startswith(b"#"):
            line -= 1
        return line

    def whole_lines(self, node: Any) -> tuple[int, int]:
        """The lines of a statement, in bytes."""
        last = node.end_lineno
        return self.starts[self.first_line(node) - 1], self.starts[last] if last < len(self.starts) else len(self.text)

    def line_of(self, offset: int) -> int:
        """Number of the line at an offset."""
        return bisect.bisect_right(self.starts, offset)

    # ------------------------------------------------------------------------------------ statements
    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._import(node)
        elif isinstance(node, ast.If):  # `if TYPE_CHECKING`: names of annotations
            for inner in node.body:
                self._statement(inner)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                if _called(decorator) in REGISTRATIONS:
                    self.cuts.append(self._decorator_lines(decorator))
            to = next((_root(d) for d in node.decorator_list if _root(d) in self.units), None)
            if to is not None:
                self.attached.setdefault(to, []).append(self._unit(node))
            elif not any(_called(d) == "register_flop_formula" for d in node.decorator_list):
                self.units[node.name] = self._unit(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            unit = self._unit(node)
            for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                if name != "__all__":
                    self.units[name] = unit
        elif isinstance(node, ast.AugAssign):
            self.attached.setdefault(_root(node.target) or "", []).append(self._unit(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if _called(node.value) == "register_row":
                self.rows.append(node.value)
            elif _root(node.value) in self.units:
                self.attached.setdefault(_root(node.value) or "", []).append(self._unit(node))

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                name = alias.asname or alias.name.partition(".")[0]
                self.external[name] = (alias.name, None)
            elif _of_zoo(node.module):
                self.ours[alias.asname or alias.name] = (node.module or "", alias.name)
            elif node.module != "__future__":
                self.external[alias.asname or alias.name] = (node.module or "", alias.name)

    def _unit(self, node: ast.stmt) -> Unit:
        unit = Unit(node)
        methods = {}
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                name = _member(
                    item, fields=bool(node.decorator_list) or any(_root(b) == "NamedTuple" for b in node.bases)
                )
                if name is not None:
                    found: list[Use] = []
                    unit.methods.setdefault(name, []).append((item, found))
                    methods[self.whole_lines(item)] = found
        kept = node
        decorators = [d for d in getattr(node, "decorator_list", []) if _called(d) not in REGISTRATIONS]
        if hasattr(node, "decorator_list"):
            node.decorator_list = decorators  # type: ignore[attr-defined]
        for use in uses(kept):
            start = self.span(use.node)[0]
            inside = next((found for (a, b), found in methods.items() if a <= start < b), unit.shell)
            inside.append(use)
        return unit

    def _decorator_lines(self, node: ast.expr) -> tuple[int, int]:
        return self.starts[node.lineno - 1], self.starts[node.end_lineno or node.lineno]

    def _cut_slices(self) -> None:
        """Leave out what is done for a slice of a row: `if (part := current()) is not None: ...`."""
        for function in ast.walk(self.tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in list(function.body):
                name = _asks_for_slice(node)
                if name is None:
                    continue
                own = sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
                if own == sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(function)):
                    function.body.remove(node)
                    self.cuts.append(self.whole_lines(node))

    @functools.cached_property
    def imports(self) -> list[str]:
        """Modules of the zoo that it imports at its top level, in order."""
        found = []
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and _of_zoo(node.module):
                found += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        return found


def _asks_for_slice(node: ast.stmt) -> str | None:
    """The name that `if (name := current()) is not None` binds, where that is all of a statement without else."""
    if not isinstance(node, ast.If) or node.orelse:
        return None
    test = node.test.values[0] if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else node.test
    if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)):
        return None
    left = test.left
    if isinstance(left, ast.NamedExpr) and _called(left.value) == "current":
        return left.target.id
    return None


def _member(item: ast.stmt, fields: bool) -> str | None:
    """The name of a method; that of an attribute where these are not the fields of the class."""
    if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return item.name
    if fields or not isinstance(item, (ast.Assign, ast.AnnAssign)):
        return None
    target = item.targets[0] if isinstance(item, ast.Assign) else item.target
    return target.id if isinstance(target, ast.Name) else None


def _called(node: ast.expr) -> str:
    """The last name of what is called."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", "") or getattr(function, "attr", "")


def _root(node: ast.expr) -> str | None:
    """The first name of `a.b(...)`."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _of_zoo(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "zoo"


def row_parts(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """What `register_row(op, backend, fn, ...)` says that a portable row keeps."""
    yield "fn", call.args[2]
    yield from ((k.arg, k.value) for k in call.keywords if k.arg in ("devices", "dtypes", "refuse"))
