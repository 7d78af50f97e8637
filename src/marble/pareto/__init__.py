"""Trade-offs: fronts of any rewards through runs, checkpoints, strengths of LoRA and mixtures of specialists."""

from marble.pareto.making import draw_front

__all__ = ["draw_front"]
