"""The pages do what they say: every command and every block of Python runs, the site builds, nothing has drifted."""

import contextlib
import importlib.util
import inspect
import io
import logging
import os
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from koinon import cli
from koinon.bench import compare, figures
from koinon.bench.checks import APPLIED, GENERAL
from koinon.data import sources
from koinon.data.related import related
from koinon.merge._checks import FIXTURE as merge_checks
from koinon.recipes import share
from koinon.share._checks import FIXTURE as share_checks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
WIDTH = "100"
"""Columns of the terminal that the pages' outputs were printed on."""


def module_of(file: Path):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = module_of(ROOT / "docs" / "build.py")
make_ratings = module_of(ROOT / "docs" / "examples" / "make_ratings.py").make_ratings
make_models = module_of(ROOT / "docs" / "examples" / "make_models.py").make_models
make_lm = module_of(ROOT / "docs" / "examples" / "make_lm.py").make_lm


# Pages as blocks.


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks in order."""
    fenced = re.compile(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in fenced.findall(page.read_text("utf-8"))]


def commands_of(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


# The example table, a stand-in for MovieLens, and a terminal of the pages' width.


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The examples' language model, which takes seconds to train."""
    folder = tmp_path_factory.mktemp("language")
    make_lm(folder)
    return folder


@pytest.fixture
def at_home(tmp_path, monkeypatch, language_model):
    """A folder with ``ratings.csv`` and the examples' models, from where nothing reaches the network or stays behind.

    Figures take longest to draw, and are drawn in a test of their own.
    """
    make_ratings(tmp_path / "ratings.csv", people=50)
    make_models(tmp_path)
    shutil.copytree(language_model, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(figures, "page", lambda report: report.recipe)
    monkeypatch.setattr(sources, "get", lambda name: tmp_path / sources.SOURCES[name].file)
    monkeypatch.setitem(share.WORLDS, "movielens", lambda rows: related(4_000))
    monkeypatch.setitem(share.WORLDS, "related", lambda rows: related(4_000))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def run(command: str) -> list[str]:
    """What a koinon command prints; if it ends with exit code 2, the one line it says instead."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(shlex.split(command)[1:])
        except SystemExit as end:
            code = end.code
    assert code in (0, 2), f"{command} ends with {code}:\n{out.getvalue()}{err.getvalue()}"
    return (err if code else out).getvalue().splitlines()


def in_seconds(command: str) -> str:
    """The same comparison as small as it gets, in this process; other commands as they are."""
    if not command.startswith("koinon compare share"):
        return command
    backend = re.search(r" --backend (\w+)", command)
    if backend:
        assert backend[1] in compare.BACKENDS
    command = re.sub(r" --(scale|jobs|backend) \S+", "", command)
    methods = re.search(r" --methods((?: [^\s-]\S*)+)", command)
    chosen = methods[1].split()[:2] if methods else ["home", "shared_bottom"]
    command = command.replace(methods[0], "") if methods else command
    return f"{command} --scale tiny --jobs 1 --methods {' '.join(chosen)}"


def shape(line: str) -> str:
    """A line without its numbers, spaces and rules."""
    line = re.sub(r"[+-]?\d[\d,]*(\.\d+)?(e-?\d+)?", "0", line)
    return " ".join(re.sub(r"[─━]+", "", line).split())


def check_output(command: str, printed: list[str], shown: list[str]) -> None:
    """Every line that the page shows was printed, up to numbers; a comparison's up to who won."""
    shown = [line for line in shown if line.strip() and line != "..."]
    if command.startswith("koinon compare"):
        headers = {shape(line) for line in printed if line.split()[:1] == ["method"]}
        for line in shown:
            assert line.split()[0] != "method" or shape(line) in headers, f"{command}: no table is headed {line!r}"
        return
    exact = command.split()[1] in ("check", "list", "show")
    form = (lambda line: " ".join(line.split())) if exact else shape
    there = {form(line) for line in printed}
    for line in shown:
        assert form(line) in there, f"{command} does not print {line!r} but\n" + "\n".join(printed)


def check_command(command: str, shown: list[str]) -> None:
    """Run it if it is koinon's; otherwise look whether what it names exists."""
    words = shlex.split(command)
    while "=" in words[0]:
        assert words.pop(0).split("=")[0] in inspect.getsource(compare)
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
            assert set(re.search(r"\[(.*)\]", what)[1].split(",")) <= set(extras)
        case ["koinon", *rest]:
            quick = in_seconds(shlex.join(["koinon", *rest]))
            check_output(quick, run(quick), shown)
        case _:
            raise AssertionError(f"no way is known to check {command!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, at_home):
    namespace: dict = {"__name__": "page"}
    said = ""
    for block in blocks_of(page):
        if block.language == "console":
            for command, shown in commands_of(block):
                check_command(command, shown)
        elif block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, page.name, "exec"), namespace)
            said = out.getvalue()
        elif said:  # what the block above prints
            assert said == block.text
            said = ""
        else:
            assert block.text.splitlines() == Path("ratings.csv").read_text("utf-8").splitlines()[:4]


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; mkdocs in strict mode stops at a warning."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build.build(folder / "docs", folder / "site")
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not said
    return folder / "site"


