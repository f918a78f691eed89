"""Where the network looks: attention maps over the image, by layer and by token of the prompt.

The maps are taken at states x_t of the trajectory that the report shows anyway, so that they cost one evaluation of the
network for each timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps

from models.attention_maps import AttentionMap, Recorder, recording
from models.images.pictures import shrunk
from models.networks.precision import predictor
from tasks.report.page import Figure, Tiles
from tasks.report.process import snr_note, spread

if TYPE_CHECKING:
    from models.networks.text_encoder import TextEncoder
    from models.pipeline import Pipeline
    from tasks.report.process import Drawn

TIMESTEPS = 6
"""Timesteps of the pictures of self-attention; those by token are at every second of them."""
TOKENS = 12
LAYERS = 7
"""Rows of the picture of self-attention, at most."""
LARGEST_SIDE = 128
LEAST_SIDE = 32
"""Pixels of a tile; smaller images are enlarged by a whole factor, so that the mark has a line of its own."""
SELF_OCTAVES, CROSS_OCTAVES = 3, 1
"""The colours cover weights from 2^-n to 2^n times the mean."""
BLEND = 0.7
"""Share of the colour of the weight in a pixel; the rest is the image's brightness."""
MARK = 255
PLACES = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}
SELF_TEXT = (
    "Each row is a place in the network, with the grid of its positions; layers and heads of a place are averaged. The "
    "map shows to which positions the marked one, at the centre, attends. Above: the clean image that the network "
    "predicts at that timestep."
)
CROSS_TEXT = (
    "The maps show how much each position of the image attends to each token, averaged over all layers and heads (Tang "
    "et al. 2023). Below the token: its mean share of the attention; the padding has the rest."
)
SCALE_TEXT = (
    "Colours show the weight relative to its mean over the image, on a logarithmic scale: {low} or less is dark blue, "
    "the mean green, and {high} or more yellow. The brightness is that of the image."
)
SELF_SCALE = SCALE_TEXT.format(low="an eighth", high="eight times as much")
CROSS_SCALE = SCALE_TEXT.format(low="a half", high="twice as much")


def figures(model: Pipeline, drawn: Drawn) -> dict[str, Figure]:
    """Return the pictures `attention_self` and `attention_cross`, of the sample in the middle column.

    A model without such layers gets a sentence in place of the picture.
    """
    column = len(drawn.names) // 2
    steps = spread(len(drawn.trajectory.times), TIMESTEPS)
    recorded = [_recorded(model, drawn, step, column) for step in steps]
    images = [drawn.trajectory.predicted[step][column] for step in steps]
    times = [drawn.trajectory.times[step] for step in steps]
    return {
        "attention_self": _self_attention(model, recorded, images, times, drawn.names[column]),
        "attention_cross": _cross_attention(model, recorded[::2], images[::2], times[::2], drawn, column),
    }


def _recorded(model: Pipeline, drawn: Drawn, step: int, column: int) -> Recorder:
    """Evaluate the network once, without guidance, at the state of one sample before `step`."""
    trajectory = drawn.trajectory
    condition, _ = model.condition([drawn.labels[column]] if drawn.labels is not None else None)
    state = trajectory.states[step][column : column + 1].to(model.device)
    with torch.inference_mode(), recording(model.network) as recorder:
        predictor(model.network, None, None, model.precision)(state, trajectory.times[step], condition)
    return recorder


def _self_attention(
    model: Pipeline, recorded: Sequence[Recorder], images: Sequence[np.ndarray], times: Sequence[float], name: str
) -> Figure:
    title = "Self-attention of the centre"
    groups = [grouped(each.self_attention()) for each in recorded]
    if not groups[0]:
        return Figure(title, ["The network has no layer in which positions of the image attend to each other."])
    text = [SELF_TEXT, SELF_SCALE]
    rows = [np.stack([_enlarged(image) for image in images])]
    rows += [
        np.stack(
            [_overlaid(image, each[key], SELF_OCTAVES, marked=True) for image, each in zip(images, groups, strict=True)]
        )
        for key in groups[0]
    ]
    tiles = Tiles(np.stack(rows), ["predicted", *groups[0]], *_columns(model, times))
    subject = f"a sample of {name}" if name else "a sample"
    return Figure(title, text, tiles=tiles, label=f"Self-attention of the centre of {subject}, by layer and timestep")


def _columns(model: Pipeline, times: Sequence[float]) -> tuple[list[str], list[str]]:
    """Return the title and the note of each timestep."""
    return [f"t = {t:.0f}" for t in times], [snr_note(model.path.level(t)) for t in times]


