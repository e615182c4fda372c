"""What comes from files, before it is shown: no paths but relative ones, no control characters, no endless names."""

import re
import unicodedata
from pathlib import Path

import pandas as pd

MAX_NAME_CHARS, MAX_CAUSE_CHARS = 120, 400
_LONG_TEXT = ("cause", "ncu_why_not", "expert_probe_why_not")
# A path from the root (of POSIX or of a Windows drive) down to its last part, which alone says what it is of.
_PATH = re.compile(r"(?<![\w.~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|:;,()]+[/\\])+([^\s/\\'\"<>|:;,()]*)")
_USER_AT_HOST = re.compile(r"\b[\w.-]+@[\w.-]+\b")


def clean_text(text: str, limit: int = MAX_NAME_CHARS) -> str:
    """Without control characters and those that turn the direction of text (each becomes U+FFFD), on one line."""
    on_one_line = " ".join(text.split())
    visible = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character
        for character in on_one_line[: 4 * limit]
    )
    return visible if len(visible) <= limit else visible[: limit - 1] + "…"


def clean_cause(text: str) -> str:
    """A sentence about a fault: of a path only its last part stays, of `user@host` nothing."""
    return clean_text(_USER_AT_HOST.sub("…", _PATH.sub(r"…/\1", text)), MAX_CAUSE_CHARS)


def clean_frame(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """A table of analyze with every text cell cleaned, and its folders relative to `root`."""
    made = frame.copy()
    for name in made.columns:
        column = made[name]
        if column.dtype != object and not isinstance(column.dtype, pd.StringDtype | pd.CategoricalDtype):
            continue
        clean = clean_cause if name in _LONG_TEXT else clean_text
        known = {value: clean(value) for value in set(column.dropna()) if isinstance(value, str)}
        if name == "folder":
            known = {value: relative(value, root) for value in known}
        made[name] = [known.get(value, value) if isinstance(value, str) else value for value in column]
    return made


def relative(folder: str, root: Path) -> str:
    """A point's folder as seen from `root`, whose own name is left out."""
    path = Path(folder)
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return clean_text(inside.as_posix(), 2 * MAX_NAME_CHARS)
