"""A forecast as one HTML page that needs nothing else: text, tables, and the picture inside."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from fxmem.files import check_target, write_text
from fxmem.planning.answer import Answer, size
from fxmem.planning.picture import draw
from fxmem.planning.text import HEADS, cells, duration, title


def write_page(forecast: Answer, path: Path) -> None:
    """Write the page.

    Raises:
        FileError: it cannot be written.
    """
    check_target(path)
    write_text(path, page(forecast))


def page(forecast: Answer) -> str:
    """The page."""
    drawn = io.StringIO()
    draw(forecast, drawn, "svg")
    picture = drawn.getvalue()
    rows = [
        _row(cells(forecast, row), "chosen" if row == forecast.chosen else "")
        for row in forecast.rows
    ]
    peak = ("peak", size(sum(forecast.parts.values())))
    parts = [peak, *((name, size(count)) for name, count in forecast.parts.items())]
    lines = [*forecast.keeps, f"about {duration(forecast.seconds)} per step", *forecast.notes]
    lines += [str(forecast.traffic)] if forecast.traffic is not None else []
    return _PAGE.substitute(
        title=escape(title(forecast)),
        length=f"{forecast.length:,}",
        chosen=escape(f"{forecast.chosen.method}, {forecast.chosen.optimizer}"),
        heads="".join(f"<th>{escape(h)}</th>" for h in HEADS),
        rows="\n".join(rows),
        parts="\n".join(_row(p, "") for p in parts),
        lines="\n".join(f"<li>{escape(line)}</li>" for line in lines),
        picture=picture[picture.index("<svg") :],
        plan=escape(forecast.plan.to_toml()),
    )


def _row(values: Sequence[str], kind: str) -> str:
    return f'<tr class="{kind}">' + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What fits: $title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; background: #fff;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #d8dee4; text-align: right; }
th:nth-child(-n+2), td:first-child, td:nth-child(2):not(:last-child) { text-align: left; }
.chosen { background: #e2f1f3; font-weight: 600; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; }
.wide { overflow-x: auto; }
</style></head><body>
<h1>$title</h1>
<p>Memory and time are those of a step of $length tokens per sequence. The marked row is planned
below: $chosen.</p>
<div class="wide"><table><thead><tr>$heads</tr></thead><tbody>
$rows
</tbody></table></div>
<h2>The chosen step</h2>
<table><tbody>
$parts
</tbody></table>
<ul>
$lines
</ul>
$picture
<h2>The plan</h2>
<pre>$plan</pre>
</body></html>
""")
