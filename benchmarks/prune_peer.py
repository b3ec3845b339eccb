"""torch-pruning on the same model, in a process of its own with a time limit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def torch_pruning(
    folder: str, keep: float, mlps: bool, held: Tensor, options: Any
) -> dict[str, Any]:
    """Perplexity and bytes after its magnitude pruner, or why there is none.

    Args:
        mlps: cut channels of the MLPs alone, as many as the budget of all units asks for.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        return {"status": "torch-pruning is not installed"}
    with tempfile.TemporaryDirectory(prefix="fxmem-peer-") as scratch:
        rows = Path(scratch) / "held.pt"
        torch.save(held, rows)
        command = [sys.executable, "-m", "benchmarks.prune_peer", folder, str(keep), str(rows)]
        command += ["mlps"] * mlps
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=options.peer_seconds,
                check=False,
                cwd=Path(__file__).parent.parent,
            )
        except subprocess.TimeoutExpired:
            return {"status": f"no result in {options.peer_seconds} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()
        return {"status": f"failed: {last[-1][:160] if last else done.returncode}"}
    return {"status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}


def main(folder: str, keep: float, rows: Path, mlps: bool) -> None:
    """Prune heads and channels by group magnitude at the ratio that leaves `keep` of them.

    Version 1.6.1 cannot cut heads that share K/V here: with sdpa attention it raises (the row says
    so); with eager attention and `head_pruning_ratio` its check of a group refuses every head
    group, so the heads stay; without that ratio q and k end with different head sizes.
    """
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    from benchmarks.prune_measure import parameter_bytes, perplexity

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    ids = torch.arange(16)[None] + 2
    heads = {
        layer.self_attn.q_proj: model.config.num_attention_heads for layer in model.model.layers
    }
    heads |= {
        projection: model.config.num_key_value_heads
        for layer in model.model.layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    }
    roots = {layer.mlp.gate_proj: 1 - keep for layer in model.model.layers}
    if mlps:
        parts = [
            sum(p.numel() for name, p in model.model.layers.named_parameters() if part in name)
            for part in (".mlp.", ".self_attn.")
        ]
        roots = {layer: (1 - keep) * sum(parts) / parts[0] for layer in roots}
    else:
        roots |= {layer.self_attn.q_proj: 1 - keep for layer in model.model.layers}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=ids,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict=roots,
        ignored_layers=[model.lm_head],
        num_heads={} if mlps else heads,
        prune_num_heads=not mlps,
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = (
            attention.q_proj.out_features // attention.k_proj.out_features
        )
    held = torch.load(rows, weights_only=True)
    print(json.dumps({
        "perplexity": perplexity(model, held), "parameter_bytes": parameter_bytes(model),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), "mlps" in sys.argv)
