"""The training objective: weights of the losses at each draft position.

Does not know how the losses are computed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, and the weight of each draft position relative to the previous one (`decay`).

    - `cross_entropy`: cross-entropy of the next token in the data (the released script).
    - `kl`: Kullback-Leibler divergence of the drafter from the target's distribution (arXiv 2310.08461, section 3).
    - `total_variation`: total variation distance between these distributions (same section).
    - `coupled`: cross-entropy of the token that the target samples with Gumbel noise, under the drafter's logits with
      the same noise.  This is how drafts are ranked when sampling.
    - `features`: smooth L1 distance from the target's features, averaged over their elements, for heads that predict
      features (arXiv 2401.15077, section 4.2).
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    total_variation: float = 0.0
    coupled: float = 0.0
    decay: float = 1.0
    features: float = 0.0

    @property
    def of_distribution(self) -> bool:
        """Whether the target's logits are needed."""
        return bool(self.kl or self.total_variation or self.coupled)

    def describe_loss(self, loss: float, length: int) -> str:
        """A loss summed over `length` draft positions, per drafted token and in total.

        Cross-entropies and divergences are in nats; with other losses the sum has no unit.
        """
        each = loss / sum(self.decay**depth for depth in range(length))
        if self.total_variation or self.features:
            return f"{each:.3f} per drafted token (weighted sum of losses; {loss:.3f} over {length} draft positions)"
        return f"{each:.3f} nats per drafted token ({loss:.3f} over {length} draft positions)"


TOKENS = Objective()
"""The objective of the released script: cross-entropy only."""

FEATURE_WEIGHT = 0.1
"""Default weight of `features` for heads that predict features."""
