"""The verdict cache: keys, threads, processes, faults."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from persona_lora.core.errors import UserError
from persona_lora.judges.cache import VerdictCache, cache_key
from persona_lora.judges.judge_prompts import Reading

KEY = {"base_url": "http://a/v1", "model": "m", "mode": "number", "prompt": "p"}


def test_cache_key_depends_on_everything_that_matters():
    keys = {cache_key(**KEY, sampling={"max_tokens": 8})}
    for name in KEY:
        keys.add(cache_key(**{**KEY, name: "other"}, sampling={"max_tokens": 8}))
    keys.add(cache_key(**KEY, sampling={"max_tokens": 9}))
    assert len(keys) == len(KEY) + 2


def test_cache_key_ignores_order_and_a_trailing_slash():
    one = cache_key(**KEY, sampling={"a": 1, "b": 2})
    assert one == cache_key(**{**KEY, "base_url": "http://a/v1/"}, sampling={"b": 2, "a": 1})


def test_cache_keeps_scores_over_reopening_and_nothing_unscored(tmp_path):
    readings = {"a": Reading(80.5, "", 0.93), "c": Reading(0.0, "")}
    with closing(VerdictCache(tmp_path / "new" / "cache.sqlite")) as cache:
        for key, reading in readings.items():
            cache.put(key, reading)
        cache.put("d", Reading(None, "refusal"))
    with closing(VerdictCache(tmp_path / "new" / "cache.sqlite")) as cache:
        assert {key: cache.get(key) for key in readings} == readings
        assert cache.get("d") is None
        assert len(cache) == 2


def test_cache_is_safe_with_threads(tmp_path):
    with closing(VerdictCache(tmp_path / "cache.sqlite")) as cache:

        def write(offset: int) -> None:
            for number in range(50):
                cache.put(f"{offset}-{number}", Reading(float(number), ""))

        threads = [threading.Thread(target=write, args=(offset,)) for offset in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) == 200


def test_cache_is_shared_by_two_processes_writing_at_once(tmp_path):
    path = tmp_path / "cache.sqlite"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from persona_lora.judges.cache import VerdictCache\n"
        "from persona_lora.judges.judge_prompts import Reading\n"
        "cache = VerdictCache(Path(sys.argv[1]))\n"
        "for n in range(200): cache.put(sys.argv[2] + str(n), Reading(float(n), ''))\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    with closing(VerdictCache(path)) as cache:
        assert len(cache) == 400
        assert cache.get("b199") == Reading(199.0, "")


def test_cache_can_be_opened_anew_by_several_at_the_same_moment(tmp_path):
    """Runs that start together find no file: each creates it, none is turned away."""
    writers, files = 6, 40
    together = threading.Barrier(writers, timeout=60)

    def write(name: int) -> None:
        for number in range(files):
            together.wait()
            with closing(VerdictCache(tmp_path / f"{number}.sqlite")) as cache:
                cache.put(str(name), Reading(1.0, ""))

    with ThreadPoolExecutor(writers) as pool:
        for future in [pool.submit(write, name) for name in range(writers)]:
            future.result(timeout=120)
    for number in range(files):
        with closing(VerdictCache(tmp_path / f"{number}.sqlite")) as cache:
            assert len(cache) == writers


def test_cache_refuses_a_file_that_is_none(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to look like one " * 100)
    with pytest.raises(UserError, match="delete it or choose"):
        VerdictCache(path)


def test_cache_faults_count_as_misses_and_are_logged(tmp_path, caplog):
    cache = VerdictCache(tmp_path / "cache.sqlite")
    cache.close()
    cache.put("a", Reading(1.0, ""))
    assert cache.get("a") is None
    assert "cannot write" in caplog.text
    assert "cannot read" in caplog.text
