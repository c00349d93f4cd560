"""Quantize a checkpoint with auto-round, in its own environment: it imports nothing of this project.

    PYTHON autoround_worker.py SOURCE ROWS OUT CONFIG

ROWS is a JSON list of rows of token ids, all of one length, CONFIG a JSON object: `bits`, the arguments of
AutoRound, and `layers`, to keep only so many decoder blocks, for a trial of the time. Writes the folder OUT
and beside it `OUT.json`: the seconds of the whole run, imports excluded, and the peak of the resident memory.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")


def main() -> None:
    """Load, tune, save, report."""
    source, rows_file, out, config = sys.argv[1:]
    arguments = json.loads(config)
    scheme, layers = f"W{arguments.pop('bits')}A16", arguments.pop("layers", None)
    rows = [torch.tensor([ids]) for ids in json.loads(Path(rows_file).read_text())]
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    tokenizer = AutoTokenizer.from_pretrained(source)
    known = {"scheme": scheme, "dataset": rows, "seqlen": rows[0].shape[1], "nsamples": len(rows)}
    tuned = AutoRound(model, tokenizer, device_map="cpu", **known, **arguments)
    tuned.quantize_and_save(out, format="auto_gptq")
    bring_up(Path(out))
    measured = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
    Path(f"{out}.json").write_text(json.dumps(measured))


def bring_up(out: Path) -> None:
    """Move what was written into a folder inside OUT up into OUT itself."""
    if not list(out.glob("*.safetensors")):
        [inner] = [path.parent for path in out.glob("*/config.json")]
        for path in inner.iterdir():
            path.rename(out / path.name)
        inner.rmdir()


if __name__ == "__main__":
    main()
