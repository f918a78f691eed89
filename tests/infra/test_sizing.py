"""Bytes, hours and dollars of a data set, and the page that shows them."""

from __future__ import annotations

import pytest

from infra import sizing
from infra.sizing import Prices, Rates
from tasks.params import Params
from tasks.params.composition import compose
from tests.support.documents import ROOT


def lines(*overrides: str, images: int = 1_000_000, prices: Prices | None = None) -> dict[str, sizing.Line]:
    params = Params.model_validate(compose("laion_sd", list(overrides)))
    return {line.what: line for line in sizing.lines(params, images, 100_000, Rates(), prices or Prices())}


def test_the_bytes_are_those_of_the_tensors():
    found = lines()
    latents = next(line for what, line in found.items() if what.startswith("latents"))
    assert latents.terabytes * 1e12 == 1e6 * 2 * (2 * 2 * 4 * 64 * 64 * 2)  # kept twice; mean and std of two views
    assert found["captions as tokens"].terabytes * 1e12 == 1e6 * 77 * 4
    embedded = lines("encode.captions=embeddings")["captions as embeddings"]
    assert embedded.terabytes * 1e12 == 1e6 * 2 * 77 * 768 * 2
    assert lines("encode.captions=embeddings", images=100_000_000)["captions as embeddings"].terabytes == pytest.approx(
        23.65, abs=0.01
    )


def test_prices_and_images_scale_the_dollars():
    once, twice = lines(), lines(images=2_000_000)
    for what, line in once.items():
        assert twice[what].dollars == pytest.approx(2 * line.dollars)
    free = lines(prices=Prices(0, 0, 0, 0))
    assert not any(line.dollars for line in free.values())


def test_the_page_shows_the_table_of_the_command():
    params = Params.model_validate(compose("laion_sd", []))
    table = sizing.table(sizing.lines(params, 1_000_000, 100_000, Rates(), Prices()))
    assert table in (ROOT / "docs" / "howto" / "sizing.md").read_text(encoding="utf-8")
