"""Kernels and a whole step on a GPU, in one command:

    python -m benchmarks.gpu --out out/gpu

Every kernel against PyTorch and, where installed, Liger, CCE (exact gradients) and flash-attn: all
of a case run on the same tensors, and the largest difference from PyTorch's result stands beside
the time. Then a training step of a stack of decoder layers shaped like Llama 3 8B: activation
checkpointing against fxmem. ``--tune`` runs every tuning configuration. Writes ``gpu.json``,
``gpu.md`` and ``gpu.png``. Without a GPU, ``--device cpu --small`` shows that it works; its times
mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_case import Case, Setting
from benchmarks.gpu_cases import CASES
from fxmem.measure.live import peak_bytes

MIB = 2**20
Row = dict[str, Any]


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one to warm up; on a GPU by its own events."""
    run()
    if device.type != "cuda":
        return statistics.median(_wall(run) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_case(case: Case, setting: Setting, repeats: int) -> list[Row]:
    """One row per implementation; a failure is a row with its reason."""
    expected = None
    rows = []
    # PyTorch first: the others are compared with it.
    order = sorted(case.implementations, key=lambda label: not label.startswith("torch"))
    for label in order:
        run = case.implementations[label]
        row: Row = {"case": case.name, "size": case.size, "implementation": label}
        rows.append(row)
        if isinstance(run, str):
            row["reason"] = run
            continue
        try:
            results = run()
            if expected is None:
                expected = [x.clone() for x in results]
            row["difference"] = max(
                float((a.double() - b.double()).abs().max() / b.double().abs().max())
                for a, b in zip(results, expected, strict=True)
            )
            del results
            row["peak"] = peak_bytes(run, setting.device)
            row["seconds"] = seconds(run, setting.device, repeats)
        except Exception as failure:  # out of memory, a rival's limits: reported, not hidden
            row["reason"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"
            continue
        row["tflops"] = case.cost.flops / row["seconds"] / 1e12
        row["gbytes"] = case.cost.bytes / row["seconds"] / 1e9
    return sorted(rows, key=lambda row: list(case.implementations).index(row["implementation"]))


def stack(small: bool, layers: int) -> Any:
    """A causal LM of decoder layers shaped like Llama 3 8B, or tiny, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, int] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    if small:
        shape = {
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128,
        }  # fmt: skip
    config = LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False)
    config.max_position_embeddings = 1 << 20
    return LlamaForCausalLM(config)


def checkpointing(model: Any, on: bool) -> None:
    """transformers' activation checkpointing, by its name in version 5 or later."""
    new, old = ("activation", "gradient")
    name = f"{new}_checkpointing_{'enable' if on else 'disable'}"
    getattr(model, name, getattr(model, name.replace(new, old), None))()


def measure_steps(setting: Setting, lengths: Sequence[int], layers: int, repeats: int) -> list[Row]:
    """Forward and backward of the stack, at each length: checkpointing, then fxmem."""
    import fxmem

    rows = []
    with setting.device:
        torch.manual_seed(0)
        model = stack(setting.small, layers).to(setting.dtype).train()
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=setting.device)

        def step(ids: torch.Tensor = ids) -> torch.Tensor:
            model.zero_grad()
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss.detach()

        expected = None
        for label in ("checkpointing", "fxmem"):
            row: Row = {"case": "step", "size": f"{layers} layers, T {length}"}
            row["implementation"] = label
            rows.append(row)
            if label == "fxmem":
                checkpointing(model, False)
                fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream()))
            else:
                checkpointing(model, True)
            try:
                loss = step().double()
                expected = loss if expected is None else expected
                row["difference"] = float((loss - expected).abs() / expected.abs())
                row["peak"] = peak_bytes(step, setting.device)
                row["seconds"] = seconds(step, setting.device, repeats)
            except torch.OutOfMemoryError as failure:
                row["reason"] = f"out of memory: {str(failure).splitlines()[0][:100]}"
            finally:
                model.zero_grad()
                if label == "fxmem":
                    fxmem.restore(model)
                gc.collect()
    return rows


