"""The rules of the house, checked by machine: layers, names, lengths, repetition, and imports without side effects."""

import ast
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from koinon import core
from koinon.bench.checks import checks_of
from koinon.data.sources import SOURCES
from koinon.recipes.share import WORLDS

ROOT = core.PACKAGE.parent.parent
SOURCE = sorted(core.PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
METHODS = [core.PACKAGE / f"{name.replace('.', '/')}.py" for name in core.names()]
PROSE = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml")
    if path.is_file()
]
LAYERS = [
    {"core"},
    {"systems", "terminal"},
    {"bench", "nn"},
    {"data"},
    {"lm", "graph"},
    set(core.capabilities()),
    {"recipes"},
    {"cli"},
]
LIGHT = ["core", "systems", "cli", "bench.claims", "bench.pages", "bench.statistics", "bench.report", "bench.compare"]
CHECKS = {"edit": 392, "merge": 286, "share": 182}
"""How many checks a capability's methods have in all, so that none can vanish."""


def part_of(module: str) -> str:
    """``koinon.nn.experts`` is of the part ``nn``."""
    return module.split(".")[1] if "." in module else ""


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def module_of(path: Path) -> str:
    return ".".join(["koinon", *path.relative_to(core.PACKAGE).with_suffix("").parts])


def imported(path: Path) -> set[str]:
    """Every module of koinon that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"koinon.{a.name}" for a in node.names} if node.module == "koinon" else {node.module or ""}
    return {name for name in found if name.startswith("koinon.")}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_part_has_a_layer():
    parts = {part_of(module_of(path)) for path in SOURCE} - {"__init__"}
    assert parts <= set().union(*LAYERS)


@pytest.mark.parametrize("path", SOURCE, ids=shown)
def test_imports_go_down_only(path):
    """core < systems < bench, nn < data < lm, graph < capabilities < recipes < cli; within a folder they are free."""
    own = part_of(module_of(path))
    if own == "__init__":
        return
    for name in imported(path):
        other = part_of(name)
        assert other == own or layer_of(other) < layer_of(own), f"{shown(path)} imports {name}"


def test_a_wrong_import_would_be_seen(tmp_path):
    """The reader of imports reads them in functions and in both forms."""
    (tmp_path / "a.py").write_text("def f():\n    from koinon import cli\n    import koinon.share.home\n")
    assert imported(tmp_path / "a.py") == {"koinon.cli", "koinon.share.home"}
    assert layer_of("nn") < layer_of("data") < layer_of("share") < layer_of("recipes") < layer_of("cli")


def test_names_say_what_is_inside():
    for path in (*core.PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*"), *(ROOT / "benchmarks").rglob("*")):
        assert path.stem.strip("_") not in ("utils", "util", "common", "misc", "base", "helpers", "helper"), path


def test_init_files_are_empty():
    assert [shown(path) for path in SOURCE if path.name == "__init__.py" and path.read_text()] == []


@pytest.mark.parametrize("name", core.names())
def test_a_method_file_defines_one_method(name):
    assert issubclass(core.load(name), core.Method)  # load refuses none and two


def test_lengths():
    """A long method file lacks a block or is two methods. ``systems.py`` is data: a row for each of the 81 papers."""
    limits = {path: 420 for path in SOURCE if path.name != "systems.py"}
    limits |= dict.fromkeys((*METHODS, *core.PACKAGE.glob("*/job.py")), 200)
    limits |= dict.fromkeys(core.PACKAGE.glob("*/_contract.py"), 80)
    found = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    assert {
        name: f"{found[name]} > {limit}" for path, limit in limits.items() if found[name := shown(path)] > limit
    } == {}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_no_torch(name):
    program = f"import sys, koinon.{name}; assert not {{'torch', 'polars', 'sklearn'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = core.PACKAGE / f"{name.replace('.', '/')}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        assert "torch" not in {word.split(".")[0] for word in names}


def compared_names(tree: ast.AST, known: set[str]) -> list[int]:
    """Lines that compare with a method's or data set's name, or branch on something's ``name``."""
    lines = []
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    branches = {part for test in tests for part in ast.walk(test)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            equal = node in branches and all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
            if equal and any(isinstance(side, ast.Attribute) and side.attr in ("name", "__name__") for side in sides):
                lines.append(node.lineno)
            words = [leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)]
            if known & {word for word in words if isinstance(word, str)}:
                lines.append(node.lineno)
        if isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in known:
            lines.append(node.value.lineno)
    return lines


NAMES = {*core.names(), *(name.split(".")[1] for name in core.names()), *SOURCES, *WORLDS}


@pytest.mark.parametrize("path", [path for path in SOURCE if path.name not in ("core.py", "systems.py")], ids=shown)
def test_nothing_branches_on_a_name(path):
    """What a method or data set does is its own affair; only ``core.py``, which finds methods, looks at names."""
    assert compared_names(ast.parse(path.read_text(encoding="utf-8")), NAMES) == []


def test_a_branch_on_a_name_would_be_seen():
    for code in (
        "x == 'movielens'",
        "x in ('home', 'ple')",
        "if kind.__name__ == y: pass",
        "1 if m.name != 'a' else 2",
    ):
        assert compared_names(ast.parse(code), NAMES) == [1], code
    assert compared_names(ast.parse("match x:\n    case 'mmoe': pass"), NAMES) == [2]
    assert compared_names(ast.parse("x == 'binary'; x.size == 3; y in names"), NAMES) == []


