"""The import closure of a stage, and the keys that are made from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tasks import params
from tasks.formats import latents
from tasks.formats.verdict import Verdict
from tasks.runtime import closure
from tasks.training import key as training_key
from tests.support.train_inputs import ROOT, write_inputs


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The project's source files in a folder that may be edited."""
    for name in closure.NAMED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    closure._files.cache_clear()
    yield tmp_path
    closure._files.cache_clear()


def edit(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")


def key_of(folder: Path) -> training_key.RunFacts:
    loaded = params.load(ROOT / "params.yaml")
    index = latents.read_index(folder / "latents")
    sections = (loaded.model, loaded.diffusion, loaded.train)
    return training_key.run_facts(index, folder / "codec", Verdict(), *sections)


def test_every_file_that_train_imports_is_in_its_key_or_excluded_with_a_reason():
    imported = set(closure.closure("tasks/train.py"))
    assert set(training_key.NO_WEIGHT) <= imported, "remove from NO_WEIGHT what train no longer imports"
    assert set(training_key.code()) == imported - set(training_key.NO_WEIGHT)
    assert all(len(reason) > 10 for reason in training_key.NO_WEIGHT.values())
    decisive = {
        "models/networks/text_encoder.py",
        "models/networks/network.py",
        "models/networks/published.py",
        "tasks/formats/latents.py",
    }
    assert decisive <= set(training_key.code())


@pytest.mark.parametrize(
    "file", ["models/networks/text_encoder.py", "models/networks/network.py", "tasks/formats/latents.py"]
)
def test_an_edited_file_gives_another_training_key(copied, tmp_path_factory, file):
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    before = key_of(inputs)
    edit(copied / "models" / "noise" / "samplers.py")
    assert key_of(inputs) == before, "drawing previews alters no weight"
    edit(copied / file)
    after = key_of(inputs)
    assert after.train_key != before.train_key and after.trajectory_key != before.trajectory_key


def test_a_missing_file_is_an_error(copied):
    with pytest.raises(FileNotFoundError, match=r"tasks/gone\.py does not exist"):
        closure.closure("tasks/gone.py")
    with pytest.raises(FileNotFoundError, match=r"tasks/gone\.py does not exist"):
        closure.closure("tasks/train.py", without=["tasks/gone.py"])
    (copied / "models" / "optimization" / "ema.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"imports models\.optimization\.ema"):
        training_key.code()


def test_stages_depend_on_no_more_than_they_need():
    train, export, encode = (set(closure.closure(f"tasks/{name}.py")) for name in ("train", "export", "encode"))
    decoder = {"tasks/pictures/decoding.py", "tasks/pictures/images.py"}
    assert not decoder & train, "editing the image decoder must not retrain"
    assert decoder & export == {"tasks/pictures/decoding.py"}, "the bundle contains the decoder, and no shards"
    assert "tasks/training/bucketed.py" not in encode, "editing what training draws must not encode again"
    assert "tasks/formats/buckets.py" not in train


def test_latents_are_kept_by_the_code_that_made_them(copied):
    starts = ("tasks/formats/buckets.py", "tasks/encoding/transform.py")
    assert {"tasks/pictures/decoding.py", "models/networks/autoencoder.py"} <= set(closure.closure(*starts))
    before = closure.digest(*starts)
    edit(copied / "tasks" / "training" / "bucketed.py")
    edit(copied / "tasks" / "encode.py")
    assert closure.digest(*starts) == before
    edit(copied / "tasks" / "pictures" / "decoding.py")
    assert closure.digest(*starts) != before


def test_the_bundle_carries_what_its_code_imports():
    """The bundle is a package of its own, which imports nothing of `tasks` and no PyTorch."""
    files = closure.closure("models/bundle.py", plumbing=())
    names = ("bundle", "bundle_info", "images/pixels", "json_files", "masks", "noise/editing", "noise/paths")
    names += ("noise/samplers", "noise/spacing", "request")
    assert files == [f"models/{name}.py" for name in names]
    assert not any("torch" in line and "import" in line for file in files for line in _top_imports(file))


def _top_imports(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if line.startswith(("import ", "from "))]


RERUN = {
    "README.md": "",
    "tasks/params/model.py": "",
    "tasks/runtime/stage.py": "",
    "tasks/runtime/tracking.py": "",
    "tasks/transfer/hub.py": "download",
    "tasks/sources/archives.py": "download ingest",
    "tasks/validation/expectations.py": "validate",
    "tasks/encoding/transform.py": "encode prior",
    "tasks/training/batches.py": "train",
    "models/optimization/ema.py": "train",
    "models/networks/unet.py": "prior train evaluate edit visualize export register",
    "models/judges/metrics.py": "judge evaluate edit register",
    "models/bundle.py": "export",
    "tasks/report/charts.py": "visualize",
    "tasks/formats/model_card.py": "package",
    "tasks/registration/gates.py": "register",
}
"""File -> the stages whose command `dvc repro` runs again after an edit of it."""


@pytest.mark.parametrize("file", RERUN)
def test_an_edit_reruns_the_stages_that_it_can_affect(file):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert (ROOT / file).is_file()
    rerun = [
        name
        for name, stage in stages.items()
        if any(file == path or file.startswith(f"{path}/") for path in stage["deps"])
    ]
    assert rerun == RERUN[file].split()
