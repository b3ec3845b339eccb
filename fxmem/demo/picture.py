"""The demo's picture: live bytes over one training step, all setups over one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxmem.demo.worker import SETUPS
from fxmem.measure.live import MIB, Timeline
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

COLOURS = {"plain": "#d1495b", "checkpoint": "#e0a030", "fxmem": "#00798c", "budget": "#66a182"}
INK, FAINT = "#22303c", "#d8dee4"


def curves(report: dict[str, Any]) -> dict[str, Timeline]:
    """The recorded curve of every setup that worked, tallest first so that none hides another."""
    found = {
        name: Timeline.from_dict(result["timeline"])
        for name, result in report["setups"].items()
        if result["status"] == OK
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].peak))


def unit_for(peak: float) -> tuple[float, str]:
    """Bytes per unit and its name, such that ``peak`` reads well."""
    return (2**30, "GiB") if peak >= 1000 * MIB else (MIB, "MiB")


def readable(size: float) -> str:
    """Bytes with three digits and a unit: ``"1.83 GiB"``, ``"76.0 MiB"``."""
    scale, name = unit_for(size)
    value = size / scale
    return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"


def headline(report: dict[str, Any]) -> str:
    """What is shown and, where both were run, how much less fxmem holds than plain autograd."""
    peaks = {name: curve.peak for name, curve in curves(report).items()}
    demo = report["demo"]
    name = {"smollm2": "SmolLM2-135M"}.get(demo["model"], Path(demo["model"]).name)
    what = f"{name}, one training step on {demo['length']:,} tokens"
    if not {"plain", "fxmem"} <= peaks.keys() or peaks["fxmem"] >= peaks["plain"]:
        return what
    less = f"{peaks['plain'] / peaks['fxmem']:.1f} times less above the parameters"
    errors = {name: report["setups"][name].get("difference") for name in ("fxmem", "plain")}
    if errors["fxmem"] is None:
        return f"{what}: {less}"
    if errors["plain"] is None:
        return f"{what}: {less}, gradients within {errors['fxmem']:.0e} of plain autograd"
    against = f"gradient error {errors['fxmem']:.0e} (plain autograd {errors['plain']:.0e})"
    return f"{what}: {less}, {against}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    shown = curves(report)
    style = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    with plt.rc_context(style):
        figure, (over_time, bars) = plt.subplots(
            1, 2, figsize=(12, 5.2), width_ratios=(5, 3), layout="constrained"
        )
        _draw_curves(over_time, shown)
        _draw_bars(bars, report, list(shown))
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04)
        # in two lines: long names and the gradients' part run over the edge otherwise
        title = headline(report).replace(": ", "\n", 1)
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_curves(axes: Any, shown: dict[str, Timeline]) -> None:
    scale, unit = unit_for(max(curve.peak for curve in shown.values()))
    for name, curve in shown.items():
        live = [value / scale for value in curve.live]
        label = f"{SETUPS[name]}: {readable(curve.peak)}"
        axes.fill_between(curve.times, live, step="post", color=COLOURS[name], alpha=0.13, lw=0)
        axes.step(curve.times, live, where="post", color=COLOURS[name], lw=1.6, label=label)
        top = max(range(len(live)), key=live.__getitem__)
        axes.plot(curve.times[top], live[top], "o", color=COLOURS[name], ms=6, mec="white")
    axes.set_xlabel("seconds since the start of the step")
    axes.set_ylabel(f"live tensor memory above the parameters ({unit})")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=1.28 * max(curve.peak for curve in shown.values()) / scale)
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT)
    axes.legend(loc="upper right", frameon=False, ncols=2, handlelength=1.2)


def _draw_bars(axes: Any, report: dict[str, Any], names: list[str]) -> None:
    peaks = [report["setups"][name]["process_peak"] for name in names]
    scale, unit = unit_for(max(peaks))
    heights = [peak / scale for peak in peaks]
    bars = axes.bar(range(len(names)), heights, color=[COLOURS[n] for n in names], width=0.66)
    axes.bar_label(bars, [readable(peak) for peak in peaks], padding=3, fontsize=9)
    axes.set_xticks(range(len(names)), [SETUPS[name].replace(" ", "\n") for name in names])
    axes.tick_params(axis="x", labelsize=9)
    axes.set_ylabel(f"resident memory of the whole process ({unit})")
    axes.set_ylim(top=1.12 * max(heights))
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT, labelsize=10)
