"""Models on disk become a new folder; koinon merge --from RECIPE.yml --out FOLDER follows a recipe of mergekit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from koinon.core import UserError
from koinon.merge._contract import Blend, Merge
from koinon.merge._files import refuse_out
from koinon.merge._how import How
from koinon.terminal import Told, untold


@dataclass(frozen=True)
class Job:
    """Merge models on disk into a new folder."""

    unit: ClassVar[str] = "bytes"
    """What its progress is counted in."""

    experts: tuple[Path, ...]
    """The models: folders as Hugging Face saves them, safetensors files, or folders of PEFT's LoRA adapters."""
    out: Path
    """Folder for the merged model; made new."""
    how: How
    base: Path | None = None
    """The model the others were tuned from."""
    data: tuple[Path, ...] = ()
    """For methods that look at data: unlabelled texts for each model, a line each, or .jsonl with a "text" each."""
    own: tuple[str, ...] = ()
    """For these methods: patterns of the tensors that stay each model's own, such as 'classifier.*'."""
    longest: int = 128
    """For these methods: most tokens read of a text."""
    dtype: Literal["kept", "float32", "bfloat16", "float16", "float64"] = "kept"
    """Type of the numbers written; kept: each tensor's own in the base (without one, in the first model)."""

    def run(self, method: Merge, told: Told = untold) -> dict[str, Any]:
        """Merge, and tell what was made.

        Raises:
            UserError: models that do not fit, a folder that is taken, a full disk; nothing is left behind then.
        """
        _refuse_no_numbers(method)
        if not isinstance(method, Blend):
            return self._with_data(method)
        if self.data or self.own:
            word = "--data" if self.data else "--own"
            raise UserError(f"{word}: {type(method).__name__} reads weights alone; it is for methods that look at data")
        if len(self.experts) == 1 and not method.needs_base:
            raise UserError(f"{self.experts[0]}: one model only; this method makes one of several")
        return self.how.stream(self.how.plan(self.base, self.experts, self.dtype), lambda name: method, self.out, told)

    def _with_data(self, method: Merge) -> dict[str, Any]:
        from koinon.merge import _hub

        if self.base is None or not self.data or self.longest < 1:
            raise UserError(
                f"{type(method).__name__} looks at data: give --base, --data with a file for each model, and --longest "
                "above 0 if at all"
            )
        self.how.refuse_streaming(method)
        refuse_out(self.out, [self.base, *self.experts])
        found = self.how.plan(self.base, self.experts, self.dtype, self.own)
        stored = found.out[found.merged[0]].dtype
        texts = _hub.read_all(self.data, tuple(found.paths))
        if self.how.dry_run:
            return {
                "out": str(self.out),
                "method": repr(method),
                "models": {name: str(path) for name, path in found.paths.items()},
                "base": str(self.base),
                "texts": {name: len(its) for name, its in texts.items()},
                "tensors": {"merged": len(found.merged), "each model's own or copied": len(found.copied)},
                "memory": f"more than {found.numbers * 4 / 1e6:.0f} MB, as all models are held in float32",
            }
        pool = _hub.pool_of(self.base, found.paths, texts, self.own, self.longest)
        manifest = _hub.manifest_of(method, found, self.data)
        return _hub.merge_models(method, pool, self.base, self.out, stored, manifest)


@dataclass(frozen=True)
class FromRecipe:
    """Merge as a recipe of mergekit says: linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, slerp."""

    recipe: Annotated[Path, tyro.conf.arg(name="from")]
    """The recipe's YAML; paths in it are looked for beside it, then in the working directory."""
    out: Path
    """Folder for the merged model; made new."""
    how: How

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Merge, and tell what was made; raises UserError as `Job.run`, and for a recipe that would change meaning."""
        from koinon.merge._mergekit import read_recipe

        recipe = read_recipe(self.recipe)
        base = None if recipe.base is None else Path(recipe.base)
        found = self.how.plan(base, [Path(its) for its in recipe.experts], recipe.out_dtype)
        methods = recipe.methods(found.reference.specs)
        return self.how.stream(found, methods.__getitem__, self.out, told, recipe.dtype)


@dataclass(frozen=True)
class Predict:
    """Say with a kept twin what texts are: the weights its router gives them, and their logits."""

    twin: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TWIN")]
    """Folder that `koinon merge twin` made."""
    texts: Path
    """A text a line, or .jsonl with a "text" in each."""
    out: Path
    """JSON Lines file for the answers, in the texts' order; replaced if it is there."""
    longest: int = 128
    """Most tokens read of a text."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Answer all texts, and write the answers whole."""
        from koinon.merge import _hub

        return _hub.answer(self.twin, self.texts, self.out, self.longest, told)


@dataclass(frozen=True)
class Materialize:
    """Make one model of a kept twin, with given weights of its tasks."""

    twin: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TWIN")]
    """Folder that `koinon merge twin` made."""
    weights: tuple[float, ...]
    """One for each task, in the order of the models that were merged."""
    out: Path
    """Folder for the model; made new."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Write theta* + sum_t w_t v_t."""
        from koinon.merge import _hub

        refuse_out(self.out, [self.twin])
        return _hub.materialize(self.twin, self.weights, self.out)


def _refuse_no_numbers(method: Merge) -> None:
    for setting in fields(method):
        value = getattr(method, setting.name)
        for its in value if isinstance(value, tuple) else [value]:
            if isinstance(its, float) and not math.isfinite(its):
                raise UserError(f"{setting.name} {its}: give a finite number")


VERBS: Mapping[str, type] = {"": FromRecipe, "predict": Predict, "materialize": Materialize}
"""What can be done besides applying a method; the one without a name is called by its options alone."""
