"""Write a smaller model to a folder and read it back.

The folder holds ``config.json``, the cut weights in the safetensors format, and ``pruning.json``
with the shapes, the kept indices, the size attributes and the eps of the norms (their weights are
stored rescaled). Where some config makes the stock class this model (`fxmem.prune.shrink.stock`),
it is that one, and transformers loads the folder as any other. Else the config is the dense one, of
an architecture ``Pruned<name>`` and a model type that transformers does not know and refuses.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fxmem import files
from fxmem.errors import PlanError, PruningFileError
from fxmem.frontend.experts import settle
from fxmem.prune.coupling.find_groups import coupling as trace
from fxmem.prune.coupling.match_norms import set_epsilons
from fxmem.prune.shrink.made import origin, record, reduced
from fxmem.prune.shrink.size_attributes import SizeAttribute, apply, attributes, remember
from fxmem.prune.shrink.slicing import resize
from fxmem.prune.shrink.stock import MetaParameters, stock_config
from fxmem.prune.units.masks import Masks, axis_keeps
from fxmem.prune.units.units import Coupling, UnitGroup

FILE, WEIGHTS, PREFIX = "pruning.json", "model.safetensors", "Pruned"
FIRST_WEIGHTS = "pruned.safetensors"
"""The name of version 0.1.0."""
GENERATION = "generation_config.json"
VERSION = 1


def mark(small: nn.Module, plan: Coupling, masks: Masks) -> None:
    """Record how ``small`` was made; its own ``save_pretrained``, which trainers call, writes what
    can be read again."""
    record(small, plan, masks)
    if hasattr(type(small), "save_pretrained"):
        vars(small)["save_pretrained"] = functools.partial(_saved_by_itself, small)


def _saved_by_itself(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None, push_to_hub: bool = False,
    **unused: Any,
) -> None:  # fmt: skip
    """As transformers' method of the same name; in one file, whatever the other options say.

    Raises:
        PlanError: for ``push_to_hub``.
    """
    if push_to_hub:
        raise PlanError(
            "a smaller model is not pushed while it is saved", advice="save it, upload the folder"
        )
    if is_main_process:
        save_pretrained(model, save_directory, state_dict=state_dict)


def save_pretrained(
    model: nn.Module, folder: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Save a model that fxmem made smaller (a dense one too); ``folder`` is made if missing.

    Where the widths of all layers are equal (``Prune(uniform=True)``), transformers loads the
    folder too. Each file is replaced whole, and ``pruning.json`` last.

    Args:
        model: a model of transformers.
        folder: where to.
        state_dict: values of the weights instead of the model's own.

    Raises:
        FileError: the folder cannot be written to.
        PlanError: a model that is not of transformers.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise PlanError(
            f"{type(model).__name__} is no model of transformers, so it has no config to write",
            advice="keep it with torch.save(model, file), as any other module",
        )
    where = files.folder(Path(folder))
    made = origin(model)
    plan, masks = made if made is not None else _whole(model)
    found = attributes(model, reduced(plan, masks))
    config: Any = model.config
    stock = stock_config(model, plan, masks)
    values = (stock or config).to_dict()
    name, kind = type(model).__name__, values["model_type"]
    values["architectures"] = [name]
    if stock is None:
        values["architectures"] = [PREFIX + name]
        # transformers picks the class by model_type: an unknown one is refused, never guessed
        values["model_type"] = f"fxmem-pruned-{kind}"
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    for key, t in model.state_dict(keep_vars=True).items():
        if id(t) in seen:
            ties[key] = seen[id(t)]
            continue
        seen[id(t)] = key
        tensors[key] = (t if state_dict is None else state_dict[key]).detach().contiguous()
    save = secrets.token_hex(8)
    with files.replacing(where / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt", "save": save})
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    files.write_text(where / "config.json", text)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        files.write_text(where / GENERATION, generation.to_json_string())
    data = {
        "version": VERSION,
        "save": save,
        "class": name,
        "model_type": kind,
        "attn_implementation": config._attn_implementation,
        "experts_implementation": getattr(config, "_experts_implementation", None),
        "masks": masks.to_dict(),
        "coupling": asdict(plan),
        "attributes": [asdict(e) for e in found],
        "ties": ties,
    }
    files.write_text(where / FILE, json.dumps(data, indent=1, sort_keys=True))
    (where / FIRST_WEIGHTS).unlink(missing_ok=True)  # of an earlier save


def _whole(model: nn.Module) -> tuple[Coupling, Masks]:
    plan = trace(model)
    return plan, Masks.full(plan)


def from_pretrained(folder: str | Path, **config_options: Any) -> nn.Module:
    """Load what :func:`save_pretrained` wrote, in evaluation mode, on the CPU.

    ``config_options`` replace fields of the config, such as ``attn_implementation="eager"``.

    Raises:
        PruningFileError: ``pruning.json`` or the weights are missing, damaged or do not fit.
    """
    where = Path(folder)
    data = _read(where)
    try:
        masks = Masks.from_dict(data["masks"])
        plan = _coupling(data["coupling"])
        found = tuple(SizeAttribute(**e) for e in data["attributes"])
        ties = dict(data["ties"])
        masks = masks.on(plan)
        model = _skeleton(where, data, config_options)
        small_shapes = _shrink(model, plan, masks, found)
        tensors = _weights(where, data.get("save"))
        _fill(model, tensors, where, ties, small_shapes)
        mark(model, plan, masks)
        remember(model, reduced(plan, masks), found)
    except (PruningFileError, MemoryError):
        raise
    except Exception as error:  # what transformers makes of a damaged config is its own business
        text = f"{type(error).__name__}: {error}"
        raise PruningFileError(f"the files in {where} are damaged: {text}") from error
    settle(model)
    return model.eval()


def _read(where: Path) -> dict[str, Any]:
    try:
        data = json.loads((where / FILE).read_text())
    except FileNotFoundError as error:
        raise PruningFileError(f"{where} has no {FILE}") from error
    except OSError as error:
        raise PruningFileError(f"{where / FILE} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PruningFileError(f"{where / FILE} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise PruningFileError(f"{where / FILE} is not of version {VERSION}")
    return data


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _coupling(data: dict[str, Any]) -> Coupling:
    groups = tuple(UnitGroup(**{k: _tuples(v) for k, v in g.items()}) for g in data["groups"])
    return Coupling(groups, **{k: _tuples(v) for k, v in data.items() if k != "groups"})


def _skeleton(where: Path, data: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """The dense module on the CPU with parameters on meta; buffers are made as the model does."""
    import transformers

    cls = getattr(transformers, str(data["class"]))
    values = json.loads((where / "config.json").read_text())
    values["architectures"], values["model_type"] = [data["class"]], data["model_type"]
    values["attn_implementation"] = data["attn_implementation"]
    if data.get("experts_implementation") is not None:
        values["experts_implementation"] = data["experts_implementation"]
    config = cls.config_class.from_dict({**values, **options})
    with MetaParameters():
        model: nn.Module = cls(config)
    if (where / GENERATION).exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(where)
    return model


def _shrink(
    model: nn.Module, plan: Coupling, masks: Masks, found: tuple[SizeAttribute, ...]
) -> dict[str, tuple[int, ...]]:
    shapes = {n: list(s) for n, s in plan.shapes}
    for (name, axis), keep in axis_keeps(plan, masks).items():
        shapes[name][axis] = int(keep.sum())
    for module in model.modules():
        module._parameters = dict(module._parameters)
    apply(model, found, masks)
    set_epsilons(model, plan, masks)
    return {n: tuple(s) for n, s in shapes.items()}


def _weights(where: Path, save: str | None) -> dict[str, torch.Tensor]:
    """Tensors of the file that was written together with ``pruning.json``."""
    first = where / FIRST_WEIGHTS
    file = first if first.exists() and not (where / WEIGHTS).exists() else where / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            own = (opened.metadata() or {}).get("save")
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise PruningFileError(f"{file} cannot be read: {error}") from error
    if own != save:
        raise PruningFileError(f"{file} and {FILE} are of different saves")
    return tensors


def _fill(
    model: nn.Module, tensors: dict[str, torch.Tensor], where: Path, ties: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
) -> None:  # fmt: skip
    wanted = set(model.state_dict()) - set(ties)
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))
        raise PruningFileError(f"{where / WEIGHTS} and the model differ in {odd[:3]}")
    wrong = [n for n, s in shapes.items() if n in tensors and tuple(tensors[n].shape) != s]
    if wrong:
        raise PruningFileError(
            f"{where / WEIGHTS}: {wrong[0]} has {tuple(tensors[wrong[0]].shape)}"
        )
    made: dict[str, Any] = {}
    for name in list(tensors):
        # A copy is aligned as a parameter made in memory is: products round by alignment where the
        # inner axis is odd, and the file packs tensors without gaps.
        t = tensors.pop(name).clone()
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if t.data_ptr() % 64:
            t = t.clone()  # products round differently on memory aligned unlike torch's own
        if leaf in owner._parameters:
            made[name] = owner._parameters[leaf] = nn.Parameter(
                t, requires_grad=t.is_floating_point()
            )
        else:
            made[name] = owner._buffers[leaf] = t
    for name, source in ties.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = made[source]
    resize(model)
