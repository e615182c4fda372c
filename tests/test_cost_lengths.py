"""Token lengths of a training set: the paper's, a histogram's, a data file's; counted as LLaMA-Factory counts them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.cost import lengths as cost_lengths
from tunescope.cost.lengths import TOKENS_PER_WORD, Assumed, Lengths
from tunescope.cost.queries import TEMPLATES, Query, count_words, read_queries
from tunescope.errors import UserError

ALPACA = {"instruction": "Add 12 and 3.", "input": "Say it in words!", "output": "fifteen"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy, with its 2,872,800 people?"},
        {"role": "assistant", "content": "Rome {}, it is."},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi  there"}, {"from": "gpt", "value": ""}]}
per_query_lengths = st.lists(st.integers(1, 2000), min_size=1, max_size=60)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("dataset", "num_queries", "total_tokens", "longest_tokens", "num_cut", "tokens_cut"),
    [("cs", 15119, 1510200, 512, 0, 1510200), ("math", 13921, 2606877, 1470, 3, 2606412)],
)
def test_lengths_of_the_paper(
    dataset: str, num_queries: int, total_tokens: int, longest_tokens: int, num_cut: int, tokens_cut: int
) -> None:
    lengths = cost_lengths.read_lengths(dataset)
    assert (lengths.num_queries, lengths.total_tokens, lengths.longest_tokens) == (
        num_queries,
        total_tokens,
        longest_tokens,
    )
    assert lengths.mean_tokens == pytest.approx(total_tokens / num_queries)
    assert lengths.num_longer_than(1024) == num_cut
    cut = lengths.cut(1024)
    assert (cut.num_queries, cut.total_tokens, cut.longest_tokens) == (
        num_queries,
        tokens_cut,
        min(longest_tokens, 1024),
    )
    assert "Figure 2" in lengths.source
    assert lengths.bounds is None


@settings(deadline=None)
@given(per_query_lengths, st.integers(1, 2500))
def test_queries_and_tokens_are_conserved(per_query: list[int], cutoff: int) -> None:
    lengths = Lengths.of_queries(per_query, "made")
    assert lengths.per_query().tolist() == sorted(per_query)
    assert lengths.total_tokens == sum(per_query)
    cut = lengths.cut(cutoff)
    assert cut.per_query().tolist() == sorted(min(length, cutoff) for length in per_query)
    assert cut.num_queries == len(per_query)
    assert lengths.num_longer_than(cutoff) == sum(length > cutoff for length in per_query)
    assert cut.cut(cutoff).per_query().tolist() == cut.per_query().tolist()


@pytest.mark.parametrize(
    ("lengths_tokens", "counts"),
    [
        ([], []), ([1, 2], [1]), ([0, 2], [1, 1]), ([2, 1], [1, 1]), ([1, 1], [1, 1]), ([1], [0]), ([1.5], [1]),
        ([[1]], [[1]]),
    ],
)  # fmt: skip
def test_what_is_no_histogram_is_refused(lengths_tokens: list[Any], counts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"lengths|counts"):
        Lengths(np.array(lengths_tokens), np.array(counts), "made")


def test_a_value_cannot_be_changed() -> None:
    made = np.array([3, 4])
    lengths = Lengths(made, np.array([1, 1]), "made")
    made[0] = 9
    assert lengths.total_tokens == 7
    with pytest.raises(ValueError, match="read-only"):
        lengths.counts[0] = 5


def test_a_histogram_file_is_read_and_other_columns_are_not(tmp_path: Path) -> None:
    path = tmp_path / "histogram.csv"
    path.write_text("\ufeffcount,note,length_tokens\n2,x,30\n\n 5 ,y,7\n0,z,900\n", encoding="utf-8")
    lengths = cost_lengths.read_lengths(str(path))
    assert (lengths.lengths_tokens.tolist(), lengths.counts.tolist()) == ([7, 30], [5, 2])
    assert "histogram.csv" in lengths.source


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("length,count\n1,2\n", "line 1: no column length_tokens"),
        ("", "line 1: no column length_tokens and no column count"),
        ("length_tokens,count\n", "counts no query"),
        ("length_tokens,count\n5,0\n", "counts no query"),
        ("length_tokens,count\n5,1\n6,-1\n", "line 3: count is '-1'"),
        ("length_tokens,count\n5,1.5\n", "line 2: count is '1.5'"),
        ("length_tokens,count\n5,\n", "line 2: count is ''"),
        ("length_tokens,count\n5\n", "line 2: count is None"),
        ("length_tokens,count\n5 tokens,1\n", "line 2: length_tokens is '5 tokens'"),
        ("length_tokens,count\n0,1\n", "line 2: a query of 0 tokens"),
        ("length_tokens,count\n5,1\n6,1\n5,2\n", "length 5 stands on lines 2 and 4"),
        ("length_tokens,count\n5,1e3\n", "line 2: count is '1e3'"),
        ("length_tokens,count\n5,٣\n", "line 2: count is"),
    ],
)
def test_a_fault_in_a_histogram_is_named_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "histogram.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        cost_lengths.read_histogram(path)
    assert what in caught.value.what
    assert caught.value.cure


def test_data_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"length_tokens,count\n\xff\xfe\n")
    for data in (
        "gsm8k",
        "notes.txt",
        str(tmp_path / "no.csv"),
        str(tmp_path / "no.json"),
        str(tmp_path / "bytes.csv"),
    ):
        with pytest.raises(UserError) as caught:
            cost_lengths.read_lengths(data)
        assert caught.value.cure
    with pytest.raises(UserError, match="the paper has no lengths of data set 'he'"):
        cost_lengths.paper_lengths("he")
    with pytest.raises(UserError, match="leaves nothing"):
        cost_lengths.paper_lengths("cs").cut(0)


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("", 0),
        ("  \n\t", 0),
        ("Don't stop", 4),
        ("In 2024, 3.5%", 1 + 4 + 1 + 2 + 1 + 1),
        ("über naïve", 2),
        ("snake_case", 3),
        ("细胞 is 日", 4),
        ("かな", 2),
    ],
)
def test_words_are_what_tokenizers_rarely_join(text: str, num_words: int) -> None:
    assert count_words(text) == num_words


def test_without_a_tokenizer_tokens_are_estimated_from_words(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.json", [ALPACA, ALPACA | {"input": ""}, ALPACA | {"input": None}])
    queries = read_queries(path)
    assert [query.turns for query in queries] == [
        [("Add 12 and 3.\nSay it in words!", "fifteen")],
        [("Add 12 and 3.", "fifteen")],
        [("Add 12 and 3.", "fifteen")],
    ]
    # 12 or 7 words; BOS, EOS and the template's 8 tokens.
    lengths = cost_lengths.read_lengths(str(path), tokens_per_word=Assumed(2.0, 1.0, 3.0))
    assert lengths.per_query().tolist() == [2 * 7 + 10, 2 * 7 + 10, 2 * 12 + 10]
    assert lengths.bounds is not None
    assert [bound.per_query().tolist() for bound in lengths.bounds] == [[17, 17, 22], [31, 31, 46]]
    assert "mine.json: 2 tokens a word" in lengths.source
    cut = lengths.cut(20)
    assert cut.bounds is not None
    assert [bound.longest_tokens for bound in cut.bounds] == [20, 20]


def test_a_chat_has_its_system_message_and_all_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(CHAT) + "\n\n" + json.dumps(CHAT) + "\n", encoding="utf-8")
    query = read_queries(path)[1]
    assert (query.system, len(query.turns), query.turns[1][1]) == ("Be brief.", 2, "Rome {}, it is.")
    one_per_word = Assumed(1, 1, 1)
    num_words = sum(count_words(message["content"]) for message in CHAT["messages"])
    added = {"mistral": 1 + 2 * 9 + 2, "llama2": 2 * 9 + 10, "qwen3_nothink": 2 * 10 + 5}
    for template, tokens in added.items():
        lengths = cost_lengths.lengths_of_file(path, template=template, tokens_per_word=one_per_word)
        assert lengths.per_query().tolist() == [num_words + tokens] * 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.sampled_from(sorted(TEMPLATES)))
def test_an_estimate_lies_within_its_bounds(tmp_path_factory: Any, texts: list[str], template: str) -> None:
    rows = [{"instruction": text, "output": text} for text in texts]
    path = write_rows(tmp_path_factory.getbasetemp() / "texts.json", rows)
    lengths = cost_lengths.lengths_of_file(path, template=template, tokens_per_word=TOKENS_PER_WORD)
    assert lengths.bounds is not None
    low, high = lengths.bounds
    assert (low.per_query() <= lengths.per_query()).all()
    assert (lengths.per_query() <= high.per_query()).all()
    assert low.num_queries == high.num_queries == len(texts)


def test_scripts_without_a_calibration_are_refused_unless_the_user_says_how_many_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "ru.json", [{"instruction": "Сколько будет два и два?", "output": "four"}])
    with pytest.raises(UserError, match="neither Latin nor Chinese") as caught:
        cost_lengths.lengths_of_file(path)
    assert "tokenizer.json" in caught.value.cure
    assert cost_lengths.lengths_of_file(path, tokens_per_word=Assumed(3, 2, 5)).num_queries == 1
    greek = write_rows(
        tmp_path / "math.json", [{"instruction": "The angle α of this triangle is given " * 3, "output": "π"}]
    )
    assert cost_lengths.lengths_of_file(greek).num_queries == 1
    chinese = write_rows(tmp_path / "zh.json", [{"instruction": "识别并解释", "output": "细胞"}])
    assert cost_lengths.lengths_of_file(chinese).total_tokens == round(7 * TOKENS_PER_WORD.value) + 10


@pytest.mark.parametrize("assumed", [Assumed(1, 2, 3), Assumed(4, 2, 3), Assumed(0, 0, 0), Assumed(1, 1, float("inf"))])
def test_tokens_per_word_must_be_a_range(tmp_path: Path, assumed: Assumed) -> None:
    path = write_rows(tmp_path / "mine.json", [ALPACA])
    with pytest.raises(UserError, match="tokens a word"):
        cost_lengths.lengths_of_file(path, tokens_per_word=assumed)


BAD_ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "not a list of at least one object"),
    "empty list": ("[]", "not a list of at least one object"),
    "numbers": ("[1, 2]", "not a list of at least one object"),
    "no answer": (json.dumps([ALPACA, {"instruction": "x"}]), "row 1 has"),
    "answer is a number": (json.dumps([ALPACA, ALPACA | {"output": 5}]), "row 1 has"),
    "input is a list": (json.dumps([ALPACA | {"input": ["x"]}]), "row 0 has"),
    "two formats": (json.dumps([ALPACA, CHAT]), "row 1 has"),
    "other columns": (json.dumps([{"text": "x"}]), "its first row has"),
    "no messages": (json.dumps([{"messages": []}]), "row 0 has"),
    "messages are text": (json.dumps([{"messages": ["hi", "ho"]}]), "row 0 has"),
    "nobody answers": (json.dumps([{"messages": CHAT["messages"][:2]}]), "row 0 has"),
    "asked twice": (json.dumps([{"messages": [CHAT["messages"][1]] * 2}]), "row 0 has"),
    "only a system message": (json.dumps([{"messages": CHAT["messages"][:1]}]), "row 0 has"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_fault_in_a_data_file_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    text, what = BAD_ROWS[name]
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        cost_lengths.lengths_of_file(path)
    assert what in caught.value.what
    assert caught.value.cure


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="template 'vicuna'") as caught:
        cost_lengths.lengths_of_file(write_rows(tmp_path / "mine.json", [ALPACA]), template="vicuna")
    assert "mistral" in caught.value.cure


def write_bpe(folder: Path, bos: str | None) -> Any:
    """A byte-level BPE that joins across spaces and marks, saved as models save theirs; returns it as transformers
    loads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = [*ALPACA.values(), *(message["content"] for message in CHAT["messages"]), "[INST] a[/INST] <<SYS>>"] * 3
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>", bos_token=bos)
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("cutoff_len", [12, 31, 40, 1024])
def test_with_a_tokenizer_lengths_are_the_engines_own(
    tmp_path: Path, template: str, bos: str | None, cutoff_len: int
) -> None:
    processor = pytest.importorskip("llamafactory.data.processor.supervised")
    engine_templates = pytest.importorskip("llamafactory.data.template").TEMPLATES
    tokenizer = write_bpe(tmp_path, bos)
    data_args = SimpleNamespace(cutoff_len=cutoff_len, mask_history=False, train_on_prompt=False)
    engine = processor.SupervisedDatasetProcessor(engine_templates[template], tokenizer, None, data_args)
    for rows in ([ALPACA, ALPACA | {"input": ""}], [CHAT, {"messages": CHAT["messages"][1:3]}], [SHAREGPT]):
        path = write_rows(tmp_path / "mine.json", rows)
        expected = []
        for query in read_queries(path):
            texts = [text for turn in query.turns for text in turn]
            roles = ["user", "assistant"] * len(query.turns)
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            ids, _ = engine._encode_data_example(messages[:-1], messages[-1:], query.system, "", [], [], [])
            expected.append(len(ids))
        tokenizer_json = tmp_path / "tokenizer.json"
        counted = cost_lengths.read_lengths(str(path), template=template, tokenizer_json=tokenizer_json)
        assert counted.cut(cutoff_len).per_query().tolist() == sorted(expected)
        assert counted.bounds is None


