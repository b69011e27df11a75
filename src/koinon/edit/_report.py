"""What edits did, as one HTML page that needs no other file."""

from collections.abc import Mapping, Sequence
from typing import Any

from koinon.bench import figures
from koinon.edit._measures import ASPECTS, WAYS
from koinon.edit._scores import Scored, shown

MEANS = {
    "reliability": "the facts as they were asked",
    "generality": "the facts in other words",
    "locality": "what must not change",
    "portability": "what follows from the facts",
}


def page(found: Scored, facts: Mapping[str, Any], warnings: Sequence[str]) -> str:
    """The page.

    Args:
        found: the scores.
        facts: how it was done, name to value.
        warnings: what was said on the way.
    """
    scores, changed = found.plain(), found.changed()
    aspects = {name: its for name, its in scores.items() if name in MEANS}
    rows = [
        [name, MEANS[name], f"{its['before']:.3f}", *(shown(its[how]) for how in WAYS)] for name, its in aspects.items()
    ]
    return figures.rendered(
        BODY,
        f"{len(found.found)} facts, {facts['method'].partition('(')[0]}",
        rows=rows,
        sentences=_sentences(aspects, len(changed), found.local),
        changed=changed,
        local=found.local,
        facts=found.facts(),
        aspects=list(aspects),
        writing=[[its, *map(_number, scores[its].values())] for its in ("fluency", "perplexity")],
        how=facts,
        warnings=warnings,
        figure=_figure(aspects),
    )


def _sentences(aspects: Mapping[str, Any], changed: int, local: int) -> list[str]:
    its = aspects["reliability"]
    said = [f"The model says {its['exact'][0]:.0%} of the facts it was taught; before, {its['before']:.0%}."]
    if "generality" in aspects:
        said.append(f"Asked in other words, it says {aspects['generality']['exact'][0]:.0%} of them.")
    if local:
        known = f"{aspects['locality']['known']:.0%} of them were right before"
        said.append(f"Of {local} answers that must not change, {changed} did; {known}.")
    else:
        said.append("There was no probe of locality: this page cannot tell what else changed.")
    return said


def _figure(aspects: Mapping[str, Mapping[str, Any]]) -> str:
    with figures.styled():
        figure = figures.Figure(figsize=(figures.WIDTH, 0.9 + 0.4 * len(aspects)), layout="constrained")
        axes = figure.subplots()
        for place, its in enumerate(aspects.values()):
            axes.plot([its["before"]], [place], "o", color=figures.INK, markerfacecolor="white", markersize=7)
            _mark(axes, its["exact"], place, figures.ACCENT)
        axes.set_yticks(range(len(aspects)), list(aspects))
        axes.invert_yaxis()
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("exact answers (white: before; line: 95 % interval over facts)")
        return figures.svg(figure)


def comparison(
    rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str], head: Mapping[str, Any], count: int
) -> str:
    """The page of several methods on the same facts.

    Args:
        rows: a finished cell each.
        failed: what could not be run, and why.
        head: what was edited.
        count: how many facts.
    """
    aspects = [aspect for aspect in ASPECTS if any(aspect in row["scores"] for row in rows)]
    tables = [
        (
            how,
            [
                [row["method"], row["way"]]
                + [shown(row["scores"][its][how]) if its in row["scores"] else "-" for its in aspects]
                for row in rows
            ],
        )
        for how in WAYS
    ]
    writing = [
        [row["method"], row["way"], *(_number(row["scores"][its]["now"]) for its in ("fluency", "perplexity"))]
        + [f"{row['seconds'][its]:.2f}" for its in ("a fact", "preparing")]
        for row in rows
    ]
    return figures.rendered(
        COMPARISON,
        f"{count} facts, {len(rows)} ways",
        head=head,
        aspects=aspects,
        tables=tables,
        writing=writing,
        rows=rows,
        failed=failed,
        figure=_compared(rows, aspects),
    )


