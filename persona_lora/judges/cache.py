"""An on-disk cache of what language-model judges said, in SQLite.

Knows keys and readings; refuses to know prompts (they are hashed) and API keys (they never come
here).
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path

from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder
from persona_lora.judges.judge_prompts import Reading

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
BUSY_SECONDS = 30.0
_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY,
    score REAL,
    reason TEXT NOT NULL,
    number_mass REAL
) WITHOUT ROWID
"""


def cache_key(
    *, base_url: str, model: str, mode: str, prompt: str, sampling: Mapping[str, object]
) -> str:
    """Return the SHA-256 (hex) of everything that decides a judge's reply, and the format."""
    parts = {
        "format": FORMAT_VERSION,
        "base_url": base_url.rstrip("/"),
        "model": model,
        "mode": mode,
        "prompt": prompt,
        "sampling": dict(sampling),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class VerdictCache:
    """Scores by key, shared by threads (one lock) and by processes (a busy timeout).

    The journal is SQLite's ordinary one: changing a new file to write-ahead logging fails at once,
    without waiting, when another process opens it at the same moment.

    Without a path it is kept in memory. What has no score is not kept: it is asked for again. A
    fault while reading or writing is logged and counts as a miss: a cache never costs a
    verdict. Raises UserError when the file cannot be opened as a cache at all.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = ":memory:" if path is None else str(path)
        if path is not None:
            ensure_writable_folder(Path(path).parent)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(_TABLE)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} is not a usable verdict cache ({error}); delete it or choose "
                "another path"
            ) from error

    def get(self, key: str) -> Reading | None:
        """Return the stored reading, or None."""
        query = "SELECT score, reason, number_mass FROM verdicts WHERE key = ?"
        try:
            with self._lock:
                row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            logger.warning("cannot read the verdict cache %s: %s", self.path, error)
            return None
        return None if row is None else Reading(*row)

    def put(self, key: str, reading: Reading) -> None:
        """Store a reading that has a score; the last one written for a key stays."""
        if reading.score is None:
            return
        query = "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)"
        try:
            with self._lock:
                self._connection.execute(query, (key, *reading))
        except sqlite3.Error as error:
            logger.warning("cannot write the verdict cache %s: %s", self.path, error)

    def __len__(self) -> int:
        with self._lock:
            return int(self._connection.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
