"""What a page must be in a real browser: complete, quiet, offline, legible in width and colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra import browser

UNLOADED = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What a reader would have to scroll sideways for, or never sees; one pixel is rounding.
CLIPPED = """[...document.querySelectorAll('main *, header *, footer *')]
  .filter(e => !e.closest('.unseen') && !(e instanceof SVGElement))
  .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== 'inline'
    || e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => `${e.tagName} ${e.className} ${e.getAttribute('aria-label') || e.textContent.trim().slice(0, 40)}`)"""
# WCAG 2: relative luminance of every element's text against the first opaque background behind it.
FAINT = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = element => {
    for (; element; element = element.parentElement) {
      const [r, g, b, alpha = 1] = channels(getComputedStyle(element).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  return [...document.body.querySelectorAll('*')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .filter(e => {
      const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(background(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05) < 4.5;
    }).map(e => e.textContent.trim());
})()"""


def check(page: browser.Page, address: str, theme: str, width: int) -> None:
    """Open the page in "light" or "dark" at a width in pixels, and fail on anything that a reader would miss."""
    page.theme(theme)
    page.size(width, 900)
    page.visit(address)
    assert page.evaluate(UNLOADED) == []
    assert page.errors == []
    assert page.requests == [address]
    assert page.evaluate(OVERFLOW) <= 0, "the page scrolls sideways"
    assert page.evaluate(CLIPPED) == [], "something is cut off or must be scrolled sideways"
    assert page.evaluate(FAINT) == [], "text is too faint to read"
