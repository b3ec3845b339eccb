"""Hooks that record hidden states are installed once, whoever asks for them first."""

from __future__ import annotations

import pytest
import tiny
import torch

from fxmem._compat import recorded_outputs


@pytest.mark.parametrize("plain_first", [False, True])
def test_every_state_is_recorded_once(plain_first: bool) -> None:
    model = tiny.model().eval()
    asked = {"input_ids": torch.arange(6).view(1, 6), "output_hidden_states": True}
    if plain_first:
        model(**asked)
    assert recorded_outputs.install(model, asked)
    inside = model.get_submodule("model")
    assert len(model(**asked).hidden_states) == 3
    layers = inside.get_submodule("layers")
    assert [len(layer._forward_hooks) for layer in layers.children()] == [1, 1]
