"""One training run through LLaMA-Factory's public entry, in this process.

Everything that decides what is trained is in a Workload, as data; callbacks come from the caller and only watch.
"""

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, TrainerCallback

from tunescope import dataset_files as files
from tunescope.data import synthetic
from tunescope.errors import UserError
from tunescope.families import FAMILIES, find_family
from tunescope.families.family import GROUPED
from tunescope.models import folder, tokenizer
from tunescope.train.workload import Workload

DATASET_KEY = "tunescope"
MODEL_FOLDER = "model"  # under a run's scratch folder


class _StopBeforeSaving(Exception):
    """Raised at the end of training: the engine would next write the adapters (0.9 GB) that no figure reads."""


class _SkipSaving(TrainerCallback):
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _StopBeforeSaving


def run_workload(workload: Workload, scratch_dir: Path, callbacks: Iterable[TrainerCallback]) -> dict[str, Any]:
    """Trains until the data or the callbacks end it; writes nothing but scratch files below `scratch_dir`.

    Returns what was decided here and belongs in provenance: the kind of tokenizer, what became of CUDA graphs. Raises
    UserError for a recipe that the engine refuses; torch's own errors (out of memory) pass through.
    """
    from llamafactory.train.tuner import run_exp

    arguments, facts = prepare(workload, scratch_dir)
    switch = _grouped_experts(workload)
    with engine_errors(), contextlib.suppress(_StopBeforeSaving):
        run_exp(dict(arguments), callbacks=[*([switch] if switch else []), *callbacks, _SkipSaving()])
    if switch and switch.accelerated and (graphs := switch.accelerated.graphs):
        facts["cuda_graphs"] = {
            "num_shapes": graphs.num_shapes, "num_replays": graphs.num_replays, "why_not": graphs.why_not
        }  # fmt: skip
    return facts


def _grouped_experts(workload: Workload) -> Any:
    """What changes the loaded model before anything watches it; None for nothing."""
    if workload.moe != GROUPED:
        return None
    from tunescope.models.fast_moe import AccelerateMoe

    layers = workload.checkpointed_layers
    return AccelerateMoe(recompute="all" if layers is None else tuple(layers), graphs=workload.graphs)


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turns the engine's complaint about a setting it does not know into a UserError."""
    try:
        yield
    except ValueError as error:
        if "HfArgumentParser" not in str(error):
            raise
        raise UserError(
            f"the recipe has a setting that LLaMA-Factory does not know: {error}",
            cure="check the spelling of the keys in the recipe",
        ) from None


def register(*names: str) -> None:
    """Makes models known to transformers' Auto classes, and folders without weights loadable; all of them if none is
    named."""
    for name in names or FAMILIES:
        importlib.import_module(find_family(name).registration).register()


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def cpu_arguments() -> dict[str, Any]:
    """What a recipe made for a GPU needs on a CPU.

    fp32, because bf16 there compiles a kernel for every new number of tokens that an expert gets: 4 times slower at
    the size of preset tiny.
    """
    return {"use_cpu": True, "bf16": False, "pure_bf16": False}


def available_attention(wanted: str, *, use_cpu: bool) -> str:
    """FlashAttention where it was asked for and can be imported, else sdpa in its place."""
    if wanted == "fa2" and (use_cpu or importlib.util.find_spec("flash_attn") is None):
        return "sdpa"
    return wanted


def prepare(workload: Workload, scratch_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and data folders under `scratch_dir`, and the arguments for the engine, with facts for provenance."""
    register(workload.point.model)
    recipe = workload.recipe
    cutoff_len_tokens = int(recipe.get("cutoff_len", 2048))
    model_dir, data_dir = scratch_dir / MODEL_FOLDER, scratch_dir / "data"
    source = Path(workload.model_dir) if workload.model_dir else None
    tokenizer_kind = folder.build_model_folder(model_dir, workload.model_config, source, cutoff_len_tokens)
    _write_data(workload, model_dir, data_dir, tokenizer_kind)

    attention = available_attention(str(recipe.get("flash_attn", "auto")), use_cpu=workload.use_cpu)
    arguments = dict(recipe) | {
        "model_name_or_path": str(model_dir),
        "dataset": DATASET_KEY,
        "dataset_dir": str(data_dir),
        "max_samples": workload.num_samples,
        "per_device_train_batch_size": workload.point.per_device_batch_size,
        "output_dir": str(scratch_dir / "output"),
        "cache_dir": str(scratch_dir / "cache"),  # tokenised queries; in the user's cache they would pile up
        "flash_attn": attention,
    }
    if workload.max_steps is not None:
        arguments["max_steps"] = workload.max_steps
    if workload.use_cpu:
        arguments |= cpu_arguments()
    return arguments, {"tokenizer": tokenizer_kind}


def _write_data(workload: Workload, model_dir: Path, data_dir: Path, tokenizer_kind: str) -> None:
    data_dir.mkdir()
    if workload.data_entry is not None:
        entry = workload.data_entry
    else:
        queries = synthetic_queries(workload, model_dir, tokenizer_kind)
        (data_dir / "queries.json").write_text(json.dumps(queries))
        entry = {"file_name": "queries.json"}
    (data_dir / files.DATASET_INFO).write_text(json.dumps({DATASET_KEY: entry}))


def synthetic_queries(workload: Workload, model_dir: Path, tokenizer_kind: str) -> list[dict[str, str]]:
    """Queries of the point's lengths for the tokenizer in `model_dir`."""
    point = workload.point
    loaded = AutoTokenizer.from_pretrained(model_dir)
    if tokenizer_kind == tokenizer.KIND:
        words = [tokenizer.word(i) for i in range(tokenizer.num_words(workload.model_config["vocab_size"]))]
    else:
        words = _single_token_words(loaded)
    if point.seq_len_tokens is not None:
        lengths = np.full(workload.num_samples, point.seq_len_tokens)
    else:
        lengths = synthetic.sample_lengths(point.dataset, workload.num_samples)
    overhead_tokens = count_template_tokens(loaded, str(workload.recipe["template"]), words[0])
    shortest_tokens = overhead_tokens + synthetic.MIN_WORDS
    if point.seq_len_tokens is not None and point.seq_len_tokens < shortest_tokens:
        raise UserError(
            f"a length of {point.seq_len_tokens} tokens is less than the chat template and a query take",
            cure=f"use a length of at least {shortest_tokens}",
        )
    return synthetic.queries(lengths, overhead_tokens, words)


def count_template_tokens(loaded: Any, template: str, one_word: str) -> int:
    """Tokens that the chat template adds to a query of one-token words (BOS, markers, EOS)."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    messages = [{"role": "user", "content": one_word}, {"role": "assistant", "content": one_word}]
    rendered = get_template_and_fix_tokenizer(loaded, DataArguments(template=template))
    prompt, answer = rendered.encode_oneturn(loaded, messages)
    return len(prompt) + len(answer) - 2


def _single_token_words(loaded: Any, wanted: int = 2000) -> list[str]:
    """Plain words of a real vocabulary that stay one token each between other words."""
    words = []
    for entry in sorted(loaded.get_vocab()):
        candidate = entry.removeprefix("▁").removeprefix("Ġ")
        if candidate != entry and candidate.isascii() and candidate.isalpha() and candidate.islower():
            three = loaded(f"{candidate} {candidate} {candidate}", add_special_tokens=False)["input_ids"]
            if len(three) == 3:
                words.append(candidate)
        if len(words) == wanted:
            break
    if not words:
        raise UserError(
            "the checkpoint's tokenizer has no plain words to make synthetic queries of",
            cure="give a data file with --dataset FILE",
        )
    return words
