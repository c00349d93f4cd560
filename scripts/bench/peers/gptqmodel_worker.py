"""Quantize a checkpoint with GPTQModel, in its own environment: it imports nothing of this project.

    PYTHON gptqmodel_worker.py SOURCE ROWS OUT CONFIG

ROWS is a JSON list of rows of token ids, CONFIG a JSON object: the arguments of QuantizeConfig, but `gptaq`
an alpha and `foem` a pair of alpha and beta. Writes the folder OUT, and beside it `OUT.json`: the seconds of
the whole run, imports excluded, those of quantizing alone, and the peak of the resident memory.
"""

import json
import sys
import time
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")


def main() -> None:
    """Load, quantize, save, report."""
    source, rows, out, config = sys.argv[1:]
    arguments = json.loads(config)
    if "gptaq" in arguments:
        arguments["gptaq"] = GPTAQConfig(alpha=arguments["gptaq"])
    if "foem" in arguments:
        alpha, beta = arguments["foem"]
        arguments["foem"] = FOEMConfig(alpha=alpha, beta=beta)
    started = time.monotonic()
    model = GPTQModel.load(source, QuantizeConfig(**arguments), device="cpu")
    begun = time.monotonic()
    calibration = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.loads(Path(rows).read_text())
    ]
    model.quantize(calibration, batch_size=1)
    quantized = time.monotonic()
    model.save(out)
    measured = {
        "seconds": time.monotonic() - started,
        "quantize_seconds": quantized - begun,
        "peak_bytes": peak_bytes(),
    }
    Path(f"{out}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
