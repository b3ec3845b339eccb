"""DPO and GRPO as plain PyTorch functions. fxmem has no code for either: it compiles them.

Run: ``python examples/dpo_and_grpo.py``
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxmem import Plan, Stream

LENGTH, VOCABULARY = 257, 1024


def token_log_probs(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """log p(token | tokens before it), [B, T - 1]."""
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    return logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)


def dpo(model: nn.Module, ids_2T: Tensor, reference_2: Tensor) -> Tensor:
    """Row 0 is preferred to row 1; ``reference_2`` are the reference model's sums."""
    gain_2 = token_log_probs(model, ids_2T).sum(-1) - reference_2
    return -F.logsigmoid(0.1 * (gain_2[0] - gain_2[1]))


def grpo(model: nn.Module, ids_BT: Tensor, advantage_B: Tensor) -> Tensor:
    """Clipped ratio per token; each row is one sampled answer with its advantage."""
    logp_BT = token_log_probs(model, ids_BT)
    ratio_BT = torch.exp(logp_BT - logp_BT.detach())
    advantage_B1 = advantage_B[:, None]
    clipped_BT = ratio_BT.clamp(0.8, 1.2)
    return -torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1).mean()


def compare(name: str, loss_of: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> None:
    """Loss and every gradient, streamed against plain autograd."""
    streamed = copy.deepcopy(model)
    plan = Plan(stream=Stream(chunk=64, loss_chunk=64))
    step = torch.compile(loss_of, backend="fxmem", options={"plan": plan}, fullgraph=True)
    expected, got = loss_of(model, *inputs), step(streamed, *inputs)
    expected.backward(), got.backward()
    pairs = zip(model.parameters(), streamed.parameters(), strict=True)
    worst = max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in pairs)
    print(f"{name}: loss {got.item():.8f}, largest relative difference of a gradient {worst:.1e}")
    assert abs(expected.item() - got.item()) < 1e-10
    assert worst < 1e-10
    model.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).double().train()
    with torch.no_grad():
        reference_2 = token_log_probs(model, pair_2T := torch.randint(VOCABULARY, (2, LENGTH)))
    compare("DPO ", dpo, model, pair_2T, reference_2.sum(-1) + torch.tensor([0.5, -0.5]))
    group_BT = torch.randint(VOCABULARY, (3, LENGTH))
    compare("GRPO", grpo, model, group_BT, torch.tensor([1.2, -0.7, -0.3], dtype=torch.double))


if __name__ == "__main__":
    main()
