"""A small repository to start the real launchers in; see test_bootstrap.py."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STDLIB_ONLY = ["_bootstrap.py", "_environment.py", "_venv.py"]
PARSERS = ["throughput.py", "mixtral_latency.py", "mamba_latency.py", "model_download.py"]
STUB_CLI = """
import os, sys
def main():
    print("ran", sys.argv[1:], "by", sys.executable, "as", sys.modules["__main__"].__spec__.name)
    print("data" if any(os.path.isfile(os.path.join(p, "_venv.py")) for p in sys.path) else "clean")
"""


class Clone:
    """A small repository in a temporary folder, and the processes that run in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"  # a space: paths must be quoted everywhere
        self.wheels = folder / "wheels"
        self.bin = folder / "bin"
        package = self.root / "src" / "tunescope"
        for made in (package, self.root / "requirements", self.wheels, self.bin):
            made.mkdir(parents=True)
        for name in [*STDLIB_ONLY, "launch.sh", "__init__.py", "__main__.py"]:
            shutil.copy(REPO / "src" / "tunescope" / name, package)
        (package / "cli.py").write_text(STUB_CLI)
        for name in ["mixtral_tp.sh", *PARSERS]:
            shutil.copy(REPO / name, self.root)
        (self.root / "LLaMA-Factory").mkdir()
        for link in ["mixtral_tp.sh", *PARSERS]:
            target = os.readlink(REPO / "LLaMA-Factory" / link)
            (self.root / "LLaMA-Factory" / link).symlink_to(target)
        self.require("base", packaging_wheel(self.wheels), wheel(self.wheels, "readingside", "1.2"))
        self.require("train", wheel(self.wheels, "trainingstack", "3.0"))
        (self.root / "requirements.txt").write_text("-r requirements/base.txt\n-r requirements/train.txt\n")
        shim(self.bin / "python3", f'exec "{bare_python()}" "$@"')

    def require(self, name: str, *wheels: Path) -> None:
        """Write requirements/<name>.txt, and its part of requirements.lock as uv would."""
        pins = ["==".join(path.name.split("-")[:2]) for path in wheels]
        (self.root / "requirements" / f"{name}.txt").write_text("\n".join(pins) + "\n")
        with (self.root / "requirements.lock").open("a") as lock:
            for pin, path in zip(pins, wheels, strict=True):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lock.write(f"{pin} \\\n    --hash=sha256:{digest}\n")
                lock.write(f"    # via -r requirements/{name}.txt\n")

    def start(self, *command: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self.root / command[0]), *command[1:]],
            cwd=self.root.parent,
            env={
                "PATH": f"{self.bin}{os.pathsep}{os.defpath}",
                "HOME": str(self.root.parent / "home"),
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": self.wheels.as_uri(),
                "PIP_CONFIG_FILE": os.devnull,
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, **env: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def marker(self) -> Path:
        return self.venv / ".made-by-tunescope"

    def wait_for_marker(self, text: str) -> None:
        deadline_s = time.monotonic() + 60
        while not (self.marker.exists() and self.marker.read_text() == text):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def bare_python() -> str:
    """This Python without the environment the tests run in: it lacks what the clone requires."""
    return os.path.realpath(sys.executable)


def shim(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes] | None = None) -> Path:
    info = f"{name}-{version}.dist-info"
    contents = {
        **(files or {f"{name}.py": b""}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for path, data in contents.items()
    )
    contents[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in contents.items():
            archive.writestr(file, data)
    return path


def packaging_wheel(folder: Path) -> Path:
    """The real `packaging`, which the requirement check imports, from the running environment."""
    installed = metadata.distribution("packaging")
    files = {
        str(file): Path(str(file.locate())).read_bytes()
        for file in installed.files or []
        if file.parts[0] == "packaging" and file.suffix == ".py"
    }
    return wheel(folder, "packaging", installed.version, files)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def environment(folder: Path, clone: Clone, *packages: str) -> Path:
    """The interpreter of a user's own environment, with `packaging` and these in it."""
    if not folder.exists():
        subprocess.run([bare_python(), "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for package in ("packaging", *packages):
        found = Path(package) if package.endswith(".whl") else next(clone.wheels.glob(f"{package}-*"))
        with zipfile.ZipFile(found) as archive:
            archive.extractall(site)
    return folder / "bin" / "python"


def installed(clone: Clone) -> set[str]:
    site = next((clone.venv / "lib").glob("python3*")) / "site-packages"
    return {path.name.split("-")[0] for path in site.glob("*.dist-info")}


def files_in(folder: Path) -> list[Path]:
    """All but what Python itself caches when it imports."""
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
