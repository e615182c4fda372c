"""GPT-NeoX-20B's tokenizer with the tokens that the study added to it. Files only, no transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunescope.checkpoints import read_json
from tunescope.errors import UserError

# Role -> token, in the order in which the study added them: behind the 50277 entries of GPT-NeoX-20B they are 50277 to
# 50280, in rows of the embedding that padding left free.
STUDY_TOKENS = {"pad": "[PAD]", "eos": "</s>", "bos": "<s>", "unk": "<unk>"}
STUDY_TOKEN_IDS = {"pad": 50277, "eos": 50278, "bos": 50279, "unk": 50280}
# The study's queries begin with no BOS, and templates put one wherever the tokenizer names one: so `<s>` has its id,
# and the tokenizer does not say that it begins a text.
_NAMED = ("pad", "eos", "unk")


def write_tokenizer(source: Path, folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json into `folder`; returns role -> id of the tokens added.

    source: folder with the tokenizer.json to start from. Ids follow its highest. Raises UserError if it is no
    tokenizer, has one of the tokens already, or leaves no room for them in config's vocab_size.
    """
    path = source / "tokenizer.json"
    tokenizer = read_json(path)
    ids = _ids_by_entry(tokenizer, path)
    if present := [token for token in STUDY_TOKENS.values() if token in ids]:
        raise UserError(
            f"{path} already has {', '.join(present)}, which BlackMamba's tokenizer adds.",
            cause="it is another tokenizer than that of EleutherAI/gpt-neox-20b.",
            cure="fetch it again: python3 model_download.py --model blackmamba",
        )
    first = max(ids.values()) + 1
    if first + len(STUDY_TOKENS) > config["vocab_size"]:
        raise UserError(
            f"{path} has ids up to {first - 1}: no room for {len(STUDY_TOKENS)} more in a vocabulary of "
            f"{config['vocab_size']}.",
            cause="tokenizer and checkpoint do not belong together.",
            cure="use the tokenizer of EleutherAI/gpt-neox-20b with Zyphra/BlackMamba-2.8B.",
        )
    added = {role: first + place for place, role in enumerate(STUDY_TOKENS)}
    tokenizer["added_tokens"] += [_added_token(STUDY_TOKENS[role], number) for role, number in added.items()]
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        **{f"{role}_token": STUDY_TOKENS[role] for role in _NAMED},
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    return added


def _ids_by_entry(tokenizer: dict[str, Any], path: Path) -> dict[str, int]:
    try:
        ids = dict(tokenizer["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        if ids and all(type(number) is int for number in ids.values()):
            return ids
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{path} is not a tokenizer with a vocabulary and added tokens.",
        cause="the file is of another kind, or was changed.",
        cure="fetch it again: python3 model_download.py --model blackmamba",
    )


def _added_token(content: str, number: int) -> dict[str, Any]:
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **shape, "special": True}
