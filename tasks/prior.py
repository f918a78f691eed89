"""Stage `prior`: pictures of a subject and base weights -> class images and inputs for DreamBooth."""

from __future__ import annotations

from pathlib import Path

from tasks.formats.codec_info import CodecInfo
from tasks.formats.prior import FILE, Prior
from tasks.formats.verdict import require_accepted
from tasks.params import BaseWeights, PriorParams
from tasks.runtime import atomic, stage


def prior(images: Path, accepted: Path, codec: Path, outputs: Path, params: PriorParams, base: BaseWeights) -> None:
    """Draw the class images that preserve the prior of DreamBooth (Ruiz et al. 2023, section 3.2) from the base.

    Writes the subject's pictures and the class images as inputs of the training. Drawn images are kept in the scratch
    folder by what they depend on: a killed run continues, and more images only add to those that are known. Without
    `prior.instance_prompt` there is nothing to do.
    """
    require_accepted(accepted)
    info = CodecInfo.load(codec)
    if params.instance_prompt is None:
        with atomic.writing_folder(outputs) as folder:
            Prior().write(folder / FILE)
        print("prior: nothing to draw without prior.instance_prompt")
        return

    from models.device import best_device
    from tasks.priors import bases, prompts, subject
    from tasks.priors import outputs as prior_outputs
    from tasks.priors.drawing import Drawing
    from tasks.runtime import arithmetic

    arithmetic.check_precision("prior.precision", params.precision, device := best_device())
    pictures = subject.read_pictures(images, params.subject, info)
    pipeline, identity = bases.load(codec, info, base, device)
    prompts.check(pipeline.text, params)
    drawing = Drawing(pipeline, identity, params)
    before = drawing.images(params.instance_prompt, params.measured)
    classes = drawing.images(params.class_prompt, params.images) if params.class_prompt else before[:0]
    with atomic.writing_folder(outputs) as folder:
        prior_outputs.write(folder, pictures, classes, before, codec, info, params)
    print(f"prior: {len(pictures)} pictures of the subject, {len(classes)} class images of {params.class_prompt!r}")


if __name__ == "__main__":
    stage.main(prior)
