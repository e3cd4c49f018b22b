"""The bundler: scopes, what is cut, and that the file knows every name in it."""

from __future__ import annotations

import ast
import builtins

import pytest
from exported_models import MODELS

from zoo.export.bundle import bundle
from zoo.export.hf import modelling_file
from zoo.export.names import uses
from zoo.export.source import Source
from zoo.graph.loader import load_graph


def found(code: str) -> list[str]:
    return sorted(".".join((u.name, *u.attributes)) for u in uses(ast.parse(code).body[0]))


@pytest.mark.parametrize(
    "code, names",
    [
        ("def f(x, y=a): return x + y + b", ["a", "b"]),
        ("def f():\n  x = 1\n  return [x for x in x] + [y for y in c]", ["c"]),
        ("def f():\n  def g(): return x\n  x = 1\n  return g", []),
        ("def f():\n  for i, j in p: q(i)\n  with r() as t: t()\n  i.u", ["p", "q", "r"]),
        ("def f():\n  global n\n  n = m", ["m", "n", "n"]),
        ("class C(base):\n  x: int = d\n  def f(self): return x", ["base", "d", "int", "x"]),
        ("def f():\n  if (y := g()) is not None: return y", ["g"]),
        ("def f(a): return a.b.c + d.e.f", ["d.e.f"]),
        ("def f():\n  try: h()\n  except E as e: raise e", ["E", "h"]),
        ("x = [lambda v: v + w for w in z]", ["x", "z"]),
        ("def f():\n  from zoo.row import mean\n  import os\n  return mean(os)", ["mean"]),
    ],
)
def test_uses(code, names):
    assert found(code) == names


def test_annotations_are_known():
    tree = ast.parse("def f(x: A, *y: B) -> C:\n  z: D = E\n  return z").body[0]
    assert {u.name: u.annotation for u in uses(tree)} == {"A": True, "B": True, "C": True, "D": True, "E": False}


def test_work_for_slices_is_left_out():
    source = Source("zoo.kernels.short_conv")
    cut = b"".join(source.text[a:b] for a, b in source.cuts)
    assert (
        b"row.current()" in cut and b"return slices.short_conv" in cut and b"return run(x, state, doc_ids)" not in cut
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_known(name):
    tree = ast.parse(modelling_file(load_graph(MODELS[name])))
    known = {*dir(builtins), "__file__"}
    definitions = []
    for node in tree.body:
        bound = [a.asname or a.name for a in getattr(node, "names", [])]
        bound += [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        definitions += bound
        known.update(bound)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            known.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name)) if target is not None else None
    assert len(definitions) == len({*definitions})
    for node in tree.body:
        assert {u.name for u in uses(node)} <= known, getattr(node, "name", node)


def test_names_of_two_modules_are_told_apart():
    """`linear_attention` is the op and its chunked row: the op keeps the name, and the row takes that of its module."""
    text = bundle("zoo.kernels.linear_attention", {}, "")
    assert "def linear_attention(" in text and "def chunked_linear_attention(" in text
    assert 'ROWS["linear_attention"] = (Row(chunked_linear_attention),)' in text
