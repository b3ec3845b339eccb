"""Joint graphs of tiny models, traced as a user's training step is, for the tests of the table."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem import Plan, Stream
from fxmem.runtime.region_code import RegionCode


class Small(nn.Module):
    """Ops that the language models do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.head = nn.Linear(12, 24), nn.Linear(12, 17)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(input_ids)
        a, b = self.up(self.norm(x)).chunk(2, -1)
        x = x + torch.cat([a[..., :6], b[..., 6:]], -1).softmax(-1) * torch.tanh(
            x.mean(1, keepdim=True)
        )
        picked = self.head(x).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return -nn.functional.logsigmoid(picked[:, 1:].sum(1) * 0.1).mean()


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": 17, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.1, embd_pdrop=0, attn_pdrop=0))
    model.loss_type = "ForCausalLM"  # else it logs, which Dynamo refuses
    return model


MODELS = {"llama": _llama, "gpt2": _gpt2, "small": Small}


@functools.cache
def region_codes(name: str) -> tuple[RegionCode, ...]:
    """The distinct regions of one training step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model: Any = MODELS[name]()
    ids = torch.randint(17, (2, 23))
    engine = fxmem.backend(Plan(stream=Stream(chunk=8, loss_chunk=8)))
    with torch.random.fork_rng():
        output = torch.compile(model, backend=engine, fullgraph=True)(input_ids=ids, labels=ids)
    (output if isinstance(output, Tensor) else output.loss).backward()
    calls = [c for graph in engine.graphs for c in graph.calls]
    return tuple(dict.fromkeys(c.code for c in calls))
