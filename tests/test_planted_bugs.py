"""Bugs as they happen, planted into copies of the source: each one must be seen by a check or by the equations.

A check that no bug can fail is worth nothing. Each bug here is a small replacement in one file, and names what has to
notice it. The files themselves are not touched.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from oracles.compare import assert_equals_equations

from koinon.bench.checks import checks_of, fixture_of
from koinon.core import PACKAGE, Method, load, names

EQUATIONS = "equals_its_equations"
"""Not a check but the comparison with ``tests/oracles``; for what no property of all methods can see."""


@dataclass(frozen=True)
class Bug:
    """One mistake in one file."""

    id: str
    file: str
    """The module that holds it, without ``koinon.``."""
    edits: tuple[tuple[str, str], ...]
    """Old text, which occurs exactly once, and new text."""
    seen_by: tuple[str, ...]
    """The checks that have to fail."""
    method: str = ""
    """The method to check where the file is no method itself."""
    rebind: tuple[str, ...] = ()
    """The names that come from the mistaken file instead, in all of koinon, where the file is no method itself."""
    error: type[Exception] = AssertionError
    """What the checks raise; a failed assertion, unless the mistake makes the code itself stop."""


def bug(id: str, file: str, old: str, new: str, *seen_by: str, **more) -> Bug:
    """A bug of one edit."""
    return Bug(id, file, ((old, new),), seen_by, **more)


BUGS = [
    # What a method is.
    bug("not_frozen", "share.mmoe", "@dataclass(frozen=True)\n", "", "is_frozen"),
    bug(
        "a_field_is_undocumented",
        "share.mmoe",
        '    """n: number of experts."""\n',
        "",
        "documents_every_field",
    ),
    bug(
        "no_paper",
        "share.shared_bottom",
        '    paper: ClassVar = Paper("Multitask Learning", 1997, "https://doi.org/10.1023/A:1007379606734")\n',
        "",
        "names_its_paper",
    ),
    bug(
        "no_first_line",
        "share.shared_bottom",
        '"""Shared bottom: one network that all tasks read, and a tower for each."""\n',
        "",
        "opens_with_its_mechanism",
    ),
    Bug(
        "inherits_from_a_method",
        "share.mmoe",
        (
            ("class MMoE(Share):", "class MMoE(SharedBottom):"),
            (
                "from koinon.share._contract import Share, Shared\n",
                "from koinon.share._contract import Shared\nfrom koinon.share.shared_bottom import SharedBottom\n",
            ),
        ),
        ("is_final",),
    ),
    # What its fields do.
    bug(
        "null_is_wrong",
        "share.mmoe",
        'null: ClassVar = {"experts": 1}',
        'null: ClassVar = {"experts": 2}',
        "null_equals_baseline",
    ),
    bug("defaults_do_nothing", "share.mmoe", "experts: int = 8", "experts: int = 1", "is_alive"),
    bug("a_field_is_ignored", "share.mmoe", '"swish" if self.swish else "relu"', '"relu"', "swish_is_live"),
    Bug(
        "the_mask_is_never_applied",
        "share.home",
        (
            ('["shared", group] if home.hierarchy else ["shared", *groups]', '["shared", *groups]'),
            ("*([groups[c]] if home.hierarchy else groups)", "*groups"),
        ),
        ("hierarchy_is_live", EQUATIONS),
    ),
    Bug(
        "the_seed_is_ignored",
        "share.shared_bottom",
        (
            ('seed, "swish" if', '0, "swish" if'),
            ("*self.tower), seed)", "*self.tower), 0)"),
        ),
        ("the_seed_matters",),
    ),
    # Random numbers and state.
    bug(
        "parameters_from_the_global_rng",
        "nn.params",
        "torch.rand(out, width, generator=generator)",
        "torch.rand(out, width)",
        "leaves_the_global_rng_alone",
        method="share.shared_bottom",
        rebind=("xavier",),
    ),
    bug(
        "a_seed_of_its_own_each_time",
        "share.mmoe",
        "        tasks = distinct(tasks)\n",
        '        tasks = distinct(tasks)\n        seed = int.from_bytes(__import__("os").urandom(6), "big")\n',
        "repeats_exactly",
    ),
    Bug(
        "a_network_kept_between_calls",
        "share.mmoe",
        (
            ("@dataclass(frozen=True)\n", "KEPT = {}\n\n\n@dataclass(frozen=True)\n"),
            ("return Shared(encoder, trunk,", "return Shared(encoder, KEPT.setdefault(self, trunk),"),
        ),
        ("repeats_exactly",),
    ),
    bug(
        "the_encoder_is_not_copied",
        "share._contract",
        "self.encoder = copy.deepcopy(encoder)",
        "self.encoder = encoder",
        "leaves_its_inputs_alone",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "the_encoder_is_frozen",
        "share._contract",
        "self.encoder = copy.deepcopy(encoder)",
        "self.encoder = copy.deepcopy(encoder).requires_grad_(False)",
        "everything_learns",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "the_inputs_are_changed_in_place",
        "share._contract",
        "self.encoder(inputs)",
        "self.encoder(inputs.sub_(0.1))",
        "leaves_its_inputs_alone",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "running_statistics_are_not_saved",
        "nn.experts",
        'self.register_buffer("running_mean", torch.zeros(total))',
        'self.register_buffer("running_mean", torch.zeros(total), persistent=False)',
        "all_state_is_saved",
        method="share.home",
        rebind=("Bank",),
    ),
    bug(
        "gate_weights_are_not_registered",
        "nn.experts",
        "self.weight = nn.Parameter(torch.stack(rows).view(len(self.readers), visible, width))",
        "self.weight = torch.stack(rows).view(len(self.readers), visible, width)",
        "all_state_is_saved",
        method="share.mmoe",
        rebind=("Gates",),
    ),
    # The network.
    bug(
        "probabilities_instead_of_logits",
        "share._contract",
        ".squeeze(-1)  # batch task",
        ".squeeze(-1).sigmoid()  # batch task",
        "every_task_is_learned",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "towers_are_swapped",
        "share._contract",
        "out.unbind(1)",
        "out.flip(1).unbind(1)",
        "towers_learn_their_own_task_only",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "outputs_in_another_order",
        "share._contract",
        "[task.name for task in self.tasks]",
        "sorted(task.name for task in self.tasks)",
        "one_output_a_task",
        "towers_learn_their_own_task_only",
        method="share.shared_bottom",
        rebind=("Shared",),
    ),
    bug(
        "one_task_loses_its_dimension",
        "share._contract",
        ".squeeze(-1)  # batch task",
        ".squeeze()  # batch task",
        "works_with_one_task",
        method="share.shared_bottom",
        rebind=("Shared",),
        error=IndexError,
    ),
    bug(
        "repeated_tasks_are_accepted",
        "nn.tasks",
        "if names.count(name) > 1:",
        "if names.count(name) > 2:",
        "refuses_repeated_and_absent_tasks",
        method="share.shared_bottom",
        rebind=("distinct",),
    ),
    bug(
        "experts_are_numbered_by_place",
        "share.ple",
        'owners = [f"task {task.name}" for task in tasks]',
        'owners = [f"task {place}" for place, _ in enumerate(tasks)]',
        "task_order_does_not_matter",
    ),
    bug(
        "a_task_reads_its_neighbour",
        "share.ple",
        "x.split([1, x.shape[1] - 1], 1)",
        "x[:, :1], x[:, :-1]",
        "task_order_does_not_matter",
        EQUATIONS,
    ),
    bug(
        "a_task_sees_all_tasks_experts",
        "share.ple",
        'sees = [["shared", owner] for owner in owners]',
        'sees = [["shared", *owners] for _ in owners]',
        EQUATIONS,
    ),
    bug(
        "tasks_share_one_encoder",
        "share.single_task",
        "copy.deepcopy(encoder) for _ in range(tasks)",
        "encoder for _ in range(tasks)",
        EQUATIONS,
    ),
    bug(
        "own_experts_are_detached",
        "share.ple",
        "self.specific.after(specific)], 1)",
        "self.specific.after(specific).detach()], 1)",
        "everything_learns",
        EQUATIONS,
    ),
    bug(
        "gates_do_not_read_the_input",
        "share.mmoe",
        "hidden, logits = read(v, self.experts, self.gates)",
        "hidden, logits = read(v, self.experts, self.gates)\n        logits = 0 * logits",
        "everything_learns",
        EQUATIONS,
    ),
    bug(
        "gates_are_not_normalised",
        "nn.experts",
        'turned.softmax(1) if self.squash == "softmax"',
        'turned.exp() if self.squash == "softmax"',
        "gates_are_convex",
        EQUATIONS,
        method="share.mmoe",
        rebind=("Gates",),
    ),
    bug(
        "gates_are_normalised_over_tasks",
        "nn.experts",
        "turned.softmax(1)",
        "turned.softmax(0)",
        "gates_are_convex",
        EQUATIONS,
        method="share.mmoe",
        rebind=("Gates",),
    ),
    bug(
        "parts_are_joined_in_the_wrong_order",
        "nn.experts",
        "torch.cat(x, 1) if isinstance(x, tuple)",
        "torch.cat(x[::-1], 1) if isinstance(x, tuple)",
        "an_encoder_may_give_parts",
        method="share.home",
        rebind=("joined",),
    ),
    bug(
        "only_the_first_part_is_read",
        "nn.experts",
        "for part, its in others:",
        "for part, its in others[:0]:",
        "an_encoder_may_give_parts",
        method="share.mmoe",
        rebind=("read",),
    ),
    bug(
        "no_activation_between_layers",
        "nn.experts",
        "product(F.relu(x), weight,",
        "product(x, weight,",
        EQUATIONS,
        method="share.mmoe",
        rebind=("Bank",),
    ),
    bug(
        "batch_statistics_in_evaluation",
        "nn.experts",
        "self.shift, self.training)",
        "self.shift, True)",
        "rows_do_not_mix",
        method="share.home",
        rebind=("Bank",),
        error=Exception,  # one row has no statistics
    ),
    bug(
        "running_statistics_in_training",
        "nn.experts",
        "self.shift, self.training)",
        "self.shift, False)",
        EQUATIONS,
        method="share.home",
        rebind=("Bank",),
    ),
    # HoME's own parts.
    bug(
        "self_gate_times_zero",
        "share.home",
        "return sum(own, out)",
        "return out + 0 * sum(own)",
        "everything_learns",
        EQUATIONS,
    ),
    bug(
        "self_gate_detached",
        "share.home",
        "return sum(own, out)",
        "return sum((one.detach() for one in own), out)",
        EQUATIONS,
    ),
    bug(
        "self_gate_is_always_softmax",
        "share.home",
        '"sigmoid" if own == 1 else "softmax"',
        '"softmax"',
        "everything_learns",
        EQUATIONS,
    ),
    bug(
        "the_mask_leaks_on_the_task_level",
        "share.home",
        "*([groups[c]] if home.hierarchy else groups)",
        "*groups",
        EQUATIONS,
    ),
    bug(
        "a_task_reads_the_other_category",
        "share.home",
        "categories.index(task.group) for",
        "categories.index(task.group) - 1 for",
        EQUATIONS,
    ),
    bug(
        "gates_do_not_read_z_shared",
        "share.home",
        "torch.cat([z_task, z_shared.expand_as(z_task)], 2)",
        "torch.cat([z_task, z_task], 2)",
        EQUATIONS,
    ),
    bug(
        "feature_gate_halves_the_input",
        "share.home",
        "weights = 2 * mix.softmax(-1)",
        "weights = mix.softmax(-1)",
        EQUATIONS,
    ),
    # Losses.
    bug(
        "a_missing_label_reaches_the_loss",
        "nn.tasks",
        "torch.where(known, label, 0.0)",
        "label",
        "output_is_finite",
        method="share.shared_bottom",
        rebind=("task_loss", "shared_loss"),
    ),
    bug(
        "a_missing_label_is_a_negative",
        "nn.tasks",
        "known = ~torch.isnan(label)",
        "label = torch.nan_to_num(label)\n        known = torch.ones_like(label, dtype=torch.bool)",
        "missing_labels_teach_nothing",
        method="share.shared_bottom",
        rebind=("task_loss", "shared_loss"),
    ),
    bug(
        "missing_labels_thin_the_loss",
        "nn.tasks",
        "known.sum().clamp(min=1)",
        "len(label)",
        "missing_labels_teach_nothing",
        method="share.shared_bottom",
        rebind=("task_loss", "shared_loss"),
    ),
    bug(
        "a_tasks_weight_is_ignored",
        "nn.tasks",
        "task.weight * loss.sum()",
        "loss.sum()",
        "a_weight_scales_its_tasks_gradients",
        method="share.shared_bottom",
        rebind=("task_loss", "shared_loss"),
    ),
    bug(
        "own_experts_ignore_the_seed",
        "share.ple",
        "Bank(own, (width, *ple.expert), seed, activation)",
        "Bank(own, (width, *ple.expert), 0, activation)",
        "the_seed_matters",
    ),
    bug(
        "all_experts_start_equal",
        "nn.experts",
        "stream(seed, name, layer)",
        "stream(seed, layer)",
        "experts_start_different",
        method="share.mmoe",
        rebind=("Bank",),
    ),
    bug(
        "gate_biases_are_no_parameters",
        "nn.experts",
        "self.bias = nn.Parameter(torch.zeros(len(self.readers), visible))",
        "self.bias = torch.zeros(len(self.readers), visible)",
        "all_state_is_registered",
        method="share.mmoe",
        rebind=("Gates",),
    ),
    Bug(
        "repr_hides_a_field",
        "share.mmoe",
        (
            ("from dataclasses import dataclass", "from dataclasses import dataclass, field"),
            ("experts: int = 8", "experts: int = field(default=8, repr=False)"),
        ),
        ("repr_rebuilds",),
    ),
]


def copied(file: str, edits: Iterable[tuple[str, str]], folder: Path, monkeypatch):
    """A module made of a changed copy of one of koinon's files, beside the original."""
    text = PACKAGE.joinpath(*file.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{file}.py has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    path = folder / f"planted_{file.replace('.', '_')}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # pickle and inspect look a class up by its module's name
    spec.loader.exec_module(module)
    return module


def planted(bug: Bug, folder: Path, monkeypatch) -> type[Method]:
    """The method to check, with the bug in it."""
    module = copied(bug.file, bug.edits, folder, monkeypatch)
    if not bug.rebind:
        return method_in(module)
    kind = load(bug.method)
    fixture_of(kind)  # with this all that has to be rebound is imported
    whole = [other for name, other in sorted(sys.modules.items()) if name.startswith("koinon.")]
    for name in bug.rebind:
        original = getattr(importlib.import_module(f"koinon.{bug.file}"), name)
        for other in whole:
            if getattr(other, name, None) is original:
                monkeypatch.setattr(other, name, getattr(module, name))
    return kind


def method_in(module) -> type[Method]:
    (found,) = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and issubclass(v, Method)
    ]
    return found


