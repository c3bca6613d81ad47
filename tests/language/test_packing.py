"""Rows of about equal length are computed together: little padding, no row lost, no limit overstepped."""

import random

import pytest

from policygrad.language.packing import PADDING, Row, by_group, cheapest, packed, padding


def lengths(kind: str, count: int = 200) -> list[int]:
    draw = random.Random(kind)
    each = {
        "alike": lambda: draw.randint(90, 100),
        "spread": lambda: draw.randint(1, 400),
        "skewed": lambda: int(draw.paretovariate(0.7)) + 1,
        "equal": lambda: 7,
    }[kind]
    return [each() for _ in range(count)]


@pytest.mark.parametrize("kind", ["alike", "spread", "skewed", "equal"])
@pytest.mark.parametrize("rows", [None, 1, 16])
@pytest.mark.parametrize("tokens", [None, 1, 150, 2000])
def test_every_row_is_in_one_part_within_the_limits(kind: str, rows: int | None, tokens: int | None) -> None:
    given = lengths(kind)
    parts = packed(given, rows, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(given)))
    for part in parts:
        computed = len(part) * max(given[i] for i in part)
        assert sum(given[i] for i in part) >= (1 - PADDING) * computed
        assert rows is None or len(part) <= rows
        assert tokens is None or len(part) == 1 or computed <= tokens
    assert 0 <= padding([Row(1, n - 1, 0) for n in given], parts) <= PADDING


def test_no_more_parts_than_the_limits_and_the_padding_ask_for() -> None:
    assert packed([100, 100, 100, 100]) == [[0, 1, 2, 3]]
    assert packed([96, 100, 100, 10, 97]) == [[1, 2, 4, 0], [3]]
    assert packed([5, 5, 5, 5, 5], most_rows=2) == [[0, 1], [2, 3], [4]]
    assert packed([5, 5, 5, 9], most_tokens=10) == [[3], [0, 1], [2]]
    assert packed([]) == []


def test_the_padding_is_its_share_of_the_tokens_computed() -> None:
    rows = [Row(3, 7, 0), Row(2, 4, 1), Row(3, 1, 0)]
    assert padding(rows, [[0, 1, 2]]) == pytest.approx(1 - 20 / 30)
    assert padding(rows, [[0], [1, 2]]) == pytest.approx(1 - 20 / 22)
    assert padding(rows, [[0, 1, 2]], shared=True) == pytest.approx(1 - 17 / (2 * 3 + 3 * 7))
    assert padding(rows, [[0, 2], [1]], shared=True) == pytest.approx(1 - 17 / (3 + 2 * 7 + 6))
    assert padding([], []) == 0


def test_groups_stay_together_where_their_prompts_cost_more_than_padding() -> None:
    for prompt, together in ((100, True), (1, False)):
        rows = [Row(prompt, rest, k) for k in range(3) for rest in (5, 50, 95)]
        apart, whole = packed([row.prompt + row.rest for row in rows]), by_group(rows)
        assert [sorted({rows[i].group for i in part}) for part in whole] == [[0, 1, 2]]
        assert cheapest(rows, apart, whole) == (whole if together else apart)
    assert [len(part) for part in by_group(rows, most_rows=7)] == [6, 3]
    assert by_group(rows, most_rows=2) is None
    assert by_group(rows, most_tokens=200) is None
    assert cheapest(rows, apart, None) == apart
