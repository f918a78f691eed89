"""The folder that is registered: the same bytes for the same inputs, and a complete and safe model card."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
from dataclasses import replace

import pytest

from tasks.formats import model_folder
from tasks.formats.model_card import DataFacts, ModelFacts, NetworkFacts, model_card
from tasks.formats.model_folder import ExportReport, TensorRTReport
from tasks.runtime.errors import StageError
from tests.support import model_outputs
from tests.support.report_inputs import MEASURED


def test_the_card_reads_fields_that_a_pipeline_describes():
    """A field that `PipelineInfo` renamed would be missing in the card, or take its default."""
    from models.pipeline import PipelineInfo

    assert set(ModelFacts.model_fields) <= {field.name for field in dataclasses.fields(PipelineInfo)}


def test_content_key_depends_on_names_and_bytes_but_not_on_caches(tmp_path):
    def key(**files: str) -> str:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        for name, text in files.items():
            path = tmp_path / "m" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return model_folder.content_key(tmp_path / "m")

    first = key(a="1", b__c="2")
    assert first == key(b__c="2", a="1")
    assert len({first, key(a="1", b__c="3"), key(a="1", b="2"), key(a="1"), key(a="12", b__c="")}) == 5
    (tmp_path / "m" / "__pycache__").mkdir(parents=True)
    before = model_folder.content_key(tmp_path / "m")
    (tmp_path / "m" / "__pycache__" / "x.pyc").write_bytes(b"1")
    assert model_folder.content_key(tmp_path / "m") == before


def test_package_gives_the_same_bytes_and_a_complete_card(work):
    model_outputs.write_reports(work.root)
    model_outputs.run_package(work.root)
    model = work.root / "outputs" / "model"
    first = model_folder.content_key(model)
    model_outputs.run_package(work.root)
    assert model_folder.content_key(model) == first
    card = (model / "README.md").read_text()
    for expected in (
        "licence: CC0",
        "| train.learning_rate | 0.002 |",
        "| frechet_distance | 1 | 3 x 64 | 20 | 1 | 10 |",
        "| label_accuracy | 1.5 | 3 x 32 | 0.99 | 0.01 |  | 1 |",
        "f" * 64,
        r"clip\_score: the images have no captions",
        "--prompt 'hot dog'",
        "opset 20",
    ):
        assert expected in card
    assert "log_every" not in card
    for file in (
        "pipeline/unet/config.json",
        "onnx/unet.onnx",
        "onnx/afterimage_bundle/bundle.py",
        "measurements.json",
    ):
        assert (model / file).is_file()


INFO = ModelFacts(
    conditioning="none",
    channels=3,
    size=32,
    schedule="linear",
    timesteps=1000,
    prediction="epsilon",
    train_key="k",
    classes=[],
)
PIPELINE = NetworkFacts(kind="UNet2DModel", folder="unet", pipeline="DDPMPipeline")
DATA = DataFacts(source="s", licence="l", rows=2, splits={"train": 2}, sha256="h")
EXPORTED = ExportReport(20, 1e-6, {}, 99.0, {}, ["p"], TensorRTReport(built=True))


def test_card_of_an_unconditional_model_mentions_no_prompt():
    card = model_card(INFO, PIPELINE, DATA, {}, model_outputs.measurements(), EXPORTED)
    assert "prompt" not in card
    assert "DiffusionPipeline.from_pretrained" in card


@pytest.mark.parametrize(
    ("kind", "folder", "pipeline", "expected"),
    [
        ("UNet2DModel", "unet", None, "`UNet2DModel.from_pretrained('pipeline', subfolder='unet')`"),
        ("DiTTransformer2DModel", "transformer", "DiTPipeline", "from_pretrained('pipeline')`, a `DiTPipeline`."),
        ("PixArtTransformer2DModel", "transformer", "PixArtAlphaPipeline", "takes the text as `prompt_embeds`"),
        ("DiT", "transformer", None, "diffusers has no network of this architecture"),
    ],
)
def test_card_names_the_class_that_loads_the_model(kind, folder, pipeline, expected):
    network = NetworkFacts(kind=kind, folder=folder, pipeline=pipeline)
    assert expected in model_card(INFO, network, DATA, {}, model_outputs.measurements(), EXPORTED)


def test_card_says_how_diffusers_sees_a_network_of_patches():
    network = NetworkFacts(kind="UNet2DModel", folder="unet", pipeline=None, patch_size=2)
    card = model_card(INFO, network, DATA, {}, model_outputs.measurements(), EXPORTED)
    assert "takes `torch.nn.functional.pixel_unshuffle(x, 2)` of the noisy image" in card


def test_card_of_a_consistency_model_draws_with_its_sampler():
    info = INFO.model_copy(update={"conditioning": "label", "classes": ["zero", "one"]})
    trained = {"train.steps": 9}
    plain, tuned = (
        model_card(info, PIPELINE, DATA, training, model_outputs.measurements(), EXPORTED)
        for training in (trained, {**trained, "train.distil.after": 0})
    )
    assert "--prompt zero --guidance 1.5 --sampler consistency --steps 2 --out" in tuned
    assert "model.predict([{'prompt': 'zero', 'sampler': 'consistency', 'steps': 2, 'seed': 0}])" in tuned
    assert "consistency" not in plain


def test_card_names_the_kind_of_guidance():
    measured = model_outputs.measurements()
    plain = model_card(INFO, PIPELINE, DATA, {}, measured, EXPORTED)
    assert "| label_accuracy | 1.5 | " in plain and "auto" not in plain
    guided = measured.measures["label_accuracy"].model_copy(update={"guidance_kind": "auto"})
    changes = {"guided_kind": "auto", "measures": {**measured.measures, "label_accuracy": guided}}
    card = model_card(INFO, PIPELINE, DATA, {}, measured.model_copy(update=changes), EXPORTED)
    assert "| label_accuracy | 1.5, auto | " in card and "| frechet_distance | 1 | " in card
    assert "With 'auto' it is autoguidance by `pipeline/guide`" in card


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "`x`",
    "one\ntwo\n\n# three",
    "](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "$(touch x)",
]


@pytest.mark.parametrize("conditioning", ["label", "text"])
@pytest.mark.parametrize("first", range(len(HOSTILE)))
def test_names_and_captions_in_the_card_are_escaped(conditioning, first):
    """Rendered with the parser of MLflow's documentation and of Python's Markdown world, CommonMark."""
    markdown = pytest.importorskip("markdown_it")
    names = [*HOSTILE[first:], *HOSTILE[:first]]
    prompts = names if conditioning == "text" else None
    info = INFO.model_copy(update={"conditioning": conditioning, "classes": names, "prompts": prompts})
    data = DATA.model_copy(update={"source": "folder", "licence": names[0]})
    exported = replace(EXPORTED, tensorrt=TensorRTReport(built=False, reason=names[0]))
    training = {"train.weights": names[0], "model.lora_rank": 4, "ingest.caption_templates": names}
    measured = MEASURED.model_copy(update={"not_applicable": {"kid": names[0]}})
    card = model_card(info, PIPELINE, data, training, measured, exported)
    rendered = markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---", 2)[2])
    assert not re.search(r"<(script|img)|href=.javascript|<h1>three", rendered)
    headings = re.findall(r"<h\d>(.*?)</h\d>", rendered)
    assert headings[1:] == ["How to use it", "Evaluation", "Export", "Data", "Training", "Limits"]
    rows = re.findall(r"<tr>\n?(.*?)</tr>", rendered.split("<h2>Training</h2>")[1], re.DOTALL)
    assert {row.count("<td>") + row.count("<th>") for row in rows} == {2}
    assert "<script>alert(1)</script>" in html.unescape(rendered)


def test_an_export_report_is_read_back_and_one_of_another_version_is_refused(tmp_path):
    file = tmp_path / "export.json"
    EXPORTED.write(file)
    assert ExportReport.read(file) == EXPORTED
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StageError, match=r"another version of this project; run 'dvc repro export'$"):
        ExportReport.read(file)
