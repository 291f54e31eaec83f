"""What did steering cost in capability? The evaluation harness on a loaded, steered model.

Runs lm-evaluation-harness tasks (its own, or YAML files of ours) on the model in memory, unsteered
and steered, and keeps every item's score, so that the two are compared item by item. Knowledge
questions alone miss the known failure, so a task with steps to be generated stands beside them,
and perplexity on ordinary chat. The harness is the extra ``benchmark``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from persona_lora.core.chat import Exchange
from persona_lora.core.content import digest_of, file_digest, folder_digest
from persona_lora.core.errors import UserError
from persona_lora.core.options import TaskOptions
from persona_lora.core.resources import resource_path, search_folders
from persona_lora.core.runs import Output
from persona_lora.core.settings import read_yaml
from persona_lora.core.traits import read_finetuning_rows
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import longrope_crossing
from persona_lora.report.comparisons import TASK_COLUMNS, TaskScore, score_items, write_found
from persona_lora.studies.asking.run import open_run

PERPLEXITY = "perplexity"
INSTALL = 'pip install "persona-lora[benchmark]"'


def run_benchmarks(
    chat_model: ChatModel,
    conditions: Mapping[str, AbstractContextManager[Any]],
    options: TaskOptions,
    output: Output | Path,
    *,
    system_prompts: Mapping[str, str] = MappingProxyType({}),
) -> list[TaskScore]:
    """Run every task under every condition (context managers over the model) into a run folder.

    Tasks are names of YAML files in ``options.tasks_dir`` (``datasets/capability`` by default),
    "perplexity", or names that the harness knows. The first condition is the reference; those in
    ``system_prompts`` get that text in front of every item. Writes
    ``items.jsonl`` (a row an item and metric; "metric,filter" where a task reads its answers in
    several ways) and ``scores.csv``; finished conditions are kept on a rerun.
    Raises UserError without the harness, or for a task that neither side knows.
    """
    told = {"system_prompts": dict(system_prompts)} if system_prompts else {}
    config = {**options.record(), "conditions": list(conditions), **told}
    with open_run(output, "benchmark", chat_model, config, task_inputs(options)) as run:
        known = run.resume_rows("items")
        _refuse_repeated(known, run.folder)
        done = {row["condition"] for row in known}
        for name, steered in conditions.items():
            if name in done:
                continue
            with steered:
                items = _items(chat_model, options, system_prompts.get(name))
                run.extend("items", [{"condition": name, **row} for row in items])
        scores = score_items(run.read("items"), next(iter(conditions)))
        write_found(run.folder / "scores.csv", TASK_COLUMNS, scores)
    return scores


def _refuse_repeated(items: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """UserError for items of a task that reads an answer in several ways, and kept them as one."""
    place = ("condition", "task", "metric", "item")
    seen = Counter(tuple(row[name] for name in place) for row in items)
    (_, task, metric, _), number = max(seen.items(), key=lambda each: each[1], default=(place, 1))
    if number > 1:
        raise UserError(
            f"{folder} holds {number} scores of one item by {metric} of {task}: an earlier version "
            "did not keep the task's filters apart; choose another output or pass --overwrite"
        )


def task_inputs(options: TaskOptions) -> dict[str, str]:
    """Return digests of the files of our own tasks."""
    folder = _tasks_folder(options)
    read = {f"the tasks of {folder.name}": folder_digest(folder)}
    if PERPLEXITY in options.tasks:
        texts = {
            path.parent.name: file_digest(path) for path in _ordinary_files(options.datasets_dir)
        }
        read["the normal.jsonl files"] = digest_of(texts)
    return read


def _tasks_folder(options: TaskOptions) -> Path:
    datasets = options.datasets_dir
    own = datasets / "capability" if datasets is not None else None
    return options.tasks_dir or own or resource_path(Path("datasets/capability"))


def _ordinary_files(datasets: Path | None) -> list[Path]:
    roots = search_folders("datasets", datasets)
    files = next(filter(None, (sorted(root.glob("*/normal.jsonl")) for root in roots)), None)
    if files is None:
        raise UserError(f"{roots[0]} holds no */normal.jsonl to measure perplexity on")
    return files


def _ordinary_answers(datasets: Path | None) -> list[Exchange]:
    return [row for file in _ordinary_files(datasets) for row in read_finetuning_rows(file)]


def perplexity_items(
    chat_model: ChatModel,
    datasets: Path | None,
    limit: int | None = None,
    system_prompt: str | None = None,
) -> list[dict[str, Any]]:
    """Return the mean log-probability of ordinary answers of the finetuning sets, or the first.

    Of ``datasets``, or of the first folder of traits that has any.
    """
    means = mean_logprobs(chat_model, _ordinary_answers(datasets)[:limit], system_prompt)
    return [
        {"task": PERPLEXITY, "metric": "mean_logprob", "item": at, "score": float(value)}
        for at, value in enumerate(means)
        if math.isfinite(value)
    ]


def _items(
    chat_model: ChatModel, options: TaskOptions, system_prompt: str | None
) -> list[dict[str, Any]]:
    check_tasks(options)
    rows = []
    if PERPLEXITY in options.tasks:
        rows += perplexity_items(chat_model, options.datasets_dir, options.limit, system_prompt)
    harness = [name for name in options.tasks if name != PERPLEXITY]
    if harness:
        rows += _harness_items(chat_model, harness, options, system_prompt)
    return rows


def harness() -> tuple[Any, Any]:
    """Return the harness's function and its class of models; UserError where it is missing."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"the evaluation harness is not installed; run: {INSTALL}") from error
    return simple_evaluate, HFLM


