"""Which names of a piece of Python are those of its module: what a bundler may rename, and what it must follow."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Use:
    """A name of the module where it is used: the node (for `a.b.c` the whole chain, `attributes` being b, c), the names
    that are local there, and whether it stands in an annotation, which is never evaluated."""

    node: ast.expr | ast.Global
    name: str
    attributes: tuple[str, ...]
    local: frozenset[str]
    annotation: bool


def uses(node: ast.AST) -> Iterator[Use]:
    """Every use of a module's name in a statement of its top level."""
    yield from _visit(node, frozenset(), frozenset(), False)


def _visit(node: ast.AST, local: frozenset[str], inner: frozenset[str], annotation: bool) -> Iterator[Use]:
    """`local`: names of the functions around; `inner`: those of a class body, which its methods do not see."""
    seen = local | inner
    if isinstance(node, ast.Name):
        if node.id not in seen:
            yield Use(node, node.id, (), seen, annotation)
    elif isinstance(node, ast.Attribute):
        chain, root = [node.attr], node.value
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name):
            if root.id not in seen:
                yield Use(node, root.id, tuple(reversed(chain)), seen, annotation)
        else:
            yield from _visit(root, local, inner, annotation)
    elif isinstance(node, ast.Global):
        for name in node.names:
            yield Use(node, name, (), frozenset(), False)
    elif isinstance(node, FUNCTIONS):
        arguments = node.args
        yield from _all(getattr(node, "decorator_list", []), local, inner, annotation)
        yield from _all([d for d in (*arguments.defaults, *arguments.kw_defaults) if d], local, inner, annotation)
        every = _arguments(arguments)
        yield from _all([a.annotation for a in every if a.annotation], local, inner, True)
        if getattr(node, "returns", None):
            yield from _visit(node.returns, local, inner, True)  # type: ignore[union-attr]
        body = node.body if isinstance(node.body, list) else [node.body]
        yield from _all(body, local | {a.arg for a in every} | _bound(body), frozenset(), annotation)
    elif isinstance(node, ast.ClassDef):
        yield from _all([*node.decorator_list, *node.bases, *node.keywords], local, inner, annotation)
        yield from _all(node.body, local, _bound(node.body), annotation)
    elif isinstance(node, COMPREHENSIONS):
        first, *_ = node.generators
        yield from _visit(first.iter, local, inner, annotation)
        targets = frozenset(n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name))
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        parts += [g.iter for g in node.generators[1:]] + [c for g in node.generators for c in g.ifs]
        yield from _all(parts, local | targets, inner, annotation)
    elif isinstance(node, ast.AnnAssign):
        yield from _visit(node.annotation, local, inner, True)
        yield from _all([n for n in (node.target, node.value) if n], local, inner, annotation)
    else:
        yield from _all(list(ast.iter_child_nodes(node)), local, inner, annotation)


def _all(nodes: Sequence[ast.AST], local: frozenset[str], inner: frozenset[str], annotation: bool) -> Iterator[Use]:
    for node in nodes:
        yield from _visit(node, local, inner, annotation)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return every + [a for a in (arguments.vararg, arguments.kwarg) if a]


def _bound(body: Sequence[ast.AST]) -> frozenset[str]:
    """Names that the statements of a scope bind in it."""
    names, outside, todo = set(), set(), list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            outside.update(node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((a.asname or a.name).partition(".")[0] for a in node.names if not _ours(node))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            todo += node.decorator_list
            continue
        elif isinstance(node, ast.Lambda):
            continue
        elif isinstance(node, COMPREHENSIONS):  # its targets are its own, but what := binds is not
            names.update(n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            continue
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        todo += ast.iter_child_nodes(node)
    return frozenset(names - outside)


def _ours(node: ast.Import | ast.ImportFrom) -> bool:
    # such an import is cut out, and the name is one of the file's
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "zoo"
