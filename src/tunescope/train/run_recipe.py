"""`tunescope train RECIPE`: the engine on a recipe as it stands, in this process, with this project's models known."""

import os
from pathlib import Path
from typing import Any

from tunescope.errors import UserError


def run_recipe(settings: dict[str, Any], recipe: Path) -> None:
    """Trains what the recipe says and saves what the engine saves.

    `dataset_dir` counts from the recipe's folder when it is relative, `model_name_or_path` may be a Hub name already
    in HF_HOME, a folder with weights, or a folder with only a config.json (random weights).
    """
    # Before the engine's import, which reads it: a recipe never waits for a hub.
    if Path(str(settings.get("model_name_or_path", ""))).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from llamafactory.train.tuner import run_exp

    from tunescope.models import mixtral
    from tunescope.train.engine import available_attention, engine_errors

    mixtral.register()
    arguments = dict(settings)
    data_dir = Path(str(arguments.get("dataset_dir", "data")))
    if not data_dir.is_absolute():
        arguments["dataset_dir"] = str(recipe.resolve().parent / data_dir)
    _check_data(arguments)
    arguments["flash_attn"] = available_attention(str(arguments.get("flash_attn", "auto")), use_cpu=False)
    with engine_errors():
        run_exp(arguments)


def _check_data(arguments: dict[str, Any]) -> None:
    info = Path(arguments["dataset_dir"]) / "dataset_info.json"
    if not info.is_file():
        raise UserError(
            f"there is no {info}",
            cause="dataset_dir counts from the recipe's folder unless it is absolute",
            cure="give dataset_dir=FOLDER with LLaMA-Factory's dataset_info.json in it",
        )
