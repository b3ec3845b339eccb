"""Plans: value semantics, round trips, and a clear refusal of everything impossible."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmem.errors import PlanError
from fxmem.plan.plan import Blocks, Plan, Stream

tokens = st.just("auto") | st.integers(min_value=1, max_value=2**62)
streams = st.builds(
    Stream, chunk=tokens, loss_chunk=tokens, logits=st.sampled_from(["drop", "keep"]),
    sequence=st.sampled_from([None, "sp"]),
)  # fmt: skip
LOWER = ["auto", "eager", "inductor", "triton"]
plans = st.builds(Plan, stream=st.none() | streams, lower=st.sampled_from(LOWER))


@given(plans)
def test_round_trips(plan: Plan) -> None:
    for again in (
        Plan.from_dict(plan.to_dict()),
        Plan.from_toml(plan.to_toml()),
        Plan.from_json(plan.to_json()),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
        dataclasses.replace(plan),
        eval(repr(plan)),
    ):
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.digest() == plan.digest()


@given(plans, plans)
def test_digest_tells_plans_apart(a: Plan, b: Plan) -> None:
    assert (a == b) == (a.digest() == b.digest())


@given(streams)
def test_stream_round_trips(stream: Stream) -> None:
    assert Stream.from_dict(stream.to_dict()) == stream


def test_digest_is_the_same_in_every_process() -> None:
    plan = Plan(stream=Stream(chunk=2048))
    code = "from fxmem.plan import *; print(Plan(stream=Stream(chunk=2048)).digest())"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == plan.digest()


def test_defaults() -> None:
    assert Plan() == Plan(stream=None, blocks=None, prune=None, lower="auto")
    assert Stream() == Stream(chunk="auto", loss_chunk="auto", offload="none", logits="drop")
    assert Plan.from_dict({}) == Plan.from_toml("") == Plan.from_json("{}") == Plan()
    assert Plan.from_dict({"stream": {}}) == Plan(stream=Stream())


def test_toml_is_readable() -> None:
    assert Plan(stream=Stream(chunk=2048)).to_toml() == (
        'lower = "auto"\n\n[stream]\nchunk = 2048\nloss_chunk = "auto"\n'
        'offload = "none"\nlogits = "drop"\nhold = "auto"\nmemory = "least"\n'
    )


def test_plans_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stream().chunk = 3  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        Plan().other = 3  # type: ignore[attr-defined]


def test_from_dict_leaves_its_argument_alone() -> None:
    data = {"stream": {"chunk": 4}}
    Plan.from_dict(data)
    assert data == {"stream": {"chunk": 4}}


BAD_TOKENS = [0, -1, True, False, 1.0, 2.5, float("inf"), "big", "AUTO", "8", "", None, [8], (8,)]


@pytest.mark.parametrize("field", ["chunk", "loss_chunk"])
@pytest.mark.parametrize("value", BAD_TOKENS, ids=repr)
def test_bad_token_counts(field: str, value: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Stream(**{field: value})
    assert str(caught.value) == (
        f'Stream.{field} is {value!r} | allowed values: "auto" or an integer of at least 1 (tokens)'
    )


BAD_WORDS = ["", "other", None, True, 0, ["none"]]


@pytest.mark.parametrize("value", BAD_WORDS, ids=repr)
@pytest.mark.parametrize(
    ("cls", "field", "allowed"),
    [
        (Stream, "offload", '"none" or "cpu" or "disk" or "auto"'),
        (Stream, "logits", '"drop" or "keep"'),
        (Plan, "lower", '"auto" or "eager" or "inductor" or "triton"'),
    ],
)
def test_bad_words(cls: type, field: str, allowed: str, value: Any) -> None:
    with pytest.raises(PlanError) as caught:
        cls(**{field: value})
    assert str(caught.value) == f"{cls.__name__}.{field} is {value!r} | allowed values: {allowed}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Plan(blocks="layer"),  # type: ignore[arg-type]
            "Plan.blocks is 'layer' | allowed values: None or fxmem.Blocks(...)",
        ),
        (
            lambda: Plan(prune=0.5),  # type: ignore[arg-type]
            "Plan.prune is 0.5 | allowed values: None or fxmem.Masks",
        ),
    ],
)
def test_known_but_not_available(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stream(sequence="sp", memory="2GB"),
        lambda: Plan(stream=Stream(sequence="sp"), blocks=Blocks()),
    ],
)
def test_a_sequence_of_ranks_goes_with_neither_memory_nor_blocks(
    make: Callable[[], object],
) -> None:
    with pytest.raises(PlanError, match=r"beside Stream\.sequence|Stream\.sequence beside"):
        make()


@pytest.mark.parametrize("value", [{}, {"chunk": 8}, 8, "auto", True, Stream, Plan()], ids=repr)
def test_stream_must_be_a_stream(value: Any) -> None:
    with pytest.raises(
        PlanError, match=r"Plan\.stream is .* allowed values: None or fxmem\.Stream"
    ):
        Plan(stream=value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stream(chunks=8),  # type: ignore[call-arg]
        lambda: Stream.from_dict({"chunks": 8}),
        lambda: Plan.from_dict({"stream": {"chunks": 8}}),
        lambda: Plan.from_toml("[stream]\nchunks = 8\n"),
        lambda: Plan.from_json('{"stream": {"chunks": 8}}'),
        lambda: dataclasses.replace(Stream(), chunks=8),  # type: ignore[call-arg]
    ],
)
def test_unknown_options_get_a_suggestion(make: Callable[[], object]) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value) == (
        "Stream has no option 'chunks' | did you mean 'chunk'? "
        "known options: chunk, loss_chunk, offload, logits, hold, memory, sequence"
    )


@pytest.mark.parametrize("name", ["zzz", 1, None])
def test_unknown_options_without_a_near_one(name: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({name: 1})
    assert str(caught.value) == (
        f"Plan has no option {name!r} | known options: stream, blocks, prune, lower"
    )


@pytest.mark.parametrize("data", [[], "stream", 3, None, [("stream", None)]], ids=repr)
def test_data_must_be_a_mapping(data: Any) -> None:
    with pytest.raises(PlanError, match="Plan is .*give a table of named options"):
        Plan.from_dict(data)
    if data is not None:
        with pytest.raises(PlanError, match="Stream is .*give a table of named options"):
            Plan.from_dict({"stream": data})


def test_broken_text() -> None:
    with pytest.raises(PlanError, match="not valid TOML"):
        Plan.from_toml("stream =")
    with pytest.raises(PlanError, match="not valid JSON"):
        Plan.from_json("{")
    with pytest.raises(PlanError, match="Plan is"):
        Plan.from_json("[]")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_value_is_taken_or_refused_by_name(value: Any) -> None:
    for field in ("chunk", "loss_chunk", "memory", "offload", "logits", "sequence"):
        try:
            Stream(**{field: value})
        except PlanError as error:
            assert error.what.startswith(f"Stream.{field}")
            assert error.advice


@given(st.text() | st.builds(json.dumps, st.dictionaries(st.text(), st.text() | st.integers())))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    for read in (Plan.from_toml, Plan.from_json):
        with contextlib.suppress(PlanError):
            assert isinstance(read(text), Plan)
