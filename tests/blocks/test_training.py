"""Block training of transformers models against PyTorch's AdamW and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from blocks_cases import weights
from double import everything_in_double
from torch import nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, Plan, Stream
from fxmem.blocks.attach import state_of

BETA = 0.1


def backward(net: nn.Module, step: int) -> None:
    gen = torch.Generator().manual_seed(step)
    if step == 3:  # one token, which nothing streams
        ids = torch.randint(0, tiny.VOCAB, (1, 1), generator=gen)
        net(input_ids=ids).logits.square().mean().backward()
        return
    ids = torch.randint(0, tiny.VOCAB, (2, 23), generator=gen)
    net(input_ids=ids, labels=ids).loss.backward()


def layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


@pytest.mark.filterwarnings("ignore:no input has a length")
@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
def test_a_transformers_model_takes_adamw_and_sgd_steps(tied: bool) -> None:
    """Against torch.optim.AdamW, made anew at every visit. A head that is the embedding is frozen
    where only deeper parameters learn.
    """
    with everything_in_double():
        changes = {"num_hidden_layers": 3, "tie_word_embeddings": tied}
        net, plain = (tiny.model("llama", **changes).double() for _ in range(2))
        blocks = Blocks(steps=2, inactive=SGD(BETA))
        fxmem.transform(net, Plan(stream=Stream(chunk=8, loss_chunk=5), blocks=blocks))
        opt = BlockAdamW(net, lr=0.01)
        reference: Any = None
        for step in range(5):
            old, active = weights(net), set(state_of(net).active)
            plain.load_state_dict(net.state_dict())
            plain.zero_grad()
            backward(plain, step)
            grads = {n: p.grad for n, p in plain.named_parameters()}
            if step % 2 == 0:
                copies = {n: nn.Parameter(old[n].clone()) for n in active}
                kinds = [[p for p in copies.values() if (p.ndim > 1) is w] for w in (True, False)]
                reference = torch.optim.AdamW(
                    [
                        {"params": kinds[0], "weight_decay": 0.01},
                        {"params": kinds[1], "weight_decay": 0.0},
                    ],
                    lr=0.01,
                )
            backward(net, step)
            opt.step()
            net.zero_grad()
            for n, p in copies.items():
                p.grad = grads[n]
            reference.step()
            first = min(layer(n) for n in active)
            for n, p in net.named_parameters():
                last = layer(n) < 0 and "embed" not in n
                if n in active:
                    want = copies[n].detach()
                elif last or layer(n) > first:
                    want = old[n] - BETA * grads[n]
                else:
                    assert torch.equal(p, old[n]), n
                    continue
                torch.testing.assert_close(p.detach(), want, rtol=1e-11, atol=1e-13)
