"""The source `hub`: files of a dataset on the Hugging Face hub, at one commit.

`HF_ENDPOINT` selects a mirror, `HF_HUB_OFFLINE=1` restricts downloads to the local cache. The token comes from
`HF_TOKEN` or `hf auth login`; it is sent only to the hub, and never printed or stored.

huggingface_hub lists the files and finds the token and cached files. The download itself uses `tasks.web.fetch`,
which, unlike huggingface_hub, resumes within pieces of 10 MB, has a time limit, screens addresses and verifies the
published SHA-256.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download, try_to_load_from_cache

from models.hashing import file_sha256
from tasks.runtime import workspace
from tasks.runtime.disk import require_space
from tasks.runtime.errors import StageError
from tasks.web import fetch

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

    from tasks.params import DownloadParams

LIST_SECONDS = 30.0
COMMIT = re.compile(r"[0-9a-f]{40}")
NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")


@dataclass(frozen=True)
class Published:
    """A file of a dataset, as listed by the hub."""

    name: str
    size: int
    sha256: str
    cached: Path | None
    """The file in the local cache, or None."""


def copy(target: Path, params: DownloadParams) -> str:
    """Download the files of `params.hub` into the folder `target` and return their origin.

    Raises `StageError` if the revision is not a commit, the dataset cannot be read, no file matches the pattern, or
    the files exceed `download.max_bytes` or `download.timeout_seconds`.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True
    deadline = time.monotonic() + params.timeout_seconds
    files = _cached(params) if constants.is_offline_mode() else _listed(params)
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
        if file.cached is None or not _copy_cached(file, file.cached, path):
            _fetch(file, path, params, deadline)
    return f"hf://datasets/{params.hub.repo}@{params.hub.revision}"


def _listed(params: DownloadParams) -> list[Published]:
    """List the files that match `download.hub.files` on the hub."""
    endpoint = constants.ENDPOINT
    fetch.require_allowed(endpoint, params.allow_private_addresses)
    repo = str(params.hub.repo)
    info = _dataset_info(repo, params.hub.revision)
    if info.sha != params.hub.revision:
        raise StageError(
            f"'{params.hub.revision or 'main'}' of {repo} is a branch or tag, which may change; pin the present commit "
            f"with download.hub.revision={info.sha}"
        )
    files = []
    siblings = info.siblings or []
    for sibling in siblings:
        if not _matches(sibling.rfilename, params.hub.files):
            continue
        if sibling.lfs is None:
            raise StageError(f"the hub publishes no sha256 of {sibling.rfilename} in {repo}; narrow download.hub.files")
        found = try_to_load_from_cache(repo, sibling.rfilename, revision=info.sha, repo_type="dataset")
        cached = Path(found) if isinstance(found, str) else None
        files.append(Published(sibling.rfilename, int(sibling.size or 0), sibling.lfs.sha256, cached))
    if not files:
        names = ", ".join(sorted(sibling.rfilename for sibling in siblings)[:5])
        raise StageError(f"no file of {repo} matches download.hub.files '{params.hub.files}'; it holds {names}, ...")
    return sorted(files, key=lambda file: file.name)


def _dataset_info(repo: str, revision: str | None) -> DatasetInfo:
    """Metadata of a revision. Raises `StageError` with the cause and the remedy if the hub does not provide it."""
    where = f"{constants.ENDPOINT}/datasets/{repo}"
    try:
        info: DatasetInfo = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=LIST_SECONDS)
        return info
    except errors.GatedRepoError:
        raise StageError(_gated(where)) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{repo} has no revision '{revision}'; correct download.hub.revision") from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{where} does not exist or is private; correct download.hub.repo, or set HF_TOKEN to a token with access"
        ) from None
    except errors.HFValidationError:
        raise StageError(f"'{repo}' is not the name of a dataset; write download.hub.repo as 'owner/name'") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise StageError(_refused(where, status)) from None
        raise StageError(f"{where}: the hub answered {status}; try again later") from None
    except Exception as error:  # the HTTP client raises errors of many types
        reason = str(error) or type(error).__name__
        raise StageError(
            f"{where} cannot be reached ({reason}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to "
            "use the local cache"
        ) from None


def _gated(where: str) -> str:
    return (
        f"{where} is gated; accept its terms on that page, then set HF_TOKEN to a token of the same account "
        "('hf auth login' stores one)"
    )


def _refused(where: str, status: int) -> str:
    if get_token() is None:
        return _gated(where)
    if status == 401:
        return f"{where}: the hub rejects the token of HF_TOKEN (or 'hf auth login'); create a new one"
    return (
        f"{where}: the token of HF_TOKEN has no access; accept the terms on that page, or grant the token read access"
    )


def _matches(name: str, pattern: str) -> bool:
    """Whether a safe relative path matches a pattern, in which `*` matches any characters including '/'."""
    return fnmatch(name, pattern) and not (name.startswith("/") or ".." in PurePosixPath(name).parts)


def _copy_cached(file: Published, cached: Path, path: Path) -> bool:
    """Copy a file from the local cache; False if its checksum differs from the published one."""
    shutil.copyfile(cached, path)
    return not file.sha256 or file_sha256(path) == file.sha256


def _fetch(file: Published, path: Path, params: DownloadParams, deadline: float) -> None:
    if constants.is_offline_mode():
        raise StageError(f"{file.name} in the local cache is damaged; unset HF_HUB_OFFLINE to download it again")
    where = f"{constants.ENDPOINT}/datasets/{params.hub.repo}"
    token = get_token()
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
    """List the files that match `download.hub.files` in the local cache, for HF_HUB_OFFLINE.

    The cache names files by their published SHA-256, so the copies can be verified.
    """
    repo, revision = str(params.hub.repo), params.hub.revision
    if revision is None or not COMMIT.fullmatch(revision):
        raise StageError("HF_HUB_OFFLINE is set, so download.hub.revision must be a commit of 40 digits")
    files = {}
    for name, path in _snapshot(repo, revision, params.hub.files).items():
        stored = path.resolve()
        sha256 = stored.name if re.fullmatch(r"[0-9a-f]{64}", stored.name) else ""
        files[name] = Published(name, stored.stat().st_size, sha256, stored)
    missing = _missing(set(files))
    if missing or not files:
        raise StageError(
            f"HF_HUB_OFFLINE is set, but the local cache lacks {missing or params.hub.files} of {repo} at {revision}; "
            f"unset it, or run 'hf download --repo-type dataset --revision {revision} {repo}' with network access"
        )
    return list(files.values())


def _snapshot(repo: str, revision: str, pattern: str) -> dict[str, Path]:
    """Cached files of a commit that match a pattern, by name, sorted."""
    try:
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=pattern
            )
        )
    except errors.LocalEntryNotFoundError:
        return {}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if _matches(name, pattern)}


def _missing(names: set[str]) -> str | None:
    """The first missing file of an incomplete numbered series such as train-00003-of-00006-<hash>.parquet, or None."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match:
            numbers.setdefault((match["name"], match["count"]), set()).add(int(match["number"]))
    for (name, count), present in sorted(numbers.items()):
        for number in range(int(count)):
            if number not in present:
                return f"{name}-{number:05d}-of-{count}"
    return None