def check_tasks(options: TaskOptions) -> None:
    """UserError without the harness where it is needed, and for a task that neither side knows.

    So for rows that perplexity cannot be measured on.
    """
    if PERPLEXITY in options.tasks:
        _ordinary_answers(options.datasets_dir)
    asked, folder = [name for name in options.tasks if name != PERPLEXITY], _tasks_folder(options)
    if asked:
        harness()
    for name in asked:
        known = _local_task(folder / f"{name}.yaml") is not None
        if not known and name not in _task_manager().all_tasks:
            own = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise UserError(f"no task {name!r}: neither in {folder} ({own}) nor in the harness")


def _harness_items(
    chat_model: ChatModel, tasks: Sequence[str], options: TaskOptions, system_prompt: str | None
) -> list[dict[str, Any]]:
    simple_evaluate, HFLM = harness()
    folder = _tasks_folder(options)
    local = {name: _local_task(folder / f"{name}.yaml") for name in tasks}
    model = HFLM(
        pretrained=chat_model.model,
        tokenizer=chat_model.tokenizer,
        batch_size=options.batch_size,
        max_length=longrope_crossing(chat_model.model.config),  # None: as configured
    )
    found = simple_evaluate(
        model=model,
        tasks=[local[name] or name for name in tasks],
        task_manager=_task_manager(),
        limit=options.limit,
        log_samples=True,
        system_instruction=system_prompt,
        bootstrap_iters=0,
        confirm_run_unsafe_code=False,
    )
    return [
        {"task": task, "metric": name, "item": int(sample["doc_id"]), "score": float(value)}
        for task, samples in found["samples"].items()
        for several in [len({sample.get("filter") for sample in samples}) > 1]
        for sample in samples
        for metric, value in sample.items()
        if metric in sample.get("metrics", ()) and isinstance(value, int | float)
        for name in [f"{metric},{sample['filter']}" if several else metric]
    ]


@cache
def _task_manager() -> Any:
    """Return the harness's index of tasks: some twenty seconds of reading, once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local_task(path: Path) -> dict[str, Any] | None:
    """Return a task of ours as the harness takes it, with its data file's whole path."""
    if not path.is_file():
        return None
    task = read_yaml(path)
    settings = task.get("dataset_kwargs")
    files = settings.get("data_files") if isinstance(settings, dict) else None
    if not isinstance(files, dict):
        raise UserError(
            f"{path} must name its data under dataset_kwargs: data_files: {{split: file}}"
        )
    task["dataset_kwargs"]["data_files"] = {
        split: str((path.parent / name).resolve()) for split, name in files.items()
    }
    return task
