"""A model as a traced program: `torch.export`, and ONNX made of it. The forward of whole rows, without a state.

Ops run by rows made of torch's own operations, so the program needs nothing of the zoo.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.architectures.causal_lm import CausalLM
from zoo.errors import ConfigError, ZooError
from zoo.export.bundle import FOREIGN
from zoo.kernels import dispatch, pieces
from zoo.kernels.attention import chunked
from zoo.kernels.attention.mask import Tile
from zoo.kernels.linear import Linear
from zoo.train.files import new_file

ROWS = 2  # of the traced tokens
TOLERANCE = 1e-4
MOST = 50_000  # operations of a program; each takes a millisecond or more to trace
NAMES = {"torch": "model.pt2", "onnx": "model.onnx"}


@dataclass(frozen=True)
class Traced:
    """A program tokens [B, T] -> logits [B, T, V]; `dynamic` are the sizes that may be others when it runs."""

    program: torch.export.ExportedProgram
    dynamic: tuple[str, ...]


class _Forward(nn.Module):
    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


class _Operations(TorchDispatchMode):
    """What runs inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def trace(model: CausalLM, length: int) -> Traced:
    """The program of a model, with as many sizes left open as torch can; where that of a row cannot, it is `length`.
    ConfigError names the block that cannot be traced."""
    forward = _Forward(model.eval())
    tokens = _tokens(model, ROWS, length)
    error: Exception | None = None
    with portable_rows(), torch.no_grad(), _quiet():
        open_sizes = _open(model, length)
        for dynamic in dict.fromkeys((open_sizes, open_sizes[:1], ())):
            try:
                program = torch.export.export(forward, (tokens,), dynamic_shapes=_shapes(dynamic), strict=False)
                _check(program, model, dynamic, length)
                return Traced(program, dynamic)
            except ConfigError:
                raise
            except GuardOnDataDependentSymNode as failure:  # at any size
                error = failure
                break
            except Exception as failure:  # torch raises what its tracer met
                error = error or failure
        raise ConfigError(_refusal(model, length, error))


def export_torch(model: CausalLM, directory: Path, length: int) -> tuple[str, tuple[str, ...]]:
    """Write model.pt2; its name, and the sizes that are open."""
    traced = trace(model, length)
    with new_file(directory / NAMES["torch"]) as path:
        torch.export.save(traced.program, path)
    return NAMES["torch"], traced.dynamic


def export_onnx(model: CausalLM, directory: Path, length: int) -> tuple[str, tuple[str, ...]]:
    """Write model.onnx; its name, and the sizes that are open. ZooError where torch.onnx cannot run here."""
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        raise ZooError(f"torch.onnx needs {' and '.join(absent)}, not installed here: pip install 'block-zoo[onnx]'")
    traced = trace(model, length)
    try:
        with _quiet(), warnings.catch_warnings(action="ignore"):
            made = torch.onnx.export(traced.program, dynamo=True, verbose=False)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{model.config.get('name', 'the model')} cannot be written as ONNX: {first}") from error
    assert made is not None
    with new_file(directory / NAMES["onnx"]) as path:
        made.save(path, external_data=False)
    return NAMES["onnx"], traced.dynamic


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A tracer that fails prints all that it has so far, pages of it; others tell of their progress."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def portable_rows() -> Iterator[None]:
    """Within, every op runs by its best row that is plain torch, and takes sizes as they come: attention in one piece,
    which it is cut into for speed, and linear layers without asking how large they are."""
    choice = {}
    for op in dispatch.ops():
        # rows that take some calls only have one behind them that takes all
        names = [r.backend for r in dispatch.rows(op) if r.backend not in FOREIGN and r.refuse is None]
        choice[op] = names[0]
    whole = mock.patch.object(chunked, "tiles", _one_tile), mock.patch.object(pieces, "cut", _one_piece)
    with dispatch.use(**choice), whole[0], whole[1], mock.patch.object(Linear, "forward", nn.Linear.forward):
        yield


def _one_tile(num_queries: int, num_keys: int, *rest: Any, **how: Any) -> list[Tile]:
    return [Tile(0, num_queries, 0, 0, num_keys)]


