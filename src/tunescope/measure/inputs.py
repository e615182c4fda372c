"""Which data and which weights a launcher's flags stand for: found, checked and described before anything starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunescope import checkpoints, config, paper
from tunescope import dataset_files as files
from tunescope.config import Point
from tunescope.errors import UserError
from tunescope.families.family import MAMBA_SSM, REFERENCE, SCANS, TRITON, Family
from tunescope.families.weight_files import check_weight_files
from tunescope.train import recipe as recipes

# Of a model folder: whatever decides how many tokens a query has, or which weights are meant.
_SMALL_FILES = (
    "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
MAMBA_SSM_MODULES = ("mamba_ssm", "causal_conv1d")
DTYPES = ("bfloat16", "float16", "float32")  # of weights, by their names in a config.json
# Taps of a convolution that Triton's kernel and causal-conv1d take.
CONV_TAPS = (2, 3, 4)
MIN_BATCHES = 4  # in a training set, so that an epoch is not mostly its own end


@dataclass(frozen=True)
class Data:
    """What a point trains on. entry: the engine's description of a file, None for synthetic queries.

    facts: what the point's folder says of it. num_queries: rows of the file, None where any number can be made.
    """

    entry: dict[str, Any] | None
    facts: dict[str, Any]
    num_queries: int | None


def study_files() -> dict[str, Path]:
    """Data set name -> the study's file, where it lies in data/."""
    data_dir = recipes.recipe_folder() / "data"
    return {name: data_dir / file for name, file in files.REAL_FILES.items() if (data_dir / file).is_file()}


def given_files(given: Sequence[str]) -> dict[str, Path]:
    """Data set name -> file, from `--dataset FILE` or `NAME=FILE`. Raises UserError for a name that would mislead."""
    found: dict[str, Path] = {}
    for item in given:
        name, separator, path = item.partition("=")
        is_named = bool(separator) and "/" not in name  # a path may hold a '=' too
        file = Path(path if is_named else item).expanduser()
        if not is_named:
            name = files.dataset_name(file)
            if name in files.REAL_FILES and file.name != files.REAL_FILES[name]:
                raise UserError(
                    f"{file} would be taken for the paper's data set {name!r} by its name, and compared with it",
                    cure=f"write --dataset {name}={file} if it is that, --dataset my_{name}={file} if not",
                )
        if name in found:
            raise UserError(
                f"{found[name]} and {file} both have the name {name!r}", cure="name one of them: --dataset NAME=FILE"
            )
        found[name] = file
    return found


def points_for_files(points: list[Point], given: dict[str, Path]) -> list[Point]:
    """The figure's points; where a file is not of the paper's, the figure's first group (CS, or random tokens) on it
    with its own lengths, and on what else is given."""
    own = [name for name in given if name not in config.PAPER_DATASETS]
    if not own:
        return points
    return [point for point in points if point.dataset in given] + [
        replace(point, dataset=name, seq_len_tokens=None)
        for name in own
        for point in points
        if point.dataset == points[0].dataset
    ]


def data_of_points(points: Iterable[Point], named: dict[str, Path]) -> dict[Point, Data]:
    """What each point trains on; every file is read and checked once. Raises UserError."""
    described: dict[str, Data] = {}
    found = {}
    for point in points:
        if point.seq_len_tokens is not None:
            found[point] = Data(None, {"kind": "synthetic", "lengths": "fixed"}, None)
            continue
        if point.dataset not in described:
            described[point.dataset] = _described(point.dataset, named.get(point.dataset))
        found[point] = described[point.dataset]
    return found


def probe_files(named: dict[str, Path]) -> dict[str, Path]:
    """Files of the paper's data sets, whose queries are sent through the routers before and after training."""
    return {name: file for name, file in named.items() if name in config.PAPER_DATASETS}


def file_facts(file: Path) -> dict[str, Any]:
    return {"kind": "file", "name": file.name, "sha256": files.sha256_hex(file)}


