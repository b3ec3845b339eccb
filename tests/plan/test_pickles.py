"""Plans, options and masks that version 0.1.0 pickled still load."""

from __future__ import annotations

import base64
import pickle
from dataclasses import replace
from typing import Any

import pytest

from fxmem import SGD, Blocks, Masks, Plan, Prune, Stream

PLAN = (
    "gASV0wAAAAAAAACMCmZ4bWVtLnBsYW6UjARQbGFulJOUKYGUXZQoaACMBlN0cmVhbZSTlCmBlF2UKEtAjARhdXRv"
    "lIwEbm9uZZSMBGRyb3CUaAllYowRZnhtZW0ucGxhbl9ibG9ja3OUjAZCbG9ja3OUk5QpgZRdlCiMBWxheWVylIwG"
    "cmFuZG9tlEtkaAyMA1NHRJSTlCmBlF2URz+5mZmZmZmaYWKMBmRlZXBlcpRLAEsASwGMCGluYWN0aXZllIgpKU5O"
    "aApHP/AAAAAAAACISwCJTmViTmgJZWIu"
)
OPTIONS = (
    "gASV9QAAAAAAAACME2Z4bWVtLnBydW5lLm9wdGlvbnOUjAVQcnVuZZSTlCmBlF2UKEc/4AAAAAAAAClLgIwKaW1w"
    "b3J0YW5jZZRLyEsERz+5mZmZmZmaiIwGY29zaW5llIwFbGF5ZXKUR0AAAAAAAAAARz/wAAAAAAAAjA5wcmVjb25k"
    "aXRpb25lZJSMBHN0ZXCURz/ZmZmZmZmajANsb2+UR0AQAAAAAAAATQACR0AQAAAAAAAARz/gAAAAAAAASwiMA29u"
    "ZZSMBXdhbmRhlEsIR0AoAAAAAAAARz9gYk3S8an8jApwYXJhbWV0ZXJzlIwFam9pbnSUSwFLAGViLg=="
)
MASKS = (
    "gASVWwAAAAAAAACMEWZ4bWVtLnBydW5lLm1hc2tzlIwFTWFza3OUk5QpgZR9lCiMBW1vZGVslIwEVGlueZSMB2Vu"
    "dHJpZXOUjAxsYXllcnMuMC5tbHCUSwRLAEsChpSHlIWUdWIu"
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (PLAN, Plan(stream=Stream(chunk=64), blocks=Blocks(inactive=SGD(lr=0.1)))),
        (OPTIONS, Prune(keep=0.5, estimator="score", steps=200, init="wanda")),
        (MASKS, Masks("Tiny", (("layers.0.mlp", 4, (0, 2)),))),
    ],
)
def test_pickles_of_the_first_version(text: str, value: object) -> None:
    assert pickle.loads(base64.b64decode(text)) == value


@pytest.mark.parametrize(
    "value",
    [
        Stream(chunk=7, memory="2GB", offload="disk"),
        Blocks(inactive=SGD(lr=0.1), order="sampled", average=True),
        Prune(keep=0.5, uniform=True, advanced={"lr": 0.5}),
        Plan(stream=Stream(), lower="triton"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pickle_of_fewer_fields_takes_their_defaults(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    state = value.__getstate__()
    for number in range(1, len(state)):
        by_name = dict(list(state.items())[:number])
        loaded = []
        for older in (by_name, list(by_name.values())):
            loaded.append(object.__new__(type(value)))
            loaded[-1].__setstate__(older)
        assert loaded[0] == loaded[1] == replace(type(value)(), **by_name)
