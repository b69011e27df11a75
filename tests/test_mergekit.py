"""mergekit's recipes: what each becomes, checked with values worked out by hand and with its formulas written out."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from koinon.core import UserError
from koinon.data.checkpoints import Loaded
from koinon.merge._engine import Sources, blend_all
from koinon.merge._mergekit import layers_of, read_recipe
from koinon.merge.average import Average
from koinon.merge.breadcrumbs import Breadcrumbs
from koinon.merge.dare import Dare
from koinon.merge.slerp import Slerp
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.ties import Ties

BF16 = torch.bfloat16
LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("mlp.up_proj", "self_attn.q_proj")),
    "model.norm.weight",
]
TWO = "models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]\nbase_model: base\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with four model folders, and a folder of recipes that has a model of its own."""
    for name in ("base", "a", "b", "c", "recipes/own"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str):
    path = Path("recipes/recipe.yml")
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def methods(text: str, names=NAMES):
    return read(text).methods(names)


def only(text: str):
    """The one method that all tensors have."""
    found = set(methods(text).values())
    assert len(found) == 1
    return found.pop()


# What each method becomes, with mergekit's defaults.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"merge_method: linear\n{TWO}parameters: {{weight: 1}}", Average((0.7, 0.4, 1.0), normalize=True)),
        ("merge_method: linear\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 0.5, normalize: false}",
         Average((0.5, 0.5), normalize=False)),
        (f"merge_method: task_arithmetic\n{TWO}", TaskArithmetic(1.0, (0.7, 0.4))),
        (f"merge_method: task_arithmetic\n{TWO}parameters: {{lambda: 0.5, normalize: true, density: 0.3}}",
         TaskArithmetic(0.5, (0.7, 0.4), normalize=True)),
        (f"merge_method: ties\n{TWO}parameters: {{density: 0.3, int8_mask: true}}",
         Ties((0.3, 0.3), 1.0, (0.7, 0.4), elect=True, mean=True, scope="tensor")),
        (f"merge_method: ties\n{TWO}parameters: {{normalize: false}}",
         Ties((1.0, 1.0), 1.0, (0.7, 0.4), elect=True, mean=False, scope="tensor")),
        (f"merge_method: dare_linear\n{TWO}parameters: {{density: 1.5}}",
         Dare((1.0, 1.0), 1.0, (0.7, 0.4), rescale="mass", elect=False, mean=False)),
        (f"merge_method: dare_linear\n{TWO}parameters: {{density: 0.5, rescale: false, normalize: true, lambda: 2.2}}",
         Dare((0.5, 0.5), 2.2 / 1.1, (0.7, 0.4), rescale="none", elect=False, mean=False)),
        (f"merge_method: dare_ties\n{TWO}parameters: {{density: 0.5, normalize: true, lambda: 2}}",
         Dare((0.5, 0.5), 2.0, (0.7, 0.4), rescale="mass", elect=True, mean=True)),
        (f"merge_method: breadcrumbs\n{TWO}parameters: {{density: 0.5}}", Breadcrumbs(0.5, 0.01, 1.0, (0.7, 0.4))),
        (f"merge_method: breadcrumbs\n{TWO}", Breadcrumbs(1.0, 0.0, 1.0, (0.7, 0.4))),
        (f"merge_method: breadcrumbs_ties\n{TWO}parameters: {{density: 0.9, gamma: 0.2}}",
         Breadcrumbs(0.9, 1 - 0.9, 1.0, (0.7, 0.4), elect=True, mean=False)),
        ("merge_method: slerp\nmodels: [{model: a}, {model: base}]\nbase_model: base\nparameters: {t: 0.3}",
         Slerp(0.3)),
    ],
)  # fmt: skip
def test_methods_and_defaults(folder, text, expected):
    assert only(text) == expected


