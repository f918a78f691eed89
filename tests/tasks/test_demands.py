"""Requirements of later stages on the data: `validate` checks each, by name and with its remedy."""

from __future__ import annotations

import pytest

from models.judges.feature_widths import stage_widths
from tasks.download import download
from tasks.ingest import ingest
from tasks.params import Demands, Params, ValidateParams
from tasks.preset import compose
from tasks.runtime.errors import StageError
from tasks.validate import validate
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree


def files(train: int, test: int, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """Pictures of each class in either split."""
    return {
        f"{split}/{name}/{number}.png": picture(number + 50 * place + (500 if split == "test" else 0))
        for place, name in enumerate(classes)
        for split, count in (("train", train), ("test", test))
        for number in range(count)
    }


PLAIN = {f"{number:02d}.png": picture(number) for number in range(12)}
SPLIT = {
    f"{split}/{number}.png": picture(number + 50 * (split == "test"))
    for split in ("train", "test")
    for number in range(4)
}
CAPTIONED = PLAIN | {f"{number:02d}.txt": b"a caption" for number in range(11)}

REFUSED = {
    "batch larger than the data": (
        files(6, 4),
        {"train.batch_size": 13},
        "12 training images are fewer than train.batch_size 13; lower it to 12 or less",
    ),
    "too few held-out images for the features": (
        files(6, 4),
        {"evaluate.allow_small_n": False},
        "8 held-out images are too few for distances in features of 32 dimensions, which need 64; add images, raise",
    ),
    "one held-out image": (
        {name: data for name, data in SPLIT.items() if not name.startswith("test/") or name == "test/0.png"},
        {},
        "there are 1 held-out images, and measuring needs 2; add images or raise ingest.held_out_fraction",
    ),
    "one training image": (
        {name: data for name, data in SPLIT.items() if not name.startswith("train/") or name == "train/0.png"},
        {"train.batch_size": 1},
        "there are 1 training images, and measuring needs 2; add images or change ingest.held_out_fraction",
    ),
    "labels that are not there": (
        PLAIN,
        {"codec.conditioning": "label"},
        "the images have no classes, and codec.conditioning is 'label'; set it to 'none', or sort the images",
    ),
    "captions that are not there": (
        PLAIN,
        {"codec.conditioning": "text"},
        "images have no caption, and codec.conditioning is 'text'; add captions, set ingest.caption_templates",
    ),
    "a caption that is missing, and only warned about": (
        CAPTIONED,
        {"codec.conditioning": "text"},
        "images have no caption, and codec.conditioning is 'text'; add captions, set ingest.caption_templates",
    ),
    "a class that is only held out": (
        files(5, 3) | {f"test/owl/{number}.png": picture(900 + number) for number in range(3)},
        {"codec.conditioning": "label"},
        "classes have no training image; move some of their images to the training split, or lower ingest.held_out_",
    ),
}


def demands(**others: object) -> Demands:
    values = {"codec.conditioning": "none", "evaluate.allow_small_n": True, "image.resolution": 8}
    return Demands.model_validate(values | {"judge.extractor.kind": "in_domain", "train.batch_size": 4} | others)


def judge(tmp_path, inputs: dict[str, bytes], asked: Demands) -> None:
    where = {name: tmp_path / name for name in ("raw", "images", "quarantine", "accepted.json", "report")}
    download(where["raw"], folder_params(write_tree(tmp_path / "in", inputs), licence="mine"))
    ingest(where["raw"], where["images"], where["quarantine"], ingest_params())
    limits = {"min_images": 1, "min_side": 8, "max_aspect_ratio": 2.0, "max_quarantined_fraction": 0.0}
    limits |= {"min_images_per_class": 0, "warn_only": ("near_duplicates", "near_leaks", "drift", "captions")}
    params = ValidateParams.model_validate(limits)
    validate(where["images"], where["quarantine"], where["accepted.json"], where["report"], params, asked)


@pytest.mark.parametrize("case", REFUSED)
def test_missing_data_is_refused_before_anything_is_trained(tmp_path, case):
    inputs, asked, says = REFUSED[case]
    with pytest.raises(StageError) as error:
        judge(tmp_path, inputs, demands(**asked))
    assert str(error.value).startswith(f"the data is not accepted: {says}"), error.value
    assert not (tmp_path / "accepted.json").exists()


def test_sufficient_data_is_accepted(tmp_path):
    judge(tmp_path, files(4, 3), demands(**{"codec.conditioning": "label", "train.batch_size": 8}))
    assert (tmp_path / "accepted.json").exists()


@pytest.mark.parametrize("resolution", [1, 4, 5, 8, 16, 24, 32, 48, 64, 256, 1000])
def test_the_width_of_the_features_is_that_of_the_network(resolution):
    from models.judges.classifier import Backbone

    assert Backbone(1, resolution).features == stage_widths(resolution)[-1]


def test_published_features_of_unknown_width_require_two_images():
    asked = demands(**{"judge.extractor.kind": "clip", "evaluate.allow_small_n": False})
    assert asked.images_for_distances == 2


def test_demands_are_taken_from_their_sections():
    params = Params.model_validate(compose("digits", []))
    asked = params.section(Demands)
    assert (asked.conditioning, asked.batch_size) == (params.codec.conditioning, params.train.batch_size)
    assert asked.images_for_distances == 128