def test_no_machine_is_named_and_nothing_is_left_to_do():
    place = re.compile(r"(?<![\w.:/~$}])/(?:home|root|tmp|work|Users|mnt|opt|scratch)/\w")
    unfinished = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")
    for path in (*SOURCE, *TESTS, *PROSE, *(ROOT / "benchmarks").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not place.search(line), f"{shown(path)}:{number}: {line}"
            assert not unfinished.search(line), f"{shown(path)}:{number}: {line}"


def calls(path: Path) -> set[str]:
    """Every dotted name a file uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_nothing_from_a_file_is_unpickled_or_run():
    """The checks' own round trip of a method, and of its ``repr``, is all there is."""
    unsafe = {
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "joblib.load",
        "np.load",
        "numpy.load",
        "yaml.load",
        "os.system",
    }
    found = {shown(path): sorted(unsafe & calls(path)) for path in SOURCE if unsafe & calls(path)}
    assert found == {"src/koinon/bench/checks.py": ["pickle.loads"], "src/koinon/data/checkpoints.py": ["torch.load"]}
    for path in SOURCE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
        assert all("weights_only=True" in ast.unparse(load) for load in loads)  # tensors, never code
        ran = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not ran & {"exec", "compile", "__import__"} | (ran & {"eval"} if path.name != "checks.py" else set())


def test_no_test_is_left_out():
    marks = {"skip", "skipif", "xfail", "importorskip"}
    for path in TESTS:
        names = {name.rpartition(".")[2] for name in calls(path)}
        assert not marks & names, shown(path)


def test_importing_everything_changes_nothing():
    """What others' imports do to warnings and the like is theirs: they come first."""
    program = """
        import contextlib, importlib, logging, os, random, signal, sys, threading, warnings
        for name in ("torch", "numpy", "polars", "sklearn.ensemble", "sklearn.preprocessing", "matplotlib.figure",
                     "matplotlib.backends.backend_svg", "jinja2", "joblib", "rich.table", "rich.progress", "tyro",
                     "safetensors.torch", "jaxtyping", "platformdirs"):
            importlib.import_module(name)
        import numpy, torch

        def state():
            generator = numpy.random.get_state()
            return {
                "torch": torch.random.get_rng_state().tolist(),
                "numpy": (generator[1].tolist(), *generator[2:]),
                "random": random.getstate(),
                "folder": os.getcwd(),
                "environment": dict(os.environ),
                "path": list(sys.path),
                "handlers": list(logging.getLogger().handlers),
                "level": logging.getLogger().level,
                "warnings": list(warnings.filters),
                "threads": (torch.get_num_threads(), threading.active_count()),
                "precision": torch.get_default_dtype(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "gradients": torch.is_grad_enabled(),
                "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
                "hook": sys.excepthook,
            }

        before = state()
        for name in sys.argv[1:]:
            importlib.import_module(name)
        after = state()
        assert {key for key in before if before[key] != after[key]} == set()
    """
    program = "\n".join(line.removeprefix("        ") for line in program.splitlines())
    modules = [module_of(path).removesuffix(".__init__") for path in SOURCE]
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def lines_of(path: Path) -> list[str]:
    """A file's lines of code, without imports, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in left_out]
    return [line for line in lines if line and not line.startswith("#")]


def repeated(files: dict[str, list[str]], run: int = 6) -> dict[str, int]:
    """How many of each file's lines lie in a run of at least so many that another file holds as well."""
    holders: dict[tuple[str, ...], set[str]] = {}
    for name, lines in files.items():
        for start in range(len(lines) - run + 1):
            holders.setdefault(tuple(lines[start : start + run]), set()).add(name)
    found = Counter()
    for name, lines in files.items():
        places = [s for s in range(len(lines) - run + 1) if len(holders[tuple(lines[s : s + run])]) > 1]
        found[name] = len(set(itertools.chain.from_iterable(range(s, s + run) for s in places)))
    return {name: count for name, count in found.items() if count}


def test_little_is_written_twice():
    files = {shown(path): lines_of(path) for path in SOURCE}
    found = repeated(files)
    share = sum(found.values()) / sum(len(lines) for lines in files.values())
    assert share <= 0.03, f"{share:.1%} of the lines: {found}"


def test_a_repetition_would_be_seen():
    block = [f"line {number}" for number in range(8)]
    files = {"a": ["x", *block], "b": [*block, "y"], "c": block[:5], "d": [*block[:3], "z", *block[3:5]]}
    assert repeated(files) == {"a": 8, "b": 8}


@pytest.mark.parametrize("capability", core.capabilities())
def test_no_check_vanishes(capability):
    counted = sum(len(checks_of(core.load(name))) for name in core.names(capability))
    assert counted == CHECKS[capability]


def test_methods_are_all_there():
    assert core.names() == [
        "edit.alphaedit", "edit.dilute", "edit.finetune", "edit.grace", "edit.ike", "edit.kn", "edit.lora",
        "edit.memit", "edit.mend", "edit.rome", "edit.serac", "edit.wise",
        "merge.adamerging", "merge.average", "merge.breadcrumbs", "merge.dam", "merge.dare", "merge.fisher",
        "merge.regmean", "merge.slerp", "merge.task_arithmetic", "merge.ties", "merge.twin",
        "share.home", "share.mmoe", "share.ple", "share.shared_bottom", "share.single_task",
    ]  # fmt: skip


@pytest.mark.parametrize("name", core.names())
def test_every_exemption_has_a_reason(name):
    kind = core.load(name)
    assert set(kind.exempt) <= {check.name for check in checks_of(kind)}
    for check, reason in kind.exempt.items():
        assert len(reason) >= 20, f"{name} is exempt from {check}: {reason!r} tells too little"
    assert len(kind.exempt) <= 2
