"""The command line: options in, one call of `converters.commands`, an exit code out.

Nothing heavy is imported before a command runs, so `dscq --help` and shell completion answer at once.

    0 ok   1 error   2 usage   3 verification failed   130 interrupted
"""

import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from converters import calibration, commands, planning, tune_command
from converters.options import (
    EXISTING,
    EXISTING_FILE,
    EXISTING_FOLDER,
    FOLD_OPTION,
    OUTPUT_OPTIONS,
    PIN_OPTIONS,
    PROOF_OPTIONS,
    ROW_OPTIONS,
    RUNTIME_OPTIONS,
    SOURCE_OPTIONS,
    TYPE_OPTIONS,
    Size,
)
from converters.terminal import Terminal
from quantize.errors import DscqError

INTERRUPTED = 130


def known_targets(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return every `FORMAT:QUANT` that begins with what was typed, in any case."""
    from converters.targets import TARGETS

    names = [f"{name}:{quant}" for name, target in TARGETS.items() for quant in target.quants]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dscq", prog_name="dscq")
def dscq() -> None:
    """Quantize and export DeepSeek Coder, with a proof.

    \b
      dscq convert deepseek-ai/deepseek-coder-6.7b-instruct --to gguf:Q8_0 -o out/
      dscq calibrate ./model -o stats/
      dscq verify out/deepseek-coder-6.7b-instruct-Q8_0.gguf --reference ./model
      dscq inspect out/deepseek-coder-6.7b-instruct-Q8_0.gguf
    """


@dscq.command()
@click.argument("source", type=click.Path())
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="FORMAT:QUANT",
    help="Repeatable: gguf:Q4_K_M, gguf:bpw=3.5, gguf:size=4.1GB, gguf:fit=8GiB, gptq:4bit-128g, exl2:4.25, "
    "exl2:fit=24GiB.",
    shell_complete=known_targets,
)
@click.option(
    "--plan", type=EXISTING_FILE, metavar="FILE", help="A GGUF with the types of a file of dscq plan."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--name", help="Name of the model in file names and metadata.")
@click.option("--split-max-size", type=Size(), help="Largest file of a split: 4G, 4GiB.")
@click.option("--dry-run", is_flag=True, help="Show the plan, the sizes and what is needed; write nothing.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--fresh", is_flag=True, help="Make every tensor anew, whatever earlier runs left.")
@click.option("--no-proof", is_flag=True, help="Write only; prove nothing.")
@click.option(
    "--tune",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=64,
    metavar="[STEPS]",
    help="GGUF of two or three bits: train the scales too, as dscq tune does; 64 steps, or STEPS.",
)
@TYPE_OPTIONS
@FOLD_OPTION
@PIN_OPTIONS
@RUNTIME_OPTIONS
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
      dscq convert ./model --to gguf:Q3_K_M --to gguf:IQ2_XS --stats stats/
      dscq convert ./model --to gguf:fit=8GiB --ctx 16384 --cache q8_0 --stats stats/
      dscq convert ./model --to gptq:4bit-128g --to gptq:3bit-64g,desc_act --stats stats/ --tp 2
      dscq convert ./model --to exl2:4.25 --to exl2:6.0,h8 --stats stats/
      dscq convert ./model --to exl2:fit=24GiB --ctx 16384 --cache q8 --reserve 1GiB --stats stats/
    """
    commands.convert(Terminal(quiet, as_json), commands.ConvertChoices(**chosen))


@dscq.command()
@click.argument("source", type=click.Path())
@click.option("--output", "-o", type=click.Path(path_type=Path), default=Path("stats"), show_default=True)
@click.option("--diagonal-only", is_flag=True, help="Only what an imatrix needs: a small archive.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Let tokens count by what errors at them do to the output: better files, about three times as long.",
)
@click.option(
    "--add", type=EXISTING_FOLDER, help="Another archive of this model, to be added to the new one."
)
@click.option("--fresh", is_flag=True, help="Start over, in place of going on with an interrupted run.")
@click.option(
    "--on-nonfinite",
    type=click.Choice(["stop", "drop"]),
    default="stop",
    show_default=True,
    help="Rows whose activations are not finite numbers: stop, or leave them out.",
)
@click.option(
    "--imatrix-out",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Write the diagonals as llama.cpp's imatrix too: .gguf or .dat.",
)
@click.option("--force", is_flag=True, help="Overwrite the files of --imatrix-out.")
@click.option("--device", help="Where the forward runs: cpu (the default), cuda, cuda:1.")
@ROW_OPTIONS
@SOURCE_OPTIONS
@OUTPUT_OPTIONS
def calibrate(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Gather the statistics of SOURCE's activations, once: any format and size is made from them.

    \b
    Examples:
      dscq calibrate ./model -o stats/
      dscq calibrate ./model --text ./src --rows 512 --length 2048 -o stats/
      dscq calibrate ./model --show-rows
      torchrun --nproc-per-node 4 -m converters.cli calibrate ./model -o stats/
    """
    terminal = Terminal(quiet or calibration.rank() > 0, as_json)
    calibration.calibrate(terminal, calibration.CalibrateChoices(**chosen))


@dscq.command()
@click.argument("source", type=click.Path())
@click.option(
    "--stats",
    type=EXISTING_FOLDER,
    required=True,
    help="The statistics archive of this model: dscq calibrate.",
)
@click.option("--to", "target", metavar="gguf:QUANT", help="What to plan: gguf:bpw=3.5, gguf:size=4.1GB, ...")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the plan: a .toml to edit.")
@click.option("--curve", is_flag=True, help="Show sizes against predicted losses, llama.cpp's recipes too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curve: .png, .svg.")
@click.option(
    "--reports",
    type=EXISTING_FOLDER,
    help="A folder with reports of conversions, whose measured losses the curve is to show too.",
)
@click.option("--force", is_flag=True, help="Overwrite the files of -o and --plot.")
@FOLD_OPTION
@PIN_OPTIONS
@RUNTIME_OPTIONS
@SOURCE_OPTIONS
@OUTPUT_OPTIONS
def plan(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Predict what SOURCE loses at which size, and plan the types of a GGUF.

    \b
    Examples:
      dscq plan ./model --stats stats/ --curve
      dscq plan ./model --stats stats/ --to gguf:bpw=3.5 -o plan.toml
      dscq convert ./model --stats stats/ --plan plan.toml
    """
    planning.plan(Terminal(quiet, as_json), planning.PlanChoices(device=None, **chosen))


REFERENCE_OPTION = click.option(
    "--reference",
    required=True,
    type=click.Path(),
    metavar="SOURCE",
    help="The checkpoint that FILE was made from.",
)


@dscq.command()
@click.argument("file", type=EXISTING)
@REFERENCE_OPTION
@click.option(
    "--report", type=click.Path(path_type=Path), help="Where to write the report; default: beside FILE."
)
@SOURCE_OPTIONS
@PROOF_OPTIONS
@OUTPUT_OPTIONS
def verify(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Prove FILE, a GGUF (of a split: its first shard) or a GPTQ or EXL2 folder, against its checkpoint.

    \b
    Examples:
      dscq verify out/model-Q8_0.gguf --reference ./model
      dscq verify out/gptq-4bit-128g --reference ./model --readers ~/gptq-readers
      dscq verify out/model-F16.gguf --reference deepseek-ai/deepseek-coder-1.3b-base --probe-tokens 1000
    """
    commands.verify(Terminal(quiet, as_json), commands.VerifyChoices(**chosen))


@dscq.command()
@click.argument("file", type=EXISTING_FILE)
@REFERENCE_OPTION
@click.option(
    "--stats",
    type=EXISTING_FOLDER,
    required=True,
    help="The statistics archive of SOURCE, whose rows are trained on: dscq calibrate.",
)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Steps of gradient descent, of about 2048 tokens each.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--no-proof", is_flag=True, help="Write only; prove nothing.")
@SOURCE_OPTIONS
@PROOF_OPTIONS
@OUTPUT_OPTIONS
def tune(quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Train the scales of FILE, a quantized GGUF, against its checkpoint: same size, lower KL.

    For files of two or three bits; at four and more there is nothing to gain.

    \b
    Examples:
      dscq tune out/model-Q2_K.gguf --reference ./model --stats stats/ -o out/model-Q2_K-tuned.gguf
      dscq tune from-elsewhere.gguf --reference ./model --stats stats/ -o better.gguf --steps 128
    """
    tune_command.tune(Terminal(quiet, as_json), tune_command.TuneChoices(**chosen))


@dscq.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw an archive's figures over the layers: .png, .svg."
)
@click.option("--force", is_flag=True, help="Overwrite the file of --plot.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def inspect(path: Path, tensors: bool, plot: Path | None, force: bool, as_json: bool) -> None:
    """Show what a GGUF, a checkpoint folder or a statistics archive holds, and what is wrong with it.

    \b
    Examples:
      dscq inspect out/model-Q8_0.gguf
      dscq inspect ./model --tensors
      dscq inspect stats/ --plot stats.svg
    """
    commands.inspect(Terminal(as_json=as_json), path, list_tensors=tensors, plot=plot, force=force)


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
    """Turn a scheduler's SIGTERM into the same clean unwinding as Ctrl-C."""
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
