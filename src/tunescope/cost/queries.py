"""Conversations of a data file as the engine tokenizes them: read, wrapped in a template, counted. No torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tunescope.dataset_files import read_dataset_file
from tunescope.errors import UserError

_HAN = "\u3400-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff"
_WORD = re.compile(rf"[{_HAN}{_KANA}]|[^\W\d_{_HAN}{_KANA}]+|\d|[^\w\s]|_")
_LETTER = re.compile(r"[^\W\d_]")
_CALIBRATED_LETTER = re.compile(rf"[A-Za-z\u00aa\u00ba\u00c0-\u024f{_HAN}]")
_MAX_OTHER_LETTERS_FRAC = 0.05
_MAX_QUERIES_LOOKED_AT = 2000  # for their script


class Query(NamedTuple):
    """A conversation as the engine reads it. turns: (prompt, answer), in order."""

    system: str
    turns: list[tuple[str, str]]


def read_queries(path: Path) -> list[Query]:
    """The conversations of a data file in LLaMA-Factory's formats. Raises UserError naming the row, from 0."""
    described, rows = read_dataset_file(path)
    columns = described.entry["columns"]
    if "messages" in columns:
        return [_chat_query(row[columns["messages"]], described.entry["tags"]) for row in rows]
    return [
        Query("", [("\n".join(filter(None, (row["instruction"], row.get("input") or ""))), row["output"])])
        for row in rows
    ]


def _chat_query(messages: list[dict[str, Any]], tags: dict[str, str]) -> Query:
    role, text = tags["role_tag"], tags["content_tag"]
    has_system = messages[0][role] == tags["system_tag"]
    turns = messages[1:] if has_system else messages
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return Query(messages[0][text] if has_system else "", [(asked[text], answered[text]) for asked, answered in pairs])


@dataclass(frozen=True, kw_only=True)
class Template:
    """How LLaMA-Factory wraps a conversation (template.py); {} stands for the text.

    system_in_prompt: it is one string with the first prompt, tokens may span both. bos_per_turn: before every prompt,
    else before the first alone; None: never. eos: whether a token of its own ends each answer.
    turn_tokens, system_tokens: what the texts around a turn and a system message add, BOS and EOS left out.
    """

    prompt: str
    answer: str
    system: str
    system_in_prompt: bool
    bos_per_turn: bool | None
    eos: bool
    turn_tokens: int
    system_tokens: int

    def pieces(self, query: Query) -> list[str]:
        """The strings that are tokenized, each by itself."""
        texts = [pair for turn in query.turns for pair in zip((self.prompt, self.answer), turn, strict=True)]
        pieces = [around.replace("{}", text, 1) for around, text in texts]
        if query.system:
            system = self.system.replace("{}", query.system, 1)
            if self.system_in_prompt:
                prompt, first = texts[0]
                pieces[0] = prompt.replace("{}", system + first, 1)
            else:
                pieces.insert(0, system)
        return [piece for piece in pieces if piece]

    def special_tokens(self, query: Query, *, has_bos: bool) -> int:
        """BOS and EOS of a conversation. has_bos: whether the tokenizer names a BOS."""
        num_turns = len(query.turns)
        num_bos = 0 if self.bos_per_turn is None or not has_bos else num_turns if self.bos_per_turn else 1
        return num_bos + (num_turns if self.eos else 0)

    def added_tokens(self, query: Query) -> int:
        """All that is not the conversation's own text, for a tokenizer that names a BOS."""
        text_tokens = self.turn_tokens * len(query.turns) + (self.system_tokens if query.system else 0)
        return text_tokens + self.special_tokens(query, has_bos=True)


# Of this project's recipes. Tokens of the texts: Mixtral-8x7B's tokenizer for mistral (the space before an answer is
# one of them), GPT-NeoX-20B's for llama2, and for qwen3_nothink a token for each marker, role and line end.
TEMPLATES = {
    "mistral": Template(
        prompt="[INST] {}[/INST]", answer=" {}", system="{}\n\n", system_in_prompt=True, bos_per_turn=False, eos=True,
        turn_tokens=8, system_tokens=2,
    ),
    "llama2": Template(
        prompt="[INST] {} [/INST]", answer="{}", system="<<SYS>>\n{}\n<</SYS>>\n\n", system_in_prompt=True,
        bos_per_turn=True, eos=True, turn_tokens=7, system_tokens=10,
    ),
    "qwen3_nothink": Template(
        prompt="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", answer="{}<|im_end|>\n",
        system="<|im_start|>system\n{}<|im_end|>\n", system_in_prompt=False, bos_per_turn=None, eos=False,
        turn_tokens=10, system_tokens=5,
    ),
}  # fmt: skip


def count_words(text: str) -> int:
    """Runs of letters, single digits, single marks, single Han characters and kana: what tokenizers rarely join."""
    return len(_WORD.findall(text))


def words_of(query: Query) -> int:
    """Of all its texts."""
    return count_words(_text(query))


def refuse_other_scripts(path: Path, queries: Sequence[Query]) -> None:
    """Raises UserError where many letters are of a script that TOKENS_PER_WORD was not counted on.

    Of a large file, by queries spread evenly over it.
    """
    num_letters = num_calibrated = 0
    for query in queries[:: -(-len(queries) // _MAX_QUERIES_LOOKED_AT)]:
        text = _text(query)
        num_letters += len(_LETTER.findall(text))
        num_calibrated += len(_CALIBRATED_LETTER.findall(text))
    if num_letters - num_calibrated > _MAX_OTHER_LETTERS_FRAC * num_letters:
        raise UserError(
            f"{path}: {1 - num_calibrated / num_letters:.0%} of its letters are neither Latin nor Chinese",
            cause="how many tokens a word of other scripts has differs several times between tokenizers",
            cure="name the model's tokenizer.json, or say how many tokens a word has",
        )


def _text(query: Query) -> str:
    """All texts of a query, apart: no word spans two."""
    return "\n".join((query.system, *(text for turn in query.turns for text in turn)))


def tokens_by_tokenizer(queries: Sequence[Query], template: Template, path: Path) -> list[int]:
    """Tokens of each query. Whether they begin with a BOS says the tokenizer_config.json beside the file; without one
    they do."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"{path} cannot be used: the package tokenizers is not installed",
            cure="pip install tokenizers, or leave the file out: tokens are then estimated from words",
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
        config_path = path.with_name("tokenizer_config.json")
        described = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {"bos_token": ""}
        named_by_class = described.get("tokenizer_class", "PreTrainedTokenizerFast") != "PreTrainedTokenizerFast"
        has_bos = described["bos_token"] is not None if "bos_token" in described else named_by_class
    except Exception as error:  # the package raises plain Exception for a file that it cannot read
        raise UserError(
            f"{path} is not a tokenizer: {error}", cure="name the tokenizer.json in the model's folder"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pieces = [template.pieces(query) for query in queries]
    encoded = tokenizer.encode_batch([piece for of_query in pieces for piece in of_query], add_special_tokens=False)
    lengths = (len(piece) for piece in encoded)
    return [
        sum(islice(lengths, len(of_query))) + template.special_tokens(query, has_bos=has_bos)
        for query, of_query in zip(queries, pieces, strict=True)
    ]
