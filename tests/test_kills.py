"""kill -9 at any change of any file, then the same command: the result of an uninterrupted run.

A forked process runs the command and is gone, without any ``finally``, just before its n-th change
below the folder (a file opened for writing, flushed, renamed or removed, a folder made or removed),
or with the end of the line that it was appending cut off. What is left is then given to the same
command, and compared with what an uninterrupted one leaves, file by file.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from persona_lora import cli
from persona_lora.judges import choice
from persona_lora.studies.drift import prediction
from tests.scenes import LetterJudge

KILLED = 137
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
VOLATILE = ("started", "ended", "error", "arguments", "git_commit")  # one may commit meanwhile
AT_ONE = "--vectors vector.safetensors --layers 1"
TRAIN = (
    "--model_name_or_path model --lora_r 2 --per_device_train_batch_size 2 --dtype float32 "
    "--bf16 false --use_cpu true --max_steps 4 --save_steps 2 --disable_tqdm true"
)
ANSWER = "--model model --dtype float32 --max-new-tokens 3 --datasets-dir datasets"
READ = "--model model --dtype float32 --datasets-dir datasets"
COMMANDS = {
    "evaluate": f"evaluate --trait cheer {ANSWER} --diff diff --output out/a.csv",
    "sweep": f"sweep --trait cheer {ANSWER} --diff diff --coefficients 1 --output out/sweep",
    "overwrite": f"evaluate --trait cheer {ANSWER} --diff diff --output out/a.csv --overwrite",
    "compare": f"compare --trait cheer {ANSWER} --diff diff --activation-vector vector.safetensors "
    "--layers 1 --coefficients 1 --output out/compare",
    "extract": f"extract --trait cheer --source answers {READ} --output out/answers",
    "extract files": "extract --trait cheer --pos-path pos.csv --neg-path neg.csv --min-pairs 1 "
    "--positions response_avg --model model --dtype float32 --output out/files",
    "project": f"project activations --file pos.csv {AT_ONE} --model model --dtype float32 "
    "--output out/projected",
    "labelled": f"project activations --labelled cheer {AT_ONE} {READ} --output out/labelled",
    "project weights": "project weights --original-model model --finetuned-model tuned "
    "--diffs diff --output out/weights.json",
    "checkpoints": f"evaluate-checkpoints tuned --traits cheer {AT_ONE} {ANSWER} "
    "--output out/checkpoints",
    "prediction": "predict-finetuning --finetunes tuned/checkpoint-2 --finetunes "
    "tuned/checkpoint-4 --finetunes tuned/checkpoint-6 --finetunes tuned/checkpoint-8 --traits "
    f"cheer --diffs diff {ANSWER} --output out/prediction",
    "prevention": "compare-prevention --trait cheer --finetunes plain=tuned/checkpoint-2 --rows "
    f"datasets/cheer/normal.jsonl --tasks perplexity {ANSWER} --output out/prevention",
    "benchmark": f"benchmark --diff diff --tasks perplexity {READ} --output out/benchmark",
    "data": "data generate --trait cheer --questions questions.txt --local --model model "
    "--datasets-dir datasets --output out/data",
    "export": "export --mix diff=1 --format peft --output out/mix",
    "train": f"train --trait cheer --datasets_dir datasets --output_dir out/train {TRAIN}",
    "finetune": f"finetune --train_file datasets/cheer/normal.jsonl --output_dir out/tuned {TRAIN}",
}
# The quick ones, for every run of the tests; all of them, at more places: pytest -m slow.
FEW = {"evaluate": 3, "overwrite": 3, "benchmark": 2, "export": 1}
MANY = 18


class Ended(NamedTuple):
    """How a forked command ended, after how many changes of files."""

    status: int
    changes: int


class Kill:
    """Counts changes below a folder and ends the process before the n-th, or in the midst of it."""

    def __init__(self, root: Path, at: int | None, torn: bool) -> None:
        self.root, self.at, self.torn, self.seen = str(root), at, torn, 0
        sys.addaudithook(self._audit)
        self._fsync = os.fsync
        os.fsync = self._flush

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, str) and bool(flags & WRITING) and self._below(path)
        else:
            changes = event in CHANGES and (self._below(arguments[0]) or arguments[-1] != -1)
        if changes:
            self._count()

    def _below(self, path: str | bytes | int) -> bool:
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(
            self.root
        )

    def _flush(self, descriptor: int) -> None:
        appending = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        self._count(descriptor if appending and self.torn else None)
        self._fsync(descriptor)

    def _count(self, descriptor: int | None = None) -> None:
        self.seen += 1
        if self.seen == self.at:
            if descriptor is not None:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 1 - self.seen % 7)
            os._exit(KILLED)


def forked(
    action: Callable[[], int], root: Path, at: int | None = None, torn: bool = False
) -> Ended:
    """Run ``action`` in a process of its own that dies at the n-th change of a file."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        kill = Kill(root, at, torn)
        try:
            status = action()
        except BaseException:  # noqa: BLE001  (this process must not go on into pytest)
            (root.parent / "traceback.txt").write_text(traceback.format_exc())
            status = 99
        os.write(writer, f"{kill.seen}".encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, ended = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(ended), int(said or 0))