@pytest.mark.parametrize(
    ("text", "base", "experts"),
    [
        # A base that is not listed is averaged too, last; one that is listed, in its place.
        (f"merge_method: linear\n{TWO}parameters: {{weight: 1}}", "base", ("a", "b", "base")),
        ("merge_method: linear\nmodels: [{model: base}, {model: a}]\nbase_model: base\nparameters: {weight: 1}",
         "base", ("base", "a")),
        ("merge_method: linear\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 1}", None, ("b", "a")),
        # Differences to the base: it is none of the models, listed or not.
        (f"merge_method: ties\n{TWO}", "base", ("a", "b")),
        ("merge_method: ties\nmodels: [{model: c}, {model: base}, {model: a}]\nbase_model: base\n"
         "parameters: {weight: 1}", "base", ("c", "a")),
        # From the base to the other model, however they are listed.
        ("merge_method: slerp\nmodels: [{model: b}, {model: a}]\nbase_model: a\nparameters: {t: 0}", "a", ("a", "b")),
        ("merge_method: slerp\nmodels: [{model: b}]\nbase_model: a\nparameters: {t: 0}", "a", ("a", "b")),
        ("merge_method: slerp\nslices: [{sources: [{model: b, layer_range: [0, 5]}, {model: a, layer_range: [0, 5]}]}]"
         "\nbase_model: a\nparameters: {t: 0}", "a", ("a", "b")),
        # In slices nothing is added.
        ("merge_method: linear\nslices: [{sources: [{model: b, layer_range: [0, 5]}, {model: a, layer_range: [0, 5]}]}]"
         "\nbase_model: base\nparameters: {weight: 1}", "base", ("b", "a")),
        # An adapter on the base.
        ("merge_method: ties\nmodels: [{model: base+a}, {model: b}]\nbase_model: base\nparameters: {weight: 1}",
         "base", ("a", "b")),
    ],
)  # fmt: skip
def test_which_models(folder, text, base, experts):
    found = read(text)
    assert (found.base, found.experts) == (base, experts)


def test_models_beside_the_recipe_come_first(folder):
    (folder / "recipes" / "a").mkdir()
    found = read(
        f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}, {{model: ./own}}, {{model: {folder / 'c'}}}]\n"
        "parameters: {weight: 1}"
    )
    assert found.experts == ("recipes/a", "b", "recipes/own", str(folder / "c"))


@pytest.mark.parametrize(
    ("words", "computed", "written"),
    [
        ("", None, None),
        ("dtype: bfloat16", "bfloat16", "bfloat16"),
        ("dtype: torch.float32\nout_dtype: float16", "float32", "float16"),
        ("out_dtype: bfloat16", None, "bfloat16"),
    ],
)
def test_types(folder, words, computed, written):
    found = read(f"merge_method: task_arithmetic\n{TWO}{words}")
    assert (found.dtype, found.out_dtype) == (computed, written)


# Filters, gradients, and which parameters win.


def test_a_gradient_runs_over_the_layers(folder):
    """[0, 0.5, 0.3, 1] over 5 layers: t = 0, 1/4, .. lies at 0, 0.75, 1.5, 2.25, 3 on the list."""
    found = methods(
        "merge_method: slerp\nmodels: [{model: a}, {model: base}]\nbase_model: base\nparameters: {t: [0, 0.5, 0.3, 1]}"
    )
    layers = [0.0, 0.75 * 0.5, 0.5 * 0.5 + 0.5 * 0.3, 0.75 * 0.3 + 0.25 * 1.0, 1.0]
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"].t for i in range(5)] == pytest.approx(layers, abs=1e-12)
    assert found["model.embed_tokens.weight"].t == 0.0
    assert found["model.norm.weight"].t == 0.0  # outside the layers: the first value, also after them
    assert found["model.layers.4.self_attn.q_proj.weight"].t == 1.0


def test_the_only_layer_has_the_last_value(folder):
    text = "merge_method: slerp\nmodels: [{model: a}]\nbase_model: base\nparameters: {t: [0.1, 0.9]}"
    found = methods(text, ["wte", "h.0.mlp"])
    assert (found["wte"].t, found["h.0.mlp"].t) == (0.1, 0.9)


def test_flags_switch_instead_of_sliding(folder):
    found = methods(f"merge_method: ties\n{TWO}parameters: {{normalize: [true, false]}}")
    means = [found[f"model.layers.{i}.mlp.up_proj.weight"].mean for i in range(5)]
    assert means == [True, True, True, True, False]


