"""The further figures of the report: densities, costs, time-lapse, animations, and what a model of prompts adds."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.images import pictures
from models.images.pixels import to_uint8
from models.networks.text_dit import TextDiT, TextDiTConfig
from models.noise import schedules
from models.noise.paths import RectifiedFlow
from models.noise.samplers import SchedulerConfig
from models.optimization.timesteps import Density, Timesteps
from models.pipeline import Pipeline, PipelineInfo
from tasks.params import VisualizeParams
from tasks.report import animations, attention, cost, interpolation, noise_analysis, process, prompts, timelapse
from tasks.report.shortened import shortened
from tasks.runtime.errors import StageError
from tasks.training import previews
from tests.support.networks import randomised

SAMPLERS = """\
sampler,weights,steps,eta,guidance_scale,n,seed_blocks,frechet_distance,note
euler,,10,,1.0,512,3,0.4,
euler,,10,,1.0,128,1,0.8,
euler,,50,,1.0,128,1,0.6,
euler,,50,,1.5,128,1,0.1,
heun,,10,,1.0,128,1,0.5,
heun,,100,,1.0,32,1,,too few
"""
SWEEP = """\
guidance,guidance_scale,n,frechet_distance,precision,recall,clip_score,label_accuracy,note
,1.0,70,4.0,0.9,0.8,,0.9,
classifier_free,2.0,70,6.0,0.9,0.7,,0.95,
auto,2.0,70,3.0,0.9,0.8,,0.92,
"""
DENSITIES = [
    ("uniform", 0.0, 1.0, 1.0),
    ("logit_normal", 0.4, 0.8, 1.0),
    ("logit_normal", 0.0, 1.0, 3.0),
    ("normal_log_snr", 1.0, 1.5, 1.0),
]


@pytest.mark.parametrize("drawn", DENSITIES, ids=lambda drawn: f"{drawn[0]}-{drawn[3]:g}")
@pytest.mark.parametrize("name", ["cosine", "rectified_flow"])
def test_densities_are_those_that_training_draws_from(name: str, drawn: tuple[str, float, float, float]) -> None:
    path = schedules.path_of(name, 1000)
    timesteps = Timesteps(path, torch.device("cpu"), Density(*drawn))
    found = timesteps.log_snr(timesteps.draw(200_000, torch.Generator().manual_seed(0))).numpy()
    edges = np.linspace(-6, 6, 13)
    counted = np.histogram(found, edges)[0] / len(found)
    fine = np.linspace(-6, 6, 1201)
    density = noise_analysis.density(path, noise_analysis.Sampler(*drawn), fine)
    expected = [np.trapezoid(density[100 * i : 100 * i + 101], fine[100 * i : 100 * i + 101]) for i in range(12)]
    assert np.abs(counted - expected).max() < 0.006


def test_the_density_of_a_flow_has_a_closed_form() -> None:
    levels = np.array([-2.0, 0.0, 3.0])
    found = noise_analysis.density(RectifiedFlow(1000), noise_analysis.Sampler("logit_normal", 0.5, 1.0), levels)
    assert np.allclose(found, np.exp(-((-levels / 2 - 0.5) ** 2) / 2) / (2 * np.sqrt(2 * np.pi)))  # l = -2 z


def test_pareto_front_and_comparable_points(tmp_path: Path) -> None:
    assert cost.pareto([3, 1, 2, 4], [1.0, 5.0, 5.5, 1.0]) == [1, 0]
    (tmp_path / "samplers.csv").write_text(SAMPLERS)
    found = cost.points(tmp_path, "frechet_distance")
    assert [(point.name, point.steps, point.evaluations, point.distance) for point in found] == [
        ("Euler", 10, 10, 0.8),
        ("Euler", 50, 50, 0.6),
        ("Heun", 10, 19, 0.5),
    ]
    figure = cost.by_steps(tmp_path, "frechet_distance")
    assert figure.chart and figure.chart.svg.count("<svg") == 1


def test_seconds_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    (tmp_path / "samplers.csv").write_text(SAMPLERS)
    timing = tmp_path / "evaluate.json"
    assert cost.by_seconds(tmp_path, timing, "frechet_distance") is None
    seconds = {"euler, 10 steps, guidance 1": 0.01, "heun, 10 steps, guidance 1": 0.02}
    timing.write_text(json.dumps({"seconds_per_image": seconds}))
    png = cost.by_seconds(tmp_path, timing, "frechet_distance")
    assert png and Image.open(io.BytesIO(png)).width > 500


def test_measures_by_guidance_have_a_line_for_each_kind(tmp_path: Path) -> None:
    assert not cost.by_guidance(tmp_path, "frechet_distance").drawn
    (tmp_path / "guidance.csv").write_text(SWEEP)
    figure = cost.by_guidance(tmp_path, "frechet_distance")
    assert figure.chart and figure.chart.svg.count("<svg") == 3, "distance, accuracy, and precision with recall"
    assert "series-4" in figure.chart.svg


def test_grids_of_the_training_are_cut_as_they_were_joined(tmp_path: Path) -> None:
    assert timelapse.COLUMNS == previews.COLUMNS
    (tmp_path / "samples").mkdir()
    (tmp_path / "history.csv").write_text("step,loss,held_out_loss\n5,1,\n10,0.5,0.25\n20,0.5,0.125\n")
    assert not timelapse.figures(tmp_path)["timelapse"].drawn
    generator, drawn = np.random.default_rng(0), {}
    for step, channels in ((10, 1), (20, 3)):
        drawn[step] = generator.integers(0, 256, (40, channels, 8, 8), dtype=np.uint8)
        grid = pictures.grid(drawn[step], previews.COLUMNS, previews.MAX_SCALE)
        pictures.save_png(grid, tmp_path / "samples" / f"step-{step:06d}.png")
    figure = timelapse.figures(tmp_path)["timelapse"]
    assert figure.tiles and figure.animation
    assert figure.tiles.row_titles == ["step 10, held-out loss 0.25", "step 20, held-out loss 0.125"]
    for row, images in zip(figure.tiles.images, drawn.values(), strict=True):
        assert np.array_equal(row, np.broadcast_to(images[: timelapse.STRIP_COLUMNS], row.shape))
    assert len(figure.animation.frames) == 2


def frames() -> animations.Animation:
    generator = np.random.default_rng(0)
    plain = [Image.fromarray(generator.integers(0, 256, (21, 33, 4), dtype=np.uint8)) for _ in range(3)]
    return animations.Animation(animations.captioned(plain, ["t = 9", "t = 5, log SNR −0.3", ""]), 80, "noise")


def test_animations_repeat_their_bytes_and_hold_every_frame(tmp_path: Path) -> None:
    import cv2

    for number in (1, 2):
        animations.save_webp(frames(), tmp_path / f"{number}.webp")
        assert animations.save_mp4(frames(), tmp_path / f"{number}.mp4")
    for suffix in ("webp", "mp4"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    with Image.open(tmp_path / "1.webp") as webp:
        assert webp.n_frames == 3
        webp.seek(1)
        shown, expected = (np.asarray(each.convert("RGBA")) for each in (webp, frames().frames[1]))
        visible = expected[..., 3] > 0
        assert np.array_equal(shown[visible], expected[visible])
    video = cv2.VideoCapture(str(tmp_path / "1.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 1 + 1 + 24
    assert [video.get(which) % 2 for which in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)] == [0, 0]


def test_without_an_encoder_there_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animations, "CODEC", "zzzz")
    assert not animations.save_mp4(frames(), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_a_video_that_the_disk_cut_off_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = animations.cv2.VideoWriter

    class FullDisk:
        """Loses what is written after three frames without an error, as OpenCV does."""

        fourcc = real.fourcc

        def __init__(self, *arguments: object) -> None:
            self.writer, self.frames = real(*arguments), 0
            self.isOpened, self.release = self.writer.isOpened, self.writer.release

        def write(self, picture: np.ndarray) -> None:
            self.frames += 1
            if self.frames <= 3:
                self.writer.write(picture)

    monkeypatch.setattr(animations.cv2, "VideoWriter", FullDisk)
    with pytest.raises(StageError, match=r"a\.mp4 has 3 of \d+ frames; free space on the disk"):
        animations.save_mp4(frames(), tmp_path / "a.mp4")


def test_captions_are_cut_between_words() -> None:
    assert shortened("a horse") == "a horse"
    assert shortened("a horse in a field of long grass") == "a horse in a field of..."
    assert len(shortened("x" * 99)) <= 28


class Words:
    """A text encoder whose tokens are words: enough to draw, without transformers."""

    bos_token, eos_token, eos_token_id, pooled, length = "<s>", "</s>", 1, None, 16

    def __init__(self) -> None:
        self.vocabulary = [self.bos_token, self.eos_token]
        self.table = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))

    @property
    def towers(self) -> tuple[Words]:
        return (self,)

    @property
    def tokenizer(self) -> Words:
        return self

    def token_ids(self, captions: list[str]) -> torch.Tensor:
        self.vocabulary += [w for c in captions for w in c.split() if w not in self.vocabulary]
        rows = [[0, *(self.vocabulary.index(word) for word in caption.split()), 1] for caption in captions]
        return torch.tensor([row + [1] * (self.length - len(row)) for row in rows])

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]

    def encode(self, captions: list[str]) -> torch.Tensor:
        return self.table[self.token_ids(captions)]


@dataclass(frozen=True)
class Drawing:
    """A model of prompts, its parameters, and a row of its samples."""

    model: Pipeline
    params: VisualizeParams
    drawn: process.Drawn


@pytest.fixture(scope="module")
def text() -> Drawing:
    config = TextDiTConfig(size=8, channels=1, patch_size=2, width=16, depth=4, heads=2, text_width=12)
    info = PipelineInfo(
        conditioning="text",
        channels=1,
        size=8,
        schedule="cosine",
        timesteps=20,
        prediction="v_prediction",
        train_key="",
        classes=["cat", "dog"],
        prompts=["a cat", "a big dog"],
    )
    scheduler = SchedulerConfig(schedules.path_of("cosine", 20), "v_prediction")
    model = Pipeline(randomised(TextDiT(config)), scheduler, info, text=Words())
    params = VisualizeParams(sampler="ddim", steps=5, guidance_scales=(1.0, 3.0), columns=4, seed=2)
    return Drawing(model, params, process.draw(model, params))


def test_prompts_are_drawn_by_guidance_seed_and_steps(text: Drawing) -> None:
    params = text.params.model_copy(update={"prompts": ("a small horse that is too long for a title", "a dog")})
    found = prompts.figures(text.model, params)
    by_guidance, by_steps = (found[f"prompts_{name}"].tiles for name in ("guidance", "steps"))
    assert by_guidance and by_steps
    assert by_guidance.row_titles == ["a small horse that is too...", "a dog"]
    assert list(zip(by_guidance.column_titles, by_guidance.column_notes, strict=True)) == [
        (f"w = {scale}", f"seed {seed}") for scale in (1, 3) for seed in (2, 3)
    ]
    expected = text.model.sample([3], sampling=params.sampling(3.0), prompts=["a dog"])
    assert np.abs(by_guidance.images[1, 3].astype(int) - to_uint8(expected)[0]).max() <= 1
    assert by_steps.column_titles == ["1 step", "2 steps", "5 steps"]
    assert np.abs(by_steps.images[:, -1].astype(int) - by_guidance.images[:, 2]).max() <= 1
    assert "too long for a title" in found["prompts_steps"].text[1]


def test_attention_by_layer_and_by_token(text: Drawing) -> None:
    found = attention.figures(text.model, text.drawn)
    own, cross = found["attention_self"].tiles, found["attention_cross"].tiles
    assert own and cross
    assert own.row_titles == ["predicted", "block 1", "block 3", "block 4"]
    assert own.images.shape == (4, 5, 3, 32, 32)
    assert cross.column_titles == ["start", "a", "big", "dog", "end"]
    assert cross.images.shape == (3, 5, 3, 32, 32)
    assert sum(float(note.removesuffix(" %")) for note in cross.column_notes) <= 102
    assert "“a big dog”" in found["attention_cross"].text[0]
    centre = own.images[1, 0][:, 16:24, 16:24]
    assert (centre[:, [0, -1]] == 255).all() and (centre[:, :, [0, -1]] == 255).all()
    assert not (centre[:, 1:-1, 1:-1] == 255).all()


def test_weights_are_placed_where_the_network_looks() -> None:
    image, weights = np.zeros((1, 8, 8), np.uint8), np.full((4, 4), 0.01)
    weights[0, 3] = 0.85
    shown = attention._overlaid(image, weights, 3, marked=False).astype(int)
    assert (shown[:, 0:8, 24:32] == shown[:, 0:1, 24:25]).all()
    assert shown[0, 0, 31] > 100 > shown[0, 31, 0], "yellow is red and green, dark blue neither"


def test_prompts_are_interpolated(text: Drawing) -> None:
    figure = interpolation.figures(text.model, text.drawn, text.params)["between_conditions"]
    assert figure.title == "Between two prompts" and figure.tiles
    assert figure.tiles.row_titles[0] == "cat to dog"
    row = figure.tiles.images[0].astype(int)
    same = [text.model.sample([2], [label], text.params.sampling(3.0)) for label in (0, 1)]
    for end, expected in zip((0, -1), same, strict=True):
        assert np.abs(row[end] - to_uint8(expected)[0]).max() <= 1
