"""Before any training: how the rewards disagree on a model, as scores and as gradients.

Scores and gradients are gathered (`gather`), told from noise across batches (`across`), described (`scores`,
`directions`), judged by rules (`advice`, `regimes`) and shown (`page`).
"""

from marble.conflict.measure import check_conflict, measure_conflict

__all__ = ["check_conflict", "measure_conflict"]
