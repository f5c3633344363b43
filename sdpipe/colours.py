"""The colours of trainings: constant depth always has the same, and no two of a figure are alike."""

import matplotlib as mpl
import numpy as np

COLOURS = ("#1f5fa8", "#d1541e", "#009e73", "#e09abf", "#000000", "#6b1f4a")
"""Blue, orange, green, pink, black and plum: also readers who see no red, green or blue tell them apart."""
CONSTANT_COLOUR = COLOURS[0]
_SHADES = "turbo"  # where there are more lines than colours


def compared_colours(count: int) -> list[str]:
    """Unlike constant depth's and one another."""
    if count < len(COLOURS):
        return list(COLOURS[1 : 1 + count])
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps[_SHADES](np.linspace(0.28, 0.97, count))]