def _compared(rows: Sequence[Mapping[str, Any]], aspects: Sequence[str]) -> str:
    with figures.styled():
        figure = figures.Figure(figsize=(figures.WIDTH, 1 + 0.32 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(aspects), sharey=True, squeeze=False)[0]
        for axes, aspect in zip(panels, aspects, strict=True):
            for place, row in enumerate(rows):
                if aspect in row["scores"]:
                    _mark(axes, row["scores"][aspect]["exact"], place, figures.ACCENT)
            axes.set_title(aspect, fontsize=10, color=figures.INK)
            axes.set_xlim(-0.05, 1.05)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(rows)), [f"{row['method']}, {row['way']}" for row in rows])
        panels[0].invert_yaxis()
        return figures.svg(figure)


def _mark(axes: Any, score: Sequence[float | None], place: int, color: str) -> None:
    mean, low, high = score
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="round")
    axes.plot([mean], [place], "o", color=color, markersize=7)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


BODY = """<h1>{{ title }}</h1>
<div class="notes">{{ how.base }}</div>
<div class="says">{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}</div>
<div class="wide"><table>
<thead><tr><th>score</th><th>of</th><th>before</th><th>now, exact</th><th>teacher-forced</th>
<th>sampled</th></tr></thead>
<tbody>{% for cells in rows %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<figure>{{ figure | safe }}</figure>
<h2>How it writes</h2>
<div class="wide"><table>
<thead><tr><th></th><th>before</th><th>now</th></tr></thead>
<tbody>{% for cells in writing %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="notes">In brackets: 95 % bootstrap intervals over facts. Fluency is
the entropy of pairs and triples of words in bits, and rewards gibberish; perplexity is what
the model without edits makes of the same texts, and grows with gibberish.</p>
<h2>What else changed: {{ changed | length }} of {{ local }} probes</h2>
{% if changed %}
<div class="wide"><table>
<thead><tr><th>asked</th><th>kind</th><th>before</th><th>now</th><th>probe of</th></tr></thead>
<tbody>{% for its in changed %}<tr><td>{{ its.prompt }}</td><td>{{ its.kind }}</td><td>{{ its.before }}</td>
<td>{{ its.now }}</td><td>{{ its.fact }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h2>Every fact</h2>
<div class="wide"><table>
<thead><tr><th>asked</th><th>taught</th><th>before</th><th>now</th><th>log-probability before</th><th>now</th>
{% for name in aspects %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for its in facts %}<tr><td>{{ its.prompt }}</td><td>{{ its.object }}</td><td>{{ its.before }}</td>
<td>{{ its.now }}</td>{% for value in its["log-probability"] %}<td>{{ "%.2f" | format(value) }}</td>{% endfor %}
{% for name in aspects %}<td>{{ "%.3f" | format(its[name]) if name in its else "-" }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<h2>How it was done</h2>
<ul class="notes">{% for name, value in how.items() %}<li><b>{{ name }}</b> {{ value }}</li>
{% endfor %}
{% for line in warnings %}<li>{{ line }}</li>
{% endfor %}
</ul>
"""
COMPARISON = """<h1>{{ title }}</h1>
<div class="notes">{{ head.base }}</div>
<figure>{{ figure | safe }}</figure>
{% for how, body in tables %}
<h2>{{ how }}</h2>
<div class="wide"><table>
<thead><tr><th>method</th><th>way</th>{% for name in aspects %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for cells in body %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
<h2>Writing and time</h2>
<div class="wide"><table>
<thead><tr><th>method</th><th>way</th><th>fluency</th><th>perplexity of it, without edits</th><th>seconds a fact</th>
<th>seconds before the first</th></tr></thead>
<tbody>{% for cells in writing %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<h2>How it was done</h2>
<ul class="notes">{% for row in rows %}<li><b>{{ row.method }}, {{ row.way }}</b> <code>{{ row.settings }}</code></li>
{% endfor %}
{% for name, why in failed.items() %}<li><b>{{ name }}</b> could not be run: {{ why }}</li>
{% endfor %}
<li>In brackets: 95 % bootstrap intervals over facts. Settings are as given, not tuned.</li></ul>
"""
