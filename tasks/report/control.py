"""The table of a ControlNet: how well the samples follow their control maps, beside its references."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.report.page import Table

if TYPE_CHECKING:
    from tasks.runtime.measures import Measurements

AGREEMENT = {
    "canny": "F1 of the edges of the map and those of the sample (OpenCV's Canny), within 0.75 % of the diagonal",
    "colour": "1 minus the mean difference of the colours of the cells",
    "own": "F1 of the edges of the map and those of the sample (OpenCV's Canny), within 0.75 % of the diagonal",
}
"""Kind of the control maps -> what the agreement is."""
CAPTION = "Control maps of held-out images, and samples for their captions from the same seeds"


def tables(measured: Measurements) -> list[Table]:
    """Return the table of a model with a ControlNet; empty for other models."""
    control = measured.control
    if control is None:
        return []
    text = (
        f"{AGREEMENT[control.kind]}; 1 is best. Every row is compared with the maps of {control.n} held-out images, "
        f"for whose captions the samples are drawn, over {measured.seed_blocks} seed blocks. A model that ignored the "
        "maps would have the same value in the first three rows. The other numbers of this report are those of samples "
        "without a map, which are those of the U-Net alone."
    )
    rows = [
        ["with the map of the image", f"{control.value:.3f} ± {control.spread:.2g}"],
        ["with the map of another image", f"{control.shuffled:.3f}"],
        ["without a map (U-Net alone)", f"{control.base:.3f}"],
        ["the images themselves, after the codec", f"{control.real:.3f}"],
    ]
    return [Table("Agreement with control maps", text, ["Samples", "Agreement"], rows)]
