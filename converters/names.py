"""Tensor names and the order of rows: Hugging Face's, and GGUF's.

Rotary embedding turns pairs of a head's rows. Hugging Face's Llama pairs row i with row i + D/2 ("rotate
half"), llama.cpp pairs row 2i with row 2i + 1; so the rows of q and k change places on the way, head by
head. With D rows per head:

    gguf[h * D + 2 * i + j] = hf[h * D + j * D / 2 + i]        0 <= i < D / 2,  j in {0, 1}

A head of k is a key/value head, of which there are fewer than query heads in grouped-query attention and
one in multi-query attention; since D is the same for both, D alone is needed here.
"""

import re

import torch

from quantize.llama import EMBEDDING, FINAL_NORM, HEAD, block_tensor

_TOP = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_BACK = {gguf: hf for hf, gguf in _TOP.items()}
_BLOCK_BACK = {gguf: hf for hf, gguf in _BLOCK.items()}
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def gguf_name(name: str) -> str:
    """Return GGUF's name of a checkpoint's tensor; KeyError for a name that no Llama has."""
    block = _HF_BLOCK.fullmatch(name)
    return f"blk.{block[1]}.{_BLOCK[block[2]]}.weight" if block else _TOP[name]


def hf_name(name: str) -> str:
    """Return the checkpoint's name of a GGUF's tensor; KeyError for a name that no Llama has."""
    block = _GGUF_BLOCK.fullmatch(name)
    return block_tensor(int(block[1]), _BLOCK_BACK[block[2]]) if block else _TOP_BACK[name]


def is_rotary(name: str) -> bool:
    """Return whether a checkpoint's tensor is a q or k projection, whose rows change places."""
    return name.endswith((".self_attn.q_proj.weight", ".self_attn.k_proj.weight"))


def permute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return whole heads (n * head_dim, K), of any dtype, in GGUF's order of rows."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])  # (n, j, i, K)
    return heads.transpose(1, 2).reshape(rows.shape)


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return whole heads (n * head_dim, K), of any dtype, in the checkpoint's order of rows."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])  # (n, i, j, K)
    return heads.transpose(1, 2).reshape(rows.shape)