def markdown(rows: Sequence[Row], about: str) -> str:
    """The table; a case's fastest time in bold."""
    lines = [
        "# GPU benchmark\n", f"{about}\n",
        "| case | size | implementation | ms | peak MiB | TFLOP/s | GB/s | difference |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        head = f"| {row['case']} | {row['size']} | {row['implementation']} |"
        if "reason" in row:
            lines.append(f"{head} not run: {row['reason'].replace('|', '/')} | | | | |")
            continue
        same = [r for r in rows if (r["case"], r["size"]) == (row["case"], row["size"])]
        best = row["seconds"] == min(r["seconds"] for r in same if "seconds" in r)
        time_text = f"{row['seconds'] * 1e3:.3f}"
        rates = [f"{row[key]:.1f}" if row.get(key) else "" for key in ("tflops", "gbytes")]
        lines.append(
            f"{head} {f'**{time_text}**' if best else time_text} | {row['peak'] / MIB:.1f} | "
            f"{rates[0]} | {rates[1]} | {row['difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path, about: str) -> None:
    """Time and peak memory of every case, as bars."""
    from fxmem.optional import require

    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    done = [row for row in rows if "seconds" in row]
    cases = list(dict.fromkeys((row["case"], row["size"]) for row in done))
    height = 0.9 * len(cases) + 0.22 * len(done) + 1
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(11, height), squeeze=False, layout="constrained"
    )
    for line, case in zip(axes, cases, strict=True):
        found = [row for row in done if (row["case"], row["size"]) == case]
        labels = [row["implementation"] for row in found]
        colours = ["#00798c" if label.startswith("fxmem") else "#b5803a" for label in labels]
        for panel, key, scale, unit in zip(
            line, ("seconds", "peak"), (1e-3, MIB), ("ms", "peak MiB"), strict=True
        ):
            sizes = [row[key] / scale for row in found]
            bars = panel.barh(range(len(found)), sizes, color=colours)
            panel.bar_label(bars, [f"{size:.3g}" for size in sizes], padding=3, fontsize=8)
            panel.set_yticks(range(len(found)), labels, fontsize=8)
            panel.set_xlim(right=1.2 * (max(sizes) or 1.0))
            panel.set_xlabel(unit, fontsize=8)
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_title(f"{case[0]}: {case[1]}", fontsize=9, loc="left")
    figure.suptitle(about, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe(setting: Setting) -> str:
    """Device, dtype and versions."""
    name = "CPU, tiny sizes: times mean nothing"
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
    return f"{name}; {str(setting.dtype).removeprefix('torch.')}; torch {torch.__version__}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--case", action="append", choices=[*CASES, "step"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--tune", action="store_true", help="every tuning configuration")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the step")
    parser.add_argument("--length", type=int, action="append", help="tokens of the step")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --small shows that the benchmark works")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    setting = Setting(
        torch.device(options.device), getattr(torch, options.dtype), options.small, options.tune
    )
    rows: list[Row] = []
    for name in options.case or [*CASES, "step"]:
        torch.manual_seed(0)
        if name == "step":
            lengths = options.length or ([96] if options.small else [8192, 16384, 32768, 65536])
            rows += measure_steps(setting, lengths, options.layers, max(1, options.repeats // 5))
        else:
            rows += measure_case(CASES[name](setting), setting, options.repeats)
        for row in rows[-8:]:
            if row["case"] == rows[-1]["case"]:
                print({k: v for k, v in row.items() if k in ("case", "implementation", "seconds",
                       "difference", "reason")}, flush=True)  # fmt: skip
        gc.collect()
    options.out.mkdir(parents=True, exist_ok=True)
    about = describe(setting)
    (options.out / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    (options.out / "gpu.md").write_text(markdown(rows, about))
    draw(rows, options.out / "gpu.png", about)


if __name__ == "__main__":
    main()
