"""Phases of a vision model: runs of layers whose outputs resemble each other, and the recurrent student made of them.

Block-recurrent dynamics in vision transformers (Raptor), arXiv:2512.19941.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from zoo.architectures.vision import VisionModel
from zoo.errors import ConfigError, Problem, ZooError
from zoo.graph.spec import Graph, Spec
from zoo.train.evaluate import evaluating
from zoo.train.files import new_file
from zoo.train.loader import Rows, batch

Method = Literal["dp", "maxcut"]
Groups = list[list[int]]  # layers of each phase, counted from 1, in order
MOST_LAYERS_CUT = 24  # max-cut tries all 2^(L - 1) parts
_TRIED_AT_ONCE = 1 << 15
LAYER_SCALE, WEIGHT_DECAY = 1e-5, 1e-4  # of the student, as published


# --------------------------------------------------------------------------------------------- measure
def layer_distances(
    model: VisionModel, rows: Rows, count: int, size: int, advance: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """[L, L]: mean over `count` images of 1 - cos(z_i, z_j), z_l = (class token, mean over patches) after layer l."""
    total: Any = 0.0
    with evaluating(model):
        for first in range(0, count, size):
            images = batch(rows, first, min(size, count - first)).inputs
            z = torch.stack([summary(model, x) for x in model.trajectory(images)[1:]]).double()
            z = torch.nn.functional.normalize(z, dim=-1)
            total = total + torch.einsum("ibd,jbd->ij", z, z)
            advance(min(first + size, count))
    return np.asarray(1 - total / count)


def summary(model: VisionModel, x: Tensor) -> Tensor:
    """z [B, 2 D] of a stream [B, T, D]: the class token beside the mean over the patches; no registers."""
    return torch.cat([x[:, 0], x[:, model.options.num_prefix :].mean(1)], -1)


# ---------------------------------------------------------------------------------------------- phases
def find_phases(
    distances: np.ndarray, *, method: Method = "dp", count: int | None = None, eps: float = 0.1, least: int = 2
) -> Groups:
    """Layers grouped into phases of at least `least` layers, so that distances inside are small.

    dp: contiguous phases of the smallest sum of distances inside, by dynamic programming. maxcut: a group is cut where
    the sum across is largest, the best cut first; phases need not be contiguous. Where `count` is None, the next cut
    must keep apart more than `eps` of the sum of all distances. ConfigError where `count` phases do not fit.
    """
    layers = len(distances)
    if count is not None and count * least > layers:
        raise ConfigError(f"{count} phases of at least {least} layers do not fit into {layers} layers")
    threshold = eps * np.triu(distances, 1).sum()
    if method == "maxcut":
        return _max_cut(distances, count, threshold, least)
    best = contiguous(distances, least)
    if count is None:
        count = 1
        while count + 1 in best and best[count][0] - best[count + 1][0] > threshold:
            count += 1
    return best[count][1]


def contiguous(distances: np.ndarray, least: int = 1) -> dict[int, tuple[float, Groups]]:
    """For every number k of phases that fits: the smallest sum of distances inside contiguous phases, and the phases.

    best[k][j] = min_i best[k - 1][i - 1] + C[i, j], C[i, j] = sum of the distances between the layers i .. j.
    """
    layers = len(distances)
    corner = np.zeros((layers + 1, layers + 1))
    corner[1:, 1:] = np.triu(distances, 1).cumsum(0).cumsum(1)

    def inside(first: int, end: int) -> float:  # layers first .. end - 1
        return corner[end, end] - corner[first, end] - corner[end, first] + corner[first, first]

    # ends[j]: the best phases of the first j layers, as (sum, ends of the phases)
    ends: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    found = {}
    for k in range(1, layers // least + 1):
        ends = {
            j: min((ends[i][0] + inside(i, j), (*ends[i][1], j)) for i in ends if j - i >= least)
            for j in range(k * least, layers + 1)
        }
        total, cuts = ends[layers]
        starts = (0, *cuts[:-1])
        found[k] = total, [list(range(a + 1, b + 1)) for a, b in zip(starts, cuts, strict=True)]
    return found or {1: (inside(0, layers), [list(range(1, layers + 1))])}


def _max_cut(distances: np.ndarray, count: int | None, threshold: float, least: int) -> Groups:
    if len(distances) > MOST_LAYERS_CUT:
        raise ConfigError(f"maxcut tries every cut, for up to {MOST_LAYERS_CUT} layers, not {len(distances)}: use dp")
    groups = [list(range(len(distances)))]
    while count is None or len(groups) < count:
        cuts = [best_cut(distances, group, least) for group in groups]
        place = max(range(len(cuts)), key=lambda i: cuts[i][0])
        gain, parts = cuts[place]
        if gain == -np.inf or (count is None and gain <= threshold):
            break
        groups[place : place + 1] = parts
    if count is not None and len(groups) < count:
        raise ConfigError(f"maxcut finds only {len(groups)} phases of at least {least} layers")
    return sorted([layer + 1 for layer in group] for group in groups)


def best_cut(distances: np.ndarray, group: Sequence[int], least: int) -> tuple[float, Groups]:
    """The two parts of a group, of at least `least` members, with the largest sum of distances between them, and that
    sum (-inf where there are none). Every cut is tried."""
    size, best, chosen = len(group), -np.inf, 0
    among = distances[np.ix_(group, group)]
    for start in range(0, 1 << (size - 1), _TRIED_AT_ONCE):
        codes = np.arange(start, min(start + _TRIED_AT_ONCE, 1 << (size - 1)))
        sides = _sides(codes, size)
        across = ((sides @ among) * (1 - sides)).sum(1)
        ones = sides.sum(1)
        across[(ones < least) | (size - ones < least)] = -np.inf
        if (highest := across.max()) > best:
            best, chosen = float(highest), int(codes[across.argmax()])
    side = _sides(np.array([chosen]), size)[0]
    return best, [[layer for layer, s in zip(group, side, strict=True) if s == which] for which in (0, 1)]


def _sides(codes: np.ndarray, size: int) -> np.ndarray:
    # the first member stays on side 0, or every cut would come twice
    return ((codes[:, None] << 1) >> np.arange(size) & 1).astype(float)


def are_contiguous(groups: Groups) -> bool:
    """Whether every phase is a run of neighbours."""
    return all(len(_runs(group)) == 1 for group in groups)


def share_inside(distances: np.ndarray, groups: Groups) -> float:
    """The part of the sum of all distances that stands between layers of one phase."""
    inside = sum(distances[np.ix_(g, g)].sum() for g in ([layer - 1 for layer in group] for group in groups))
    return float(inside / distances.sum()) if distances.any() else 0.0


# --------------------------------------------------------------------------------------------- student
def student(graph: Graph, groups: Groups, teacher: str) -> dict[str, Any]:
    """The configuration of the recurrent student of a trained model: a stage of one layer for each phase, with the
    mixer of the teacher's layers, a SwiGLU of width 4 D and layer scale. ConfigError where a layer has no such mixer.
    The phases must be contiguous."""
    layers = [layer for item in graph.trunk for layer in _layers(item)]
    define: dict[str, Any] = {}
    trunk = []
    for group in groups:
        layer = _student_layer(layers[group[0] - 1], group[0], graph.dim)
        name = next((n for n, known in define.items() if known == layer), f"layer{len(define) + 1 if define else ''}")
        define[name] = layer
        trunk.append({"stage": len(group), "first": group[0], "of": name})
    given = graph.document
    kept = {key: given[key] for key in ("dim", "vision", "norm", "final_norm") if key in given}
    return {
        "name": f"{graph.name}_raptor{len(groups)}",
        "description": f"Recurrent student of {graph.name}: {len(layers)} layers in {len(groups)} phases.",
        "architecture": "vision",
        **kept,
        "residual": {"scale": LAYER_SCALE, "learn": "channel"},
        "define": define,
        "trunk": trunk,
        "distill": {"teacher": teacher},
        "data": dict(given.get("data") or {}),
        "train": {**(given.get("train") or {}), "weight_decay": WEIGHT_DECAY},
    }


def _layers(spec: Spec) -> list[Spec]:
    """The layers that the stream goes through in a node, as `layers_of` a built one."""
    if spec.name == "stage":
        return [spec.children[0]] * spec.options["steps"]
    if spec.name in ("sequence", "repeat") and not spec.is_layer:
        order = spec.order or range(len(spec.children))
        return [layer for i in order for layer in _layers(spec.children[i])]
    return [spec]


def _student_layer(layer: Spec, number: int, dim: int) -> list[dict[str, Any]]:
    mixers = [c for c in layer.children if c.kind == "mixer"] if layer.is_layer else []
    if len(mixers) != 1:
        where = ".".join(map(str, layer.path))
        raise ConfigError([Problem(f"layer {number} is no list of blocks with one mixer; a student needs one", where)])
    return [{mixers[0].name: dict(mixers[0].options)}, {"swiglu": {"hidden_dim": 4 * dim, "bias": True}}]


def student_text(document: Mapping[str, Any]) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


# --------------------------------------------------------------------------------------------- picture
def draw(distances: np.ndarray, groups: Groups, path: Path) -> None:
    """Write the similarities 1 - d(i, j) as PNG, with a frame around each phase."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ZooError(f"the picture needs the extra `report`: pip install 'block-zoo[report]' ({error})") from error
    figure = Figure(figsize=(6, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, layers = figure.subplots(), len(distances)
    low, high = 0.5, layers + 0.5
    image = axes.imshow(1 - distances, cmap="viridis", extent=(low, high, high, low), interpolation="nearest")
    for group in groups:
        for first, last in _runs(group):
            width = last - first + 1
            axes.add_patch(Rectangle((first - 0.5, first - 0.5), width, width, fill=False, color="red", linewidth=2))
    ticks = range(1, layers + 1, max(1, layers // 12))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="cosine of class token and mean patch")
    with new_file(path) as temporary:
        figure.savefig(temporary)


def _runs(group: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbours in a sorted group, as (first, last)."""
    ends = [i for i, (a, b) in enumerate(pairwise(group), 1) if b != a + 1]
    return [(group[a], group[b - 1]) for a, b in zip([0, *ends], [*ends, len(group)], strict=True)]


def phase_names(groups: Groups) -> list[str]:
    """`1-7`, or `1-2,5` where a phase is not contiguous."""
    return [",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(group)) for group in groups]
