"""Fetch the study's checkpoints from the Hugging Face Hub, at pinned commits, resumably.

First everything is looked up and shown and the disk is checked for all of it together; only then
does anything transfer. A checkpoint in a form of its own (BlackMamba's) is then converted. The
token is whatever huggingface_hub finds (HF_TOKEN or `hf auth login`); it is neither shown nor
stored here.
"""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tunescope.checkpoints import (
    CONVERTED,
    REPOS,
    HubRepo,
    converted_folder,
    hub_cache,
    repos_of,
    snapshot_folder,
    why_incomplete,
    why_not_converted,
)
from tunescope.errors import UserError
from tunescope.hardware import GIB

MODELS: tuple[str, ...] = tuple(REPOS)  # what is fetched when nothing is named

# A file system filled to its last byte breaks whatever else writes there, so keep this much free.
DISK_RESERVE_BYTES = 2**30


@dataclass(frozen=True)
class RemoteFile:
    """One wanted file. etag: its name among the cache's blobs.

    A mirror of the Hub may leave out either: num_bytes is then 0, etag None.
    """

    path: str
    num_bytes: int
    etag: str | None


@dataclass(frozen=True)
class Plan:
    """What fetching one repository means here; no files if the Hub need not be asked."""

    repo: HubRepo
    snapshot: Path
    files: tuple[RemoteFile, ...]
    num_files: int
    total_bytes: int
    missing_bytes: int
    is_complete: bool


@dataclass(frozen=True)
class Conversion:
    """What is made of a downloaded checkpoint and its tokenizer. num_bytes: of the weights, before and after."""

    checkpoint: Plan
    tokenizer: Plan
    target: Path
    num_bytes: int


def download(
    models: Sequence[str] = (),
    *,
    dry_run: bool = False,
    hf_home: Path | None = None,
    echo: Callable[[str], None] = print,
) -> list[Path]:
    """Fetch models (none named: all of :data:`MODELS`), convert what needs it, and return the folder of each.

    A dry run shows the same and writes nothing; its folders may not exist yet. hf_home: in
    place of HF_HOME and HF_HUB_CACHE. What is complete is left alone, without network; a download is no longer needed
    once it is converted. Raises UserError, each with its cause and cure, if the Hub or the disk stands in the way, or
    if a checkpoint is not what it should be.
    """
    cache = hub_cache() if hf_home is None else hf_home.expanduser() / "hub"
    repos_by_model = {model: repos_of(model) for model in models or MODELS}
    folders, plans, conversions = [], [], []
    for model, repos in repos_by_model.items():
        folder = converted_folder(cache, repos[0]) if model in CONVERTED else snapshot_folder(cache, repos[0])
        folders.append(folder)
        if model in CONVERTED and why_not_converted(folder) is None:
            echo(f"{repos[0].repo_id} at {repos[0].revision}\n  already complete and converted, in {folder}")
            continue
        of_model = [_plan(repo, cache) for repo in repos]
        plans += of_model
        if model in CONVERTED:
            conversions.append(Conversion(of_model[0], of_model[-1], folder, of_model[0].total_bytes))
    free_bytes = _free_bytes(cache)
    for plan in plans:
        echo(_description(plan, free_bytes))
    for conversion in conversions:
        echo(
            f"{conversion.checkpoint.repo.repo_id}: to be converted for training, {_gib(conversion.num_bytes)} more\n"
            f"  to {conversion.target}"
        )
    to_fetch = [plan for plan in plans if not plan.is_complete]
    converted_bytes = sum(conversion.num_bytes for conversion in conversions)
    _check_disk(cache, sum(plan.missing_bytes for plan in to_fetch), converted_bytes, free_bytes)
    if dry_run:
        echo("Dry run: nothing was transferred or converted.")
        return folders
    for plan in to_fetch:
        _fetch(plan, cache)
        echo(f"{plan.repo.repo_id}: complete, in {plan.snapshot}")
    for conversion in conversions:
        _check_disk(cache, 0, conversion.num_bytes, _free_bytes(cache))
        _convert(conversion)
        echo(f"{conversion.checkpoint.repo.repo_id}: converted, in {conversion.target}")
    return folders


def _plan(repo: HubRepo, cache: Path) -> Plan:
    snapshot = snapshot_folder(cache, repo)
    if why_incomplete(snapshot, repo) is None:
        sizes = [path.stat().st_size for path in snapshot.rglob("*") if path.is_file()]
        return Plan(repo, snapshot, (), len(sizes), sum(sizes), 0, is_complete=True)
    files = _remote_files(repo)
    lacking = [file for file in files if not _is_in(snapshot, file)]
    return Plan(
        repo,
        snapshot,
        files,
        num_files=len(files),
        total_bytes=sum(file.num_bytes for file in files),
        missing_bytes=sum(_missing_bytes(snapshot.parents[1] / "blobs", f) for f in lacking),
        is_complete=not lacking,
    )


