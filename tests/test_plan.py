"""From flags to points: what is measured, under which identity, on which data."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunescope import dataset_files as files
from tunescope import paper
from tunescope.config import (
    LATENCY,
    LATENCY_PROTOCOL,
    THROUGHPUT,
    TINY_LATENCY_PROTOCOL,
    TINY_PROTOCOL,
    Point,
    Protocol,
)
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_8X7B, MIXTRAL_TINY
from tunescope.gpus import Gpu, GpuInventory
from tunescope.hardware import GIB
from tunescope.measure import inputs, plan
from tunescope.measure.plan import Options, Plan, PointSpec, make_plan
from tunescope.train.workload import Workload

ROW = {"instruction": "w1", "input": "", "output": "w2"}


def gpu(name: str = "NVIDIA A40", memory_gib: float = 44.4, **more: Any) -> Gpu:
    settings = {
        "index": 0,
        "uuid": "GPU-0",
        "name": name,
        "memory_total_bytes": round(memory_gib * GIB),
        "memory_free_bytes": round(memory_gib * GIB),
        "driver_version": "580.65.06",
        "compute_capability": (8, 6),
        "pci_bus_id": None,
        "power_limit_w": 300.0,
        "power_limit_default_w": 300.0,
        "max_sm_clock_mhz": 1740,
        "max_memory_clock_mhz": 7251,
        "ecc_enabled": True,
        "persistence_enabled": True,
        "mig_enabled": False,
        "is_mig_slice": False,
    }
    return Gpu(**settings | more)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine without GPUs, checkpoints or the study's data; call it to give it GPUs."""
    found: list[Gpu] = []
    monkeypatch.setattr(plan, "list_gpus", lambda: GpuInventory(gpus=tuple(found)))
    monkeypatch.setattr(inputs.checkpoints, "find_checkpoint", lambda model: None)
    recipe = plan.recipes.recipe_folder() / "mixtral_qlora.yaml"
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    (tmp_path / "recipes" / recipe.name).write_text(recipe.read_text())
    monkeypatch.setattr(plan.recipes, "recipe_folder", lambda: tmp_path / "recipes")
    return lambda *gpus: found.extend(gpus)


def data_file(folder: Path, name: str, rows: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps([ROW] * rows))
    return folder / name


def bars(made: Plan) -> list[tuple[str, int, int]]:
    points = [spec.workload.point for spec in made.specs]
    return [(point.dataset, point.top_k, point.per_device_batch_size) for point in points]


def only_spec(**flags: Any) -> PointSpec:
    (spec,) = make_plan(Options(**{"points": "cs:sparse:bs=2"} | flags)).specs
    return spec


def recipe_hash(spec: PointSpec) -> str:
    return spec.point_json()["recipe_hash"]


# --- what a plain launcher runs ---


def test_without_a_gpu_the_figure_runs_at_tiny() -> None:
    made = make_plan(Options())
    assert made.size.preset == "tiny"
    assert bars(made) == paper.figure8_order("mixtral")
    for spec in made.specs:
        assert spec.workload.use_cpu
        assert spec.point_id.endswith("-tiny-cpu")
        assert spec.protocol == TINY_PROTOCOL
        assert spec.workload.num_samples == 256
        assert spec.workload.max_steps == 23
        assert spec.weights == {"kind": "random"}


def test_on_the_papers_gpu_the_figure_runs_in_full(machine: Callable[..., None]) -> None:
    machine(gpu())
    made = make_plan(Options())
    assert (made.size.preset, made.device) == ("full", "NVIDIA A40")
    assert bars(made) == paper.figure8_order("mixtral")
    spec = made.specs[0]
    assert spec.point_id == "cs-k8-b1-full-nvidia-a40"
    assert spec.protocol == Protocol()
    assert (spec.workload.num_samples, spec.workload.max_steps) == (1000, 1003)
    assert not spec.workload.use_cpu


