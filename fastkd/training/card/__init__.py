"""The README.md of a student: a model card, made of what its run's folder and summary say."""

from fastkd.training.card.card import CARD_TAG, write_card

__all__ = ["CARD_TAG", "write_card"]
