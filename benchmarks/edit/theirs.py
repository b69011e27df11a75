"""EasyEdit's side: its own loader, its own `apply_..._to_model`, from its own repository; see `jobs.py`."""

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs import Job, Teller, clock, counted, job

WORDS = {
    "rome": {"steps": "v_num_grad_steps", "rate": "v_lr", "kl": "kl_factor", "decay": "v_weight_decay"}
    | {"bound": "clamp_norm_factor"},
    "memit": {"steps": "v_num_grad_steps", "rate": "v_lr", "kl": "kl_factor", "decay": "v_weight_decay"}
    | {"bound": "clamp_norm_factor", "weight": "mom2_update_weight"},
    "grace": {"steps": "n_iter", "rate": "edit_lr", "radius": "eps"},
    "wise": {"steps": "n_iter", "rate": "edit_lr", "share": "mask_ratio", "bound": "norm_constraint"},
}
"""koinon's names of hyper-parameters and EasyEdit's; what is not here is as in its hparams/*/llama-7b.yaml."""
CLASSES = {
    "rome": "ROMEHyperParams",
    "memit": "MEMITHyperParams",
    "grace": "GraceHyperParams",
    "wise": "WISEHyperParams",
}


def main() -> None:
    """Do the job."""
    asked, teller = job(), Teller()
    import torch

    torch.set_num_threads(asked.threads)
    teller.tell("torch")
    sys.path.insert(0, asked.repository)
    vision(torch)
    easyeditor = import_module("easyeditor")
    teller.tell("import")
    hparams = settings(easyeditor, asked)
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    teller.tell("load")
    module, write, shaped = templates(asked)
    write(editor.model, editor.tok)
    teller.tell("prepare")
    module.CONTEXT_TEMPLATES_CACHE = shaped
    if asked.moments:
        give_moments(asked, editor.model)
    teller.tell("given")
    found, costs = {}, []
    with counted(editor.model) as calls:
        for number, fact in enumerate(asked.facts):
            request = requested(asked, fact, number)
            start, passes = clock(), len(calls)
            if asked.separately:
                found |= {f"{number}|{name}": its for name, its in changed(asked, editor, request).items()}
            else:
                editor.apply_algo(editor.model, editor.tok, [request], hparams, copy=False, return_orig_weights=True)
            costs.append([*(b - a for a, b in zip(start.values(), clock().values())), len(calls) - passes])
    teller.tell("edit", each=costs)
    if asked.kept:
        from safetensors.torch import save_file

        save_file({name: its.detach().contiguous() for name, its in found.items()}, asked.kept)


def vision(torch: Any) -> None:
    """Have PyPI's torchvision imported beside a torch without CUDA: its operators, which nobody calls, fail there."""
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in [its for its in sys.modules if its.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision").kept = library


def settings(easyeditor: Any, asked: Job) -> Any:
    """Its hyper-parameters for Llama, with those of the job in their place."""
    kind = getattr(easyeditor, CLASSES[asked.method])
    its = kind.from_hparams(str(Path(asked.repository) / "hparams" / asked.method.upper() / "llama-7b.yaml"))
    its.model_name, its.device = asked.model, "cpu"
    for name, value in {"steps": asked.steps, **asked.settings}.items():
        if name in WORDS[asked.method]:
            setattr(its, WORDS[asked.method][name], value)
    if asked.method in ("rome", "memit"):
        its.layers, its.mom2_adjustment = asked.layers, asked.whiten
        its.v_loss_layer = asked.settings["last"]
    else:
        its.inner_params = [f"model.layers[{asked.layers[-1]}].mlp.down_proj.weight"]
    if asked.method == "grace":
        its.val_init = "warm"
    if asked.method == "wise":
        its.sequential_edit = True  # nobody sets it for texts, and without it every edit replaces the one before
        its.merge_alg, its.save_freq, its.merge_freq = "ties", asked.settings["shard"], asked.settings["shard"] * 2
        import_module("easyeditor.models.wise.WISE").EarlyStopMeter.stop = lambda self: False
    return its


def templates(asked: Job) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    """The module that keeps beginnings for all, what writes them, and the job's own in the shape it keeps them in."""
    filled = [its + "{}" for its in asked.before]
    if asked.method == "rome":
        module = import_module("easyeditor.models.rome.rome_main")
        count = asked.settings["count"]
        return module, lambda lm, tok: module.get_context_templates(lm, tok, [[5, count], [10, count]]), filled
    if asked.method == "memit":
        module = import_module("easyeditor.models.memit.memit_main")
        return module, module.get_context_templates, [filled[:1], filled[1:]]
    module = import_module("easyeditor.models.wise.utils")
    if asked.method == "grace":
        return module, lambda lm, tok: None, filled
    lengths = [[5, 5], [10, 5]]
    return module, lambda lm, tok: module.get_context_templates(lm, tok, lengths, device="cpu"), filled


def give_moments(asked: Job, model: Any) -> None:
    """Put C where EasyEdit keeps what it has read of Wikipedia."""
    import torch
    from safetensors.torch import load_file

    name = model.config._name_or_path.replace("/", "_")
    rome, memit = (import_module(f"easyeditor.models.{its}") for its in ("rome.compute_u", "memit.memit_main"))
    for layer, moment in load_file(asked.moments).items():
        key = name, f"model.layers.{layer}.mlp.down_proj"
        rome.inv_mom2_cache[key] = torch.inverse(moment).float()
        memit.COV_CACHE[key] = moment.float()


def requested(asked: Job, fact: dict[str, str], number: int) -> dict[str, Any]:
    """A request in its words."""
    return {
        "case_id": number,
        "prompt": fact["prompt"].replace("{}", fact["subject"]),
        "subject": fact["subject"],
        "target_new": fact["object"],
        "ground_truth": "<|endoftext|>",
        "loc_prompt": asked.unrelated[number % len(asked.unrelated)] if asked.unrelated else "",
        "portability": {},
        "locality": {},
    }


def changed(asked: Job, editor: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What one request changes, the model being as it was afterwards."""
    if asked.method == "rome":
        execute = import_module("easyeditor.models.rome.rome_main").execute_rome
        deltas = execute(editor.model, editor.tok, copy.deepcopy(request), editor.hparams)
        return {name: value[:, None] @ key[None] for name, (key, value) in deltas.items()}
    if asked.method == "memit":
        execute = import_module("easyeditor.models.memit.memit_main").execute_memit
        deltas = execute(editor.model, editor.tok, [request], editor.hparams)
        return {name: (value @ key.T).float() for name, (key, value) in deltas.items()}
    edited, restore = editor.apply_algo(editor.model, editor.tok, [request], editor.hparams, copy=False)
    adapter = edited.model.model.layers[asked.layers[-1]].mlp.down_proj
    found = {"key": adapter.keys[0].clone(), "value": adapter.values[0].clone()}
    restore()
    return found


if __name__ == "__main__":
    main()
