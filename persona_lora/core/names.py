"""Names that become part of a path: of traits, personas, runs. They come from files of others."""

from __future__ import annotations

import re
from typing import Any

from persona_lora.core.errors import UserError

LONGEST_NAME = 100
_NAME = re.compile(r"[^\W_][\w .+@-]*", flags=re.UNICODE)


def checked_name(name: Any, what: str) -> str:
    """Return a name that is one part of a path; UserError, beginning with ``what``, for any other.

    Letters and digits of any script, spaces, and ``. _ + @ -`` but not in front: no separator, no
    ``..``, nothing hidden and nothing that a command line takes for an option.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{what} must be like a file's name (letters, digits, . _ - inside, at most "
            f"{LONGEST_NAME}), got {ascii(name)[:80]}"
        )
    return name
