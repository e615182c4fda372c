"""BlackMamba through LLaMA-Factory: the losses it computes there, and that training learns something."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_blackmamba import golden_io, golden_model
from launching import tunescope
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from tunescope.families.blackmamba import BLACKMAMBA_TINY
from tunescope.models import blackmamba
from tunescope.models.blackmamba.loss import IGNORED
from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM
from tunescope.train import recipe as recipes
from tunescope.train.engine import cpu_arguments

RECIPE = recipes.recipe_folder() / "blackmamba_full.yaml"


class Losses(TrainerCallback):
    """What the Trainer logs."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.found += [logs["loss"]] if logs and "loss" in logs else []


def write_word_tokenizer(folder: Path, num_words: int) -> None:
    """The word `tN` is token N, and nothing is ever added."""
    words = {f"t{number}": number for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"t{num_words - 1}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=last, pad_token=last).save_pretrained(folder)


def write_data(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    entry = {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output"}}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))


def as_words(ids: torch.Tensor) -> str:
    return " ".join(f"t{number}" for number in ids.tolist())


@pytest.mark.parametrize(("loss", "wanted"), [("study", "loss_finetune"), ("cross_entropy", "loss_ce")])
def test_both_golden_losses_come_out_of_the_engine(loss: str, wanted: str, tmp_path: Path) -> None:
    """Text, template, labels, padding, autocast off, the Trainer's own scaling: none of it may shift or scale them."""
    from llamafactory.train.tuner import run_exp

    blackmamba.register()
    io = golden_io("a_top2")
    golden_model("a_top2", loss=loss).save_pretrained(tmp_path / "model")
    write_word_tokenizer(tmp_path / "model", 256)
    rows = []
    for ids, labels, mask in zip(io["input_ids"], io["labels"], io["attention_mask"], strict=True):
        is_answer = (labels != IGNORED) & (mask == 1)
        is_prompt = (labels == IGNORED) & (mask == 1)
        rows.append({"instruction": as_words(ids[is_prompt]), "output": as_words(ids[is_answer])})
    write_data(tmp_path / "data", rows)
    losses = Losses()
    changes = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": "rows",
        "dataset_dir": str(tmp_path / "data"),
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "output"),
        "template": "empty",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
    }
    run_exp(recipes.load_recipe(RECIPE) | changes | cpu_arguments(), callbacks=[losses])
    assert losses.found == [pytest.approx(io[wanted].item(), abs=5e-5)]  # the Trainer logs four decimals
    assert abs(io["loss_finetune"] - io["loss_ce"]) > 0.01


def test_training_learns_and_what_it_saves_loads(tmp_path: Path) -> None:
    """`tunescope train` on a task that can be learned: each answer is a word that the question decides."""
    words = 24
    rows = [
        {"instruction": f"w{number}", "output": " ".join(f"w{(number * step + 7) % words}" for step in (1, 3, 5))}
        for number in range(words)
    ]
    write_data(tmp_path / "data", rows)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(BLACKMAMBA_TINY | {"vocab_size": 64}))
    changes = {
        "model_name_or_path": tmp_path / "model",
        "dataset_dir": tmp_path / "data",
        "dataset": "rows",
        "output_dir": tmp_path / "output",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 30,
        "learning_rate": 0.01,
        "logging_steps": 3,
    }
    done = tunescope("train", RECIPE, *(f"{key}={value}" for key, value in changes.items()), OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    history = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(4.2, abs=0.3)  # ln 64: it knows nothing
    assert sum(losses[-3:]) / 3 < 0.3 * losses[0]
    blackmamba.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert type(model) is BlackMambaForCausalLM
    assert all(parameter.isfinite().all() for parameter in model.parameters())
