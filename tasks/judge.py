"""Stage `judge`: images -> what measures (a classifier, a scoring CLIP, or a self-supervised encoder)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.formats.verdict import require_accepted
from tasks.params import ImageParams, JudgeParams
from tasks.pictures.images import Samples, load_pixels, read_index
from tasks.pretrained import extractors
from tasks.runtime import stage

if TYPE_CHECKING:
    import numpy as np

    from models.judges.judge import Judge

CHOICES = 10
"""Captions offered for each held-out image, one of them right, where no prompts name the classes."""
MAX_TWINS = 512


def judge(images: Path, accepted: Path, folder: Path, params: JudgeParams, image: ImageParams) -> None:
    """Train what measures, and nothing else: a classifier where there are labels, a CLIP where there are captions.

    Features for the distances come from the classifier; without labels from the CLIP's image tower; without
    captions from a self-supervised encoder. Each is tested on the held-out images. Where `params.extractor` or
    `params.clip` names a published network, it comes in their place.
    """
    from models.judges.judge import save_judge
    from tasks.runtime.atomic import writing_folder

    require_accepted(accepted)
    classes = read_index(images).classes
    train, held_out = load_pixels(images, "train", image), load_pixels(images, "test", image)
    with writing_folder(folder) as temporary:
        published = _place_published(temporary, params)  # before hours of training: it may not be there
        trained = replace(_train(train, classes, params, image), **published)
        info = replace(trained.info, **_test(trained, held_out, params), held_out_images=len(held_out.keys))
        save_judge(temporary, replace(trained, info=info))


def _place_published(folder: Path, params: JudgeParams) -> dict[str, Any]:
    """Bring the published networks into `folder`; returns them as arguments of `Judge`."""
    from models.device import best_device
    from models.judges.judge import EXTRACTOR, PRETRAINED_CLIP, load_published

    kind = params.extractor.kind if params.extractor.kind != "in_domain" else None
    if kind:
        extractors.place(params.extractor, folder / EXTRACTOR)
    if params.clip.weights is not None:
        extractors.place(params.clip, folder / PRETRAINED_CLIP)
    try:
        extractor, clip = load_published(folder, kind, best_device())
    except ValueError as error:
        raise stage.StageError(f"{error}; see judge.extractor.weights and judge.clip.weights") from None
    return {"extractor": extractor, "pretrained_clip": clip}


def _train(train: Samples, classes: list[str], params: JudgeParams, image: ImageParams) -> Judge:
    from models.device import best_device
    from models.judges.classifier import train_classifier
    from models.judges.clip import train_clip
    from models.judges.fit import Recipe
    from models.judges.judge import Judge, JudgeInfo
    from models.judges.selfsupervised import train_encoder

    device = best_device()
    clip_recipe = Recipe(
        params.clip_steps, params.batch_size, params.seed, params.horizontal_flip, device, _bar("CLIP")
    )
    recipe = replace(clip_recipe, steps=params.classifier_steps, progress=_bar("feature extractor"))
    classifier, clip, tokenizer, encoder = None, None, None, None
    if len(set(train.labels.tolist()) - {-1}) > 1:
        classifier = train_classifier(train.pixels, train.labels, len(classes), recipe)
    if params.clip.weights is None and len({tuple(sorted(texts)) for texts in train.captions if texts}) > 1:
        clip, tokenizer = train_clip(train.pixels, train.captions, clip_recipe)
    if classifier is None and clip is None and params.extractor.kind == "in_domain":
        encoder = train_encoder(train.pixels, recipe)
    info = JudgeInfo(
        classes=classes,
        prompts=class_prompts(train, len(classes)),
        image={"size": image.resolution, "channels": image.channels},
        train_images=len(train.keys),
    )
    return Judge(info, classifier, clip, tokenizer, encoder, device)


def _test(judge: Judge, held_out: Samples, params: JudgeParams) -> dict[str, Any]:
    """How good each network is on held-out images: the `*_accuracy` entries of `judge.json`."""
    from models.judges.clip import choice_accuracy
    from models.judges.metrics import accuracy
    from models.judges.selfsupervised import twin_accuracy

    found: dict[str, Any] = {}
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


def class_prompts(samples: Samples, classes: int) -> list[str] | None:
    """For each class the caption that most of its images carry (the first in the alphabet of several) and no
    image of another class.

    None where some class has no such caption on at least half of its images: then the captions do not follow
    from the class.
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
    samples: Samples, prompts: list[str] | None, seed: int
) -> tuple[list[int], list[str], np.ndarray, np.ndarray]:
    """The examination of a CLIP: rows of images, captions, and as indices into these the right one of each
    image, int64 [N], and the wrong ones offered beside it, int64 [N, K - 1].

    With prompts every class's is offered; without, the image's first caption among `CHOICES - 1` of other images.
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
        drawn: Any = random.choice(len(texts), min(len(texts), CHOICES - 1 + len(own)), replace=False) if own else []
        strangers = [index for index in drawn if index not in own]
        if strangers:
            rows.append(row)
            firsts.append(number[captions[0]])
            wrong.append(np.resize(strangers, CHOICES - 1))
    return rows, texts, np.asarray(firsts, np.int64), np.asarray(wrong, np.int64)


def _bar(what: str) -> Callable[..., Any]:
    return partial(tqdm, desc=f"judge: {what}", unit="step", mininterval=1, dynamic_ncols=True)


if __name__ == "__main__":
    stage.main(judge)
