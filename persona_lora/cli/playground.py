"""The mixing desk in a browser: sliders, two answers side by side, scores, mixes to keep."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lora.cli.console import console
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.options import (
    DatasetsOption,
    ModelOptions,
    OtherBaseOption,
)
from persona_lora.cli.parsing import load_model
from persona_lora.cli.program import app
from persona_lora.core.errors import UserError

if TYPE_CHECKING:
    from persona_lora.experiments.mixing_desk import MixingDesk

INSTALL = 'pip install "persona-lora[playground]"'
NO_JUDGE = "no score"
REACH = 2.0  # of the sliders


@app.command("playground")
@with_groups
def playground(
    *,
    traits: Annotated[
        str | None,
        typer.Option(help='Traits with a diff in --directions, as in "evil formality"; all found.'),
    ] = None,
    directions: Annotated[Path, typer.Option(help="Where {trait}/diff is.")] = Path("checkpoints"),
    mixes: Annotated[
        Path, typer.Option(help="Where mixes are kept and found: *_best_weights.json, *.json.")
    ] = Path("results/mixes"),
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The page's port.")] = 7860,
    model: ModelOptions,
    datasets_dir: DatasetsOption = None,
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Chat with the model while sliders set each trait's coefficient; needs the extra "playground".

    Steered and unsteered answers stand side by side. On this machine only, unless --host says so.

    Example: persona-lora playground --traits "evil sycophancy formality"
    """
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.experiments.mixing_desk import MixingDesk

    found = sorted(path.parent.parent.name for path in directions.glob("*/diff/diff.json"))
    chosen = found if traits is None else traits.replace(",", " ").split()
    missing = [trait for trait in chosen if trait not in found]
    if missing or not chosen:
        known = ", ".join(found) or "none"
        raise UserError(
            f"{directions} holds no diff of {missing[0] if missing else 'any trait'}; it has "
            f"{known}; train one with: bash scripts/train_and_sweep.sh evil"
        )
    diffs = {trait: LoRADiff.load(directions / trait / "diff") for trait in chosen}
    chat_model = load_model(model)
    judges = _judges(chosen, chat_model, datasets_dir)
    desk = MixingDesk(chat_model, diffs, judges, allow_other_base)
    page = build_page(desk, mixes)
    console.print(f"open http://{host}:{port} (Ctrl+C ends it)")
    page.queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, quiet=True, show_error=True
    )


def _judges(traits: list[str], chat_model: Any, datasets: Path | None) -> dict[str, Any]:
    """Return what builds the embedded judge of every trait that has labelled answers."""
    from persona_lora.core.traits import list_traits, load_trait
    from persona_lora.experiments.judging import JudgeOptions, make_judge

    known = list_traits(datasets)
    return {
        trait: (
            lambda trait=trait: make_judge(load_trait(trait, datasets), chat_model, JudgeOptions())
        )
        for trait in traits
        if trait in known
    }