def _remote_files(repo: HubRepo) -> tuple[RemoteFile, ...]:
    try:
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects
    except ImportError:
        raise UserError(
            "the package huggingface-hub is not installed here",
            cause="this environment has the reading side of tunescope only",
            cure="run python3 model_download.py from a checkout, or pip install huggingface-hub",
        ) from None

    with _hub_errors(repo):
        info = huggingface_hub.HfApi().model_info(repo.repo_id, revision=repo.revision, files_metadata=True)
    wanted = filter_repo_objects(
        info.siblings or [], allow_patterns=list(repo.patterns), key=lambda file: file.rfilename
    )
    files = tuple(
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id) for file in wanted
    )
    if not files:
        raise UserError(
            f"{repo.repo_id} at {repo.revision} has none of the files wanted.",
            cause="the Hub, or the mirror that HF_ENDPOINT names, shows another repository.",
            cure="unset HF_ENDPOINT, or compare the file list there with src/tunescope/checkpoints.py.",
        )
    return files


def _is_in(snapshot: Path, file: RemoteFile) -> bool:
    path = snapshot / file.path
    return path.is_file() and file.num_bytes in (0, path.stat().st_size)


def _missing_bytes(blobs: Path, file: RemoteFile) -> int:
    """Bytes of a file still to be written.

    None if another commit brought the same content, a part after an interrupted transfer.
    """
    if file.etag is None:
        return file.num_bytes
    if (blobs / file.etag).is_file():
        return 0
    partial = blobs / f"{file.etag}.incomplete"
    written_bytes = partial.stat().st_size if partial.is_file() else 0
    return max(0, file.num_bytes - written_bytes)


def _description(plan: Plan, free_bytes: int) -> str:
    state = "already complete, nothing to transfer" if plan.is_complete else f"{_gib(plan.missing_bytes)} to transfer"
    return "\n".join(
        (
            f"{plan.repo.repo_id} at {plan.repo.revision}",
            f"  {plan.num_files} files, {_gib(plan.total_bytes)}: {state}",
            f"  to {plan.snapshot} ({_gib(free_bytes)} free on that disk)",
        )
    )


def _fetch(plan: Plan, cache: Path) -> None:
    import huggingface_hub

    with _hub_errors(plan.repo), _disk_errors(plan.repo, cache):
        huggingface_hub.snapshot_download(
            plan.repo.repo_id,
            revision=plan.repo.revision,
            allow_patterns=list(plan.repo.patterns),
            cache_dir=cache,
        )
    # snapshot_download returns an unfinished snapshot as if it were whole when the Hub becomes
    # unreachable between our look-up and its own, so look.
    lacking = [file.path for file in plan.files if not _is_in(plan.snapshot, file)]
    if lacking:
        raise _broken_off(plan.repo, f"{len(lacking)} files are missing, such as {lacking[0]}")


