"""Which checkpoints the study uses, and what of them this machine holds. No network, no torch.

The table below is the one place that names a Hub repository, its commit and the files wanted.
Snapshots lie where huggingface_hub puts them: HUB_CACHE/models--OWNER--NAME/snapshots/COMMIT.

BlackMamba's is in a form of its own, which transformers cannot load: what trains is the folder made of it once, in
HF_HOME/tunescope/NAME-COMMIT (the first 12 digits). Without that folder the download alone is not found.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunescope.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HubRepo:
    """A Hub repository at one commit, and the files of it that are wanted.

    patterns: shell-style, against the file's path in the repository.
    required: without these a snapshot is no use; weights are checked apart from them.
    """

    repo_id: str
    revision: str
    patterns: tuple[str, ...]
    required: tuple[str, ...]
    holds_weights: bool


# The patterns leave out second copies of the weights (Mixtral's consolidated.*.pt) and gpt-neox's
# own weights: BlackMamba uses only its tokenizer.
MIXTRAL = HubRepo(
    repo_id="mistralai/Mixtral-8x7B-v0.1",
    revision="fc7ac94680e38d7348cfa806e51218e6273104b0",  # head of main since 2025-07-24
    patterns=(
        "config.json",
        "generation_config.json",
        "model-*.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer*",
    ),
    required=("config.json", "tokenizer.json", "tokenizer_config.json"),
    holds_weights=True,
)
BLACKMAMBA = HubRepo(
    repo_id="Zyphra/BlackMamba-2.8B",
    revision="521a77772f0d4052fd9846846471d0d2517739d2",  # the commit the study's launchers name
    patterns=("config.json", "pytorch_model.bin"),
    required=("config.json", "pytorch_model.bin"),
    holds_weights=True,
)
GPT_NEOX_TOKENIZER = HubRepo(
    repo_id="EleutherAI/gpt-neox-20b",
    revision="c292233c833e336628618a88a648727eb3dff0a7",
    patterns=(
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ),
    required=("tokenizer.json", "tokenizer_config.json"),
    holds_weights=False,
)

# The checkpoint first; the tokenizer is in the last one.
REPOS: dict[str, tuple[HubRepo, ...]] = {
    "mixtral": (MIXTRAL,),
    "blackmamba": (BLACKMAMBA, GPT_NEOX_TOKENIZER),
}
CONVERTED = frozenset({"blackmamba"})  # trained from a folder made of the download, see above
CONVERTED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# In a converted folder: where it comes from, and which way of converting made it. A new way gets a new number, and
# folders of the old one are made anew.
PROVENANCE_FILE = "tunescope.json"
CONVERSION_FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """The Hub repository and commit that a model folder comes from."""

    repo_id: str
    revision: str


WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def repos_of(model: str) -> tuple[HubRepo, ...]:
    """The repositories a model is made of. Raises UserError for a model not in the table."""
    if model not in REPOS:
        raise UserError(
            f"There is no checkpoint for model {model!r}.",
            cause="the table in src/tunescope/checkpoints.py does not have it.",
            cure=f"choose from {', '.join(REPOS)}.",
        )
    return REPOS[model]


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps repositories, by its own rules.

    HF_HUB_CACHE, else HF_HOME/hub, else huggingface/hub under XDG_CACHE_HOME or ~/.cache.
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return _expanded(environ[name])
    if environ.get("HF_HOME"):
        return _expanded(environ["HF_HOME"]) / "hub"
    return _expanded(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def repo_folder(cache: Path, repo_id: str) -> Path:
    """A repository's folder in the Hub cache."""
    return cache / ("models--" + repo_id.replace("/", "--"))


def snapshot_folder(cache: Path, repo: HubRepo, commit: str | None = None) -> Path:
    """Where huggingface_hub puts a commit of a repository, the pinned one if none is named."""
    return repo_folder(cache, repo.repo_id) / "snapshots" / (commit or repo.revision)