def test_the_first_filter_that_fits_counts(folder):
    found = methods(
        """
        merge_method: slerp
        slices:
          - sources: [{model: base, layer_range: [0, 5]}, {model: a, layer_range: [0, 5]}]
        base_model: base
        parameters:
          t:
            - {filter: self_attn, value: [0, 1]}
            - {filter: mlp, value: [1, 0]}
            - {value: 0.5}
        """
    )
    assert [found[f"model.layers.{i}.self_attn.q_proj.weight"].t for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"].t for i in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert found["model.norm.weight"].t == 0.5


def test_the_nearest_parameters_win(folder):
    """A model's own, then the slice's, then the recipe's; one that does not fit the tensor leaves it to the next."""
    found = methods(
        """
        merge_method: task_arithmetic
        slices:
          - sources:
              - {model: base, layer_range: [0, 5], parameters: {weight: 9}}
              - {model: a, layer_range: [0, 5], parameters: {weight: {filter: mlp, value: 0.1}}}
              - {model: b, layer_range: [0, 5], parameters: {weight: []}}
            parameters: {weight: [{filter: self_attn, value: 0.2}], lambda: 0.5}
        base_model: base
        parameters: {weight: [{filter: "*", value: "3e-1"}], lambda: 2}
        """
    )
    assert found["model.layers.2.mlp.up_proj.weight"] == TaskArithmetic(0.5, (0.1, 0.3))
    assert found["model.layers.2.self_attn.q_proj.weight"] == TaskArithmetic(0.5, (0.2, 0.2))
    assert found["model.norm.weight"] == TaskArithmetic(0.5, (0.3, 0.3))


def test_layers_are_counted_for_each_beginning():
    found = layers_of(["shared", "encoder.block.0.layer.1.w", "encoder.block.1.layer.0.w", "decoder.block.0.layer.2.w"])
    assert found == {
        "shared": (None, 0),
        "encoder.block.0.layer.1.w": (0, 2),
        "encoder.block.1.layer.0.w": (1, 2),
        "decoder.block.0.layer.2.w": (0, 1),
    }


# What is computed: mergekit's formulas, written out with a rounding to bfloat16 after every operation.


def models(count: int = 3, size: int = 80) -> list[dict[str, Tensor]]:
    """A base and models near it, in bfloat16; no two changes of a model are equally large."""
    numbers = torch.Generator().manual_seed(5)
    base = {name: torch.randn(size, generator=numbers).to(BF16) for name in NAMES}
    tuned = []
    for _ in range(count - 1):
        deltas = {name: torch.randn(size, generator=numbers) * 0.1 for name in NAMES}
        tuned.append({name: (base[name].float() + deltas[name]).to(BF16) for name in NAMES})
    return [base, *tuned]


def merged(text: str, given: dict[str, dict[str, Tensor]], rounding=BF16) -> dict[str, Tensor]:
    recipe = read(text)
    found = recipe.methods(NAMES)
    needs_base = next(iter(found.values())).needs_base
    base = Loaded(given[recipe.base]) if needs_base and recipe.base else None
    tuned = {name: Loaded(given[name]) for name in recipe.experts}
    result = {name: torch.empty_like(value) for name, value in given["base"].items()}

    def write(name: str, start: int, values: Tensor) -> None:
        result[name][start : start + len(values)] = values

    blend_all(found.__getitem__, Sources(base, tuned, rounding), NAMES, Loaded(result).specs, write)
    return result


def rounded(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32).to(BF16))


def differences(base: Tensor, tuned: list[Tensor]) -> list[list[float]]:
    """Element to model to its change, rounded."""
    return [[rounded(float(t[i]) - float(base[i])) for t in tuned] for i in range(len(base))]