@pytest.mark.parametrize(
    ("described", "num_bos"),
    [
        (None, 1),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, 1),  # the class names one
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, 0),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}, 1),
        ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": None}, 0),
    ],
)
def test_the_tokenizers_description_says_whether_a_query_begins_with_bos(
    tmp_path: Path, described: dict[str, Any] | None, num_bos: int
) -> None:
    write_bpe(tmp_path, None)
    without = cost_lengths.lengths_of_file(
        write_rows(tmp_path / "mine.json", [ALPACA]), tokenizer_json=tmp_path / "tokenizer.json"
    )
    config_path = tmp_path / "tokenizer_config.json"
    config_path.unlink()
    if described is not None:
        config_path.write_text(json.dumps(described))
    counted = cost_lengths.lengths_of_file(tmp_path / "mine.json", tokenizer_json=tmp_path / "tokenizer.json")
    assert counted.total_tokens - without.total_tokens == num_bos


def test_an_empty_text_is_not_tokenized() -> None:
    query = Query("", [("hi", "")])
    assert TEMPLATES["llama2"].pieces(query) == ["[INST] hi [/INST]"]
    assert TEMPLATES["mistral"].pieces(query) == ["[INST] hi[/INST]", " "]


def test_a_cut_keeps_as_much_as_the_engines_however_it_falls_on_prompt_and_answer() -> None:
    infer_seqlen = pytest.importorskip("llamafactory.data.processor.processor_utils").infer_seqlen
    for cutoff in (1, 2, 7, 64):
        for prompt in range(1, 150, 7):
            for answer in range(1, 150, 5):
                lengths = Lengths.of_queries([prompt + answer], "made").cut(cutoff)
                assert sum(infer_seqlen(prompt, answer, cutoff)) == lengths.total_tokens


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "mine.json", [ALPACA])
    for tokenizer_json in (tmp_path / "none.json", path):
        with pytest.raises(UserError, match="is not a tokenizer"):
            cost_lengths.lengths_of_file(path, tokenizer_json=tokenizer_json)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="not installed"):
        cost_lengths.lengths_of_file(path, tokenizer_json=path)
