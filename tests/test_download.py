"""Fetching checkpoints, over a stand-in for the Hub, and once over a small Hub on this machine."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import requests
import torch
from helpers_hub import CONTENT, SHARD, FakeHub, SmallHub, etag_of
from helpers_original import TINY, random_original
from huggingface_hub import errors
from safetensors import safe_open

from tunescope.checkpoints import (
    BLACKMAMBA,
    GPT_NEOX_TOKENIZER,
    MIXTRAL,
    HubRepo,
    converted_folder,
    find_checkpoint,
    find_unconverted,
    repo_folder,
    snapshot_folder,
    why_incomplete,
)
from tunescope.download import download
from tunescope.errors import UserError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_all_models_are_fetched_without_what_is_not_wanted(hub: FakeHub, tmp_path: Path) -> None:
    lines: list[str] = []
    folders = download(hf_home=tmp_path, echo=lines.append)
    cache = tmp_path / "hub"
    assert folders == [find_checkpoint("mixtral", cache), find_checkpoint("blackmamba", cache)]
    unwanted = {"README.md", "consolidated.00.pt", "pytorch_model-00001-of-00046.bin"}
    assert not unwanted & set(hub.transferred)
    assert len(hub.transferred) == 6 + 2 + 3
    assert hub.looked_up[0] == f"{MIXTRAL.repo_id}@{MIXTRAL.revision}"


def test_what_will_happen_is_shown_first(hub: FakeHub, tmp_path: Path) -> None:
    shown_before_transfer: list[str] = []

    def echo(text: str) -> None:
        if not hub.transferred:
            shown_before_transfer.append(text)

    (folder,) = download(["mixtral"], hf_home=tmp_path, echo=echo)
    text = "\n".join(shown_before_transfer)
    for fact in (MIXTRAL.repo_id, MIXTRAL.revision, "6 files", "GiB free", str(folder)):
        assert fact in text


def test_blackmamba_alone_brings_its_tokenizer_and_is_converted(hub: FakeHub, tmp_path: Path) -> None:
    lines: list[str] = []
    (folder,) = download(["blackmamba"], hf_home=tmp_path, echo=lines.append)
    cache = tmp_path / "hub"
    for repo in (BLACKMAMBA, GPT_NEOX_TOKENIZER):
        assert why_incomplete(snapshot_folder(cache, repo), repo) is None
    assert folder == converted_folder(cache, BLACKMAMBA) == find_checkpoint("blackmamba", cache)
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in folder.iterdir()}
    provenance = json.loads((folder / "tunescope.json").read_text())
    assert provenance["revision"] == BLACKMAMBA.revision
    assert provenance["tokenizer_revision"] == GPT_NEOX_TOKENIZER.revision
    shown = next(line for line in lines if "to be converted" in line)
    assert str(folder) in shown
    assert "GiB more" in shown
    assert lines[-1] == f"{BLACKMAMBA.repo_id}: converted, in {folder}"


def test_a_dry_run_shows_the_same_and_writes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    dry: list[str] = []
    download(dry_run=True, hf_home=tmp_path, echo=dry.append)
    assert files_under(tmp_path) == []
    wet: list[str] = []
    download(hf_home=tmp_path, echo=wet.append)
    # Up to the free space, which moves between the two.
    assert [line.split("(")[0] for line in dry[:4]] == [line.split("(")[0] for line in wet[:4]]
    assert "to be converted" in dry[3]
    assert "nothing was transferred" in dry[-1]


def test_a_second_run_asks_the_hub_nothing(hub: FakeHub, tmp_path: Path) -> None:
    first = download(hf_home=tmp_path, echo=lambda _: None)
    hub.looked_up.clear()
    hub.transferred.clear()
    lines: list[str] = []
    assert download(hf_home=tmp_path, echo=lines.append) == first
    assert hub.looked_up == []
    assert hub.transferred == []
    assert sum("already complete" in line for line in lines) == len(lines) == 2


def test_what_is_converted_needs_its_download_no_more(hub: FakeHub, tmp_path: Path) -> None:
    (folder,) = download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    shutil.rmtree(tmp_path / "hub")
    hub.transferred.clear()
    assert download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None) == [folder]
    assert hub.transferred == []
    assert find_checkpoint("blackmamba", tmp_path / "hub") == folder


def fail_to_convert(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    patch.setattr("tunescope.models.blackmamba.checkpoint_folder.save_file", failing)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left"), UserError, "became full"),
    ],
)
def test_a_conversion_broken_off_starts_over_without_the_hub(
    hub: FakeHub, tmp_path: Path, error: BaseException, raised: type[BaseException], message: str | None
) -> None:
    cache = tmp_path / "hub"
    with pytest.MonkeyPatch.context() as patch:
        fail_to_convert(patch, error)
        with pytest.raises(raised, match=message):
            download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    assert find_checkpoint("blackmamba", cache) is None
    assert find_unconverted("blackmamba", cache) == snapshot_folder(cache, BLACKMAMBA)
    assert [path.suffix for path in files_under(tmp_path / "tunescope")] == [".lock"]
    hub.looked_up.clear()
    lines: list[str] = []
    download(["blackmamba"], hf_home=tmp_path, echo=lines.append)
    assert hub.looked_up == []
    assert sum("already complete, nothing to transfer" in line for line in lines) == 2
    assert find_unconverted("blackmamba", cache) is None


def test_a_checkpoint_that_is_not_what_it_says_is_downloaded_but_not_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = CONTENT[BLACKMAMBA.repo_id] | {"pytorch_model.bin": b"w" * 900}
    monkeypatch.setitem(CONTENT, BLACKMAMBA.repo_id, spoilt)
    with pytest.raises(UserError, match="no checkpoint that torch can read"):
        download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    assert find_checkpoint("blackmamba", tmp_path / "hub") is None


def test_without_torch_the_download_is_kept_and_says_what_is_missing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tunescope.models.blackmamba.checkpoint_folder", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="downloaded but not converted: torch is not installed") as caught:
        download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    assert "requirements.txt" in caught.value.cure
    assert find_unconverted("blackmamba", tmp_path / "hub") is not None


def test_an_interrupted_run_counts_only_what_is_missing(hub: FakeHub, tmp_path: Path) -> None:
    (folder,) = download(["mixtral"], hf_home=tmp_path, echo=lambda _: None)
    (folder / SHARD).unlink()
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    partial = blobs / f"{etag_of(CONTENT[MIXTRAL.repo_id][SHARD])}.incomplete"
    with partial.open("wb") as file:
        file.write(b"w" * 4000)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunescope.download.GIB", 1)  # show bytes
        download(["mixtral"], hf_home=tmp_path, echo=lines.append, dry_run=True)
    assert "1000.00 GiB to transfer" in lines[0]


def wanted_bytes(repo: HubRepo) -> int:
    files = huggingface_hub.utils.filter_repo_objects(CONTENT[repo.repo_id], allow_patterns=list(repo.patterns))
    return sum(len(CONTENT[repo.repo_id][name]) for name in files)


def test_the_disk_is_checked_for_all_models_and_conversions_before_anything_is_written(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(wanted_bytes(repo) for repo in (MIXTRAL, BLACKMAMBA, GPT_NEOX_TOKENIZER, BLACKMAMBA))
    free = SimpleNamespace(free=2**30 + needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"download needs .* conversion needs .* Nothing was transferred") as caught:
        download(hf_home=tmp_path, echo=lambda _: None)
    assert "HF_HOME" in caught.value.cure
    assert hub.transferred == []
    assert files_under(tmp_path) == []
    free.free += 1
    download(hf_home=tmp_path, echo=lambda _: None)


def test_the_disk_is_checked_again_before_a_conversion(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30 + 10**6 * (not hub.transferred))
    )  # something else fills the disk meanwhile
    with pytest.raises(UserError, match=r"The conversion needs .* Nothing was converted"):
        download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    assert find_unconverted("blackmamba", tmp_path / "hub") is not None


def test_an_unknown_model_is_refused_before_anything_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint for model 'llama'"):
        download(["mixtral", "llama"], hf_home=tmp_path, echo=lambda _: None)
    assert hub.looked_up == []


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response = requests.Response()
    response.status_code = status
    return kind(f"{status} for https://signed.example/?token=hf_secret", response=response)


def wrapped(cause: Exception | None) -> errors.LocalEntryNotFoundError:
    """What snapshot_download raises when the Hub cannot be asked."""
    error = errors.LocalEntryNotFoundError("cannot find the snapshot folder")
    error.__cause__ = cause
    return error


HUB_FAILURES: list[tuple[Exception, str, str]] = [
    (errors.OfflineModeIsEnabled("offline"), "may not be asked", "HF_HUB_OFFLINE"),
    (wrapped(errors.OfflineModeIsEnabled("offline")), "may not be asked", "HF_HUB_OFFLINE"),
    (requests.ConnectionError("Name or service not known"), "cannot be reached", "HTTPS_PROXY"),
    (requests.Timeout("read timed out"), "cannot be reached", "HTTPS_PROXY"),
    (wrapped(requests.ConnectionError("refused")), "cannot be reached", "HTTPS_PROXY"),
    (http_error(errors.GatedRepoError, 403), "does not give access", "accept the terms"),
    (http_error(errors.HfHubHTTPError, 401), "does not give access", "hf auth login"),
    (http_error(errors.HfHubHTTPError, 403), "does not give access", "hf auth login"),
    (http_error(errors.RepositoryNotFoundError, 404), "shows no repository", "browser"),
    (http_error(errors.RevisionNotFoundError, 404), "has no commit", "HF_ENDPOINT"),
    (http_error(errors.HfHubHTTPError, 429), "status 429", "wait"),
    (http_error(errors.HfHubHTTPError, 503), "status 503", "wait"),
]
DISK_FAILURES: list[tuple[Exception, str, str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), "became full", "goes on"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "became full", "goes on"),
    (RuntimeError("IO Error: No space left on device (os error 28)"), "became full", "goes on"),
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be written", "HF_HOME"),
    (requests.exceptions.ChunkedEncodingError("cut"), "broke off", "goes on"),
    (RuntimeError("Data processing error: CAS service error"), "broke off", "goes on"),
]


def assert_one_clear_paragraph(error: UserError, what: str, cure: str) -> None:
    assert what in error.what
    assert cure in error.cure
    assert error.cause
    assert "hf_secret" not in str(error)
    assert str(error).count("\n") == 2


@pytest.mark.parametrize(("failure", "what", "cure"), HUB_FAILURES)
def test_each_way_the_hub_fails_to_answer(
    hub: FakeHub, tmp_path: Path, failure: Exception, what: str, cure: str
) -> None:
    hub.lookup_error = failure
    with pytest.raises(UserError) as caught:
        download(["mixtral"], hf_home=tmp_path, echo=lambda _: None)
    assert_one_clear_paragraph(caught.value, what, cure)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(("failure", "what", "cure"), HUB_FAILURES + DISK_FAILURES)
def test_each_way_a_transfer_fails(hub: FakeHub, tmp_path: Path, failure: Exception, what: str, cure: str) -> None:
    hub.transfer_error = failure
    with pytest.raises(UserError) as caught:
        download(["mixtral"], hf_home=tmp_path, echo=lambda _: None)
    assert_one_clear_paragraph(caught.value, what, cure)


def test_a_snapshot_left_unfinished_is_not_called_complete(hub: FakeHub, tmp_path: Path) -> None:
    hub.leave_out = SHARD
    lines: list[str] = []
    with pytest.raises(UserError, match="broke off"):
        download(["mixtral"], hf_home=tmp_path, echo=lines.append)
    assert not any("complete, in" in line for line in lines)


def test_the_token_is_neither_shown_nor_written(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines: list[str] = []
    download(hf_home=tmp_path, echo=lines.append)
    assert "hf_secret" not in "".join(lines)
    assert not any(b"hf_secret" in path.read_bytes() for path in files_under(tmp_path))


@pytest.fixture
def small_hub() -> Iterator[str]:
    SmallHub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run_download(endpoint: str, hf_home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    code = (
        "from pathlib import Path; from tunescope.download import download; "
        f"download(['blackmamba'], hf_home=Path({str(hf_home)!r}))"
    )
    source = Path(__file__).parents[1] / "src"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(source),
        **environ,
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_real_client_fetches_resumes_converts_and_stays_offline(small_hub: str, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    weights = CONTENT[BLACKMAMBA.repo_id]["pytorch_model.bin"]
    blobs = repo_folder(cache, BLACKMAMBA.repo_id) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag_of(weights)}.incomplete").write_bytes(weights[:400])

    first = run_download(small_hub, tmp_path)
    assert first.returncode == 0, first.stderr
    snapshot = snapshot_folder(cache, BLACKMAMBA)
    assert (snapshot / "pytorch_model.bin").read_bytes() == weights
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "pytorch_model.bin"}
    weight_path = f"/{BLACKMAMBA.repo_id}/resolve/{BLACKMAMBA.revision}/pytorch_model.bin"
    assert ("GET", weight_path, "bytes=400-") in SmallHub.requests
    assert ("GET", weight_path, None) not in SmallHub.requests

    folder = find_checkpoint("blackmamba", cache)
    assert folder is not None
    assert f"converted, in {folder}" in first.stdout
    assert "Converting Zyphra/BlackMamba-2.8B: 100%" in first.stderr
    with safe_open(next(folder.glob("model-00001-of-*.safetensors")), "pt") as shard:
        found = shard.get_tensor("model.embeddings.weight")
    assert torch.equal(found, random_original(TINY)["embedding.word_embeddings.weight"])

    second = run_download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("already complete") == 1


def test_the_real_client_without_a_network(tmp_path: Path) -> None:
    refused = run_download("http://127.0.0.1:9", tmp_path)  # port 9: nothing listens there
    assert "UserError: The Hub at 127.0.0.1 cannot be reached" in refused.stderr
    offline = run_download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert files_under(tmp_path) == []
