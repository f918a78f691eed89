"""Measures of DreamBooth (Ruiz et al. 2023, section 4): the subject, the prompt, and what became of the class.

Legend: samples are drawn by the instance prompt, the class prompt, and the held-out contexts, from the same seeds
before and after the training. Similarities are mean cosines of features (CLIP-I or DINO with such an extractor). The
features of an extractor that was trained here are all positive and much alike, so the mean feature of the base's images
of the class is subtracted first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.images.pictures import grid, shrunk
from models.images.pixels import to_uint8
from models.judges import metrics
from models.noise.samplers import Sampling
from tasks.evaluation.extraction import Extraction, Images
from tasks.formats.prior import BEFORE, CLASS, SUBJECT, pictures
from tasks.runtime.progress import progress
from tasks.subjects.checkpoints import earlier

if TYPE_CHECKING:
    from PIL import Image

    from models.judges.judge import Judge
    from models.pipeline import Pipeline
    from tasks.formats.prior import Prior

COLUMNS = ["weights", "step", "n", "subject_similarity", "class_similarity", "margin", "class_diversity"]
COLUMNS += ["prompt_fidelity", "note"]
HEADLINES = ("subject_similarity", "class_similarity", "class_diversity", "prompt_fidelity")
BEST = "largest margin"
GRID_COLUMNS, SIDE = 8, 80


@dataclass(frozen=True)
class Row:
    """The measures of one set of weights."""

    weights: str
    step: int | None
    n: int
    scores: Mapping[str, float]
    note: str = ""

    def cells(self) -> dict[str, float | int | str]:
        """Return the row of `subject.csv`."""
        step = "" if self.step is None else self.step
        return {"weights": self.weights, "step": step, "n": self.n, **self.scores, "note": self.note}


@dataclass(frozen=True)
class Result:
    """The table, and the picture of the samples."""

    rows: Sequence[Row]
    picture: Image.Image

    def headlines(self) -> dict[str, float]:
        """Return the measures of the pipeline for `reports/metrics.json`."""
        scores = self.rows[-1].scores
        return {name: float(f"{scores[name]:.6g}") for name in HEADLINES if name in scores}


class SubjectScorer:
    """Scores samples against the subject's pictures. Each image is passed through each network once."""

    def __init__(self, judge: Judge, subject: Images, classes: Images) -> None:
        self.judge = judge
        self._extraction = Extraction()
        self.centre = 0.0 if judge.extractor is not None else self._features(classes).mean(0)
        self.subject = self._directions(subject)

    def _features(self, images: Images) -> np.ndarray:
        return self._extraction.output("features", self.judge.features, images)

    def _directions(self, images: Images) -> np.ndarray:
        """Return features as unit vectors, float64 [N, D]."""
        features = self._features(images).astype(np.float64) - self.centre
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def similarity(self, images: Images) -> float:
        """Return the mean cosine of each image with each picture of the subject."""
        return float((self._directions(images) @ self.subject.T).mean())

    def own_similarity(self) -> float | None:
        """Return the mean cosine of two pictures of the subject, which bounds `similarity`; None for one picture."""
        return None if len(self.subject) < 2 else _mean_of_pairs(self.subject)

    def diversity(self, images: Images) -> float:
        """Return 1 - the mean cosine of two of the images; a collapsed class has 0."""
        return 1 - _mean_of_pairs(self._directions(images))

    def fidelity(self, images: Images, prompts: Sequence[str]) -> float | None:
        """Return the CLIP score of each image with its prompt; None without a CLIP."""
        if not self.judge.reads_captions:
            return None
        embeds = self._extraction.output("embeds", self.judge.clip_image_embeds, images)
        return metrics.clip_score(embeds, self.judge.clip_text_embeds(prompts))


def _mean_of_pairs(directions: np.ndarray) -> float:
    count = len(directions)
    return float(((directions @ directions.T).sum() - count) / (count * (count - 1)))


@dataclass(frozen=True)
class Samples:
    """Images drawn from one set of weights."""

    instance: Images
    classes: Images
    contexts: Images
    """Empty before the training, when the token means nothing."""


