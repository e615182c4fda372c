"""From a launcher's flags to the list of points to measure. No torch: this also serves --dry-run and resuming."""

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunescope import config, presets
from tunescope.config import Point, Protocol
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.gpus import Gpu, driver_is_too_old, list_gpus
from tunescope.hardware import GIB
from tunescope.measure import inputs
from tunescope.measure.environment import cpu_name, git_revision, package_versions, speed_settings
from tunescope.measure.inputs import Data
from tunescope.measure.max_batch import TRIAL_QUERIES, TRIAL_STEPS, BatchSearch, make_search
from tunescope.ncu.settings import Settings as NcuSettings
from tunescope.presets import Size
from tunescope.results import SCHEMA_VERSION, digest
from tunescope.train import recipe as recipes
from tunescope.train.workload import Workload

# Enough that the stratified sample has the histogram's shape; tiny trades that for a quick start.
NUM_SAMPLES = 1000
NUM_SAMPLES_TINY = 256
_PROTOCOLS = {  # (kind, is preset tiny)
    (config.THROUGHPUT, False): Protocol(),
    (config.THROUGHPUT, True): config.TINY_PROTOCOL,
    (config.LATENCY, False): config.LATENCY_PROTOCOL,
    (config.LATENCY, True): config.TINY_LATENCY_PROTOCOL,
    (config.NCU, False): config.NCU_PROTOCOL,
    (config.NCU, True): config.NCU_PROTOCOL,
}


# Of grouped experts on a GPU: the same AdamW, a launch for many parameters where it else takes a dozen; and batches are
# copied there without waiting for the step before to end.
FAST_SETTINGS = {"optim": "adamw_torch_fused", "accelerator_config": {"non_blocking": True}}

