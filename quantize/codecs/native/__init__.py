"""The searches of the quant types on the CPU, compiled on first use by Numba: no C compiler is needed.

    compiled     what compiles, and keeps, machine code
    arithmetic   float32 and half precision as ggml computes them, to the bit
    tiles        64 blocks side by side, and the weights of their errors
    affine       scale and minimum of a sub-block
    symmetric    scale of a sub-block around zero
    k_quants     Q2_K to Q6_K, from rows to fields
    legacy       Q4_0 to Q5_1 with importances
    iq4          IQ4_NL and IQ4_XS

ggml adds floats one after another, and the last bits of its sums decide which of two nearly equal scales
wins. So a sum here runs over the positions of a block in their order, and what a processor's vector holds
is the same position of many blocks: every block gets exactly ggml's sum, and 16 of them get it at once.
"""
