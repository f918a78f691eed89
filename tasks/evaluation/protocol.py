"""A declared protocol of measurement, and measuring a pipeline by it.

`evaluate` declares one and measures the new model; `register` measures a champion by the same one. The
fingerprint names what two numbers must share before they may be compared; sampler, steps and guidance are
not in it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from tasks.params import IMAGES_PER_DIMENSION, EvaluateParams, ImageParams
from tasks.pictures.images import load_pixels
from tasks.pictures.index import read_index
from tasks.runtime.measures import Measure, Measurements
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import numpy as np

    from models.judges.judge import Judge
    from models.pipeline import Pipeline

FORMAT = 1
BLOCK_STRIDE = 1_000_000
"""Distance between the first seeds of two seed blocks."""
UNGUIDED = 1.0
TAKEN = 500
"""Training images that are in memory together, at most, while their features are taken."""
SEARCHED = 20_000
"""Training images among which copies are looked for, at most."""
COPY_QUANTILE = 0.01
"""A sample counts as a near copy where it comes nearer to a training image than this share of held-out images does."""


CLIP_IS_CONDITION = "taken with the weights that condition the model, so it flatters"


class NotComparableError(StageError):
    """A pipeline or judge that does not fit the protocol; the message is one sentence that says why."""


@dataclass(frozen=True)
class Draw:
    """Images that a pipeline drew: pixels uint8 [N, C, S, S], the wanted label of each, seconds for all."""

    sampler: str
    steps: int
    guidance_scale: float
    labels: list[int] | None
    pixels: np.ndarray
    seconds: float
    eta: float = 0.0

    @property
    def name(self) -> str:
        return draw_name(self.sampler, self.steps, self.guidance_scale, self.eta)

    def first(self, count: int) -> Draw:
        """The draw of its first `count` seeds."""
        share = count / max(count, len(self.pixels))
        labels = self.labels[:count] if self.labels is not None else None
        return replace(self, labels=labels, pixels=self.pixels[:count], seconds=self.seconds * share)


def draw_name(sampler: str, steps: int, guidance_scale: float, eta: float) -> str:
    """What distinguishes two draws of one model, in words; `eta` where it adds noise."""
    return f"{sampler}{f' (eta {eta:g})' if eta else ''}, {steps} steps, guidance {guidance_scale:g}"


def declare(pipeline: Pipeline, images: Path, judge: Judge, params: EvaluateParams) -> dict[str, Any]:
    """The protocol by which `params` has this pipeline measured, as JSON: `measurement` is what the fingerprint
    covers, the rest are columns."""
    index = read_index(images)
    measurement = {
        "format": FORMAT,
        "n_distance": params.n_distance,
        "n_accuracy": params.n_accuracy,
        "seed": params.seed,
        "seed_blocks": params.seed_blocks,
        "reference": {"split": "test", "images": index.splits["test"], "sha256": index.sha256},
        "floor": {"split": "train", "images": "as many, of the classes asked for, as far as there are"},
        "judge": judge.info.hashes,
        "extractor": judge.kind,
        "feature_dim": judge.info.feature_dim,
        "image": judge.info.image,
        "quantisation": "uint8",
        "labels": pipeline.info.classes if pipeline.info.conditioning != "none" else None,
        "prompts": pipeline.info.prompts or judge.info.prompts,
    }
    return {
        "measurement": measurement,
        "fingerprint": fingerprint(measurement),
        "space": "pixels" if pipeline.info.latent is None else "latents",
        "conditioning": pipeline.info.conditioning,
        "clip_is_condition": _share_text_weights(pipeline, judge),
        "sampler": params.sampler,
        "steps": params.steps,
        "eta": params.eta,
        "guidance_scales": {
            "unguided": UNGUIDED,
            "guided": params.guidance_scale if pipeline.info.conditioning != "none" else None,
        },
        "guidance_interval": params.guidance_interval and list(params.guidance_interval),
        "batch_size": params.batch_size,
    }


def _share_text_weights(pipeline: Pipeline, judge: Judge) -> bool:
    """Whether the published CLIP that scores is the one whose text encoder conditions the model: it would then be
    asked whether the model did as it was told by the same."""
    if pipeline.text is None or judge.pretrained_clip is None:
        return False
    asked = judge.pretrained_clip.token_embeddings().float().cpu()
    told = [tower.model.get_input_embeddings().weight.float().cpu() for tower in pipeline.text.towers]
    return any(weights.shape == asked.shape and bool((weights == asked).all()) for weights in told)


def fingerprint(measurement: dict[str, Any]) -> str:
    """sha256 of the facts of a measurement as canonical JSON."""
    canonical = json.dumps(measurement, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def measure(pipeline: Pipeline, images: Path, judge: Judge, protocol: dict[str, Any]) -> Measurements:
    """Draw from `pipeline` and measure it by `protocol`.

    Raises `NotComparableError` where pipeline, images or judge are not those that the protocol can measure.
    """
    scorer = Scorer(images, judge, protocol)
    return summary(*draw_blocks(pipeline, protocol), scorer, protocol)


def draw_blocks(pipeline: Pipeline, protocol: dict[str, Any]) -> tuple[list[Draw], list[Draw]]:
    """For each seed block the draw without guidance (for the distances), and for a conditional model the guided one
    (for accuracy and CLIP score), from the same seeds."""
    facts = protocol["measurement"]
    _require_pipeline(pipeline, facts)
    unguided, guided = [], []
    for block in range(facts["seed_blocks"]):
        unguided.append(draw(pipeline, protocol, facts["n_distance"], block=block))
        if facts["labels"] is not None:
            scale = protocol["guidance_scales"]["guided"]
            guided.append(draw(pipeline, protocol, facts["n_accuracy"], guidance_scale=scale, block=block))
    return unguided, guided


def draw(
    pipeline: Pipeline,
    protocol: dict[str, Any],
    count: int,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float = UNGUIDED,
    block: int = 0,
) -> Draw:
    """The first `count` images of a seed block, labels in a balanced cycle; sampler, its eta and steps are the
    protocol's unless a sampler is given."""
    from models.pixels import to_uint8
    from models.samplers import Sampling

    eta = 0.0 if sampler else protocol["eta"]
    sampler, steps = sampler or protocol["sampler"], steps or protocol["steps"]
    facts = protocol["measurement"]
    first = facts["seed"] + block * BLOCK_STRIDE
    classes = facts["labels"]
    labels = balanced_labels(count, len(classes)) if classes is not None else None
    started = time.perf_counter()
    with tqdm(
        total=count * steps,
        desc=f"draw: {draw_name(sampler, steps, guidance_scale, eta)}",
        unit="step",
        unit_scale=True,
        mininterval=1,
        dynamic_ncols=True,
    ) as bar:
        images = pipeline.sample(
            range(first, first + count),
            labels,
            Sampling(sampler, steps, eta, guidance_scale, protocol["guidance_interval"]),
            batch_size=protocol["batch_size"],
            callback=lambda i, t, x, x0: bar.update(len(x)),
        )
    return Draw(sampler, steps, guidance_scale, labels, to_uint8(images), time.perf_counter() - started, eta)


