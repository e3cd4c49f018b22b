"""A page that shows a run: curves, nodes, incidents, evaluation. Read from the files of its folder only, so it can be
looked at while it trains and long after, from the process that trains or from any other. No torch here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import ConfigError, ZooError
from zoo.sections import TrainSection
from zoo.train.complaints import complaints
from zoo.train.curve import read_metrics
from zoo.train.files import write_text

POINTS = 1000  # of a curve; a longer run is shown by means
RECENT = 50  # steps by which the time that is left is judged
QUIET_SECONDS = 300.0  # without a new step the page says so
_TEMPLATE = Path(__file__).with_name("watch.html")
_CURVES = (  # key of metrics.jsonl, title, what a value is multiplied by
    ("tokens_per_second", "tokens per second", 1.0),
    ("mfu", "MFU, %", 100.0),
    ("lr", "learning rate", 1.0),
    ("grad_norm", "norm of the gradient", 1.0),
    ("memory", "peak memory, GB", 1e-9),
)


def snapshot(folder: Path) -> dict[str, Any]:
    """All that the page shows, as plain values. ConfigError where the folder is none of a run."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder (it has no config.yaml)")
    document = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    steps = TrainSection.from_mapping(document.get("train")).steps
    records = read_metrics(folder / "metrics.jsonl")
    evaluation = _json(folder / "evaluation.json")
    incidents = read_incidents(folder)
    done = max([r["step"] for r in records] + [i["step"] for i in incidents], default=0)
    unit = "images" if "vision" in document else "tokens"
    return _finite(
        {
            "name": str(document.get("name", folder.name)),
            "folder": str(folder),
            "steps": steps,
            "step": done,
            "state": _state(folder, done, steps, evaluation is not None, incidents),
            "facts": _facts(records, done, steps, unit),
            "curves": _curves(records, unit),
            "health": _health(read_metrics(folder / "health.jsonl")),
            "incidents": incidents,
            "evaluation": {k: _short(v) for k, v in (evaluation or {}).items()},
            "machine": _machine(_json(folder / "environment.json") or {}),
        }
    )


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_incidents(folder: Path) -> list[dict[str, Any]]:
    """The incidents of a run, in order."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("incident-step-*/incident.json")]
    return sorted(found, key=lambda i: i["step"])


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _state(folder: Path, done: int, steps: int, evaluated: bool, incidents: Sequence[Mapping[str, Any]]) -> str:
    if incidents and incidents[-1]["step"] == done and not incidents[-1]["skipped"]:
        return "stopped"
    if done >= steps:
        return "finished" if evaluated else "evaluating"
    path = folder / "metrics.jsonl"
    quiet = time.time() - path.stat().st_mtime if path.is_file() else 0.0
    return "running" if quiet < QUIET_SECONDS else f"no step for {_clock(quiet)}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m} min" if hours else f"{m} min {s} s"


def _facts(records: Sequence[Mapping[str, Any]], done: int, steps: int, unit: str) -> list[tuple[str, str]]:
    if not records:
        return []
    last, recent = records[-1], records[-RECENT:]
    found = [("step", f"{done:,} of {steps:,}"), ("loss", f"{last['loss']:.4f}")]
    for key, name in (("heldout_loss", "held-out loss"), ("heldout_bits_per_byte", "bits per byte")):
        if seen := [r[key] for r in records if key in r]:
            found.append((name, f"{seen[-1]:.4f}"))
    found.append((f"{unit}/s", f"{_mean(r['tokens_per_second'] for r in recent):,.0f}"))
    if "mfu" in last:
        found.append(("MFU", f"{100 * _mean(r['mfu'] for r in recent if 'mfu' in r):.1f} %"))
    if "memory" in last:
        found.append(("peak memory", f"{last['memory'] / 1e9:.2f} GB"))
    if done < steps:
        found.append(("time left", _clock((steps - done) * _mean(r["seconds"] for r in recent))))
    return found


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _curves(records: Sequence[Mapping[str, Any]], unit: str) -> list[dict[str, Any]]:
    def points(get: Callable[[Mapping[str, Any]], Any], scale: float = 1.0) -> list[list[float]]:
        return _thin(
            [[r["step"], value * scale] for r in records if (value := get(r)) is not None and math.isfinite(value)]
        )

    series = {"train": points(lambda r: r["loss"]), "held-out": points(lambda r: r.get("heldout_loss"))}
    found = [{"title": "loss", "series": {name: p for name, p in series.items() if p}}]
    for key, title, scale in _CURVES:
        title = title.replace("tokens", unit)
        found.append({"title": title, "series": {title: points(lambda r, key=key: r.get(key), scale)}})
    measured = dict.fromkeys(name for r in records for name in r.get("blocks", ()))
    for name in measured:  # the mean over those blocks that measure it
        found.append({"title": name, "series": {name: points(lambda r, name=name: r.get("blocks", {}).get(name))}})
    return [c for c in found if any(c["series"].values())]


def _thin(points: list[list[float]]) -> list[list[float]]:
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [[g[-1][0], sum(v for _, v in g) / len(g)] for g in groups]


def _health(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not records:
        return None
    last = records[-1]
    names = dict.fromkeys(name for node in last["nodes"].values() for name in node if name != "block")
    bad = complaints(last)
    return {
        "step": last["step"],
        "columns": ["node", "block", *names],
        "rows": [[path, n["block"], *(_short(n.get(name)) for name in names)] for path, n in last["nodes"].items()],
        "layers": [[name, size] for name, size in last["layers"].items()],
        "complaints": [c.text for c in bad],
        "bad": sorted({c.where for c in bad}),
    }


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _machine(environment: Mapping[str, Any]) -> str:
    speed = environment.get("speed") or {}
    parts = [f"{k} {environment[k]}" for k in ("zoo", "torch", "python") if environment.get(k)]
    if speed:
        parts.append(f"peak {speed['peak_flops'] / 1e9:,.0f} GFLOP/s ({speed['peak_from']})")
    return ", ".join([*parts, *([f"started {environment['started']}"] if "started" in environment else [])])


# ------------------------------------------------------------------------------------------- page
def page(folder: Path) -> str:
    """The page with the data of now inside."""
    data = json.dumps(snapshot(folder), allow_nan=False).replace("<", "\\u003c")  # no tag can begin in it
    return _TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', data)


def write_page(folder: Path) -> Path:
    """Write watch.html into the run folder; it needs no server and no network."""
    path = folder / "watch.html"
    write_text(path, page(folder))
    return path


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server on this machine only: `/` the page, `/data` what it asks for every few seconds. Port 0: a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer = {"/": (page, "text/html"), "/data": (_data, "application/json")}.get(self.path)
                if answer is None:
                    return self.send_error(404)
                body = answer[0](folder).encode()
            except (ZooError, OSError, ValueError, KeyError) as error:  # a file that is just being written
                return self.send_error(503, type(error).__name__)
            self.send_response(200)
            self.send_header("Content-Type", f"{answer[1]}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ZooError(f"port {port} cannot be used ({error.strerror}); --port 0 takes a free one") from error


def _data(folder: Path) -> str:
    return json.dumps(snapshot(folder), allow_nan=False)
