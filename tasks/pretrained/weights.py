"""Pretrained weights from a Hugging Face repository, a local folder or S3, verified against a pin."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache

from models.hashing import file_sha256
from tasks.params import S3Params
from tasks.runtime import atomic, locks, workspace
from tasks.runtime.errors import StageError
from tasks.transfer import objects

WEIGHTS = ".safetensors"
KEPT = (".json", WEIGHTS, ".txt", ".model")
"""Suffixes of the files to download; pickles and code are never downloaded."""
COMMIT_DIGITS = 40
TIMEOUT_SECONDS = 6 * 3600
"""Time limit for all files of a model; partial downloads are kept."""


def local_folder(weights: str, pin: str, parts: tuple[str, ...]) -> Path:
    """Return the local folder of a model in the layout of diffusers or transformers; download it if necessary.

    Args:
        weights: s3://bucket/prefix, a Hugging Face repository or a local folder.
        pin: the commit of a repository. For S3 and local folders, the SHA-256 of the only .safetensors file in the
            first part, or in the folder itself; if other parts have such files, the SHA-256 of the concatenated
            hexadecimal hashes.
        parts: names of the required subfolders.

    Raises:
        StageError: if the weights cannot be read, or differ from `pin`.
    """
    if weights.startswith("s3://"):
        folder = _from_s3(weights, pin, parts)
    elif len(pin) == COMMIT_DIGITS:
        return _from_hub(weights, pin, parts)
    else:
        folder = Path(weights).expanduser()
        if not folder.is_dir():
            raise StageError(
                f"the weights '{weights}' are not a local folder; correct the path, or pin a commit of a hub repository"
            )
    _require_pin(folder, pin, parts)
    return folder


def part(folder: Path, name: str) -> Path:
    """The component `name` of a model folder: its subfolder, or the folder itself if there is no such subfolder."""
    return folder / name if (folder / name).is_dir() else folder


def _require_pin(folder: Path, pin: str, parts: tuple[str, ...]) -> None:
    where = part(folder, parts[0])
    files = sorted(where.glob(f"*{WEIGHTS}"))
    if len(files) != 1:
        raise StageError(f"{where} holds {len(files)} {WEIGHTS} files; use a folder with exactly one")
    files += [file for name in parts[1:] for file in sorted((folder / name).glob(f"*{WEIGHTS}"))]
    hashes = [file_sha256(file) for file in files]
    found = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    if found != pin:
        named = " and ".join(map(str, files))
        raise StageError(f"the sha256 of {named} is {found} and not the pinned {pin}; correct the pin or the weights")


def _wanted(names: list[str], parts: tuple[str, ...]) -> list[str]:
    """Files to download: those in `parts` and small files beside them, or all files if there are no such parts.

    Names with a second dot, such as model.fp16.safetensors, are variants of the same weights and are skipped.
    """
    paths = [PurePosixPath(name) for name in names]
    kept = [path for path in paths if path.suffix in KEPT and ".." not in path.parts and "." not in path.stem]
    inside = [path for path in kept if len(path.parts) > 1 and path.parts[0] in parts]
    beside = [path for path in kept if len(path.parts) == 1 and not (inside and path.suffix == WEIGHTS)]
    return [path.as_posix() for path in sorted([*inside, *beside])]


def _from_hub(repository: str, commit: str, parts: tuple[str, ...]) -> Path:
    """Snapshot of a commit in the local cache of the hub, downloaded if it is missing.

    Files are listed one by one, because the patterns of the hub also match files in subfolders.
    """
    names = _list_files(repository, commit, parts)
    if names is None:
        cached = _cached(repository, commit, parts)
        if cached is None:
            raise _unavailable(
                repository,
                "the hub cannot be reached and its local cache lacks them; set HF_ENDPOINT to a mirror, or use a "
                "local folder",
            )
        return cached
    if not any(name.endswith(WEIGHTS) for name in names):
        raise _unavailable(repository, f"there are no {WEIGHTS} files in {' or '.join(parts)} or beside them")
    try:
        escaped = [glob.escape(name) for name in names]
        return Path(snapshot_download(repository, revision=commit, allow_patterns=escaped))
    except Exception as error:  # the HTTP client raises errors of many types; the disk may be full
        reason = f"the download was interrupted ({type(error).__name__}); run the same command again to continue"
        raise _unavailable(repository, reason) from None


def _list_files(repository: str, commit: str, parts: tuple[str, ...]) -> list[str] | None:
    """Names of the files to download; None if the hub cannot be reached."""
    if constants.is_offline_mode():
        return None
    try:
        return _wanted(HfApi().list_repo_files(repository, revision=commit), parts)
    except errors.GatedRepoError:
        reason = "accept the terms of the repository on the hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "correct the name, or set HF_TOKEN if the repository is private"
    except errors.RevisionNotFoundError:
        reason = f"it has no commit {commit}; correct the pin"
    except errors.HfHubHTTPError as error:
        reason = f"the hub answered {error.response.status_code}; try again, or set HF_ENDPOINT to a mirror"
    except Exception:  # the HTTP client raises errors of many types
        return None
    raise _unavailable(repository, reason)


def _unavailable(repository: str, reason: str) -> StageError:
    return StageError(f"could not download the weights '{repository}': {reason}")


def _cached(repository: str, commit: str, parts: tuple[str, ...]) -> Path | None:
    """The cached snapshot of a commit with one of `parts`, or of a single component."""
    for name in (*(f"{folder}/config.json" for folder in parts), "config.json"):
        found = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def _from_s3(address: str, pin: str, parts: tuple[str, ...]) -> Path:
    """Download the files below an s3:// prefix to the scratch folder, once; AWS_ENDPOINT_URL selects another server."""
    bucket, prefix = objects.split(address)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    wanted = json.dumps([bucket, prefix, pin, parts])
    folder = workspace.scratch() / "weights" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    with locks.exclusive(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        access = S3Params()
        client, arriving = objects.client(access), folder.with_suffix(".part")
        with objects.explained(address):
            stored = {item.key.removeprefix(prefix): item for item in objects.listed(client, bucket, prefix)}
            names = _wanted(list(stored), parts)
            if not names:
                raise StageError(f"{address} holds no weights; use the prefix of the model files")
            files = [stored[name] for name in names]
            objects.download(client, bucket, files, arriving, access.connections, TIMEOUT_SECONDS)
        with atomic.writing_folder(folder) as temporary:
            for name, item in zip(names, files, strict=True):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(arriving / objects.file_name(item), temporary / name)
        shutil.rmtree(arriving)
    return folder
