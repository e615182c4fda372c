"""What counts as a complete checkpoint, over small made-up Hub caches."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tunescope.checkpoints import (
    BLACKMAMBA,
    CONVERSION_FORMAT,
    GPT_NEOX_TOKENIZER,
    MIXTRAL,
    PROVENANCE_FILE,
    REPOS,
    HubRepo,
    Origin,
    check_model_dir,
    converted_folder,
    find_checkpoint,
    find_unconverted,
    hub_cache,
    origin_of,
    repo_folder,
    repos_of,
    snapshot_folder,
    why_incomplete,
    why_not_converted,
)
from tunescope.errors import UserError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_mixtral(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    weight_map = {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in SHARDS:
        (folder / name).write_bytes(b"weights")
    return folder


def write_blackmamba(folder: Path) -> Path:
    """As the Hub has it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"mamba_moe_layers": ["r", "8"]}')
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    return folder


def write_converted(folder: Path, commit: str = BLACKMAMBA.revision) -> Path:
    write_mixtral(folder)
    provenance = {"format": CONVERSION_FORMAT, "repo": BLACKMAMBA.repo_id, "revision": commit}
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance))
    return folder


@pytest.mark.parametrize("repo", list(dict.fromkeys(repo for repos in REPOS.values() for repo in repos)), ids=str)
def test_every_repository_is_pinned_to_a_full_commit(repo: HubRepo) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", repo.revision)
    assert repo.patterns
    assert repo.required


def test_an_unknown_model_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="mixtral, blackmamba"):
        repos_of("mamba3")


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HOME": "/data/hf"}, "/data/hf/hub"),
        ({"HF_HOME": "/data/hf", "HF_HUB_CACHE": "/fast/hub"}, "/fast/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old/hub"}, "/old/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"HF_HOME": ""}, "~/.cache/huggingface/hub"),
        ({"HF_HOME": "~/hf"}, "~/hf/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_hub_cache_is_where_huggingface_hub_has_it(environ: dict[str, str], folder: str) -> None:
    assert hub_cache(environ) == Path(folder).expanduser()


def test_a_complete_checkpoint_is_found(tmp_path: Path) -> None:
    folder = write_mixtral(snapshot_folder(tmp_path, MIXTRAL))
    assert find_checkpoint("mixtral", tmp_path) == folder


def test_hf_home_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_checkpoint("mixtral") is None
    folder = write_mixtral(snapshot_folder(tmp_path / "hub", MIXTRAL))
    assert find_checkpoint("mixtral") == folder


def test_a_download_of_blackmamba_is_found_once_it_is_converted(tmp_path: Path) -> None:
    assert find_unconverted("blackmamba", tmp_path) is None
    download = write_blackmamba(snapshot_folder(tmp_path, BLACKMAMBA))
    assert find_checkpoint("blackmamba", tmp_path) is None
    assert find_unconverted("blackmamba", tmp_path) == download
    converted = write_converted(converted_folder(tmp_path, BLACKMAMBA))
    assert find_checkpoint("blackmamba", tmp_path) == converted
    assert find_unconverted("blackmamba", tmp_path) is None
    (download / "pytorch_model.bin").unlink()  # not needed any more
    assert find_checkpoint("blackmamba", tmp_path) == converted
    assert find_unconverted("mixtral", tmp_path) is None


def test_any_converted_commit_will_do_the_pinned_one_first(tmp_path: Path) -> None:
    other, main, pinned = "0" * 40, "f" * 40, BLACKMAMBA.revision
    unfinished = converted_folder(tmp_path, BLACKMAMBA, other)
    write_converted(unfinished.with_name(f".{unfinished.name}.unfinished"), other)
    assert find_checkpoint("blackmamba", tmp_path) is None
    (repo_folder(tmp_path, BLACKMAMBA.repo_id) / "refs").mkdir(parents=True)
    (repo_folder(tmp_path, BLACKMAMBA.repo_id) / "refs" / "main").write_text(main)
    for commit in (other, main, pinned):  # each is preferred to those before it
        folder = write_converted(converted_folder(tmp_path, BLACKMAMBA, commit), commit)
        assert find_checkpoint("blackmamba", tmp_path) == folder


@pytest.mark.parametrize(
    ("cache", "folder"),
    [
        ("/data/hf/hub", "/data/hf/tunescope/blackmamba-2.8b-521a77772f0d"),
        ("/fast/models", "/fast/models/tunescope/blackmamba-2.8b-521a77772f0d"),
    ],
)
def test_a_converted_folder_lies_in_hf_home_or_in_the_cache_named_instead(cache: str, folder: str) -> None:
    assert converted_folder(Path(cache), BLACKMAMBA) == Path(folder)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (PROVENANCE_FILE, None, f"has no {PROVENANCE_FILE}"),
        (PROVENANCE_FILE, "{}", "made by another version"),
        (PROVENANCE_FILE, '{"format": 999}', "made by another version"),
        (PROVENANCE_FILE, "[", "cannot be read as JSON"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        (SHARDS[1], None, f"lacks 1 of 2 weight files: {SHARDS[1]}"),
    ],
)
def test_a_converted_folder_that_lost_something_is_not_found(
    tmp_path: Path, name: str, text: str | None, reason: str
) -> None:
    folder = write_converted(converted_folder(tmp_path, BLACKMAMBA))
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert reason in (why_not_converted(folder) or "")
    assert find_checkpoint("blackmamba", tmp_path) is None


