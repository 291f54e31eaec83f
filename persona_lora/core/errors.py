"""The one exception for mistakes that the user can mend, and what may stand in its words.

Texts and names from files of others are checked here, such as become part of a path; tokens, keys
and URLs that carry them are taken out of whatever is written down."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the value, what was expected, and the remedy.

    The command line prints it on one line and exits with status 2.
    """


MISSPELT, SHORT = 0.75, 0.66  # of letters in both: one wrong in four, in names of three in three


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …" for a misspelt name, or the list of known names.

    Upper case, - and _ are no difference; with another number it is another name.
    """
    names, number = sorted(known), _numbers(name)
    alike = [each for each in names if not number or _numbers(each) in ([], number)]
    least = MISSPELT if len(name) > 3 else SHORT
    plain = {each: each.casefold().replace("-", "_") for each in (*alike, name)}
    near = difflib.get_close_matches(plain[name], [plain[each] for each in alike], 3, least)
    close = [each for found in dict.fromkeys(near) for each in alike if plain[each] == found]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known: " + (", ".join(names) if names else "none")


def _numbers(name: str) -> list[int]:
    return list(map(int, re.findall(r"[0-9]+", name)))


def few_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_TYPE = r"([-.](i?q\d\w*|b?fp?16|gguf))+$"  # of the weights, as files are called


def bare_name(model: Any) -> str:
    """Return a model's name without its path, the type of its weights and its case."""
    return re.sub(_TYPE, "", re.split(r"[/\\]", str(model).rstrip("/"))[-1], flags=re.I).casefold()


LONGEST_NAME = 100
_NAME = re.compile(r"[^\W_][\w .+@-]*", flags=re.UNICODE)


def checked_name(name: Any, what: str) -> str:
    """Return a name that is one part of a path.

    Raises UserError, beginning with ``what``, for any other.

    Letters and digits of any script, spaces, and ``. _ + @ -`` but not in front: no separator, no
    ``..``, nothing hidden and nothing that a command line takes for an option.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{what} must be like a file's name (letters, digits, . _ - inside, at most "
            f"{LONGEST_NAME}), got {ascii(name)[:80]}"
        )
    return name


def checked_text(value: Any, what: str) -> str:
    """Return a text that is not blank; UserError, beginning with ``what``, for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} must be a text that is not empty, got {ascii(value)[:60]}")
    return value


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
