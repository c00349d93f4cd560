"""Who can read a GPTQ folder of given settings: the rules of the readers, asked before the work.

The format allows more than any one reader does. Which bits, group sizes and shapes a kernel takes is in its
code; a rule that is broken shows up after hours of work, as an error at load, as a slow kernel or (a width
that is not 4 in exllamav2) as wrong weights. K is in_features (columns), N out_features (rows):

| reader               | bits       | group size          | shape                         | other        |
|----------------------|------------|---------------------|-------------------------------|--------------|
| the file             | 2, 3, 4, 8 | divides K           | K % 32, N % 32                |              |
| auto-gptq (torch)    | 2, 3, 4, 8 | any                 |                               |              |
| GPTQModel torch      | 2, 3, 4, 8 | -1, 16 ... 1024     |                               |              |
| GPTQModel torch_fused| 4          | 32, 64, 128         |                               | symmetric    |
| GPTQModel triton     | 2, 4, 8    | -1, 16 ... 1024     | K % 32, N % 32                |              |
| GPTQModel exllamav2  | 4          | -1, 32, 64, 128     | K % 32, N % 32                |              |
| GPTQModel marlin     | 4, 8       | -1, 32, 64, 128     | K % 128, N % 64 or turned     | symmetric    |
| GPTQModel machete    | 4, 8       | -1, 64, 128         | K % 64, N % 128               | Hopper       |
| transformers         | 2, 3, 4, 8 | GPTQModel's, through optimum                        |              |
| exllamav2            | 4          | power of two        | K % 32                        | own lm_head  |
| vLLM gptq            | 2, 3, 4, 8 | divides K per GPU   | N per GPU: whole words        |              |
| vLLM gptq_marlin     | 4, 8       | -1, 32, 64, 128     | K per GPU % 128, N % 64       | symmetric    |

Under tensor parallelism vLLM gives each of `tp` GPUs a part of the rows of q, k, v, gate and up, and a part
of the *columns* of o_proj and down_proj: there a group may not be cut in two. With fewer KV heads than GPUs
they are repeated, if they divide evenly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from quantize.llama import LlamaConfig

BITS: Final = (2, 3, 4, 8)
GROUP_SIZES: Final = (-1, 16, 32, 64, 128, 256, 512, 1024)
_WORD: Final = 32  # codes and zero points are packed into words of 32 bits, and 3-bit ones into three words
_VLLM_GROUPS: Final = (128, 64, 32)
_PARALLEL: Final = (8, 4, 2, 1)
_SYMMETRIC: Final = "it takes symmetric grids alone"
_ROWS_PER_WORDS: Final = {2: 16, 3: 32, 4: 8, 8: 4}


@dataclass(frozen=True)
class Verdict:
    """Whether a reader loads the folder, why not, and what there is to know of the kernel it would use."""

    reader: str
    loads: bool
    reasons: tuple[str, ...] = ()
    kernel_note: str = ""


@dataclass(frozen=True)
class _Settings:
    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True)
class _Kernel:
    """A kernel's rules; a shape fits when N and K are multiples of one of the `tiles` (N, K).

    `asymmetric_fault` says what is wrong with zero points other than the middle, "" where nothing is.
    """

    reader: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...] = ((1, 1),)
    asymmetric_fault: str = ""
    note: str = ""


_GPTQMODEL: Final = (
    _Kernel("GPTQModel torch", BITS, GROUP_SIZES, note="any device, slow"),
    # It says that it takes zero points, and (7.6.0) reads none of them, without a word.
    _Kernel(
        *("GPTQModel torch_fused", (4,), (32, 64, 128)),
        asymmetric_fault="it ignores zero points: wrong weights; on a CPU ask for the backend torch",
        note="chosen by itself on a CPU",
    ),
    _Kernel("GPTQModel triton", (2, 4, 8), GROUP_SIZES, ((32, 32),), note="CUDA"),
    _Kernel("GPTQModel exllamav2", (4,), (-1, 32, 64, 128), ((32, 32),), note="CUDA"),
    _Kernel(
        *("GPTQModel marlin", (4, 8), (-1, 32, 64, 128), ((64, 128), (128, 64))),
        asymmetric_fault=_SYMMETRIC,
        note="CUDA, from Turing on",
    ),
    _Kernel("GPTQModel machete", (4, 8), (-1, 64, 128), ((128, 64),), note="CUDA, Hopper only"),
)


def limit_faults(config: LlamaConfig, bits: int, group_size: int) -> list[str]:
    """Return what forbids writing such a folder at all; shapes once each, naming the linears.

    `group_size` is -1 for one group per row. Widths and group sizes that no kept-up reader knows are refused.
    """
    faults = []
    if bits not in BITS:
        faults.append(f"{bits} bits: no reader knows the width; expected {_either(BITS)}")
    if group_size not in GROUP_SIZES:
        faults.append(f"group size {group_size}: GPTQModel takes none but {_either(GROUP_SIZES)}")
    for (n, k), names in _shapes(config).items():
        where = f"{', '.join(names)} ({n} x {k})"
        if group_size > 0 and k % group_size:
            faults.append(f"{where}: {k} columns are no multiple of the group size {group_size}")
        if k % _WORD:
            faults.append(f"{where}: {k} columns are no multiple of {_WORD}, by which codes are packed")
        if n % _WORD:
            faults.append(f"{where}: {n} rows are no multiple of {_WORD}, by which zero points are packed")
    return faults


def reader_verdicts(
    config: LlamaConfig, bits: int, group_size: int, sym: bool, desc_act: bool, tp: int = 1
) -> list[Verdict]:
    """Return what every reader makes of a folder without `limit_faults`; `tp` GPUs in vLLM."""
    settings = _Settings(bits, group_size, sym, desc_act)
    kernels = [_kernel_verdict(kernel, config, settings) for kernel in _GPTQMODEL]
    return [
        _auto_gptq(settings),
        *kernels,
        _transformers(kernels),
        _exllamav2(config, settings),
        _vllm_gptq(config, settings, tp),
        _vllm_marlin(config, settings, tp),
    ]


def verdict_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str]]:
    """Return rows of a table: reader, "loads" or "no", and why not or with which kernel."""
    return [
        (v.reader, "loads" if v.loads else "no", v.kernel_note if v.loads else "; ".join(v.reasons))
        for v in verdicts
    ]


def _shapes(config: LlamaConfig) -> dict[tuple[int, int], list[str]]:
    """The linears by their shape (N, K)."""
    named: dict[tuple[int, int], list[str]] = {}
    for name, shape in config.block_shapes().items():
        if len(shape) == 2:
            named.setdefault((shape[0], shape[1]), []).append(name)
    return named


def _verdict(reader: str, reasons: Sequence[str], note: str = "") -> Verdict:
    return Verdict(reader, not reasons, tuple(reasons), note)


def _grid_reasons(
    settings: _Settings, bits: Sequence[int], groups: Sequence[int], asymmetric_fault: str = ""
) -> Iterator[str]:
    if settings.bits not in bits:
        yield f"{settings.bits} bits; it takes {_either(bits)}"
    if settings.group_size not in groups:
        yield f"group size {settings.group_size}; it takes {_either(groups)}"
    if asymmetric_fault and not settings.sym:
        yield f"asymmetric; {asymmetric_fault}"


def _kernel_verdict(kernel: _Kernel, config: LlamaConfig, settings: _Settings) -> Verdict:
    reasons = list(_grid_reasons(settings, kernel.bits, kernel.groups, kernel.asymmetric_fault))
    for (n, k), names in _shapes(config).items():
        if not any(n % rows == 0 and k % columns == 0 for rows, columns in kernel.tiles):
            wanted = " or ".join(f"{rows} x {columns}" for rows, columns in kernel.tiles)
            reasons.append(f"{', '.join(names)} ({n} x {k}) is not made of tiles of {wanted}")
    return _verdict(kernel.reader, reasons, kernel.note)


def _auto_gptq(settings: _Settings) -> Verdict:
    reasons = list(_grid_reasons(settings, BITS, (settings.group_size,)))
    note = "exllamav2 kernel on CUDA, else torch" if settings.bits == 4 else "no exllama kernel: torch"
    return _verdict("auto-gptq", reasons, note)


def _transformers(kernels: Sequence[Verdict]) -> Verdict:
    usable = [verdict.reader.removeprefix("GPTQModel ") for verdict in kernels if verdict.loads]
    reasons = [] if usable else ["no kernel of GPTQModel takes it"]
    return _verdict("transformers", reasons, f"through optimum and GPTQModel: {', '.join(usable)}")


def _exllamav2(config: LlamaConfig, settings: _Settings) -> Verdict:
    reasons = []
    if settings.bits != 4:
        reasons.append(f"{settings.bits} bits; it takes every GPTQ folder for 4 bits: wrong weights")
    # It does not read the group size, but takes the least power of two that covers K in as many groups.
    if settings.group_size > 0 and settings.group_size & (settings.group_size - 1):
        reasons.append(f"group size {settings.group_size} is no power of two: it would take another one")
    if config.tied_head:
        reasons.append("the head is tied, and it wants a tensor lm_head.weight")
    return _verdict("exllamav2", reasons, "own kernel on CUDA")


@dataclass(frozen=True)
class _Part:
    """What one GPU holds of a linear: `rows` are those of the linears that vLLM merges into one."""

    names: str
    k: int
    rows: tuple[int, ...]
    split_columns: bool


def _parts(config: LlamaConfig, tp: int) -> list[_Part]:
    heads, kv_heads = config.n_heads // tp, max(1, config.n_kv_heads // tp)
    q, kv, inner = heads * config.head_dim, kv_heads * config.head_dim, config.intermediate_size // tp
    hidden = config.hidden_size
    return [
        _Part("q_proj, k_proj, v_proj", hidden, (q, kv, kv), False),
        _Part("o_proj", q, (hidden,), True),
        _Part("gate_proj, up_proj", hidden, (inner, inner), False),
        _Part("down_proj", inner, (hidden,), True),
    ]


def _split_reasons(config: LlamaConfig, tp: int) -> Iterator[str]:
    """Yield why the model cannot be divided among `tp` GPUs, quantized or not."""
    if config.n_heads % tp:
        yield f"{config.n_heads} heads cannot be divided among {tp} GPUs"
    if config.n_kv_heads % tp and tp % config.n_kv_heads:
        yield f"{config.n_kv_heads} KV heads can be neither divided among {tp} GPUs nor repeated evenly"
    if config.intermediate_size % tp:
        yield f"an intermediate size of {config.intermediate_size} cannot be divided among {tp} GPUs"


def _cut_groups(config: LlamaConfig, group_size: int, tp: int) -> list[_Part]:
    """The parts whose columns do not hold whole groups."""
    return [part for part in _parts(config, tp) if group_size > 0 and part.k % group_size]


def _fits(config: LlamaConfig, group_size: int, tp: int) -> bool:
    return not list(_split_reasons(config, tp)) and not _cut_groups(config, group_size, tp)


def _marlin_shape_reasons(config: LlamaConfig, tp: int) -> Iterator[str]:
    for part in _parts(config, tp):
        if part.k % 128:
            yield f"{part.names}: {_columns(part, tp)} are no multiple of 128"
        if sum(part.rows) % 64:
            yield f"{part.names}: {sum(part.rows)} rows per GPU are no multiple of 64"


def _columns(part: _Part, tp: int) -> str:
    return (
        f"{part.k * tp} / {tp} = {part.k} columns" if part.split_columns and tp > 1 else f"{part.k} columns"
    )


def _group_reasons(config: LlamaConfig, group_size: int, tp: int) -> Iterator[str]:
    """Yield which parts cut a group in two, and what would not."""
    advice = _alternatives(config, group_size, tp)
    for part in _cut_groups(config, group_size, tp):
        yield f"{part.names}: {_columns(part, tp)} are no multiple of the group size {group_size}{advice}"


def _alternatives(config: LlamaConfig, group_size: int, tp: int) -> str:
    groups = [size for size in _VLLM_GROUPS if size < group_size and _fits(config, size, tp)]
    fewer = [count for count in _PARALLEL if count < tp and _fits(config, group_size, count)]
    ways = [f"group size {_either(groups)} at --tp {tp}{_marlin_cost(config, tp)}"] if groups else []
    ways += [f"--tp {_either(fewer)} at group size {group_size}"] if fewer else []
    return f" (what works: {', or '.join(ways)})" if ways else ""


def _marlin_cost(config: LlamaConfig, tp: int) -> str:
    lost = next(_marlin_shape_reasons(config, tp), None)
    return "" if lost is None else f", without marlin ({lost})"


def _vllm_gptq(config: LlamaConfig, settings: _Settings, tp: int) -> Verdict:
    reasons = list(_grid_reasons(settings, BITS, (settings.group_size,)))
    if unsplit := list(_split_reasons(config, tp)):
        return _verdict("vLLM gptq", [*reasons, *unsplit])
    reasons += _group_reasons(config, settings.group_size, tp)
    step = _ROWS_PER_WORDS.get(settings.bits, 1)
    odd = [part for part in _parts(config, tp) if any(rows % step for rows in part.rows)]
    reasons += [f"{part.names}: rows per GPU {part.rows} are no multiples of {step}" for part in odd]
    slow = settings.desc_act and tp > 1 and settings.group_size > 0
    note = "desc_act under --tp: the slow kernel for columns in another order" if slow else "exllama kernel"
    return _verdict("vLLM gptq", reasons, f"{note}, float16 alone")


def _vllm_marlin(config: LlamaConfig, settings: _Settings, tp: int) -> Verdict:
    reasons = list(_grid_reasons(settings, (4, 8), (-1, *_VLLM_GROUPS), _SYMMETRIC))
    if unsplit := list(_split_reasons(config, tp)):
        return _verdict("vLLM gptq_marlin", [*reasons, *unsplit])
    reasons += [*_group_reasons(config, settings.group_size, tp), *_marlin_shape_reasons(config, tp)]
    repeated = settings.desc_act and tp > 1
    note = "the fast kernel, from Turing on"
    return _verdict(
        "vLLM gptq_marlin", reasons, f"{note}; desc_act repeats all scales per GPU" if repeated else note
    )


def _either(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
