"""One pass as a trace of Chrome's format, for Perfetto or chrome://tracing, with ranges named by nodes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from zoo.architectures.model import Model
from zoo.measure.memory import Ranges, label, quiet
from zoo.measure.passes import Pass
from zoo.measure.visits import parts, visited

TRACK = 10**6  # a thread's number, larger than those of the system


def write_trace(model: Model, once: Pass, device: str, path: Path) -> None:
    """Trace a pass after another that warms up."""
    once()
    once.prepare()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with quiet(), profile(activities=activities) as seen, visited(model, Ranges()) as end:
        loss = once.forward()
        if loss is not None:
            loss.backward()
            end()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(raw))
        document = json.loads(raw.read_text())
    _apart(document, {label(paths, "backward") for _, paths in parts(model)})
    path.write_text(json.dumps(document))


def _apart(document: dict, names: set[str]) -> None:
    """A track of their own for ranges of backward: they begin and end within operations of autograd, so cannot nest."""
    events = document["traceEvents"]
    moved = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in names]
    for event in moved:
        event["tid"] = TRACK
    for pid in {e["pid"] for e in moved}:
        events.append(
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": TRACK, "args": {"name": "backward, node by node"}}
        )
