"""The embedded model's GPTQ folder writes code in transformers, on the CPU, as its users run it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from converters.checkpoint import open_checkpoint
from converters.corpus.build import build_corpus
from converters.corpus.rows import CorpusOptions
from converters.gptq_source import open_gptq
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from quantize.reference import ReferenceModel

PROMPT, N_NEW = "def add(a, b):\n", 24
PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, n_new = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
ids = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
text = tokenizer.decode(out[0], skip_special_tokens=True)
print("RESULT" + json.dumps({"ids": out[0].tolist(), "text": text}))
"""


@pytest.fixture
def python() -> Path:
    folder = os.environ.get("DSCQ_GPTQ_READERS")
    if not folder:
        pytest.skip("DSCQ_GPTQ_READERS: not set; scripts/gptq_readers DIR makes the readers")
    return Path(folder) / "gptqmodel" / "bin" / "python"


def test_the_folder_writes_code_in_transformers(demo_folder: Path, tmp_path: Path, python: Path) -> None:
    checkpoint = open_checkpoint(demo_folder)
    corpus = build_corpus(
        checkpoint.tokenizer, checkpoint.config, CorpusOptions(n_rows=24, length=256, n_long=0)
    )
    archive = calibrate_checkpoint(
        checkpoint, corpus.rows, corpus.identity, CalibrateOptions(tmp_path / "stats")
    )
    (written,) = convert(checkpoint, [Request("gptq", "4bit-32g")], ConvertOptions(tmp_path, archive=archive))
    arguments = [str(python), "-c", PROGRAM, str(written.place), PROMPT, str(N_NEW)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    expected = greedy(written.place, checkpoint.tokenizer.encode(PROMPT))
    # transformers computes in half precision: a near-tie may fall to the other side late in the text.
    agreed = next(
        (i for i, (a, b) in enumerate(zip(result["ids"], expected, strict=False)) if a != b), len(expected)
    )
    assert agreed >= len(checkpoint.tokenizer.encode(PROMPT)) + N_NEW // 2
    assert result["text"].startswith(PROMPT + "    ")  # an indented body


def greedy(folder: Path, ids: list[int]) -> list[int]:
    """Continue ids by the likeliest tokens, with the folder's weights in the reference forward."""
    file = open_gptq(folder)
    model = ReferenceModel(file.config, file.weights)
    for _ in range(N_NEW):
        (hidden,) = model.hidden([torch.tensor(ids)])
        ids = [*ids, int(model.logits(hidden[-1:]).argmax())]
    return ids
