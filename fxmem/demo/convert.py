"""Job: a GGUF file into a plain folder of float32 weights with tokenizer.

In a process of its own, because it holds the weights twice for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxmem.measure.subprocess_job import serve
from fxmem.optional import require


def convert(request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read ``request["gguf"]``, write ``request["folder"]``."""
    import torch

    transformers = require("transformers")
    for name in ("gguf", "sentencepiece"):
        require(name)
    gguf, folder = Path(request["gguf"]), request["folder"]
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # The loaded model still counts as quantized and refuses to be saved; a fresh one does not.
    for holder in (config, loaded):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return {"folder": str(folder)}


if __name__ == "__main__":
    serve(convert)
