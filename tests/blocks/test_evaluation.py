"""Calls without gradients in the middle of training: low-rank terms take part, as in training."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from double import everything_in_double
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import BlockAdamW, Blocks, LowRank, Plan, Stream
from fxmem.blocks.attach import state_of

PLANS = {
    "plain": None, "automatic": Stream(), "chunks": Stream(chunk=7, loss_chunk=5),
    "whole logits": Stream(chunk=7, loss_chunk=5, logits="keep"),
}  # fmt: skip
MODELS = ("llama", "gpt2", "t5")


def model(name: str) -> nn.Module:
    if name != "t5":
        return tiny.model(name).double()
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=tiny.VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config).double()


@functools.cache
def trained(name: str, plan: str) -> tuple[Any, Any]:
    """A model in the middle of training, and the one that its training forward is of."""
    net = model(name)
    blocks = Blocks(steps=2, inactive=LowRank(rank=2, lr=0.05), reach="all")
    fxmem.transform(net, Plan(stream=PLANS[plan], blocks=blocks))
    opt = BlockAdamW(net, lr=1e-2)
    for _ in range(3):
        net(**tiny.batch()).loss.backward()
        opt.step()
        opt.zero_grad()
    return (net, opt), merged(net, name)


def merged(net: nn.Module, name: str) -> Any:
    plain = model(name)
    plain.load_state_dict(net.state_dict())
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for key, a in state_of(net).adapters.items():
            assert a.up.count_nonzero()
            weights[key].add_(a.scale * (a.up @ a.down))
    return plain


def ids(length: int) -> Tensor:
    return tiny.batch(length=length)["input_ids"]


def loss(net: Any) -> Any:
    return net(**tiny.batch()).loss


def logits(net: Any) -> Any:
    return net(**tiny.batch()).logits + 0


def loss_outside(net: Any) -> Any:
    data = tiny.batch()
    shown = net(**data).logits
    return nn.functional.cross_entropy(shown[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())


def states(net: Any) -> Any:
    out = net(**tiny.batch(), output_hidden_states=True)
    return torch.cat(
        [*(out.hidden_states if "hidden_states" in out else out.encoder_hidden_states)]
    )


def one_token(net: Any) -> Any:
    return net(input_ids=ids(1), labels=ids(1)).logits + 0


def decoded(net: Any) -> Any:
    """Step by step, with a cache."""
    first, more = {"input_ids": ids(9)}, {"input_ids": ids(1)}
    if net.config.is_encoder_decoder:
        first, more = first | {"decoder_input_ids": ids(3)}, first | {"decoder_input_ids": ids(1)}
    cache = net(**first, use_cache=True).past_key_values
    return net(**more, past_key_values=cache, use_cache=True).logits + 0


def scores(net: Any, **options: Any) -> Any:
    out = net.generate(
        ids(6), attention_mask=torch.ones(2, 6, dtype=torch.long), max_new_tokens=5,
        output_scores=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        **options,
    )  # fmt: skip
    return torch.stack(out.scores)


def inner(net: Any) -> Any:
    """A part, called by itself."""
    part = net.get_encoder() if net.config.is_encoder_decoder else net.base_model
    return part(ids(8))[0]


CALLS: dict[str, Callable[[Any], Any]] = {
    "loss": loss, "logits": logits, "loss outside": loss_outside, "states": states,
    "one token": one_token, "decoded": decoded, "inner": inner,
    "generate": functools.partial(scores, do_sample=False),
    "static cache": functools.partial(scores, do_sample=False, cache_implementation="static"),
    "beams": functools.partial(scores, do_sample=False, num_beams=2),
}  # fmt: skip


def check(name: str, plan: str, call: str, training: bool, without: Any) -> None:
    with everything_in_double(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what runs whole is said elsewhere
        (net, _), plain = trained(name, plan)
        training = training and name != "t5"
        net.train(training)
        plain.train(training)
        with without():
            got, want = CALLS[call](net), CALLS[call](plain)
            got, want = (torch.tensor(v.tolist()) for v in (got, want))  # no deferred logits
        net.train()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "plan", "calls"),
    [
        ("llama", "plain", sorted(CALLS)),
        ("llama", "chunks", ["loss", "logits", "loss outside", "decoded"]),
        pytest.param("t5", "plain", ["loss", "generate", "inner"], marks=pytest.mark.slow),
    ],
)
def test_each_call_is_of_the_model_that_trains(name: str, plan: str, calls: list[str]) -> None:
    for call in calls:
        check(name, plan, call, False, torch.no_grad)


@pytest.mark.slow
@given(
    st.sampled_from(MODELS), st.sampled_from(sorted(PLANS)), st.sampled_from(sorted(CALLS)),
    st.booleans(), st.sampled_from([torch.no_grad, torch.inference_mode]),
)  # fmt: skip
def test_a_call_without_gradients_is_of_the_model_that_trains(
    name: str, plan: str, call: str, training: bool, without: Any
) -> None:
    check(name, plan, call, training, without)


@pytest.mark.parametrize("plan", ["plain", pytest.param("chunks", marks=pytest.mark.slow)])
def test_it_changes_nothing_of_a_step(plan: str) -> None:
    with everything_in_double():
        found = []
        for between in (False, True):
            net = model("llama")
            blocks = Blocks(steps=1, inactive=LowRank(rank=2, lr=0.05))
            fxmem.transform(net, Plan(stream=PLANS[plan], blocks=blocks))
            opt = BlockAdamW(net, lr=1e-2)
            for _ in range(3):
                out = net(**tiny.batch()).loss
                if between:
                    with torch.no_grad():
                        again = net(**tiny.batch()).loss
                    torch.testing.assert_close(again, out.detach(), rtol=1e-12, atol=0)
                out.backward()
                opt.step()
                opt.zero_grad()
            terms = [t for a in state_of(net).adapters.values() for t in (a.up, a.down)]
            found.append([p.detach() for p in (*net.parameters(), *terms)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_merged_or_restored_or_copied() -> None:
    with everything_in_double(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxmem.FxmemWarning)
        net = model("llama")
        keys = set(net.state_dict())
        fxmem.transform(net, Plan(blocks=Blocks(steps=1, inactive=LowRank(rank=2, lr=0.05))))
        opt = BlockAdamW(net, lr=1e-2)
        for _ in range(3):
            net(**tiny.batch()).loss.backward()
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            want = net(**tiny.batch()).loss
            assert set(net.state_dict()) == keys
            weights = model("llama")
            weights.load_state_dict(net.state_dict())
            assert torch.equal(
                copy.deepcopy(net)(**tiny.batch()).loss, weights(**tiny.batch()).loss
            )
            fxmem.merge_low_rank(net)
            torch.testing.assert_close(net(**tiny.batch()).loss, want, rtol=1e-12, atol=0)
            fxmem.restore(net)
            torch.testing.assert_close(net(**tiny.batch()).loss, want, rtol=1e-12, atol=0)
            assert all(m._compiled_call_impl is None for m in net.modules())
