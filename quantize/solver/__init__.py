"""Error-compensated rounding: codes on a given grid with the smallest loss in a linear's output.

For inputs x with the Hessian H = E[x xᵀ], an error W - Ŵ costs tr((W - Ŵ) H (W - Ŵ)ᵀ). Rows of W are
independent; within a row, the errors of correlated columns can cancel, and that is all that is done here.

    factor       H damped, ordered and factored once for all linears that share an input
    grid         what the codes of a group stand for: scale * level + base
    compensate   column after column, each error handed on to the columns to come (GPTQ)
    scales       search of a group's scale and zero-point, by the loss that compensation would leave
    descend      coordinate descent on the exact loss, over codes and over scales
    target       weights that make up for inputs which earlier layers' errors have moved
    linears      all of these for the linears of one input, with an effort to choose
    exl2         the same for EXL2: groups of several widths, scales of four bits
    kernels      the inner loops over columns on the CPU
    blocks       ggml's block types: a Hessian factored by super-blocks (block_factor), what their fields can
                 hold (block_grids), and loops (block_loops), on the CPU compiled (block_kernels,
                 search_kernels, refit_kernels)
    gpu          the inner loops in Triton, for CUDA GPUs
    points       the same for IQ2 and IQ3, whose codes are points of several weights (point_kernels,
                 point_round_kernels, point_move_kernels)

Nothing here knows a file: GPTQ's groups, ggml's blocks and EXL2's rows are all such grids.
"""

SOLVING = 4
"""The version of the solver: raised when it gives other codes or scales than before."""