def test_a_folder_says_which_commit_it_is_of(tmp_path: Path) -> None:
    mixtral = write_mixtral(snapshot_folder(tmp_path, MIXTRAL, "a" * 40))
    assert origin_of(mixtral) == Origin(MIXTRAL.repo_id, "a" * 40)
    converted = write_converted(converted_folder(tmp_path, BLACKMAMBA))
    assert origin_of(converted) == Origin(BLACKMAMBA.repo_id, BLACKMAMBA.revision)
    assert origin_of(write_mixtral(tmp_path / "own")) is None


def test_the_tokenizer_of_blackmamba_comes_from_elsewhere(tmp_path: Path) -> None:
    tokenizer = snapshot_folder(tmp_path, GPT_NEOX_TOKENIZER)
    assert "does not exist" in (why_incomplete(tokenizer, GPT_NEOX_TOKENIZER) or "")
    tokenizer.mkdir(parents=True)
    for name in GPT_NEOX_TOKENIZER.required:
        (tokenizer / name).write_text("{}")
    assert why_incomplete(tokenizer, GPT_NEOX_TOKENIZER) is None


def test_the_pinned_commit_comes_before_main_and_main_before_others(tmp_path: Path) -> None:
    other, main, pinned = "0" * 40, "f" * 40, MIXTRAL.revision
    write_mixtral(snapshot_folder(tmp_path, MIXTRAL, other))
    assert find_checkpoint("mixtral", tmp_path) == snapshot_folder(tmp_path, MIXTRAL, other)
    refs = repo_folder(tmp_path, MIXTRAL.repo_id) / "refs"
    refs.mkdir()
    (refs / "main").write_text(main)
    write_mixtral(snapshot_folder(tmp_path, MIXTRAL, main))
    assert find_checkpoint("mixtral", tmp_path) == snapshot_folder(tmp_path, MIXTRAL, main)
    write_mixtral(snapshot_folder(tmp_path, MIXTRAL, pinned))
    assert find_checkpoint("mixtral", tmp_path) == snapshot_folder(tmp_path, MIXTRAL, pinned)
    (snapshot_folder(tmp_path, MIXTRAL, pinned) / SHARDS[0]).unlink()
    assert find_checkpoint("mixtral", tmp_path) == snapshot_folder(tmp_path, MIXTRAL, main)


Spoil = Callable[[Path], object]


def _unlink(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def _dangle(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to("../../blobs/gone")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_unlink("config.json"), "no config.json"),
        (_unlink("tokenizer.json"), "no tokenizer.json"),
        (_write("config.json", "<html>"), "cannot be read as JSON"),
        (_write("config.json", "[]"), "no JSON object"),
        (_unlink(SHARDS[1]), f"lacks 1 of 2 weight files: {SHARDS[1]}"),
        (_write(SHARDS[1], ""), f"lacks 1 of 2 weight files: {SHARDS[1]}"),
        (_dangle, f"lacks 1 of 2 weight files: {SHARDS[0]}"),
        (_unlink("model.safetensors.index.json"), "no weights"),
        (_write("model.safetensors.index.json", "{}"), "not a weight index"),
        (
            _write("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}'),
            "not a weight index",
        ),
        (_write("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), "not a weight index"),
    ],
)
def test_an_incomplete_checkpoint_is_not_found_and_says_why(tmp_path: Path, spoil: Spoil, reason: str) -> None:
    folder = write_mixtral(snapshot_folder(tmp_path, MIXTRAL))
    spoil(folder)
    assert find_checkpoint("mixtral", tmp_path) is None
    assert reason in (why_incomplete(folder, MIXTRAL) or "")


def test_a_model_folder_is_accepted_whole_or_without_weights(tmp_path: Path) -> None:
    check_model_dir(write_mixtral(tmp_path / "mixtral"))
    check_model_dir(write_converted(tmp_path / "blackmamba"))
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text('{"model_type": "mixtral"}')
    check_model_dir(config_only)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unlink("config.json"), "has no config.json"),
        (_write("config.json", '{"cut": '), "cannot be read as JSON"),
        (_unlink(SHARDS[0]), "lacks 1 of 2 weight files"),
        (_write("model.safetensors.index.json", "\x00"), "cannot be read as JSON"),
    ],
)
def test_a_spoilt_model_folder_is_refused_with_cause_and_cure(tmp_path: Path, spoil: Spoil, message: str) -> None:
    folder = write_mixtral(tmp_path / "mixtral")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_model_dir(folder)
    assert caught.value.cause
    assert caught.value.cure


def test_a_download_of_blackmamba_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BlackMamba in its original form") as caught:
        check_model_dir(write_blackmamba(tmp_path / "blackmamba"))
    assert "model_download.py --model blackmamba" in caught.value.cure


def test_a_model_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        check_model_dir(tmp_path / "mistralai" / "Mixtral-8x7B-v0.1")
