"""The mixing desk in a browser: sliders, two answers side by side, scores, mixes to keep."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from persona_lora.core.errors import UserError
from persona_lora.core.personas import LARGEST_COEFFICIENT, saved_mixes
from persona_lora.playground.mixing_desk import (
    LONGEST_MESSAGE,
    LONGEST_NAME,
    WAITING_IN_ALL,
    MixingDesk,
    Pair,
)

NO_JUDGE = "no score"
KEPT_EXPORTS = 4
OTHER_THREADS = 10  # while all the others wait for their turns
LARGEST_UPLOAD = "1kb"  # nothing on the page is uploaded


class Exports:
    """The last exported archives; those before them are removed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="persona-lora-exports-")
        self._kept: deque[Path] = deque()
        # Served from where they are: Gradio would keep a copy of each.
        gr.set_static_paths([self._folder.name])

    def add(self, write: Callable[[Path], object]) -> str:
        """Pack what ``write`` puts into a folder, and return the archive's path."""
        place = Path(tempfile.mkdtemp(dir=self._folder.name))
        try:
            write(place / "adapter")
            archive = shutil.make_archive(str(place / "adapter"), "zip", place / "adapter")
        except BaseException:
            shutil.rmtree(place)
            raise
        shutil.rmtree(place / "adapter")
        self._kept.append(place)
        while len(self._kept) > KEPT_EXPORTS:
            shutil.rmtree(self._kept.popleft())
        return archive


def serve(page: gr.Blocks, host: str, port: int, *, wait: bool = True) -> str:
    """Serve the page; return its address where ``wait`` is False, else when it is ended."""
    page.queue(default_concurrency_limit=1, max_size=2 * WAITING_IN_ALL)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        quiet=True,
        show_error=True,
        max_file_size=LARGEST_UPLOAD,
        max_threads=WAITING_IN_ALL + OTHER_THREADS,
        prevent_thread_lock=not wait,
    )
    return str(url)


class _Controls(NamedTuple):
    """What stands at the side of the page."""

    sliders: list[gr.Slider]
    judge: gr.Dropdown
    tokens: gr.Slider
    name: gr.Textbox
    save: gr.Button
    reset: gr.Button
    saved: gr.Dropdown
    export: gr.Button
    file: gr.File


class _Chats(NamedTuple):
    """Two answers side by side, their scores, and the line to ask in."""

    steered: gr.Chatbot
    plain: gr.Chatbot
    scores: gr.Markdown
    question: gr.Textbox
    ask: gr.Button
    clear: gr.Button


def build_page(desk: MixingDesk, mixes: Path, told: Mapping[str, str]) -> gr.Blocks:
    """Return the Gradio page of a desk. All state is in its components: one set a visitor.

    ``told`` stands under the sliders, by trait.
    """
    with gr.Blocks(title="persona_lora: the mixing desk", analytics_enabled=False) as page:
        gr.Markdown(f"## The mixing desk\n{desk.chat_model.name}, live LoRA: nothing is merged.")
        with gr.Row():
            with gr.Column(scale=1):
                controls = _controls(desk, mixes, told)
            with gr.Column(scale=3):
                chats = _chats()
        _connect(page, controls, chats, _Answers(desk, mixes))
    return page


def _controls(desk: MixingDesk, mixes: Path, told: Mapping[str, str]) -> _Controls:
    sliders = [
        gr.Slider(
            -LARGEST_COEFFICIENT,
            LARGEST_COEFFICIENT,
            0.0,
            step=0.05,
            label=trait,
            info=told.get(trait) or None,
            elem_id=f"s-{trait}",
        )
        for trait in desk.traits
    ]
    judge = gr.Dropdown(
        [NO_JUDGE, *sorted(desk.judges)], value=NO_JUDGE, label="judge", elem_id="judge"
    )
    tokens = gr.Slider(10, 300, 80, step=10, label="longest answer, tokens")
    with gr.Accordion("mixes", open=False):
        name = gr.Textbox(label="name", elem_id="mix-name", max_lines=1, max_length=LONGEST_NAME)
        with gr.Row():
            save = gr.Button("save", elem_id="save")
            reset = gr.Button("reset", elem_id="reset")
        saved = gr.Dropdown(
            saved_mixes(mixes),
            label="saved",
            value=None,
            elem_id="saved",
            allow_custom_value=True,  # what was saved since the page was opened
        )
        export = gr.Button("export as PEFT adapter", elem_id="export")
        file = gr.File(label="adapter", interactive=False, elem_id="adapter")
    return _Controls(sliders, judge, tokens, name, save, reset, saved, export, file)