def measure(pipeline: Pipeline, averages: Path, folder: Path, prior: Prior, judge: Judge, batch_size: int) -> Result:
    """Measure the pipeline, the weights at earlier steps, and the base.

    Args:
        pipeline: after the training.
        averages: the output of `train` of this name, for the earlier steps.
        folder: the output of `prior`, with the samples of the base.
        prior: its description.
        judge: extracts the features.
        batch_size: images drawn at a time.
    """
    shown = pictures(folder)
    first = np.arange(min(prior.measured, len(shown[CLASS])))
    subject, instance, classes = (Images.of(shown[name]) for name in (SUBJECT, BEFORE, CLASS))
    before = Samples(instance, Images.of(shown[CLASS], first), Images(()))
    scorer = SubjectScorer(judge, subject, classes if len(classes) else instance)
    drawn: dict[int | None, Samples] = {}
    for step, each in progress(itertools.chain(earlier(pipeline, averages), [(None, pipeline)]), desc="subject"):
        drawn[step] = _draw(each, prior, batch_size)
    rows = [] if (own := scorer.own_similarity()) is None else [_pictures_row(len(shown[SUBJECT]), own)]
    rows.append(_row("before", 0, before, scorer, prior))
    rows += [_row("pipeline" if s is None else "average", s, each, scorer, prior) for s, each in drawn.items()]
    return Result(_with_best(rows), _picture(subject, before, drawn, prior))


def _pictures_row(count: int, similarity: float) -> Row:
    return Row("the pictures", None, count, {"subject_similarity": similarity}, "two of the subject's pictures")


def _row(weights: str, step: int | None, drawn: Samples, scorer: SubjectScorer, prior: Prior) -> Row:
    scores = {"subject_similarity": scorer.similarity(drawn.instance)}
    if len(drawn.classes) > 1:
        scores["class_similarity"] = scorer.similarity(drawn.classes)
        scores["margin"] = scores["subject_similarity"] - scores["class_similarity"]
        scores["class_diversity"] = scorer.diversity(drawn.classes)
    if len(drawn.contexts):
        prompts = [without_token(prompt, prior.token) for prompt in _asked(prior.contexts, len(drawn.contexts))]
        fidelity = scorer.fidelity(drawn.contexts, prompts)
        scores |= {} if fidelity is None else {"prompt_fidelity": fidelity}
    return Row(weights, step, len(drawn.instance), scores)


def _with_best(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a note at the weights after which the token makes the largest difference."""
    measured = [row for row in rows if "margin" in row.scores and row.step != 0]
    best = max(measured, key=lambda row: row.scores["margin"], default=None)
    return [replace(row, note=BEST) if row is best else row for row in rows]


def without_token(prompt: str, token: str) -> str:
    """Return a prompt without the rare token, which a CLIP that scores does not know."""
    return " ".join(word for word in prompt.split() if word != token)


def _asked(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[number % len(prompts)] for number in range(count)]


def _draw(pipeline: Pipeline, prior: Prior, batch_size: int) -> Samples:
    """Draw `prior.measured` images of each kind, from the seeds of the base's images."""
    sampling = Sampling(prior.sampler, prior.steps, guidance_scale=prior.guidance_scale)

    def by(prompts: Sequence[str]) -> Images:
        if not prompts:
            return Images(())
        asked, seeds = _asked(prompts, prior.measured), range(prior.seed, prior.seed + prior.measured)
        return Images.of(to_uint8(pipeline.sample(seeds, None, sampling, prompts=asked, batch_size=batch_size)))

    assert prior.instance_prompt is not None, "there is a subject"
    classes = [] if prior.class_prompt is None else [prior.class_prompt]
    return Samples(by([prior.instance_prompt]), by(classes), by(prior.contexts))


def _picture(subject: Images, before: Samples, drawn: Mapping[int | None, Samples], prior: Prior) -> Image.Image:
    """Return a grid: the subject's pictures, the base, the token after each step, then class and contexts."""
    rows = {"subject": subject, "before": before.instance}
    rows |= {"pipeline" if step is None else f"step {step}": each.instance for step, each in drawn.items()}
    if prior.class_prompt is not None:
        rows |= {"class before": before.classes, "class after": drawn[None].classes}
    if prior.contexts:
        rows["contexts"] = drawn[None].contexts
    chosen = {name: images for name, images in rows.items() if len(images)}
    cells = [images.pixels[np.arange(GRID_COLUMNS) % len(images)] for images in chosen.values()]
    small = shrunk(np.concatenate(cells), 2 * SIDE)
    return grid(small, GRID_COLUMNS, max(1, SIDE // small.shape[-1]), list(chosen))
