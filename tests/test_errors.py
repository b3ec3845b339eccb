"""The errors: one base class, one message template, all parts readable and picklable."""

from __future__ import annotations

import pickle
import warnings

import pytest

from fxmem import errors
from fxmem.errors import CaptureError, FxmemError, FxmemWarning, PlanError

CLASSES = sorted(
    (
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, FxmemError)
    ),
    key=lambda cls: cls.__name__,
)


def test_every_failure_has_a_class() -> None:
    assert {cls.__name__ for cls in CLASSES} == {
        "BackwardTwiceError",
        "BlockStateError",
        "BudgetError",
        "CaptureError",
        "DivergedError",
        "MemoryBudgetError",
        "OffloadError",
        "DoubleBackwardError",
        "DroppedLogitsError",
        "FetchError",
        "FileError",
        "FxmemError",
        "HookError",
        "InternalError",
        "LostRankError",
        "MaskError",
        "ModifiedParameterError",
        "MutationError",
        "NotTransformedError",
        "PlanError",
        "PruningFileError",
        "RoleError",
        "UnsupportedOpError",
        "VerificationError",
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_message_is_found_where_advice(cls: type[FxmemError]) -> None:
    error = cls("sort found", op="aten.sort", module="model.a", source="m.py:3", advice="drop it")
    assert str(error) == "sort found | op aten.sort, module model.a, at m.py:3 | drop it"


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_parts_are_left_out(cls: type[FxmemError]) -> None:
    error = cls("something")
    advice = cls.default_advice
    assert (error.op, error.module, error.source, error.where) == (None, None, None, "")
    assert error.advice == advice
    assert str(error) == ("something" if advice is None else f"something | {advice}")
    assert str(cls("something", module="model.a", advice="")) == "something | module model.a"


@pytest.mark.parametrize("cls", [c for c in CLASSES if c not in (FxmemError, PlanError)])
def test_every_class_says_what_to_do(cls: type[FxmemError]) -> None:
    assert cls.default_advice


@pytest.mark.parametrize("cls", CLASSES)
def test_parts_are_keyword_only(cls: type[FxmemError]) -> None:
    with pytest.raises(TypeError):
        cls("something", "aten.sort")  # type: ignore[misc]


@pytest.mark.parametrize("cls", CLASSES)
def test_pickles(cls: type[FxmemError]) -> None:
    error = cls("sort found", op="aten.sort", module="model.a", source="m.py:3", advice="drop it")
    error.add_note("in step 7")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.args, again.__notes__) == (str(error), error.args, ["in step 7"])


def test_capture_error_carries_dynamos_reason() -> None:
    error = CaptureError("forward of Net", reason="data-dependent branch", source="net.py:9")
    assert error.reason == "data-dependent branch"
    assert str(error).startswith("forward of Net | at net.py:9 | ")
    assert str(error).endswith(" | data-dependent branch")
    assert pickle.loads(pickle.dumps(error)).reason == error.reason


def test_plan_error_is_a_value_error() -> None:
    assert issubclass(PlanError, ValueError)


def test_warning_has_a_class() -> None:
    with pytest.warns(FxmemWarning, match="runs whole"):
        warnings.warn("aten.sort runs whole", FxmemWarning, stacklevel=1)
