"""What all pictures share: colours, sizes, text in lines, and a Figure that shows itself in a notebook.

No figure passes through pyplot: a notebook that returns one shows it once, and nothing has to be closed.
"""

import base64
import io
import textwrap
from functools import lru_cache
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.textpath import text_to_path

from cifar_fastai.files import atomic_write

# the palette of Okabe and Ito, safe for colour-blind readers (vermilion darkened for text); report.css has the same
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#C04B00", "#009E73", "#CC79A7", "#E69F00"
GREY = "#555555"
SMALL, NORMAL, LARGE = 8.5, 10, 12  # points
WIDTH, DPI = 8.4, 140  # inches, dots per inch: 1,176 pixels
# matplotlib's own font, then what is installed of those with letters that it lacks: Chinese, Japanese, Korean, Thai
FONTS = "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Thai", "Arial Unicode MS"
STYLE = {  # settings of matplotlib for every picture
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,  # inches
    "figure.constrained_layout.w_pad": 0.08,
    "font.family": [name for name in FONTS if name in fontManager.get_font_names()],
    "grid.alpha": 0.3,
    "grid.color": "#888888",
    "image.interpolation": "nearest",
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.title_fontsize": SMALL,
    "text.parse_math": False,  # class names may hold `$` and `_`
}


class Picture(Figure):
    """A Figure that a notebook shows once, with and without `%matplotlib inline`.

    The formatter that `inline` registers for every Figure would draw it coarser and skip a figure without axes.
    """

    def _ipython_display_(self):
        from IPython.display import display

        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        width, height = self.get_size_inches() * 100  # more pixels in the file than on the screen
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": repr(self)}
        display(data, raw=True, metadata={"image/png": {"width": round(width), "height": round(height)}})


def save_figure(fig, path):
    """Write `fig` to `path` in the format of its suffix (.png, .svg, ...), atomically."""
    with atomic_write(path, "wb") as file:
        fig.savefig(file, format=Path(path).suffix[1:] or "png", dpi=DPI)


def check_lengths(arrays, at_least=0):
    """Raise ValueError unless the arrays {name: array or None} have the same length."""
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1 or min(lengths.values(), default=0) < at_least:
        raise ValueError(f"equal lengths of at least {at_least} are needed: {lengths}")


def number(value, form=".3g"):
    """A number with a true minus sign: "4e−07"."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def percent(fraction):
    """A fraction as "93.1 %", with a space at which no line breaks."""
    return f"{100 * fraction:.1f}\N{NO-BREAK SPACE}%"


@lru_cache(maxsize=4096)
def text_width(text, size):
    """Inches that one line of text takes at `size` points, rounded up a little."""
    return 1.04 * text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def wrap(text, width, size=SMALL):
    """`text` in lines of at most `width` inches at `size` points; a word that is longer is broken."""
    lines = [text]
    for columns in range(len(text), 0, -1):
        lines = textwrap.wrap(text, columns)
        if all(text_width(line, size) <= width for line in lines):
            break
    return "\n".join(lines)
