"""Presentation of a subspace for people: its model card and its figures."""

from .card import MAX_CARD_BYTES, CardOptions, audit_of, audit_sentences, read_card, write_card
from .tree import write_tree


__all__ = [
    "MAX_CARD_BYTES",
    "CardOptions",
    "audit_of",
    "audit_sentences",
    "read_card",
    "write_card",
    "write_tree",
]
