"""The roofline table of docs/kernels.md: what each kernel costs at best, computed, not measured.

    python -m benchmarks.roofline --write

FLOPs and bytes are those of the samples in the kernels' own files; the time is the slower of
computing and moving them (Williams et al., 2009). Peaks are the vendor's for dense products in
bfloat16 and for float32 arithmetic: A100 SXM 80 GB 312 and 19.5 TFLOP/s, 2.039 TB/s; H100 SXM 989
and 66.9 TFLOP/s, 3.35 TB/s (NVIDIA's A100 and H100 data sheets).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fxmem.kernels.kernel import Cost
from fxmem.kernels.registry import kernels

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- roofline -->", "<!-- /roofline -->"
# name -> bf16 products per second, float32 operations per second, bytes per second
DEVICES = {"A100": (312e12, 19.5e12, 2.039e12), "H100": (989e12, 66.9e12, 3.35e12)}


def bound(cost: Cost, device: str) -> tuple[float, str]:
    """Seconds at best, and what bounds them."""
    products, plain, moved = DEVICES[device]
    rate = products if cost.tensor_cores else plain
    limit = "compute" if cost.flops / rate > cost.bytes / moved else "memory"
    return cost.seconds(rate, moved), limit


def table() -> str:
    """Markdown; bfloat16 samples only, since float32 ones run at other peaks."""
    lines = [
        "| kernel | sample | GFLOP | MiB | FLOP per byte | A100, ms | H100, ms | bound |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for kernel in kernels():
        for sample in kernel.samples:
            if sample.dtype != torch.bfloat16:
                continue
            cost = sample.cost
            found = [bound(cost, device) for device in DEVICES]
            limits = " / ".join(dict.fromkeys(limit for _, limit in found))
            times = " | ".join(f"{seconds * 1e3:.3f}" for seconds, _ in found)
            lines.append(
                f"| {kernel.name} | {sample.label} | {cost.flops / 1e9:.3g} | "
                f"{cost.bytes / 2**20:.4g} | {cost.flops / cost.bytes:.3g} | {times} | {limits} |"
            )
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The document's text with the present table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
