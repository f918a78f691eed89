"""Stage `judge`: train the networks that measure samples: classifier, scoring CLIP, self-supervised encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.formats.verdict import require_accepted
from tasks.params import ImageParams, JudgeParams
from tasks.pictures.index import read_index
from tasks.runtime import stage
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from models.judges.fit import Recipe
    from models.judges.judge import Judge
    from models.judges.pretrained import Extractor, PretrainedClip
    from tasks.pictures.samples import Samples, Split

TRAINED_ON = {"classifier": "label", "clip": "text", "encoder": "none"}
"""Network, as a field of `Judge` -> what the training images have on which it is trained, see `with_condition`."""
CHOICES = 10
"""Captions among which the CLIP has to find that of a held-out image, for data without a caption per class."""
MAX_TWINS = 512
"""Held-out images on which the self-supervised encoder is tested, at most."""


def judge(images: Path, accepted: Path, folder: Path, params: JudgeParams, image: ImageParams) -> None:
    """Train a classifier on labels and a CLIP on captions, as far as the data has them, and write them to `folder`.

    Features for the distances come from the classifier, else from the CLIP's image encoder, else from a self-supervised
    encoder. Each network is tested on the held-out images, at most `samples.HELD_OUT` of them. A published network
    named by `params.extractor` or `params.clip` replaces them. Of the training images those are read that are drawn.
    """
    from models.judges.judge import save_judge
    from tasks.pictures.images import load_pixels
    from tasks.pictures.samples import held_out_rows
    from tasks.runtime.atomic import writing_folder

    require_accepted(accepted)
    classes = read_index(images).classes
    train = load_pixels(images, "train", image, partial(_drawn_rows, params=params))
    held_out = load_pixels(images, "test", image, held_out_rows).only_read()
    with writing_folder(folder) as temporary:
        extractor, clip = _place_published(temporary, params)  # before training, because a download may fail
        trained = replace(_train(train, classes, params, image), extractor=extractor, pretrained_clip=clip)
        info = replace(trained.info, **_test(trained, held_out, params), held_out_images=len(held_out.keys))
        save_judge(temporary, replace(trained, info=info))


def _place_published(folder: Path, params: JudgeParams) -> tuple[Extractor | None, PretrainedClip | None]:
    """Copy or download the published networks into `folder`, and load them.

    Raises:
        StageError: if the files are not those of a supported network.
    """
    from models.device import best_device
    from models.judges.judge import EXTRACTOR, PRETRAINED_CLIP, load_published
    from tasks.pretrained import extractors

    kind = params.extractor.kind if params.extractor.kind != "in_domain" else None
    if kind:
        extractors.place(params.extractor, folder / EXTRACTOR)
    if params.clip.weights is not None:
        extractors.place(params.clip, folder / PRETRAINED_CLIP)
    try:
        return load_published(folder, kind, best_device())
    except ValueError as error:
        raise StageError(f"{error}; see judge.extractor.weights and judge.clip.weights") from None


def _trained(split: Split, params: JudgeParams) -> list[str]:
    """Return which networks are trained, of `TRAINED_ON`."""
    import numpy as np

    networks = []
    if len(np.unique(split.labels[split.labels >= 0])) > 1:
        networks.append("classifier")
    if params.clip.weights is None and _differ(texts for texts in split.captions if texts):
        networks.append("clip")
    if not networks and params.extractor.kind == "in_domain":
        networks.append("encoder")
    return networks


def _differ(captions: Iterable[list[str]]) -> bool:
    """Return whether two images have different captions."""
    each = (sorted(texts) for texts in captions)
    first = next(each, None)
    return any(texts != first for texts in each)


def _recipe(params: JudgeParams, network: str) -> Recipe:
    from models.judges.fit import Recipe

    steps = params.clip_steps if network == "clip" else params.classifier_steps
    name = "CLIP" if network == "clip" else "feature extractor"
    bar = partial(progress, desc=f"judge: {name}", unit="step")
    return Recipe(steps, params.batch_size, params.seed, params.horizontal_flip, progress=bar)


def _drawn_rows(split: Split, params: JudgeParams) -> np.ndarray:
    """Return the training images that the trainings draw, as rows: of a large split they are some of them."""
    import numpy as np

    from models.judges.fit import drawn_rows

    rows = [np.arange(0)]
    for network in _trained(split, params):
        own = split.with_condition(TRAINED_ON[network])
        rows.append(own[drawn_rows(len(own), _recipe(params, network))])
    return np.concatenate(rows)


def _train(train: Samples, classes: list[str], params: JudgeParams, image: ImageParams) -> Judge:
    from torch import nn

    from models.device import best_device, keep_freed
    from models.judges.classifier import train_classifier
    from models.judges.clip import train_clip
    from models.judges.judge import Judge, JudgeInfo
    from models.judges.selfsupervised import train_encoder
    from models.parallel import at_once

    keep_freed(device := best_device())
    pixels = train.by_row

    def fields_of(network: str, on: str) -> dict[str, Any]:  # fields of Judge
        recipe = replace(_recipe(params, network), device=on)
        if network == "classifier":
            return {network: train_classifier(pixels, train.labels, len(classes), recipe)}
        if network == "clip":
            return dict(zip((network, "tokenizer"), train_clip(pixels, train.captions, recipe), strict=True))
        return {network: train_encoder(pixels, recipe)}

    trainings = [partial(fields_of, network) for network in _trained(train, params)]
    trained: dict[str, Any] = {"classifier": None, "clip": None, "tokenizer": None, "encoder": None, "device": device}
    for fields in at_once(trainings, device):
        trained |= {name: each.to(device) if isinstance(each, nn.Module) else each for name, each in fields.items()}
    info = JudgeInfo(
        classes=classes,
        prompts=class_prompts(train, len(classes)),
        image={"size": image.resolution, "channels": image.channels},
        train_images=len(train.keys),
    )
    return Judge(info, **trained)


def _test(judge: Judge, held_out: Samples, params: JudgeParams) -> dict[str, Any]:  # fields of JudgeInfo
    """Return the accuracy of each network on held-out images, as fields of `JudgeInfo`."""
    from models.judges.clip import choice_accuracy
    from models.judges.metrics import accuracy
    from models.judges.selfsupervised import twin_accuracy

    found: dict[str, float] = {}
    labelled = held_out.labels >= 0
    if judge.classifier is not None and labelled.any():
        logits = judge.class_logits(held_out.pixels)[labelled]
        found["classifier_accuracy"] = accuracy(logits, held_out.labels[labelled])
    rows, texts, right, others = caption_choices(held_out, judge.info.prompts, params.seed)
    if judge.reads_captions and rows:
        embeds = judge.clip_image_embeds(held_out.pixels)[rows]
        found["clip_accuracy"] = choice_accuracy(embeds, judge.clip_text_embeds(texts), right, others)
        found["clip_choices"] = others.shape[1] + 1
    if judge.encoder is not None:
        pixels = held_out.pixels[:MAX_TWINS]
        found["self_supervised_accuracy"] = twin_accuracy(
            judge.encoder, pixels, params.seed, params.horizontal_flip, judge.device
        )
    shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    print(f"judge: on {len(held_out.keys)} held-out images: {shown}", flush=True)
    return found


def class_prompts(samples: Split, classes: int) -> list[str] | None:
    """Return the caption of each class: the most frequent one that no image of another class has.

    Ties are broken alphabetically. Returns None if a class has no such caption on at least half of its images: the
    captions then do not follow from the class.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(classes)]
    for label, captions in zip(samples.labels.tolist(), samples.captions, strict=True):
        if label >= 0:
            counts[label].update(set(captions))
    carriers = Counter(text for count in counts for text in count)
    prompts = []
    for label, count in enumerate(counts):
        own = [text for text in count if carriers[text] == 1]
        caption = min(own, key=lambda text: (-count[text], text), default=None)
        if caption is None or 2 * count[caption] < (samples.labels == label).sum():
            return None
        prompts.append(caption)
    return prompts or None