def of_class(draws: Sequence[Draw], label: int) -> np.ndarray:
    """The images of all draws that were asked to show a class, uint8 [N, C, S, S]."""
    import numpy as np

    return np.concatenate([draw.pixels[np.asarray(draw.labels) == label] for draw in draws])


def balanced_labels(count: int, classes: int) -> list[int]:
    """0, 1, ... classes - 1, 0, 1, ... of length `count`."""
    return [index % classes for index in range(count)]


class Scorer:
    """A judge beside the real images it compares with: the held-out split and subsets of the training split."""

    def __init__(self, images: Path, judge: Judge, protocol: dict[str, Any]) -> None:
        facts = protocol["measurement"]
        _require_judge(images, judge, facts)
        form = ImageParams(resolution=facts["image"]["size"], channels=facts["image"]["channels"])
        self.judge = judge
        self.facts = facts
        self.held_out = load_pixels(images, "test", form)
        self.train = load_pixels(images, "train", form)
        self.reference = judge.features(self.held_out.pixels)
        prompts = facts["prompts"]
        self.prompts = judge.clip_text_embeds(prompts) if judge.reads_captions and prompts else None

    @property
    def dimensions(self) -> int:
        return self.reference.shape[1]

    def distances(self, pixels: np.ndarray) -> dict[str, float]:
        """Of uint8 images [N, C, S, S] to the held-out split."""
        from models.judges import metrics

        features = self.judge.features(pixels)
        precision, recall = metrics.precision_recall(features, self.reference)
        found = {
            "frechet_distance": metrics.frechet_distance(features, self.reference),
            "kid": metrics.kernel_distance(features, self.reference, self.facts["seed"]),
            "precision": precision,
            "recall": recall,
        }
        extractor = self.judge.extractor
        if extractor is not None and extractor.class_logits is not None:
            found["inception_score"] = metrics.inception_style_score(extractor.class_logits(features))
        return found

    @functools.cached_property
    def searched(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Where copies are looked for: rows of `train` int64 [n], their features [n, D], and the distance that
        `COPY_QUANTILE` of the held-out images stay below."""
        import numpy as np

        from models.judges import metrics

        count = len(self.train.pixels)
        rows = np.sort(np.random.default_rng(self.facts["seed"]).permutation(count)[:SEARCHED])
        features = self._features_of(rows)
        return rows, features, float(np.quantile(metrics.nearest(self.reference, features)[1], COPY_QUANTILE))

    def _features_of(self, rows: np.ndarray) -> np.ndarray:
        """Features of training images, float32 [n, D], in parts: together their pixels may be too many."""
        import numpy as np

        parts = (rows[start : start + TAKEN] for start in range(0, len(rows), TAKEN))
        return np.concatenate([self.judge.features(self.train.pixels[part]) for part in parts])

    def nearest_training(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of uint8 images [N, C, S, S] the nearest training image by features: rows of `train` int64 [N], and
        distances float64 [N]."""
        from models.judges import metrics

        rows, features, _ = self.searched
        index, distances = metrics.nearest(self.judge.features(pixels), features)
        return rows[index], distances

    def near_copies(self, pixels: np.ndarray) -> dict[str, float]:
        """Share of uint8 images [N, C, S, S] that come suspiciously near to a training image."""
        return {"near_copies": float((self.nearest_training(pixels)[1] < self.searched[2]).mean())}

    def small_n(self) -> str | None:
        """Why the distances would say little, or None: too few images on a side for the features' dimension."""
        needed = IMAGES_PER_DIMENSION * self.dimensions
        drawn, real = self.facts["n_distance"], len(self.reference)
        if min(drawn, real) >= needed:
            return None
        return (
            f"{drawn} samples and {real} held-out images for features of {self.dimensions} dimensions, which need "
            f"{needed} of each"
        )

    def stand_ins(self, block: int) -> np.ndarray:
        """Training images in the place of a block's draw: as many, of the same classes, none twice.

        They are fewer where the training split has fewer. Returns uint8 [n, C, S, S].
        """
        import numpy as np

        count, classes = self.facts["n_distance"], self.facts["labels"]
        order = np.random.default_rng((self.facts["seed"], block)).permutation(len(self.train.pixels))
        if classes is None or (self.train.labels < 0).all():
            return self.train.pixels[order[:count]]
        labels = self.train.labels[order]
        wanted = np.bincount(balanced_labels(count, len(classes)), minlength=len(classes))
        rows = [order[labels == label][:number] for label, number in enumerate(wanted)]
        return self.train.pixels[np.concatenate(rows)]

    @property
    def has_labels(self) -> bool:
        return bool((self.held_out.labels >= 0).any())

    def held_out_for(self, conditioning: str, count: int) -> tuple[np.ndarray, dict[str, list[Any]]]:
        """At most `count` held-out images spread over the split, uint8 [n, C, S, S], and what a model is asked for to
        draw them, in the words of `Pipeline.condition`: their labels, or first captions; those without are left out."""
        import numpy as np

        has = {
            "none": np.ones(len(self.held_out.keys), bool),
            "label": self.held_out.labels >= 0,
            "text": np.array([bool(captions) for captions in self.held_out.captions]),
        }[conditioning]
        known = np.flatnonzero(has)
        rows = known[np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int))]
        wishes: dict[str, list[Any]] = {}
        if conditioning == "label":
            wishes["labels"] = self.held_out.labels[rows].tolist()
        if conditioning == "text":
            wishes["prompts"] = [self.held_out.captions[row][0] for row in rows]
        return self.held_out.pixels[rows], wishes

    def class_distance(self, pixels: np.ndarray, label: int) -> dict[str, float]:
        """KID of uint8 images [N, C, S, S] to the held-out images of a class, and that of as many training images
        of it; nothing where there are fewer than two of any."""
        import numpy as np

        from models.judges import metrics

        reference = self.reference[self.held_out.labels == label]
        stand_ins = self.train.pixels[np.flatnonzero(self.train.labels == label)[: len(pixels)]]
        if min(len(reference), len(pixels), len(stand_ins)) < 2:
            return {}
        return {
            name: metrics.squared_mmd(self.judge.features(images), reference)
            for name, images in (("kid", pixels), ("kid_floor", stand_ins))
        }

    def inception_style_score(self, pixels: np.ndarray) -> dict[str, float]:
        from models.judges import metrics

        if self.judge.classifier is None:
            return {}
        return {"inception_style_score": metrics.inception_style_score(self.judge.class_logits(pixels))}

    def fit_to_labels(self, pixels: np.ndarray, labels: Sequence[int] | None) -> dict[str, float]:
        """Label accuracy and CLIP score, those that apply, of images that should show the classes `labels`; those with
        -1 do not count."""
        import numpy as np

        from models.judges import metrics

        scores: dict[str, float] = {}
        if labels is None:
            return scores
        known = np.asarray(labels) >= 0
        wanted = np.asarray(labels)[known]
        if self.judge.classifier is not None:
            scores["label_accuracy"] = metrics.accuracy(self.judge.class_logits(pixels)[known], wanted)
        if self.prompts is not None:
            embeds = self.judge.clip_image_embeds(pixels)[known]
            scores["clip_score"] = metrics.clip_score(embeds, self.prompts[wanted])
        return scores

    def real(self) -> dict[str, float]:
        """The same scores of the held-out images."""
        known = self.held_out.labels >= 0
        scores = self.inception_style_score(self.held_out.pixels) | {"near_copies": COPY_QUANTILE}
        if known.any():
            scores |= self.fit_to_labels(self.held_out.pixels, self.held_out.labels.tolist())
        elif self.prompts is not None:
            scores |= self._fit_to_own_captions()
        return scores

    def _fit_to_own_captions(self) -> dict[str, float]:
        """CLIP score of the held-out images with their first captions, where no classes stand for them."""
        from models.judges import metrics

        captioned = [row for row, captions in enumerate(self.held_out.captions) if captions]
        texts = self.judge.clip_text_embeds([self.held_out.captions[row][0] for row in captioned])
        embeds = self.judge.clip_image_embeds(self.held_out.pixels)[captioned]
        return {"clip_score": metrics.clip_score(embeds, texts)}


