"""The demo's picture as one HTML file that needs nothing else: SVG, a table, values on hover."""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any

from fxmem.demo.picture import COLOURS, curves, headline, readable, unit_for
from fxmem.demo.worker import SETUPS
from fxmem.measure.live import Timeline
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

WIDTH, HEIGHT = 960, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the page."""
    shown = curves(report)
    seconds = max((curve.times[-1] for curve in shown.values() if curve.times), default=0.0) or 1.0
    top = 1.05 * max(curve.peak for curve in shown.values()) or 1.0
    data = [
        {
            "name": SETUPS[name],
            "colour": COLOURS[name],
            "times": [round(at, 4) for at in curve.times],
            "live": list(curve.live),
        }
        for name, curve in shown.items()
    ]
    path.write_text(
        _PAGE.substitute(
            title=html.escape(headline(report)),
            axes=_axes(seconds, top),
            paths="\n".join(_path(name, curve, seconds, top) for name, curve in shown.items()),
            rows="\n".join(_row(name, result) for name, result in report["setups"].items()),
            data=json.dumps(data).replace("<", "\\u003c"),
            geometry=json.dumps([LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT, seconds, top]),
            width=WIDTH,
            height=HEIGHT,
        )
    )


def _x(at: float, seconds: float) -> float:
    return LEFT + at / seconds * (WIDTH - LEFT - RIGHT)


def _y(size: float, top: float) -> float:
    return HEIGHT - BOTTOM - max(0.0, size) / top * (HEIGHT - TOP - BOTTOM)


def _path(name: str, curve: Timeline, seconds: float, top: float) -> str:
    steps = [f"M{LEFT},{_y(0, top):.1f}"]
    for at, size in zip(curve.times, curve.live, strict=True):
        steps.append(f"H{_x(at, seconds):.1f}V{_y(size, top):.1f}")
    drawn, colour = "".join(steps), COLOURS[name]
    filled = f'<path d="{drawn}V{_y(0, top):.1f}Z" fill="{colour}" fill-opacity=".13"/>'
    return f'{filled}<path d="{drawn}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _axes(seconds: float, top: float) -> str:
    scale, unit = unit_for(top)
    parts = []
    for value in _ticks(top / scale):
        y = _y(value * scale, top)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{value:g}</text>')
    for value in _ticks(seconds):
        x = _x(value, seconds)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="mid">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="mid">seconds in the step</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" class="mid">'
        f"live tensor memory above the parameters ({unit})</text>"
    )
    return "".join(parts)


def _ticks(largest: float) -> list[float]:
    """Round values from 0 up to ``largest``."""
    values = require("matplotlib.ticker").MaxNLocator(6).tick_values(0.0, largest)
    return [round(float(value), 9) for value in values if 0.0 <= value <= largest]


def _row(name: str, result: dict[str, Any]) -> str:
    dot = f'<span class="dot" style="background:{COLOURS[name]}"></span>'
    if result["status"] != OK:
        reason = html.escape(f"{result['status']}: {result['reason']}")
        return f'<tr><td>{dot}{SETUPS[name]}</td><td colspan="6">{reason}</td></tr>'
    cells = [
        readable(result["process_peak"]),
        readable(result["peak"]),
        f"{result['median_seconds']:.2f}",
        f"{result['first_seconds']:.2f}",
        f"{result['losses'][0]:.4f} → {result['losses'][-1]:.4f}",
        f"{result['difference']:.1e}" if "difference" in result else "reference",
    ]
    return f"<tr><td>{dot}{SETUPS[name]}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fxmem demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: light-dark(#22303c, #e6edf3);
  --faint: light-dark(#d8dee4, #38444f); --paper: light-dark(#fff, #12181e); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
svg { width: 100%; height: auto; }
svg line { stroke: var(--faint); } svg text { fill: var(--ink); font-size: 12px; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }
#values { min-height: 1.6em; } #values span { margin-right: 1.5em; }
</style></head><body>
<h1>$title</h1>
<svg viewBox="0 0 $width $height" role="img" aria-label="$title">$axes$paths
<line id="cursor" y1="16" y2="376" x1="-9" x2="-9"/></svg>
<p id="values">Move over the picture to read values.</p>
<table><thead><tr><th>setup</th><th>process peak</th><th>live tensors, peak</th>
<th>s per step</th><th>s, first step</th><th>loss</th>
<th>gradient error</th></tr></thead><tbody>
$rows
</tbody></table>
<script>
const data = $data, [left, right, top_, bottom, width, height, seconds, most] = $geometry;
const svg = document.querySelector("svg"), cursor = document.getElementById("cursor");
const values = document.getElementById("values");
const size = b => b >= 1000 * 2**20
  ? (b / 2**30).toFixed(2) + " GiB" : (b / 2**20).toFixed(0) + " MiB";
function at(curve, t) {
  if (t > curve.times[curve.times.length - 1]) return null;
  let low = 0, high = curve.times.length - 1;
  while (low < high) { const m = (low + high + 1) >> 1;
    if (curve.times[m] <= t) low = m; else high = m - 1; }
  return curve.live[low];
}
svg.addEventListener("pointermove", e => {
  const x = (e.clientX - svg.getBoundingClientRect().left) * width / svg.clientWidth;
  const t = (x - left) / (width - left - right) * seconds;
  if (t < 0 || t > seconds) return;
  cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
  values.replaceChildren(...[["var(--ink)", t.toFixed(2) + " s"], ...data.map(c => {
    const live = at(c, t);
    return [c.colour, c.name + ": " + (live === null ? "finished" : size(live))];
  })].map(([colour, text]) => {
    const span = document.createElement("span");
    span.style.color = colour; span.textContent = text; return span; }));
});
</script></body></html>
""")
