"""The colours of a report's lines, as readers see them who lack one of the three kinds of cones."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sdpipe.colours import COLOURS, compared_colours

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# IEEE TVCG 15(6), 2009: severity 1.0, on linear RGB.
SEEN = {
    "all": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Linear RGB to X, Y and Z as fractions of white's (sRGB, D65).
XYZ = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8729]])


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b*: distances of about 2 are just seen where two areas touch."""
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(seen @ linear, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", list(SEEN))
def test_no_two_lines_look_alike_whatever_colours_a_reader_sees(seen: str) -> None:
    """Orange and brown were one colour without red, a distance of 2, and blue and purple of 3."""
    matrix = np.array(SEEN[seen])
    distances = {
        (one, other): float(np.linalg.norm(lab(one, matrix) - lab(other, matrix)))
        for one, other in combinations(COLOURS, 2)
    }
    assert min(distances.values()) > 20, min(distances, key=lambda pair: distances[pair])


@pytest.mark.parametrize("count", [1, 5, 6, 16])
def test_every_line_has_a_colour_of_its_own(count: int) -> None:
    """figure8-left has 16 stochastic trainings in one figure of ensembles."""
    assert len({*compared_colours(count), COLOURS[0]}) == count + 1
