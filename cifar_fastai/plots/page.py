"""A page laid out in inches: what the pictures share in colours, sizes and measured text.

matplotlib finds out how wide a text is when it draws; here it is asked before, so that names can be broken into lines
and figures made large enough. Names are shown letter by letter: `$` and `_` are no mathematics.
"""

import base64
import io
import re
from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

__all__ = ["Page", "Picture", "percent", "span", "text_height", "text_width", "wrap"]

# Okabe and Ito's colours, which colour-blind readers tell apart (vermilion darkened, to be read as text)
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#C04B00", "#009E73", "#CC79A7", "#E69F00"
GREY = "#555555"
SMALL, NORMAL, LARGE = 8.5, 10, 12  # points
WIDTH, DPI = 8.4, 140  # inches, dots per inch: 1,176 pixels, what a README shows and some to spare
MARGIN, GAP = 0.15, 0.08  # inches: around a page, between two images


class Picture(Figure):
    """A Figure that a notebook shows, once, without `%matplotlib inline` and without pyplot, which it never meets.

    It shows itself: the formatter that `inline` registers for every Figure would draw it coarser, and would leave out
    one without axes.
    """

    def _ipython_display_(self):
        from IPython.display import display

        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        width, height = self.get_size_inches() * 100  # drawn with more pixels than it takes on the screen
        shown = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": repr(self)}
        display(shown, raw=True, metadata={"image/png": {"width": round(width), "height": round(height)}})


class Page:
    """A figure whose parts are placed by inches from its top left corner."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.figure = Picture(figsize=(width, height))

    def text(self, x, y, text, size=NORMAL, va="top", **style):
        """Write `text` with its top left corner at (x, y)."""
        style = {"color": "black", "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, va=va, **style)

    def image(self, x, y, size, *layers, height=None):
        """Draw images over each other, each given as (pixels, how), in a square whose top left corner is at (x, y)."""
        height = height or size
        box = x / self.width, 1 - (y + height) / self.height, size / self.width, height / self.height
        ax = self.figure.add_axes(box, xticks=[], yticks=[])
        for pixels, how in layers:
            ax.imshow(pixels, **{"interpolation": "nearest", "aspect": "auto", "extent": (0, 1, 0, 1)} | how)
        for spine in ax.spines.values():
            spine.set(color="#BBBBBB", linewidth=0.6)
        return ax


def span(n, size):
    """Inches that `n` images of this size take, gaps included."""
    return n * (size + GAP) - GAP


def percent(fraction):
    return f"{100 * fraction:.1f} %"


@lru_cache(maxsize=4096)
def text_width(text, size):
    """Inches that `text`, one line, takes at `size` points; a little more, since drawing rounds to pixels."""
    return 1.03 * text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def text_height(lines, size):
    """Inches that so many lines take at `size` points."""
    return (1.21 * lines + 0.24) * size / 72


def wrap(text, width, size):
    """`text` in lines of at most `width` inches: broken at spaces (not before %), after - _ /, at need anywhere."""
    if "\n" in text:
        return "\n".join(wrap(line, width, size) for line in text.split("\n"))
    lines, line = [], ""
    for word in re.split(r"(?<=[\s_/-])(?!%)", text):
        if line and text_width((line + word).rstrip(), size) > width:
            lines.append(line)
            line = ""
        while len(word) > 1 and text_width(word.rstrip(), size) > width:
            fits = [n for n in range(1, len(word)) if text_width(word[:n], size) <= width]
            cut = max(fits, default=1)
            lines.append(word[:cut])
            word = word[cut:]
        line += word
    return "\n".join(part.strip() for part in (*lines, line))
