"""From a downloaded BlackMamba checkpoint to a folder that AutoModelForCausalLM and AutoTokenizer load.

Shard by shard, so that memory stays near the size of one shard; under another name until it is whole.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tunescope.checkpoints import (
    CONVERSION_FORMAT,
    PROVENANCE_FILE,
    WEIGHT_FILES,
    WEIGHT_INDEXES,
    read_json,
    why_not_converted,
)
from tunescope.errors import UserError
from tunescope.families.blackmamba_shapes import parameter_shapes
from tunescope.models.blackmamba.conversion import assembled, check_original, counted
from tunescope.models.blackmamba.original_config import config_from_original
from tunescope.models.blackmamba.original_keys import original_names
from tunescope.models.blackmamba.tokenizer import write_tokenizer
from tunescope.results import write_json

CONFIG, WEIGHTS, INDEX = "config.json", WEIGHT_FILES[1], WEIGHT_INDEXES[0]
# Twice a shard is in memory at once, as pages of the checkpoint and as stacked experts: 1 GB for the 5.6 of 2.8B.
SHARD_BYTES = 500_000_000
MIN_SHARDS = 4  # keeps that below the size of a small model
Progress = Callable[[int, int], object]


def convert(
    download: Path,
    tokenizer: Path,
    target: Path,
    origin: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda num_bytes, total_bytes: None,
) -> None:
    """Makes `target` from a checkpoint in the original's form; does nothing if it is there and whole.

    download: folder with pytorch_model.bin and config.json. tokenizer: folder with GPT-NeoX-20B's tokenizer.json.
    origin: where both come from, kept in the folder. progress: called after each shard with its bytes and all bytes.
    Raises UserError, and leaves nothing behind, if the checkpoint is not what its configuration says, or the disk does
    not take it. What an earlier, killed attempt left is removed.
    """
    config = config_from_original(read_json(download / CONFIG))
    unfinished = target.parent / f".{target.name}.unfinished"
    with _write_errors(target), _only_writer(target):
        shutil.rmtree(unfinished, ignore_errors=True)
        if why_not_converted(target) is None:
            return
        unfinished.mkdir()
        try:
            token_ids = write_tokenizer(tokenizer, unfinished, config)
            dtype = _write_weights(download / WEIGHTS, config, unfinished, shard_bytes, progress)
            config |= {f"{role}_token_id": token_ids[role] for role in ("bos", "eos", "pad")}
            config["torch_dtype"] = str(dtype).removeprefix("torch.")
            write_json(unfinished / CONFIG, config)
            write_json(unfinished / PROVENANCE_FILE, {"format": CONVERSION_FORMAT, **origin})
            shutil.rmtree(target, ignore_errors=True)  # incomplete, or of another format
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def read_original(path: Path) -> dict[str, Tensor]:
    """The state dict in a pytorch_model.bin of either form, mapped from the file: nothing is read before it is used.

    Only tensors and plain containers are unpickled. Raises UserError for a file that holds anything else or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is damaged, and was not loaded{_met_by(error)}.",
            cause="a pickle may hold programs; those are never run here.",
            cure="fetch the file again from where the checkpoint was published.",
        ) from None
    except Exception as error:  # a damaged archive fails in whatever part of torch meets it first
        raise UserError(
            f"{path} is no checkpoint that torch can read ({_first_line(error)}).",
            cause="the file is cut short or damaged, or of another kind (a web page, a Git LFS pointer).",
            cure="delete it and fetch it again: python3 model_download.py --model blackmamba",
        ) from None
    state_dict = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state_dict, dict):
        raise UserError(
            f"{path} holds a {type(state_dict).__name__}, not a dictionary of tensors.",
            cause="it is another file under this name.",
            cure="fetch the file again from where the checkpoint was published.",
        )
    return state_dict


def _write_weights(
    path: Path, config: Mapping[str, Any], folder: Path, shard_bytes: int, progress: Progress
) -> torch.dtype:
    """Writes the shards and their index. Returns the dtype of all of them."""
    form = check_original(state_dict := read_original(path), config)
    dtype = next(iter(state_dict.values())).dtype
    del state_dict
    parts = original_names(config, form)
    num_bytes = {name: dtype.itemsize * torch.Size(shape).numel() for name, shape in parameter_shapes(config).items()}
    total_bytes = sum(num_bytes.values())
    shards = _shards(num_bytes, min(shard_bytes, total_bytes // MIN_SHARDS))
    weight_map: dict[str, str] = {}
    not_finite: list[str] = []
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        not_finite += _write_shard(path, {name: parts[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
        progress(sum(num_bytes[name] for name in names), total_bytes)
    if not_finite:
        raise UserError(
            f"{path} has entries with infinite numbers or NaN: {counted(not_finite)}.",
            cause="the file is damaged, or the training that made it diverged.",
            cure="delete it and fetch it again, or take an earlier checkpoint.",
        )
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtype


def _shards(num_bytes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Parameters in order, as many in a shard as fit; one that is larger than a shard gets its own."""
    shards: list[list[str]] = []
    filled_bytes = 0
    for name, size_bytes in num_bytes.items():
        if not shards or filled_bytes + size_bytes > shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards


def _write_shard(path: Path, parts: Mapping[str, tuple[str, ...]], file: Path) -> list[str]:
    """Writes some of our parameters. Returns the names, in the original, of those that are not finite.

    The checkpoint is mapped anew for each shard: the pages read for the last one go with its mapping.
    """
    original = read_original(path)
    not_finite = [name for names in parts.values() for name in names if not _is_finite(original[name])]
    shard = {name: _on_its_own(assembled(original, name, names)) for name, names in parts.items()}
    save_file(shard, file, metadata={"format": "pt"})
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return not_finite


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which NaN passes into: ten times as fast as isfinite, and takes no memory."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _on_its_own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that shares its storage with no other, as safetensors demands."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Keeps other processes from making the same folder. The kernel drops the lock when its holder dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is converting into {target}.",
                cause="two downloads of one model run at once.",
                cure="wait for it, and run this again.",
            ) from None
        yield


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Says what a failed write means. safetensors writes from Rust and reports by an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "quota" in str(error).lower():
            raise UserError(
                f"The disk of {target.parent} became full while converting to {target.name}. Nothing of it was kept.",
                cause="something else took the space, or a quota is smaller than the disk.",
                cure="free some space or set HF_HOME to a larger disk, and run this again: the download is kept.",
            ) from error
        raise UserError(
            f"{target} cannot be written ({_first_line(error)}).",
            cause="HF_HOME (or HF_HUB_CACHE) is another user's, read-only, or on a disk that knows no locks.",
            cure="set HF_HOME to a folder of your own.",
        ) from error


def _met_by(error: UnpicklingError) -> str:
    """The foreign object that torch names. Its advice, to load the file all the same, is left out."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f": it needs {found[1]}" if found else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