def kept(column: list[float], density: float) -> list[bool]:
    """Which changes of one model are among the largest."""
    order = sorted(range(len(column)), key=lambda i: -abs(column[i]))
    chosen = set(order[: max(1, int(density * len(column)))])
    cut = min(abs(column[i]) for i in chosen)
    return [abs(its) >= cut for its in column]


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_to_the_last_bit(folder, normalize):
    base, a, b = models()
    text = f"merge_method: linear\n{TWO.partition('base_model')[0]}parameters: {{normalize: {str(normalize).lower()}}}"
    found = merged(text, {"base": base, "a": a, "b": b})
    weights = torch.tensor([0.7, 0.4])
    for name in NAMES:  # in float32 also there, and rounded once; but not every machine fuses the product and the sum
        expected = a[name].float() * weights[0] + b[name].float() * weights[1]
        expected = (expected / weights.sum() if normalize else expected).to(BF16)
        torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic_to_the_bit(folder, scale, normalize):
    base, a, b = models()
    parameters = f"{{lambda: {scale}, normalize: {str(normalize).lower()}}}"
    found = merged(f"merge_method: task_arithmetic\n{TWO}parameters: {parameters}", {"base": base, "a": a, "b": b})
    weights = [rounded(0.7), rounded(0.4)]
    for name in NAMES:
        rows = differences(base[name], [a[name], b[name]])
        mixed = [rounded(sum(rounded(w * d) for w, d in zip(weights, row, strict=True))) for row in rows]
        mixed = [rounded(its / rounded(sum(weights))) for its in mixed] if normalize else mixed
        mixed = mixed if scale == 1 else [rounded(its * scale) for its in mixed]
        expected = [rounded(float(start) + its) for start, its in zip(base[name], mixed, strict=True)]
        assert found[name].tolist() == expected


def ties_of(rows, keeps, weights, normalize):
    for row, keep in zip(rows, keeps, strict=True):
        terms = [rounded(w * d) if k else 0.0 for w, d, k in zip(weights, row, keep, strict=True)]
        sign = 1 if rounded(sum(terms)) >= 0 else -1
        agree = [term * sign > 0 for term in terms]
        mixed = rounded(sum(term for term, its in zip(terms, agree, strict=True) if its))
        divisor = rounded(sum(w for w, its in zip(weights, agree, strict=True) if its)) or 1.0
        yield rounded(mixed / divisor) if normalize else mixed


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_to_the_bit(folder, normalize):
    base, a, b, c = models(4)
    text = f"""
        merge_method: ties
        models:
          - {{model: a, parameters: {{weight: 0.7, density: 0.25}}}}
          - {{model: b, parameters: {{weight: -0.4, density: 0.5}}}}
          - {{model: c, parameters: {{weight: 1.3}}}}
        base_model: base
        parameters: {{normalize: {str(normalize).lower()}}}
    """
    found = merged(text, {"base": base, "a": a, "b": b, "c": c})
    weights = [rounded(0.7), rounded(-0.4), rounded(1.3)]
    for name in NAMES:
        rows = differences(base[name], [a[name], b[name], c[name]])
        columns = list(zip(*rows, strict=True))
        keeps = list(zip(*(kept(list(its), d) for its, d in zip(columns, (0.25, 0.5, 1.0), strict=True)), strict=True))
        mixed = ties_of(rows, keeps, weights, normalize)
        expected = [rounded(float(start) + its) for start, its in zip(base[name], mixed, strict=True)]
        assert found[name].tolist() == expected


def test_breadcrumbs_keeps_the_band_below_the_largest(folder):
    base, a, _ = models()
    text = """
        merge_method: breadcrumbs
        models: [{model: a}]
        base_model: base
        parameters: {weight: 1, density: 0.5, gamma: 0.1}
    """
    found = merged(text, {"base": base, "a": a}, rounding=None)
    for name in NAMES:
        delta = a[name].float() - base[name].float()
        sizes = sorted((abs(float(its)) for its in delta), reverse=True)
        high, low = sizes[8 - 1], sizes[8 + 40 - 1]  # 10% of 80 are cut above, the next 50% kept
        band = (delta.abs() < high) & (delta.abs() >= low)
        expected = (base[name].float() + torch.where(band, delta, 0)).to(BF16)
        assert torch.equal(found[name], expected)


