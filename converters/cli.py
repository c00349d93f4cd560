"""The command line: options in, one call of `converters.commands`, an exit code out.

Nothing heavy is imported before a command runs, so `dscq --help` and shell completion answer at once.

    0 ok   1 error   2 usage   3 verification failed   130 interrupted
"""

import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from converters import commands
from converters.terminal import Terminal
from quantize.errors import DscqError

INTERRUPTED = 130
SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

Command = Callable[..., None]


class Size(click.ParamType[int]):
    """A number of bytes: 4000000000, 4G (10^9), 4GiB (2^30)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes that the text names."""
        text = str(value).strip().upper().removesuffix("B")
        number = text.rstrip("KMGI")
        try:
            size = int(float(number) * SIZE_UNITS[text[len(number) :].strip()])
        except (ValueError, KeyError):
            self.fail(f"{value!r} is not a size; write 4000000000, 4G or 4GiB", param, ctx)
        if size <= 0:
            self.fail(f"{value!r} is not a positive size", param, ctx)
        return size


def known_targets(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return every `FORMAT:QUANT` that begins with what was typed, in any case."""
    from converters.targets import TARGETS

    names = [f"{name}:{quant}" for name, target in TARGETS.items() for quant in target.quants]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


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
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Another type for tensors whose GGUF name the regular expression matches; the first counts.",
    ),
    click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight."),
    click.option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight."),
    click.option("--pure", is_flag=True, help="No mix: the recipe's default type for every matrix."),
)
PROOF_OPTIONS = options(
    click.option("--require-proof", is_flag=True, help="Exit 3 where the runtime is not installed."),
    click.option(
        "--probe-tokens",
        type=click.IntRange(min=64),
        help="Size of the probe text; default: about 6000, one row of which passes position 4096.",
    ),
    click.option("--llama-lib", type=EXISTING_FILE, help="Another libllama than the wheel's."),
    click.option("--device", help="Where the reference forward runs: cpu (the default), cuda, cuda:1."),
)
OUTPUT_OPTIONS = options(
    click.option("--threads", type=click.IntRange(min=1), help="Worker threads; default: the cores at hand."),
    click.option("--quiet", "-q", is_flag=True, help="Only results and errors."),
    click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dscq", prog_name="dscq")
def dscq() -> None:
    """Quantize and export DeepSeek Coder, with a proof.

    \b
      dscq convert deepseek-ai/deepseek-coder-6.7b-instruct --to gguf:Q8_0 -o out/
      dscq verify out/deepseek-coder-6.7b-instruct-Q8_0.gguf --reference ./model
      dscq inspect out/deepseek-coder-6.7b-instruct-Q8_0.gguf
    """


@dscq.command()
@click.argument("source", type=click.Path())
@click.option(
    "--to",
    "targets",
    multiple=True,
    required=True,
    metavar="FORMAT:QUANT",
    help="Repeatable: gguf:F16.",
    shell_complete=known_targets,
)
@click.option("--output", "-o", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--name", help="Name of the model in file names and metadata.")
@click.option("--split-max-size", type=Size(), help="Largest file of a split: 4G, 4GiB.")
@click.option("--dry-run", is_flag=True, help="Show the plan, the sizes and what is needed; write nothing.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--no-proof", is_flag=True, help="Write only; prove nothing.")
@TYPE_OPTIONS
@SOURCE_OPTIONS
@PROOF_OPTIONS
@OUTPUT_OPTIONS
def convert(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Convert SOURCE (a folder, a hub id, or a float GGUF) and prove every file.

    \b
    Examples:
      dscq convert deepseek-ai/deepseek-coder-6.7b-instruct --to gguf:F16 --to gguf:Q8_0 -o out/
      dscq convert ./my-finetune --lora ./adapter --to gguf:Q8_0 --split-max-size 4G --name my-coder
      dscq convert ./model --to gguf:Q4_K_M --tensor-type 'ffn_down=Q6_K' --dry-run
      dscq convert ./model --to gguf:IQ2_M --imatrix imatrix.gguf
    """
    commands.convert(Terminal(quiet, as_json), commands.ConvertChoices(**chosen))


@dscq.command()
@click.argument("file", type=EXISTING_FILE)
@click.option(
    "--reference",
    required=True,
    type=click.Path(),
    metavar="SOURCE",
    help="The checkpoint that FILE was made from.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Where to write the report; default: beside FILE."
)
@SOURCE_OPTIONS
@PROOF_OPTIONS
@OUTPUT_OPTIONS
def verify(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Prove FILE (of a split: its first shard) against the checkpoint that it was made from.

    \b
    Examples:
      dscq verify out/model-Q8_0.gguf --reference ./model
      dscq verify out/model-F16.gguf --reference deepseek-ai/deepseek-coder-1.3b-base --probe-tokens 1000
    """
    commands.verify(Terminal(quiet, as_json), commands.VerifyChoices(**chosen))


@dscq.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def inspect(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what a GGUF or a checkpoint folder holds, and what is wrong with it.

    \b
    Examples:
      dscq inspect out/model-Q8_0.gguf
      dscq inspect ./model --tensors
    """
    commands.inspect(Terminal(as_json=as_json), path, list_tensors=tensors)


@dscq.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    Examples:
      dscq completion bash >> ~/.bashrc
      dscq completion fish > ~/.config/fish/completions/dscq.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(dscq, {}, "dscq", "_DSCQ_COMPLETE").source())


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Turn a scheduler's SIGTERM into the same clean unwinding as Ctrl-C: no partial file stays."""
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line and exit with dscq's exit codes."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a log in ASCII must not stop at the family's token names
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    terminal = Terminal()
    try:
        dscq.main(standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        terminal.say("interrupted: no unfinished file stands under its name")
        sys.exit(INTERRUPTED)
    except DscqError as error:
        terminal.error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # what no module has a better word for: a disk or a folder that went away
        terminal.error(DscqError(str(error)))
        sys.exit(DscqError.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
