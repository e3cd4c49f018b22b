"""Blocks from other people's packages: installed, listed, shown, built, verified; broken ones harm nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "example_plugin"


def python(code: str, site: Path) -> dict:
    """Run code in a fresh interpreter that sees the packages in `site`; it prints one JSON document."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def fake_distribution(site: Path, name: str, entry_points: str, **modules: str) -> None:
    """What an installer leaves behind: modules and a dist-info folder."""
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[zoo.blocks]\n{entry_points}\n")
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    source, site = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)  # building writes into the source tree
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True, timeout=300)
    return site


def test_installed_plugin_is_listed_without_being_imported(installed):
    seen = python(
        "import json, sys, zoo; card = zoo.block_card('ema')\n"
        "print(json.dumps({'names': zoo.list_blocks('mixer'), 'summary': card.summary, 'provider': card.provider,"
        " 'imported': [m for m in ('torch', 'example_plugin.ema') if m in sys.modules]}))",
        installed,
    )
    assert "ema" in seen["names"]
    assert seen["summary"].startswith("Exponential moving average") and seen["provider"] == "example-plugin"
    assert seen["imported"] == [] and "Warning" not in seen["stderr"]


def test_installed_plugin_is_built_and_verified(installed):
    seen = python(
        "import json, zoo\nfrom zoo.conformance import verify\n"
        "block = zoo.create_block('ema', 32, max_timescale=8)\n"
        "reports = [verify('ema', slow=False), verify('example_plugin.ema:EMA', only=['segments'])]\n"
        "reports = [report.to_json() for report in reports]\n"
        "print(json.dumps({'class': type(block).__module__, 'reports': reports}))",
        installed,
    )
    assert seen["class"] == "example_plugin.ema"
    for report in seen["reports"]:
        assert report["ok"], [r for r in report["results"] if not r["ok"]]
    assert [r["passed"] > 50 for r in seen["reports"]] == [True, False]


GOOD = "from zoo.registry import register\n@register({!r}, kind='ffn')\nclass B:\n    'A block.'\n"


@pytest.mark.parametrize(
    ("name", "entry", "source", "words"),
    [
        ("missing-module", "a = no_such_module_anywhere:B", "", "no module"),
        ("syntax-error", "a = plug:B", "@register(\nclass !!!", "is ignored"),
        ("no-class", "a = plug:C", GOOD.format("a"), "no class C"),
        ("not-literal", "a = plug:B", GOOD.format("a").replace("'ffn'", "KIND"), "is ignored"),
        ("name-taken", "swiglu = plug:B", GOOD.format("swiglu"), "the name 'swiglu' is taken"),
        ("unknown-keyword", "a = plug:B", GOOD.format("a").replace("kind=", "knid='x', kind="), "is ignored"),
        ("binary", "a = plug:B", "\x00\x01@register(", "is ignored"),
    ],
)
def test_broken_plugin_warns_and_harms_nobody(tmp_path, name, entry, source, words):
    fake_distribution(tmp_path, name, entry, plug=source)
    seen = python(
        "import json, zoo; print(json.dumps({'names': zoo.list_blocks(), 'module': zoo.block_card('swiglu').module}))",
        tmp_path,
    )
    assert "a" not in seen["names"] and seen["module"] == "zoo.blocks.swiglu"
    assert words in seen["stderr"] and "Warning" in seen["stderr"]


def test_plugin_that_cannot_be_imported_fails_alone(tmp_path):
    fake_distribution(tmp_path, "half", "half = plug:B", plug="import no_such_thing\n" + GOOD.format("half"))
    seen = python(
        "import json, zoo\n"
        "try:\n    zoo.create_block('half', 8)\n    text = ''\n"
        "except zoo.ConfigError as error:\n    text = str(error)\n"
        "zoo.create_block('swiglu', 8)\n"
        "print(json.dumps({'text': text, 'listed': 'half' in zoo.list_blocks()}))",
        tmp_path,
    )
    assert seen["listed"] and "'half' of half cannot be imported" in seen["text"]
