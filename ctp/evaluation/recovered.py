"""How much of what compression costs a prompt wins back."""

import math

LOST = 1.05  # times the dense perplexity: below it there is too little to win back for a share to mean something


def won_back(dense: float | None, compressed: float | None, prompted: float) -> float | None:
    """Percent of the lost log-likelihood that comes back, from three perplexities of one text.

    100 is as good as the dense model, negative is worse than without a prompt. None where next to nothing was lost, or
    a perplexity is not known.
    """
    if not dense or not compressed or compressed < LOST * dense:
        return None
    return 100 * (math.log(compressed) - math.log(prompted)) / math.log(compressed / dense)
