"""How likely the model held a token: the logits of a step as they came, before anything of sampling touched them.

Not the distribution the token was drawn from: biases, penalties, grammar, temperature and the rest are what the caller
asked for and knows; what they cannot know is what the model thought.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llambo.mesh import limits
from llambo.mesh.tokens import LOWEST_LOGPROB, Logprob, TopToken
from llambo.worker.sampling import Logits


def logprob_of(logits: Logits, token: int, count: int, piece_of: Callable[[int], bytes]) -> Logprob:
    """For the token that was chosen, and the `count` likeliest; of equals, the lower id comes first."""
    highest = float(logits.max())
    # Summed in double precision: over a large vocabulary single precision loses the fourth digit.
    total = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))

    def bounded(logit: float) -> float:
        return min(0.0, max(LOWEST_LOGPROB, logit - total))

    count = min(count, len(logits))
    top: list[TopToken] = []
    if count:
        lowest = np.partition(logits, len(logits) - count)[len(logits) - count]
        # All that are as likely as the last of them: which of those partition picks is not defined.
        likeliest = np.flatnonzero(logits >= lowest)
        order = likeliest[np.argsort(-logits[likeliest], kind="stable")][:count]
        top = [
            TopToken(int(id), piece_of(int(id))[: limits.LOGPROB_PIECE_BYTES], bounded(float(logits[id])))
            for id in order
        ]
    return Logprob(bounded(float(logits[token])), top)
