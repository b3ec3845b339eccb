"""Stream a Hugging Face model: the same loss and gradients, a fraction of the memory.

Run: ``python examples/stream_hf_model.py``
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.measure.live import MIB, peak_bytes

LENGTH = 1024


def build() -> LlamaForCausalLM:
    """A Llama with random weights; every call gives the same ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def step(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> float:
    """One forward and backward; gradients are left on the parameters."""
    model.zero_grad()
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    return loss.item()


def peak(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> int:
    """Bytes above the parameters at the worst moment of a step, gradients included."""
    model.zero_grad()
    return peak_bytes(lambda: step(model, ids_BT))


def main() -> None:
    plain, streamed = build(), build()
    ids_BT = torch.randint(plain.config.vocab_size, (1, LENGTH))

    # The whole integration. Class, parameters, state_dict and generate stay as they are.
    fxmem.transform(streamed, fxmem.Plan(stream=fxmem.Stream(chunk=128, loss_chunk=128)))

    expected, got = step(plain, ids_BT), step(streamed, ids_BT)
    difference = max(
        (a.grad - b.grad).abs().max().item()
        for a, b in zip(plain.parameters(), streamed.parameters(), strict=True)
    )
    largest = max(p.grad.abs().max().item() for p in plain.parameters())
    peak_plain, peak_streamed = peak(plain, ids_BT), peak(streamed, ids_BT)

    print(f"loss                       plain {expected:.6f}   fxmem {got:.6f}")
    print(f"largest gradient difference      {difference:.1e} (largest gradient {largest:.1e})")
    print(f"peak above the parameters  plain {peak_plain / MIB:.1f} MiB", end="   ")
    print(f"fxmem {peak_streamed / MIB:.1f} MiB")

    assert abs(expected - got) < 1e-4
    assert difference < 1e-5 * max(1.0, largest)
    assert peak_streamed < peak_plain / 3


if __name__ == "__main__":
    main()
