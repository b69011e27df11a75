"""The report as one self-contained HTML page with figures."""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from koinon.bench.statistics import falls
from koinon.core import UserError

try:
    import jinja2
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ModuleNotFoundError as error:
    raise UserError(f"the HTML report needs {error.name}: pip install 'koinon[report]'") from None

if TYPE_CHECKING:
    from koinon.bench.report import Report

WIDTH = 10.0
"""Inches; the page is as wide."""
LETTERS = 90
"""How many fit below a figure in one line."""
INK, ACCENT, QUIET = "#1f2937", "#2563eb", "#9ca3af"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "koinon",
}


def figures(report: "Report") -> dict[str, tuple[str, str]]:
    """Each figure by a name for its file: title and SVG."""
    main, baseline = report.settings["main"], report.settings["baseline"]
    drawn = {
        "levels": (f"{main}: mean and 95 % interval", _levels),
        "differences": (f"Difference to {baseline}, paired", _differences),
        "tasks": ("By metric: how far from the best", _by_metric),
    }
    if "samples_per_second" in report.costs:
        drawn["speed"] = ("Quality against speed", _tradeoff)
    if report.meters:
        drawn["meters"] = ("Expert meters (shorter is healthier)", _meters)
    with styled():
        return {name: (title, svg(draw(report))) for name, (title, draw) in drawn.items()}


def page(report: "Report") -> str:
    """HTML with the table, the sentences and the figures inside; needs no other file."""
    header, body = report.table
    title = f"{report.recipe} ({report.settings['scale']})"
    return rendered(PAGE, title, report=report, header=header, body=body, figures=figures(report).values())


def rendered(template: str, title: str, /, **given: Any) -> str:
    """A whole page: the template of its body filled in, every text escaped, with the head and style of all pages."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(f"{HEAD}{template}</html>\n").render(title=title, **given)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Within, figures are drawn as in all reports."""
    with matplotlib.rc_context(STYLE):
        yield


