"""What a check is, how it fails, and what a run of the suite says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.registry import Registration

# kinds that follow the law of a block: y = block(x, state=, positions=, doc_ids=)
BLOCK_KINDS = ("mixer", "ffn", "memory")


class Failure(Exception):
    """A block does not keep what a check asks; the message says what was seen and what would be right."""


@dataclass(frozen=True)
class Check:
    """A named question to a block. `needs` looks at the registration and says whether the question applies;
    `per_block` checks run once, on the first example, the others on each example."""

    name: str
    fn: Callable[[Any], None]
    kinds: tuple[str, ...] = BLOCK_KINDS
    needs: Callable[[Registration], bool] = lambda registration: True
    slow: bool = False
    per_block: bool = False

    @property
    def summary(self) -> str:
        """First line of the check's docstring."""
        return (self.fn.__doc__ or "").strip().split("\n", 1)[0]

    def applies(self, registration: Registration) -> bool:
        """Whether a block with this registration has to answer."""
        return registration.kind in self.kinds and self.needs(registration)


CHECKS: list[Check] = []


def check(
    *,
    kinds: Sequence[str] = BLOCK_KINDS,
    needs: Callable[[Registration], bool] = lambda registration: True,
    slow: bool = False,
    per_block: bool = False,
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Add a function `(subject) -> None` to the suite under its own name. Kinds that are no blocks (routers,
    combinators, ...) declare their checks with it too: `@check(kinds=("router",))`."""

    def add(fn: Callable[[Any], None]) -> Callable[[Any], None]:
        name = getattr(fn, "__name__", "")
        if any(c.name == name for c in CHECKS):
            raise ValueError(f"two conformance checks are named {name!r}")
        CHECKS.append(Check(name, fn, tuple(kinds), needs, slow, per_block))
        return fn

    return add


@dataclass(frozen=True)
class Result:
    """Outcome of one check on one example."""

    block: str
    check: str
    options: dict[str, Any]
    ok: bool
    seconds: float
    message: str = ""


@dataclass
class Report:
    """Outcome of all checks of one block. `note` is set where nothing applied."""

    block: str
    results: list[Result] = field(default_factory=list)
    note: str = ""

    @property
    def ok(self) -> bool:
        """True where no check failed."""
        return all(r.ok for r in self.results)

    @property
    def failures(self) -> list[Result]:
        """The failed results."""
        return [r for r in self.results if not r.ok]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars."""
        return {
            "block": self.block,
            "ok": self.ok,
            "passed": len(self.results) - len(self.failures),
            "failed": len(self.failures),
            "seconds": round(sum(r.seconds for r in self.results), 3),
            "note": self.note,
            "results": [asdict(r) for r in self.results],
        }

    def __str__(self) -> str:
        head = f"{self.block}: {len(self.results) - len(self.failures)} of {len(self.results)} checks passed"
        lines = [f"  {r.check} {r.options or ''}: {r.message}" for r in self.failures]
        return "\n".join([head + (f" ({self.note})" if self.note else ""), *lines])
