"""Files of a data set on the Hugging Face hub, at one commit.

`HF_ENDPOINT` names a mirror, `HF_HUB_OFFLINE=1` allows the hub's cache alone, and the token is the one that
`HF_TOKEN` or `hf auth login` keeps: it is sent to the hub itself, and is neither printed nor written anywhere.

huggingface_hub lists the files, finds the token and what its cache holds. The bytes come through
`tasks.transfer.fetch`: its own download keeps no less than whole pieces of 10 MB when a connection breaks, and
knows no limit of time, no screening of addresses and no check of the published sha256.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tasks.runtime import workspace
from tasks.runtime.stage import StageError
from tasks.sources.entry import require_space, sha256_of
from tasks.transfer import fetch

if TYPE_CHECKING:
    from tasks.params import DownloadParams

LIST_SECONDS = 30.0
COMMIT = re.compile(r"[0-9a-f]{40}")
NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")


@dataclass(frozen=True)
class Published:
    """A file of a data set, as the hub lists it."""

    name: str
    size: int
    sha256: str
    cached: Path | None
    """Where the hub's cache holds it."""


def copy(target: Path, params: DownloadParams) -> str:
    """Bring the files of `params.hub` into the folder `target`; returns where they came from.

    Raises `StageError` where the revision is no commit, the data set is not to be had (with what to do about it),
    no file fits the pattern, or the files exceed `download.max_bytes` or `download.timeout_seconds`.
    """
    deadline = time.monotonic() + params.timeout_seconds
    files = _cached(params) if _is_offline() else _listed(params)
    size = sum(file.size for file in files)
    if size > params.max_bytes:
        raise StageError(
            f"{len(files)} files of {params.hub.repo} have {size} bytes, over download.max_bytes {params.max_bytes}; "
            "raise it, or narrow download.hub.files"
        )
    require_space(target, size)
    for file in files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.cached is None or not _take(file, file.cached, path):
            _fetch(file, path, params, deadline)
    return f"hf://datasets/{params.hub.repo}@{params.hub.revision}"


def _hub() -> Any:
    """huggingface_hub, told not to report who uses it, nor to ask the hub how to find that out."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # where something else imported it before
    return huggingface_hub


def _is_offline() -> bool:
    return bool(_hub().constants.is_offline_mode())


def _listed(params: DownloadParams) -> list[Published]:
    """The files that fit `download.hub.files`, asked of the hub."""
    hub = _hub()
    endpoint = hub.constants.ENDPOINT
    fetch.require_allowed(endpoint, params.allow_private_addresses)
    repo = str(params.hub.repo)
    info = _ask(repo, params.hub.revision)
    if info.sha != params.hub.revision:
        raise StageError(
            f"'{params.hub.revision or 'main'}' of {repo} moves, so it may bring other data tomorrow; pin what it is "
            f"now with download.hub.revision={info.sha}"
        )
    files = []
    for sibling in info.siblings:
        if not _fits(sibling.rfilename, params.hub.files):
            continue
        if sibling.lfs is None:
            raise StageError(f"the hub publishes no sha256 of {sibling.rfilename} in {repo}; narrow download.hub.files")
        found = hub.try_to_load_from_cache(repo, sibling.rfilename, revision=info.sha, repo_type="dataset")
        cached = Path(found) if isinstance(found, str) else None
        files.append(Published(sibling.rfilename, int(sibling.size), sibling.lfs.sha256, cached))
    if not files:
        names = ", ".join(sorted(sibling.rfilename for sibling in info.siblings)[:5])
        raise StageError(f"no file of {repo} fits download.hub.files '{params.hub.files}'; it holds {names}, ...")
    return sorted(files, key=lambda file: file.name)


def _ask(repo: str, revision: str | None) -> Any:
    """What the hub says about a revision, or one sentence about why it does not."""
    hub = _hub()
    from huggingface_hub import errors

    where = f"{hub.constants.ENDPOINT}/datasets/{repo}"
    try:
        return hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=LIST_SECONDS)
    except errors.GatedRepoError:
        raise StageError(_gated(where)) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{repo} has no revision '{revision}'; correct download.hub.revision") from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{where} does not exist, or is private: correct download.hub.repo, or set HF_TOKEN to a token that may "
            "read it"
        ) from None
    except errors.HFValidationError:
        raise StageError(f"'{repo}' is no name of a data set; download.hub.repo is like 'owner/name'") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise StageError(_refused(where, status)) from None
        raise StageError(f"{where}: the hub answered {status}; try again later") from None
    except Exception as error:  # whatever its HTTP client raises where there is no answer
        reason = str(error) or type(error).__name__
        raise StageError(
            f"{where} cannot be reached ({reason}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to "
            "use what the hub's cache holds"
        ) from None


def _gated(where: str) -> str:
    return (
        f"{where} is gated: accept its terms on that page, then set HF_TOKEN to a token of the account that did "
        "('hf auth login' keeps one)"
    )


def _refused(where: str, status: int) -> str:
    if _hub().get_token() is None:
        return _gated(where)
    if status == 401:
        return f"{where}: the hub does not know the token of HF_TOKEN (or 'hf auth login'); make a new one"
    return f"{where}: the token of HF_TOKEN may not read it; accept the terms on that page, or let the token read it"


def _fits(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern, in which `*` stands for any characters, '/' included."""
    return fnmatch(name, pattern) and not (name.startswith("/") or ".." in PurePosixPath(name).parts)