def grouped(maps: Sequence[AttentionMap]) -> dict[str, np.ndarray]:
    """Average maps of one image over the layers of a place, float64 [rows, columns] each, by the name of the place.

    The places of a U-Net are its resolutions on the way down, in the middle and on the way up; those of a transformer
    are its first, middle and last block.
    """
    placed: dict[str, list[AttentionMap]] = {}
    for each in maps:
        rows, columns = each.grid
        parts = each.layer.split(".")
        place = PLACES.get(parts[0], f"block {int(parts[1]) + 1}" if len(parts) > 1 and parts[1].isdigit() else "")
        name = f"{rows} x {columns}, {place}" if parts[0] in PLACES else place or each.layer
        placed.setdefault(name, []).append(each)
    names = list(placed)
    transformer = not any(each.layer.split(".")[0] in PLACES for each in maps)
    chosen = [names[i] for i in spread(len(names), 3 if transformer else LAYERS)] if names else []
    return {
        name: np.mean([each.weights[0].double().numpy().reshape(each.grid) for each in placed[name]], axis=0)
        for name in chosen
    }


def _cross_attention(
    model: Pipeline,
    recorded: Sequence[Recorder],
    images: Sequence[np.ndarray],
    times: Sequence[float],
    drawn: Drawn,
    column: int,
) -> Figure:
    title = "Cross-attention by token"
    if model.text is None or drawn.labels is None:
        return Figure(title, ["This model takes no prompts, so there are no tokens to attend to."])
    maps = [by_token(each.cross_attention()) for each in recorded]
    if maps[0] is None:
        return Figure(title, ["The network has no layer in which the image attends to the tokens of the prompt."])
    label = drawn.labels[column]
    prompt = (model.info.prompts or model.info.classes)[label]
    words = tokens(model.text.towers[0], prompt)[:TOKENS]
    rows, shares = [], []
    for image, found in zip(images, maps, strict=True):
        assert found is not None, "every evaluation runs the same layers"
        rows.append(
            np.stack([_overlaid(image, found[:, :, token], CROSS_OCTAVES, marked=False) for token in range(len(words))])
        )
        shares.append([found[:, :, token].mean() for token in range(len(words))])
    notes = [f"{100 * share:.0f} %" for share in np.mean(shares, axis=0)]
    titles = [f"t = {t:.0f}" for t in times]
    text = [f"The prompt “{prompt}”. {CROSS_TEXT}", CROSS_SCALE]
    label_text = "Cross-attention of a sample to the tokens of its prompt, by timestep"
    return Figure(title, text, tiles=Tiles(np.stack(rows), titles, words, notes), label=label_text)


def by_token(maps: Sequence[AttentionMap]) -> np.ndarray | None:
    """Average maps of one image over the layers at the largest grid, float64 [rows, columns, M]; None without maps."""
    if not maps:
        return None
    rows, columns = max((each.grid for each in maps), key=lambda grid: grid[0] * grid[1])
    resized = []
    for each in maps:
        weights = each.weights[0].double().numpy().reshape(*each.grid, -1)
        down, across = (np.arange(n) * own // n for n, own in zip((rows, columns), each.grid, strict=True))
        resized.append(weights[down][:, across])
    return np.asarray(np.mean(resized, axis=0))


def tokens(encoder: TextEncoder, prompt: str) -> list[str]:
    """Return the tokens of a prompt as words, with its start and end, and without the padding."""
    ids = encoder.token_ids([prompt])[0].tolist()
    tokenizer = encoder.tokenizer
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids) - 1
    words = [str(word).removesuffix("</w>") for word in tokenizer.convert_ids_to_tokens(ids[: end + 1])]
    special = {tokenizer.bos_token: "start", tokenizer.eos_token: "end"}
    return [special.get(word, word) for word in words]


def _enlarged(image: np.ndarray) -> np.ndarray:
    """uint8 [C, H, W] -> uint8 [3, H', W'], by whole factors between `LEAST_SIDE` and `LARGEST_SIDE`."""
    small = shrunk(image, LARGEST_SIDE)
    factor = max(1, LEAST_SIDE // small.shape[-1])
    colours = np.repeat(small, 3, axis=0) if len(small) == 1 else small
    return colours.repeat(factor, axis=1).repeat(factor, axis=2)


def _overlaid(image: np.ndarray, weights: np.ndarray, octaves: int, marked: bool) -> np.ndarray:
    """Lay weights [rows, columns] over an image uint8 [C, H, W]; `marked` outlines the position at the centre."""
    large = _enlarged(image)
    cells = [np.arange(n) * own // n for n, own in zip(large.shape[1:], weights.shape, strict=True)]
    relative = np.log2(np.maximum(weights / max(float(weights.mean()), 1e-12), 2.0**-octaves))
    share = np.clip((relative / octaves + 1) / 2, 0, 1)[cells[0]][:, cells[1]]
    colours = colormaps["viridis"](share)[..., :3].transpose(2, 0, 1) * 255
    mixed = np.round(BLEND * colours + (1 - BLEND) * large.mean(axis=0, keepdims=True)).astype(np.uint8)
    down, across = (index == own // 2 for index, own in zip(cells, weights.shape, strict=True))
    if marked and down.any() and across.any():
        cell = np.outer(down, across)
        inner = cell.copy()
        inner[1:-1, 1:-1] &= cell[:-2, 1:-1] & cell[2:, 1:-1] & cell[1:-1, :-2] & cell[1:-1, 2:]
        mixed[:, cell & ~inner] = MARK
    return mixed