def test_dare_keeps_the_tensors_mass(folder):
    base, a, _ = models(size=4000)
    text = "merge_method: dare_linear\nmodels: [{model: a}]\nbase_model: base\nparameters: {weight: 1, density: 0.3}"
    wide = {key: {name: value.float() for name, value in its.items()} for key, its in {"base": base, "a": a}.items()}
    found = merged(text, wide, rounding=None)
    for name in NAMES:
        delta, change = wide["a"][name] - wide["base"][name], found[name] - wide["base"][name]
        share = float((change != 0).float().mean())
        assert abs(share - 0.3) < 0.05
        torch.testing.assert_close(change.abs().sum(), delta.abs().sum(), rtol=1e-4, atol=0)


def test_slerp_walks_from_the_base(folder):
    base, a, _ = models()
    given = {"base": base, "a": {name: value.flip(0) for name, value in a.items()}}
    found = merged(
        "merge_method: slerp\nmodels: [{model: a}]\nbase_model: base\nparameters: {t: [0, 1]}", given, rounding=None
    )
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    last = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    torch.testing.assert_close(found[last], given["a"][last], rtol=0.01, atol=1e-6)
    middle = "model.layers.2.mlp.up_proj.weight"
    one, other = base[middle].double(), given["a"][middle].double()
    angle = math.acos(float(one @ other / one.norm() / other.norm()))
    expected = (math.sin(angle / 2) * (one + other) / math.sin(angle)).to(BF16)
    torch.testing.assert_close(found[middle], expected, rtol=0.008, atol=1e-6)


# What is refused, in one line that says where.

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
SLICE = "{model: %s, layer_range: [%d, %d]}"


