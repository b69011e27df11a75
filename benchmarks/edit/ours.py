"""koinon's side; see `jobs.py`. A job with no facts writes the beginnings and the moments that both sides then use."""

import json
import sys
from dataclasses import replace
from typing import Any

from jobs import Job, Teller, clock, counted, job


def main() -> None:
    """Do the job."""
    asked, teller = job(), Teller()
    import torch

    torch.set_num_threads(asked.threads)
    teller.tell("torch")
    from koinon.core import load
    from koinon.data.facts import Fact
    from koinon.edit._edited import Edited, Material
    from koinon.lm.language import LM

    method = load(f"edit.{asked.method}")(**settings(asked))
    teller.tell("import")
    lm = LM.load(asked.model, dtype="float32")
    teller.tell("load")
    editor = method.on(lm, Material(corpus=asked.corpus, unrelated=asked.unrelated))
    teller.tell("prepare")
    if not asked.facts:
        write(asked, editor.ready)
        return
    if asked.method != "grace":
        before = editor.ready.before
        given = replace(before, texts=asked.before) if asked.method == "memit" else asked.before
        editor = replace(editor, ready=replace(editor.ready, before=given))
    facts = [Fact(its["subject"], its["object"], its["prompt"]) for its in asked.facts]
    teller.tell("given")
    found: dict[str, Any] = {}
    costs, edited = [], Edited(lm, method, None, ())
    with counted(lm.model) as calls:
        for number, fact in enumerate(facts):
            start, passes = clock(), len(calls)
            edited = editor.edit([fact], after=None if asked.separately else edited)
            if asked.separately:
                found |= {f"{number}|{name}": its for name, its in changed(edited.patch).items()}
            else:
                edited.lm  # noqa: B018  the model that can be asked
            costs.append([*(b - a for a, b in zip(start.values(), clock().values())), len(calls) - passes])
    teller.tell("edit", each=costs)
    if asked.kept:
        from safetensors.torch import save_file

        save_file(found, asked.kept)


def settings(asked: Job) -> dict[str, Any]:
    """The method's fields."""
    its = {name: value for name, value in asked.settings.items() if name != "last"}
    its |= {"layer": asked.layers[-1], "steps": asked.steps}
    if asked.method == "rome":
        its |= {"whiten": asked.whiten, "keys": "release"}
    if asked.method == "memit":
        its |= {"spread": len(asked.layers), "keys": "release"}
    if asked.method == "grace":
        its |= {"start": "layer"}
    if asked.method == "wise":
        its |= {"enough": -1.0}
    return its


def changed(patch: Any) -> dict[str, Any]:
    """What a single step changes."""
    if hasattr(patch, "codes"):
        return {"key": patch.codes[-1].key, "value": patch.codes[-1].value}
    return {name: its.left @ its.right.T for name, its in patch.steps[-1].items()}


def write(asked: Job, ready: Any) -> None:
    """What the method prepared, for both sides."""
    from safetensors.torch import save_file

    before = getattr(ready.before, "texts", ready.before)
    with open(asked.kept, "w", encoding="utf-8") as file:
        json.dump(before, file)
    factors = getattr(ready, "factors", None) or [its for its in [getattr(ready, "factor", None)] if its is not None]
    if factors:
        save_file({str(layer): its @ its.T for layer, its in zip(asked.layers, factors, strict=True)}, asked.moments)


if __name__ == "__main__":
    sys.exit(main())
