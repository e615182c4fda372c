"""A tokenizer for a model without a checkpoint: one token a word, so that lengths are exact by construction."""

from pathlib import Path

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
# What the templates `mistral` and `qwen3_nothink` write; each becomes one token.
MARKERS = ("[INST]", "[/INST]", "<|im_start|>", "<|im_end|>")
KIND = "generated-wordlevel"


def word(number: int) -> str:
    return f"w{number}"


def num_words(vocab_size: int) -> int:
    """How many distinct words a vocabulary of this size leaves room for."""
    return vocab_size - 3 - len(MARKERS)


def write_tokenizer(folder: Path, vocab_size: int, max_length_tokens: int) -> None:
    """Writes tokenizer.json and its companions into a model folder. Ids stay below vocab_size."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [UNKNOWN, BOS, EOS, *MARKERS, *(word(i) for i in range(num_words(vocab_size)))]
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in (UNKNOWN, BOS, EOS, *MARKERS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_length_tokens,
    ).save_pretrained(folder)
