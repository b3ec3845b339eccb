"""The table at the end of the demo."""

from __future__ import annotations

from typing import Any

from fxmem.demo.worker import SETUPS
from fxmem.measure.live import MIB
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require


def render(report: dict[str, Any]) -> Any:
    """A rich table: memory, seconds, loss and gradient difference per setup."""
    demo, results = report["demo"], report["setups"]
    title = f"{demo['model']}, {demo['length']} tokens, {demo['steps']} steps ({demo['optimizer']})"
    table = require("rich.table").Table(
        title=title,
        title_style="bold",
        caption=_caption(results, demo.get("exact", False)),
        box=require("rich.box").SIMPLE,
    )
    table.add_column("\nsetup", no_wrap=True)
    for name in ("process\npeak", "tensor\npeak", "s per\nstep", "\nloss", "gradient\nerror"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        style = "bold green" if name == "fxmem" else None
        table.add_row(SETUPS[name], *_cells(result), style=style)
    return table


def _cells(result: dict[str, Any]) -> list[str]:
    if result["status"] != OK:
        return [result["status"], "", "", "", ""]
    first, last = result["losses"][0], result["losses"][-1]
    return [
        f"{result['process_peak'] / MIB:,.0f} MiB",
        f"{result['peak'] / MIB:,.0f} MiB",
        f"{result['median_seconds']:.2f}",
        f"{first:.4f} → {last:.4f}" if len(result["losses"]) > 1 else f"{first:.4f}",
        f"{result['difference']:.1e}" if "difference" in result else "reference",
    ]


def _caption(results: dict[str, dict[str, Any]], exact: bool) -> str:
    worked = [result for result in results.values() if result["status"] == OK]
    if not worked:
        return ""
    size = worked[0]["parameters"] / MIB
    return (
        f"Parameters: {size:,.0f} MiB. In budget: with the memory that checkpointing took. "
        "Process peak: resident memory of the whole process. "
        "Tensor peak: live tensors above parameters and optimizer state, gradients included. "
        "Gradients: largest over all parameters of max|difference| / max|reference|, first step, "
        f"{_REFERENCE[exact]} Seconds: median, without the first step ({_firsts(results)})."
    )


def _firsts(results: dict[str, dict[str, Any]]) -> str:
    """Seconds of the first steps, which pay for capture and compilation."""
    worked = [(name, result) for name, result in results.items() if result["status"] == OK]
    return ", ".join(f"{SETUPS[name]} {result['first_seconds']:.1f}" for name, result in worked)


_REFERENCE = {
    False: "against the first setup, whose own rounding counts too.",
    True: "against plain autograd in float64.",
}
