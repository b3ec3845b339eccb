"""A training call makes no cache of keys and values for nobody; who asks for one gets it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from double import everything_in_double
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem import Plan, Stream, api
from fxmem._compat.repeated_layers import AVAILABLE, Sharing

LAYERS = 3


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


class Wrapped(nn.Module):
    """Hands on what it is given by name, as adapters' wrappers do."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids=ids, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.skipif(not AVAILABLE, reason="PyTorch before 2.13 traces every layer")
def test_layers_share_a_trace_in_a_call_with_default_arguments(
    wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sharing] = []
    monkeypatch.setattr(api, "Sharing", lambda *a: made.append(Sharing(*a)) or made[-1])
    plain: nn.Module = Wrapped(llama()) if wrapped else llama()
    model = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4)))
    ids = torch.randint(0, 17, (1, 11))
    with everything_in_double():
        for m in (plain, model):
            m(ids, labels=ids).loss.backward()
    assert (made[-1].traced, made[-1].stamped) == (1, LAYERS - 1)
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_a_cache_that_is_asked_for_is_made() -> None:
    model = fxmem.transform(llama(), Plan(stream=Stream(chunk=4)))
    ids = torch.randint(0, 17, (1, 11))

    def cache(**given: Any) -> Any:
        return model(ids, **given).past_key_values

    assert cache() is None
    assert isinstance(cache(use_cache=True), DynamicCache)
    own = DynamicCache(config=model.config)
    assert cache(past_key_values=own) is own
    assert isinstance(model.eval()(ids).past_key_values, DynamicCache)
    with torch.no_grad():
        assert isinstance(model.train()(ids).past_key_values, DynamicCache)


@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("asked", [{}, {"use_cache": False}, {"attention_mask": torch.ones(1, 11)}])
def test_packed_documents_are_what_they_are_to_the_plain_model(
    asked: dict[str, Any], by_place: bool
) -> None:
    """With a cache, and so by default, transformers does not look for them."""
    plain = llama()
    model = fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4)))
    ids = torch.randint(0, 17, (1, 11))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    args = (ids, asked.get("attention_mask"), positions) if by_place else (ids,)
    kwargs = {k: v for k, v in asked.items() if not (by_place and k == "attention_mask")}
    kwargs |= {"labels": ids} | ({} if by_place else {"position_ids": positions})
    with everything_in_double():
        for m in (plain, model):
            m(*args, **kwargs).loss.backward()
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10, msg=name)
