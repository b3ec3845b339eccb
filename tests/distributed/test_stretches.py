"""Over which regions groups are whole, for the ways in which modules are called."""

from __future__ import annotations

from fxmem.distributed.stretches import ModuleCall, stretches

LAYERS = {"a": ("A", "a"), "b": ("B", "b")}
PAIR = {"a": ("AB", "a"), "b": ("AB", "b")}
Found = list[tuple[str, int, int, bool, bool]]


def found(
    uses: dict[str, list[int]], calls: list[list[ModuleCall]], modules: dict[str, tuple[str, str]]
) -> Found:
    got = stretches(uses, [dict.fromkeys(c, True) for c in calls], modules)
    return [(g, s.start, s.end, s.again, s.goes_on) for g, s in got]


def once(path: str) -> ModuleCall:
    return path, 0


def again(path: str) -> ModuleCall:
    return path, 1


def test_one_call_each() -> None:
    calls = [[once("a")], [once("a"), once("b")], [once("b")]]
    got = found({"A": [0, 1], "B": [1, 2]}, calls, LAYERS)
    assert got == [("A", 0, 1, False, False), ("B", 1, 2, False, False)]


def test_a_loop_closes_in_between() -> None:
    calls = [[once("a")], [once("b")], [again("a")], [again("b")]]
    got = found({"A": [0, 2], "B": [1, 3]}, calls, LAYERS)
    assert [(g, s, e) for g, s, e, *_ in got] == [
        ("A", 0, 0),
        ("B", 1, 1),
        ("A", 2, 2),
        ("B", 3, 3),
    ]
    assert not any(a or g for *_, a, g in got)


def test_a_loop_in_one_region_gathers_as_often() -> None:
    calls = [[once("a"), once("b"), again("a"), again("b")]]
    got = found({"A": [0], "B": [0]}, calls, LAYERS)
    assert [(g, a, on) for g, _, _, a, on in got] == [
        ("A", False, True), ("B", False, True), ("A", True, False), ("B", True, False),
    ]  # fmt: skip


def test_a_loop_whose_ends_meet_in_a_region() -> None:
    calls = [[once("a")], [once("a"), again("a")], [again("a")]]
    assert found({"A": [0, 1, 2]}, calls, LAYERS) == [
        ("A", 0, 1, False, True), ("A", 1, 2, True, False),
    ]  # fmt: skip


def test_a_group_of_several_modules_is_whole_until_all_were_called() -> None:
    calls = [[once("a")], [], [once("b")], [again("a")], [again("b")]]
    got = found({"AB": [0, 2, 3, 4]}, calls, PAIR)
    assert got == [("AB", 0, 2, False, False), ("AB", 3, 4, False, False)]


def test_a_module_with_two_names_is_called_by_each() -> None:
    calls = [[once("a")], [], [once("twin")]]
    got = found({"A": [0, 2]}, calls, {"a": ("A", "a"), "twin": ("A", "a")})
    assert [(s, e) for _, s, e, *_ in got] == [(0, 0), (2, 2)]


def test_what_is_read_outside_of_calls_is_whole_from_the_first_to_the_last() -> None:
    calls = [[once("a")], [], [again("a")], []]
    assert found({"A": [0, 2, 3]}, calls, LAYERS) == [("A", 0, 3, False, False)]
    assert found({"A": [1, 3]}, [[]] * 4, {}) == [("A", 1, 3, False, False)]


def test_a_module_that_is_given_no_gradient_is_reduced_at_the_end() -> None:
    calls = [{once("a"): False, once("b"): False}, {once("b"): True}]
    got = stretches({"A": [0], "B": [0, 1]}, calls, LAYERS)
    assert [(g, s.entered) for g, s in got] == [("A", False), ("B", True)]
