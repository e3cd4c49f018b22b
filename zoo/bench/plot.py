"""A picture of a result: times of all candidates, or times over lengths."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, ZooError

FORMATS = (".png", ".svg", ".pdf")


def check(path: str | None) -> None:
    """Say before anything is measured that the picture could not be drawn."""
    if path is None:
        return
    if Path(path).suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ZooError("--plot needs matplotlib: pip install 'block-zoo[report]'")


def draw(document: dict[str, Any], path: str) -> None:
    """Write the picture of a document of `zoo bench`."""
    from matplotlib.figure import Figure  # no window system is asked for

    groups = document["groups"]
    if document["bench"] == "scaling":
        figure = Figure(figsize=(8, 5), layout="constrained")
        _lines(figure, groups)
    else:
        whats = list(dict.fromkeys(group["what"] for group in groups))
        bars = max((sum(len(_timed(g)) + 1 for g in groups if g["what"] == what) for what in whats), default=1)
        figure = Figure(figsize=(6 * len(whats), 1.5 + 0.22 * bars), layout="constrained")
        for axes, what in zip(figure.subplots(1, max(len(whats), 1), squeeze=False)[0], whats):
            _bars(axes, [group for group in groups if group["what"] == what], what)
    machine, settings = document["machine"], document["settings"]
    figure.suptitle(
        f"zoo bench {document['bench']}: {machine['device']}, {settings['dtype']}, {machine['threads']} threads, "
        f"{document['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _timed(group: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in group["rows"] if row.get("median_ms")]


def _bars(axes: Any, groups: list[dict[str, Any]], what: str) -> None:
    """One bar a candidate: what `auto` runs in blue, our other rows in light blue, peers in grey."""
    heights, widths, colours, labels = [], [], [], []
    height = 0.0
    for group in groups:
        length = f"after {group['context']}" if what == "step" else f"T={group['seq']}"
        for row in _timed(group):
            heights.append(height)
            widths.append(row["median_ms"])
            colours.append("tab:blue" if row["chosen"] else "0.7" if row["by"] == "peer" else "lightsteelblue")
            labels.append(f"{group['case']}, {length}: {row['name']}")
            height += 1
        height += 1
    if not widths:
        return
    axes.barh(heights, widths, color=colours)
    axes.set_xlim(left=min(widths) / 2)
    axes.set_yticks(heights, labels, fontsize=6)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(what, fontsize=9)


def _lines(figure: Any, groups: list[dict[str, Any]]) -> None:
    """Milliseconds over lengths, both logarithmic: a linear cost is a line of slope one."""
    axes = figure.subplots()
    for group in groups:
        if group["rows"]:
            style = "-o" if group["what"] == "forward" else "--s"
            axes.plot([r["seq"] for r in group["rows"]], [r["median_ms"] for r in group["rows"]], style, markersize=3,
                      label=f"{group['case']} {group['what']}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    axes.legend(fontsize=6)
