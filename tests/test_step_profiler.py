"""Somebody's own Trainer with StepProfiler: it trains as if nobody watched, and what is measured is all there."""

import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import helpers_points
import launching
import pytest
import torch
from helpers_latency import printed, read, tables_in
from helpers_trainer import BATCH, LENGTH_TOKENS, NEEDED_STEPS, hooks, llama, profiler, trainer
from launching import REPO
from transformers import TrainerCallback

import tunescope
from tunescope import StepProfiler, results
from tunescope import latency_files as files
from tunescope.analyze.latency_tables import latency_tables
from tunescope.config import Point
from tunescope.errors import UserError
from tunescope.train import engine

FILES = {
    results.POINT_FILE, results.ENVIRONMENT_FILE, results.OUTCOME_FILE, results.STEPS_FILE, files.PHASES_FILE,
    files.SPANS_FILE, files.MODULES_FILE, files.CALLS_FILE, files.EVENTS_FILE, files.MEMORY_EVENTS_FILE,
    files.MEMORY_PARTS_FILE, files.TRACE_FILE,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


class Learned(TrainerCallback):
    """Losses and gradient norms of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.steps.append((logs["loss"], logs["grad_norm"]))


# --- any kind of training --------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-reentrant": {"reentrant": True},
    "full-non-reentrant": {"reentrant": False},
    "lora": {"lora": True},
    "lora-reentrant": {"lora": True, "reentrant": True},
    "lora-non-reentrant": {"lora": True, "reentrant": False},
    "accumulated": {"lora": True, "reentrant": False, "gradient_accumulation_steps": 3},
}


class Run(NamedTuple):
    learned: list[list[tuple[float, float]]]  # without StepProfiler and with it
    weights: list[dict[str, torch.Tensor]]
    hooks: list[int]
    watched: StepProfiler
    folder: Path


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiled")


@pytest.fixture(scope="module")
def runs(profiled: Path) -> dict[str, Run]:
    """Every kind of training, without and with StepProfiler, all results in one folder."""
    made = {}
    for name, settings in KINDS.items():
        settings = dict(settings)
        lora = settings.pop("lora", False)
        learned, weights, left = [], [], []
        watched = profiler(profiled / "profile", name=name)
        for callbacks in ([], [watched]):
            model, seen = llama(lora=lora), Learned()
            trainer(model, profiled, [seen, *callbacks], **settings).train()
            learned.append(seen.steps)
            weights.append({path: parameter.detach().clone() for path, parameter in model.named_parameters()})
            left.append(hooks(model))
        made[name] = Run(learned, weights, left, watched, profiled / "profile" / name)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_equal_and_nothing_hangs_on_the_model(kind: str, runs: dict[str, Run]) -> None:
    run = runs[kind]
    assert len(run.learned[0]) == NEEDED_STEPS + 2
    assert run.learned[0] == run.learned[1]
    assert all(torch.equal(one, run.weights[1][path]) for path, one in run.weights[0].items())
    assert run.hooks[0] == run.hooks[1]
    assert (run.watched.is_done, run.watched.why_not) == (True, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_a_whole_point(kind: str, runs: dict[str, Run]) -> None:
    folder = runs[kind].folder
    assert {file.name for file in folder.iterdir()} == FILES
    found = results.read_point(folder)
    attached = found.point["attached"]
    assert attached["name"] == found.point["point_id"] == kind
    assert attached["model_class"] == ("LlamaForCausalLM" if kind.startswith("full") else "PeftModel")
    assert (attached["num_layers"], attached["per_device_train_batch_size"]) == (2, BATCH)
    assert attached["gradient_checkpointing"] == ("reentrant" in kind or kind == "accumulated")
    assert found.outcome["clock"] == "host"
    assert found.outcome["compute_dtype"] == "float32"
    steps, phases = read(folder, results.STEPS_FILE), read(folder, files.PHASES_FILE)
    assert steps["is_warmup"].tolist() == [True, False, False]
    micro_steps = 3 if kind == "accumulated" else 1
    assert (steps["micro_steps"] == micro_steps).all()
    assert (steps["tokens"] == micro_steps * BATCH * LENGTH_TOKENS).all()
    by_phase = phases.pivot(index="step", columns="phase", values="duration_ns")
    timed = steps[~steps["is_warmup"]].set_index("step")["duration_ns"]
    assert (by_phase.drop(columns=files.RECOMPUTE).sum(axis=1) == timed).all()
    recomputes = attached["gradient_checkpointing"]
    assert ((by_phase[files.RECOMPUTE] > 0) == recomputes).all()
    assert (by_phase.drop(columns=files.RECOMPUTE) > 0).all(axis=None)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_the_layers_are_as_many_as_the_model_has(kind: str, runs: dict[str, Run]) -> None:
    """Seven matrices a layer, and two for each adapter of q_proj and down_proj."""
    from tunescope.analyze.latency import latency_point

    point = latency_point(results.read_point(runs[kind].folder))["point"]
    assert point.attribution.num_steps == 1
    work = point.attribution.work
    products = work[(work["op"] == "aten::mm") & (work["layer"] >= 0)].groupby("phase").size()
    lora, recomputes = not kind.startswith("full"), "reentrant" in kind or kind == "accumulated"
    forward = 2 * (7 + (4 if lora else 0)) * (3 if kind == "accumulated" else 1)
    assert products[files.FORWARD] == forward
    assert products.get(files.RECOMPUTE, 0) == pytest.approx(forward if recomputes else 0, abs=2)
    assert products[files.BACKWARD] > forward
    assert point.summary()["attributed_frac"] == 1
    total = point.layers()["num_launches"].sum()
    assert total == (point.recording.events["kind"] == files.OP).sum()


def test_all_of_them_are_one_table(profiled: Path, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    folder = profiled / "profile"
    assert latency_tables(folder).points["point_id"].tolist() == [
        "full", "full-non-reentrant", "full-reentrant", "accumulated", "lora", "lora-non-reentrant", "lora-reentrant",
    ]  # fmt: skip
    text = printed(folder, capsys)
    shown = tables_in(text)
    (figure4,) = (table for title, table in shown.items() if title.startswith("Figure 4"))
    assert [row[0] for row in figure4.rows] == latency_tables(folder).points["point_id"].tolist()
    assert not any("paper" in name for table in shown.values() for name in table.header)
    assert sum(title.startswith("Figure 5: sum of 2 layers") for title in shown) == len(KINDS)
    figure5 = shown["Figure 5: sum of 2 layers (ms a step), PeftModel lora - batch 2"]
    assert {"self_attn", "mlp", "input_layernorm", "layer itself", "lm_head + loss"} <= {row[0] for row in figure5.rows}
    assert "Figure 11" not in text
    assert "weights: own; data: own" in text


def test_no_more_hangs_on_the_model_than_a_stage_needs(tmp_path: Path) -> None:
    """Timed steps have marks at layers and their parts, profiled ones at every module, later ones nothing."""

    class Count(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seen.append(hooks(model))

    model, count = llama(), Count()
    num_modules, num_parameters = len(list(model.modules())), len(list(model.parameters()))
    trainer(model, tmp_path, [profiler(tmp_path / "profile"), count]).train()
    timed, profiled = 2 * (1 + 2 * 5) + 1, 2 * num_modules + num_parameters  # and one that counts the tokens
    assert count.seen == [timed] * 3 + [profiled] * 4 + [0] * 2


# --- how long, where to ----------------------------------------------------------------------------------------------


def test_a_training_too_short_leaves_nothing_but_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, watched = llama(), profiler(tmp_path / "profile")
    watching = trainer(model, tmp_path, [watched], num_steps=NEEDED_STEPS - 1)
    with caplog.at_level(logging.WARNING, "tunescope"):
        watching.train()
    assert watching.state.global_step == NEEDED_STEPS - 1
    assert not watched.is_done
    assert watched.why_not == f"training has {NEEDED_STEPS - 1} steps, and {NEEDED_STEPS} are needed"
    ours = [record.getMessage() for record in caplog.records if record.name == "tunescope"]
    assert ours == [f"tunescope measured nothing: {watched.why_not}"]
    assert not (tmp_path / "profile").exists()
    assert hooks(model) == 0


def test_as_many_steps_as_it_says_are_enough(tmp_path: Path) -> None:
    watched = profiler(tmp_path / "profile")
    trainer(llama(), tmp_path, [watched], num_steps=NEEDED_STEPS).train()
    assert watched.is_done
    documented = StepProfiler.__doc__ or ""
    assert "num_warmup_steps + num_timed_steps +\n    num_profiled_steps + 3 steps in all" in documented


@pytest.mark.parametrize(("stop_after", "num_steps"), [(True, NEEDED_STEPS), (False, 20)])
def test_training_goes_on_unless_it_shall_not(stop_after: bool, num_steps: int, tmp_path: Path) -> None:
    watched = profiler(tmp_path / "profile", stop_after=stop_after, trace=False)
    watching = trainer(llama(), tmp_path, [watched], num_steps=20)
    watching.train()
    assert watching.state.global_step == num_steps
    assert {file.name for file in (tmp_path / "profile" / "run").iterdir()} == FILES - {files.TRACE_FILE}


def test_an_earlier_run_of_the_name_moves_aside(tmp_path: Path) -> None:
    for _ in range(2):
        trainer(llama(), tmp_path, [profiler(tmp_path / "profile", name="mine")]).train()
    folder = tmp_path / "profile"
    assert {file.name for file in (folder / "superseded" / "mine~1").iterdir()} == FILES
    assert latency_tables(folder).points["point_id"].tolist() == ["mine"]


def test_one_profiler_for_two_trainings_measures_both(tmp_path: Path) -> None:
    watched = profiler(tmp_path / "profile")
    watching = trainer(llama(), tmp_path, [watched])
    watching.train()
    watching.train()
    assert (watched.is_done, watched.why_not) == (True, None)
    assert {entry.name for entry in (tmp_path / "profile").iterdir()} == {"run", "superseded"}


@pytest.mark.parametrize("name", ["run", "x" * 300])
def test_a_folder_that_cannot_be_written_costs_no_training(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    if name == "run":
        folder.write_text("a file")
    model, watched = llama(), profiler(folder, name=name)
    watching = trainer(model, tmp_path, [watched])
    watching.train()
    assert watching.state.global_step == NEEDED_STEPS + 2
    assert watched.why_not is not None
    assert watched.why_not.startswith(f"cannot write to {folder}: ")
    assert hooks(model) == 0


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_folder_that_is_removed_meanwhile_costs_no_training(step: int, tmp_path: Path) -> None:
    class Remove(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                shutil.rmtree(tmp_path / "profile")

    model, watched = llama(), profiler(tmp_path / "profile")
    watching = trainer(model, tmp_path, [watched, Remove()])
    watching.train()
    assert watching.state.global_step == NEEDED_STEPS + 2
    assert not watched.is_done
    assert "No such file" in (watched.why_not or "")
    assert hooks(model) == 0


def test_only_the_first_process_measures(tmp_path: Path) -> None:
    watched = profiler(tmp_path / "profile")
    watched.on_train_begin(SimpleNamespace(process_index=1), SimpleNamespace(max_steps=99), None, model=llama())
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_warmup_steps": 0},
        {"num_timed_steps": 0},
        {"num_profiled_steps": -1},
        {"name": ""},
        {"name": "a/b"},
        {"name": ".."},
        {"name": ".hidden"},
        {"name": "a.unfinished"},
        pytest.param({"name": "superseded"}),
        pytest.param({"name": "a\0b"}),
        pytest.param({"num_timed_steps": 2.5}),
        pytest.param({"num_timed_steps": "3"}),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(next(iter(settings)))):
        StepProfiler(tmp_path, **settings)


# --- where it comes from, and other trainers -------------------------------------------------------------------------


def test_the_package_gives_it_on_demand_and_nothing_else() -> None:
    assert tunescope.StepProfiler is StepProfiler
    assert "StepProfiler" in tunescope.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tunescope.nonsense


def test_the_example_runs_and_its_table_prints(tmp_path: Path) -> None:
    # With two threads beside a busy core it takes ten times as long.
    example = (sys.executable, REPO / "examples" / "attach_to_trainer.py", "--finetuning", "lora")
    done = launching.run(*example, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    told = done.out.strip().splitlines()[-1]
    assert told == "Table: python -m tunescope table latency profile"
    table = launching.run(sys.executable, *told.removeprefix("Table: python ").split(), cwd=tmp_path)
    assert (table.code, table.err) == (0, "")
    assert "Figure 5: sum of 4 layers (ms a step), PeftModel lora-non-reentrant - batch 4" in table.out
    assert {entry.name for entry in tmp_path.iterdir()} <= {"profile", "profile-checkpoints"}
    assert [entry.name for entry in (tmp_path / "profile").iterdir()] == ["lora-non-reentrant"]


def test_llama_factory_takes_it_as_a_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llamafactory.train.tuner import run_exp

    point = Point(
        model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1, preset="tiny", num_layers=2, total_layers=2
    )
    workload = helpers_points.tiny_workload(point, num_samples=16, max_steps=NEEDED_STEPS)
    arguments, _ = engine.prepare(workload, tmp_path / "scratch")
    watched = profiler(tmp_path / "profile", name="factory")
    run_exp(dict(arguments), callbacks=[watched])
    assert (watched.is_done, watched.why_not) == (True, None)
    attached = json.loads((tmp_path / "profile" / "factory" / "point.json").read_text())["attached"]
    assert (attached["model_class"], attached["num_layers"]) == ("PeftModelForCausalLM", 2)
    capsys.readouterr()
    text = tables_in(printed(tmp_path / "profile", capsys))
    figure6 = "Figure 6 from the profiler: operators of moe, sum of 2 layers, PeftModelForCausalLM factory - batch 1"
    labels = {row[0] for row in text[figure6].rows}
    assert {"matmul(w1)", "matmul(w2)", "matmul(w3)", "w1_dequant", "matmul(router)", "softmax", "topk"} <= labels
