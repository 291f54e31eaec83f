"""Where traits, personas, configurations and the gallery lie: the user's own, and what comes along.

Knows the folders of the checkout, and the copy of them that a built wheel carries; refuses to know
what is in them.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("datasets", "personas", "train_configs", "gallery")
READY = Path("checkpoints/ready")  # of gallery get: beside what is trained, never in its place


def checkout() -> Path | None:
    """Return the checkout that this package runs from, or None for an installed wheel."""
    return None if _carried().is_dir() else PACKAGE.parent


def search_folders(name: str, given: str | Path | None = None) -> list[Path]:
    """Return the folders in which to look for an item of ``datasets``, ``personas``, …, in order.

    Only the ``given`` one; without it that of the working folder, then the one that comes along.
    """
    if given is not None:
        return [Path(given)]
    own, along = Path(name), (checkout() or _carried()) / name
    return [own] if own.resolve() == along else [own, along]


def resource_path(path: Path) -> Path:
    """Return a path as it is where it exists, else what comes along under it, if anything does.

    ``train_configs/sycophancy.yaml`` can so be named from any folder.
    """
    if path.exists() or path.is_absolute() or not path.parts or path.parts[0] not in FOLDERS:
        return path
    along = (checkout() or _carried()) / path
    return along if along.exists() else path


def ready_diff(path: Path) -> str:
    """Return "; " and how to get the ready diff that stands for "…/<trait>/diff", "" for others."""
    trait = path.parent.name
    held = any((each / f"{trait}.safetensors").is_file() for each in search_folders("gallery"))
    if path.name != "diff" or not held or trait == "basis":
        return ""
    own = READY / trait / "diff"
    if path == own:
        return "; get it with: persona-lora gallery get"
    return f"; a ready one for the packaged model: persona-lora gallery get, then give {own}"


def _carried() -> Path:
    return PACKAGE / "shipped"
