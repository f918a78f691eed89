"""The stage that draws: the pictures show what they say, and the page holds together offline."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.device import emulates_bf16
from models.images.pixels import to_uint8
from models.networks import guidance
from models.networks.unet import UNet
from models.noise import schedules
from models.noise.paths import RECTIFIED_FLOW
from models.noise.samplers import Sampling
from models.pipeline import Pipeline, load_pipeline
from tasks.params import ImageParams, VisualizeParams
from tasks.pictures.images import load_pixels
from tasks.report import charts, cost, noise_analysis, plotting, tables
from tasks.report.process import nearest_images
from tasks.runtime.errors import StageError
from tests.support import report_inputs
from tests.support.data_inputs import contents

TEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "<eight> & co", "nine"]
FIGURES = {
    "samples.png",
    "forward.png",
    "forward_by_schedule.png",
    "reverse.png",
    "neighbours.png",
    "schedules.png",
    "training.png",
    "denoising.png",
    "denoised.png",
    "between_noises.png",
    "attention_self.png",
    "timelapse.png",
}
OF_LABELS = {"between_conditions.png"}
EDITS = {"edits.png", "edits_fills.png", "edits_strengths.png"}


class Outline(HTMLParser):
    """Tables of tiles by their caption, and everything that could break or call out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[np.ndarray]]] = {}
        self.headings: dict[str, list[str]] = {}
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self._table, self._text, self._open = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("src", "srcset", "href", "xlink:href") if name in values]
        self._open = tag
        if tag in ("caption", "th"):
            self._text = ""
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag == "img":
            self.images.append(values)
            if self._table:
                self.tables[self._table][-1].append(pixels(values["src"]))

    def handle_data(self, data: str) -> None:
        if self._open in ("caption", "th", "small"):
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._table = self._text
            self.tables[self._table], self.headings[self._table] = [], []
        if tag == "th" and self._table:
            self.headings[self._table].append(self._text)
        if tag == "table":
            self._table = ""

    def tiles(self, caption: str) -> np.ndarray:
        """uint8 [rows, columns, H, W, C]; the row of headings holds none."""
        return np.array([row for row in self.tables[caption] if row])