def svg(figure: Figure) -> str:
    """A figure as text to be put into a page."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _rows(report: "Report"):
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(report.labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(report.labels)), report.labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure, axes


def _levels(report: "Report") -> Figure:
    figure, axes = _rows(report)
    for place, label in enumerate(report.labels):
        value = report.value(label, report.settings["main"])
        seeds = [row["metrics"][report.settings["main"]] for row in report.rows if row["label"] == label]
        axes.plot([value.low, value.high], [place, place], color=ACCENT, linewidth=2, solid_capstyle="round")
        axes.plot([value.mean], [place], "o", color=ACCENT, markersize=7)
        axes.plot(seeds, [place + 0.28] * len(seeds), "|", color="#6b7280", markersize=6)
    axes.set_xlabel(f"{report.settings['main']} (small strokes: single seeds)")
    return figure


def _differences(report: "Report") -> Figure:
    figure, axes = _rows(report)
    for place, label in enumerate(report.labels):
        if report.settings["baseline"] not in report.labels:
            continue
        if label == report.settings["baseline"]:
            axes.plot([0], [place], "o", color=INK, markerfacecolor="white", markersize=7)
            continue
        value = report.difference(label, report.settings["baseline"])
        color = {1: "#15803d", 0: QUIET, -1: "#b91c1c"}[value.sign]
        axes.plot([value.low, value.high], [place, place], color=color, linewidth=2, solid_capstyle="round")
        axes.plot([value.mean], [place], "o", color=color, markersize=7)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("green: interval above zero, red: below, grey: holds zero")
    return figure


def _tradeoff(report: "Report") -> Figure:
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [(label, report.cost(label, "samples_per_second")) for label in report.labels]
    timed = [(label, speed) for label, speed in costs if speed is not None]
    quality = {label: report.value(label, report.settings["main"]).mean for label, _ in timed}
    for place, (label, speed) in enumerate(timed, start=1):  # numbers, because names would overlap
        axes.plot([speed], [quality[label]], "o", color=ACCENT, markeredgecolor="white", markersize=15)
        axes.annotate(str(place), (speed, quality[label]), ha="center", va="center", color="white", fontsize=8)
        height = 1 - 0.06 * (place - 0.5) * min(1, 16 / len(timed))
        axes.text(1.02, height, f"{place}  {label}", transform=axes.transAxes, va="center", fontsize=9, color=INK)
    axes.margins(0.08)
    axes.set_xscale("log")
    thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(thousands)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training samples/s, one thread (trees have no such speed)")
    axes.set_ylabel(report.settings["main"])
    return figure


def _by_metric(report: "Report") -> Figure:
    metrics = [name for name in report.settings["shown"] if not name.startswith(("mean.", "sparse."))]
    table = [[report.value(label, name).mean for name in metrics] for label in report.labels]
    best = [(min if falls(name) else max)(row[column] for row in table) for column, name in enumerate(metrics)]
    gaps = [[abs(value - top) for value, top in zip(row, best, strict=True)] for row in table]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(report.labels)), layout="constrained")
    axes = figure.subplots()
    widest = max(max(row) for row in gaps) or 1e-9
    # Pale for the best, amber for the worst: dark text can be read on every cell.
    axes.imshow(gaps, aspect="auto", cmap=LinearSegmentedColormap.from_list("gap", ["#ffffff", "#fef3c7", "#f59e0b"]),
                vmin=0, vmax=widest)  # fmt: skip
    for y, row in enumerate(gaps):
        for x, gap in enumerate(row):
            axes.text(x, y, f"{gap:.4f}" if gap else "best", ha="center", va="center", fontsize=9, color=INK,
                      fontweight="normal" if gap else "bold")  # fmt: skip
    crowded = sum(map(len, metrics)) > LETTERS
    axes.set_xticks(range(len(metrics)), metrics, rotation=25 * crowded, ha="right" if crowded else "center")
    axes.set_yticks(range(len(report.labels)), report.labels)
    axes.grid(visible=False)
    return figure


def _meters(report: "Report") -> Figure:
    kinds = [k for k in ("collapse", "spread", "degradation") if any(k in meters for _, meters in report.meters)]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(report.meters)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        healthy = 1.0 if kind == "spread" else 0.0
        values = [meters.get(kind, float("nan")) for _, meters in report.meters]
        bars = axes.barh(
            range(len(values)), [value - healthy for value in values], left=healthy, color=ACCENT, height=0.6
        )
        axes.bar_label(bars, ["" if math.isnan(value) else f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axes.set_title(f"{kind} ({healthy:g} is healthy)", fontsize=10, color=INK)
        axes.set_xlim(healthy, None)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(report.meters)), [label for label, _ in report.meters])
    panels[0].invert_yaxis()
    return figure


HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 72rem; margin: 2rem auto;
         padding: 0 1rem }
  h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
  .says { background: #eff6ff; border-left: 4px solid #2563eb; padding: .8rem 1rem; margin: 1rem 0 }
  .says p { margin: .2rem 0 }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
  th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap }
  th { white-space: normal; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
  tbody tr:first-child td { font-weight: 600 }
  td:first-child, th:first-child { position: sticky; left: 0; background: #fff }
  figure { margin: 0 } svg { width: 100%; height: auto }
  .notes { color: #4b5563; font-size: .9rem }
</style>
"""
PAGE = """<h1>{{ report.recipe }}</h1>
<div class="notes">scale {{ report.settings.scale }}, {{ report.seeds | length }}
seed{{ "s" if report.seeds | length > 1 }}</div>
<div class="says">{% for sentence in report.sentences %}<p>{{ sentence }}</p>{% endfor %}</div>
<div class="wide"><table>
<thead><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in body %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% for title, svg in figures %}
<h2>{{ title }}</h2>
<figure>{{ svg | safe }}</figure>
{% endfor %}
<h2>Every metric, mean over seeds</h2>
<div class="wide"><table>
<thead><tr>{% for name in report.every_metric[0] %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in report.every_metric[1] %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<h2>How it was run</h2>
<ul class="notes">{% for note in report.notes %}<li>{{ note }}</li>{% endfor %}</ul>
<h2>What was entered</h2>
<ul class="notes">{% for row in report.rows if row.seed == report.seeds[0] %}<li><b>{{ row.label }}</b>
<code>{{ row.contestant }}</code></li>{% endfor %}</ul>
"""
