"""The command line: thin, and parsed in two stages so that help and lists never import torch."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from koinon import core
from koinon.core import UserError, pick
from koinon.terminal import keeping, print_facts, print_table, progress, say, waiting

T = TypeVar("T")
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what a person can put right is one line on stderr and exit code 2."""
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        sys.stdout.flush()
        said = " ".join(str(error).split())
        # A name from a file could hold what a terminal obeys.
        said = "".join(its if its.isprintable() else "\N{REPLACEMENT CHARACTER}" for its in said)
        print(f"koinon: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("; ".join(["koinon: stopped", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: list[str]) -> None:
    """First stage: the command's name; then its dataclass parses the rest."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        print(f"koinon {importlib.metadata.version('koinon')}")
        return
    name, rest = pick(arguments[0], [*COMMANDS, *core.capabilities()], "command"), arguments[1:]
    if name in COMMANDS:
        COMMANDS[name](rest)
    else:
        capability(name, rest)


def overview() -> str:
    """What ``koinon --help`` prints."""
    lines = ["usage: koinon COMMAND ... (koinon COMMAND --help tells its options)", ""]
    lines += [f"  {name:12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    for name in core.capabilities():
        methods = ", ".join(method.split(".")[1] for method in core.names(name))
        lines.append(f"  {name:12}{core.summary(f'{name}._contract')} Methods: {methods}.")
    return "\n".join(lines)


# Commands, each from its arguments.


def list_(arguments: list[str]) -> None:
    """Every method in one line."""

    @dataclass(frozen=True)
    class List:
        capability: tyro.conf.Positional[str] = ""
        """Only this capability's."""
        json: Json = False
        """For machines."""

    options = parse(List, arguments, "list")
    found = [{"name": name, "summary": core.summary(name)} for name in core.names(options.capability or None)]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(["method", "what it does"], [list(row.values()) for row in found])


def show(arguments: list[str]) -> None:
    """A method's mechanism, paper, settings and the systems it belongs to."""

    @dataclass(frozen=True)
    class Show:
        method: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]
        """As `koinon list` names it."""
        json: Json = False
        """For machines."""

    options = parse(Show, arguments, "show")
    from koinon.bench.pages import method_facts

    facts = method_facts(options.method)
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{facts['name']}\n{facts['summary']}\n\n{facts['paper']['title']} ({facts['paper']['year']})")
    print(f"{facts['paper']['url']}\n")
    print_table(["setting", "default", "meaning"], [[f["name"], f["default"], f["meaning"]] for f in facts["fields"]])
    print("at its null settings it equals the baseline: " + (facts["null"] or "its defaults"))
    for system in facts["systems"]:
        print(f"part of system {system['number']}: {system['title']}")


