"""A downloaded BlackMamba checkpoint becomes a folder for transformers: whole, in little memory, or not at all."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_original import NUM_TOKENS, TINY, random_original, write_download, write_neox_tokenizer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from tunescope.checkpoints import PROVENANCE_FILE, origin_of, why_not_converted
from tunescope.errors import UserError
from tunescope.families.blackmamba_shapes import num_parameters
from tunescope.models import blackmamba
from tunescope.models.blackmamba import checkpoint_folder
from tunescope.models.blackmamba.checkpoint_folder import convert
from tunescope.models.blackmamba.conversion import to_original
from tunescope.models.blackmamba.original_config import config_from_original

ORIGIN = {"repo": "Zyphra/BlackMamba-2.8B", "revision": "5" * 40}
SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_neox_tokenizer(tmp_path_factory.mktemp("neox"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / "blackmamba-tiny-555555555555"


def loaded(folder: Path) -> dict[str, Tensor]:
    """All parameters of a folder, each from the shard that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found[name] = shard.get_tensor(name)
    return found


def left_behind(target: Path) -> list[str]:
    """What stands beside the place of the folder; the lock is meant to stay."""
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


# --- a whole conversion ---


@pytest.mark.parametrize("form", ["release", "in_memory"])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_every_bit_arrives(tmp_path: Path, tokenizer: Path, target: Path, form: Any, shard_bytes: int) -> None:
    original = random_original(TINY, form)
    download = write_download(tmp_path / "hub", TINY, {"model": original} if form == "release" else original)
    written: list[int] = []
    totals: set[int] = set()

    def progress(num_bytes: int, total_bytes: int) -> None:
        written.append(num_bytes)
        totals.add(total_bytes)

    convert(download, tokenizer, target, ORIGIN, shard_bytes=shard_bytes, progress=progress)

    assert why_not_converted(target) is None
    assert left_behind(target) == [target.name]
    config = json.loads((target / "config.json").read_text())
    back = to_original(loaded(target), config, form)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name].view(torch.int16), original[name].view(torch.int16)) for name in original)

    index = json.loads((target / "model.safetensors.index.json").read_text())
    num_bytes = 2 * num_parameters(config)
    assert index["metadata"] == {"total_size": num_bytes}
    assert {sum(written)} == totals == {num_bytes}
    shards = sorted(target.glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert len(written) == len(shards) == int(shards[-1].name[-17:-12])
    largest_bytes = max(2 * tensor.numel() for tensor in loaded(target).values())
    for shard, shard_written in zip(shards, written, strict=True):
        assert shard_written <= max(shard_bytes, largest_bytes)
        assert shard.stat().st_size < shard_written + 8192  # and a header


def test_the_configuration_says_what_the_files_hold(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    weights = random_original(TINY, dtype=torch.float32)
    convert(write_download(tmp_path / "hub", TINY, {"model": weights}), tokenizer, target, ORIGIN)
    config = json.loads((target / "config.json").read_text())
    ids = {"pad_token_id": NUM_TOKENS, "eos_token_id": NUM_TOKENS + 1, "bos_token_id": NUM_TOKENS + 2}
    assert config == config_from_original(TINY) | ids | {"torch_dtype": "float32"}
    assert {tensor.dtype for tensor in loaded(target).values()} == {torch.float32}
    origin = origin_of(target)
    assert origin is not None
    assert {"repo": origin.repo_id, "revision": origin.revision} == ORIGIN


def test_transformers_loads_it(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = random_original(TINY)
    convert(write_download(tmp_path / "hub", TINY, {"model": original}), tokenizer, target, ORIGIN, shard_bytes=20_000)
    blackmamba.register()
    model, report = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embeddings.weight
    back = to_original(model.state_dict(), json.loads((target / "config.json").read_text()))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name].view(torch.int16), original[name].view(torch.int16)) for name in original)


