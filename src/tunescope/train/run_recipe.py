"""`tunescope train RECIPE`: the engine on a recipe as it stands, in this process, with this project's models known."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunescope import checkpoints
from tunescope.errors import UserError
from tunescope.families import family_of
from tunescope.families.weight_files import check_weight_files
from tunescope.gpus import list_gpus, show_only


def run_recipe(settings: dict[str, Any], recipe: Path) -> None:
    """Trains what the recipe says and saves what the engine saves.

    `dataset_dir` counts from the recipe's folder when it is relative. `model_name_or_path` may be a folder with
    weights, one with only a config.json (random weights, a generated tokenizer), or a name in the Hub cache.
    Raises UserError for data or a checkpoint that is not there, before anything heavy is imported.
    """
    arguments = dict(settings)
    arguments["dataset_dir"] = str(recipe.resolve().parent / str(arguments.get("dataset_dir", "data")))
    _check_data(arguments)
    model_dir = _local_model(str(arguments.get("model_name_or_path", "")))

    gpus = list_gpus().gpus
    if len(gpus) > 1 and "LOCAL_RANK" not in os.environ:  # the engine refuses several without torchrun
        print(f"tunescope: of {len(gpus)} GPUs the first is used (CUDA_VISIBLE_DEVICES names another)", file=sys.stderr)
        show_only(gpus[0])

    from llamafactory.train.tuner import run_exp

    from tunescope.models import folder
    from tunescope.train.engine import available_attention, cpu_arguments, engine_errors, has_gpu, register

    register()
    use_cpu = bool(arguments.get("use_cpu")) or not has_gpu()
    if use_cpu:
        print("tunescope: no GPU is used: training on the CPU in fp32", file=sys.stderr)
        arguments |= cpu_arguments()
    arguments["flash_attn"] = available_attention(str(arguments.get("flash_attn", "auto")), use_cpu=use_cpu)
    with tempfile.TemporaryDirectory(prefix="tunescope-") as scratch:
        if model_dir is not None:
            arguments["model_name_or_path"] = str(model_dir)  # saved adapters name it as their base
            if not folder.holds_tokenizer(model_dir):
                config, linked = checkpoints.read_json(model_dir / folder.CONFIG_FILE), Path(scratch) / "model"
                folder.build_model_folder(linked, config, model_dir, int(arguments.get("cutoff_len", 2048)))
                arguments["model_name_or_path"] = str(linked)
        try:
            with engine_errors():
                run_exp(arguments)
        except (ValueError, TypeError) as error:  # how the engine refuses a setting, wherever it first meets it
            raise UserError(
                f"LLaMA-Factory refuses this recipe: {error}",
                cause="a setting has a value it cannot use, or the data does not fit its description",
                cure="compare the recipe with those in LLaMA-Factory/",
            ) from error


def _local_model(name: str) -> Path | None:
    """The folder a model name stands for here; None leaves the name to the engine (a Hub name of another model)."""
    path = Path(name).expanduser()
    if path.is_dir():
        checkpoints.check_model_dir(path)
        content = checkpoints.read_json(path / "config.json")
        check_weight_files(path, family_of(content), content)
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise UserError(
            f"there is no folder {name}",
            cause="model_name_or_path is misspelt, or counts from another folder",
            cure="name the folder that holds config.json",
        )
    for model, repos in checkpoints.REPOS.items():
        if repos[0].repo_id == name:
            found = checkpoints.find_checkpoint(model)
            if found is None:
                is_there = checkpoints.find_unconverted(model) is not None
                lacks = "downloaded and not converted" if is_there else "not in the Hub cache"
                raise UserError(
                    f"the checkpoint {name} is {lacks}",
                    cure=f"python3 model_download.py --model {model}; or name a folder: model_name_or_path=FOLDER",
                )
            return found
    return None


def _check_data(arguments: dict[str, Any]) -> None:
    """The files of the recipe's data sets must be there; data sets that the engine fetches itself are its affair."""
    data_dir = Path(arguments["dataset_dir"])
    info_file = data_dir / "dataset_info.json"
    if not info_file.is_file():
        raise UserError(
            f"there is no {info_file}",
            cause="dataset_dir counts from the recipe's folder unless it is absolute",
            cure="give dataset_dir=FOLDER with LLaMA-Factory's dataset_info.json in it",
        )
    info = checkpoints.read_json(info_file)
    for name in str(arguments.get("dataset", "")).split(","):
        entry = info.get(name.strip())
        if not isinstance(entry, dict):
            raise UserError(f"data set {name!r} is not in {info_file}", cure=f"use one of: {', '.join(info)}")
        file = entry.get("file_name")
        if file is not None and not (data_dir / str(file)).exists():
            raise UserError(
                f"the data file {data_dir / str(file)} is not there",
                cause="the study's data sets are not part of this project",
                cure="put the file there, or name another with dataset=NAME dataset_dir=FOLDER",
            )