def compare(arguments: list[str]) -> None:
    """Compare a capability's methods on real data or your own, at equal budget."""
    recipes = sorted(file.stem for file in (core.PACKAGE / "recipes").glob("[!_]*.py"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: koinon compare CAPABILITY ... (there is: {', '.join(recipes)}; add --help for its options)")
        return
    name = pick(arguments[0], recipes, "comparison")
    recipe_options: Any = importlib.import_module(f"koinon.recipes.{name}").options(arguments[1:])

    @dataclass(frozen=True)
    class Compare:
        what: recipe_options
        out: Path | None = None
        """Folder for finished cells and reports; runs/NAME-SCALE by default. Run again to continue."""
        methods: tuple[str, ...] = ()
        """Only these contestants, by the names the table gives them."""
        seeds: int | None = None
        """How many seeds; the scale's number by default."""
        first_seed: int = 0
        """The first of them, such as one that was not looked at while a recipe was made."""
        jobs: int | None = None
        """Parallel processes of one thread; one a core by default."""
        backend: str = "loky"
        """loky (processes here), dask or ray (a cluster, through joblib)."""
        json: Json = False
        """Print the report as JSON."""

    Compare.__doc__ = recipe_options.__doc__
    options = parse(Compare, arguments[1:], f"compare {name}")
    if min(options.seeds or 1, options.jobs or 1) < 1 or 0 in (options.seeds, options.jobs):
        raise UserError("--seeds and --jobs take a number from 1")
    if options.first_seed < 0:
        raise UserError("--first-seed takes a number from 0")
    from koinon.bench import compare as engine
    from koinon.bench.report import Report

    recipe = options.what.recipe()
    world = recipe.prepare()
    folder = options.out or Path("runs") / f"{recipe.name}-{recipe.scale}"
    start = time.perf_counter()
    with progress(f"comparing in {folder}") as tally, keeping():
        seeds = range(options.first_seed, options.first_seed + (options.seeds or recipe.seeds))
        rows = engine.compare(recipe, world, seeds, folder, options.methods, options.jobs, options.backend, tally)
    wall = time.perf_counter() - start
    report = Report(recipe.name, engine.read_whole(folder / "comparison.json")["settings"], rows)
    page = report.write(folder)
    print(report.json() if options.json else report.text())
    if tally.fresh:
        cells = sum(row["cost"]["cell_seconds"] for row in tally.fresh)
        say(f"{len(tally.fresh)} cells, {cells:.0f} s of work, in {wall:.0f} s")
    say(f"report: {page}")


def check(arguments: list[str]) -> None:
    """Check a method of your own (or one of koinon's) as koinon checks its own."""

    @dataclass(frozen=True)
    class Check:
        method: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]
        """A name as `koinon list` gives it, a module path, or a file ending in .py."""
        json: Json = False
        """For machines."""

    options = parse(Check, arguments, "check")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for a module of one's own
    kind = core.load(options.method)
    import torch

    from koinon.bench.checks import checks_of

    torch.set_num_threads(1)
    found = checks_of(kind)
    results = [{"check": c.name, "result": f"exempt: {c.exempt}" if c.exempt else _outcome_of(c.run)} for c in found]
    failed = [row for row in results if row["result"] != "passed" and not row["result"].startswith("exempt: ")]
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print_table(["check", "result"], [list(row.values()) for row in results])
        print(f"{len(results) - len(failed)} of {len(results)} hold")
    if failed:
        sys.exit(1)


def ledger(arguments: list[str]) -> None:
    """The 81 published systems and what became of their claims."""

    @dataclass(frozen=True)
    class Ledger:
        system: tyro.conf.Positional[int] = 0
        """Only this number, with its claims."""
        json: Json = False
        """For machines."""

    options = parse(Ledger, arguments, "ledger")
    from koinon.bench.pages import ledger_rows
    from koinon.systems import SYSTEMS

    if not 0 <= options.system <= len(SYSTEMS):
        raise UserError(f"there is no system {options.system}: they are numbered 1 to {len(SYSTEMS)}")
    rows = [row for row in ledger_rows() if options.system in (0, row["number"])]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print_table(
        ["nr", "system", "year", "capability", "state"],
        [[str(r["number"]), r["title"], str(r["year"]), r["capability"], r["state"]] for r in rows],
    )
    if options.system:
        print_table(
            ["on", "claim", "state", "difference", "why"],
            [[c["recipe"], c["says"], c["state"], c["text"], c["why"]] for c in rows[0]["claims"]],
        )


def report(arguments: list[str]) -> None:
    """Write and print the report of a comparison's folder again."""

    @dataclass(frozen=True)
    class ReportOf:
        folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
        """Where `koinon compare` kept its cells."""
        json: Json = False
        """Print the report as JSON."""

    options = parse(ReportOf, arguments, "report")
    from koinon.bench.report import read_report

    found = read_report(options.folder)
    print(found.json() if options.json else found.text())
    say(f"report: {found.write(options.folder)}")


def data(arguments: list[str]) -> None:
    """The data sets and models koinon can fetch or make, and `koinon data get NAME`."""

    @dataclass(frozen=True)
    class Data:
        verb: tyro.conf.Positional[str] = "list"
        """list or get."""
        name: tyro.conf.Positional[str] = ""
        """What to get."""
        json: Json = False
        """For machines."""

    options = parse(Data, arguments, "data")
    from koinon.data import sources
    from koinon.lm import shelf

    places = {**dict.fromkeys(sources.SOURCES, sources.path_of), **dict.fromkeys(shelf.MODELS, shelf.place)}
    if pick(options.verb, ["list", "get"], "verb of data") == "get":
        if not options.name:
            raise UserError(f"koinon data get NAME: there is {', '.join(places)}")
        if pick(options.name, places, "data source") in sources.SOURCES:
            path = sources.get(options.name)
        else:
            with waiting(f"making {options.name}", "steps") as told:
                path = shelf.path(options.name, told)
        print(json.dumps({"path": str(path)}) if options.json else path)
        return
    every: dict[str, Any] = {**sources.SOURCES, **shelf.MODELS}
    rows = [
        {"name": name, "what": s.what, "size": s.size, "licence": s.licence, "here": places[name](name).exists()}
        for name, s in every.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        cells = [[str(r["name"]), str(r["what"]), f"{r['size']:,}", str(r["licence"]), str(r["here"])] for r in rows]
        print_table(["name", "what", "bytes", "licence", "here"], cells)


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "list": list_,
    "show": show,
    "compare": compare,
    "check": check,
    "ledger": ledger,
    "report": report,
    "data": data,
}


def capability(name: str, arguments: list[str]) -> None:
    """``koinon CAPABILITY METHOD ...`` applies a method to one's own; ``koinon CAPABILITY VERB ...`` goes on."""
    methods = [method.split(".")[1] for method in core.names(name)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: koinon {name} METHOD ... (add --help for its options)\n{core.summary(f'{name}.job')}\n")
        for method in methods:
            print(f"  {method:16}{core.summary(f'{name}.{method}')}")
        return
    what, rest = arguments[0], arguments[1:]
    job = importlib.import_module(f"koinon.{name}.job")
    if what.startswith("-") and "" in job.VERBS:  # options alone
        what, rest = "", arguments
    if what in job.VERBS:
        result: Any = parse(_with_json(job.VERBS[what]), rest, f"{name} {what}".strip())
        with waiting(f"{name} {what}".strip(), job.Job.unit) as told:
            facts = result.it.run(told)
        print_facts(facts, result.json)
        return
    if "." in what:
        sys.path.insert(0, os.getcwd())
        kind = core.load(what)
    else:
        kind = core.load(f"{name}.{pick(what, [*methods, *job.VERBS], f'method of {name}')}")
    fields = [("method", kind), ("job", job.Job)]
    both = make_dataclass("Both", fields, frozen=True, namespace={"__doc__": job.Job.__doc__})
    options: Any = parse(_with_json(both), rest, f"{name} {what}")
    with waiting(f"{name} {what}", job.Job.unit) as told:
        facts = options.it.job.run(options.it.method, told)
    print_facts(facts, options.json)


# Parsing and printing.


def parse(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """The dataclass from its flags; what tyro would say in a box is one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=f"koinon {command}", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(said.getvalue(), command)) from None


def _one_line(box: str, command: str) -> str:
    """The first paragraph of a box, drawn in Unicode or ASCII, and the flags it suggests."""
    lines = [re.sub(r"^(│ |  )", "", line).rstrip("│ ") for line in box.strip("\n").splitlines()[1:]]
    parts = [part.strip("\n") for part in re.split(r"(?m)^\W*[─-]{3,}.*$", "\n".join(lines)) if part.strip()]
    said = " ".join(parts[0].split())
    flags = [re.findall(r"(?m)^ {4}(--[\w-]+|[A-Z]{2,})", part) for part in parts]  # meanings are indented deeper
    for part, its in zip(parts[1:], flags[1:]):
        if part.startswith("Perhaps you meant"):
            said += "; did you mean " + " or ".join(its) + "?"
        if part.startswith("Unrecognized options") and said.startswith("Missing from") and its:
            pick(its[0], flags[0], "option")
    if said.startswith("Missing from"):
        return f"missing {', '.join(flags[0])}; see koinon {command} --help"
    return said[:1].lower() + said[1:]


def _with_json(kind: type) -> type:
    flag = Annotated[Json, tyro.conf.arg(help="For machines.")]
    fields: list[Any] = [("it", kind), ("json", flag, dataclasses.field(default=False))]
    return make_dataclass("WithJson", fields, frozen=True, namespace={"__doc__": kind.__doc__})


def _outcome_of(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "passed"


if __name__ == "__main__":
    main()
