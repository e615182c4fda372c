"""A model folder of the point's own: its config.json, and links to the weights and tokenizer it shares.

Sparsity (top_k) and depth reach the engine this way, so no file of a checkpoint or of an installed package is touched.
"""

import json
import os
from pathlib import Path
from typing import Any

from tunescope import checkpoints
from tunescope.models import tokenizer

CONFIG_FILE = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def build_model_folder(folder: Path, config: dict[str, Any], source: Path | None, cutoff_len_tokens: int) -> str:
    """Fills `folder` and returns the kind of tokenizer in it (`checkpoint` or tokenizer.KIND).

    source: a folder whose other files (weights, tokenizer) are linked; None: no weights, a generated tokenizer.
    Where the source has no tokenizer only its weights are linked: a generated tokenizer's files of the same names
    would be written through the links, into the user's folder.
    """
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
    has_tokenizer = source is not None and holds_tokenizer(source)
    for file in source.iterdir() if source is not None else ():
        if file.is_file() and file.name != CONFIG_FILE and (has_tokenizer or checkpoints.is_weight_file(file.name)):
            os.symlink(file.resolve(), folder / file.name)
    if has_tokenizer:
        return "checkpoint"
    tokenizer.write_tokenizer(folder, config["vocab_size"], cutoff_len_tokens)
    return tokenizer.KIND
