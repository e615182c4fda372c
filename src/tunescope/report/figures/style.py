"""How every figure looks: sizes, type, colours and hatches. Nothing else sets them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

COLUMN_WIDTH_IN, PAGE_WIDTH_IN = 3.4, 7.0
TEXT_PT, SMALL_PT = 7.0, 6.0
# Not pure black and grey: a page swaps these three for its own colours, so that figures follow dark mode.
INK, SOFT, RULE = "#1b1b1f", "#5a5a62", "#d4d4da"
PAPER_FILL = "#b4b4bc"
PAPER = "paper"  # series whose names begin so are the paper's, and look alike in every figure
# Okabe and Ito, "Color Universal Design" (2008): told apart under all common kinds of colour blindness. Its yellow,
# too light for a line on white, comes last.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
# Lines only: a hatch of dots or rings is a hundred kilobytes of SVG.
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))

RC_PARAMS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": TEXT_PT,
    "axes.titlesize": TEXT_PT,
    "axes.labelsize": TEXT_PT,
    "xtick.labelsize": SMALL_PT,
    "ytick.labelsize": SMALL_PT,
    "legend.fontsize": SMALL_PT,
    "text.color": INK,
    "text.parse_math": False,  # names come from files, and may hold a dollar
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.4,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: found, selected, read aloud
    "pdf.fonttype": 42,
}


class Look(NamedTuple):
    """Of one series; hatch, marker and dash tell it apart where colour does not."""

    color: str
    hatch: str
    marker: str
    dash: Any


def looks(series: list[str]) -> dict[str, Look]:
    """Series -> its look, in the order given. The paper's do not take a colour from the others."""
    found: dict[str, Look] = {}
    own = papers = 0
    for name in series:
        if name.startswith(PAPER):
            place = papers % len(MARKERS)
            found[name] = Look(PAPER_FILL, "////" if not papers else HATCHES[place + 1], MARKERS[place], DASHES[place])
            papers += 1
        else:
            place = own % len(OKABE_ITO)
            found[name] = Look(OKABE_ITO[place], HATCHES[place], MARKERS[place], DASHES[place])
            own += 1
    return found


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with this style, the caller's own restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(RC_PARAMS):
        yield
