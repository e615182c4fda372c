"""Fetching checkpoints, over a stand-in for the Hub, and once over a small Hub on this machine."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import requests
from huggingface_hub import errors

from tunescope.checkpoints import (
    BLACKMAMBA,
    GPT_NEOX_TOKENIZER,
    MIXTRAL,
    find_checkpoint,
    find_tokenizer,
    repo_folder,
)
from tunescope.download import download
from tunescope.errors import UserError

SHARD = "model-00001-of-00001.safetensors"
INDEX = json.dumps({"weight_map": {"lm_head.weight": SHARD}}).encode()
CONTENT: dict[str, dict[str, bytes]] = {
    MIXTRAL.repo_id: {
        "README.md": b"not wanted",
        "config.json": b"{}",
        "consolidated.00.pt": b"not wanted",
        "model.safetensors.index.json": INDEX,
        SHARD: b"w" * 5000,
        "tokenizer.json": b"{}",
        "tokenizer.model": b"m",
        "tokenizer_config.json": b"{}",
    },
    BLACKMAMBA.repo_id: {"README.md": b"no", "config.json": b"{}", "pytorch_model.bin": b"w" * 900},
    GPT_NEOX_TOKENIZER.repo_id: {
        "pytorch_model-00001-of-00046.bin": b"not wanted",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "vocab.json": b"{}",
    },
}


def etag_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class FakeHub:
    """Answers for HfApi.model_info and snapshot_download, and counts what is asked."""

    lookup_error: Exception | None = None
    transfer_error: Exception | None = None
    leave_out: str | None = None
    looked_up: list[str] = field(default_factory=list)
    transferred: list[str] = field(default_factory=list)

    def model_info(self, repo_id: str, *, revision: str, files_metadata: bool) -> Any:
        assert files_metadata
        self.looked_up.append(f"{repo_id}@{revision}")
        if self.lookup_error is not None:
            raise self.lookup_error
        siblings = [
            SimpleNamespace(rfilename=name, size=len(data), blob_id=etag_of(data), lfs=None)
            for name, data in CONTENT[repo_id].items()
        ]
        return SimpleNamespace(sha=revision, siblings=siblings)

    def snapshot_download(self, repo_id: str, *, revision: str, allow_patterns: list[str], cache_dir: Path) -> str:
        snapshot = repo_folder(cache_dir, repo_id) / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        names = huggingface_hub.utils.filter_repo_objects(CONTENT[repo_id], allow_patterns=allow_patterns)
        for name in names:
            if self.transfer_error is not None:
                raise self.transfer_error
            if name != self.leave_out:
                (snapshot / name).write_bytes(CONTENT[repo_id][name])
                self.transferred.append(name)
        return str(snapshot)


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
    assert folders[0] == find_checkpoint("mixtral", cache)
    assert folders[1] == find_checkpoint("blackmamba", cache)
    assert folders[2] == find_tokenizer("blackmamba", cache)
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


def test_blackmamba_alone_brings_its_tokenizer(hub: FakeHub, tmp_path: Path) -> None:
    folders = download(["blackmamba"], hf_home=tmp_path, echo=lambda _: None)
    assert [folder.name for folder in folders] == [
        BLACKMAMBA.revision,
        GPT_NEOX_TOKENIZER.revision,
    ]


def test_a_dry_run_shows_the_same_and_writes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    dry: list[str] = []
    download(dry_run=True, hf_home=tmp_path, echo=dry.append)
    assert files_under(tmp_path) == []
    wet: list[str] = []
    download(hf_home=tmp_path, echo=wet.append)
    # Up to the free space, which moves between the two.
    assert [line.split("(")[0] for line in dry[:3]] == [line.split("(")[0] for line in wet[:3]]
    assert "nothing was transferred" in dry[-1]


def test_a_second_run_asks_the_hub_nothing(hub: FakeHub, tmp_path: Path) -> None:
    first = download(hf_home=tmp_path, echo=lambda _: None)
    hub.looked_up.clear()
    hub.transferred.clear()
    lines: list[str] = []
    assert download(hf_home=tmp_path, echo=lines.append) == first
    assert hub.looked_up == []
    assert hub.transferred == []
    assert sum("already complete" in line for line in lines) == 3


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


def test_the_disk_is_checked_for_all_models_before_anything_is_written(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for either model with the reserve, but not for both.
    free_bytes = 2**30 + 5500
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    with pytest.raises(UserError, match="Nothing was transferred") as caught:
        download(hf_home=tmp_path, echo=lambda _: None)
    assert "HF_HOME" in caught.value.cure
    assert hub.transferred == []
    assert files_under(tmp_path) == []
    download(["mixtral"], hf_home=tmp_path, echo=lambda _: None)


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


class SmallHub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download of BlackMamba needs."""

    requests: list[tuple[str, str, str | None]]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        byte_range = self.headers.get("Range")
        self.requests.append((self.command, self.path, byte_range))
        match = re.match(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|resolve)/(\w+)(?:/([^?]+))?", self.path)
        repo_id, kind, revision, name = match.groups() if match else ("", "", "", "")
        files = CONTENT.get(repo_id, {})
        if kind == "revision":
            siblings = [{"rfilename": key, "size": len(data), "blobId": etag_of(data)} for key, data in files.items()]
            info = {"id": repo_id, "sha": revision, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif kind == "resolve" and name in files:
            data, headers = files[name], {"X-Repo-Commit": revision}
            headers["ETag"] = f'"{etag_of(data)}"'
            start = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206 if start else 200, data[start:], headers)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


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


def test_the_real_client_fetches_resumes_and_stays_offline(small_hub: str, tmp_path: Path) -> None:
    weights = CONTENT[BLACKMAMBA.repo_id]["pytorch_model.bin"]
    blobs = repo_folder(tmp_path / "hub", BLACKMAMBA.repo_id) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag_of(weights)}.incomplete").write_bytes(weights[:400])

    first = run_download(small_hub, tmp_path)
    assert first.returncode == 0, first.stderr
    folder = find_checkpoint("blackmamba", tmp_path / "hub")
    assert folder is not None
    assert (folder / "pytorch_model.bin").read_bytes() == weights
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    weight_path = f"/{BLACKMAMBA.repo_id}/resolve/{BLACKMAMBA.revision}/pytorch_model.bin"
    assert ("GET", weight_path, "bytes=400-") in SmallHub.requests
    assert ("GET", weight_path, None) not in SmallHub.requests

    second = run_download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("already complete") == 2


def test_the_real_client_without_a_network(tmp_path: Path) -> None:
    refused = run_download("http://127.0.0.1:9", tmp_path)  # port 9: nothing listens there
    assert "UserError: The Hub at 127.0.0.1 cannot be reached" in refused.stderr
    offline = run_download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert files_under(tmp_path) == []