class Links(HTMLParser):
    """What a page points to, what it loads, and the places in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("href"):
            self.loaded.append(found["href"])


def test_the_site_points_to_what_is_there_and_loads_nothing_from_elsewhere(site):
    pages = {file: Links(file.read_text("utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) > 15
    for file, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(https?:)?//", url)], file
        for url in [*page.links, *page.loaded]:
            if re.match(r"[a-z]+:", url):
                continue
            path, _, place = url.partition("#")
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.relative_to(site)}: {url}"
            assert target not in pages or place in pages[target].places, f"{file.relative_to(site)}: {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?://|@import", style.read_text("utf-8")), style


def test_the_generated_pages_hold_what_the_code_says(site):
    ledger = (site / "ledger" / "index.html").read_text("utf-8")
    assert ledger.count("<tr>") == 1 + len(build.ledger_rows())
    for name in build.names():
        facts = build.method_facts(name)
        text = (site / "methods" / name / "index.html").read_text("utf-8")
        assert all(f"<code>{field['name']}</code>" in text for field in facts["fields"])


def test_a_generated_page_of_results_holds_every_row(tmp_path, monkeypatch):
    rows, settings = made_rows()
    monkeypatch.setattr(build, "RESULTS", tmp_path)
    (tmp_path / "share-movielens.jsonl").write_text("".join(build.json.dumps(row) + "\n" for row in rows))
    (tmp_path / "share-movielens.settings.json").write_text(build.json.dumps(settings))
    pages = build.results()
    assert "| home | 0.7" in pages["results/share-movielens.md"]
    assert "<svg" in pages["results/share-movielens.html"]
    table = build.with_rows("<!-- rows:share-movielens -->\nold\n<!-- /rows -->\n")
    assert "old" not in table
    assert table.count("\n| home | 0.7") == 1
    assert build.with_rows(table) == table
    chosen = build.with_rows("<!-- rows:share-movielens like.auc -->\n<!-- /rows -->\n")
    assert "| method | mean.auc (95 % interval) | like.auc |\n" in chosen
    assert build.with_rows(chosen) == chosen


def made_rows():
    """Rows as a comparison of two contestants on two seeds gives them."""
    metrics = {"home": 0.7, "shared_bottom": 0.6}
    rows = [
        {
            "label": label,
            "contestant": label,
            "seed": seed,
            "metrics": {"mean.auc": value + seed / 100, "like.auc": value},
            "draws": {"mean.auc": [value, value + 0.01], "like.auc": [value, value]},
            "meters": {"collapse": 0.1, "spread": 1.0, "degradation": 0.2} if label == "home" else {},
            "cost": {"trained": 10, "active": 10, "samples_per_second": 1000, "peak_mb": 10.0},
            "versions": {},
            "git": None,
            "machine": "one",
        }
        for label, value in metrics.items()
        for seed in (0, 1)
    ]
    settings = {"data": "movielens", "scale": "small", "rows": [8, 1, 1], "split": "at random", "sparse": [],
                "main": "mean.auc", "shown": ["like.auc"], "baseline": "shared_bottom"}  # fmt: skip
    return rows, settings


# No drift.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_hold_the_committed_rows(page):
    text = page.read_text("utf-8")
    assert page.name != "README.md" or build.BLOCK.search(text)
    assert build.with_rows(text) == text, f"{page.name}'s table is not what the rows say: run `make docs`"


def test_contributing_lists_every_check():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = re.search(r"<!-- checks -->\n(.*)<!-- /checks -->", text, re.DOTALL)[1]
    assert re.findall(r"^\| `(.*?)` \|", listed, re.MULTILINE) == [
        *GENERAL, *APPLIED, "<field>_is_live", *share_checks.properties, *merge_checks.properties]  # fmt: skip


def test_contributing_names_blocks_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    blocks = text[text.index("## Blocks in `nn`") : text.index("## Checks")]
    for module, first, others in re.findall(r"^\| `(nn\.\w+)\.(\w+)`((?:, `\w+`)*) \|", blocks, re.MULTILINE):
        found = importlib.import_module(f"koinon.{module}")
        for name in [first, *re.findall(r"\w+", others)]:
            assert hasattr(found, name), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page):
    for url in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if not re.match(r"https?://|#", url):
            assert (page.parent / url.split("#")[0]).exists(), f"{page.name}: {url}"


def test_pages_name_only_variables_that_are_read():
    source = "".join(file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"\b(KOINON_[A-Z_]+|[A-Z]+_ADDRESS)\b", page.read_text("utf-8")):
            assert name in source, f"{page.name}: {name}"


def test_the_gallery_of_merging_draws_its_figure(tmp_path, monkeypatch):
    gallery = module_of(ROOT / "docs" / "examples" / "merge_gallery.py")
    tried = ["merge.average", "merge.dare", "merge.adamerging"]
    monkeypatch.setattr(gallery, "names", lambda capability: tried)
    found = gallery.gallery(steps=30)
    assert list(found)[-3:] == tried
    assert found["expert: right"]["right"] > found["base"]["right"] + 0.2
    gallery.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_gallery_of_editing_draws_its_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")  # as where it is run from
    gallery = module_of(ROOT / "docs" / "examples" / "edit_gallery.py")
    found = gallery.gallery(("edit.finetune", "edit.grace"))
    assert list(found) == ["edit.finetune", "edit.grace"]
    assert all(0 <= value <= 1 for scores in found.values() for value in scores.values())
    assert found["edit.grace"]["reliability"] > 0.5
    gallery.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_table_is_the_same_each_time(tmp_path):
    for name in ("one.csv", "other.csv"):
        make_ratings(tmp_path / name, people=5)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()
    assert os.path.getsize(tmp_path / "one.csv") > 1000
