"""Run img2dataset, which downloads tables of URLs, in a separate environment and within limits.

img2dataset provides parallel downloads, timeouts, opt-out headers (X-Robots-Tag: noai, noimageai, noindex,
noimageindex) and resumable shards. It would also open private addresses, read responses of any length and wait forever
for a slow server; therefore it only reaches the network through the proxy of `tasks.transfer.proxy`, which screens
addresses and limits bytes and time. Hashes are compared in `tasks.transfer.laion`, because img2dataset treats a row
without a published hash as a mismatch.

With `pyspark` and `ray` the workers may run on several machines. They must reach the proxy at
`download.laion.proxy_host` and receive the environment variables `http_proxy` and `https_proxy`. A local session
passes them on; a cluster must be configured to do so. Workers that ignore the variables are not screened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.runtime import atomic, leash, locks, workspace
from tasks.runtime.disk import require_space
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.transfer import proxy

if TYPE_CHECKING:
    from tasks.params import DownloadParams, LaionParams

LOCKS = {
    "multiprocessing": Path(__file__).with_name("img2dataset.lock"),
    "pyspark": Path(__file__).with_name("img2dataset-cluster.lock"),
    "ray": Path(__file__).with_name("img2dataset-cluster.lock"),
}
ENVIRONMENT_BYTES = 1_500_000_000
"""Free space needed during the installation; the environment takes 780 MB."""
OPT_OUT = ["noai", "noimageai", "noindex", "noimageindex"]
POLL_SECONDS = 0.5
# Errors caused by the proxy (stopped, wrong password, total bytes exhausted) and not by the URL.
PROXY_ERRORS = r"Errno 111\]|Error 407|failed: 407|Error 471|failed: 471"
GRACE_SECONDS = 1.0
"""Between SIGTERM and SIGKILL for img2dataset, which has nothing to save: its shards are renamed when complete."""


def download(urls: Path, target: Path, kept: list[str], hash_kind: str, params: DownloadParams) -> dict[str, int]:
    """Download the tables of the folder `urls` (columns url, caption and `kept`) into Parquet shards in `target`.

    Each shard has these columns, `key`, `status`, `error_message`, `width`, `height`, the hash of the received bytes
    (column `hash_kind`, "md5" or "sha256") and the image in `jpg`, whatever its format. Complete shards of an earlier
    run are kept. Returns the number of connections by outcome.
    Raises `StageError` if img2dataset cannot be installed or fails, or if the limit of time or bytes is reached.
    """
    laion = params.laion
    _discard_incomplete(target)
    shards = _shard_count(urls, laion.shard_size)
    if len(_complete(target)) == shards:
        return {}
    python = environment(laion.distributor)
    limits = proxy.Limits(
        max_bytes=laion.max_image_bytes,
        seconds=laion.seconds_per_image,
        total_bytes=params.max_bytes,
        connections=laion.processes * laion.threads,
        allow_private_addresses=params.allow_private_addresses,
    )
    with proxy.running(limits, laion.proxy_host) as running:
        command = _command(python, urls, target, kept, hash_kind, laion)
        _run(command, _variables(running.url, laion), shards, target, params)
        if running.received > params.max_bytes:
            raise StageError(
                f"the images exceed download.max_bytes {params.max_bytes}; raise it, then run the same command again "
                "to continue"
            )
    return dict(sorted(running.counts.items()))


def environment(distributor: str) -> Path:
    """Python executable of the environment of img2dataset, installed on first use (780 MB, about a minute)."""
    lock = LOCKS[distributor]
    identity = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = workspace.scratch() / "environments" / f"{lock.stem}-{identity}"
    python = folder / "bin" / "python"
    with locks.exclusive(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted installation
            _install(folder, python, lock)
            atomic.write_text(folder / "complete", "")
    return python


def _install(folder: Path, python: Path, lock: Path) -> None:
    print("download: installing img2dataset into a separate environment (780 MB, about a minute)", flush=True)
    require_space(folder.parent, ENVIRONMENT_BYTES)
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "-r", str(lock)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
        raise StageError(f"img2dataset could not be installed ({reason}); check the network, then run this again")


def _command(python: Path, urls: Path, target: Path, kept: list[str], hash_kind: str, laion: LaionParams) -> list[str]:
    options: dict[str, object] = {
        "url_list": str(urls),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": json.dumps(kept),
        "output_folder": str(target),
        "output_format": "parquet",
        "number_sample_per_shard": laion.shard_size,
        "processes_count": laion.processes,
        "thread_count": laion.threads,
        "timeout": laion.seconds_per_wait,
        "retries": laion.retries,
        "compute_hash": hash_kind,
        "disallowed_header_directives": json.dumps(OPT_OUT),
        "extract_exif": False,
        "incremental_mode": "incremental",
        "distributor": laion.distributor,
        "subjob_size": laion.subjob_size,
        "enable_wandb": False,
    }
    if laion.user_agent is not None:
        options["user_agent_token"] = laion.user_agent
    if laion.shorter_side is None:
        options["disable_all_reencoding"] = True  # keep the published bytes; `ingest` decodes
    else:
        options |= {"resize_mode": "keep_ratio", "image_size": laion.shorter_side, "resize_only_if_bigger": True}
        options["max_image_area"] = laion.max_pixels
    return [str(python), "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]


def _variables(address: str, laion: LaionParams) -> dict[str, str]:
    """Environment variables of img2dataset: the proxy, no telemetry, no credentials."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ
    }
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "ftp_proxy", "all_proxy"), address)
    return {
        **kept,
        **proxies,
        "no_proxy": "",
        "WANDB_MODE": "disabled",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # OpenCV, which resizes images, refuses larger ones.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(laion.max_pixels),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }


def _shard_count(urls: Path, shard_size: int) -> int:
    return sum(-(-pq.read_metadata(file).num_rows // shard_size) for file in urls.glob("*.parquet"))


def _complete(target: Path) -> list[Path]:
    """Statistics files, which img2dataset writes when a shard is complete."""
    return list(target.glob("*_stats.json"))


def _discard_incomplete(target: Path) -> None:
    """Remove shards in which the proxy caused errors, so that their URLs are downloaded again."""
    for stats in _complete(target):
        shard = stats.with_name(stats.name.replace("_stats.json", ".parquet"))
        errors = pq.read_table(shard, columns=["error_message"])["error_message"]
        if pc.any(pc.match_substring_regex(errors, PROXY_ERRORS)).as_py():
            stats.unlink()
            shard.unlink()


def _run(command: list[str], variables: dict[str, str], shards: int, target: Path, params: DownloadParams) -> None:
    """Run img2dataset until every shard is complete; it ends when this process ends, even if that is killed."""
    deadline = time.monotonic() + params.timeout_seconds
    target.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log")
    with log.open("wb") as output, progress(desc="download", total=shards, unit="shard") as bar:
        engine = subprocess.Popen(
            leash.command_line(command, GRACE_SECONDS),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=target.parent,
            start_new_session=True,
        )
        try:
            while engine.poll() is None:
                bar.update(len(_complete(target)) - bar.n)
                if time.monotonic() > deadline:
                    raise StageError(
                        f"{bar.n} of {shards} shards are complete after download.timeout_seconds "
                        f"{params.timeout_seconds}; run the same command again to continue"
                    )
                time.sleep(POLL_SECONDS)
            bar.update(len(_complete(target)) - bar.n)
        finally:
            engine.communicate()  # closes the leash, which ends the engine
    if bar.n < shards:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise StageError(
            f"img2dataset ended with {bar.n} of {shards} shards complete ({' '.join(last) or 'no message'}); see "
            f"{log}, then run the same command again to continue"
        )
