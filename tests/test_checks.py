"""Sizes as users write them."""

from __future__ import annotations

import pytest

from fxmem.checks import byte_size
from fxmem.errors import PlanError


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1, 1), ("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 gib", 3 * 2**29),
        ("512", 512), (" 80 MB ", 80 * 10**6), ("7b", 7), ("2TB", 2 * 10**12),
    ],
)  # fmt: skip
def test_a_size_is_bytes(given: object, size: int) -> None:
    assert byte_size("memory", given) == size


@pytest.mark.parametrize(
    "given", ["24GBB", "", "GB", "-3GB", "0", 0, -1, True, None, 2.5, "1e9", "24 G B", "٣GB"]
)
def test_nonsense_is_refused_by_name(given: object) -> None:
    with pytest.raises(PlanError, match=r"Stream\.memory is .*24GiB"):
        byte_size("Stream.memory", given)