def _take(file: Published, cached: Path, path: Path) -> bool:
    """Copy a file out of the hub's cache; False where it is not what was published."""
    shutil.copyfile(cached, path)
    return not file.sha256 or sha256_of(path) == file.sha256


def _fetch(file: Published, path: Path, params: DownloadParams, deadline: float) -> None:
    hub = _hub()
    if _is_offline():
        raise StageError(f"{file.name} in the hub's cache is damaged; get it again, without HF_HUB_OFFLINE")
    where = f"{hub.constants.ENDPOINT}/datasets/{params.hub.repo}"
    token = hub.get_token()
    try:
        fetch.fetch(
            [f"{where}/resolve/{params.hub.revision}/{quote(file.name)}"],
            path,
            sha256=file.sha256,
            partial=workspace.scratch() / "downloads",
            max_bytes=file.size,
            timeout_seconds=max(0.0, deadline - time.monotonic()),
            allow_private_addresses=params.allow_private_addresses,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
    except fetch.AccessError as error:
        raise StageError(_refused(where, error.status)) from None


def _cached(params: DownloadParams) -> list[Published]:
    """The files that fit `download.hub.files` in the hub's cache, where HF_HUB_OFFLINE forbids to ask for them.

    The cache names what it stores by the published sha256, against which the copies are checked.
    """
    repo, revision = str(params.hub.repo), params.hub.revision
    if revision is None or not COMMIT.fullmatch(revision):
        raise StageError("HF_HUB_OFFLINE is set, so download.hub.revision must be a commit of 40 digits; set it")
    files = {}
    for name, path in _snapshot(repo, revision, params.hub.files).items():
        stored = path.resolve()
        sha256 = stored.name if re.fullmatch(r"[0-9a-f]{64}", stored.name) else ""
        files[name] = Published(name, stored.stat().st_size, sha256, stored)
    missing = _missing(set(files))
    if missing or not files:
        raise StageError(
            f"HF_HUB_OFFLINE is set, but the hub's cache lacks {missing or params.hub.files} of {repo} at {revision}; "
            f"unset it, or run 'hf download --repo-type dataset --revision {revision} {repo}' where there is a network"
        )
    return list(files.values())


def _snapshot(repo: str, revision: str, pattern: str) -> dict[str, Path]:
    """The files of a commit that the hub's cache holds and that fit a pattern, by name, sorted; empty where none is."""
    from huggingface_hub import errors

    try:
        folder = Path(
            _hub().snapshot_download(
                repo, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=pattern
            )
        )
    except errors.LocalEntryNotFoundError:
        return {}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if _fits(name, pattern)}


def _missing(names: set[str]) -> str | None:
    """The first of the numbered files, such as train-00003-of-00006-<hash>.parquet, whose siblings are there."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match:
            numbers.setdefault((match["name"], match["count"]), set()).add(int(match["number"]))
    for (name, count), there in sorted(numbers.items()):
        for number in range(int(count)):
            if number not in there:
                return f"{name}-{number:05d}-of-{count}"
    return None
