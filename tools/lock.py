"""Write requirements.lock: exact pins of what the project, its training, its tests and its tools need.

    python tools/lock.py            (or: make lock)

The versions are those of the environment it runs in; nothing is fetched. Only packages that the listed extras
reach are written, so what else is installed does not matter. fla, mamba_ssm and xformers stay out: they belong
to machines with a GPU.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("train", "hf", "report", "test", "dev")
# wheels of these exist on Linux only
MARKERS = {"triton": "platform_system == 'Linux'"}
HEAD = """\
# Exact versions of everything for building, training, testing and developing on a CPU. Written by tools/lock.py.
# pip takes the build of torch that it finds; for one without CUDA, install torch from PyTorch's CPU index first.
"""


def reached(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name -> version of every package that the requirements lead to in this environment."""
    environment: dict[str, str] = {**default_environment()}
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    open_ = [(r, extra) for r in wanted for extra in ("", *r.extras)]
    while open_:
        requirement, extra = open_.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in done:
            continue
        done.add((name, extra))
        distribution = metadata.distribution(name)
        if not requirement.specifier.contains(distribution.version.partition("+")[0], prereleases=True):
            raise SystemExit(f"{name} {distribution.version} is installed, the project asks for {requirement}")
        found[name] = distribution.version.partition("+")[0]
        for line in distribution.requires or ():
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate(environment | {"extra": extra}):
                open_ += [(inner, e) for e in ("", *inner.extras)]
    return found


def lock() -> str:
    """The text of the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in EXTRAS:
        wanted += project["project"]["optional-dependencies"][extra]
    pins = reached(map(Requirement, wanted))
    lines = [f"{n}=={v}" + (f"; {MARKERS[n]}" if n in MARKERS else "") for n, v in sorted(pins.items())]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = lock()
    (ROOT / "requirements.lock").write_text(text, encoding="utf-8")
    print(f"requirements.lock: {len(text.splitlines()) - HEAD.count(chr(10))} packages", file=sys.stderr)
