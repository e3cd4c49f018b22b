"""Pages: whole, without a network, harmless whatever a name holds, and alive in a browser where there is one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from zoo.architectures.storage import assemble
from zoo.cost import estimate
from zoo.devices import named
from zoo.graph.loader import load_graph
from zoo.predict.roofline import Assumed, predict
from zoo.sections import TrainSection
from zoo.views.compare import compare
from zoo.views.curves import ROWS, TOKENS, curves
from zoo.views.profile import Seen, profile_page
from zoo.views.sweep import Point, Refused, sweep_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAME = "</script><script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">%%DATA%%"
H100 = named("H100")


def seen(name, *overrides, tokens=256):
    graph = dataclasses.replace(load_graph(name, overrides), name=NAME)
    model, timing = assemble(graph), Assumed(H100, "bfloat16")
    report = estimate(model, batch_size=1, seq_len=tokens)
    found = predict(report, timing)
    lines = curves(lambda mode: model, 1, tokens, timing, TrainSection())
    return Seen(graph, report, found.nodes, found.total, curves=lines, lines=[NAME])


@pytest.fixture(scope="module")
def pages():
    a, b = seen("hydra_small"), seen("hydra_small", "dim=256")
    points = [
        Point({"dim": str(n), NAME: NAME}, 64, n**2, n**2, n**3, n**3, float(n), n**2 * 4, n < 300, front=n != 200)
        for n in (100, 200, 300)
    ]
    found = [("dim", ["100", "200", "300"]), (NAME, [NAME, "x"])]
    refused = [Refused({"dim": "7", NAME: "x"}, NAME)]
    return {
        "profile": profile_page([a], NAME, "H100", H100.memory),
        "compare": profile_page([a, b], NAME, NAME, H100.memory, compare(a, b)),
        "sweep": sweep_page(NAME, NAME, found, points, refused, 1e5, "more"),
    }


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.loads, self.tags, self.title = [], [], [""], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href")]
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.tags[-1] == "script" and data.strip():
            self.scripts[-1] += data
        if self.tags[-1] == "title":
            self.title += data.strip()


@pytest.mark.parametrize("which", ["profile", "compare", "sweep"])
def test_a_page_is_whole_needs_no_network_and_runs_no_name(pages, which):
    text = pages[which]
    page = Page(text)
    assert not page.loads and page.tags.count("script") == 2 and "img" not in page.tags
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    data, script = page.scripts
    assert json.dumps(NAME)[1:-1] in data.replace("\\u003c", "<") and NAME in page.title
    found = json.loads(data)
    assert "innerHTML" not in script and "document.write" not in script and "eval(" not in script
    for key in re.findall(r"\bdata\.(\w+)", script):
        assert key in found, key


def test_curves_grow_and_say_what_they_are_along():
    found = {(c.mode, c.along): c.points for c in seen("gla_small").curves}
    assert set(found) == {(m, a) for m in ("train", "prefill", "decode") for a in ("tokens", "rows")}
    for (mode, along), points in found.items():
        xs, times, bytes_ = zip(*points)
        assert xs == (TOKENS if along == "tokens" else ROWS)[: len(xs)] and len(xs) > 4
        assert list(bytes_) == sorted(bytes_) and all(t > 0 for t in times)
        if mode != "decode":
            assert list(times) == sorted(times)
    model = assemble(load_graph("vit_small"))
    found = curves(lambda mode: model, 1, 64, None, TrainSection())
    assert {(c.mode, c.along) for c in found} == {("train", "rows"), ("prefill", "rows")}
    assert all(ms is None for c in found for _, ms, _ in c.points)


ACTS = """
<script>
const report = { errors: [] };
addEventListener("error", event => report.errors.push(event.message));
addEventListener("load", () => {
  const all = query => [...document.querySelectorAll(query)];
  try {
    report.title = document.title;
    report.leaves = all("svg .leaf").length;
    report.heights = all("svg .leaf rect").map(r => +r.getAttribute("height"));
    report.dots = all("svg circle").length;
    report.bad = all("svg *").filter(e => [...e.attributes].some(a => /NaN|Infinity|undefined/.test(a.value))).length;
    const head = all("th button").find(b => b.textContent === "parameters"), column = head.parentElement.cellIndex;
    const table = head.closest("table");
    const read = () => [...table.querySelectorAll("tbody tr")].map(r => r.cells[column].textContent);
    head.click(); report.down = read();
    head.click(); report.up = read();
    const mark = document.querySelector("svg .leaf, svg circle");
    mark.dispatchEvent(new PointerEvent("pointermove", { clientX: 5, clientY: 5, bubbles: true }));
    mark.dispatchEvent(new PointerEvent("pointerenter"));
    report.tip = document.getElementById("tip").textContent;
    report.lit = all("tr.lit").length;
    for (const select of all("select")) for (const option of select.options) {
      select.value = option.value;
      select.dispatchEvent(new Event("change"));
    }
    report.drawn = all("svg .leaf, svg circle").length;
    report.wide = document.documentElement.scrollWidth <= innerWidth;
  } catch (error) { report.errors.push(String(error)); }
  document.body.dataset.report = JSON.stringify(report);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("which", ["compare", "sweep"])
def test_a_browser_draws_sorts_and_hints(pages, which, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(pages[which].replace("<main", ACTS + "<main", 1), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1200,900", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    parser = HTMLParser()
    found = {}
    parser.handle_starttag = lambda tag, attrs: found.update(dict(attrs)) if tag == "body" else None
    parser.feed(done.stdout)
    report = json.loads(found["data-report"])
    assert report["errors"] == [] and report["bad"] == 0 and NAME in report["title"]
    assert report["down"] == report["up"][::-1] or sorted(report["down"]) == sorted(report["up"])
    assert report["down"] != report["up"] and report["tip"] and report["wide"]
    if which == "compare":
        assert report["leaves"] > 20 and report["dots"] > 50 and report["drawn"] >= report["leaves"] + report["dots"]
        assert min(report["heights"]) >= 24 and max(report["heights"]) > 40 and report["lit"] == 1
    else:
        assert report["dots"] == report["drawn"] == 3 and report["lit"] == 1 and "on the front" in report["tip"]
