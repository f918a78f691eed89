"""Fixtures that several test files share."""

import datetime
import functools
import gc
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.shared import made_once

ROOT = Path(__file__).parent.parent

# The test processes share the cores: one thread of PyTorch each, which is also faster for networks as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before a test file imports ONNX Runtime or starts DVC: no test reports to their makers.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["DVC_NO_ANALYTICS"] = os.environ["DO_NOT_TRACK"] = "1"

# By default Python searches for garbage after 700 new objects: a tenth of the time in which packages are loaded.
gc.set_threshold(50_000)

# pytest records messages of every level: PyTorch would describe each graph that it traces.
logging.disable(logging.DEBUG)

# `make test` passes its own flags on, which would change what a `make` inside a test prints.
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(_name, None)

# Started first, so that no process runs a long file alone at the end. `test_prefect_server` is not among the first
# three: it would wait for the chain of `test_end_to_end`.
LONGEST = (
    "test_end_to_end",
    "test_register",
    "test_text_to_image",
    "test_validate",
    "test_prefect_server",
    "test_evaluate",
    "test_flows",
    "test_resume",
    "test_export",
    "test_train",
    "test_compilation",
    "test_visualize",
    "test_help",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONGEST, then the others; inside a file nothing moves."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Leave the packages that the test files have imported out of every later search for garbage."""
    gc.freeze()


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Undo what a test does to the environment: stages exempt this machine from proxies for the rest of a process."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> Path:
    """A migrated MLflow database, to be copied and never opened: a migration takes 7 s."""
    from mlflow.store.db import utils

    # MLflow loads its migrations, which never change, for each database that is opened.
    utils._get_latest_schema_revision = functools.cache(utils._get_latest_schema_revision)
    return made_once(tmp_path_factory, "mlflow", _migrate) / "mlflow.db"


def _migrate(folder: Path) -> None:
    path = folder / "mlflow.db"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{path}", "AFTERIMAGE_SCRATCH": str(folder)}
    connect = "from tasks.runtime import tracking; tracking.connect()"
    subprocess.run([sys.executable, "-c", connect], cwd=ROOT, env=environment, check=True)
    with closing(sqlite3.connect(path)) as database:  # its artifacts would be beside this file, not the copy
        database.execute("DELETE FROM experiments WHERE name = 'afterimage'")
        database.commit()


@pytest.fixture(scope="session")
def migrated_prefect(tmp_path_factory) -> Path:
    """A migrated database of a Prefect server, to be copied and never opened: a migration takes half of its start."""
    return made_once(tmp_path_factory, "prefect", _migrate_prefect) / "prefect.db"


def _migrate_prefect(folder: Path) -> None:
    variables = {"PREFECT_HOME": str(folder / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    variables["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=os.environ | variables, check=True, capture_output=True)
    with closing(sqlite3.connect(folder / "prefect.db")) as database:  # one file, without its log
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A work tree in which `export` has run on a class-conditional network; copy it before writing there."""
    from tests.support import model_outputs

    return made_once(tmp_path_factory, "exported", model_outputs.exported)


@pytest.fixture(scope="session")
def exported_unconditional(tmp_path_factory) -> Path:
    """The same for an unconditional network."""
    from tests.support import model_outputs

    return made_once(tmp_path_factory, "exported-none", lambda folder: model_outputs.exported(folder, "none"))


@pytest.fixture
def work(tmp_path, exported, migrated_database, monkeypatch):
    """A work tree in which everything before `register` has run, with an MLflow store of its own."""
    from tests.support.registry import workspace_in

    return workspace_in(tmp_path, exported, migrated_database, monkeypatch)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for files.test and its key, in one file; only these tests trust it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    path = tmp_path_factory.mktemp("tls") / "files.test.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "files.test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("files.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(signed.public_bytes(Encoding.PEM) + private)
    return path


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two devices that compute on the CPU, with one thread each, under the names "cpu:0" and "cpu:1".

    Each has copies of the networks, as GPUs have.
    """
    import copy

    import torch

    from models import parallel, pipeline
    from models.networks import compilation

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(parallel, "devices_of", lambda device: ("cpu:0", "cpu:1") if device == "cpu" else (device,))
    for module in (pipeline, compilation):
        monkeypatch.setattr(
            module, "placed", lambda network, device: network if device == "cpu" else copy.deepcopy(network)
        )
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_gpu():
    """The device "cuda", whose tensors have no values; see `tests/support/fake_cuda.py`."""
    from tests.support.fake_cuda import fake_cuda

    with fake_cuda() as fake:
        yield fake
