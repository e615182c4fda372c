"""Writes point folders with known contents, through the product's own writers, for tests of whatever reads them."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tunescope import results
from tunescope.config import Point
from tunescope.families import find_family
from tunescope.families.mixtral import MIXTRAL, MIXTRAL_TINY
from tunescope.train import recipe as recipes

GIB = 2**30
MS = 1_000_000  # ns
A40_MEMORY_GIB = 44.4
TIMED_UNIX_NS = (10**18, 10**18 + 60 * 10**9)  # samples of the GPU outside it are of no timed step


@cache
def recipe() -> dict[str, Any]:
    return recipes.load_recipe(recipes.recipe_folder() / "mixtral_qlora.yaml")


def step_rows(
    durations_ns: Sequence[int],
    *,
    num_queries: int | Sequence[int] = 1,
    tokens_per_query: int = 100,
    slots_per_query: int = 104,
    num_warmup_steps: int = 3,
) -> list[dict[str, Any]]:
    """Rows of results.STEPS_SCHEMA: the first `num_warmup_steps` are warm-up, all queries are alike."""
    queries = [num_queries] * len(durations_ns) if isinstance(num_queries, int) else list(num_queries)
    return [
        {
            "step": step,
            "is_warmup": step < num_warmup_steps,
            "duration_ns": int(duration_ns),
            "host_duration_ns": int(duration_ns),
            "num_queries": queries[step],
            "tokens": queries[step] * tokens_per_query,
            "padded_tokens": queries[step] * slots_per_query,
            "seq_len_tokens": slots_per_query,
            "micro_steps": 1,
            "rank": 0,
            "world_size": 1,
        }
        for step, duration_ns in enumerate(durations_ns)
    ]


def gpu_environment(device: str = "NVIDIA A40", memory_gib: float = A40_MEMORY_GIB) -> dict[str, Any]:
    return {
        "git_revision": "0" * 40,
        "cpu": "a CPU",
        "packages": {"torch": "2.11.0"},
        "device": device,
        "gpu": {
            "name": device,
            "memory_total_bytes": round(memory_gib * GIB),
            "nvml": {"driver_version": "580.65.06", "power_limit_w": 300.0},
        },
    }


def cpu_environment(device: str = "a CPU") -> dict[str, Any]:
    return gpu_environment(device) | {"gpu": None}


def write_point(
    folder: Path,
    point: Point,
    durations_ns: Sequence[int] = (),
    *,
    status: str = "ok",
    cause: str | None = None,
    environment: Mapping[str, Any] | None = None,
    point_changes: Mapping[str, Any] | None = None,
    outcome_changes: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    gpu_samples: Sequence[Mapping[str, Any]] = (),
    pause_ns: int = 0,
) -> Path:
    """One whole point folder `folder`. By default an `ok` point on an A40, its steps one batch each.

    pause_ns: time inside the train runtime that belongs to no step (the energy window's opening).
    """
    environment = dict(environment or gpu_environment())
    on_gpu = environment["gpu"] is not None
    family = find_family(point.model)
    config = family.config_at(family.tiny if point.preset == "tiny" else family.full, point.num_layers, point.top_k)
    if rows is None:
        rows = step_rows(durations_ns, num_queries=point.per_device_batch_size)
    work_dir = results.start_unfinished(folder.parent, folder.name)
    results.write_json(
        work_dir / results.POINT_FILE,
        {
            "point_id": folder.name,
            "recipe_hash": "0123456789abcdef",
            "schema_version": results.SCHEMA_VERSION,
            "kind": "throughput",
            "point": point.to_json(),
            "recipe": recipe(),
            "model_config": config,
            "weights": {"kind": "random"},
            "data": {"kind": "synthetic"},
            "moe": "stock",
            **(point_changes or {}),
        },
    )
    results.write_json(work_dir / results.ENVIRONMENT_FILE, environment)
    if status == "ok":
        results.write_arrow(work_dir / results.STEPS_FILE, rows, results.STEPS_SCHEMA)
    if gpu_samples:
        results.write_arrow(work_dir / results.GPU_SAMPLES_FILE, gpu_samples, results.GPU_SAMPLES_SCHEMA)
    results.write_json(
        work_dir / results.OUTCOME_FILE,
        {
            "status": status,
            "cause": cause,
            "clock": "cuda_event" if on_gpu else "host",
            "train_runtime_ns": sum(row["duration_ns"] for row in rows) + pause_ns,
            "timed_start_unix_ns": TIMED_UNIX_NS[0],
            "timed_end_unix_ns": TIMED_UNIX_NS[1],
            "gpu_energy_j": None,
            "peak_allocated_bytes": 26 * GIB if on_gpu else None,
            "peak_reserved_bytes": 28 * GIB if on_gpu else None,
            "tokenizer": "generated-wordlevel",
            "attention": "sdpa",
            "compute_dtype": "bfloat16" if on_gpu else "float32",
            **(outcome_changes or {}),
        },
    )
    results.publish(work_dir, folder)
    return folder


def link_copies(sources: Sequence[Path], target: Path, num_copies: int) -> None:
    """`num_copies` point folders under `target`, hard links to the files of `sources` in turn: fast, and no bytes."""
    for number in range(num_copies):
        source = sources[number % len(sources)]
        copy = target / f"machine{number // 100}" / f"{number:05d}-{source.name}"
        copy.mkdir(parents=True)
        for file in source.iterdir():
            os.link(file, copy / file.name)


def tiny_workload(point: Point, **changes: Any) -> Any:
    """A Workload of preset tiny, as plan.make_plan makes it without a GPU."""
    from tunescope.train.workload import Workload

    config = MIXTRAL.config_at(MIXTRAL_TINY, 2, point.top_k)
    settings = {
        "point": point,
        "recipe": recipe(),
        "model_config": config,
        "model_dir": None,
        "data_entry": None,
        "num_samples": 256,
        "max_steps": 5,
        "use_cpu": True,
    }
    return Workload(**settings | changes)


def engine_queries(workload: Any, scratch_dir: Path) -> list[list[int]]:
    """Token ids of every query as LLaMA-Factory itself reads, templates, cuts and keeps them for this workload."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from tunescope.train import engine

    arguments, _ = engine.prepare(workload, scratch_dir)
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    made = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
    return made["train_dataset"]["input_ids"]