def caption_choices(
    samples: Split, prompts: list[str] | None, seed: int
) -> tuple[list[int], list[str], np.ndarray, np.ndarray]:
    """Return the test set of a CLIP: rows of N images, captions, and indices of right and wrong captions.

    The right caption of each image is int64 [N], the wrong ones are int64 [N, K - 1]. With `prompts` the choice is
    among those of all classes; without, among the image's first caption and `CHOICES - 1` captions of other images.
    """
    import numpy as np

    if prompts:
        rows = (samples.labels >= 0).nonzero()[0].tolist()
        right = samples.labels[rows]
        others = [[k for k in range(len(prompts)) if k != label] for label in right]
        return rows, prompts, right, np.asarray(others, np.int64)
    random = np.random.default_rng(seed)
    texts = sorted({text for own in samples.captions for text in own})
    number = {text: index for index, text in enumerate(texts)}
    rows, firsts, wrong = [], [], []
    for row, captions in enumerate(samples.captions):
        own = {number[text] for text in captions}
        if not own:
            continue
        candidates = random.choice(len(texts), min(len(texts), CHOICES - 1 + len(own)), replace=False)
        foreign = [index for index in candidates.tolist() if index not in own]
        if foreign:
            rows.append(row)
            firsts.append(number[captions[0]])
            wrong.append(np.resize(foreign, CHOICES - 1))
    return rows, texts, np.asarray(firsts, np.int64), np.asarray(wrong, np.int64)


if __name__ == "__main__":
    stage.main(judge)