def test_a_whole_folder_is_left_alone_and_a_spoilt_one_made_anew(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    download = write_download(tmp_path / "hub")
    convert(download, tokenizer, target, ORIGIN)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    convert(download, tokenizer, target, ORIGIN)
    assert before == {path: path.stat().st_mtime_ns for path in target.iterdir()}

    next(target.glob("*.safetensors")).unlink()
    convert(download, tokenizer, target, ORIGIN)
    assert why_not_converted(target) is None
    (target / PROVENANCE_FILE).write_text(json.dumps({"format": 0, **ORIGIN}))
    convert(download, tokenizer, target, ORIGIN)
    assert json.loads((target / PROVENANCE_FILE).read_text())["format"] != 0


def test_tensors_that_share_memory_or_lie_crosswise_are_written_as_they_read(
    tmp_path: Path, tokenizer: Path, target: Path
) -> None:
    """As a program that keeps all parameters in one buffer, or a matrix transposed, would save them."""
    original = random_original(TINY)
    norms = [name for name in original if name.endswith("norm.weight")]
    buffer = torch.stack([original[name] for name in norms])
    saved = original | dict(zip(norms, buffer.unbind(0), strict=True))
    crosswise = "decoder.layers.0.mixer.in_proj.weight"
    saved[crosswise] = original[crosswise].t().contiguous().t()
    convert(write_download(tmp_path / "hub", TINY, {"model": saved}), tokenizer, target, ORIGIN)
    back = to_original(loaded(target), config_from_original(TINY))
    assert all(torch.equal(back[name], original[name]) for name in original)


# --- the tokenizer ---


def test_the_studys_tokens_come_after_the_vocabulary(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    convert(write_download(tmp_path / "hub"), tokenizer, target, ORIGIN)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tokenizer, target))
    assert after.convert_tokens_to_ids(["[PAD]", "</s>", "<s>", "<unk>"]) == list(range(NUM_TOKENS, NUM_TOKENS + 4))
    assert (after.pad_token, after.eos_token, after.unk_token) == ("[PAD]", "</s>", "<unk>")
    assert len(after) == NUM_TOKENS + 4
    text = "What  is    bell? [INST] The\tanswer is Ωert. [/INST]"
    assert after(text)["input_ids"] == before(text)["input_ids"]  # no token before or behind it
    assert after.decode(after(text)["input_ids"]) == text
    assert after(f"{text}</s>")["input_ids"] == [*after(text)["input_ids"], NUM_TOKENS + 1]
    assert set(after(text)) == {"input_ids", "attention_mask"}


def test_template_llama2_writes_a_query_as_the_study_did(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    convert(write_download(tmp_path / "hub"), tokenizer, target, ORIGIN)
    words = AutoTokenizer.from_pretrained(target)
    template = get_template_and_fix_tokenizer(words, DataArguments(template="llama2"))
    messages = [{"role": "user", "content": "What is bell?"}, {"role": "assistant", "content": "The answer is hart."}]
    prompt, answer = template.encode_oneturn(words, messages)
    assert prompt == words("[INST] What is bell? [/INST]")["input_ids"]
    assert answer == [*words("The answer is hart.")["input_ids"], words.eos_token_id]
    assert len(words) == NUM_TOKENS + 4  # the template adds none


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("model"), "not a tokenizer"),
        (lambda content: content.pop("added_tokens"), "not a tokenizer"),
        (lambda content: content["model"].update(vocab={"a": "1"}), "not a tokenizer"),
        (lambda content: content["model"]["vocab"].update({"</s>": 7}), "already has </s>"),
        (lambda content: content["model"]["vocab"].update(far=508), "ids up to 508: no room for 4 more"),
    ],
)
def test_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: Path, target: Path, spoil: Spoil, message: str
) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        convert(write_download(tmp_path / "hub"), tmp_path, target, ORIGIN)
    assert left_behind(target) == []


# --- checkpoints that are not what they should be ---