def test_a_small_gpu_runs_every_bar_at_two_depths(machine: Callable[..., None]) -> None:
    machine(gpu("NVIDIA L4", 22.0))
    made = make_plan(Options())
    assert made.size.preset == "slice"
    assert bars(made) == [bar for bar in paper.figure8_order("mixtral") for _ in range(2)]
    for deep, shallow in zip(made.specs[::2], made.specs[1::2], strict=True):
        assert deep.workload.point.num_layers > shallow.workload.point.num_layers
        assert deep.workload.model_config["num_hidden_layers"] == deep.workload.point.num_layers
        assert deep.point_id != shallow.point_id


def test_every_point_carries_its_sparsity_depth_and_batch_into_the_model() -> None:
    for spec in make_plan(Options(points="cs:dense:bs=1 cs:sparse:bs=2 cs:k=5:bs=3")).specs:
        config, point = spec.workload.model_config, spec.workload.point
        assert config["num_experts_per_tok"] == point.top_k
        assert config["num_hidden_layers"] == point.num_layers == 2
        assert {k: v for k, v in config.items() if k != "num_experts_per_tok"} == {
            k: v for k, v in MIXTRAL_TINY.items() if k != "num_experts_per_tok"
        }


def test_the_papers_protocol_is_one_epoch_of_exactly_so_many_queries() -> None:
    spec = only_spec(queries=1000)
    assert spec.protocol.num_queries == 1000
    assert (spec.workload.num_samples, spec.workload.max_steps) == (1000, None)
    assert spec.workload.recipe["num_train_epochs"] == 1.0


def test_plans_are_the_same_each_time(machine: Callable[..., None]) -> None:
    machine(gpu())
    one, other = make_plan(Options()), make_plan(Options())
    assert [spec.point_json() for spec in one.specs] == [spec.point_json() for spec in other.specs]
    json.dumps([spec.point_json() for spec in one.specs], allow_nan=False)


# --- identity ---


@pytest.mark.parametrize(
    "flags",
    [
        {"points": "cs:dense:bs=2"},
        {"points": "cs:sparse:bs=3"},
        {"points": "math:sparse:bs=2"},
        {"points": "cs:sparse:bs=2:seq=128"},
        {"queries": 1000},
        {"queries": 500},
        {"reentrant": True},
        {"max_seconds": 60.0},
        {"preset": "slice"},
        {"memory_budget_gib": 40.0},
    ],
    ids=str,
)
def test_identity_changes_with_what_is_measured(flags: dict[str, Any], machine: Callable[..., None]) -> None:
    machine(gpu())
    assert recipe_hash(make_plan(Options(**{"points": "cs:sparse:bs=2"} | flags)).specs[0]) != recipe_hash(only_spec())


def test_identity_changes_with_the_gpu_the_stack_and_the_recipe(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpu(), gpu("NVIDIA L40S", 44.5, index=1))
    before = recipe_hash(only_spec())
    assert recipe_hash(only_spec(gpu=1)) != before
    assert recipe_hash(only_spec(gpu=0)) == before
    with monkeypatch.context() as patch:
        patch.setattr(plan, "package_versions", lambda names=(): {"torch": "9.9.9"})
        assert recipe_hash(only_spec()) != before
    recipe = plan.recipes.recipe_folder() / "mixtral_qlora.yaml"
    recipe.write_text(recipe.read_text().replace("lora_rank: 16", "lora_rank: 8"))
    assert recipe_hash(only_spec()) != before


@pytest.mark.parametrize("field", ["model_config", "num_samples", "max_steps", "use_cpu", "recipe", "point"])
def test_identity_covers_every_field_of_the_workload(field: str) -> None:
    spec = only_spec()
    changed = {
        "model_config": spec.workload.model_config | {"hidden_size": 128},
        "num_samples": 17,
        "max_steps": 9,
        "use_cpu": False,
        "recipe": spec.workload.recipe | {"lora_rank": 8},
        "point": replace(spec.workload.point, per_device_batch_size=7),
    }[field]
    other = replace(spec, workload=replace(spec.workload, **{field: changed}))
    assert recipe_hash(other) != recipe_hash(spec)