def converted_folder(cache: Path, repo: HubRepo, commit: str | None = None) -> Path:
    """Where the folder made of a commit lies, the pinned one if none is named.

    On the disk of the Hub cache, beside it where it is HF_HOME/hub; in it where HF_HUB_CACHE names another folder,
    whose parent is not ours to fill.
    """
    home = cache.parent if cache.name == "hub" else cache
    return home / "tunescope" / f"{_short_name(repo)}-{(commit or repo.revision)[:12]}"


def find_checkpoint(model: str, cache: Path | None = None) -> Path | None:
    """The folder of a model's complete checkpoint, which transformers can load, or None.

    The pinned commit comes first; then any other complete one, `main` before the rest, so that
    weights fetched by another tool are not fetched again. Where it comes from: :func:`origin_of`.
    """
    repo = repos_of(model)[0]
    cache = cache or hub_cache()
    if model not in CONVERTED:
        return _find_snapshot(repo, cache)
    folders = [converted_folder(cache, repo, commit) for commit in _commits(repo, cache)]
    folders += sorted(folders[0].parent.glob(f"{_short_name(repo)}-*"))  # also where the download was deleted
    return next((folder for folder in folders if why_not_converted(folder) is None), None)


def find_unconverted(model: str, cache: Path | None = None) -> Path | None:
    """The complete download of a model that cannot be trained only because it was not converted yet; else None."""
    cache = cache or hub_cache()
    if model not in CONVERTED or find_checkpoint(model, cache):
        return None
    return _find_snapshot(repos_of(model)[0], cache)


def origin_of(folder: Path) -> Origin | None:
    """Where a snapshot in a Hub cache, or a folder converted from one, comes from; None for any other folder."""
    if folder.parent.name == "snapshots":
        return Origin(folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name)
    if not _holds(folder, PROVENANCE_FILE):
        return None
    provenance = read_json(folder / PROVENANCE_FILE)
    return Origin(str(provenance.get("repo")), str(provenance.get("revision")))


def why_incomplete(folder: Path, repo: HubRepo) -> str | None:
    """What a snapshot lacks, in words; None if it is complete.

    Names and non-zero sizes are enough: huggingface_hub names a file only once it is whole.
    """
    return _why_incomplete(folder, repo.required, holds_weights=repo.holds_weights)


def why_not_converted(folder: Path) -> str | None:
    """What a converted folder lacks, in words; None if it is whole. It gets its name only then; files can go later."""
    if reason := _why_incomplete(folder, (*CONVERTED_FILES, PROVENANCE_FILE), holds_weights=True):
        return reason
    try:
        made_by = read_json(folder / PROVENANCE_FILE).get("format")
    except UserError as error:
        return error.what.rstrip(".")
    return None if made_by == CONVERSION_FORMAT else f"{folder} was made by another version of tunescope"


def _why_incomplete(folder: Path, required: tuple[str, ...], *, holds_weights: bool) -> str | None:
    if not folder.is_dir():
        return f"{folder} does not exist"
    for name in required:
        if not _holds(folder, name):
            return f"{folder} has no {name}"
    if not holds_weights:
        return None
    try:
        read_json(folder / "config.json")
        shards = _weight_files(folder)
    except UserError as error:
        return error.what.rstrip(".")
    if shards is None:
        return f"{folder} has no weights ({', '.join(WEIGHT_INDEXES + WEIGHT_FILES)})"
    lacking = [name for name in shards if not _holds(folder, name)]
    return _lacks(folder, lacking, shards) if lacking else None