def build_page(desk: MixingDesk, mixes: Path) -> Any:
    """Return the Gradio page of a desk. All state is in its components: one set a visitor."""
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f"the playground's library is not installed; run: {INSTALL}") from error

    count = len(desk.traits)
    with gr.Blocks(title="persona_lora: the mixing desk", analytics_enabled=False) as page:
        gr.Markdown(f"## The mixing desk\n{desk.chat_model.name}, live LoRA: nothing is merged.")
        with gr.Row():
            with gr.Column(scale=1):
                sliders = [
                    gr.Slider(-REACH, REACH, 0.0, step=0.05, label=trait, elem_id=f"s-{trait}")
                    for trait in desk.traits
                ]
                judged = gr.Dropdown(
                    [NO_JUDGE, *sorted(desk.judges)], value=NO_JUDGE, label="judge", elem_id="judge"
                )
                tokens = gr.Slider(10, 300, 80, step=10, label="longest answer, tokens")
                with gr.Accordion("mixes", open=False):
                    name = gr.Textbox(label="name", elem_id="mix-name", max_lines=1)
                    with gr.Row():
                        save = gr.Button("save", elem_id="save")
                        reset = gr.Button("reset", elem_id="reset")
                    saved = gr.Dropdown(_names(mixes), label="saved", value=None, elem_id="saved")
                    export = gr.Button("export as PEFT adapter", elem_id="export")
                    file = gr.File(label="adapter", interactive=False, elem_id="adapter")
            with gr.Column(scale=3):
                with gr.Row():
                    steered = gr.Chatbot(label="steered", elem_id="steered")
                    plain = gr.Chatbot(label="unsteered", elem_id="unsteered")
                scores = gr.Markdown(elem_id="scores")
                question = gr.Textbox(
                    label="ask", placeholder="Is my plan any good?", elem_id="question", max_lines=4
                )
                with gr.Row():
                    ask = gr.Button("ask", variant="primary", elem_id="ask")
                    clear = gr.Button("new chat", elem_id="clear")

        def on_ask(
            text: str, left: Any, right: Any, judge: str, length: float, *values: float
        ) -> Any:
            with _shown(gr):
                mix = desk.mix(values)
                pair = desk.answer(
                    _history(left, text),
                    mix,
                    plain=_history(right, text),
                    max_new_tokens=int(length),
                )
                line = _scores(desk, judge, text, pair)
            turn = {"role": "user", "content": text}
            return (
                [*left, turn, {"role": "assistant", "content": pair.steered}],
                [*right, turn, {"role": "assistant", "content": pair.unsteered}],
                line,
                "",
            )

        def on_save(title: str, *values: float) -> Any:
            with _shown(gr):
                desk.save(desk.mix(values), mixes / f"{_file_name(title)}.json")
            return gr.Dropdown(_names(mixes), value=_file_name(title))

        def on_load(title: str | None) -> Any:
            if not title:
                return [gr.skip()] * count
            with _shown(gr):
                found = desk.load(_mix_path(mixes, title)).as_dict()
            return [found[trait] for trait in desk.traits]

        def on_export(*values: float) -> str:
            with _shown(gr):
                folder = Path(tempfile.mkdtemp()) / "adapter"
                desk.export(desk.mix(values), folder)
                return shutil.make_archive(str(folder), "zip", folder)

        told = [question, steered, plain, judged, tokens, *sliders]
        shown = [steered, plain, scores, question]
        # A mistake covers what it is shown on; the chats are to stay readable.
        ask.click(on_ask, told, shown, api_name="ask", show_progress_on=scores)
        question.submit(on_ask, told, shown, api_name=False, show_progress_on=scores)
        clear.click(lambda: ([], [], "", ""), None, shown, api_name=False)
        reset.click(lambda: [0.0] * count, None, sliders, api_name=False)
        quiet = {"show_progress": "hidden"}
        save.click(on_save, [name, *sliders], saved, api_name="save", **quiet)
        saved.input(on_load, saved, sliders, api_name="load", **quiet)
        export.click(on_export, sliders, file, api_name="export")
    return page


class _shown:
    """Turns a UserError into a message on the page."""

    def __init__(self, gradio: Any) -> None:
        self.gradio = gradio

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError):
            raise self.gradio.Error(str(error)) from error


def _history(chat: list[dict[str, Any]], text: str) -> list[Any]:
    """Return a chat so far and the new question, as messages of plain text."""
    turns = [{"role": turn["role"], "content": _plain(turn["content"])} for turn in chat]
    return [*turns, {"role": "user", "content": text}]


def _plain(content: Any) -> str:
    """Return a message's text: a chat component may hold it in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _scores(desk: MixingDesk, judge: str, question: str, pair: Any) -> str:
    if judge == NO_JUDGE:
        return ""
    steered, plain = desk.scores(judge, question, pair)

    def said(score: float | None) -> str:
        return "not scored" if score is None else f"{score:.0f}"

    return f"**{judge}** (0–100): steered {said(steered)}, unsteered {said(plain)}"


def _names(mixes: Path) -> list[str]:
    return sorted(path.stem for path in mixes.glob("*.json"))


def _mix_path(mixes: Path, title: str) -> Path:
    if title not in _names(mixes):
        raise UserError(f"there is no saved mix {title!r}")
    return mixes / f"{title}.json"


def _file_name(title: str) -> str:
    name = "".join(
        letter if letter.isalnum() or letter in "-_" else "_" for letter in title.strip()
    )
    if not name:
        raise UserError("give the mix a name first")
    return name
