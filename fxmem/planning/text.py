"""A forecast as text."""

from __future__ import annotations

from fxmem.planning.answer import Answer, Row, size

HEADS = ("", "trains", "longest that fits", "memory", "per token", "away", "per step")


def title(f: Answer) -> str:
    """What was asked, in one line."""
    sequences = f"{f.batch} sequence{'s' * (f.batch > 1)}"
    ranks = "" if f.traffic is None else f"one of {f.traffic.ranks} x "
    return f"{f.model} in {f.dtype} on {ranks}{f.device}: {size(f.memory)}, {sequences} per step"


def cells(f: Answer, row: Row) -> tuple[str, ...]:
    """A row as words, by :data:`HEADS`."""
    fits = f"{row.longest:,} tokens" if row.longest else "nothing"
    over = "" if row.bytes <= f.memory else " (too much)"
    away = size(row.away) if row.away else ""
    bytes_ = size(row.bytes) + over, size(row.per_token), away
    return row.method, row.optimizer, fits, *bytes_, duration(row.seconds)


def duration(seconds: float) -> str:
    """Two digits: ``"0.12 s"``, ``"3.4 min"``."""
    for unit, scale in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.2g} {unit}"
    return f"{seconds:.2g} s"


def text(f: Answer) -> str:
    """The whole forecast."""
    table = [HEADS, *(cells(f, row) for row in f.rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADS))]
    lines = [title(f), "", f"Memory and time are those of {f.length:,} tokens.", ""]
    for at, row in enumerate(table):
        mark = "*" if at and f.rows[at - 1] == f.chosen else " "
        line = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"{mark} {'  '.join(line)}".rstrip())
    peak = sum(f.parts.values())
    lines += ["", f"* {f.chosen.method}, {f.chosen.optimizer}, as fast as the memory allows:"]
    lines += [f"    {'peak':<10}{size(peak):>10}, {duration(f.seconds)} per step"]
    lines += [f"    {name:<10}{size(count):>10}" for name, count in f.parts.items()]
    lines += [f"    {line}" for line in f.keeps]
    lines += [f"    {line}" for line in (f.traffic,) if line is not None]
    lines += [f"Note: {note}" for note in f.notes]
    return "\n".join([*lines, "", f.plan.to_toml().rstrip()])