def failing(kind: type[Method], name: str, asked: Iterable[str], error: type[Exception] = AssertionError) -> set[str]:
    """Those of the asked checks that fail; ``name`` is the method's, which its equations have as well."""
    runs = {check.name: check.run for check in checks_of(kind) if not check.exempt}
    runs[EQUATIONS] = lambda: [assert_equals_equations(m, name) for m in tiny(kind)]
    failed = set()
    for check in asked:
        try:
            runs[check]()
        except error:
            failed.add(check)
    return failed


def tiny(kind: type[Method]) -> list[Method]:
    """The method with narrow layers, of one and of two a network."""
    inner = "expert" if hasattr(kind(), "expert") else "bottom"
    return [replace(kind(), tower=(4,), **{inner: widths}) for widths in ((5,), (7, 5))]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_bug_is_seen(bug, tmp_path, monkeypatch):
    """The named checks fail."""
    kind = planted(bug, tmp_path, monkeypatch)
    name = bug.method or bug.file
    assert failing(kind, name, bug.seen_by, bug.error) == set(bug.seen_by)
    assert bug.seen_by


@pytest.mark.parametrize("name", names("share"))
def test_unchanged_copy_passes_everything(name, tmp_path, monkeypatch):
    """Without a bug a copy fails no check, so that it is the bug which fails them above."""
    kind = method_in(copied(name, (), tmp_path, monkeypatch))
    assert kind is not load(name)
    every = [check.name for check in checks_of(kind) if not check.exempt]
    assert failing(kind, name, [*every, EQUATIONS], Exception) == set()


def test_unchanged_blocks_pass_everything(tmp_path, monkeypatch):
    """The same for the files that are no method, all of them at once."""
    for file, rebind in sorted({(bug.file, bug.rebind) for bug in BUGS if bug.rebind}):
        kind = planted(Bug("none", file, (), (), method="share.mmoe", rebind=rebind), tmp_path, monkeypatch)
        module = importlib.import_module(f"koinon.{file}")
        assert all(getattr(module, name).__module__.startswith("planted_") for name in rebind)
    every = [check.name for check in checks_of(kind) if not check.exempt]
    assert failing(kind, "share.mmoe", [*every, EQUATIONS], Exception) == set()


def test_bugs_are_many_and_different():
    """None of the list has got lost, and none is there twice."""
    assert len({bug.id for bug in BUGS}) == len(BUGS) >= 49
    assert len({(bug.file, bug.edits) for bug in BUGS}) == len(BUGS)
