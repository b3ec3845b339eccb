"""Compile every kernel ahead of time for GPUs that are not there, and tabulate what it uses.

    python -m benchmarks.aot --out benchmarks/results/kernels

For each kernel, sample and tuning configuration, and for sm_80 (A100), sm_90 (H100) and gfx942
(MI300): registers per thread, bytes spilled, shared memory. Compiled is what the launcher would
start: it runs on meta tensors while launches are recorded. Needs Triton, no GPU. Registers and
spills are read from the binary: NVIDIA's by the ``cuobjdump`` that comes with Triton (a stack frame
is counted as spilled), AMD's (vector
registers and scratch memory) from the metadata in the assembly.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fxmem.kernels import chunk_attention_backward  # noqa: E402
from fxmem.kernels._attention_samples import heads  # noqa: E402
from fxmem.kernels._triton import Config, Launch, recording  # noqa: E402
from fxmem.kernels.kernel import Cost, Kernel, Sample  # noqa: E402
from fxmem.kernels.registry import find, kernels  # noqa: E402

# Shared memory per program in bytes: CUDA C Programming Guide, table of compute capabilities;
# AMD CDNA 3 ISA (64 KiB of LDS per compute unit).
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float64": "*fp64",
    "int64": "*i64",
    "int32": "*i32",
    "bool": "*i1",
    "uint8": "*u8",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel uses; bytes per thread for spills, per program for shared memory."""

    kernel: str
    sample: str
    function: str
    config: str
    default: bool
    target: str
    registers: int
    spills: int
    shared: int
    error: str = ""

    @property
    def fits(self) -> bool:
        """It compiled, and its shared memory is there on the target."""
        return not self.error and self.shared <= TARGETS[self.target][3]


def record(
    kernel: Kernel, sample: Sample, target: str, config: Config | None = None
) -> list[Launch]:
    """The launches of a sample on a target; ``None``: with its default configuration."""
    args, kwargs = sample.arguments()
    with recording(amd=TARGETS[target][0] == "hip") as launches:
        kernel.launch(*args, **kwargs, **({} if config is None else {"config": config}))
    return launches


