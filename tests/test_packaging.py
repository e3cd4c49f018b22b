"""The wheel: all modules in it can be imported, configurations are inside, nothing else becomes importable."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("blocks", "kernels", "architectures", "configs")
SUFFIXES = (".py", ".yaml", ".html", ".css", ".js")


def sources(folder: Path) -> set[str]:
    """Python files and configurations below a folder, through links."""
    return {
        str(p.relative_to(folder.parent))
        for top in (folder, *(folder / link for link in LINKS))
        for p in top.resolve().rglob("*")
        for p in [top / p.relative_to(top.resolve())]
        if p.suffix in SUFFIXES and "__pycache__" not in p.parts
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)  # building writes into the tree
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, capture_output=True, timeout=300)
    (wheel,) = out.glob("block_zoo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_only_zoo_becomes_importable(site):
    assert {p.name for p in site.iterdir()} == {"zoo", next(site.glob("*.dist-info")).name}
    assert not any(p.is_symlink() for p in site.rglob("*"))


def test_every_source_file_is_in_the_wheel(site):
    packed = {str(p.relative_to(site)) for p in (site / "zoo").rglob("*") if p.suffix in SUFFIXES}
    assert packed == sources(ROOT / "zoo")


@pytest.mark.slow
def test_every_module_can_be_imported_from_the_wheel(site):
    code = (
        "import sys, importlib, json, pkgutil\n"
        f"sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p and 'block_zoo' not in p]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        "import zoo\nfailed = {}\n"
        "names = [m.name for m in pkgutil.walk_packages(zoo.__path__, 'zoo.') if not m.name.endswith('__main__')]\n"
        "for name in names:\n"
        "    try: importlib.import_module(name)\n"
        "    except Exception as error: failed[name] = repr(error)\n"
        "from zoo.graph.loader import config_names\n"
        "print(json.dumps({'where': zoo.__file__, 'failed': failed, 'count': len(names), 'configs': config_names()}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env, cwd=site)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["where"] == str(site / "zoo" / "__init__.py")
    assert seen["failed"] == {} and seen["count"] > 100
    assert seen["configs"] == sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))


def test_the_installed_environment_has_no_colliding_modules():
    code = (
        "import importlib.util, sys\nsys.path = [p for p in sys.path if p]\n"
        f"root = {str(ROOT)!r}\n"
        "found = [importlib.util.find_spec(n) for n in ('kernels', 'blocks', 'configs', 'architectures', 'tools')]\n"
        "where = [s.origin for s in found if s and s.origin]\n"
        "print([w for w in where if w.startswith(root) and 'site-packages' not in w])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_links_are_relative():
    assert {name: os.readlink(ROOT / "zoo" / name) for name in LINKS} == {name: f"../{name}" for name in LINKS}


def test_the_lock_pins_everything_exactly():
    lines = [x for x in (ROOT / "requirements.lock").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+(; platform_system == 'Linux')?", x) for x in lines)
    pins = dict(x.partition(";")[0].split("==") for x in lines)
    assert {k: pins[k] for k in ("torch", "triton", "torchtitan", "omegaconf", "transformers")} == {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "torchtitan": "0.3.0",
        "omegaconf": "2.4.0",
        "transformers": "5.23.0",
    }
    assert not {"flash-linear-attention", "mamba-ssm", "xformers", "block-zoo"} & set(pins)


def test_the_lock_has_what_the_project_asks_for():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        x.partition(";")[0].split("==") for x in (ROOT / "requirements.lock").read_text().splitlines() if "==" in x
    )
    wanted = list(project["dependencies"])
    for extra in ("train", "hf", "report", "test", "dev"):
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name], prereleases=True), requirement


def test_versions_agree():
    import zoo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == zoo.__version__