def _one_piece(count: int, elements: int, at_once: int) -> list[slice]:
    return [slice(0, count)]


def _open(model: CausalLM, length: int) -> tuple[str, ...]:
    """Sizes that may stay open: with others the same operations run. A recurrence loops over the chunks of a row, which
    a tracer would only find out after minutes of algebra. ConfigError where it would have too much to trace."""
    runs = [_operations(model, ROWS, length), _operations(model, ROWS + 1, length)]
    if len(runs[0]) > MOST:
        name = model.config.get("name", "the model")
        raise ConfigError(
            f"{name} runs {len(runs[0]):,} operations for rows of {length}, more than {MOST:,}: too many to trace"
        )
    runs.append(_operations(model, ROWS, _other(length)))
    return tuple(size for size, run in zip(("batch", "length"), runs[1:], strict=True) if run == runs[0])


def _operations(model: CausalLM, rows: int, length: int) -> list[Any]:
    with _Operations() as operations:
        model(_tokens(model, rows, length))
    return operations.found


def _other(length: int) -> int:
    """Another length: more chunks, whatever their size, the last of them not full."""
    return max(2 * length, 1024) + 13


def _tokens(model: CausalLM, rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).reshape(rows, length) % model.vocab_size


def _shapes(dynamic: tuple[str, ...]) -> dict[str, dict[int, Any]] | None:
    sizes = {"batch": 0, "length": 1}
    return {"tokens": {sizes[name]: torch.export.Dim.DYNAMIC for name in dynamic}} if dynamic else None


def _check(program: torch.export.ExportedProgram, model: CausalLM, dynamic: tuple[str, ...], length: int) -> None:
    """Raise where the program calls an operator of the zoo, or computes something else for other sizes."""
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("zoo."):
            raise ConfigError(
                f"{_site(node, model)} cannot be traced: its program would call {node.target}, which is ours"
            )
    tokens = _tokens(model, ROWS + ("batch" in dynamic), _other(length) if "length" in dynamic else length).flip(1)
    got, want = program.module()(tokens), model(tokens)
    if got.shape != want.shape or not (got - want).abs().max() <= TOLERANCE * want.abs().max():
        raise ValueError("the traced program computes something else at another size")


def _site(node: Any, model: CausalLM) -> str:
    """The block that a node of a program comes from."""
    for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
        module = model.get_submodule(path.removeprefix("model").removeprefix("."))
        if hasattr(module, "zoo_registration"):
            return module.zoo_registration.name  # type: ignore[union-attr]
    return "the model"


def _refusal(model: CausalLM, length: int, error: Exception | None) -> str:
    """Which blocks cannot be traced, each for itself where it takes the stream as it is."""
    x = torch.randn(ROWS, length, model.dim, dtype=model.tok_embeddings.weight.dtype)
    failed: dict[str, str] = {}
    for name, module in _blocks(model):
        inside = {m.zoo_registration.name for m in module.modules() if hasattr(m, "zoo_registration")}  # type: ignore[union-attr]
        if not inside & failed.keys() and (why := _untraceable(module, x)):
            failed[name] = why
    if not failed:
        failed = {"the graph": _first_line(error)}
    return "torch.export cannot trace " + "; ".join(f"{name}: {why}" for name, why in failed.items())


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks first, so that a combinator is named only where what it combines can be traced."""
    found = [(m.zoo_registration, m) for m in model.modules() if hasattr(m, "zoo_registration")]
    for combinators in (False, True):
        for registration, module in found:
            mixing = registration.kind in ("mixer", "ffn", "memory")  # type: ignore[union-attr]
            if (mixing and not combinators) or (combinators and registration.kind == "combinator"):  # type: ignore[union-attr]
                yield registration.name, module  # type: ignore[union-attr]


def _untraceable(module: nn.Module, x: Tensor) -> str | None:
    width = getattr(module, "dim", x.shape[-1])
    if width != x.shape[-1]:
        x = x[..., :1].expand(*x.shape[:-1], width)
    try:
        module(x)
    except Exception:  # it is not alone in its layer, which says more
        return None
    try:
        torch.export.export(module, (x,), strict=False)
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception | None) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):
        return "what it runs depends on what the tokens are"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
