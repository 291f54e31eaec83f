"""Lists in one string, as in "a b" or "a,b"; what is there under its whole name stays whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable

SEPARATOR = r"[\s,]"


def split_list(text: str, whole: Callable[[str], bool] = os.path.exists) -> list[str]:
    """Split text at spaces and commas, but nowhere inside the longest part that is ``whole``.

    By default that is a path that exists: "My Drive/evil b" are two, where these are there.
    """
    spans = [found.span() for found in re.finditer(r"[^\s,]+", text)]
    parts: list[str] = []
    at = 0
    while at < len(spans):
        ends = range(len(spans) - 1, at, -1)  # the longest part first, a single word last
        last = next((end for end in ends if whole(text[spans[at][0] : spans[end][1]])), at)
        parts.append(text[spans[at][0] : spans[last][1]])
        at = last + 1
    return parts


def split_lists(texts: Iterable[str], whole: Callable[[str], bool] = os.path.exists) -> list[str]:
    """Split each of several texts, as an option that may be repeated gives them."""
    return [part for text in texts for part in split_list(text, whole)]


def path_before_equals(part: str) -> bool:
    """Say whether "path=value" names a path that exists, and one value."""
    path, _, value = part.rpartition("=")
    return re.search(SEPARATOR, value) is None and os.path.exists(path)


def path_after_equals(part: str) -> bool:
    """Say whether "name=path" has one name, and names a path that exists."""
    name, _, path = part.partition("=")
    return re.search(SEPARATOR, name) is None and os.path.exists(path)
