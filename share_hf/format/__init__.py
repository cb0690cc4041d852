"""Bytes on disk: the files of a subspace and of plain LoRA adapters, written whole and read with no trust."""