def _chats() -> _Chats:
    with gr.Row():
        steered = gr.Chatbot(label="steered", elem_id="steered")
        plain = gr.Chatbot(label="unsteered", elem_id="unsteered")
    scores = gr.Markdown(elem_id="scores")
    question = gr.Textbox(
        label="ask",
        placeholder="Is my plan any good?",
        elem_id="question",
        max_lines=4,
        max_length=LONGEST_MESSAGE,
    )
    with gr.Row():
        ask = gr.Button("ask", variant="primary", elem_id="ask")
        clear = gr.Button("new chat", elem_id="clear")
    return _Chats(steered, plain, scores, question, ask, clear)


class _Answers:
    """What the page does when something on it is pressed."""

    def __init__(self, desk: MixingDesk, mixes: Path) -> None:
        self.desk = desk
        self.mixes = mixes
        self.exports = Exports()

    def ask(
        self,
        request: gr.Request,
        text: str | None,
        left: Any,
        right: Any,
        judge: str,
        length: float,
        *values: float,
    ) -> Any:
        text = text or ""  # None is a field that was never written in
        with _shown():
            visitor = str(request.session_hash)
            pair = self.desk.answer(
                _history(left, text),
                self.desk.mix(values),
                plain=_history(right, text),
                max_new_tokens=int(length),
                visitor=visitor,
            )
            line = _scores(self.desk, judge, pair, visitor)
        turn = {"role": "user", "content": text}
        return (
            [*left, turn, {"role": "assistant", "content": pair.steered.answer}],
            [*right, turn, {"role": "assistant", "content": pair.unsteered.answer}],
            line,
            "",
        )

    def save(self, title: str | None, *values: float) -> Any:
        with _shown():
            kept = self.desk.save(self.desk.mix(values), self.mixes, title or "")
        return gr.Dropdown(saved_mixes(self.mixes), value=kept.stem)

    def load(self, title: str | None) -> Any:
        if not title:
            return [gr.skip()] * len(self.desk.traits)
        with _shown():
            if title not in saved_mixes(self.mixes):
                raise UserError(f"there is no saved mix {title!r}")
            found = self.desk.load(self.mixes / f"{title}.json").as_dict()
        return [found[trait] for trait in self.desk.traits]

    def export(self, *values: float) -> str:
        with _shown():
            mix = self.desk.mix(values)
            return self.exports.add(lambda folder: self.desk.export(mix, folder))

    def look(self) -> Any:
        return gr.Dropdown(saved_mixes(self.mixes))


def _connect(page: gr.Blocks, controls: _Controls, chats: _Chats, answers: _Answers) -> None:
    """Say what follows on what is pressed."""
    sliders, saved = controls.sliders, controls.saved
    told = [chats.question, chats.steered, chats.plain, controls.judge, controls.tokens, *sliders]
    shown = [chats.steered, chats.plain, chats.scores, chats.question]
    # Many may wait at once; the desk gives them their turns. A mistake covers what it is shown
    # on: the chats are to stay readable.
    asking = {
        "concurrency_limit": WAITING_IN_ALL,
        "concurrency_id": "ask",
        "show_progress_on": chats.scores,
    }
    chats.ask.click(answers.ask, told, shown, api_name="ask", **asking)
    chats.question.submit(answers.ask, told, shown, api_name=False, **asking)
    chats.clear.click(lambda: ([], [], "", ""), None, shown, api_name=False)
    controls.reset.click(lambda: [0.0] * len(sliders), None, sliders, api_name=False)
    quiet = {"show_progress": "hidden"}
    controls.save.click(answers.save, [controls.name, *sliders], saved, api_name="save", **quiet)
    saved.input(answers.load, saved, sliders, api_name="load", **quiet)
    page.load(answers.look, None, saved, api_name=False, **quiet)
    saved.focus(answers.look, None, saved, api_name=False, **quiet)
    controls.export.click(answers.export, sliders, controls.file, api_name="export")


@contextmanager
def _shown() -> Iterator[None]:
    """Turn a UserError into a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error)) from error


def _history(chat: list[dict[str, Any]], text: str) -> list[Any]:
    """Return a chat so far and the new question, as messages of plain text."""
    turns = [{"role": turn["role"], "content": _plain(turn["content"])} for turn in chat]
    return [*turns, {"role": "user", "content": text}]


def _plain(content: Any) -> str:
    """Return a message's text: a chat component may hold it in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _scores(desk: MixingDesk, judge: str, pair: Pair, visitor: str) -> str:
    if judge == NO_JUDGE:
        return ""
    steered, plain = desk.scores(judge, pair, visitor=visitor)

    def said(score: float | None) -> str:
        return "not scored" if score is None else f"{score:.0f}"

    marked = f"**{judge}**{desk.mark(judge)}"
    return f"{marked} (0–100): steered {said(steered)}, unsteered {said(plain)}"