def _described(dataset: str, file: Path | None) -> Data:
    if file is not None:
        checked = files.check_dataset_file(file)
        return Data(checked.entry, file_facts(file), checked.num_queries)
    try:
        paper.length_histogram(dataset)
    except KeyError:
        raise UserError(
            f"there is no data for data set {dataset!r}",
            cause=f"synthetic queries exist only for {' and '.join(config.PAPER_DATASETS)}",
            cure=f"give a file: --dataset {dataset}=FILE",
        ) from None
    return Data(None, {"kind": "synthetic", "lengths": "histogram of the paper's Figure 2"}, None)


def num_training_queries(point: Point, data: Data, asked: int | None, usual: int) -> int:
    """Size of the training set: what was asked for, else `usual` or a few batches, as far as the data goes.

    A batch is never larger than the set, which would train less than its row says. Raises UserError where fewer than
    two steps would come of it: one warms up and one is timed.
    """
    batch = point.per_device_batch_size
    if asked is not None:
        if data.num_queries is not None and asked > data.num_queries:
            raise UserError(f"--queries {asked} is more than the {data.num_queries} in the file of {point.dataset}")
        if asked <= batch:
            raise UserError(
                f"--queries {asked} is one step at batch {batch}; at least two are needed",
                cause="the first step only warms up",
                cure=f"use --queries {2 * batch} or more, or a smaller batch",
            )
        return asked
    wanted = max(usual, MIN_BATCHES * batch)
    if data.num_queries is None:
        return wanted
    if data.num_queries < 2 * batch:
        raise UserError(
            f"the file of {point.dataset} has {data.num_queries} queries: less than two batches of {batch}",
            cure="use more data or a smaller batch",
        )
    return min(wanted, data.num_queries)


def find_model_dir(model: str, preset: str, model_path: Path | None) -> Path | None:
    """The folder of weights to use, None for random ones. Raises UserError for a path that is not a model."""
    if model_path is not None:
        checkpoints.check_model_dir(model_path)
        return model_path
    if preset == "tiny" or model not in checkpoints.REPOS:
        return None
    return checkpoints.find_checkpoint(model)


def refuse_unconverted(model: str) -> None:
    """Raises UserError where a checkpoint was fetched and lacks only its conversion: random weights would surprise."""
    if model in checkpoints.REPOS and (found := checkpoints.find_unconverted(model)) is not None:
        raise UserError(
            f"the checkpoint of {model} is downloaded and not converted: {found}",
            cure=f"python3 model_download.py --model {model} converts it; for random weights name a folder that has "
            "just a config.json: --model-path FOLDER",
        )


def checked_config(model_dir: Path, family: Family) -> dict[str, Any]:
    """A folder's config.json, which must describe a model of the family. Raises UserError."""
    content = checkpoints.read_json(model_dir / "config.json")
    model_type, experts = content.get("model_type"), content.get(family.experts_key)
    if model_type != family.model_type or experts != family.num_experts:
        raise UserError(
            f"{model_dir} holds a model of type {model_type!r} with {experts} experts",
            cure=f"this launcher needs type {family.model_type} with {family.num_experts} experts",
        )
    for key in family.size_keys:
        if type(content.get(key)) is not int or content[key] < 1:
            raise UserError(
                f"{model_dir / 'config.json'} says {key}: {content.get(key)!r}; it must be a whole number from 1",
                cure="take the config.json that came with the model",
            )
    dtype = content.get("dtype", content.get("torch_dtype"))  # transformers wrote the second until 4.56
    if dtype not in (None, *DTYPES):
        raise UserError(
            f"{model_dir / 'config.json'} says dtype: {dtype!r}; it must be one of {', '.join(DTYPES)}",
            cure="take the config.json that came with the model",
        )
    try:
        family.check_config(content)
    except UserError as error:
        raise UserError(f"{model_dir}: {error.what}", cause=error.cause, cure=error.cure) from None
    check_weight_files(model_dir, family, content)
    return content


