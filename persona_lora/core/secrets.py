"""Taking secrets out of what is written down: tokens and keys, and URLs that carry them."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "[hidden]"
_SECRET_OPTION = re.compile(r"--(?:.*[-_])?(?:hub[-_]token|hf[-_]token|api[-_]key|password|secret)")
_IN_TEXT = (
    (re.compile(r"(\w+://)[^/\s@]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(\w+://[^\s?#]+)[?#]\S+"), rf"\1?{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-)[A-Za-z0-9_-]{16,}"), HIDDEN),
)


def without_secrets(text: str) -> str:
    """Return ``text`` without keys, passwords in URLs, and what stands behind their path."""
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def arguments_without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return command-line words without secrets; the value of an option for one is hidden whole."""
    kept: list[str] = []
    hide_next = False
    for word in arguments:
        name, equals, _ = word.partition("=")
        secret = _SECRET_OPTION.fullmatch(name) is not None
        if hide_next:
            kept.append(HIDDEN)
        elif secret and equals:
            kept.append(f"{name}={HIDDEN}")
        else:
            kept.append(without_secrets(word))
        hide_next = secret and not equals and not hide_next
    return kept
