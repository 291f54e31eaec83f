#!/usr/bin/env bash
# Do the tests notice a change of the code? MUTATION_SAMPLE=200 MUTATION_SEED=1 bash scripts/mutation.sh
# draws so many small changes (cosmic-ray's) by lot over core, steering, projections, report and cli,
# makes one after another in a copy of the commit at hand, runs for each the tests that reach the
# changed lines, and prints those that no test noticed and their share with its 95% interval.
# Arguments are modules, or the starts of their names (core/settings report/): changes of these
# alone. MUTATION_SAMPLE=all tries every one. What is done is kept in MUTATION_FOLDER (a temporary
# one without it): the same command goes on where it was stopped.
# Needs cosmic-ray and coverage beside the requirements (pip install cosmic-ray coverage).
#
# Which tests reach a line is measured, not guessed: every test of the rooms is run once under
# coverage. For a change those of its statement are run, the room's own first and then the quickest,
# up to 20 seconds' worth; a statement that runs at import alone (a default, a constant) is tried on
# what looks at every module, and then on all tests of its own in that order. So what is called
# unnoticed is so by these tests: an upper bound. Left out is what is no change by construction: "|"
# inside annotations that nothing evaluates, and what the compiler makes the same of, or nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir -p "${MUTATION_FOLDER:=$copy/mutation}"
export MUTATION_FOLDER=$(realpath "$MUTATION_FOLDER")
git archive HEAD | tar -x -C "$copy"
cd "$copy"
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=$copy HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
"$python" - "$@" <<'PY'
import ast
import difflib
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import cosmic_ray.plugins
import coverage
import pytest
import scipy.stats
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

for name in (  # what takes seconds to import is imported once: each run is a fork
    "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers", "peft",
    "trl", "pandas", "sklearn.linear_model", "matplotlib.pyplot", "typer.testing", "rich.progress",
    "jinja2", "pydantic", "hypothesis",
):
    importlib.import_module(name)
ROOMS = ("core", "steering", "projections", "report", "cli")
TESTS = [
    *(path for room in ROOMS[:-1] for path in sorted(Path("tests", room).glob("test_*.py"))),
    # of studies what reads and draws: their runs take minutes and guard what is not changed here
    *(path for kind in ("read", "figure", "report", "research", "what", "verdicts", "objective")
      for path in sorted(Path("tests/studies").rglob(f"test_{kind}*.py"))),
    *sorted(Path("tests").glob("test_*.py")),
    *(Path("tests/serving/test_server_commands.py"), Path("tests/engines/test_vllm_command.py")),
]
# They start processes of their own, a browser, a build, or trace as coverage does: it sees none of it.
APART = ("interruption", "kills", "endings", "machines", "playground", "repository", "site", "wheel",
         "docs", "extending")
EVERYWHERE = "tests/test_values.py"  # looks at all modules, once they are imported
SECONDS = 20  # of the processor, of tests for one change
KEPT = Path(os.environ["MUTATION_FOLDER"])
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={os.environ['PYTHONPATH']}/temporary"]


