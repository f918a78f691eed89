"""The registered model in use: the images that PyTorch draws, and wrong requests answered in one sentence."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import model_outputs
from tests.support.registry import loaded, workspace_in


def test_registered_model_draws_what_pytorch_draws(work):
    from models.images.pixels import to_uint8
    from models.noise.samplers import Sampling
    from models.pipeline import load_pipeline
    from tasks.drawing.options import Options
    from tasks.drawing.run import run
    from tasks.drawing.settings import read_settings

    work.register()
    model = loaded()
    (request_,) = model.metadata.signature.inputs.to_dict()
    fields = {
        "label",
        "prompt",
        "negative_prompt",
        "image",
        "strength",
        "mask",
        "seed",
        "steps",
        "sampler",
        "eta",
        "guidance",
        "guidance_interval",
        "guidance_kind",
    }
    assert set(request_["properties"]) == fields
    requirements = (Path(work.versions[1].source) / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {"mlflow", "numpy", "onnxruntime", "pillow", "pydantic"}
    assert all(line.split("==")[1][0].isdigit() for line in requirements)
    settings = {"eta": 0.5, "guidance_interval": [0.1, 2.0]}
    first, second, third = model.predict(
        [
            {"prompt": "a cat", "seed": 5, "steps": 6, "sampler": "ddim", "guidance": 1.5},
            {"label": 2, "seed": 6, "steps": 6, "sampler": "ddim", "guidance": 1.5} | settings,
            {"label": 2, "seed": 6, "steps": 6, "sampler": "ddim", "guidance": 1.5, "guidance_kind": "auto"},
        ]
    )
    pipeline = load_pipeline(work.root / "outputs" / "pipeline")
    expected = to_uint8(
        np.concatenate(
            [
                pipeline.sample([5], [2], Sampling("ddim", 6, guidance_scale=1.5)),
                pipeline.sample([6], [2], Sampling("ddim", 6, 0.5, 1.5, (0.1, 2.0))),
                pipeline.sample([6], [2], Sampling("ddim", 6, guidance_scale=1.5, guidance="auto")),
            ]
        )
    )
    for png, image in zip((first, second, third), expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))
        assert np.abs(pixels.astype(int) - image[0]).max() <= 1
    assert len({first, second, third}) == 3
    options = {"model": "models:/afterimage-test@champion", "sampler": "ddim", "steps": 6, "guidance": 1.5}
    run(Options(**options, prompt=["a cat"], seed=[5], out=work.root / "drawn.png"))
    assert np.array_equal(np.asarray(Image.open(work.root / "drawn.png")), expected[0][0])
    assert read_settings(work.root / "drawn.png").model == "models:/afterimage-test/1"
    assert model.predict(model.input_example)[0][:4] == b"\x89PNG"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)


def base64_of(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_registered_model_changes_an_image_as_pytorch_does(registered, exported, tmp_path, monkeypatch):
    from models.editing import edit
    from models.images.pixels import to_uint8
    from models.noise.samplers import Sampling
    from models.pipeline import load_pipeline

    image, mask = picture(2)[None, None], np.zeros((8, 8), bool)
    mask[:4] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.setenv("AFTERIMAGE_IMAGES", str(tmp_path))
    request_ = {"label": 1, "seed": 3, "sampler": "ddim", "steps": 6, "image": base64_of(image[0, 0])}
    changed = registered.predict([request_ | {"strength": 0.5}, request_ | {"mask": "file:mask.png"}])
    pipeline = load_pipeline(exported / "outputs" / "pipeline")
    for png, arguments in zip(changed, [(0.5,), (1.0, mask)], strict=True):
        found = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"])).astype(int)
        wanted = to_uint8(edit(pipeline, [3], image, *arguments, labels=[1], sampling=Sampling("ddim", 6)))
        assert np.abs(found - wanted[0, 0]).max() <= 1
        assert np.abs(found - image[0, 0]).max() > 5
    assert np.array_equal(found[4:], image[0, 0, 4:])


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"label": 0, "step": 5}, "step"),
        ({"label": 0, "seed": "one"}, "seed"),
        ({"prompt": "a bird"}, "names no class"),
        ({"prompt": "a cat and a dog"}, "names dog, cat"),
        ({"prompt": "cat", "label": 1}, "not both"),
        ({"label": 7}, "between 0 and 2"),
        ({}, "needs a label"),
        ({"label": 0, "sampler": "plms"}, "unknown sampler"),
        ({"label": 0, "steps": 21}, "sampling steps 21"),
    ],
)
def test_registered_model_refuses_what_it_cannot_do(registered, request_, complaint):
    with pytest.raises(Exception, match=complaint):
        registered.predict([request_])


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"label": 7}, "labels must lie between 0 and 2"),
        ({"prompt": "a bird"}, "names no class; name exactly one of"),
        ({"label": 0, "steps": 21}, "sampling steps 21"),
        ({"label": 0, "sampler": "plms"}, "unknown sampler 'plms'"),
        ({"label": 0, "step": 5}, "step"),
        ({"label": 0, "seed": "one"}, "seed"),
        ({"label": 0, "image": "!"}, "the image is not base64"),
        ({"label": 0, "image": "aGVsbG8="}, "the image cannot be read (not an image"),
        ({"label": 0, "image": "file:/etc/hostname"}, "files are read only from the folder in AFTERIMAGE_IMAGES"),
        ({"label": 0, "image": base64_of(picture(1)), "strength": 2}, "strength 2 must lie above 0"),
        ({"label": 0, "mask": base64_of(picture(1))}, "a mask changes an image; give one"),
        ({"label": 0, "image": base64_of(picture(1)), "mask": base64_of(picture(1)[:4])}, "the mask is 8 x 4 pixels"),
        ({"label": 0, "negative_prompt": "x"}, "a negative prompt needs a text-conditional model"),
    ],
)
def test_served_model_answers_a_wrong_request_without_a_stack_trace(registered, request_, complaint):
    """Through the application that `mlflow models serve` runs."""
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    with TestClient(scoring_server.init(registered)) as client:
        answer = client.post("/invocations", json={"inputs": [request_]})
        right = client.post("/invocations", json={"inputs": [{"label": 0, "seed": 1, "steps": 2}]})
    assert (answer.status_code, right.status_code) == (400, 200)
    assert "stack_trace" not in answer.json() and "Traceback" not in answer.text
    message = answer.json()["message"]
    assert complaint in message
    assert "type hint" in message or len(message.splitlines()) == 1, "MLflow's own check of the types says more"


@pytest.fixture(scope="module")
def registered(tmp_path_factory, exported, migrated_database):
    """The registered model, loaded once for all wrong requests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        work = workspace_in(tmp_path_factory.mktemp("registered"), exported, migrated_database, monkeypatch)
        work.register()
        return loaded()


def test_an_unconditional_model_is_registered_and_draws(
    tmp_path, exported_unconditional, migrated_database, monkeypatch
):
    work = workspace_in(tmp_path, exported_unconditional, migrated_database, monkeypatch)
    model_outputs.write_reports(work.root, label_accuracy=None, guided_scale=None)
    model_outputs.run_package(work.root)
    work.again()
    assert work.aliases == {"challenger": 1, "champion": 1}
    assert loaded().predict([{"seed": 1, "steps": 3}])[0][:4] == b"\x89PNG"
    with pytest.raises(Exception, match="unconditional"):
        loaded().predict([{"prompt": "cat", "steps": 3}])
