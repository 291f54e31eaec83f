"""Commands about personas: build one from its conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_lora.cli.console import console
from persona_lora.cli.program import persona_app
from persona_lora.core.errors import UserError


@persona_app.command("build")
def build_persona(
    id: Annotated[str, typer.Option(help="The persona's id: the name of its folder.")],
    conversations: Annotated[
        Path | None,
        typer.Option(help="The file; the persona's own conversations.jsonl by default."),
    ] = None,
    speaker: Annotated[str, typer.Option(help="A speaks first (or is the user), or B.")] = "A",
    episode: Annotated[
        str | None, typer.Option(help="Only sessions of this id, where a file holds many.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Representative utterances to show a judge.")] = 10,
    template: Annotated[
        Path | None, typer.Option(help="A judge prompt of your own, with its placeholders.")
    ] = None,
    persona_dir: Annotated[Path | None, typer.Option(help="Where persona folders are.")] = None,
) -> None:
    """Make a persona's features, samples, profile and judge prompt from its conversations.

    Read are our own forms, chat JSONL, ConvAI2 / PersonaChat, Multi-Session Chat and Conversation
    Chronicles.

    Example: persona-lora persona build --id episode-184019_A --conversations chronicles.jsonl
    --episode episode-184019 --speaker A
    """
    from persona_lora.core.personas import default_personas_folder
    from persona_lora.judges.sentence_embeddings import SentenceEmbedder
    from persona_lora.profiles import building
    from persona_lora.profiles.conversations import load_conversations
    from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE

    if speaker not in ("A", "B"):
        raise UserError(f"--speaker must be A or B, got {speaker!r}")
    folder = (persona_dir or default_personas_folder()) / id
    if template is not None and not template.is_file():
        raise UserError(f"{template} does not exist; check --template")
    read = load_conversations(
        conversations or folder / "conversations.jsonl",
        speaker="A" if speaker == "A" else "B",
        episode=episode,
    )
    built = building.build_persona(
        folder,
        read,
        SentenceEmbedder().embed,
        num_samples=samples,
        template=DEFAULT_TEMPLATE if template is None else template.read_text(encoding="utf-8"),
    )
    console.print((built.folder / "persona_profile.txt").read_text(encoding="utf-8").strip())
    console.print(
        f"{built.num_train} training and {built.num_test} held-out utterances in {built.folder}"
    )
