"""Real training runs, small, on the CPU: what the engine trains, and that watching it changes nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import pytest
import torch
from transformers import MixtralConfig, TrainerCallback
from transformers import MixtralForCausalLM as StockMixtral

from tunescope import results
from tunescope.config import Point, Protocol
from tunescope.data import synthetic
from tunescope.families.family import NF4_BLOCK_WEIGHTS
from tunescope.families.mixtral import MIXTRAL, MIXTRAL_TINY
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.start import MeetLongestBatch, MemoryBudget, RunFacts
from tunescope.measure.steps import StepRecorder
from tunescope.models import mixtral, tokenizer
from tunescope.train import recipe as recipes
from tunescope.train.engine import run_workload
from tunescope.train.workload import Workload

REPO = Path(__file__).parents[1]
RECIPE = REPO / "LLaMA-Factory" / "mixtral_qlora.yaml"
NUM_EXPERTS = 8


pytestmark = pytest.mark.usefixtures("one_thread")


def workload(top_k: int = 2, batch: int = 2, max_steps: int | None = 4, **recipe_changes: Any) -> Workload:
    point = Point(
        model="mixtral",
        dataset="cs",
        top_k=top_k,
        per_device_batch_size=batch,
        preset="tiny",
        num_layers=2,
        total_layers=2,
    )
    return Workload(
        point=point,
        recipe=recipes.load_recipe(RECIPE) | recipe_changes,
        model_config=MIXTRAL.config_at(MIXTRAL_TINY, 2, top_k),
        model_dir=None,
        data_entry=None,
        num_samples=16,
        max_steps=max_steps,
        use_cpu=True,
    )


class Watcher(TrainerCallback):
    """Keeps what a test asks about: the losses, and the frozen weights before and after."""

    def __init__(self) -> None:
        self.model: Any = None
        self.log_history: list[dict[str, float]] = []
        self.frozen_before: dict[str, torch.Tensor] = {}
        self.trained_before: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.model = model
        for name, parameter in model.named_parameters():
            kept = self.trained_before if parameter.requires_grad else self.frozen_before
            kept[name] = parameter.detach().clone()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.log_history = list(state.log_history)

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watcher, dict[str, Any]]:
    watcher = Watcher()
    facts = run_workload(workload(logging_steps=1), tmp_path_factory.mktemp("watched"), [watcher])
    return watcher, facts


def test_only_the_adapters_named_in_the_recipe_are_trained(watched: tuple[Watcher, dict[str, Any]]) -> None:
    watcher, _ = watched
    assert watcher.trained_before
    for name in watcher.trained_before:
        assert "lora_" in name
        assert any(f".{target}." in name for target in ("w1", "w2", "w3", "gate"))
    # A and B of 3 matrices of 8 experts and of one router, in 2 layers
    assert len(watcher.trained_before) == 2 * 2 * (3 * NUM_EXPERTS + 1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Packed NF4 read as floats has NaNs, which equal nothing."""
    return tensor.detach().contiguous().view(torch.uint8)


def test_frozen_weights_keep_every_byte_and_adapters_move(watched: tuple[Watcher, dict[str, Any]]) -> None:
    watcher, _ = watched
    after = dict(watcher.model.named_parameters())
    for name, before in watcher.frozen_before.items():
        assert torch.equal(as_bytes(before), as_bytes(after[name])), name
    moved = [name for name, before in watcher.trained_before.items() if not torch.equal(before, after[name])]
    assert any("lora_B" in name for name in moved)