def moe_path(family: Family, wanted: str) -> str:
    """The path of the experts that the flag --moe stands for. Raises UserError for one that the model has not."""
    if wanted == "auto":
        return family.moe_path
    if wanted not in family.moe_paths:
        raise UserError(
            f"--moe {wanted}: {family.name} has no such path", cure=f"use one of auto, {', '.join(family.moe_paths)}"
        )
    return wanted


def check_recompute(family: Family, wanted: str, recipe: dict[str, Any], *, is_grouped: bool) -> None:
    """Raises UserError for a --recompute that is unknown or that the model cannot follow."""
    if wanted not in ("auto", "none"):
        raise UserError(f"--recompute {wanted}: there is no such setting", cure="use auto or none, or drop it")
    if recipe.get("disable_gradient_checkpointing"):
        raise UserError(
            f"--recompute says how much to recompute, and the recipe of {family.name} recomputes nothing",
            cure="drop --recompute",
        )
    if wanted == "auto" and not is_grouped:
        raise UserError(
            "--recompute auto chooses layer by layer, which the stock path cannot",
            cure="add --moe grouped, or use --recompute none",
        )


def available_scan(family: Family, wanted: str, *, use_gpu: bool) -> str | None:
    """The selective scan that the flag --scan stands for on this machine; None for a model that has none.

    Raises UserError for one that is unknown, or that cannot run here.
    """
    if not family.has_scan:
        if wanted != "auto":
            raise UserError(f"--scan {wanted}: {family.name} has no selective scan", cure="drop --scan")
        return None
    if wanted not in ("auto", *SCANS):
        raise UserError(f"--scan {wanted} is unknown", cure=f"use one of auto, {', '.join(SCANS)}")
    if wanted == "auto":
        return TRITON if use_gpu else REFERENCE
    if wanted != REFERENCE and not use_gpu:
        raise UserError(
            f"--scan {wanted} needs a GPU and none was found",
            cure=f"use --scan {REFERENCE} (or auto), or see `python3 -m tunescope doctor`",
        )
    if wanted == MAMBA_SSM and (lacking := [name for name in MAMBA_SSM_MODULES if find_spec(name) is None]):
        raise UserError(
            f"--scan {MAMBA_SSM} needs packages that are not installed: {', '.join(lacking)}",
            cause="they are an optional extra, built for one version of torch and CUDA",
            cure="pip install -r requirements/cuda.txt, or use --scan triton, which needs neither",
        )
    return wanted


def check_taps(scan: str | None, model_config: dict[str, Any]) -> None:
    """Raises UserError where the kernels that come with a scan cannot run the model's convolution."""
    if scan in (TRITON, MAMBA_SSM) and model_config["conv_kernel"] not in CONV_TAPS:
        raise UserError(
            f"the model's convolution has {model_config['conv_kernel']} taps, and that of --scan {scan} takes "
            f"{CONV_TAPS[0]} to {CONV_TAPS[-1]}",
            cure=f"use --scan {REFERENCE}, which is slow",
        )


def weights_facts(model_dir: Path | None) -> dict[str, Any]:
    """What the point's folder says of the weights: random, or which checkpoint, by what tells two apart quickly.

    Sizes and small files, not the weights themselves: two checkpoints of one shape and tokenizer look the same, unless
    they are Hub snapshots, whose name is their commit.
    """
    if model_dir is None:
        return {"kind": "random"}
    facts: dict[str, Any] = {"kind": "random"}
    if checkpoints.holds_weights(model_dir):
        facts["kind"] = "checkpoint"
        if (origin := checkpoints.origin_of(model_dir)) is not None:
            facts["repo"], facts["revision"] = origin.repo_id, origin.revision
        weights = [path for path in model_dir.iterdir() if checkpoints.is_weight_file(path.name)]
        facts["weight_bytes"] = sum(path.stat().st_size for path in weights)
    for name in _SMALL_FILES:
        if (model_dir / name).is_file():
            facts[f"{name}_sha256"] = files.sha256_hex(model_dir / name)
    return facts
