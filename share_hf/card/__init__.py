"""What a person reads of a subspace: its model card and its figures."""

from .card import CardOptions, audit_of, audit_sentences, write_card
from .tree import write_tree


__all__ = ["CardOptions", "audit_of", "audit_sentences", "write_card", "write_tree"]
