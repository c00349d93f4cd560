"""The options of the commands, in the groups in which commands share them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from converters.sizes import parse_size

EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

Command = Callable[..., None]


class Size(click.ParamType[int]):
    """A number of bytes: 4000000000, 4G (10^9), 4GiB (2^30)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes that the text names."""
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator that applies several."""

    def apply(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


SOURCE_OPTIONS = options(
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option("--lora", type=EXISTING_FOLDER, help="A PEFT LoRA adapter folder to merge while streaming."),
    click.option(
        "--low-disk", is_flag=True, help="Hub id: download shard by shard, delete what has been used."
    ),
    click.option(
        "--eos",
        type=click.Choice(["model", "completion"]),
        default="model",
        show_default=True,
        help="Stop at the model's own EOS; or at end of sentence: completing code with an instruct model.",
    ),
)
TYPE_OPTIONS = options(
    click.option(
        "--imatrix", type=EXISTING_FILE, help="Importances of the columns, from llama-imatrix: .gguf or .dat."
    ),
    click.option(
        "--stats", type=EXISTING_FOLDER, help="The statistics archive of this model: dscq calibrate."
    ),
    click.option(
        "--calibrate", is_flag=True, help="Make the archive first, on the built-in text, in OUTPUT/stats."
    ),
    click.option(
        "--rounding",
        type=click.Choice(["plain", "weighted", "compensated"]),
        help="GGUF: errors as they are, weighed by importances, or compensated with Hessians; default: the "
        "last that can be.",
    ),
    click.option(
        "--effort",
        type=click.Choice(["fast", "default", "high"]),
        help="How hard the error-compensated rounding tries; default: default.",
    ),
    click.option(
        "--measurement",
        type=EXISTING_FILE,
        help="EXL2: what layouts cost, of an earlier run or of exllamav2; default: OUTPUT/measurement.json, "
        "which is made first.",
    ),
    click.option(
        "--tp",
        "tensor_parallel",
        type=click.IntRange(min=1),
        metavar="N",
        help="GPTQ: the GPUs that a server will split the model over; checked before the work.",
    ),
    click.option("--pure", is_flag=True, help="No mix: the recipe's default type for every matrix."),
)
PIN_OPTIONS = options(
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Another type for tensors whose name the regular expression matches; the first counts. "
        "GGUF: ffn_down=Q6_K; GPTQ: down_proj=8bit-32g.",
    ),
    click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight."),
    click.option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight."),
)
FOLD_OPTION = click.option(
    "--fold",
    is_flag=True,
    help="GGUF: scale inner channels so that they round better; LoRA adapters made for the original then do "
    "not fit the file.",
)
RUNTIME_OPTIONS = options(
    click.option("--ctx", type=click.IntRange(min=1), help="Of fit=: tokens of context; default: 4096."),
    click.option(
        "--cache",
        type=click.Choice(["f16", "q8_0", "q4_0", "fp16", "q8", "q6", "q4"]),
        help="Of fit=: type of the KV cache, f16, q8_0 or q4_0 of llama.cpp (GGUF), fp16, q8, q6 or q4 of "
        "exllamav2 (EXL2); default: halves.",
    ),
    click.option("--reserve", type=Size(), help="Of fit=: memory to leave to others: 500M; default: none."),
    click.option(
        "--ngl",
        type=click.IntRange(min=1),
        help="Of gguf:fit=: layers on the card, as llama.cpp counts; default: the whole file counts.",
    ),
    click.option(
        "--exclude-type",
        "exclude_types",
        multiple=True,
        metavar="PATTERN",
        help="Of gguf:bpw=, size= and fit=: types not to choose, as 'IQ[123]*', slow on a CPU.",
    ),
)
PROOF_OPTIONS = options(
    click.option("--require-proof", is_flag=True, help="Exit 3 where the runtime is not installed."),
    click.option(
        "--probe-tokens",
        type=click.IntRange(min=64),
        help="Size of the probe text; default: about 6000, one row of which passes position 4096.",
    ),
    click.option("--llama-lib", type=EXISTING_FILE, help="Another libllama than the wheel's."),
    click.option(
        "--readers",
        type=EXISTING_FOLDER,
        envvar="DSCQ_GPTQ_READERS",
        help="The folder of GPTQ readers that scripts/gptq_readers made; default: $DSCQ_GPTQ_READERS.",
    ),
    click.option(
        "--device",
        help="Where the reference forward runs and convert encodes: cpu (the default), cuda, cuda:1. Several "
        "GPUs encode in turn on cuda; the bytes are the same everywhere.",
    ),
)
ROW_OPTIONS = options(
    click.option(
        "--text",
        multiple=True,
        metavar="SOURCE",
        help="Text to calibrate on: a folder of source, .txt, .jsonl, .parquet, or a dataset's hub id; "
        "repeatable. Default: the built-in text.",
    ),
    click.option(
        "--rows", type=click.IntRange(min=1), default=128, show_default=True, help="Budget, in rows."
    ),
    click.option("--length", type=click.IntRange(min=32), help="Tokens of a row at most; default: 2048."),
    click.option(
        "--share",
        "shares",
        multiple=True,
        metavar="KIND=NUMBER",
        help="Share of completion, infill, repository, chat or noise rows; "
        "default: 0.5, 0.25, 0.15, 0.1, 0 (with --text 0.1).",
    ),
    click.option(
        "--long-rows",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Rows that pass position 4096.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Another draw of rows."),
    click.option(
        "--show-rows",
        type=click.IntRange(min=0),
        is_flag=False,
        flag_value=8,
        metavar="[N]",
        help="Print N rows (8; 0: all) as the model will see them, and do nothing else.",
    ),
)
OUTPUT_OPTIONS = options(
    click.option("--threads", type=click.IntRange(min=1), help="Worker threads; default: the cores at hand."),
    click.option("--quiet", "-q", is_flag=True, help="Only results and errors."),
    click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output."),
)