def summary(unguided: Sequence[Draw], guided: Sequence[Draw], scorer: Scorer, protocol: dict[str, Any]) -> Measurements:
    """What the draws of all seed blocks score, beside training images in the model's place and held-out images."""
    facts, scales = protocol["measurement"], protocol["guidance_scales"]
    blocks = [
        scorer.distances(draw.pixels) | scorer.inception_style_score(draw.pixels) | scorer.near_copies(draw.pixels)
        for draw in unguided
    ]
    fits = [scorer.fit_to_labels(draw.pixels, draw.labels) for draw in guided]
    floors = _means_and_spreads([scorer.distances(scorer.stand_ins(block)) for block in range(facts["seed_blocks"])])
    real = scorer.real()

    def measured(found: list[dict[str, float]], drawn: Literal["unguided", "guided"], n: int) -> dict[str, Measure]:
        result = {}
        for name, (value, spread) in _means_and_spreads(found).items():
            floor, floor_spread = floors.get(name, (None, None))
            result[name] = Measure(
                value=value,
                spread=spread,
                drawn=drawn,
                guidance_scale=scales[drawn],
                n=n,
                floor=floor,
                floor_spread=floor_spread,
                real=_rounded(real[name]) if name in real else None,
            )
        return result

    return Measurements(
        fingerprint=protocol["fingerprint"],
        sampler=protocol["sampler"],
        steps=protocol["steps"],
        eta=protocol["eta"],
        guidance_interval=protocol["guidance_interval"],
        guided_scale=scales["guided"],
        seed_blocks=facts["seed_blocks"],
        extractor=facts["extractor"],
        n_samples=facts["n_distance"],
        n_reference=facts["reference"]["images"],
        n_floor=len(scorer.stand_ins(0)),
        n_searched=len(scorer.searched[0]),
        small_n=scorer.small_n(),
        clip_score_note=CLIP_IS_CONDITION if protocol["clip_is_condition"] else None,
        measures=measured(blocks, "unguided", facts["n_distance"]) | measured(fits, "guided", facts["n_accuracy"]),
        not_applicable=_not_applicable(scorer, facts),
    )


