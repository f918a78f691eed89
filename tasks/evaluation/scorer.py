"""Scoring drawn images with the judge, against the held-out images and against training images.

`Scorer` holds the judge, both splits and their features. Distances compare a set of samples with the held-out split;
the floor is the distance of training images in place of the samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from models.judges import metrics
from models.networks.control_maps import maps_of
from tasks.evaluation.draws import balanced_labels
from tasks.evaluation.extraction import Extraction, Images
from tasks.evaluation.protocol import Protocol, require_judge
from tasks.params import IMAGES_PER_DIMENSION, ImageParams
from tasks.pictures import decoding
from tasks.pictures.images import load_pixels, map_hashes, read_maps
from tasks.pictures.samples import held_out_rows
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.judges.judge import Judge
    from models.networks.control_maps import ControlSpec
    from tasks.pictures.samples import Split

SEARCHED = 20_000
"""Training images among which near copies are searched for, at most."""
COPY_QUANTILE = 0.01
"""A sample is a near copy if it is nearer to a training image than this share of the held-out images."""


class Neighbourhood(NamedTuple):
    """The training images among which near copies are searched for."""

    rows: np.ndarray
    """Their indices in the training split, int64 [n]."""
    features: np.ndarray
    """float32 [n, D]."""
    threshold: float
    """Distance to the nearest training image below which a sample is a near copy."""


class Scorer:
    """A judge with the real images that it compares samples with.

    Each image is passed through each network of the judge once, and distances of the same images are computed once.

    Raises:
        NotComparableError: if judge or data set are not those of the protocol.
    """

    def __init__(self, images: Path, judge: Judge, protocol: Protocol) -> None:
        measurement = protocol.measurement
        require_judge(images, judge, measurement)
        shape = ImageParams.model_validate(
            {"resolution": measurement.image["size"], "channels": measurement.image["channels"]}
        )
        self.judge, self.images = judge, images
        self._extraction = Extraction()
        self.measurement = measurement
        self.held_out = load_pixels(images, "test", shape, held_out_rows).only_read()
        self.train = load_pixels(images, "train", shape, self._needed)
        self.reference = self._features(Images.of(self.held_out.pixels))
        prompts = measurement.prompts
        self.prompts = judge.clip_text_embeds(prompts) if judge.reads_captions and prompts else None

    @property
    def dimensions(self) -> int:
        """D of the features."""
        return int(self.reference.shape[1])

    def _features(self, images: Images) -> np.ndarray:
        return self._extraction.output("features", self.judge.features, images)

    def _embeds(self, images: Images) -> np.ndarray:
        return self._extraction.output("embeds", self.judge.clip_image_embeds, images)

    def _class_logits(self, images: Images) -> np.ndarray:
        if self.judge.kind == "classifier":
            return self.judge.class_logits_of(self._features(images))
        return self._extraction.output("class logits", self.judge.class_logits, images)

    def distances(self, images: Images) -> dict[str, float]:
        """Return the distances of images to the held-out split, and the Inception score if the extractor has one."""
        return dict(self._extraction.once("distances", self._distances, images))

    def _distances(self, images: Images) -> dict[str, float]:
        features = self._features(images)
        precision, recall = metrics.precision_recall(features, self.reference)
        found = {
            "frechet_distance": metrics.frechet_distance(features, self.reference),
            "kid": metrics.kernel_distance(features, self.reference, self.measurement.seed),
            "cmmd": metrics.cmmd(features, self.reference),
            "precision": precision,
            "recall": recall,
        }
        extractor = self.judge.extractor
        if extractor is not None and extractor.class_logits is not None:
            found["inception_score"] = metrics.inception_style_score(extractor.class_logits(features))
        return found

    def _needed(self, split: Split) -> np.ndarray:
        """Return the training images that are compared with, as rows; of a small split that is all of them."""
        labels, measurement = split.labels, self.measurement
        classes = measurement.labels or []
        most = -(-measurement.n_distance // max(1, len(classes))) * measurement.seed_blocks
        of_classes = [np.flatnonzero(labels == label)[:most] for label in range(len(classes))]
        blocks = [self._stand_in_rows(block, labels) for block in range(measurement.seed_blocks)]
        return np.concatenate([self._searched_rows(len(labels)), *blocks, *of_classes])

    def _searched_rows(self, count: int) -> np.ndarray:
        """Return the rows that are searched of `count`, int64, ascending."""
        return np.sort(np.random.default_rng(self.measurement.seed).permutation(count)[:SEARCHED])

    @functools.cached_property
    def searched(self) -> Neighbourhood:
        """The training images among which near copies are searched for."""
        rows = self._searched_rows(len(self.train.keys))
        features = self._features(self._training(rows))
        distances = metrics.nearest(self.reference, features)[1]
        return Neighbourhood(rows, features, float(np.quantile(distances, COPY_QUANTILE)))

    def _training(self, rows: np.ndarray) -> Images:
        """Return training images by their rows in the split."""
        return Images.of(self.train.pixels, self.train.places(rows))

    def nearest_training(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        """Return the training image nearest to each image by features: index int64 [N], distance float64 [N]."""
        return self._extraction.once("nearest", self._nearest_training, images)

    def _nearest_training(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        index, distances = metrics.nearest(self._features(images), self.searched.features)
        return self.searched.rows[index], distances

    def near_copies(self, images: Images) -> dict[str, float]:
        """Return the share of images that are near copies of a training image."""
        return {"near_copies": float((self.nearest_training(images)[1] < self.searched.threshold).mean())}

    def small_n(self) -> str | None:
        """Return why the distances are unreliable: too few images on a side for the features' dimension; else None."""
        needed = IMAGES_PER_DIMENSION * self.dimensions
        drawn, real = self.measurement.n_distance, len(self.reference)
        if min(drawn, real) >= needed:
            return None
        return (
            f"{drawn} samples and {real} held-out images for features of {self.dimensions} dimensions, which need "
            f"{needed} of each"
        )

    def stand_ins(self, block: int) -> Images:
        """Return training images for the floor: as many as a seed block draws, of the same classes, without repeats.

        There are fewer if the training split has fewer.
        """
        return self._training(self._stand_in_rows(block, self.train.labels))

    def _stand_in_rows(self, block: int, train_labels: np.ndarray) -> np.ndarray:
        count, classes = self.measurement.n_distance, self.measurement.labels
        order = np.random.default_rng((self.measurement.seed, block)).permutation(len(train_labels))
        if classes is None or (train_labels < 0).all():
            return order[:count]
        labels = train_labels[order]
        wanted = np.bincount(balanced_labels(count, len(classes)), minlength=len(classes))
        return np.concatenate([order[labels == label][:number] for label, number in enumerate(wanted)])

    @property
    def has_labels(self) -> bool:
        """Whether any held-out image has a label."""
        return bool((self.held_out.labels >= 0).any())

    def held_out_for(
        self, conditioning: str, count: int
    ) -> tuple[np.ndarray, dict[str, list[int]] | dict[str, list[str]]]:
        """Return at most `count` held-out images spread over the split, and their conditions.

        The conditions are arguments of `Pipeline.condition`: `labels`, or `prompts` (first captions), or none. Images
        without label or caption are left out for a model that needs one.
        """
        rows = self.held_out_rows(conditioning, count)
        pixels = self.held_out.pixels[rows]
        if conditioning == "label":
            return pixels, {"labels": self.held_out.labels[rows].tolist()}
        if conditioning == "text":
            return pixels, {"prompts": [self.held_out.captions[row][0] for row in rows]}
        return pixels, {}

    def held_out_rows(self, conditioning: str, count: int) -> np.ndarray:
        """Return the indices of the held-out images that `held_out_for` returns, int64 [at most `count`]."""
        known = self.held_out.with_condition(conditioning)
        return known[np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int))]

    def control_maps(self, spec: ControlSpec, rows: np.ndarray) -> np.ndarray:
        """Return the control maps of held-out images, in the stored shape: made from them, or those of the user.

        Raises:
            StageError: if an image lacks the user's own map.
        """
        if spec.kind != "own":
            return maps_of(spec, self.held_out.pixels[rows])
        keys = [self.held_out.keys[row] for row in rows]
        resolution = self.held_out.pixels.shape[2], self.held_out.pixels.shape[3]
        hashes = map_hashes(self.images)
        if missing := [key for key in keys if key not in hashes]:
            raise StageError(f"{missing[0]} has no control map, which the model needs; run 'dvc repro ingest'")
        maps = {
            key: decoding.decode_resized(data, decoding.MAX_MAP_PIXELS, resolution, 3)
            for key, _, data in read_maps(self.images, keys)
        }
        return np.stack([maps[key] for key in keys])

    def class_distance(self, images: Images, label: int) -> dict[str, float]:
        """Return the KID of images to the held-out images of a class, and its floor; empty with fewer than two images.

        KID is the only distance that is reliable for so few images.
        """
        reference = self.reference[self.held_out.labels == label]
        stand_ins = self._training(np.flatnonzero(self.train.labels == label)[: len(images)])
        if min(len(reference), len(images), len(stand_ins)) < 2:
            return {}
        return {
            name: metrics.squared_mmd(self._features(compared), reference)
            for name, compared in (("kid", images), ("kid_floor", stand_ins))
        }

    def inception_style_score(self, images: Images) -> dict[str, float]:
        """Return the Inception score by the judge's own classifier; empty without one."""
        if self.judge.classifier is None:
            return {}
        return {"inception_style_score": metrics.inception_style_score(self._class_logits(images))}

    def fit_to_labels(self, images: Images, labels: Sequence[int] | None) -> dict[str, float]:
        """Return label accuracy and CLIP score of images with these requested classes, as far as the judge has them.

        Images with label -1 are left out.
        """
        scores: dict[str, float] = {}
        if labels is None:
            return scores
        known = np.asarray(labels) >= 0
        wanted = np.asarray(labels)[known]
        if self.judge.classifier is not None:
            scores["label_accuracy"] = metrics.accuracy(self._class_logits(images)[known], wanted)
        if self.prompts is not None:
            scores["clip_score"] = metrics.clip_score(self._embeds(images)[known], self.prompts[wanted])
        return scores

    def real(self) -> dict[str, float]:
        """Return the scores of the held-out images, the reference of the samples' scores."""
        held_out = Images.of(self.held_out.pixels)
        scores = self.inception_style_score(held_out) | {"near_copies": COPY_QUANTILE}
        if self.has_labels:
            scores |= self.fit_to_labels(held_out, self.held_out.labels.tolist())
        elif self.prompts is not None:
            scores |= self._fit_to_own_captions()
        return scores

    def _fit_to_own_captions(self) -> dict[str, float]:
        """Return the CLIP score of the held-out images with their first captions, for data without labels."""
        captioned = [row for row, captions in enumerate(self.held_out.captions) if captions]
        texts = self.judge.clip_text_embeds([self.held_out.captions[row][0] for row in captioned])
        embeds = self._embeds(Images.of(self.held_out.pixels))[captioned]
        return {"clip_score": metrics.clip_score(embeds, texts)}
