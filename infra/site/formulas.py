"""Formulas as inline SVG, drawn while the site is built.

MathJax and KaTeX are not in the package index, and MathML needs a mathematical font, which phones and small Linux
installations lack. matplotlib, which the project needs anyway, brings the STIX fonts and a TeX-like layout engine. Its
outlines look the same everywhere, scale without blur and take the colour of the text. The TeX source is the text
alternative.
"""

from __future__ import annotations

import functools
import html
import re

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextToPath

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,;:)]*)', re.S)
"""A formula as `pymdownx.arithmatex` marks it (a span is part of a line, a div is displayed), and the punctuation after
it, which must not begin a line."""
EM = 100
"""Units of the outlines per em."""
SCALE = 1.18
"""Size of formulas relative to the text: the letters of STIX are smaller than those of sans-serif fonts."""
COMMANDS = {
    Outline.MOVETO: ("M", 1),
    Outline.LINETO: ("L", 1),
    Outline.CURVE3: ("Q", 2),
    Outline.CURVE4: ("C", 3),
    Outline.CLOSEPOLY: ("Z", 1),
}
"""Code of matplotlib -> SVG command and the number of points that it takes."""


def drawn(page: str) -> str:
    """Return the HTML `page` with every marked formula replaced by its SVG.

    Raises:
        ValueError: for a formula that matplotlib's mathtext does not support; the message contains it.
    """

    def replace(found: re.Match[str]) -> str:
        formula = svg(html.unescape(found[2]).strip(), displayed=found[1] == "div")
        return f'<span class="unbroken">{formula}{found[3]}</span>' if found[3] else formula

    return MARKED.sub(replace, page)


@functools.cache
def svg(tex: str, displayed: bool = False) -> str:
    """Return one formula as an HTML element that contains an SVG.

    Raises:
        ValueError: if mathtext does not support the formula.
    """
    layout, font = TextToPath(), FontProperties(size=EM, math_fontfamily="stix")
    source = f"${' '.join(tex.split())}$"
    if displayed:
        source = source.replace(r"\frac", r"\dfrac")
    try:
        width, height, descent = layout.get_text_width_height_descent(source, font, ismath=True)
        vertices, codes = layout.get_text_path(font, source, ismath=True)
    except ValueError as error:
        raise ValueError(f"matplotlib cannot draw the formula {tex!r}: {str(error).splitlines()[-1]}") from None
    em = SCALE / EM
    style = f"width:{width * em:.3f}em;height:{height * em:.3f}em;vertical-align:{-descent * em:.3f}em"
    box = f"0 {descent - height:.0f} {width:.0f} {height:.0f}"
    path = _outline(Outline(vertices, codes))
    picture = f'<svg viewBox="{box}" style="{style}" aria-hidden="true"><path d="{path}"/></svg>'
    tag, kind = ("div", "formula displayed") if displayed else ("span", "formula")
    return f'<{tag} class="{kind}" role="math" aria-label="{html.escape(tex)}">{picture}</{tag}>'


def _outline(outline: Outline) -> str:
    """Return the path data of an outline; SVG's y axis points down."""
    parts = []
    for points, code in outline.iter_segments(simplify=False, curves=True):
        command, count = COMMANDS[code]
        pairs = [f"{x:.0f} {-y:.0f}" for x, y in points.reshape(-1, 2)[:count]] if command != "Z" else []
        parts.append(command + " ".join(pairs))
    return "".join(parts)
