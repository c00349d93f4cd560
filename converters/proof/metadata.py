"""The file's figures and vocabulary against the checkpoint's, field by field.

Equal fields are one passed check; every field that differs is a failed check of its own name.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from converters.proof.record import Check
from converters.vocabulary import Vocabulary
from quantize.llama import LlamaConfig

# llama.cpp gives a BPE vocabulary ids of its own where the file states none, so "no such token" is not a
# thing that a GGUF can say of these two.
_ALWAYS_SET = ("bos_id", "eos_id")


def compare_config(found: LlamaConfig, expected: LlamaConfig) -> list[Check]:
    """Compare every figure of the architecture; floats as the f32 that a file stores."""
    names = [field.name for field in fields(LlamaConfig)]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    wrong = [
        Check("metadata", name, False, detail=f"the file says {got}, the checkpoint {want}")
        for name, got, want in pairs
        if np.float32(got) != np.float32(want)
    ]
    return wrong or [Check("metadata", "architecture", True, detail=f"{len(names)} figures equal")]


def compare_vocabulary(found: Vocabulary, expected: Vocabulary) -> list[Check]:
    """Compare every field of the vocabulary; of a list that differs the first difference is named."""
    wrong = []
    names = [field.name for field in fields(Vocabulary)]
    for name in names:
        got, want = getattr(found, name), getattr(expected, name)
        if got == want or (name in _ALWAYS_SET and want is None):
            continue
        listed = isinstance(want, tuple)
        detail = first_difference(got, want) if listed else f"the file says {got!r}, the checkpoint {want!r}"
        wrong.append(Check("metadata", name, False, detail=detail))
    return wrong or [Check("metadata", "vocabulary", True, detail=f"{len(expected.tokens)} tokens equal")]


def first_difference(got: Sequence[object], want: Sequence[object]) -> str:
    """Say where two sequences that are not equal first differ, and in how many places."""
    lengths = f", {len(got)} entries instead of {len(want)}" if len(got) != len(want) else ""
    differing = [i for i, (left, right) in enumerate(zip(got, want, strict=False)) if left != right]
    if not differing:
        return f"equal up to {min(len(got), len(want))}{lengths}"
    first = differing[0]
    return f"{len(differing)} differ, first at {first}: {got[first]!r} instead of {want[first]!r}{lengths}"