def _means_and_spreads(blocks: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each measure its mean over the seed blocks and their sample standard deviation."""
    import numpy as np

    values = {name: [block[name] for block in blocks] for name in (blocks[0] if blocks else ())}
    return {name: (_rounded(float(np.mean(its))), _rounded(float(np.std(its, ddof=1)))) for name, its in values.items()}


def _rounded(value: float) -> float:
    """To six digits: the linear algebra's last ones depend on where in memory its input happens to lie."""
    return float(f"{value:.6g}")


def _not_applicable(scorer: Scorer, facts: dict[str, Any]) -> dict[str, str]:
    """Metrics that are absent, each with the reason."""
    reasons = {}
    if scorer.judge.classifier is None:
        reasons["inception_style_score"] = reasons["label_accuracy"] = (
            "the images have no labels to train a classifier on"
        )
    if not scorer.judge.reads_captions:
        reasons["clip_score"] = "the images have no captions to train a CLIP on"
    elif scorer.prompts is None:
        reasons["clip_score"] = "the captions do not follow from the class that the model is asked for"
    if facts["labels"] is None:
        reasons["label_accuracy"] = reasons["clip_score"] = "the model draws without labels or captions"
    return reasons


def _require_pipeline(pipeline: Pipeline, facts: dict[str, Any]) -> None:
    drawn = pipeline.info
    labels = drawn.classes if drawn.conditioning != "none" else None
    if labels != facts["labels"]:
        raise NotComparableError("the model draws other classes than the protocol asks for; measure it by its own")
    if {"size": drawn.size, "channels": drawn.channels} != facts["image"]:
        raise NotComparableError(
            f"the model draws {drawn.channels} x {drawn.size} x {drawn.size} images and the protocol measures "
            f"{facts['image']['channels']} x {facts['image']['size']} x {facts['image']['size']}; measure it by its own"
        )


def _require_judge(images: Path, judge: Judge, facts: dict[str, Any]) -> None:
    if judge.info.hashes != facts["judge"]:
        raise NotComparableError("the judge is not the one that the protocol names; run 'dvc repro judge evaluate'")
    if read_index(images).sha256 != facts["reference"]["sha256"]:
        raise NotComparableError("the images are not those that the protocol names; run 'dvc repro evaluate'")
