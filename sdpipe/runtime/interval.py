"""How far the error that was found on so many pictures may be from that on any number of them."""

import math
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)


def error_interval(num_wrong: int, num_images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an error, as fractions: good at few pictures, and at none wrong.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927. The base
    install has no SciPy.
    """
    share, weight = num_wrong / num_images, _Z**2 / num_images
    centre = share + weight / 2
    half = _Z * math.sqrt(share * (1 - share) / num_images + weight / (4 * num_images))
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return max(low, 0.0), min(high, 1.0)
