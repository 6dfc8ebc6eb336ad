"""Files that are whole or not there."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a whole file or, when interrupted, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process only: two programs may work side by side.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
