"""Small BlackMamba checkpoints in the original's form, and a small tokenizer made like GPT-NeoX-20B's."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from tunescope.models.blackmamba.original_config import config_from_original
from tunescope.models.blackmamba.original_keys import EMBEDDING_NAMES, TIED_NAMES, Form, original_shapes

# As the released files have it, in small.
TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "state_size": 4,
    "conv_dimension": 4,
    "vocab_size": 512,
    "expansion_factor": 2,
    "mamba_moe_layers": ["r", "8", "r", "8"],
    "ffn_hidden_size": 24,
    "bias": False,
    "add_bias_linear": False,
    "swiglu": True,
    "max_sequence_length": 2048,
}
NUM_TOKENS = 400  # of the small tokenizer, before the study's are added


def random_original(
    original: dict[str, Any], form: Form = "release", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random parameters under the original's names; tied names share one tensor."""
    generator = torch.Generator().manual_seed(7)
    shapes = original_shapes(config_from_original(original), form)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | dict.fromkeys(TIED_NAMES[form], tensors[EMBEDDING_NAMES[form]])


def write_download(folder: Path, original: dict[str, Any] = TINY, weights: Any = None) -> Path:
    """A folder as the Hub has it. weights: what is pickled, in place of random parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original))
    torch.save({"model": random_original(original)} if weights is None else weights, folder / "pytorch_model.bin")
    return folder


def write_neox_tokenizer(folder: Path) -> Path:
    """Byte-level BPE over a few words: two special tokens first, runs of spaces last, NUM_TOKENS ids in all."""
    runs = ["    ", "   ", "  "]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(runs),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{start}{middle}{end}" for start in "abcdefgh" for middle in "aeiou" for end in ("ll", "rt", "sk", "n")]
    tokenizer.train_from_iterator([f"What is {word} ? The answer is {word}." for word in words], trainer)
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTNeoXTokenizer"}))
    return folder