def test_linears_are_nf4_with_double_quantisation(watched: tuple[Watcher, dict[str, Any]]) -> None:
    watcher, _ = watched
    quantised = [m for m in watcher.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert len(quantised) >= 2 * (4 + 1 + 3 * NUM_EXPERTS)
    for module in quantised:
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", NF4_BLOCK_WEIGHTS, True)
    assert watcher.model.get_base_model().__class__.__name__ == "MixtralForCausalLM"  # decides how labels are shifted


def test_recording_changes_nothing_that_is_learned(watched: tuple[Watcher, dict[str, Any]], tmp_path: Path) -> None:
    bare, _ = watched
    ours = Watcher()
    longest = MeetLongestBatch()
    recorder = StepRecorder(Protocol(num_queries=8), lambda done, expected: None, EnergyMeter(use_gpu=False))
    run_workload(workload(logging_steps=1), tmp_path, [MemoryBudget(None), RunFacts(), longest, ours, recorder])
    assert longest.why_not is None
    assert len(bare.losses) == 4
    assert ours.losses == bare.losses


def test_the_longest_batch_is_met_before_the_first_step(tmp_path: Path) -> None:
    class Shapes(TrainerCallback):
        seen: ClassVar[list[tuple[int, int]]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.register_forward_pre_hook(self.see, with_kwargs=True)

        def see(self, module: Any, args: Any, kwargs: Any) -> None:
            self.seen.append(tuple(kwargs["input_ids"].shape))

    run_workload(replace(workload(batch=3), max_steps=None), tmp_path, [Shapes(), MeetLongestBatch()])
    first, *steps = Shapes.seen
    assert len(steps) == 6
    assert first == (3, max(slots for _, slots in steps))


def test_batches_are_met_by_length_down_to_the_shortest() -> None:
    """Each has as many queries as a step, and at most half the length of the one before."""
    seen: list[list[int]] = []

    class Model(torch.nn.Linear):
        def forward(self, lengths: torch.Tensor) -> Any:
            seen.append(lengths.tolist())
            return SimpleNamespace(loss=self.weight.sum())

    queries = [[0] * length for length in (50, 7, 90, 100, 3, 51, 20, 49)]
    loader = SimpleNamespace(
        dataset=datasets.Dataset.from_dict({"input_ids": queries}),
        collate_fn=lambda rows: {"lengths": torch.tensor([len(row["input_ids"]) for row in rows])},
    )
    model = Model(1, 1)
    for by_length, wanted in ((False, [100]), (True, [100, 50, 20, 7, 3])):
        seen.clear()
        callback = MeetLongestBatch(by_length=by_length)
        arguments = SimpleNamespace(per_device_train_batch_size=2, device=torch.device("cpu"))
        callback.on_train_begin(arguments, None, None, model=model, train_dataloader=loader)
        assert callback.why_not is None
        assert [max(lengths) for lengths in seen] == wanted
        assert {len(lengths) for lengths in seen} == {2}
        assert model.weight.grad is None


def test_a_longest_batch_that_does_not_fit_is_out_of_memory() -> None:
    class Full(torch.nn.Linear):
        def forward(self, **_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loader = SimpleNamespace(dataset=datasets.Dataset.from_dict({"input_ids": [[1]]}), collate_fn=lambda rows: {})
    arguments = SimpleNamespace(per_device_train_batch_size=1, device=torch.device("cpu"))
    callback = MeetLongestBatch()
    with pytest.raises(torch.OutOfMemoryError):
        callback.on_train_begin(arguments, None, None, model=Full(1, 1), train_dataloader=loader)
    callback.on_train_begin(arguments, None, None, model=torch.nn.Linear(1, 1), train_dataloader=loader)
    assert callback.why_not is not None  # any other trouble leaves the run to go on without it


def test_a_run_names_its_tokenizer(watched: tuple[Watcher, dict[str, Any]]) -> None:
    _, facts = watched
    assert facts == {"tokenizer": tokenizer.KIND}


@pytest.mark.parametrize("top_k", [2, NUM_EXPERTS])
def test_every_token_reaches_top_k_experts(top_k: int, tmp_path: Path) -> None:
    class CountExperts(TrainerCallback):
        tokens_to_experts = 0
        forwards = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for name, module in model.named_modules():
                if name.endswith("block_sparse_moe"):
                    for expert in module.experts:
                        expert.register_forward_pre_hook(self.count)

        def count(self, module: Any, args: Any) -> None:
            if torch._C._current_graph_task_id() == -1:  # a forward, not the recompute inside backward
                self.tokens_to_experts += args[0].shape[0]

    counter = CountExperts()
    recorder = StepRecorder(Protocol(num_queries=4), lambda done, expected: None, EnergyMeter(use_gpu=False))
    run_workload(workload(top_k=top_k, max_steps=2), tmp_path, [recorder, counter])
    slots = sum(row["padded_tokens"] for row in recorder.rows())
    assert counter.tokens_to_experts == slots * top_k * 2  # two layers


def test_steps_account_for_every_query_and_token_of_an_epoch(tmp_path: Path) -> None:
    recorder = StepRecorder(Protocol(num_queries=16), lambda done, expected: None, EnergyMeter(use_gpu=False))
    run_workload(replace(workload(batch=3), max_steps=None), tmp_path, [recorder])
    rows = recorder.rows()
    assert [row["num_queries"] for row in rows] == [3, 3, 3, 3, 3, 1]
    assert sum(row["tokens"] for row in rows) == synthetic.sample_lengths("cs", 16).sum()
    assert all(row["padded_tokens"] == row["num_queries"] * row["seq_len_tokens"] for row in rows)
    assert all(row["seq_len_tokens"] % 8 == 0 for row in rows)
    assert sum(row["duration_ns"] for row in rows) <= recorder.train_runtime_ns


def test_random_weights_come_only_where_a_folder_holds_none(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    mixtral.register()
    loaded = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    stored = StockMixtral.from_pretrained(tiny_checkpoint)
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name]), name
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    first = AutoModelForCausalLM.from_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = [name for name, parameter in first.named_parameters() if "norm" not in name]
    for name in names:
        assert torch.equal(first.get_parameter(name), second.get_parameter(name))  # the seed is fixed
        assert first.get_parameter(name).detach().float().std().item() == pytest.approx(0.02, rel=0.2)
    assert all(not tensor.is_meta for tensor in (*first.parameters(), *first.buffers()))


# --- the commands, on a stock checkpoint ---


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Mixtral with weights and a tokenizer, as a user's own folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    StockMixtral(MixtralConfig(**MIXTRAL_TINY)).save_pretrained(folder)
    tokenizer.write_tokenizer(folder, 1024, 1024)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    queries = [{"instruction": f"w{i} w1 w2 w3", "input": "", "output": "w4 w5"} for i in range(8)]
    (folder / "commonsense_15k.json").write_text(json.dumps(queries))
    (folder / "dataset_info.json").write_text((REPO / "LLaMA-Factory" / "data" / "dataset_info.json").read_text())
    return folder


def run(*command: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(REPO / "src"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # as preset tiny runs: two threads on two busy cores wait for each other
    }
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    "program", [(sys.executable, "-m", "tunescope"), ("llamafactory-cli",)], ids=["tunescope", "engine"]
)
def test_the_recipe_trains_a_stock_model_by_either_program(
    program: tuple[str, ...], tiny_checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    if program[0] == "llamafactory-cli":
        program = (str(Path(sys.executable).parent / "llamafactory-cli"),)
    done = run(
        *(*program, "train", str(RECIPE), f"model_name_or_path={tiny_checkpoint}", f"dataset_dir={data_dir}"),
        *(f"output_dir={tmp_path}", f"cache_dir={tmp_path}/cache", "use_cpu=true", "bf16=false", "max_steps=2"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert set(adapter["target_modules"]) == {"w1", "w2", "w3", "gate"}
    assert adapter["base_model_name_or_path"] == str(tiny_checkpoint)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_recipe_trains_an_architecture_that_has_neither_weights_nor_tokenizer(
    tiny_checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    done = run(
        *(sys.executable, "-m", "tunescope", "train", str(RECIPE), f"model_name_or_path={model_dir}"),
        *(f"dataset_dir={data_dir}", f"output_dir={tmp_path / 'output'}", f"cache_dir={tmp_path}/cache", "max_steps=2"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training on the CPU in fp32" in done.stderr
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()
    assert [path.name for path in model_dir.iterdir()] == ["config.json"]  # the user's folder is left as it was


def test_ones_own_checkpoint_and_data_are_measured_and_named(
    tiny_checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    data = f"mine={data_dir / 'commonsense_15k.json'}"
    done = run(
        *(sys.executable, "-m", "tunescope", "run", "throughput", "--preset", "full"),
        *("--model-path", str(tiny_checkpoint), "--dataset", data, "--points", "mine:sparse:bs=2"),
        *("--queries", "8", "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = results.read_point(tmp_path / "mine-k2-b2-full-cpu")
    assert found.status == "ok"
    assert found.point["weights"]["kind"] == "checkpoint"
    assert found.point["data"]["kind"] == "file"
    assert found.outcome["tokenizer"] == "checkpoint"
    assert (found.outcome["attention"], found.outcome["compute_dtype"]) == ("sdpa", "float32")
    assert found.steps is not None
    assert sum(found.steps["num_queries"].to_pylist()) == 8
    text = run(sys.executable, "throughput.py", str(tmp_path)).stdout
    assert "weights: checkpoint; data: file" in text
