"""Figures: matplotlib in one style, for files, and for pages whose colours follow their theme.

A page's figure is SVG whose text is text and whose colours are the variables of the page's style sheet, so that it is
light or dark with the page. A file has the colours themselves.
"""

from __future__ import annotations

import html
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepcache.files import replacing

SERIES = (
    "#0b62c4",
    "#d1495b",
    "#2a9d5c",
    "#b07d00",
    "#7a4fc1",
    "#00818a",
    "#c2571a",
    "#9b2f7f",
    "#5c7a1f",
    "#8a5a44",
)
"""Colours of methods, in a light theme; --c0 to --c9 of a page."""


MARKS = "osD^vPX<>d*p"
"""In an order in which those of one colour do not look alike."""


DASHES = ((), (4, 1.5), (1, 1), (4, 1, 1, 1), (8, 1.5), (4, 1, 1, 1, 1, 1))
"""Lengths of dashes and gaps, in widths of the line; none is solid."""


INK, GREY, LINE, CARD = "#1d1f23", "#5f656e", "#dfe1e5", "#ffffff"


VARIABLES = {INK: "--ink", GREY: "--grey", LINE: "--line", CARD: "--card"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES)
}
"""Colour -> variable of a page's style sheet."""


WIDTH = 400
"""Width of a figure in points. A phone shows it 300 pixels wide, so that text of `TEXT` points is 10 pixels there."""


TEXT = 14


STYLE = {
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.borderaxespad": 0.2,
    "text.color": INK,
    "text.parse_math": False,  # a method's name is never a formula
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 2.0,
    "lines.markersize": 8.0,
    "lines.markeredgewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stepcache",  # the same figure gives the same file
}


@contextmanager
def drawing() -> Iterator[Any]:
    """A context in which figures have this style; yields matplotlib's class of figures.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'stepcache[report]'.") from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts have what ours lack
        yield Figure


def colour(number: int) -> str:
    """The colour of the number-th method."""
    return SERIES[number % len(SERIES)]


def line_style(number: int, setting: int = 0) -> dict[str, Any]:
    """The line of a method: colour, mark and dashes, as matplotlib's settings.

    Methods share no pair of colour and mark (up to 60 of them), a method's settings no dashes (up to 6); methods that
    share a colour begin with other dashes.
    """
    dashes = DASHES[(number // len(SERIES) + setting) % len(DASHES)]
    return {
        "color": colour(number),
        "marker": MARKS[number % len(MARKS)],
        "markeredgecolor": CARD,
        "linestyle": (0, dashes) if dashes else "-",
    }


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as its name says (.svg, .png), whole or not at all; call it within `drawing`."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=160, facecolor=CARD, metadata=_no_date(path))


def _no_date(path: str | os.PathLike[str]) -> dict[str, None] | None:
    return {"Date": None} if Path(path).suffix == ".svg" else None


class Tips:
    """What parts of a figure say when pointed at."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, artist: Any, text: str) -> None:
        """Let an artist of matplotlib say `text`."""
        name = f"tip-{len(self.texts)}"
        artist.set_gid(name)
        self.texts[name] = text


def as_svg(figure: Any, name: str, label: str, tips: Tips, kind: str = "chart") -> str:
    """A figure as an element of a page; call it within `drawing`.

    Args:
        figure: matplotlib's.
        name: a word, unique in the page, before all ids.
        label: what a screen reader says.
        tips: what its parts say.
        kind: its class in the style sheet.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace("*{", f"#{name} *{{")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for tip, said in tips.texts.items():
        text = text.replace(f'<g id="{name}-{tip}">', f"<g><title>{html.escape(said)}</title>", 1)
    for value, variable in VARIABLES.items():
        text = text.replace(value, f"var({variable})")
    head = f'<svg id="{name}" class="{kind}" role="img" aria-label="{html.escape(label)}"'
    text = re.sub(r'<svg((?:\s+[\w:]+="[^"]*")*)', lambda found: head + _sizeless(found[1]), text, count=1)
    return re.sub(r"\n\s*", "\n", text)


def _sizeless(attributes: str) -> str:
    """Without width and height, which the page gives."""
    return re.sub(r'\s+(?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", attributes)
