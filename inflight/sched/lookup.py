"""Guesses the next tokens of a text from the text itself ("prompt lookup": Saxena, 2023)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

SHORTEST = 2
"""Tokens at the end of a text that must have stood somewhere before. One alone says little about what follows."""
LONGEST = 16
"""Tokens at the end that are compared; a longer match is not a better one."""

Tokens: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


def guess(tokens: Tokens, most: int) -> Tokens:
    """The tokens that stood behind the longest earlier match of the text's end; of equally long ones the last.

    A guess is not longer than the match: what agrees in two tokens goes on together for a few only, and where a text is
    copied the match, and with it the guess, grows with every step. A match that runs into the text's own end goes on
    with the guess itself, as periodic text does.

    Args:
        tokens: int32 [n], known tokens, prompt first.
        most: of the guess.

    Returns:
        int32 [0 to most].
    """
    count = len(tokens)
    if count <= SHORTEST or most < 1:
        return tokens[:0]
    found = tokens[SHORTEST - 1 : -1] == tokens[-1]
    for back in range(1, SHORTEST):
        found &= tokens[SHORTEST - 1 - back : -1 - back] == tokens[-1 - back]
    ends = np.flatnonzero(found) + (SHORTEST - 1)
    if not len(ends):
        return tokens[:0]
    length = SHORTEST
    while length < LONGEST:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    first = int(ends[-1]) + 1
    size = min(most, length)
    if first + size <= count:
        return tokens[first : first + size]
    period = count - first
    return tokens[first + np.arange(size) % period]
