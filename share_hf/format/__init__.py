"""Files of a subspace and of plain LoRA adapters: written atomically, and checked as untrusted input when read."""
