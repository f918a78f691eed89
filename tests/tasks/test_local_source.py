"""Files that DVC cannot hash are named before DVC starts, in one sentence."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.params import NO_PATH
from tasks.runtime import local_source
from tasks.runtime.errors import StageError
from tests.support.data_inputs import ROOT, folder_params, ingest_params, picture, write_params, write_tree


def dead_link(folder):
    (folder / "odd.png").symlink_to(folder / "gone")


def loop(folder):
    (folder / "odd.png").symlink_to("odd.png")


def pipe(folder):
    os.mkfifo(folder / "odd.png")


def linked_pipe(folder):
    os.mkfifo(folder.parent / "pipe")
    (folder / "odd.png").symlink_to(folder.parent / "pipe")


def listener(folder):
    with (
        contextlib.chdir(folder),
        socket.socket(socket.AF_UNIX) as server,
    ):  # of a path 107 characters
        server.bind("odd.png")


def not_utf8(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/odd\x83e.png")).write_bytes(picture(9))


def hidden(folder):
    (folder / ".odd.png").symlink_to(folder / "gone")


BASELINE = "tasks/presets/accepted_digits.json"
ODD = {
    "dead link": (dead_link, "odd.png: a dead link"),
    "loop": (loop, "odd.png: a link in a loop"),
    "pipe": (pipe, "odd.png: a pipe, a socket or a device"),
    "linked pipe": (linked_pipe, "odd.png: a pipe, a socket or a device"),
    "socket": (listener, "odd.png: a pipe, a socket or a device"),
    "not UTF-8": (not_utf8, "odd%udc83e.png: a name that is not UTF-8"),
    "hidden": (hidden, ".odd.png: a dead link"),
}


@pytest.fixture
def tree(tmp_path):
    """A folder of pictures, and a work tree whose params.yaml names it."""
    folder = write_tree(tmp_path / "pictures", {f"{seed}.png": picture(seed) for seed in range(3)})
    write_tree(tmp_path / "tree", {name: (ROOT / name).read_bytes() for name in (NO_PATH, BASELINE)})
    write_params(tmp_path / "tree" / "params.yaml", download={"source": "folder", "path": str(folder)})
    return tmp_path / "tree"


@pytest.mark.parametrize("kind", ODD)
def test_files_that_dvc_cannot_hash_are_named_with_a_remedy(tree, kind):
    make, said = ODD[kind]
    folder = tree.parent / "pictures"
    local_source.require_hashable(tree)
    make(folder)
    with pytest.raises(StageError) as raised:
        local_source.require_hashable(tree)
    assert said in str(raised.value)
    assert f"tar -cf pictures.tar -C {folder} ." in str(raised.value)


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "socket"])
def test_the_remedy_works(tree, tmp_path, kind):
    """A tar of the folder can be ingested; the odd file is read or goes to quarantine."""
    ODD[kind][0](tree.parent / "pictures")
    subprocess.run(["tar", "-cf", tmp_path / "pictures.tar", "-C", tree.parent / "pictures", "."], check=True)
    write_params(tree / "params.yaml", download={"source": "folder", "path": str(tmp_path / "pictures.tar")})
    local_source.require_hashable(tree)
    download(tmp_path / "raw", folder_params(tmp_path / "pictures.tar"))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())


def test_links_to_existing_files_and_folders_are_accepted(tree):
    folder = tree.parent / "pictures"
    (folder / "link.png").symlink_to("0.png")
    (folder / "up").symlink_to("..")
    local_source.require_hashable(tree)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs another user")
def test_an_unreadable_file_is_named(tree, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, *_, **__: not path.endswith("1.png")) if os.geteuid() == 0 else (
        tree.parent / "pictures" / "1.png"
    ).chmod(0)
    with pytest.raises(StageError, match=r"1\.png: a file without read permission"):
        local_source.require_hashable(tree)


def test_a_missing_source_on_another_machine_gets_correct_advice(tree):
    write_params(tree / "params.yaml", download={"source": "folder", "path": "/gone/pictures"})
    with pytest.raises(StageError, match="'dvc pull' and then 'dvc repro --allow-missing'"):
        local_source.require_hashable(tree)
    local_source.require_hashable(tree, allow_missing=True)
    write_params(tree / "params.yaml", train={"init_from": "gone"})
    with pytest.raises(StageError, match=r"train\.init_from gone does not exist"):
        local_source.require_hashable(tree, allow_missing=True)


def test_make_repro_names_a_pipe_at_once(tree):
    pipe(tree.parent / "pictures")
    (tree / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "infra.run"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "repro: error: DVC cannot read 1 file of download.path" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30


def test_special_files_of_a_folder_go_to_quarantine(tmp_path, tree):
    """Without DVC, which starts the stage only if it can hash the folder."""
    folder = tree.parent / "pictures"
    (folder / "dead.png").symlink_to("gone")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    not_utf8(folder)
    download(tmp_path / "raw", folder_params(folder))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    refused = pq.read_table(tmp_path / "quarantine" / "quarantine.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in refused} == {
        "dead.png": "link",
        "loop.png": "link",
        "pipe.png": "special file",
    }
