"""A study to start from, which `python -m search init` copies."""

from importlib import resources
from pathlib import Path

from spaces.errors import FolderError

FILES = ("study.toml", "model.py", "data.py", "README.md")


def write_template(folder: Path) -> None:
    """Writes a study that runs as it is into a new or empty folder, named after it.

    Raises:
        FolderError: the folder holds something, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FolderError(f"a study begins in a new or an empty folder, got {folder}; give another")
        for name in FILES:
            text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
            (folder / name).write_text(text.replace("my-study", _name(folder)), encoding="utf-8")
    except OSError as error:
        raise FolderError(f"a study goes into a writable folder, got {folder}: {error.strerror}") from None


def _name(folder: Path) -> str:
    letters = [letter if letter.isascii() and letter.isalnum() else "-" for letter in folder.resolve().name]
    return "".join(letters).strip("-") or "my-study"
