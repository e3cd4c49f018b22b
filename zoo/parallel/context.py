"""Context parallelism: placeholder of the lead until the helper's work lands."""

from __future__ import annotations

from typing import Any

from zoo.errors import Problem


def refusals(model: Any, degree: int) -> list[Problem]:
    return [Problem("not there yet", "parallel.cp")]


def apply(model: Any, group: Any) -> None:
    raise NotImplementedError
