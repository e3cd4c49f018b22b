"""What is not well in a line of health.jsonl. No torch here: `zoo watch` starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

TOO_LARGE = 1e4  # RMS of a layer's output; bfloat16 has three digits there, and float16 ends at 65504


class Complaint(NamedTuple):
    """Something that is not well: where, what kind of thing, and the sentence that says it."""

    where: str
    kind: str
    text: str


def complaints(record: Mapping[str, Any]) -> list[Complaint]:
    """What is not well in a line of health.jsonl."""
    found = []
    for path, node in record["nodes"].items():
        where = f"{path} ({node['block']})"
        if node.get("idle_experts"):
            share = 100 * node["idle_experts"]
            text = f"{where}: {share:.0f} % of the experts get less than a hundredth of their share of the tokens"
            found.append(Complaint(path, "idle", text))
        if node.get("grad_norm") == 0:
            found.append(Complaint(path, "gradient", f"{where}: no gradient reaches its weights"))
    for name, size in record["layers"].items():
        if size > TOO_LARGE:
            found.append(Complaint(name, "large", f"{name}: its output has an RMS of {size:,.0f}"))
    return found


class News:
    """Says what is new among complaints; what goes away and comes back is new."""

    def __init__(self) -> None:
        self.known: set[tuple[str, str]] = set()

    def of(self, record: Mapping[str, Any]) -> list[str]:
        """The sentences of those complaints that the record before did not give."""
        now = {(c.where, c.kind): c.text for c in complaints(record)}
        new = [text for key, text in now.items() if key not in self.known]
        self.known = set(now)
        return new