def check_model_dir(folder: Path) -> None:
    """Raise UserError unless a folder named by the user can be loaded as a model.

    It needs a config.json that is a JSON object, and every shard that its weight index names. A
    folder with a config and no weights at all passes: it describes a model to be filled at random.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder.",
            cause="the model path is misspelt, or it is a Hub name, which is not looked up here.",
            cure="give the folder that holds config.json, or fetch the checkpoint with `python model_download.py`.",
        )
    if not _holds(folder, "config.json"):
        raise UserError(
            f"{folder} has no config.json.",
            cause="it is the folder above or below the model's, or the download did not finish.",
            cure="give the folder that holds config.json (in the Hub cache: snapshots/<commit>).",
        )
    if "mamba_moe_layers" in read_json(folder / "config.json"):
        raise UserError(
            f"{folder} holds BlackMamba in its original form, which nothing here trains.",
            cause="it is the download, or a checkpoint of the original's own program.",
            cure="python3 model_download.py --model blackmamba converts the download, and names the folder to give.",
        )
    shards = _weight_files(folder) or []
    if not shards and (stray := sorted(p.name for p in folder.iterdir() if _looks_like_weights(p.name))):
        raise UserError(
            f"{folder} has weights that cannot be loaded: {', '.join(stray[:3])}.",
            cause="they are in another format, or their index file is missing.",
            cure="give the folder of safetensors files with their index; a folder with a config.json alone gets random "
            "weights.",
        )
    lacking = [name for name in shards if not _holds(folder, name)]
    if lacking:
        raise UserError(
            f"{_lacks(folder, lacking, shards)}.",
            cause="the download or the copy of this model did not finish.",
            cure="fetch it again: what is already there is kept.",
        )


def is_weight_file(name: str) -> bool:
    """Whether a file of this name belongs to a model's weights: a shard, the single file, or their index."""
    return name in WEIGHT_INDEXES + WEIGHT_FILES or bool(
        re.fullmatch(r"(model|pytorch_model)-.*\.(safetensors|bin)", name)
    )


def _looks_like_weights(name: str) -> bool:
    return is_weight_file(name) or bool(re.fullmatch(r".*\.safetensors|consolidated.*|.*\.pth|.*\.gguf", name))


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights that can be loaded: an index, or the single file. Raises UserError for an index
    that cannot be one."""
    return _weight_files(folder) is not None


def _find_snapshot(repo: HubRepo, cache: Path) -> Path | None:
    folders = (snapshot_folder(cache, repo, commit) for commit in _commits(repo, cache))
    return next((folder for folder in folders if why_incomplete(folder, repo) is None), None)


def _commits(repo: HubRepo, cache: Path) -> list[str]:
    """The pinned commit, that of `main`, and all others of which something was fetched."""
    base = repo_folder(cache, repo.repo_id)
    main = base / "refs" / "main"
    commits = [repo.revision, main.read_text().strip() if main.is_file() else ""]
    if (base / "snapshots").is_dir():
        commits += sorted(folder.name for folder in (base / "snapshots").iterdir())
    return [commit for commit in commits if commit]


def _short_name(repo: HubRepo) -> str:
    return repo.repo_id.rpartition("/")[2].lower()


def _weight_files(folder: Path) -> list[str] | None:
    """Names of the weight files a folder should hold; None if it speaks of no weights.

    They are those of its index, else the single file. Raises UserError for a senseless index.
    """
    for index_name in WEIGHT_INDEXES:
        path = folder / index_name
        if not path.is_file():
            continue
        weight_map = read_json(path).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        # A shard lies beside its index. Anything else is not ours to open.
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise UserError(
                f"{path} is not a weight index.",
                cause="its weight_map is missing, empty, or names files outside its folder.",
                cure="fetch the model again from where it came.",
            )
        return sorted(names)
    return next(([name] for name in WEIGHT_FILES if _holds(folder, name)), None)


def _lacks(folder: Path, lacking: list[str], shards: list[str]) -> str:
    shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    return f"{folder} lacks {len(lacking)} of {len(shards)} weight files: {shown}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that came with a model or a data set. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(
            f"{path} cannot be read as JSON ({error}).",
            cause="the file is cut short, or a web page saved under its name.",
            cure="fetch it again.",
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds no JSON object.",
            cause="it is another file under this name.",
            cure="fetch it again.",
        )
    return content


def _holds(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size > 0  # false for a link whose target is gone


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()
