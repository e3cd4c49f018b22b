"""What a module returns beside its first output, read from its code or else from its annotation."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

from torch import nn

CACHE = re.compile("past|cache|present", re.IGNORECASE)


def returned(module: nn.Module) -> tuple[bool, ...] | None:
    """For each part of what `forward` returns behind the first whether it is the cache; None: it returns y alone.
    Where it returns sometimes this and sometimes that, its last `return` counts."""
    forward = type(module).forward
    parts = _by_code(forward)
    if parts is None:  # annotations may be older than the code
        parts = _by_annotation(inspect.signature(forward).return_annotation)
    return tuple(bool(CACHE.search(part)) for part in parts[1:]) if len(parts) > 1 else None


def _by_code(forward: object) -> list[str] | None:
    """The parts of the last `return`; None where the code does not tell."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, ValueError):
        return None  # no source, as of compiled code
    nodes = list(_inside(definition))
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    if not values:
        return None
    value = values[-1]
    if isinstance(value, ast.Name):  # outputs = (y, weights); return outputs
        given = [node.value for node in nodes if isinstance(node, ast.Assign) and _names(node) == [value.id]]
        value = given[-1] if given else value
    return [ast.unparse(part) for part in value.elts] if isinstance(value, ast.Tuple) else None


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """The code of a function in its order, without that of functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _inside(child)


def _by_annotation(said: object) -> list[str]:
    text = said if isinstance(said, str) else str(said)
    inside = re.match(r"(?:typing\.)?[Tt]uple\[(.*)\]$", text.strip())
    if not inside:
        return [text]
    parts, depth = [""], 0
    for letter in inside[1]:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
