"""Models of one's own, and asks that cannot be answered: what is said, and that what would help does help."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_estimate import FakeTimes, ask, only

from tunescope.cost import memory
from tunescope.cost.estimate_memory import gpu_memory_bytes, needed_bytes
from tunescope.cost.estimate_table import answer
from tunescope.cost.time_model import default_model
from tunescope.cost.time_points import QLORA, RECIPES
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.hardware import find_device

A40 = find_device("A40")
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture
def small_model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def test_a_model_of_ones_own(small_model: str) -> None:
    found = only(answer(small_model, "cs", gpus=["4090"], step_times=FakeTimes()))
    assert found.hours is not None
    assert found.run.recipe == QLORA
    assert any("No recipe was given" in note for note in found.run.notes)
    assert (
        only(answer(f"{small_model}/config.json", "cs", gpus=["4090"], step_times=FakeTimes())).batch_size
        == found.batch_size
    )


# --- impossible asks ---


def test_what_does_not_fit_says_what_would() -> None:
    small = find_device("4090")
    found = only(ask(gpus=["4090"]))
    assert (found.max_batch_size, found.hours, found.batch_size) == (0, None, None)
    assert found.why_not is not None
    assert "a GPU of 32 GB" in found.why_not
    assert needed_bytes(MIXTRAL_8X7B, RECIPES["mixtral"], 1, 1024) > gpu_memory_bytes(small)

    larger = only(ask(gpus=["a40"], batch=500)).why_not
    assert larger is not None
    largest = memory.max_batch_size(MIXTRAL_8X7B, RECIPES["mixtral"], gpu_memory_bytes(A40), 1024)
    assert f"a batch of {largest}" in larger

    full = {"finetuning_type": "full", "pure_bf16": True, "optim": "adamw_torch"}
    nowhere = only(ask(gpus=["b200"], recipe=full)).why_not
    assert nowhere is not None
    assert "NF4 QLoRA in place of this recipe" in nowhere
    assert "a GPU of" not in nowhere


def test_a_shorter_cutoff_that_fits_is_named_and_does_fit(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("length_tokens,count\n100,10\n400000,1\n")
    found = only(ask(data=str(tmp_path / "long.csv"), cutoff_len=400_000)).why_not
    assert found is not None
    length = int(found.rpartition("a cutoff of ")[2].split()[0])
    assert needed_bytes(MIXTRAL_8X7B, RECIPES["mixtral"], 1, length) <= gpu_memory_bytes(A40)
    assert needed_bytes(MIXTRAL_8X7B, RECIPES["mixtral"], 1, length + 8) > gpu_memory_bytes(A40)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"epochs": float("nan")}, "--epochs"),
        ({"queries": 0}, "--queries"),
        ({"batch": 0}, "--batch"),
        ({"batch": "many"}, "--batch"),
        ({"batch": 20_000}, "cannot be made of 13921"),
        ({"queries": 3, "batch": 4}, "cannot be made of 3"),
        ({"sparsity": "thin"}, "--sparsity 'thin' is unknown"),
        ({"sparsity": "dense", "top_k": 2}, "exclude each other"),
        ({"top_k": 9}, "from 1 to 8"),
        ({"cutoff_len": 0}, "cutoff_len"),
        ({"model": "gpt-5"}, "there is no model"),
        ({"data": "nothing"}, "is no data"),
        ({"moe": "magic"}, "magic"),
        ({"recipe": {"optim": "sgd"}}, "optim sgd"),
        ({"prices": ["a40"]}, "is no price"),
        ({"gpus": ["gtx"]}, "gtx"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: dict[str, Any], words: str) -> None:
    times = default_model() if "moe" in asked else FakeTimes()
    with pytest.raises(UserError, match=words):
        ask(**{"step_times": times} | asked)


def test_unknown_architectures_and_empty_data_are_named(tmp_path: Path, small_model: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not modelled"):
        ask(model=str(tmp_path / "other"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match=r"empty\.json"):
        ask(data=str(tmp_path / "empty.json"))
    with pytest.raises(UserError, match="no experts to choose from"):
        ask(model=small_model, sparsity="dense")
    with pytest.raises(UserError, match="point"):
        ask(calibrate=tmp_path / "other", step_times=None)