# (config.json, recipe, batch size, slots of its longest query, bytes of GPU memory) -> numbers of layers to recompute
ChooseLayers = Callable[[dict[str, Any], dict[str, Any], int, int, int], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of a `run` command; None and empty mean not given."""

    model: str = "mixtral"
    kind: str = config.THROUGHPUT
    preset: str = "auto"
    gpu: int | None = None
    points: str | None = None
    queries: int | None = None
    datasets: tuple[str, ...] = ()
    model_path: Path | None = None
    reentrant: bool = False
    scan: str = "auto"
    moe: str = "auto"
    recompute: str | None = None
    graphs: bool = True
    memory_budget_gib: float | None = None
    max_seconds: float | None = None
    seq_len: int | None = None
    ncu: NcuSettings | None = None


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """All that the process of one point needs, and what its folder says of it.

    search: of a point whose batch size is yet to be found, else None. is_trial: a batch size is tried, not measured.
    ncu: how Nsight Compute looks at it, of a point of that kind.
    """

    point_id: str
    kind: str
    workload: Workload
    protocol: Protocol
    weights: dict[str, Any]
    data: dict[str, Any]
    device: str
    memory_budget_bytes: int | None
    stack: dict[str, str | None]
    speed_settings: dict[str, str]
    revision: str | None
    # Of a breakdown: data set -> file of the queries whose routing is counted; other data sets get synthetic ones.
    probe_files: dict[str, Path]
    probes: dict[str, Any]
    search: BatchSearch | None = None
    is_trial: bool = False
    ncu: NcuSettings | None = None

    def identity(self) -> dict[str, Any]:
        """Whatever changes this, changes what was measured: a result under another identity is not this point's."""
        identity = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            **self.workload.to_json(),
            "point": self.workload.point.to_json(),
            "protocol": self.protocol.to_json(),
            "weights": self.weights,
            "data": self.data,
            "moe": moe_of(self.workload),
            "device": self.device,
            "memory_budget_bytes": self.memory_budget_bytes,
            "stack": self.stack,
            "speed_settings": self.speed_settings,
        }
        if self.ncu is not None:
            identity["ncu"] = self.ncu.to_json()
        return identity | ({"probes": self.probes} if self.kind == config.LATENCY else {})

    def search_hash(self) -> str | None:
        """Identity of a search, whatever batch size it is at; None of a point that searches nothing."""
        if self.search is None:
            return None
        return digest(self.at_batch_size(1).identity() | {"search": self.search.to_json()})

    def point_json(self) -> dict[str, Any]:
        identity = self.identity()
        names = {"point_id": self.point_id, "recipe_hash": digest(identity)}
        return names | ({"search_hash": self.search_hash()} if self.search else {}) | identity

    def at_batch_size(self, batch_size: int, *, is_trial: bool = False) -> "PointSpec":
        """The same point at one batch size of its search: as it is measured, or a trial of a few steps."""
        search = self.search
        assert search is not None
        point = replace(self.workload.point, per_device_batch_size=batch_size)
        if is_trial:
            # Of a file all queries: any of them may be the longest.
            usual = TRIAL_QUERIES if search.data.num_queries is None else search.data.num_queries
            protocol = replace(
                self.protocol,
                num_queries=None,
                num_warmup_steps=1,
                min_timed_steps=TRIAL_STEPS - 1,
                max_timed_steps=TRIAL_STEPS - 1,
                longest_batch_first=False,
            )
            num_samples = inputs.num_training_queries(point, search.data, None, usual)
            max_steps: int | None = TRIAL_STEPS
        else:
            protocol, max_steps = self.protocol, self.workload.max_steps
            num_samples = inputs.num_training_queries(point, search.data, search.asked_queries, search.usual_queries)
        workload = replace(self.workload, point=point, num_samples=num_samples, max_steps=max_steps)
        return replace(self, workload=workload, protocol=protocol, is_trial=is_trial)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Points in running order, the machine they run on, and the choice of preset with its reason."""

    specs: list[PointSpec]
    size: Size
    gpu: Gpu | None
    device: str


def choose_gpu(index: int | None) -> Gpu | None:
    """The GPU to use: `--gpu N` among the visible ones, else the first. None: the machine has none.

    Raises UserError for one that is not there, a driver too old for this torch, or one that does not answer.
    """
    found = list_gpus()
    if not found.gpus:
        if found.problem is not None:
            raise UserError(found.problem, cure="mend it, or hide the GPUs with CUDA_VISIBLE_DEVICES=''")
        if index is not None:
            raise UserError(f"--gpu {index}: no GPU was found", cure="see `python3 -m tunescope doctor`")
        return None
    if index is not None and not 0 <= index < len(found.gpus):
        raise UserError(f"--gpu {index}: this machine shows GPUs 0 to {len(found.gpus) - 1}")
    gpu = found.gpus[index or 0]
    if gpu.mig_enabled and not gpu.is_mig_slice:
        raise UserError(
            f"{gpu.name} is divided into MIG slices, and none is named",
            cause="a process gets one slice, whose memory and speed are not the board's",
            cure="name it: CUDA_VISIBLE_DEVICES=MIG-... (nvidia-smi -L lists them)",
        )
    if driver_is_too_old(gpu.driver_version) and not _is_ones_own_choice():
        raise UserError(
            f"the NVIDIA driver is {gpu.driver_version}, and PyTorch's CUDA 13 build needs 580 or newer",
            cause="on an older driver PyTorch sees no GPU",
            cure="update the driver; or, to run the tiny preset on the CPU, hide the GPU with CUDA_VISIBLE_DEVICES=''",
        )
    return gpu


def _is_ones_own_choice() -> bool:
    """Whether the driver is not ours to judge: a named environment (perhaps with CUDA's forward compatibility), or a
    torch built for another CUDA."""
    build = (package_versions(("torch",))["torch"] or "").partition("+")[2]
    return bool(os.environ.get("TUNESCOPE_PYTHON")) or (bool(build) and not build.startswith("cu13"))


def make_plan(options: Options, choose_layers: ChooseLayers | None = None) -> Plan:
    """Every point with all its settings. Raises UserError before anything is started or written.

    choose_layers: which layers to recompute under --recompute auto.
    """
    _check_options(options)
    points = _points(options)
    gpu = choose_gpu(options.gpu)
    given = inputs.given_files(options.datasets)
    if options.seq_len is not None and (own := given.keys() - set(config.PAPER_DATASETS)):
        raise UserError(
            f"--seq-len makes queries of random tokens, and {', '.join(sorted(own))} has its own",
            cure="drop --seq-len, or drop --dataset",
        )
    if options.points is None:
        points = inputs.points_for_files(points, given)
    used = {point.dataset for point in points}
    if options.kind == config.LATENCY:  # queries of the paper's data sets are sent through the routers at every point
        used |= set(config.PAPER_DATASETS)
    if unused := given.keys() - used:
        raise UserError(
            f"no point trains on {', '.join(str(given[name]) for name in sorted(unused))}",
            cause=f"--points names none of data set {', '.join(sorted(unused))}",
            cure="add points of it, or drop --points to run the figure's batch sizes on it",
        )
    family = find_family(options.model)
    recipe = recipes.load_recipe(recipes.recipe_folder() / family.recipe)
    if "use_reentrant_gc" in recipe:
        recipe["use_reentrant_gc"] = options.reentrant
    elif options.reentrant:
        raise UserError(
            f"--reentrant says how to checkpoint, and the recipe of {family.name} does not checkpoint",
            cure="drop --reentrant",
        )
    scan = inputs.available_scan(family, options.scan, use_gpu=gpu is not None)
    moe = inputs.moe_path(family, options.moe)
    moe_in_config = {"moe": moe} if moe != family.moe_path and family.is_moe_in_config else {}
    is_switched = moe != family.moe_path and not family.is_moe_in_config
    if options.recompute is not None:
        inputs.check_recompute(family, options.recompute, recipe, is_grouped=is_switched)
        if options.recompute == "none":
            recipe["disable_gradient_checkpointing"] = True
    if is_switched and gpu is not None:
        recipe |= FAST_SETTINGS

    model_dir = inputs.find_model_dir(options.model, options.preset, options.model_path)
    base = inputs.checked_config(model_dir, family) if model_dir else family.full
    memory_bytes = presets.with_budget(gpu.memory_total_bytes if gpu else None, options.memory_budget_gib)
    size = presets.choose_size(
        family,
        base,
        options.preset,
        memory_bytes,
        gpu_name=gpu.name if gpu else "",
        own_model=options.model_path is not None,
    )
    if size.preset == "tiny":
        base, model_dir = family.tiny, None
    elif model_dir is None:
        inputs.refuse_unconverted(family.name)
    inputs.check_taps(scan, base)
    if recipe.get("pure_bf16") and gpu is not None:
        # The engine loads weights as config.json says, and trains them as they are.
        base = {key: value for key, value in base.items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    named = inputs.study_files() | given
    probe_files = inputs.probe_files(named) if options.kind == config.LATENCY else {}
    common = _Common(
        options=options,
        recipe=recipe,
        full_config=base | ({"scan": scan} if scan else {}) | moe_in_config,
        moe=moe if is_switched else None,
        choose_layers=choose_layers,
        model_dir=model_dir,
        weights=inputs.weights_facts(model_dir),
        gpu=gpu,
        device=gpu.name if gpu else cpu_name(),
        stack={"python": platform.python_version(), **package_versions()},
        speed_settings=speed_settings(),
        revision=git_revision(),
        probe_files=probe_files,
        probes={name: inputs.file_facts(file) for name, file in probe_files.items()},
    )
    # A breakdown shows single layers: the deeper end has them all, there is nothing to extrapolate.
    depths = list(size.depths) if options.kind == config.THROUGHPUT else [max(size.depths)]
    points = config.points_at_depths(points, size.preset, depths, size.total_layers)
    data = inputs.data_of_points(points, named)
    specs = [_spec(point, data[point], common) for point in points]
    return Plan(specs=specs, size=size, gpu=gpu, device=common.device)


def _points(options: Options) -> list[Point]:
    if options.points is None:
        points = config.paper_points(options.model, options.kind)
    else:
        points = config.parse_points(options.points, options.model, options.kind)
    if options.seq_len is None:
        return points
    return list(dict.fromkeys(replace(point, seq_len_tokens=options.seq_len) for point in points))


def _check_options(options: Options) -> None:
    find_family(options.model)
    if options.preset not in ("auto", *config.PRESETS):
        raise config.unknown_preset(options.preset)
    if options.max_seconds is not None and options.queries is not None:
        raise UserError(
            "--max-seconds and --queries exclude each other",
            cause="--queries measures a whole epoch, however long it takes",
        )
    if options.memory_budget_gib is not None and not 0 < options.memory_budget_gib < math.inf:
        raise UserError(f"--memory-budget-gib is {options.memory_budget_gib:g}; it must be a positive number")


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What all points of a plan share."""

    options: Options
    recipe: dict[str, Any]
    full_config: dict[str, Any]
    moe: str | None
    choose_layers: ChooseLayers | None
    model_dir: Path | None
    weights: dict[str, Any]
    gpu: Gpu | None
    device: str
    stack: dict[str, str | None]
    speed_settings: dict[str, str]
    revision: str | None
    probe_files: dict[str, Path]
    probes: dict[str, Any]


def _spec(point: Point, data: Data, common: _Common) -> PointSpec:
    options, recipe, gpu = common.options, common.recipe, common.gpu
    protocol = replace(_PROTOCOLS[options.kind, point.preset == "tiny"], num_queries=options.queries)
    if options.queries is not None:
        protocol = replace(protocol, longest_batch_first=False)
    if options.max_seconds is not None:
        protocol = replace(protocol, max_timed_s=options.max_seconds)
    usual = NUM_SAMPLES_TINY if point.preset == "tiny" else NUM_SAMPLES
    num_samples = inputs.num_training_queries(point, data, options.queries, usual)
    steps = protocol.num_warmup_steps + protocol.max_timed_steps + protocol.num_steps_after
    max_steps = steps if options.queries is None else None
    if point.seq_len_tokens is not None:  # or the engine would cut it at the recipe's limit, and no row would say so
        recipe = recipe | {"cutoff_len": max(int(recipe["cutoff_len"]), point.seq_len_tokens)}
    workload = Workload(
        point=point,
        recipe=recipe,
        model_config=find_family(point.model).config_at(common.full_config, point.num_layers, point.top_k),
        model_dir=str(common.model_dir) if common.model_dir else None,
        data_entry=data.entry,
        num_samples=num_samples,
        max_steps=max_steps,
        use_cpu=gpu is None,
        moe=common.moe,
        # A breakdown must see layers and launches, which a graph hides.
        graphs=bool(common.moe) and options.graphs and gpu is not None and options.kind == config.THROUGHPUT,
    )
    budget_bytes = None if options.memory_budget_gib is None else round(options.memory_budget_gib * GIB)
    longest = make_search(point, data, options.queries, usual, int(recipe.get("cutoff_len", 2048)))
    if options.recompute == "auto":
        if point.find_max or gpu is None or common.choose_layers is None or point.preset == "slice":
            raise UserError(
                "--recompute auto needs a GPU, a batch size and all layers to know how many may keep their activations",
                cure="name batch sizes and preset full or tiny, or use --recompute none",
            )
        room = min(budget_bytes or gpu.memory_total_bytes, gpu.memory_total_bytes)
        tokens = longest.longest_tokens or int(recipe.get("cutoff_len", 2048))
        layers = common.choose_layers(workload.model_config, recipe, point.per_device_batch_size, tokens, room)
        workload = replace(workload, checkpointed_layers=layers)
    search = None
    if point.find_max:
        if gpu is None and budget_bytes is None:
            raise UserError(
                "bs=max needs a GPU, and none was found",
                cause="on a CPU no batch is too large until the system's memory is gone",
                cure="name batch sizes, or say with --memory-budget-gib how much memory one process may take",
            )
        search = longest
    moe = moe_of(workload)
    variants = [
        *([] if moe == find_family(point.model).moe_path else [moe]),
        *([f"recompute-{options.recompute}"] if options.recompute else []),
        *(["no-graphs"] if common.moe and not options.graphs else []),
    ]
    return PointSpec(
        point_id="-".join([point.point_id(device_slug(gpu)), *variants]),
        kind=options.kind,
        workload=workload,
        protocol=protocol,
        weights=common.weights,
        data=data.facts,
        device=common.device,
        # On a CPU nothing but a search asks for it.
        memory_budget_bytes=budget_bytes if gpu or search else None,
        stack=common.stack,
        speed_settings=common.speed_settings,
        revision=common.revision,
        probe_files=common.probe_files,
        probes=common.probes,
        search=search,
        ncu=(options.ncu or NcuSettings()) if options.kind == config.NCU else None,
    )


def moe_of(workload: Workload) -> str:
    """The path that the experts of a run take, as its rows say it."""
    return workload.moe or workload.model_config.get("moe", find_family(workload.point.model).moe_path)


def device_slug(gpu: Gpu | None) -> str:
    """Part of a folder's name: `nvidia-h200`, `cpu`."""
    return "cpu" if gpu is None else "-".join("".join(c if c.isalnum() else " " for c in gpu.name.lower()).split())
