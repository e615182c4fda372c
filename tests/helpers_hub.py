"""Stand-ins for the Hugging Face Hub: one in this process, one over HTTP on this machine, with small checkpoints."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
from helpers_original import write_download, write_neox_tokenizer

from tunescope.checkpoints import BLACKMAMBA, GPT_NEOX_TOKENIZER, MIXTRAL, repo_folder


def written_by(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Name -> content of the files that a function puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
    BLACKMAMBA.repo_id: {"README.md": b"no"} | written_by(write_download),
    GPT_NEOX_TOKENIZER.repo_id: {
        "pytorch_model-00001-of-00046.bin": b"not wanted",
        "vocab.json": b"{}",
        **written_by(write_neox_tokenizer),
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
