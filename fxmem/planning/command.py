"""``fxmem plan``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fxmem.errors import PlanError
from fxmem.files import check_target, write_text
from fxmem.optional import require
from fxmem.planning.plan_for import plan_for

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def plan(model: Any, options: argparse.Namespace) -> str:
    """Run the command for a configuration, folder or hub id; what it prints."""
    targets: list[Path] = [p for p in (options.save, options.html, options.picture) if p]
    for target in targets:
        check_target(target)
    if options.html or options.picture:
        require("matplotlib")  # before minutes of work
    if options.dtype is not None and options.dtype not in DTYPES:
        raise PlanError(f"dtype is {options.dtype!r}", advice=f"one of {', '.join(DTYPES)}")
    console = require("rich.console").Console(stderr=True)
    with console.status("") as status:
        forecast = plan_for(
            model, memory=options.memory, length=options.length, batch=options.batch,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            optimizer=options.optimizer, device=options.device, rank=options.rank,
            ranks=options.ranks,
            say=status.update if sys.stderr.isatty() else lambda line: None,
        )  # fmt: skip
    if options.save:
        write_text(options.save, forecast.plan.to_toml())
    if options.html:
        forecast.to_html(options.html)
    if options.picture:
        forecast.plot(options.picture)
    return json.dumps(forecast.to_dict(), indent=1) if options.json else str(forecast)
