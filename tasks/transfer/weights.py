"""Published weights on this disk: from a hub repository, a local folder or S3, pinned to one content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from tasks.params import S3Params
from tasks.runtime import atomic, locks, workspace
from tasks.runtime.stage import StageError
from tasks.sources.entry import sha256_of
from tasks.transfer import objects

WEIGHTS = ".safetensors"
KEPT = (".json", WEIGHTS, ".txt", ".model")
"""Suffixes of the files that are brought: never a pickle, never code."""
COMMIT_DIGITS = 40
TIMEOUT_SECONDS = 6 * 3600
"""For all files of a model; what has arrived is kept."""


def bring(weights: str, pin: str, parts: tuple[str, ...]) -> Path:
    """The folder of a model in diffusers' or transformers' layout, `parts` naming the subfolders that are needed.

    `weights` is s3://bucket/prefix, a hub repository (then `pin` is its commit) or a local folder (then, as for S3,
    `pin` is the sha256 of the one .safetensors file in the first of `parts`, or in the folder itself; where other parts
    have such files, too, the sha256 of their hashes one after the other). Raises `StageError` where it cannot be had
    or is not what `pin` says.
    """
    if weights.startswith("s3://"):
        folder = _from_s3(weights, pin, parts)
    elif len(pin) == COMMIT_DIGITS:
        return _from_hub(weights, pin, parts)
    else:
        folder = Path(weights).expanduser()
        if not folder.is_dir():
            raise StageError(f"the weights '{weights}' are no folder here; correct the path, or pin a hub repository")
    _require_pin(folder, pin, parts)
    return folder


def part(folder: Path, name: str) -> Path:
    """The component `name` of a model folder: its subfolder, or the folder itself where it holds nothing else."""
    return folder / name if (folder / name).is_dir() else folder


def _require_pin(folder: Path, pin: str, parts: tuple[str, ...]) -> None:
    where = part(folder, parts[0])
    files = sorted(where.glob(f"*{WEIGHTS}"))
    if len(files) != 1:
        raise StageError(f"{where} holds {len(files)} {WEIGHTS} files; give a folder with exactly one")
    files += [file for name in parts[1:] for file in sorted((folder / name).glob(f"*{WEIGHTS}"))]
    hashes = [sha256_of(file) for file in files]
    found = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    if found != pin:
        named = " and ".join(map(str, files))
        raise StageError(f"the sha256 of {named} is {found} and not the pinned {pin}; correct the pin or the weights")


def _wanted(names: list[str], parts: tuple[str, ...]) -> list[str]:
    """Of a model folder's files those that are asked for: what lies in `parts`, and small files beside them; or where
    there is no such part, the folder itself is one. A second dot, as in model.fp16.safetensors, marks the same weights
    in another form."""
    paths = [PurePosixPath(name) for name in names]
    kept = [path for path in paths if path.suffix in KEPT and ".." not in path.parts and "." not in path.stem]
    inside = [path for path in kept if len(path.parts) > 1 and path.parts[0] in parts]
    beside = [path for path in kept if len(path.parts) == 1 and not (inside and path.suffix == WEIGHTS)]
    return [path.as_posix() for path in sorted([*inside, *beside])]


def _from_hub(repository: str, commit: str, parts: tuple[str, ...]) -> Path:
    """The snapshot of a repository's commit in the hub's cache, brought there where it is missing.

    The files are named one by one: the hub's patterns cannot tell those of a folder from those below it.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        if constants.is_offline_mode():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        names = _wanted(HfApi().list_repo_files(repository, revision=commit), parts)
    except errors.GatedRepoError:
        remedy = "accept its terms on the hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        remedy = "correct the name, or set HF_TOKEN where it is private"
    except errors.RevisionNotFoundError:
        remedy = f"it has no commit {commit}; correct the pin"
    except errors.HfHubHTTPError as error:
        remedy = f"the hub answered {error.response.status_code}; try again, or set HF_ENDPOINT to a mirror"
    except Exception as error:  # whatever its HTTP client raises where there is no answer
        cached = _cached(repository, commit, parts)
        if cached is not None:
            return cached
        remedy = (
            f"the hub cannot be reached ({type(error).__name__}) and its cache here lacks them; set HF_ENDPOINT to a "
            "mirror, or name a local folder"
        )
    else:
        if any(name.endswith(WEIGHTS) for name in names):
            try:
                escaped = [glob.escape(name) for name in names]
                return Path(snapshot_download(repository, revision=commit, allow_patterns=escaped))
            except Exception as error:  # as above, and a full disk
                remedy = f"the download broke off ({type(error).__name__}); the same command goes on from there"
        else:
            remedy = f"it has no {WEIGHTS} files in {' or '.join(parts)} or beside them; name another"
    raise StageError(f"could not bring the weights '{repository}': {remedy}")


def _cached(repository: str, commit: str, parts: tuple[str, ...]) -> Path | None:
    """The snapshot that the hub's cache holds of a commit with one of `parts`, or of a network alone."""
    from huggingface_hub import try_to_load_from_cache

    for name in (*(f"{folder}/config.json" for folder in parts), "config.json"):
        found = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def _from_s3(address: str, pin: str, parts: tuple[str, ...]) -> Path:
    """Bring the files below an s3:// prefix into the scratch folder, once; AWS_ENDPOINT_URL names another server."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    wanted = json.dumps([bucket, prefix, pin, parts])
    folder = workspace.scratch() / "weights" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    with locks.exclusive(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        access = S3Params()
        client, arriving = objects.client(access), folder.with_suffix(".part")
        with objects.explained(address):
            stored = {its.key.removeprefix(prefix): its for its in objects.listed(client, bucket, prefix)}
            names = _wanted(list(stored), parts)
            if not names:
                raise StageError(f"{address} holds no weights; give the prefix below which model files lie")
            files = [stored[name] for name in names]
            objects.bring(client, bucket, files, arriving, access.connections, TIMEOUT_SECONDS)
        with atomic.writing_folder(folder) as temporary:
            for name, its in zip(names, files, strict=True):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(arriving / objects.file_name(its), temporary / name)
        shutil.rmtree(arriving)
    return folder
