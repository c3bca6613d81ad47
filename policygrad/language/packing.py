"""Which rows of completions are computed together, so that little of what is computed is padding."""

from collections.abc import Sequence

PADDING = 0.05  # the largest share of the tokens that are computed


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


def padding(lengths: Sequence[int], parts: Sequence[Sequence[int]]) -> float:
    """The share of padding in the tokens that are computed, if each part is as long as its longest row."""
    computed = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    return (computed - sum(lengths[i] for part in parts for i in part)) / max(1, computed)