def sliced(*sources: str, more: str = "") -> str:
    slices = f"slices: [{{sources: [{', '.join(sources)}]}}{more}]"
    return f"merge_method: slerp\nbase_model: base\nparameters: {{t: 0.5}}\n{slices}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge_method: linear\nmodels: [{model: a}", "line 2: is no YAML"),
        ("a: 1\n---\na: 2", "is no YAML of one document"),
        ("- merge_method: linear", "the recipe is no mapping"),
        ("1: 2", "the recipe is no mapping"),
        ("models: [{model: a}]", "merge_method None is not known here; there is linear"),
        ("merge_method: model_stock\nmodels: [{model: a}]", "merge_method 'model_stock' is not known here"),
        ("merge_method: [ties]\nmodels: [{model: a}]", "merge_method ['ties'] is not known here"),
        ("merge_method: linear", "give either models or slices"),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: []", "give either models or slices"),
        ("merge_method: linear\nmodels: []", "models is no list of entries"),
        ("merge_method: linear\nmodels: [a]", "models[0] is no mapping"),
        ("merge_method: linear\nmodels: [{modle: a}]", "unknown key 'modle': did you mean 'model'?"),
        ("merge_method: linear\nmodels: [{model: {model: a}}]", "models[0]: no path of a model"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "models[1]: a is there twice"),
        ("merge_method: linear\nmodels: [{model: someone/model-7b}]", "someone/model-7b is no folder here"),
        ("merge_method: linear\nmodels: [{model: a+b}]", "an adapter on another model than the base_model"),
        (f"{LINEAR}parameters: {{weight: 1}}\nmodules: {{}}", "modules: models made of several parts"),
        (f"{LINEAR}tokenizer_source: union", "tokenizer_source: vocabularies are not merged here"),
        (f"{LINEAR}tokenizer: {{source: base}}", "tokenizer: vocabularies are not merged here"),
        (f"{LINEAR}chat_template: auto", "chat_template: it is not written here"),
        (f"{LINEAR}nonsense: 1", "the recipe has an unknown key 'nonsense'"),
        (f"{LINEAR}dtype: int64", "dtype 'int64': give one of bfloat16"),
        (f"{LINEAR}out_dtype: 16", "out_dtype 16: give one of"),
        (f"{LINEAR}parameters: {{density: 1}}", "parameters has an unknown key 'density': there is normalize, weight"),
        (f"{LINEAR}parameters: [1]", "the recipe: parameters is no mapping"),
        (f"{LINEAR}parameters: {{weight: heavy}}", "weight: 'heavy' is no number"),
        (f"{LINEAR}parameters: {{weight: .nan}}", "weight: nan is no number"),
        (f"{LINEAR}parameters: {{weight: [1, [2]]}}", "weight: [1, [2]] is no number"),
        (f"{LINEAR}parameters: {{weight: null}}", "weight: None is no number"),
        (f"{LINEAR}parameters: {{weight: 1, normalize: 2}}", "normalize: 2 is no true or false"),
        (f"{LINEAR}parameters: {{weight: {{value: 1, filtre: a}}}}", "unknown key 'filtre': did you mean"),
        (f"{LINEAR}parameters: {{weight: {{value: 1, filter: 2}}}}", "weight: the filter 2 is no text"),
        (f"{LINEAR}parameters: {{weight: [{{value: 1}}, 2]}}", "weight is no mapping"),
        ("merge_method: slerp\nmodels: [{model: a, parameters: {t: 1}}]\nbase_model: b",
         "models[0]: t is not read in a model's parameters; give it in the recipe's"),
        (f"merge_method: ties\n{LINEAR.partition(chr(10))[2]}", "ties needs a base_model"),
        ("merge_method: ties\nmodels: [{model: a}]\nbase_model: a", "for the base_model and other models, here are 0"),
        (f"merge_method: slerp\n{TWO.replace('weight', 't')}", "t is not read in a model's parameters"),
        ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nbase_model: base\nparameters: {t: 1}",
         "slerp is for the base_model and one other model, here are 2"),
        (sliced(SLICE % ("a", 0, 5), SLICE % ("b", 0, 5)), "the base_model base is none of the slice's sources"),
        (sliced(SLICE % ("a", 0, 5), SLICE % ("base", 5, 10)), "the layer_range of the sources is not the same"),
        (sliced(SLICE % ("a", 2, 5), SLICE % ("base", 2, 5)), "the layer_range of the sources is not the same"),
        (sliced("{model: a}", SLICE % ("base", 0, 5)), "slices[0].sources[0]: layer_range is not"),
        (sliced(SLICE % ("a", 0, 5), more=", {sources: []}"), "slices has 2 entries: only whole models are merged"),
        (sliced(SLICE % ("a", 0, 5), more="").replace("{sources", "{residual_weight: 0.1, sources"), "residual_weight"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(folder, text, says):
    with pytest.raises(UserError) as error:
        read(text)
    assert str(error.value).startswith("recipes/recipe.yml: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (sliced(SLICE % ("a", 0, 4), SLICE % ("base", 0, 4)), "takes 4 layers of models that have 5"),
        (LINEAR, "no weight of a for model.embed_tokens.weight"),
        (f"{LINEAR}parameters: {{weight: {{filter: mlp, value: 1}}}}", "no weight of a for model.embed_tokens.weight"),
        (f"merge_method: linear\n{TWO}", "no weight of base for model.embed_tokens.weight"),
        ("merge_method: slerp\nmodels: [{model: a}]\nbase_model: b", "no t for model.embed_tokens.weight"),
        (f"merge_method: ties\n{TWO}parameters: {{rescale: true}}", "rescale: only what is dropped at random"),
        (f"merge_method: breadcrumbs\n{TWO}parameters: {{rescale: true}}", "rescale: only what is dropped at random"),
        ("merge_method: breadcrumbs\nmodels: [{model: a, parameters: {density: 0.5}}, {model: b}]\nbase_model: base\n"
         "parameters: {weight: 1}", "breadcrumbs has one density and one gamma for all models here"),
    ],
)  # fmt: skip
def test_what_is_refused_at_a_tensor(folder, text, says):
    with pytest.raises(UserError) as error:
        methods(text)
    assert str(error.value).startswith("recipes/recipe.yml: ")
    assert says in str(error.value)


def test_files_that_are_no_recipe(folder):
    for content, says in (
        (b"\xff\xfe\x00", "no YAML"),
        (b"[" * 3000, "nested too deeply"),
        (b"a: &a [&b {c: *a}, *b]", "unknown key 'a'"),
        (b"a: !!python/object/apply:os.getcwd []", "no YAML"),
    ):
        Path("recipes/recipe.yml").write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_recipe(Path("recipes/recipe.yml"))
    with pytest.raises(UserError, match=r"nowhere\.yml: cannot be read \(No such file or directory\)"):
        read_recipe(Path("nowhere.yml"))
