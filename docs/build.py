"""Write the pages that follow from the code and the committed rows, refresh the tables in those written by
hand, and build the site.

python docs/build.py
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config

from koinon.bench.claims import RESULTS, read_rows
from koinon.bench.figures import figures, page
from koinon.bench.pages import ledger_rows, method_facts
from koinon.bench.report import Report
from koinon.core import capabilities, names, summary
from koinon.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- rows:([\w-]+)((?: [\w.]+)*) -->\n).*?(<!-- /rows -->)", re.DOTALL)
NOT_YET = "Not measured yet."


def main() -> None:
    """Refresh the tables in pages written by hand, write the generated ones, and build ``site/``."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for written in (ROOT / "README.md", *(ROOT / "docs" / "guides").glob("*.md")):
        written.write_text(with_rows(written.read_text(encoding="utf-8")), encoding="utf-8")
    build(ROOT / "docs", ROOT / "site")


def build(docs: Path, site: Path) -> None:
    """Write the generated pages into ``docs`` and the site into ``site``; a warning is an error."""
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site))
    config.nav = [*config.nav, *generate(docs)]
    build_site(config)


def generate(docs: Path) -> list[Any]:
    """Write every generated page; returns their part of the navigation."""
    sections = {"Methods": methods(), "Systems": systems(), "Results": results()}
    files = {name: text for pages in sections.values() for name, text in pages.items()}
    files["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, text in files.items():
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).write_text(text, encoding="utf-8")
    shown = {title: [name for name in pages if name.endswith(".md")] for title, pages in sections.items()}
    return [*({title: pages} for title, pages in shown.items()), {"Contributing": "contributing.md"}]


def methods() -> dict[str, str]:
    """One page a method, and a list of them."""
    lines = ["# Methods", "", "A method is one file: a frozen dataclass with one verb.", ""]
    for capability in capabilities():
        found = names(capability)
        body = [[f"[`{name}`]({name}.md)", summary(name)] for name in found]
        lines += [f"## {capability}", "", summary(f"{capability}._contract"), ""]
        lines += table(["method", "what it does"], body)
    return {"methods/index.md": page_of(lines)} | {f"methods/{name}.md": method(name) for name in names()}


def method(name: str) -> str:
    """What a method does, where it comes from, its settings."""
    facts = method_facts(name)
    capability, file = name.split(".")
    lines = [f"# {name}", "", facts["summary"], "", facts["more"], ""]
    lines += [f"Paper: [{facts['paper']['title']}]({facts['paper']['url']}) ({facts['paper']['year']})", ""]
    lines += ["```python", f"from {facts['module']} import {facts['class']}", "```", ""]
    lines += ["```console", f"$ koinon {capability} {file} --help", "```", "", "## Settings", ""]
    body = [[f"`{f['name']}`", f"`{f['default']}`", f["meaning"]] for f in facts["fields"]]
    lines += [*table(["setting", "default", "meaning"], body), ""]
    if facts["null"]:
        lines += [f"With `{facts['null']}` it equals the baseline, which a test checks.", ""]
    lines += [f"Exempt from the check `{check}`: {reason}." for check, reason in facts["exempt"].items()]
    for system in facts["systems"]:
        lines += ["", f"Part of [system {system['number']}](../systems/{system['number']}.md): {system['title']}."]
    return page_of(lines)


def systems() -> dict[str, str]:
    """The ledger, and a page for each system that has methods."""
    rows = ledger_rows()
    here = [row for row in rows if row["methods"]]
    body = []
    for row in rows:
        title = f"[{row['title']}]({row['url']})"
        state = f"[{row['state']}](systems/{row['number']}.md)" if row["methods"] else row["state"]
        body.append([str(row["number"]), title, str(row["year"]), row["capability"], state])
    lines = ["# Ledger", ""]
    lines += [
        f"koinon is meant to hold {len(rows)} published systems. It holds {len(here)} now; the others are absent."
    ]
    lines += ["Each claim of a paper is evaluated from committed rows. It is *held* if the 95 % interval of the paired"]
    lines += ["difference lies on the claimed side of zero, *not held* if it does not, *untested* without rows.", ""]
    lines += table(["nr", "system", "year", "capability", "state"], body)
    pages = {"ledger.md": page_of(lines)}
    return pages | {f"systems/{row['number']}.md": system(row) for row in here}