def test_identity_covers_every_limit_of_the_protocol() -> None:
    spec = only_spec()
    for field, value in vars(spec.protocol).items():
        other = replace(spec, protocol=replace(spec.protocol, **{field: (value or 0) + 1}))
        assert recipe_hash(other) != recipe_hash(spec), field


def test_identity_is_of_the_contents_of_a_data_file_and_not_of_its_place(tmp_path: Path) -> None:
    flags = {"points": "mine:sparse:bs=1"}
    hashes = [
        recipe_hash(only_spec(datasets=(f"mine={data_file(tmp_path / folder, 'a.json', rows)}",), **flags))
        for folder, rows in (("here", 3), ("there", 3), ("there", 4))
    ]
    assert hashes[0] == hashes[1]
    assert hashes[1] != hashes[2]


def test_identity_is_of_the_weights_and_not_of_their_place(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(gpu())

    def checkpoint(folder: Path, **more: str) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
        (folder / "model-1.safetensors").write_bytes(b"x")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
        for name, text in more.items():
            (folder / name.replace("__", ".")).write_text(text)
        return folder

    def hash_of(folder: Path) -> str:
        return recipe_hash(only_spec(model_path=folder))

    one, copied = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert hash_of(one) == hash_of(copied)
    index = {"model__safetensors__index__json": '{"weight_map": {"v": "model-1.safetensors"}}'}
    others = [
        checkpoint(tmp_path / "c", **index),
        checkpoint(tmp_path / "d", tokenizer__model="pieces"),
        checkpoint(tmp_path / "e", tokenizer__model="other pieces"),
        checkpoint(tmp_path / "f", tokenizer_config__json="{}"),
    ]
    assert len({hash_of(folder) for folder in (one, *others)}) == 5
    assert hash_of(one) != recipe_hash(only_spec())  # random weights of the same model


def test_a_tokenizer_put_beside_a_config_is_another_point(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(gpu())
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    before = recipe_hash(only_spec(model_path=tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert recipe_hash(only_spec(model_path=tmp_path)) != before


def test_settings_that_change_speed_are_part_of_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    before = recipe_hash(only_spec())
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert recipe_hash(only_spec()) != before
    assert only_spec().point_json()["stack"]["python"].startswith("3.")


def test_a_board_divided_by_mig_is_not_measured_as_a_whole(machine: Callable[..., None]) -> None:
    machine(gpu(mig_enabled=True))
    with pytest.raises(UserError, match="MIG"):
        make_plan(Options(points="cs:sparse:bs=1"))


@pytest.mark.parametrize(("max_seconds", "queries"), [(float("inf"), None), (0.0, None), (60.0, 100)])
def test_a_time_limit_that_means_nothing_is_refused(max_seconds: float, queries: int | None) -> None:
    with pytest.raises(UserError, match="--max-seconds"):
        make_plan(Options(points="cs:sparse:bs=1", preset="tiny", max_seconds=max_seconds, queries=queries))


def test_point_json_names_no_place(tmp_path: Path) -> None:
    file = data_file(tmp_path / "home" / "somebody", "mine.json")
    content = json.dumps(only_spec(points="mine:sparse:bs=1", datasets=(str(file),)).point_json())
    assert str(tmp_path) not in content


# --- data ---


def test_synthetic_queries_where_no_file_is_given() -> None:
    spec = only_spec()
    assert spec.workload.data_entry is None
    assert spec.data == {"kind": "synthetic", "lengths": "histogram of the paper's Figure 2"}
    assert only_spec(points="cs:sparse:bs=1:seq=64").data == {"kind": "synthetic", "lengths": "fixed"}


def test_the_studys_files_are_used_where_they_lie() -> None:
    file = data_file(plan.recipes.recipe_folder() / "data", files.REAL_FILES["math"])
    kinds = {spec.workload.point.dataset: spec.data["kind"] for spec in make_plan(Options()).specs}
    assert kinds == {"cs": "synthetic", "math": "file"}
    spec = only_spec(points="math:sparse:bs=1")
    assert spec.data == {"kind": "file", "name": file.name, "sha256": files.sha256_hex(file)}


def test_own_data_runs_the_batch_sizes_of_cs(tmp_path: Path) -> None:
    made = make_plan(Options(datasets=(str(data_file(tmp_path, "My Data.json")),)))
    assert bars(made) == [("my_data", k, b) for _, k, b in paper.figure8_order("mixtral")[:5]]
    assert all(spec.data["kind"] == "file" for spec in made.specs)


def test_own_data_beside_the_papers_runs_both(tmp_path: Path) -> None:
    made = make_plan(
        Options(datasets=(f"math={data_file(tmp_path, 'x.json')}", f"mine={data_file(tmp_path, 'y.json')}"))
    )
    assert bars(made) == [("math", 8, 1), ("math", 2, 1), ("math", 2, 3)] + [
        ("mine", k, b) for _, k, b in paper.figure8_order("mixtral")[:5]
    ]


@pytest.mark.parametrize(
    ("item", "dataset"), [("x.json", "x"), ("mine=x.json", "mine"), ("math=x.json", "math"), ("math_14k.json", "math")]
)
def test_names_of_data_sets(item: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.json", "math_14k.json"):
        data_file(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    assert only_spec(points=f"{dataset}:sparse:bs=1", datasets=(item,)).data["kind"] == "file"


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    file = data_file(tmp_path / "lr=1e-4", "mine.json")
    assert only_spec(points="mine:sparse:bs=1", datasets=(str(file),)).data["kind"] == "file"


def test_two_files_never_share_a_name(tmp_path: Path) -> None:
    given = tuple(str(data_file(tmp_path / folder, "train.json")) for folder in ("a", "b"))
    with pytest.raises(UserError, match="both have the name 'train'"):
        make_plan(Options(datasets=given))


def test_a_file_that_happens_to_be_called_cs_is_not_the_papers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="taken for the paper's"):
        make_plan(Options(datasets=(str(data_file(tmp_path, "cs.json")),)))


def test_a_file_that_no_point_trains_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no point trains on"):
        only_spec(datasets=(str(data_file(tmp_path, "mine.json")),))


def test_a_data_set_without_data_is_refused() -> None:
    with pytest.raises(UserError, match="no data for data set 'mine'"):
        only_spec(points="mine:sparse:bs=1")


def test_a_fixed_length_is_never_cut() -> None:
    cutoffs = {
        seq: only_spec(points=f"cs:sparse:bs=1:seq={seq}").workload.recipe["cutoff_len"] for seq in (64, 1024, 4096)
    }
    assert cutoffs == {64: 1024, 1024: 1024, 4096: 4096}
    assert only_spec().workload.recipe["cutoff_len"] == 1024


# --- machines ---


def test_choice_of_gpu(machine: Callable[..., None]) -> None:
    machine(gpu(), gpu("NVIDIA L4", 22.0, index=1))
    assert make_plan(Options()).device == "NVIDIA A40"
    assert make_plan(Options(gpu=1)).device == "NVIDIA L4"
    for index in (-1, 2):
        with pytest.raises(UserError, match="shows GPUs 0 to 1"):
            make_plan(Options(gpu=index))


def test_a_gpu_that_cannot_be_used_never_ends_in_tiny(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no GPU was found"):
        make_plan(Options(gpu=0))
    monkeypatch.setattr(plan, "list_gpus", lambda: GpuInventory(problem="the driver does not answer"))
    with pytest.raises(UserError, match="does not answer"):
        make_plan(Options())
    monkeypatch.setattr(plan, "list_gpus", lambda: GpuInventory(gpus=(gpu(driver_version="535.1"),)))
    monkeypatch.setattr(plan, "package_versions", lambda names=(): {"torch": "2.11.0"})
    with pytest.raises(UserError, match="580"):
        make_plan(Options())


def test_a_memory_budget_imitates_a_smaller_gpu(machine: Callable[..., None]) -> None:
    machine(gpu("NVIDIA H200", 139.8))
    made = make_plan(Options(memory_budget_gib=22.0))
    assert made.size.preset == "slice"
    assert {spec.memory_budget_bytes for spec in made.specs} == {22 * GIB}


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA A40", "nvidia-a40"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"), ("A/B  (C)", "a-b-c")],
)
def test_slug_is_part_of_a_folder_name(name: str, slug: str) -> None:
    assert plan.device_slug(gpu(name)) == slug


def test_slug_of_no_gpu() -> None:
    assert plan.device_slug(None) == "cpu"
    assert Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1).point_id("cpu") == "cs-k2-b1-full-cpu"


@pytest.mark.parametrize("batch", [1, 8, 300, 5000])
def test_a_training_set_of_synthetic_queries_is_several_batches(batch: int) -> None:
    (spec,) = make_plan(Options(points=f"cs:sparse:bs={batch}:seq=16", preset="tiny")).specs
    assert spec.workload.num_samples >= 4 * batch


@pytest.mark.parametrize(
    ("points", "queries", "says"),
    [
        ("mine:sparse:bs=9", None, "less than two batches"),
        ("mine:sparse:bs=1", 17, "more than the 16"),
        ("mine:sparse:bs=8", 8, "one step"),
        ("cs:sparse:bs=8", 5, "one step"),
    ],
)
def test_a_batch_the_data_cannot_fill_is_refused(points: str, queries: int | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([ROW] * 16))
    datasets = (str(file),) if points.startswith("mine") else ()
    with pytest.raises(UserError, match=says):
        make_plan(Options(points=points, preset="tiny", queries=queries, datasets=datasets))


# --- breakdowns ---

FIGURE_4 = [("random", 2, 1), ("random", 2, 10), ("random", 2, 32), ("random", 8, 1), ("random", 8, 10)]


def breakdown(**flags: Any) -> Plan:
    return make_plan(Options(kind=LATENCY, **flags))


def only_breakdown(**flags: Any) -> PointSpec:
    (spec,) = breakdown(**{"points": "random:sparse:bs=1:seq=128"} | flags).specs
    return spec


def test_without_a_gpu_the_breakdowns_run_at_tiny() -> None:
    made = breakdown()
    assert bars(made) == FIGURE_4
    for spec in made.specs:
        assert spec.kind == LATENCY
        assert spec.workload.point.seq_len_tokens == 128
        assert spec.data == {"kind": "synthetic", "lengths": "fixed"}
        assert spec.protocol == TINY_LATENCY_PROTOCOL
        # Warm-up, timed, the profiler's start, two recorded, its second start, one with memory.
        assert spec.workload.max_steps == 3 + 20 + 1 + 2 + 1 + 1
        assert spec.workload.num_samples >= 4 * spec.workload.point.per_device_batch_size


def test_a_breakdown_runs_as_deep_as_the_gpu_can_and_once(machine: Callable[..., None]) -> None:
    machine(gpu(), gpu("NVIDIA L4", 22.0, index=1))
    full, cut = breakdown(), breakdown(gpu=1)
    assert bars(full) == bars(cut) == FIGURE_4
    for spec in full.specs:
        assert spec.protocol == LATENCY_PROTOCOL
        assert spec.workload.max_steps == 3 + 200 + 5
        assert spec.workload.point.num_layers == 32
    deeper = make_plan(Options(gpu=1)).specs[0].workload.point
    assert {spec.workload.point.num_layers for spec in cut.specs} == {deeper.num_layers}


def test_a_length_given_by_flag_is_that_of_every_point() -> None:
    made = breakdown(seq_len=64)
    assert bars(made) == FIGURE_4
    assert {spec.workload.point.seq_len_tokens for spec in made.specs} == {64}
    assert all("-s64-" in spec.point_id for spec in made.specs)
    points = "random:sparse:bs=1:seq=128 random:sparse:bs=1:seq=256 cs:sparse:bs=1"
    assert bars(breakdown(seq_len=2048, points=points)) == [("random", 2, 1), ("cs", 2, 1)]
    assert breakdown(seq_len=2048).specs[0].workload.recipe["cutoff_len"] == 2048
    with pytest.raises(UserError, match="seq_len_tokens is 0"):
        breakdown(seq_len=0)


def test_a_breakdown_of_own_data_runs_the_figures_batch_sizes(tmp_path: Path) -> None:
    made = breakdown(datasets=(str(data_file(tmp_path, "mine.json", 64)),))
    assert bars(made) == [("mine", k, b) for _, k, b in FIGURE_4]
    assert {spec.workload.point.seq_len_tokens for spec in made.specs} == {None}
    with pytest.raises(UserError, match="no point trains on"):
        only_breakdown(datasets=(str(data_file(tmp_path, "mine.json")),))


def test_a_length_beside_own_data_is_not_ignored(tmp_path: Path) -> None:
    try:
        made = breakdown(seq_len=64, datasets=(str(data_file(tmp_path, "mine.json", 64)),))
    except UserError:
        return
    assert {spec.workload.point.seq_len_tokens for spec in made.specs} == {64}


def test_files_of_the_papers_data_sets_are_probes_of_every_breakdown(tmp_path: Path) -> None:
    """Even where no point trains on them; their content is part of what a point is, their place is not."""
    here, there = (data_file(tmp_path / folder, "a.json") for folder in ("here", "there"))
    other = data_file(tmp_path / "other", "a.json", rows=9)
    bare = only_breakdown()
    assert (bare.probe_files, bare.probes) == ({}, {})
    given = [only_breakdown(datasets=(f"cs={file}",)) for file in (here, there, other)]
    assert given[0].probe_files == {"cs": here}
    assert given[0].probes == {"cs": {"kind": "file", "name": "a.json", "sha256": files.sha256_hex(here)}}
    assert bars(breakdown(datasets=(f"cs={here}",))) == FIGURE_4
    hashes = [recipe_hash(spec) for spec in (bare, *given)]
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3
    with pytest.raises(UserError, match="no point trains on"):
        only_spec(points="math:sparse:bs=1", datasets=(f"cs={here}",))


def test_the_studys_files_are_probes_where_they_lie() -> None:
    file = data_file(plan.recipes.recipe_folder() / "data", files.REAL_FILES["math"])
    spec = only_breakdown()
    assert spec.probe_files == {"math": file}
    assert spec.data["kind"] == "synthetic"


def test_a_breakdown_is_another_point_than_the_throughput_of_its_bar() -> None:
    bar = "random:sparse:bs=1:seq=128"
    throughput, latency = only_spec(points=bar), only_breakdown(points=bar)
    assert throughput.workload.point == latency.workload.point
    assert recipe_hash(throughput) != recipe_hash(latency)
    for spec in (throughput, latency):
        content = spec.point_json()
        is_breakdown = spec.kind == LATENCY
        assert content["kind"] == spec.kind
        assert ("probes" in content) == ("num_profiled_steps" in content["protocol"]) == is_breakdown


def test_throughput_measured_before_there_were_breakdowns_is_still_the_same_point() -> None:
    """The hash that commit be1417a gave to this point."""
    workload = Workload(
        point=Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1),
        recipe={"lora_rank": 16},
        model_config={"hidden_size": 4096},
        model_dir=None,
        data_entry=None,
        num_samples=1000,
        max_steps=1003,
        use_cpu=False,
    )
    spec = PointSpec(
        point_id="cs-k2-b1-full-nvidia-a40",
        kind=THROUGHPUT,
        workload=workload,
        protocol=Protocol(),
        weights={"kind": "random"},
        data={"kind": "synthetic"},
        device="NVIDIA A40",
        memory_budget_bytes=None,
        stack={"torch": "2.11.0"},
        speed_settings={},
        revision=None,
        probe_files={},
        probes={},
    )
    assert recipe_hash(spec) == "efb33621be5d2b1f"


def test_queries_of_a_breakdown_are_one_epoch() -> None:
    spec = only_breakdown(queries=12)
    assert (spec.workload.num_samples, spec.workload.max_steps) == (12, None)
    assert not spec.protocol.longest_batch_first
    assert spec.protocol.num_profiled_steps == 2
    with pytest.raises(UserError, match="one step"):
        breakdown(queries=32)  # of the figure's batch of 32