def source(launch: Launch) -> Any:
    """The launch as Triton specialises it: types, constants, what is divisible by 16."""
    from triton.compiler import ASTSource

    values = {**launch.args, **launch.config.blocks}
    constant = {p.name for p in launch.fn.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(launch.fn.arg_names):
        value = values[name]
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[str(value.dtype).removeprefix("torch.")]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.fn, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> tuple[int, int, int]:
    """``(registers, spills, shared)`` of a launch on a target; raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, arch, warp, _ = TARGETS[target]
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    binary = triton.compile(source(launch), target=GPUTarget(backend, arch, warp), options=options)
    if backend == "hip":
        found = dict(re.findall(r"\.(\w+_count):\s+(\d+)", binary.asm["amdgcn"]))
        registers = int(found["vgpr_count"])
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", binary.asm["amdgcn"])
        spills = max(4 * int(found["vgpr_spill_count"]), int(scratch))
    else:
        registers, spills = _cubin(binary.asm["cubin"])
    return registers, spills, int(binary.metadata.shared)


def _cubin(cubin: bytes) -> tuple[int, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def table(
    chosen: Sequence[Kernel], targets: Sequence[str], all_configs: bool = False
) -> Iterator[Resources]:
    """One row per compiled kernel function; what a sample compiles twice comes once."""
    for kernel in chosen:
        for sample in kernel.samples:
            for target in targets:
                seen = set()
                configs = (None, *(kernel.configs if all_configs else ()))
                for config in configs:
                    for launch in record(kernel, sample, target, config):
                        key = (launch.config.warps, launch.config.stages, source(launch).hash())
                        if key not in seen:
                            seen.add(key)
                            yield _row(kernel, sample, launch, config is None, target)


def _row(kernel: Kernel, sample: Sample, launch: Launch, default: bool, target: str) -> Resources:
    name, error, used = launch.fn.__name__.lstrip("_"), "", (0, 0, 0)
    try:
        used = compile_launch(launch, target)
    except Exception as failure:  # Triton and its assemblers raise many types; all are the result
        error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
    return Resources(
        kernel.name, sample.label, name, str(launch.config), default, target, *used, error
    )


def markdown(rows: Sequence[Resources]) -> str:
    """A table, the defaults in bold."""
    lines = [
        "| kernel | sample | function | configuration | target | registers | spilled | shared |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for r in rows:
        config = f"**{r.config}**" if r.default else r.config
        used = f"{r.registers} | {r.spills} B | {r.shared / 1024:.1f} KiB"
        used = f"{r.error} | | " if r.error else used
        used += "" if r.fits or r.error else " (too much)"
        lines.append(f"| {r.kernel} | {r.sample} | {r.function} | {config} | {r.target} | {used} |")
    return "\n".join(lines) + "\n"


HEAD_SIZES = (16, 32, 64, 80, 96, 128, 160, 192, 256)


def head_sizes(
    sizes: Sequence[int], dtypes: Sequence[str], targets: Sequence[str]
) -> Iterator[Resources]:
    """Attention's default configurations by head size and dtype; causal, no other mask."""
    for name in ("chunk_attention", "chunk_attention_backward"):
        wrap = None if name == "chunk_attention" else chunk_attention_backward.arguments
        for dtype, e in product(dtypes, sizes):
            kind = getattr(torch, dtype)
            sample = Sample(f"E {e}, {dtype}", partial(heads, e, kind, wrap), Cost(0.0, 0.0), kind)
            yield from table([replace(find(name), samples=(sample,))], targets)


def head_markdown(rows: Sequence[Resources]) -> str:
    """Bytes spilled and registers per thread by head size, a line per function."""
    sizes = list(dict.fromkeys(r.sample.split(",")[0] for r in rows))
    lines = [f"| function | dtype | target | {' | '.join(sizes)} |"]
    lines.append("|---" * 3 + "|---:" * len(sizes) + "|")
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for r in rows:
        size, dtype = r.sample.split(", ")
        cell = r.error or f"{r.registers}, {r.spills} B" + ("" if r.fits else " (too much)")
        groups.setdefault((r.function, dtype, r.target), {})[size] = cell
    for key, cells in groups.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells.get(s, '') for s in sizes)} |")
    return "\n".join(lines) + "\n"


HEAD = """# Kernels compiled ahead of time

Written by `python -m benchmarks.aot`. No GPU was used: the figures are read from the compiled
binaries. Default configurations in bold; registers per thread, bytes spilled per thread, shared
memory per program (sm_80: 163 KiB, sm_90: 227 KiB, gfx942: 64 KiB there). A configuration that is
too large for a target is offered to the tuner on the others.

"""


HEAD_OF_HEADS = """# Attention by head size

Written by `python -m benchmarks.aot --heads`. No GPU was used. Registers per thread and bytes
spilled per thread of the default configurations, causal, no other mask.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", help="names; all where none is given")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--default", action="store_true", help="only default configurations")
    parser.add_argument("--heads", action="store_true", help="attention by head size instead")
    parser.add_argument("--out", type=Path, help="folder for aot.md or heads.md")
    options = parser.parse_args()
    if options.heads:
        found = list(head_sizes(HEAD_SIZES, ("bfloat16", "float32"), options.target or [*TARGETS]))
        text = HEAD_OF_HEADS + head_markdown(found)
        print(text)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "heads.md").write_text(text)
        return
    chosen = [find(name) for name in options.kernel] if options.kernel else kernels()
    rows = []
    for row in table(chosen, options.target or list(TARGETS), not options.default):
        flag = " <-- " if row.default and (row.spills or not row.fits) else ""
        print(row.kernel, row.function, row.sample, row.config, row.target, row.registers,
              row.spills, row.shared, row.error, flag, flush=True)  # fmt: skip
        rows.append(row)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "aot.md").write_text(HEAD + markdown(rows))


if __name__ == "__main__":
    main()