def system(row: Mapping[str, Any]) -> str:
    """One system: its methods, departures and claims."""
    lines = [f"# {row['number']}. {row['title']}", ""]
    lines += [f"[{row['url']}]({row['url']}) ({row['year']})", ""]
    lines += [f"Capability: {row['capability']}. State: {row['state']}.", ""]
    lines += ["Methods: " + ", ".join(f"[`{name}`](../methods/{name}.md)" for name in row["methods"]) + ".", ""]
    if row["departures"]:
        lines += ["## Departures", "", *[f"- {departure}" for departure in row["departures"]], ""]
    for recipe in dict.fromkeys(claim["recipe"] for claim in row["claims"]):
        claims = [claim for claim in row["claims"] if claim["recipe"] == recipe]
        lines += [f"## Claims on {recipe}", "", f"Rows: [{recipe}](../results/{recipe}.md).", ""]
        body = [[c["says"], c["metric"], c["state"], c["text"], c["why"]] for c in claims]
        lines += [*table(["claim", "metric", "state", "difference [95 % interval]", "why"], body), ""]
    return page_of(lines)


def results() -> dict[str, str]:
    """A page for each comparison that a claim asks for, from its committed rows."""
    asked = {claim.recipe for system in SYSTEMS for claim in system.claims}
    pages: dict[str, str] = {}
    lines = ["# Results", "", "Committed rows of finished comparisons, rerun from the code they are kept with.", ""]
    known = {file.name.removesuffix(".settings.json") for file in RESULTS.glob("*.settings.json")}
    for recipe in sorted(asked | known):
        report = report_of(recipe)
        if report is None:
            pages[f"results/{recipe}.md"] = page_of([f"# {recipe}", "", NOT_YET])
        else:
            pages[f"results/{recipe}.html"] = page(report)
            drawn = figures(report)
            pages |= {f"results/{recipe}-{name}.svg": svg for name, (_, svg) in drawn.items()}
            shown = [f"\n## {title}\n\n![{title}]({recipe}-{name}.svg)" for name, (title, _) in drawn.items()]
            whole = f"[The report as one page]({recipe}.html){{target=_blank}}"
            head = "---\nhide: [toc]\n---"
            pages[f"results/{recipe}.md"] = page_of([head, report.markdown(), *shown, "", whole])
        lines.append(f"- [{recipe}]({recipe}.md): " + (NOT_YET if report is None else report.sentences[0]))
    return {"results/index.md": page_of(lines)} | pages


def report_of(recipe: str) -> Report | None:
    """The report of a comparison's committed rows; None if it has none."""
    rows = read_rows(RESULTS / f"{recipe}.jsonl")
    if not rows:
        return None
    return Report(recipe, json.loads((RESULTS / f"{recipe}.settings.json").read_text(encoding="utf-8")), rows)


def with_rows(text: str) -> str:
    """The text with what stands between ``<!-- rows:NAME -->`` and ``<!-- /rows -->`` made anew.

    Words behind the name are metrics: they stand in place of the difference and the costs.
    """

    def anew(match: re.Match[str]) -> str:
        return f"{match[1]}{short(report_of(match[2]), match[3].split())}\n{match[4]}"

    return BLOCK.sub(anew, text)


def short(report: Report | None, metrics: Sequence[str] = ()) -> str:
    """The columns of a report's table that a first look needs, its sentences, and how it was run."""
    if report is None:
        return NOT_YET
    header, body = report.table
    wanted = [0, 1, *(header.index(name) for name in metrics)]
    if not metrics:
        wanted += [2, *(i for i, name in enumerate(header) if name.startswith("sparse."))]
        wanted += [i for i, name in enumerate(header) if name in ("parameters", "samples/s")]
    lines = table([header[i] for i in wanted], [[cells[i] for i in wanted] for cells in body])
    return "\n".join([*lines, "", *report.sentences, "", *[f"- {note}" for note in report.notes]])


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]


def page_of(lines: Sequence[str]) -> str:
    """The lines as a page."""
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
