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
from zoo.measure.memory import Memory
from zoo.measure.run import Measured
from zoo.predict.roofline import Assumed, predict
from zoo.sections import TrainSection
from zoo.views.compare import compare
from zoo.views.curves import ROWS, TOKENS, curves
from zoo.views.profile import Seen, profile_page
from zoo.views.sweep import Point, Refused, sweep_page

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NAME = "</script><script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">%%DATA%%"
H100 = named("H100")


def seen(name, *overrides, tokens=256):
    graph = dataclasses.replace(load_graph(name, overrides), name=NAME)
    model, timing = assemble(graph), Assumed(H100, "bfloat16")
    report = estimate(model, batch_size=1, seq_len=tokens)
    found = predict(report, timing)
    lines = curves(lambda mode: model, 1, tokens, timing, TrainSection())
    return Seen(graph, report, found, curves=lines, lines=[NAME])


def measured(model):
    """Every second node took twice as long as predicted, the others half."""
    nodes = {path: ms * (2 if i % 2 else 0.5) for i, (path, ms) in enumerate(model.prediction.nodes.items())}
    phases = {"forward": {p: ms / 4 for p, ms in nodes.items()}, "backward": {p: 3 * ms / 4 for p, ms in nodes.items()}}
    memory = Memory(2**20, 2**24, 2**23, dict.fromkeys(nodes, 2**22))
    ran = {path: {NAME: ["native"], "linear": ["aten"]} for path in nodes}
    compiled = {"eager": 3.0, "compiled": 2.0, "ratio": 1.5, "seconds": 9.0, "failure": None}
    found = Measured(2.0 * sum(nodes.values()), nodes, 5, 1, "x", 1.0, 2.0, phases, ran, memory, compiled)
    return dataclasses.replace(model, measured=found)


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
        "profile": profile_page([measured(a)], NAME, "H100", H100.memory),
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
for (const kind of ["error", "warn"]) console[kind] = (...words) => report.errors.push(words.join(" "));
addEventListener("load", () => {
  const all = query => [...document.querySelectorAll(query)];
  const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const hint = document.getElementById("tip"), wrong = /NaN|Infinity|undefined/;
  const bad = () => all("svg *").filter(e => [...e.attributes].some(a => wrong.test(a.value))).length;
  try {
    report.title = document.title;
    report.leaves = all("svg .leaf").length;
    report.heights = all("svg .leaf rect").map(r => +r.getAttribute("height"));
    report.dots = all("svg circle").length;
    report.bad = bad();
    report.unnamed = all("svg, select, [tabindex]").filter(e => !e.getAttribute("aria-label")).length;
    report.facts = all("dl.facts div").map(e => [...e.children].map(c => c.textContent).join(": "));
    const head = all("th button").find(b => b.textContent === "parameters"), column = head.parentElement.cellIndex;
    const table = head.closest("table");
    report.heads = [...table.querySelectorAll("th")].map(h => h.textContent);
    const read = () => [...table.querySelectorAll("tbody tr")].map(r => r.cells[column].textContent);
    head.click(); report.down = read();
    head.click(); report.up = read();
    const stops = all("svg .leaf, svg circle"), mark = stops[0];
    mark.dispatchEvent(new PointerEvent("pointermove", { clientX: 5, clientY: 5, bubbles: true }));
    report.tip = hint.textContent;
    report.lit = all("tr.lit").length;
    press(mark, "Escape");
    report.hidden = hint.hidden && !all("tr.lit").length;
    mark.focus({ focusVisible: true });
    press(mark, "ArrowDown");
    report.moved = document.activeElement === stops[1] && !hint.hidden && mark.tabIndex === -1;
    report.shades = {};
    for (const select of all("select")) for (const option of select.options) {
      select.value = option.value;
      select.dispatchEvent(new Event("change"));
      const fills = new Set(all("svg .leaf rect").map(r => r.getAttribute("fill")));
      report.shades[`${select.ariaLabel} ${option.value}`] = fills.size;
      report.bad += bad();
    }
    report.drawn = all("svg .leaf, svg circle").length;
    const beyond = e => e.getBoundingClientRect().right > innerWidth && !e.closest(".scroll, #tip");
    report.beyond = all("body *").filter(beyond).map(e => e.outerHTML);
  } catch (error) { report.errors.push(String(error)); }
  document.body.dataset.report = JSON.stringify(report);
});
</script>
"""


def browsed(text, folder, *options):
    path = folder / "page.html"
    path.write_text(text.replace("<main", ACTS + "<main", 1), encoding="utf-8")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    parser, found = HTMLParser(), {}
    parser.handle_starttag = lambda tag, attrs: found.update(dict(attrs)) if tag == "body" else None
    parser.feed(done.stdout)
    assert "data-report" in found, done.stderr
    return json.loads(found["data-report"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: `apt-get install chromium-headless-shell` brings one")
@pytest.mark.parametrize("which, width", [("profile", 1200), ("compare", 700), ("sweep", 700)])
def test_a_browser_draws_sorts_and_hints(pages, which, width, tmp_path):
    report = browsed(pages[which], tmp_path, f"--window-size={width},900")
    assert report["errors"] == [] and report["bad"] == 0 and report["unnamed"] == 0 and NAME in report["title"]
    assert report["down"] == report["up"][::-1] or sorted(report["down"]) == sorted(report["up"])
    assert report["down"] != report["up"] and report["tip"] and report["beyond"] == []
    assert report["hidden"] and report["moved"]
    if which == "sweep":
        assert report["dots"] == report["drawn"] == 3 and report["lit"] == 1 and "on the front" in report["tip"]
        return
    assert report["leaves"] > 10 and report["dots"] > 50 and report["drawn"] >= report["leaves"] + report["dots"]
    assert min(report["heights"]) >= 24 and max(report["heights"]) > 40 and report["lit"] == 1
    assert report["shades"]["colour kind"] > 3 and report["shades"]["colour flops"] == 1
    if which == "profile":
        assert report["shades"]["colour predicted_over_measured"] == 2, "slower and quicker"
        assert {"forward", "backward", "predicted/measured", "peak memory", "kernels"} <= set(report["heads"])
        assert "forward" in report["tip"] and f"{NAME} native, linear aten" in report["tip"]
        assert (
            "compiled: 2 ms: 1.5× as quick" in report["facts"]
            and "peak memory: 16 MiB: beside 1 MiB held" in report["facts"]
        )
