"""Algorithms of dscq: tensors in, tensors out. Nothing here opens a model file."""
