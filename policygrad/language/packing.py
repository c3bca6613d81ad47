"""Which rows of completions are computed together, so that little of what is computed is padding."""

from collections.abc import Sequence
from typing import NamedTuple

PADDING = 0.05  # the largest share of the tokens that are computed, unless shared prompts save more


class Row(NamedTuple):
    """The tokens of a prompt, and those computed after it. Rows of a group have the same prompt."""

    prompt: int
    rest: int
    group: int


def packed(lengths: Sequence[int], most_rows: int | None = None, most_tokens: int | None = None) -> list[list[int]]:
    """Parts of rows of about equal length, the longest first. Of each part at most PADDING is padding.

    A part, padded to its longest row, has at most `most_rows` rows and `most_tokens` tokens; a row that is longer than
    that is a part of its own.
    """
    parts: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = len(parts[-1]) + 1 if parts else 0
        computed = lengths[parts[-1][0]] * count if parts else 0
        fits = 1 < count <= (most_rows or count) and computed <= (most_tokens or computed)
        if not fits or used + lengths[i] < (1 - PADDING) * computed:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += lengths[i]
    return parts


def by_group(
    rows: Sequence[Row], most_rows: int | None = None, most_tokens: int | None = None
) -> list[list[int]] | None:
    """Parts of whole groups, so that each prompt is computed once; None if a group is beyond the limits."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    members = list(groups.values())
    most = None if most_rows is None else max(1, most_rows // max(map(len, members)))
    parts = packed([computed(rows, group) for group in members], most, most_tokens)
    joined = [[i for k in part for i in members[k]] for part in parts]
    sizes = [(len(part), computed(rows, part)) for part in joined]
    fits = all(n <= (most_rows or n) and tokens <= (most_tokens or tokens) for n, tokens in sizes)
    return joined if fits else None


def cheapest(rows: Sequence[Row], parts: list[list[int]], others: list[list[int]] | None) -> list[list[int]]:
    """Of two ways to part the rows the one that takes fewer tokens, if prompts are shared in a part."""
    if others is None:
        return parts
    return min(parts, others, key=lambda x: sum(computed(rows, part) for part in x))


def computed(rows: Sequence[Row], part: Sequence[int], shared: bool = True) -> int:
    """The tokens that a part takes, padding included: of its prompts, once each if they are shared, and of the rest."""
    if not shared:
        return len(part) * max(rows[i].prompt + rows[i].rest for i in part)
    prompts = len({rows[i].group for i in part})
    return prompts * max(rows[i].prompt for i in part) + len(part) * max(rows[i].rest for i in part)


def padding(rows: Sequence[Row], parts: Sequence[Sequence[int]], shared: bool = False) -> float:
    """The share of padding in the tokens that are computed."""
    total = sum(computed(rows, part, shared) for part in parts)
    prompts = [
        rows[i].prompt for part in parts for i in ({rows[i].group: i for i in part}.values() if shared else part)
    ]
    return (total - sum(prompts) - sum(row.rest for row in rows)) / max(1, total)