def _convert(conversion: Conversion) -> None:
    repo, tokenizer = conversion.checkpoint.repo, conversion.tokenizer.repo
    try:
        from huggingface_hub.utils import tqdm  # the bar of a download, and silent where that is

        from tunescope.models.blackmamba.checkpoint_folder import convert
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "huggingface_hub"):
            raise
        raise UserError(
            f"{repo.repo_id} is downloaded but not converted: {error.name} is not installed here.",
            cause="this environment has the reading side of tunescope only.",
            cure="run this again where requirements.txt is installed; nothing is transferred twice.",
        ) from None
    origin = {
        "repo": repo.repo_id,
        "revision": repo.revision,
        "tokenizer_repo": tokenizer.repo_id,
        "tokenizer_revision": tokenizer.revision,
    }
    folders = conversion.checkpoint.snapshot, conversion.tokenizer.snapshot, conversion.target
    name = f"Converting {repo.repo_id}"
    with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc=name) as bar:

        def show(num_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes  # a little less than the file, which says more than the weights
            bar.update(num_bytes)

        convert(*folders, origin, progress=show)


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():  # the root always does
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_disk(cache: Path, missing_bytes: int, converted_bytes: int, free_bytes: int) -> None:
    if not missing_bytes + converted_bytes or missing_bytes + converted_bytes + DISK_RESERVE_BYTES <= free_bytes:
        return
    needs = {"download": missing_bytes, "conversion": converted_bytes}
    what = " and the ".join(f"{name} needs {_gib(num_bytes)}" for name, num_bytes in needs.items() if num_bytes)
    raise UserError(
        f"The {what}, and {_gib(DISK_RESERVE_BYTES)} must stay free; "
        f"the disk of {cache} has {_gib(free_bytes)} free. "
        + ("Nothing was transferred." if missing_bytes else "Nothing was converted."),
        cause="HF_HOME (or HF_HUB_CACHE) points to a disk that is too small or too full.",
        cure="set HF_HOME to a folder on a larger disk, free some space, or name one model.",
    )


@contextmanager
def _disk_errors(repo: HubRepo, cache: Path) -> Iterator[None]:
    """Say what a failed write means. hf_xet writes from Rust and reports by RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                f"The disk of {cache} became full while fetching {repo.repo_id}.",
                cause="something else took the space, or a quota is smaller than the disk.",
                cure="free some space or set HF_HOME to a larger disk, and run this again: it "
                "goes on with what is there.",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"{cache} cannot be written while fetching {repo.repo_id}.",
                cause="HF_HOME (or HF_HUB_CACHE) is another user's, read-only or inside a file.",
                cure="set HF_HOME to a folder of your own.",
            ) from error
        raise


@contextmanager
def _hub_errors(repo: HubRepo) -> Iterator[None]:
    """Turn each way the Hub can fail into a UserError.

    The libraries' own messages are left out: they hold signed URLs, and nothing to act on.
    """
    from huggingface_hub import errors
    from requests import exceptions as http

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise _offline_mode(repo) from error
    except errors.LocalEntryNotFoundError as error:  # snapshot_download wraps what kept it away
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise _offline_mode(repo) from error
        raise _unreachable(repo) from error
    except errors.GatedRepoError as error:
        raise _no_access(repo, "its owner asks everyone to accept terms first") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"The Hub's {repo.repo_id} has no commit {repo.revision}.",
            cause="its owner rewrote the history, or HF_ENDPOINT names a mirror that lacks it.",
            cure="unset HF_ENDPOINT; if that changes nothing, put the repository's present commit "
            "into src/tunescope/checkpoints.py.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The Hub shows no repository {repo.repo_id}.",
            cause="it was renamed or made private, the token is invalid (the Hub then answers the "
            "same), or HF_ENDPOINT names a mirror without it.",
            cure=f"open {_page(repo)} in a browser; log in anew with `hf auth login`, or unset "
            "HF_TOKEN and HF_ENDPOINT.",
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise _no_access(repo, f"it refuses the token or asks for one ({status})") from error
        raise UserError(
            f"The Hub failed to answer for {repo.repo_id} (HTTP status {status}).",
            cause="too many requests (429) or a fault on its side (5xx).",
            cure="wait some minutes and run this again: it goes on with what is there.",
        ) from error
    except (http.ConnectionError, http.Timeout, ConnectionError, TimeoutError) as error:
        raise _unreachable(repo) from error
    except http.RequestException as error:
        raise _broken_off(repo, "the connection failed") from error
    except RuntimeError as error:  # hf_xet
        raise _broken_off(repo, "the connection failed") from error


def _offline_mode(repo: HubRepo) -> UserError:
    return UserError(
        f"{repo.repo_id} is not complete on this machine, and the Hub may not be asked.",
        cause="HF_HUB_OFFLINE is set.",
        cure="unset HF_HUB_OFFLINE, or copy the repository's folder of the Hub cache from a machine that has it.",
    )


def _unreachable(repo: HubRepo) -> UserError:
    import huggingface_hub

    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname  # without user and password
    return UserError(
        f"The Hub at {host} cannot be reached for {repo.repo_id}.",
        cause="no network, no name resolution (DNS), or a firewall that needs a proxy.",
        cure="check the network; behind a proxy set HTTPS_PROXY, for a mirror set HF_ENDPOINT. "
        "Runs need no checkpoint: without one they use random weights and say so.",
    )


def _no_access(repo: HubRepo, cause: str) -> UserError:
    return UserError(
        f"The Hub does not give access to {repo.repo_id}.",
        cause=f"{cause}.",
        cure=f"accept the terms, if there are any, at {_page(repo)}, log in with `hf auth login` "
        "(or set HF_TOKEN), and run this again.",
    )


def _broken_off(repo: HubRepo, cause: str) -> UserError:
    return UserError(
        f"The transfer of {repo.repo_id} broke off.",
        cause=f"{cause}.",
        cure="run this again: it goes on with what is there.",
    )


def _page(repo: HubRepo) -> str:
    return f"https://huggingface.co/{repo.repo_id}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
