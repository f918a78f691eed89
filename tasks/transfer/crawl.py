"""img2dataset, which downloads a table of addresses: its environment, and a run of it within limits.

What it does by itself: many processes and threads, a time-out for each wait, the opt-out headers (X-Robots-Tag:
noai, noimageai, noindex, noimageindex), shards that are finished or not. What it does not: it opens any address, reads
answers of any length, and waits for ever for a server that sends a byte now and then. So the only way out
that it is given is the proxy of `tasks.transfer.proxy`, which screens addresses and bounds bytes and time. Hashes are
compared by `tasks.transfer.laion` from what it reports, since it takes a row without a hash for a mismatch.

With `pyspark` and `ray` it works on many machines. The workers reach the proxy where the machine that runs the
stage has an address for them (`download.laion.proxy_host`), if they get the environment's `http_proxy` and
`https_proxy`: a local session does, on a cluster it is for its configuration to pass them on. Workers that
ignore them are not screened.
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
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.runtime import atomic, leash, locks, workspace
from tasks.runtime.disk import require_space
from tasks.runtime.stage import StageError
from tasks.transfer import proxy

if TYPE_CHECKING:
    from tasks.params import DownloadParams, LaionParams

LOCKS = {
    "multiprocessing": Path(__file__).with_name("img2dataset.lock"),
    "pyspark": Path(__file__).with_name("img2dataset-cluster.lock"),
    "ray": Path(__file__).with_name("img2dataset-cluster.lock"),
}
ENVIRONMENT_BYTES = 1_500_000_000
"""Free space that installing needs for a while; 780 MB stay."""
OPT_OUT = ["noai", "noimageai", "noindex", "noimageindex"]
POLL_SECONDS = 0.5
# Answers of a proxy that is gone, is another one's, or had spent its bytes: no fault of the addresses asked for.
SPOILT = r"Errno 111\]|Error 407|failed: 407|Error 471|failed: 471"
GRACE_SECONDS = 1.0
"""Between SIGTERM and SIGKILL for the engine, which has nothing to save: its shards are renamed when complete."""


def download(urls: Path, target: Path, kept: list[str], hash_kind: str, params: DownloadParams) -> dict[str, int]:
    """Download the tables of the folder `urls` (columns url, caption and `kept`) into Parquet shards in `target`.

    Each shard holds those columns, `key`, `status`, `error_message`, `width`, `height`, the hash of the bytes that came
    (`hash_kind`, "md5" or "sha256") and the picture in `jpg`, whatever its format. Shards that are complete from an
    earlier run stay. Returns how the connections of this run ended.
    Raises `StageError` where the engine cannot be installed or breaks down, or time or bytes are up.
    """
    laion = params.laion
    _discard_spoilt(target)
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
                f"the images exceed download.max_bytes {params.max_bytes}; raise it, then run the same command again, "
                "which keeps what is complete"
            )
    return dict(sorted(running.counts.items()))


def environment(distributor: str) -> Path:
    """The Python of img2dataset's own environment, which is installed when it is not there. 780 MB, a minute."""
    lock = LOCKS[distributor]
    identity = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = workspace.scratch() / "environments" / f"{lock.stem}-{identity}"
    python = folder / "bin" / "python"
    with locks.exclusive(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)  # an installation that was broken off
            _install(folder, python, lock)
            atomic.write_text(folder / "complete", "")
    return python


def _install(folder: Path, python: Path, lock: Path) -> None:
    print("download: installing img2dataset into an environment of its own (780 MB, a minute or two)", flush=True)
    require_space(folder.parent, ENVIRONMENT_BYTES)
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "-r", str(lock)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise StageError(f"img2dataset could not be installed ({reason}); check the network, then run this again")


def _command(python: Path, urls: Path, target: Path, kept: list[str], hash_kind: str, laion: LaionParams) -> list[str]:
    options: dict[str, Any] = {
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
        options["disable_all_reencoding"] = True  # bytes as published; nothing is decoded before `ingest`
    else:
        options |= {"resize_mode": "keep_ratio", "image_size": laion.shorter_side, "resize_only_if_bigger": True}
        options["max_image_area"] = laion.max_pixels
    return [str(python), "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]


def _variables(address: str, laion: LaionParams) -> dict[str, str]:
    """The environment of the engine: one way out, no reports to anybody, no credentials of ours."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ
    }
    ways_out = dict.fromkeys(("http_proxy", "https_proxy", "ftp_proxy", "all_proxy"), address)
    return {
        **kept,
        **ways_out,
        "no_proxy": "",
        "WANDB_MODE": "disabled",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # What OpenCV refuses to decode, where images are resized.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(laion.max_pixels),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }


def _shard_count(urls: Path, shard_size: int) -> int:
    import pyarrow.parquet as pq

    return sum(-(-pq.read_metadata(file).num_rows // shard_size) for file in urls.glob("*.parquet"))


def _complete(target: Path) -> list[Path]:
    """The files by which img2dataset says that a shard is complete."""
    return list(target.glob("*_stats.json"))


def _discard_spoilt(target: Path) -> None:
    """Remove shards in which addresses failed for want of the proxy, so that they are asked for again."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for stats in _complete(target):
        shard = stats.with_name(stats.name.replace("_stats.json", ".parquet"))
        errors = pq.read_table(shard, columns=["error_message"])["error_message"]
        if pc.any(pc.match_substring_regex(errors, SPOILT)).as_py():
            stats.unlink()
            shard.unlink()


def _run(command: list[str], variables: dict[str, str], shards: int, target: Path, params: DownloadParams) -> None:
    """Run the engine until every shard is complete; it ends with this process, however that ends."""
    deadline = time.monotonic() + params.timeout_seconds
    target.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log")
    progress = tqdm(desc="download", total=shards, unit="shard", mininterval=1, dynamic_ncols=True)
    with log.open("wb") as output, progress as bar:
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
                        f"{params.timeout_seconds}; the same command continues"
                    )
                time.sleep(POLL_SECONDS)
            bar.update(len(_complete(target)) - bar.n)
        finally:
            engine.communicate()  # closes the leash, which ends the engine
    if bar.n < shards:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise StageError(
            f"img2dataset ended with {bar.n} of {shards} shards complete ({' '.join(last) or 'without a word'}); the "
            f"same command continues, and {log} says more"
        )