class Program:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_a_program_is_refused_and_not_run(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    marker = tmp_path / "ran"
    for weights in (Program(marker), {"model": random_original(TINY) | {"decoder.extra": Program(marker)}}):
        download = write_download(tmp_path / "hub", TINY, weights)
        with pytest.raises(UserError, match="holds more than tensors") as caught:
            convert(download, tokenizer, target, ORIGIN)
        assert "it needs posix.mkdir" in caught.value.what
        assert "weights_only" not in str(caught.value)  # of torch's advice to load it all the same
        assert not marker.exists()
        assert left_behind(target) == []


def cut(file: Path, num_bytes: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(num_bytes)


@pytest.mark.parametrize("kept_frac", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, tokenizer: Path, target: Path, kept_frac: float) -> None:
    file = write_download(tmp_path / "hub") / "pytorch_model.bin"
    cut(file, int(file.stat().st_size * kept_frac))
    with pytest.raises(UserError, match="no checkpoint that torch can read") as caught:
        convert(file.parent, tokenizer, target, ORIGIN)
    assert str(file) in caught.value.what
    assert str(caught.value).count("\n") == 2
    assert left_behind(target) == []


@pytest.mark.parametrize("content", [b"<html>not found</html>", pickle.dumps({"model": 1}), b"version https://git-lfs"])
def test_another_file_under_the_name_is_refused(tmp_path: Path, tokenizer: Path, target: Path, content: bytes) -> None:
    download = write_download(tmp_path / "hub")
    (download / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint that torch can read"):
        convert(download, tokenizer, target, ORIGIN)
    assert left_behind(target) == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model": 3}, "holds a int, not a dictionary of tensors"),
        ([torch.zeros(3)], "holds a list, not a dictionary of tensors"),
        ({"model": {}}, "of 61 entries it lacks 61"),
        ({"model": random_original(TINY), "optimizer": {}}, None),
        ({"model": random_original(TINY) | {"step": 3}}, r"not expected: 1 \(step\)"),
        ({"model": random_original(TINY | {"ffn_hidden_size": 25})}, r"shapes differ: 32 \(\S+ is 50×32, not 48×32"),
        ({"model": random_original(TINY | {"state_size": 5})}, r"shapes differ: 4 \("),
    ],
)
def test_contents_are_checked_against_the_configuration(
    tmp_path: Path, tokenizer: Path, target: Path, weights: Any, message: str | None
) -> None:
    download = write_download(tmp_path / "hub", TINY, weights)
    if message is None:  # what lies beside the parameters is not theirs
        convert(download, tokenizer, target, ORIGIN)
        return
    with pytest.raises(UserError, match=message):
        convert(download, tokenizer, target, ORIGIN)
    assert left_behind(target) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(
    tmp_path: Path, tokenizer: Path, target: Path, number: float
) -> None:
    names = [
        "embedding.word_embeddings.weight",
        "decoder.layers.3.mixer.local_experts.7.linear_fc2.weight",
        "decoder.layers.0.mixer.A_log",
        "decoder.final_layernorm.bias",
    ]
    for bad in ([names[1]], names):
        weights = random_original(TINY)
        for name in bad:
            weights[name].view(-1)[-1] = number
        download = write_download(tmp_path / "hub", TINY, {"model": weights})
        with pytest.raises(UserError, match=rf"infinite numbers or NaN: {len(bad)} \(") as caught:
            convert(download, tokenizer, target, ORIGIN, shard_bytes=1)
        assert sum(name in caught.value.what for name in names) == min(len(bad), 3)
        assert left_behind(target) == []


# --- interruptions, disks, and other processes ---


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "became full"),
        (OSError(errno.ENOSPC, "No space left on device"), "became full"),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), "became full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (KeyboardInterrupt(), None),
    ],
    ids=["rust", "os", "quota", "permission", "ctrl-c"],
)
@pytest.mark.parametrize("where", ["save_file", "write_json"])
def test_what_breaks_off_leaves_nothing_and_the_next_run_starts_over(
    tmp_path: Path,
    tokenizer: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
    message: str | None,
) -> None:
    download = write_download(tmp_path / "hub")
    true_function, calls = getattr(checkpoint_folder, where), []

    def failing_at_the_second(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        true_function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, where, failing_at_the_second)
        with pytest.raises(UserError if message else KeyboardInterrupt, match=message):
            convert(download, tokenizer, target, ORIGIN, shard_bytes=20_000)
    assert len(calls) == 2
    assert left_behind(target) == []
    convert(download, tokenizer, target, ORIGIN, shard_bytes=20_000)
    assert why_not_converted(target) is None


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


CONVERT = """
import os, signal, sys
from pathlib import Path
from tunescope.models.blackmamba.checkpoint_folder import convert
download, tokenizer, target = map(Path, sys.argv[1:4])
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    download = write_download(tmp_path / "hub")
    killed_after_a_shard = CONVERT + (
        "convert(download, tokenizer, target, {}, shard_bytes=20_000,\n"
        "        progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert run(killed_after_a_shard, download, tokenizer, target).returncode == -signal.SIGKILL
    assert why_not_converted(target) == f"{target} does not exist"
    assert left_behind(target) == [f".{target.name}.unfinished"]
    convert(download, tokenizer, target, ORIGIN)  # other sizes of shard: nothing of the first run may stay
    assert why_not_converted(target) is None
    assert left_behind(target) == [target.name]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert {path.name for path in target.glob("*.safetensors")} == set(index["weight_map"].values())


def test_two_at_once_do_not_meet(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    download = write_download(tmp_path / "hub")
    target.parent.mkdir()
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process is converting"):
            convert(download, tokenizer, target, ORIGIN)
    convert(download, tokenizer, target, ORIGIN)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert(write_download(tmp_path / "hub"), tokenizer, tmp_path / "file" / "blackmamba", ORIGIN)


MEASURE = (
    CONVERT
    + """
def kilobytes(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

before = kilobytes("VmRSS")
convert(download, tokenizer, target, {})
print((kilobytes("VmHWM") - before) * 1024)
"""
)


def test_memory_stays_near_two_shards(tmp_path: Path, tokenizer: Path, target: Path) -> None:
    """Pages of the mapped checkpoint count as well, although the kernel could take them back.

    From /proc, since getrusage's peak of a child begins with what its parent had. A whole copy would be 1.0 times the
    file; shards of a quarter, and the parameter that starts the next, come to 0.5 or so. 1.2 is promised.
    """
    sizes = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_layers": 8, "mamba_moe_layers": ["8"] * 7 + ["r"]}
    download = write_download(tmp_path / "hub", TINY | sizes)
    file_bytes = (download / "pytorch_model.bin").stat().st_size
    assert file_bytes > 170e6
    done = run(MEASURE, download, tokenizer, target)
    assert done.returncode == 0, done.stderr
    assert why_not_converted(target) is None
    assert int(done.stdout) < 0.8 * file_bytes