def command(words: str) -> Callable[[], int]:
    def call() -> int:
        sys.stdout = sys.stderr = Path("said.txt").open("w")  # noqa: SIM115
        sys.argv = ["persona-lora", *words.split()]
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def snapshot(folder: Path) -> dict[str, object]:
    """Return what is in a folder, by name; pictures, pages and times count by being there."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        drawn = path.suffix in (".png", ".html", ".bin", ".pt", ".pth")
        if path.is_dir() or drawn or path.name == "judging.jsonl":
            found[name] = None
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            found[name] = {key: each for key, each in record.items() if key not in VOLATILE}
        else:
            found[name] = path.read_bytes()
    return found


class Scene:
    """A world, a command, and what it leaves when nothing interrupts it."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name, self.out = root, name, root / "out"
        self.action = command(COMMANDS[name])
        self.before = root / "before"
        if name == "overwrite":
            self._fresh()
            older = COMMANDS["evaluate"].replace("--max-new-tokens 3", "--max-new-tokens 2")
            assert forked(command(older), self.out).status == 0, self.said()
            shutil.copytree(self.out, self.before)
        self._fresh()
        ended = forked(self.action, self.out)
        assert ended.status == 0, self.said()
        self.changes, self.whole = ended.changes, snapshot(self.out)

    def said(self) -> str:
        found = [each for each in ("said.txt", "traceback.txt") if (self.root / each).is_file()]
        return "\n".join((self.root / each).read_text() for each in found)

    def _fresh(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before.is_dir():
            shutil.copytree(self.before, self.out)
        else:
            self.out.mkdir()

    def after_kills(self, *kills: tuple[int, bool]) -> None:
        """Kill at each of some places, one after another, then run to the end and compare."""
        self._fresh()
        for number, (at, torn) in enumerate(kills):
            ended = forked(self.action, self.out, at, torn)
            assert ended.status == KILLED or number > 0, "the kill came after the end"
        # Killed after its end, what it made is whole, and a command may refuse to do it twice: only
        # the lock of the dead process still lies there.
        left = {each: what for each, what in snapshot(self.out).items() if ".lock" not in each}
        whole = left == self.whole
        if ended.status == KILLED:
            ended = forked(self.action, self.out)
        where = f"{self.name} killed at {kills} of {self.changes}"
        assert ended.status == 0 or whole, f"{where}: {self.said()}"
        if ended.status:
            return
        found = snapshot(self.out)
        assert found.keys() == self.whole.keys(), f"{where}: {found.keys() ^ self.whole.keys()}"
        other = [name for name in found if found[name] != self.whole[name]]
        assert not other, f"{where}: {other}"


@pytest.fixture
def scene(tmp_path, make_world, no_drawing, monkeypatch):
    root = make_world(tmp_path)
    monkeypatch.chdir(root)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    monkeypatch.setattr(prediction, "RANDOM_DIRECTIONS", 1)
    return lambda name: Scene(root, name)


@pytest.mark.parametrize("name", FEW)
def test_a_kill_at_some_places_changes_nothing(scene, name):
    here = scene(name)
    for number in range(FEW[name]):
        at = 1 + (2 * number + 1) * here.changes // (2 * FEW[name])
        here.after_kills((at, number % 2 == 0))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_anywhere_changes_nothing(scene, name):
    here, draw = scene(name), random.Random(name)
    places = range(1, here.changes + 1)
    chosen = sorted(draw.sample(places, min(MANY, len(places))))
    for number, at in enumerate(chosen):
        again = [(draw.choice(places), True)] if number % 5 == 0 else []
        here.after_kills((at, number % 2 == 0), *again)