def pixels(address: str) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))
    return image if image.ndim == 3 else image[..., None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> report_inputs.Inputs:
    return report_inputs.make(tmp_path_factory.mktemp("digits"), TEN)


@pytest.fixture(scope="module")
def drawn(inputs: report_inputs.Inputs) -> tuple[Path, Path]:
    return inputs.draw("first")


@pytest.fixture(scope="module")
def outline(drawn: tuple[Path, Path]) -> Outline:
    return Outline(drawn[1].read_text(encoding="utf-8"))


@pytest.fixture
def blank_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts blank, which take most of the time of a page: for tests that read its images and text."""
    file = io.BytesIO()
    Image.new("L", (60, 60)).save(file, "PNG")
    blank = plotting.Chart(file.getvalue(), "<svg></svg>")
    for module in (charts, cost, noise_analysis):
        monkeypatch.setattr(module, "render", lambda *_, **__: blank)


def held_out(inputs: report_inputs.Inputs, channels: int = 1) -> np.ndarray:
    image = ImageParams.model_validate({"resolution": report_inputs.SIZE, "channels": channels})
    return load_pixels(inputs.root / "data" / "images", "test", image).pixels.transpose(0, 2, 3, 1)


def test_every_figure_is_a_picture(drawn: tuple[Path, Path]) -> None:
    assert {path.name for path in drawn[0].iterdir()} == FIGURES | OF_LABELS | EDITS
    for path in drawn[0].iterdir():
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 50
            assert len(np.unique(np.asarray(image))) > 16, f"{path.name} is blank"


def test_the_same_inputs_give_the_same_bytes(inputs: report_inputs.Inputs, drawn: tuple[Path, Path]) -> None:
    again = inputs.draw("second")
    assert again[1].read_bytes() == drawn[1].read_bytes()
    for path in drawn[0].iterdir():
        assert (again[0] / path.name).read_bytes() == path.read_bytes(), path.name


def test_page_loads_nothing_from_outside(outline: Outline) -> None:
    assert outline.images
    assert all(address.startswith(("data:", "#")) for address in outline.addresses), "a link leads out of the page"
    assert not outline.tags & {"script", "iframe", "object", "embed"}
    assert all(image["alt"].strip() for image in outline.images), "an image has no text beside it"
    assert len(set(outline.ids)) == len(outline.ids), "an id stands twice"
    assert {address[1:] for address in outline.addresses if address.startswith("#")} <= set(outline.ids)


def test_samples_are_drawn_by_class_and_guidance(inputs: report_inputs.Inputs, outline: Outline) -> None:
    model = load_pipeline(inputs.root / "outputs" / "pipeline")
    tiles = outline.tiles("Samples by class and guidance")
    assert outline.headings["Samples by class and guidance"] == [
        *("zero", "two", "four", "six", "<eight> & co"),
        *("w = 1", "w = 2"),
    ]
    seeds = [report_inputs.PARAMS.seed + column for column in range(5)]
    for row, scale in enumerate(report_inputs.PARAMS.guidance_scales):
        sampling = Sampling("ddim", 10, guidance_scale=scale)
        expected = to_uint8(model.sample(seeds, [0, 2, 4, 6, 8], sampling)).transpose(0, 2, 3, 1)
        assert np.array_equal(tiles[row], expected)
    assert not np.array_equal(tiles[0], tiles[1])


def test_forward_strip_begins_with_real_images_and_ends_in_noise(
    inputs: report_inputs.Inputs, outline: Outline
) -> None:
    tiles = outline.tiles("Forward process: held-out images at increasing timesteps").astype(float)
    real = held_out(inputs)
    for strip in tiles:
        assert any(np.array_equal(strip[0], image) for image in real)
        likeness = [np.corrcoef(strip[0].ravel(), step.ravel())[0, 1] for step in strip]
        assert likeness[0] == pytest.approx(1)
        assert likeness[1] > 0.8
        assert abs(likeness[-1]) < 0.4
    headings = outline.headings["Forward process: held-out images at increasing timesteps"]
    assert headings[8].startswith(f"t = {report_inputs.TIMESTEPS - 1}")
    assert headings[9:] == ["one", "five", "nine"], "every second class is held out here"


def test_schedules_noise_the_same_image_differently(outline: Outline) -> None:
    caption = "Forward process of one image under each schedule"
    tiles = outline.tiles(caption)
    names = [*schedules.SCHEDULES, RECTIFIED_FLOW]
    assert outline.headings[caption][-len(names) :] == names
    assert np.array_equal(tiles[0, 0], tiles[1, 0])
    assert np.array_equal(tiles[0, 0], tiles[2, 0])
    assert not np.array_equal(tiles[0, 4], tiles[1, 4])


def test_reverse_strip_runs_from_the_seeded_noise_to_the_sample(inputs: report_inputs.Inputs, outline: Outline) -> None:
    from models.noise.samplers import SeededNoise

    tiles = outline.tiles("Reverse process: noisy images and predicted clean images at decreasing timesteps")
    followed = outline.tiles("Samples by class and guidance")[1]  # the middle guidance, rounded up
    columns = [1, 3]
    for pair, column in enumerate(columns):
        noise = SeededNoise([report_inputs.PARAMS.seed + column], (1, report_inputs.SIZE, report_inputs.SIZE))()
        assert np.array_equal(tiles[2 * pair, 0], to_uint8(noise)[0].transpose(1, 2, 0))
        assert np.array_equal(tiles[2 * pair + 1, -1], followed[column]), "the last prediction is the sample"


def test_animation_ends_with_the_still_picture(drawn: tuple[Path, Path]) -> None:
    with Image.open(drawn[0] / "denoising.png") as animation, Image.open(drawn[0] / "denoised.png") as still:
        assert animation.n_frames == report_inputs.PARAMS.steps
        animation.seek(animation.n_frames - 1)
        assert np.array_equal(np.asarray(animation.convert("RGBA")), np.asarray(still.convert("RGBA")))


def test_neighbours_are_training_images(inputs: report_inputs.Inputs, outline: Outline) -> None:
    image = ImageParams.model_validate({"resolution": report_inputs.SIZE, "channels": 1})
    train = load_pixels(inputs.root / "data" / "images", "train", image).pixels.transpose(0, 2, 3, 1)
    samples, nearest = outline.tiles("Samples and their nearest training images")
    for sample, neighbour in zip(samples, nearest, strict=True):
        distances = ((train.astype(float) - sample) ** 2).sum(axis=(1, 2, 3))
        assert np.array_equal(neighbour, train[distances.argmin()])


def test_nearest_images_across_blocks() -> None:
    generator = np.random.default_rng(1)
    candidates = generator.integers(0, 256, (9000, 1, 3, 3), dtype=np.uint8)
    queries = np.concatenate([candidates[[7, 4095, 4096, 8999]], generator.integers(0, 256, (5, 1, 3, 3), np.uint8)])
    index, distance = nearest_images(queries, candidates)
    differences = (queries[:, None].astype(float) - candidates[None].astype(float)) / 255
    exact = np.sqrt((differences**2).mean(axis=(2, 3, 4)))
    assert list(index[:4]) == [7, 4095, 4096, 8999]
    assert np.allclose(distance, exact.min(axis=1), atol=1e-12)
    assert (distance[:4] == 0).all()
    assert (distance[4:] > 0).all()


def test_page_shows_the_measures(drawn: tuple[Path, Path]) -> None:
    text = re.sub(r"<[^>]+>", " ", drawn[1].read_text(encoding="utf-8"))
    text = " ".join(text.split())
    for expected in (
        "2.3 times the floor of 10.2",
        "without guidance; 2.3 times the floor of 10.2",
        "Fréchet distance none 23.1 ± 0.7 10.2 ± 0.31",
        "Label accuracy w = 1.5 99.4 %",
        "256 with guidance 1.5 for accuracy and CLIP score",
        "99.4 %",
        "the images have no captions",
        "CLIP score was not measured",
        "512 samples each, without guidance",
        "DPM-Solver++ 2M 20 – 1 512 3 23.1 0.0123 0.45 91.2 % 87.1 %",
        "DDPM 1000 – 1 32 1 – –",
        "DDPM in 1000 steps : too few images for distances (128 needed)",
        "DPM-Solver++ 2M in 20 steps, without guidance",
        "0f" * 32,
        "drift column sum to be between (column moved, max value 0.1) 0.35 warning the &lt;label&gt; balance moved",
        "size column values to be between (column shorter_side, min value 8) 0 of 80 rows holds images are smaller",
        "not an image 2",
        "step 200",
        "error of the predicted v, weighted by timestep: it is the squared error of the clean image times min(SNR, γ)",
        "where γ = 2.5",
    ):
        assert expected in text, expected


def test_codec_quality_and_reconstructions_are_shown(drawn: tuple[Path, Path]) -> None:
    text = " ".join(re.sub("<[^>]*>", " ", drawn[1].read_text(encoding="utf-8")).split())
    assert "PSNR, decoded images 23.5 dB" in text
    assert "Text encoder 0.8 share of the images whose own caption is ranked first by chance 0.1" in text
    assert "Held-out images above their reconstructions" in text


def test_edits_are_a_section_with_tables_chart_and_pictures(drawn: tuple[Path, Path]) -> None:
    source = drawn[1].read_text(encoding="utf-8")
    section = source[source.index('<section id="editing">') : source.index('<section id="forward">')]
    text = " ".join(re.sub("<[^>]*>", " ", section).split())
    assert "0.8 30 12.5 2.5 1.5 1.25 87.5 % 5.0 %" in text
    assert "half model 30 0 14.5 1.25 1.5 92.5 % half mean fill 30 0 9.5 3.25 4.5 22.5 %" in text
    assert section.count("<svg") == 3 and "and the share that becomes what was asked for" in section
    assert "edits at strength 0.2, 0.8" in text and 'alt="Rows of masked held-out images and of their fills"' in section
    assert '<a href="#editing">Editing images</a>' in source


def test_the_headline_of_the_protocol_leads(tmp_path: Path) -> None:
    kid = report_inputs.MEASURED.measures["kid"].model_copy(update={"floor": 0.004})
    found = {**report_inputs.MEASURED.measures, "kid": kid}
    measured = report_inputs.MEASURED.model_copy(update={"headline": "kid", "measures": found})
    first, *others = tables.measures(measured).headlines
    assert (first.name, first.note) == ("KID", "without guidance; 3.1 times the floor of 0.004")
    assert [each.name for each in others] == ["Label accuracy", "Fréchet distance"]
    assert others[1].note == "without guidance; floor: 10.2"
    names = ["guidance_scale", "n", "frechet_distance", "kid", "cmmd", "clip_score", "label_accuracy"]
    rows = [names, ["1.0", "128", "23", "0.01", "0.4", "80", "0.9"], ["2.0", "128", "24", "0.02", "0.5", "81", "0.95"]]
    (tmp_path / "guidance.csv").write_text("\n".join(map(",".join, rows)))
    (tmp_path / "samplers.csv").write_text(report_inputs.SAMPLERS)
    charts = [tables.tables(tmp_path, headline)[1].chart_svg for headline in ("cmmd", "frechet_distance")]
    assert charts[0] != charts[1]
    assert tables.tables(tmp_path, "cmmd")[1].chart_label.startswith("CMMD against CLIP score")


def test_a_consistency_model_and_its_teacher_have_a_chart_by_steps(tmp_path: Path) -> None:
    names = ["sampler", "weights", "steps", "guidance_scale", "n", "seed_blocks", "frechet_distance", "kid", "note"]
    rows = [
        names,
        ["consistency", "", "2", "1.0", "512", "3", "0.7", "0.02", ""],
        ["consistency", "", "2", "1.5", "256", "3", "0.6", "0.02", ""],  # guided, so not in the chart
        *(["consistency", "", steps, "1.0", "512", "1", "0.8", "0.02", ""] for steps in ("2", "1", "4")),
        *(["euler", "teacher", steps, "1.0", "512", "1", "0.5", "0.01", ""] for steps in ("10", "20")),
    ]
    (tmp_path / "samplers.csv").write_text("\n".join(map(",".join, rows)))
    (table,) = tables.tables(tmp_path, "frechet_distance")
    assert table.columns[:3] == ["Sampler", "Weights", "Steps"]
    assert [row[:3] for row in table.rows[2:]] == [
        *(["Consistency", "", steps] for steps in ("2", "1", "4")),
        *(["Euler", "teacher", steps] for steps in ("10", "20")),
    ]
    assert table.chart_label.startswith("Fréchet distance against sampling steps")
    assert table.chart_svg.count("<svg") == 1 and table.chart_svg != tables.tables(tmp_path, "kid")[0].chart_svg
    (tmp_path / "samplers.csv").write_text(report_inputs.SAMPLERS)
    assert not tables.tables(tmp_path, "frechet_distance")[0].chart_svg


def test_class_names_are_escaped(drawn: tuple[Path, Path]) -> None:
    source = drawn[1].read_text(encoding="utf-8")
    assert "&lt;eight&gt; &amp; co" in source
    assert "<eight>" not in source


def test_colour_images_without_labels_or_held_out_loss(tmp_path: Path) -> None:
    inputs = report_inputs.make(tmp_path, classes=[], channels=3, held_out_loss=False)
    params = VisualizeParams(sampler="ddpm", steps=20, guidance_scales=(1.0,), columns=4, seed=0)
    figures, page = inputs.draw("out", params)
    assert {path.name for path in figures.iterdir()} == FIGURES
    outline = Outline(page.read_text(encoding="utf-8"))
    samples = outline.tiles("Samples")
    assert samples.shape == (3, 4, 8, 8, 3)
    assert len(np.unique(samples.reshape(12, -1), axis=0)) == 12, "each image has a seed of its own"
    assert all(image["alt"].strip() for image in outline.images)
    strip = outline.tiles("Forward process: held-out images at increasing timesteps")
    assert all(any(np.array_equal(row[0], image) for image in held_out(inputs, 3)) for row in strip)
    assert "mean squared error of the predicted noise ε. The held-out" in page.read_text(encoding="utf-8")
    for absent in ("Autoencoder and text encoder", "Editing images"):
        assert absent not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("count", "expected"), [(2, ["a0"] * 3 + ["a1"] * 2), (25, ["a0", "a5", "a10", "a15", "a20"])])
def test_columns_spread_over_few_and_many_classes(count, expected, tmp_path, blank_charts) -> None:
    inputs = report_inputs.make(tmp_path, [f"a{number}" for number in range(count)])
    _, page = inputs.draw("out")
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.headings["Samples by class and guidance"][:5] == expected


SWEEP = """\
guidance,guidance_scale,n,frechet_distance,kid,precision,recall,inception_score,clip_score,label_accuracy,note
,1.0,70,4.0,0.1,0.9,0.8,,,0.9,
classifier_free,2.0,70,6.0,0.2,0.9,0.7,,,0.95,
auto,2.0,70,3.0,0.05,0.9,0.8,,,0.92,
"""


def test_a_model_with_a_guide_shows_which_guidance_a_number_is_of(tmp_path: Path, request) -> None:
    inputs = report_inputs.make(tmp_path, TEN, guide=True)
    (tmp_path / "reports" / "evaluation" / "guidance.csv").write_text(SWEEP)
    page = inputs.draw("out", report_inputs.PARAMS.model_copy(update={"guidance": "auto"}))[1]
    source = page.read_text(encoding="utf-8")
    text = " ".join(re.sub("<[^>]*>", " ", source).split())
    assert "Guidance Kind n Fréchet" in text
    assert "1 – 70 4 0.1" in text and "2 classifier-free 70 6" in text and "2 autoguidance 70 3" in text
    assert "Autoguidance moves the prediction away from that of earlier weights" in text
    assert "Classifier-free guidance moves it away from the prediction without the class" in text
    assert 'alttext="guided = g(x_t, c) + w (f(x_t, c) - g(x_t, c))"' in source and "f(x_t, none)" not in source
    outline, model = Outline(source), load_pipeline(tmp_path / "outputs" / "pipeline")
    assert outline.headings["Samples by class and guidance"][-2:] == ["w = 1", "w = 2, auto"]
    auto = Sampling("ddim", 10, guidance_scale=2.0, guidance="auto")
    expected = to_uint8(model.sample([report_inputs.PARAMS.seed + i for i in range(5)], [0, 2, 4, 6, 8], auto))
    assert np.array_equal(outline.tiles("Samples by class and guidance")[1], expected.transpose(0, 2, 3, 1))
    classifier_free = "".join(line for line in SWEEP.splitlines(keepends=True) if not line.startswith("auto"))
    (tmp_path / "reports" / "evaluation" / "guidance.csv").write_text(classifier_free)
    request.getfixturevalue("blank_charts")
    source = inputs.draw("plain")[1].read_text(encoding="utf-8")
    assert 'alttext="guided = f(x_t, none) + w (f(x_t, c) - f(x_t, none))"' in source
    assert "utoguidance" not in source and ">Kind<" not in source


def test_the_chart_of_guidance_has_a_curve_for_each_kind() -> None:
    curve = [(0.9, 4.0, 1.0), (0.95, 6.0, 2.0)]
    one = charts.guidance({"classifier-free": curve}, "Fréchet distance", "x").svg
    both = charts.guidance(
        {"classifier-free": curve, "autoguidance": [(0.9, 4.0, 1.0), (0.92, 3.0, 2.0)]}, "y", "x"
    ).svg
    assert "series-2" not in one and "series-2" in both


def test_rows_of_an_unconditional_model_differ_by_autoguidance(tmp_path: Path, blank_charts) -> None:
    inputs = report_inputs.make(tmp_path, classes=[], guide=True)
    shared = {"sampler": "ddim", "steps": 20, "columns": 4, "seed": 0}
    params = VisualizeParams(guidance="auto", guidance_scales=(1.0, 2.0), **shared)
    source = inputs.draw("out", params)[1].read_text(encoding="utf-8")
    outline, model = Outline(source), load_pipeline(tmp_path / "outputs" / "pipeline")
    assert 'alttext="guided = g(x_t) + w (f(x_t) - g(x_t))"' in source
    tiles = outline.tiles("Samples by guidance")
    for row, scale in zip(tiles, (1.0, 2.0), strict=True):
        expected = to_uint8(model.sample(range(4), sampling=params.sampling(scale))).transpose(0, 2, 3, 1)
        assert np.array_equal(row, expected)
    assert not np.array_equal(tiles[0], tiles[1])


def test_data_that_was_not_accepted_is_not_drawn(tmp_path: Path) -> None:
    inputs = report_inputs.make(tmp_path, TEN)
    (tmp_path / "data" / "accepted.json").write_text('{"verdict": "refused"}')
    with pytest.raises(StageError, match="accepted"):
        inputs.draw("out")
    assert not (tmp_path / "out").exists()


def test_charts_follow_the_theme_and_emphasise_the_own_schedule() -> None:
    curves = {name: charts.path_curves(schedules.path_of(name, 50)) for name in (*schedules.SCHEDULES, RECTIFIED_FLOW)}
    assert np.allclose(curves["cosine"]["beta"], schedules.betas("cosine", 50))
    assert np.allclose(curves["rectified_flow"]["signal"][[24, 49]], [0.5, 0])
    chart = plotting.render(charts.schedule_panels(curves, "sigmoid"), (3, 3, 3), "x")
    assert "sigmoid (this model)" in chart.svg
    assert "cosine (this model)" not in chart.svg
    assert chart == plotting.render(charts.schedule_panels(curves, "sigmoid"), (3, 3, 3), "x")
    assert chart != plotting.render(charts.schedule_panels(curves, "linear"), (3, 3, 3), "x")
    for name, colour in plotting.COLOURS.items():
        assert f"var(--{name})" in chart.svg
        assert colour not in chart.svg
    assert not re.search(r"\d{4}-\d{2}-\d{2}", chart.svg), "a date would change the bytes every day"
    assert set(Image.open(io.BytesIO(chart.png)).info) <= {"dpi"}


@pytest.mark.skipif(emulates_bf16("cpu"), reason="takes long where bfloat16 is emulated")
def test_every_picture_is_drawn_in_the_precision_and_nearly_the_same(drawn, inputs, blank_charts, monkeypatch):
    computed = set()
    forward = UNet.forward

    def noted(network: UNet, *arguments: torch.Tensor) -> torch.Tensor:
        computed.add(network.conv_in.weight.dtype)
        return forward(network, *arguments)

    monkeypatch.setattr(UNet, "forward", noted)
    figures, _ = inputs.draw("lower", report_inputs.PARAMS.model_copy(update={"precision": "bf16"}))
    assert computed == {torch.bfloat16}
    for name in ("samples", "reverse", "between_noises", "between_conditions", "attention_self"):
        lower, exact = (np.asarray(Image.open(folder / f"{name}.png")) / 255 for folder in (figures, drawn[0]))
        assert 20 < 10 * np.log10(1 / np.mean((lower - exact) ** 2)) < 100, name


def test_two_devices_draw_the_bytes_of_one(drawn, inputs, two_devices, monkeypatch):
    monkeypatch.setattr(guidance, "joins", lambda device: False)  # as on the CPU that the stubs stand for
    named, on = set(), Pipeline.on
    monkeypatch.setattr(Pipeline, "on", lambda model, name: (named.add(name), on(model, name))[1])
    _, page = inputs.draw("divided")
    assert named == {"cpu:0", "cpu:1"}
    for folder in ("figures", "animations", "timed"):
        one, divided = (contents(inputs.root / into / folder) for into in ("first", "divided"))
        assert one.keys() == divided.keys()
        assert [name for name in one if one[name] != divided[name]] == []
    assert page.read_bytes() == drawn[1].read_bytes()
