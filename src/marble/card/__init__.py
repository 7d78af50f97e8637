"""What a published LoRA comes with: its model card, and the folder that is pushed to the hub."""

from marble.card.bundle import write_bundle
from marble.card.page import write_card

__all__ = ["write_bundle", "write_card"]
