"""Modules of the zoo as one Python file that imports none of them.

From its roots every definition that is used is followed; of a class only the methods that somebody could call by their
name. What is kept is cut out of the sources, so comments stay; names that two modules use are told apart by those of
their modules, wherever no local name is in the way.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import keyword
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from zoo.export.names import Use, uses
from zoo.export.source import Key, Source, Unit, row_parts

# rows that need a compiler, a device or a package of their own
FOREIGN = ("native", "onednn", "loop", "triton", "flex", "fla", "mamba_ssm", "flash_attn", "xformers")
CALL = ("zoo.kernels.dispatch", "call")
LOOKED_UP_BY = ("getattr", "hasattr", "methodcaller", "attrgetter")
# what torch calls or reads
HOOKS = {*dir(nn.Module), *dir(torch.autograd.Function)}
WIDTH = 120


def bundle(root: str, blocks: dict[str, tuple[str, str]], header: str) -> str:
    """The text of a file with all of module `root`, and of what it and the classes `blocks` need. `blocks`: name in the
    graph -> module and name of the class."""
    return _Bundler(root, blocks).text(header)


class _Bundler:
    def __init__(self, root: str, blocks: dict[str, tuple[str, str]]):
        self.root, self.blocks = root, blocks
        self.sources: dict[str, Source] = {}
        self.reached: dict[Key, Unit] = {}
        self.kept: set[int] = set()  # ids of statements and methods
        self.followed: list[tuple[Source, Use]] = []
        self.mentioned: set[str] = set(HOOKS)
        self.waiting: list[tuple[Source, str, ast.stmt, list[Use]]] = []
        self.ops: dict[str, list[ast.Call]] = {}
        for name in self.source(root).units:
            self.reach((root, name))
        for module, name in blocks.values():
            self.source(module)
            self.reach((module, name))
        self._methods()
        self.names = self._names()

    # ---------------------------------------------------------------------------------- what is needed
    def source(self, module: str) -> Source:
        """A module, read once."""
        if module not in self.sources:
            self.sources[module] = Source(module)
        return self.sources[module]

    def resolve(self, source: Source, name: str, attributes: tuple[str, ...] = ()) -> tuple[Any, int]:
        """What a name of a module is, and how many attributes lead to it: the key of a definition, or of an import from
        outside (module, name in it, name here), or None."""
        if name in source.units:
            return (source.name, name), 0
        if name in source.external:
            return (*source.external[name], name), 0
        if name not in source.ours:
            return None, 0
        module, attribute = source.ours[name]
        if attribute not in self.source(module).units and _is_module(f"{module}.{attribute}"):
            if not attributes:
                return None, 0
            found, more = self.resolve(self.source(f"{module}.{attribute}"), attributes[0], attributes[1:])
            return found, more + 1
        return self.resolve(self.source(module), attribute or "")

    def reach(self, key: Key) -> None:
        """Keep a definition, and what it uses."""
        if key in self.reached:
            return
        source = self.sources[key[0]]
        unit = source.units[key[1]]
        self.reached |= {(key[0], name): unit for name, other in source.units.items() if other is unit}
        for other in (unit, *source.attached.get(key[1], ())):
            if id(other.node) in self.kept:
                continue
            self.kept.add(id(other.node))
            inside = {id(m) for found in other.methods.values() for m, _ in found}
            for part in ast.iter_child_nodes(other.node) if inside else (other.node,):
                if id(part) not in inside:
                    self._read(source, part)
            for use in other.shell:
                self._follow(source, use)
            for name, found in other.methods.items():
                self.waiting += [(source, name, method, inner) for method, inner in found]

    def _methods(self) -> None:
        """Keep the methods that are called by their names somewhere, until no more are."""
        found = True
        while found:
            wanted = [m for m in self.waiting if m[1] in self.mentioned or _special(m[1]) or m[0].name == self.root]
            self.waiting = [m for m in self.waiting if m not in wanted]
            found = bool(wanted)
            for source, _, method, inner in wanted:
                self.kept.add(id(method))
                self._read(source, method)
                for use in inner:
                    self._follow(source, use)

    def _read(self, source: Source, node: ast.AST) -> None:
        for n in ast.walk(node):
            if isinstance(n, ast.Attribute):
                self.mentioned.add(n.attr)
            elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
                texts = [a.value for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if n.func.id in LOOKED_UP_BY:
                    self.mentioned.update(texts)
                elif texts and self.resolve(source, n.func.id)[0] == CALL:
                    self._op(texts[0])

    def _op(self, op: str) -> None:
        """Keep the rows of an op that run anywhere, down to the first that takes every call."""
        if op in self.ops:
            return
        source = self.source(f"zoo.kernels.{op}")
        self.ops[op] = []
        self.reach((CALL[0], "Row"))
        for call in source.rows:
            parts = dict(row_parts(call))
            if getattr(call.args[1], "value", "") in FOREIGN:
                continue
            self.ops[op].append(call)
            for part in parts.values():
                self._read(source, part)
                for use in uses(part):
                    self._follow(source, use)
            if parts.keys() <= {"fn"}:
                break

    def _follow(self, source: Source, use: Use) -> None:
        self.followed.append((source, use))
        key, _ = self.resolve(source, use.name, use.attributes)
        if key is None or len(key) == 3:
            return
        alias = isinstance(self.sources[key[0]].units[key[1]].node, (ast.Assign, ast.AnnAssign))
        if not use.annotation or alias or key[0] == "zoo.schema":
            self.reach(key)

    # ------------------------------------------------------------------------------------------- names
    def _names(self) -> dict[Key | tuple[str, str | None, str], str]:
        """What everything is called in the file."""
        locals_of: dict[object, set[str]] = {}
        for source, use in self.followed:
            key, _ = self.resolve(source, use.name, use.attributes)
            if key is not None:
                locals_of.setdefault(key, set()).update(use.local)
        taken = {*dir(builtins), *keyword.kwlist, "Any"}
        names: dict = {}

        def give(key: object, wishes: Iterable[str]) -> None:
            free = (w for w in wishes if w not in taken and w not in locals_of.get(key, ()))
            names[key] = next(free)
            taken.add(names[key])

        for key in sorted((k for k in locals_of if len(k) == 3), key=str):  # type: ignore[arg-type]
            if key[2] == "Any":  # type: ignore[index]
                names[key] = "Any"
            else:
                give(key, _wishes((), key[2]))  # type: ignore[index]
        count: dict[str, int] = {}
        for _, name in self.reached:
            count[name] = count.get(name, 0) + 1
        # a package's own name goes to the function that the others call
        order = sorted(self.reached, key=lambda k: (count[k[1]] > 1, not k[0].endswith(f".{k[1]}"), k))
        for key in order:
            give(key, _wishes(tuple(key[0].split(".")[1:]), key[1]))
        return names

    # -------------------------------------------------------------------------------------------- text
    def text(self, header: str) -> str:
        """The whole file."""
        edits: dict[str, list[tuple[int, int, bytes]]] = {}
        any_used = False
        for source, use in self.followed:
            edit = self._edit(source, use)
            if edit is not None:
                edits.setdefault(source.name, []).append(edit)
                any_used |= edit[2] == b"Any"
        parts = [self._module(self.sources[m], edits.get(m, [])) for m in self._order()]
        end = [self._table(op, calls) for op, calls in self.ops.items()]
        if self.blocks:
            blocks = "".join(f'    "{name}": {self.names[key]},\n' for name, key in sorted(self.blocks.items()))
            end.append(f"{self.names[('zoo.registry', 'BLOCKS')]} |= {{\n{blocks}}}\n")
        imports = {k for k in self.names if len(k) == 3}
        if any_used:
            imports.add(("typing", "Any", "Any"))
        return "\n".join([header, "from __future__ import annotations\n", *self._imports(imports), *parts, "", *end])

    def _edit(self, source: Source, use: Use) -> tuple[int, int, bytes] | None:
        key, depth = self.resolve(source, use.name, use.attributes)
        if key is None:
            return None
        start, end = source.span(use.node)
        if key not in self.names:
            return (start, end, b"Any") if use.annotation else None
        name = self.names[key]
        old = ".".join((use.name, *use.attributes[:depth]))
        if old == name:
            return None
        if isinstance(use.node, ast.Global):
            line = source.text[start:end].decode()
            return start, end, re.sub(rf"\b{use.name}\b", name, line).encode()
        if source.text[start : start + len(old)] != old.encode():
            raise AssertionError(f"{source.name}:{use.node.lineno}: {old} does not stand where it should")
        return start, start + len(old), name.encode()

    def _module(self, source: Source, edits: list[tuple[int, int, bytes]]) -> str:
        """The kept statements of a module."""
        every = [*edits, *((a, b, b"") for a, b in source.cuts)]
        for key, unit in self.reached.items():
            if key[0] != source.name:
                continue
            node = unit.node
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and self.names[key] != key[1]:
                start = source.span(node)[0]
                at = source.text.index(key[1].encode(), source.text.index(b" ", start))
                every.append((at, at + len(key[1]), self.names[key].encode()))
            for found in unit.methods.values():
                every += [(*source.whole_lines(m), b"") for m, _ in found if id(m) not in self.kept]
        pieces, values = [], True
        for node in source.tree.body:
            if id(node) in self.kept:
                a, b = source.whole_lines(node)
                piece = _edited(source.text, a, b, [e for e in every if a <= e[0] and e[1] <= b])
                value = isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr))
                first = "\n" if not pieces else ""
                pieces.append((first if values and value else "\n\n") + _tidy(piece))
                values = value
        doc = ast.get_docstring(source.tree)
        title = f"# {'-' * (WIDTH - 4 - len(source.name))} {source.name.removeprefix('zoo.')}\n"
        lines = (part for line in (doc or "").splitlines() for part in textwrap.wrap(line, WIDTH - 2) or [""])
        told = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return "\n" + title + told + "".join(pieces)

    def _order(self) -> list[str]:
        """Modules with something kept, each behind those that it imports."""
        done: list[str] = []

        def visit(module: str) -> None:
            if module in seen or not _is_module(module):
                return
            seen.add(module)
            for other in self.source(module).imports:
                visit(other)
            done.append(module)

        seen: set[str] = set()
        for module in sorted({key[0] for key in self.reached} - {self.root}):
            visit(module)
        visit(self.root)
        kept = {key[0] for key in self.reached}
        return [m for m in done if m in kept]

    def _table(self, op: str, calls: list[ast.Call]) -> str:
        source = self.source(f"zoo.kernels.{op}")
        row, rows = self.names[("zoo.kernels.dispatch", "Row")], self.names[("zoo.kernels.dispatch", "ROWS")]
        made = []
        for call in calls:
            parts = []
            for name, node in row_parts(call):
                a, b = source.span(node)
                edits = [e for use in uses(node) if (e := self._edit(source, use))]
                parts.append(f"{name}=" * (name != "fn") + _edited(source.text, a, b, edits).decode())
            made.append(f"{row}({', '.join(parts)})")
        line = f'{rows}["{op}"] = ({", ".join(made)}{"," * (len(made) == 1)})\n'
        return line if len(line) <= WIDTH else f'{rows}["{op}"] = (\n' + "".join(f"    {m},\n" for m in made) + ")\n"

    def _imports(self, imports: set) -> Iterator[str]:
        plain = []
        groups: dict[str, list[str]] = {}
        for key in sorted(imports, key=str):
            module, attribute, _ = key
            name = self.names.get(key, "Any")
            if attribute is None:
                plain.append(f"import {module}" + (f" as {name}" if name != module.partition(".")[0] else ""))
            else:
                groups.setdefault(module, []).append(attribute + (f" as {name}" if name != attribute else ""))
        yield "\n".join(plain)
        for module, found in sorted(groups.items()):
            line = f"from {module} import {', '.join(found)}"
            yield line if len(line) <= WIDTH else f"from {module} import (\n    " + ",\n    ".join(found) + ",\n)"
        yield ""


def _special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _wishes(module: tuple[str, ...], name: str) -> Iterator[str]:
    """Names that a definition would like to have, the best first."""
    yield name
    lead, bare = ("_", name.lstrip("_")) if name.startswith("_") else ("", name)
    for n in range(1, len(module) + 1):
        before = "_".join(module[-n:])
        if bare[:1].isupper():
            yield lead + (before.upper() + "_" if bare.isupper() else before.title().replace("_", "")) + bare
        else:
            yield f"{lead}{before}_{bare}"
    for number in range(2, 1000):
        yield f"{name}_{number}"


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _edited(text: bytes, start: int, end: int, edits: Iterable[tuple[int, int, bytes]]) -> bytes:
    """text[start:end] with pieces replaced; a piece inside one that is cut goes with it."""
    made, at = [], start
    for a, b, new in sorted(set(edits), key=lambda e: (e[0], -e[1])):
        if a < at:
            continue
        made += [text[at:a], new]
        at = b
    return b"".join([*made, text[at:end]])


def _tidy(piece: bytes) -> str:
    """A statement without headings of parts that may be gone, and with no more than one blank line inside."""
    text = re.sub(r"^\s*# -{8,}.*\n", "", piece.decode(), flags=re.M)
    text = re.sub(r"\n[ \t]*\n(\s*\n)+", "\n\n", text.strip("\n"))
    return text.replace('"zoo::', '"zoo_export::') + "\n"