def forked(work, seconds):
    """The exit status of ``work()`` in a process of its own; None where it takes longer.

    ``seconds`` are of the processor, so that a busy machine notices no more than an idle one; ten
    times as many may pass.
    """
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        os.dup2(os.open(KEPT / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(int(work()))
    end = time.monotonic() + 10 * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(status)
            return None if status in (-signal.SIGXCPU, -signal.SIGKILL) else status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def digest(*paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Reached:
    """Notes which test runs which line; what a fixture of a whole file runs, all of its tests do."""

    def __init__(self):
        self.coverage = coverage.Coverage(data_file=None, source=["persona_lora"], config_file=False)
        self.test, self.seconds = "", {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test = item.nodeid.split("[")[0]
        self.coverage.switch_context(self.test)
        start = time.process_time()
        result = yield
        took = time.process_time() - start
        self.seconds[self.test] = self.seconds.get(self.test, 0) + took
        self.coverage.switch_context("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        wide = fixturedef.scope != "function"
        if wide:
            self.coverage.switch_context("*")
        try:
            return (yield)
        finally:
            if wide:
                self.coverage.switch_context(self.test)

    def run(self, tests, file):
        self.coverage.start()
        status = pytest.main([*OPTIONS, str(tests)], plugins=[self])
        self.coverage.stop()
        data, lines = self.coverage.get_data(), {}
        for path in data.measured_files():
            module = lines.setdefault(str(Path(path).relative_to(Path.cwd())), {})
            for line, contexts in data.contexts_by_lineno(path).items():
                tests = set(self.seconds) if "*" in contexts else set(contexts) - {""}
                if tests:
                    module[line] = sorted(tests)
        if status in (0, 5):  # all pass, or all are marked slow
            digests = {module: digest(Path(module)) for module in lines}
            found = {"seconds": self.seconds, "lines": lines, "digests": digests}
            file.write_text(json.dumps(found))
        return status


def reached():
    """Seconds of every test, and the tests by module and line."""
    shared = [path for path in sorted(Path("tests").glob("*.py")) if not path.stem.startswith("test_")]
    seconds, lines = {}, {}
    for tests in TESTS:
        if tests.stem.removeprefix("test_") in APART:
            continue
        file = KEPT / f"reached-{tests.stem}-{digest(tests, *shared)}.json"
        known = json.loads(file.read_text()) if file.exists() else {"lines": {"none": {}}}
        current = {module: digest(Path(module)) for module in known["lines"] if Path(module).exists()}
        if known.get("digests") != current:  # one of the modules that it reached has changed
            if forked(lambda t=tests, f=file: Reached().run(t, f), 1800) not in (0, 5):
                sys.exit(f"{tests}: fails before any change: {KEPT / 'last.log'}")
            known = json.loads(file.read_text())
        seconds |= known["seconds"]
        for module, by_line in known["lines"].items():
            for line, names in by_line.items():
                lines.setdefault(module, {}).setdefault(int(line), set()).update(names)
    return seconds, lines


def changes(module, source):
    """Every (operator, occurrence, line) of a module that is a change."""
    spans = [
        (each.lineno, each.col_offset, each.end_lineno, each.end_col_offset)
        for node in ast.walk(ast.parse(source))
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if each is not None
    ]
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        places = [at for node in nodes for at in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            noted = "_BitOr_" in name and any(
                (top, left) <= (line, column) <= (bottom, right) for top, left, bottom, right in spans
            )
            if not noted:
                yield module, name, occurrence, line


def changed(source, operator, occurrence):
    """The changed source; None where it does not compile or means the same."""
    new = mutate_code(source, cosmic_ray.plugins.get_operator(operator)(), occurrence)
    try:
        same = new is None or ast.dump(ast.parse(new)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else new


def guards(module, source, line, lines, seconds):
    """The tests of the statement at a line, the room's own first, then the quickest."""
    known = lines.get(module, {})
    statement = None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            if start <= line <= node.end_lineno and (statement is None or start >= statement[0]):
                body = getattr(node, "body", None)
                whole = body is None or isinstance(node, ast.FunctionDef | ast.ClassDef)
                statement = start, node.end_lineno if whole else max(start, body[0].lineno - 1)
    first, last = statement or (line, line)
    found = {test for at in range(first, max(last, line) + 1) for test in known.get(at, ())}
    chosen, spent = ([], 0.0) if found else ([EVERYWHERE], 3.0)
    found = found or {test for tests in known.values() for test in tests}
    room = Path(module).parts[1]
    home = "tests/test_" if room == "cli" else f"tests/{room}/"
    for test in sorted(found, key=lambda each: (not each.startswith(home), seconds[each])):
        if spent == 0 or spent + seconds[test] <= SECONDS:
            chosen.append(test)
            spent += seconds[test]
    return chosen, spent


def tried(change, new, source, tests, spent, number):
    """What came of a change: noticed, or not."""
    path = Path(change[0])
    before = path.stat()
    try:
        path.write_text(new)
        os.utime(path, (before.st_mtime + number, before.st_mtime + number))  # no stale bytecode
        status = forked(lambda: pytest.main([*OPTIONS, *tests]), 20 + 3 * spent) if tests else 0
    finally:
        path.write_text(source)
        os.utime(path, (before.st_mtime, before.st_mtime))
    named = [f"{change[0]}:{change[3]}", change[1]]
    diff = difflib.unified_diff(source.split("\n"), new.split("\n"), *named, lineterm="", n=2)
    return {"change": change, "noticed": status != 0, "late": status is None, "tests": len(tests), "diff": "\n".join(diff)}


def main(wanted):
    seconds, lines = reached()
    modules = [path for room in ROOMS for path in sorted(Path("persona_lora", room).glob("*.py"))]
    sources = {
        str(path): path.read_text()
        for path in modules
        if not wanted or str(path).removeprefix("persona_lora/").startswith(tuple(wanted))
    }
    drawn = [each for name, source in sources.items() for each in changes(name, source)]
    seed, size = os.environ.get("MUTATION_SEED", "1"), os.environ.get("MUTATION_SAMPLE", "200")
    random.Random(int(seed)).shuffle(drawn)
    commit = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    file = KEPT / f"tried-{seed}-{commit}.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {tuple(each["change"]): each for each in results}
    results = []
    for change in drawn:
        if size != "all" and len(results) >= int(size):
            break
        source = sources[change[0]]
        if change not in known:
            new = changed(source, change[1], change[2])
            if new is None:
                continue
            tests, spent = guards(change[0], source, change[3], lines, seconds)
            known[change] = tried(change, new, source, tests, spent, len(known) + 1)
            with file.open("a") as out:
                out.write(json.dumps(known[change]) + "\n")
        results.append(known[change])
    missed = [each for each in results if not each["noticed"]]
    late = sum(each["late"] for each in results)
    print(*(each["diff"] for each in missed), sep="\n\n")
    low, high = scipy.stats.binomtest(len(missed), len(results)).proportion_ci(method="wilson")
    print(
        f"\nseed {seed}: of {len(results)} changes out of {len(drawn)}, {len(missed)} unnoticed: "
        f"{len(missed) / len(results):.1%} [{low:.1%}, {high:.1%}]; {late} ran for too long, which is noticed"
    )


main(sys.argv[1:])
PY
