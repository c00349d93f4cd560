"""The command line of `scripts/train_demo_model`: corpus to tokenizer to training to folder."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import bpe
from .chat_template import CHAT_TEMPLATE
from .corpus import Corpus, read_corpus
from .export import write_folder
from .model import Llama
from .rows import DocumentStream, held_out_rows, pack
from .shape import DEMO_SHAPE
from .training import LONG_ROWS, MIDDLE_ROWS, Budget, Clock, Trainer, held_out_loss

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
UNSCALED_POSITIONS = 4096


def main() -> None:
    """Train the demo model, or continue training it, and write its folder."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    tokenizer = _tokenizer(corpus, arguments.work / "tokenizer.json")
    model = Llama(DEMO_SHAPE)
    trainer = Trainer(model, arguments.work / "checkpoint.pt")
    write_folder(arguments.out, model, DEMO_SHAPE, tokenizer)
    held_out = held_out_rows(corpus, tokenizer, MIDDLE_ROWS[1])

    def batches(seed: int, rows: tuple[int, int]) -> Iterator[Tensor]:
        stream = DocumentStream(corpus, tokenizer, CHAT_TEMPLATE, arguments.seed + seed)
        return pack(iter(stream), n_tokens=rows[1], n_rows=rows[0])

    def report(clock: Clock) -> None:
        loss = held_out_loss(model, held_out).mean().item()
        logger.info("step %5d  %d tokens  held-out loss %.4f", clock.step, clock.n_tokens, loss)
        write_folder(arguments.out, model, DEMO_SHAPE, tokenizer)

    trainer.run(Budget(arguments.minutes, arguments.steps), batches, report)
    report(trainer.clock)
    _report_figures(model, corpus, tokenizer, trainer.clock)


def _report_figures(model: Llama, corpus: Corpus, tokenizer: Tokenizer, clock: Clock) -> None:
    n_bytes = sum(len(file.text.encode()) for file in corpus.held_out)
    n_tokens = sum(len(tokenizer.encode(file.text).ids) for file in corpus.held_out)
    loss = held_out_loss(model, held_out_rows(corpus, tokenizer, MIDDLE_ROWS[1])).mean()
    logger.info("%s", clock)
    logger.info("held out, rows of %d: loss %.4f, perplexity %.3f", MIDDLE_ROWS[1], loss, loss.exp())
    bits_per_byte = loss / math.log(2) * n_tokens / n_bytes
    logger.info("bytes per token %.3f, bits per byte %.4f", n_bytes / n_tokens, bits_per_byte)
    long = held_out_loss(model, held_out_rows(corpus, tokenizer, LONG_ROWS[1]))
    before, after = long[:, :UNSCALED_POSITIONS].mean(), long[:, UNSCALED_POSITIONS:].mean()
    logger.info("rows of %d: loss %.4f before position 4096, %.4f after", LONG_ROWS[1], before, after)


def _tokenizer(corpus: Corpus, path: Path) -> Tokenizer:
    if not path.exists():
        n_chars = sum(len(file.text) for file in corpus.train)
        logger.info("learning the merges from %d files, %d characters", len(corpus.train), n_chars)
        tokenizer = bpe.train_tokenizer(file.text for file in corpus.train)
        path.write_text(bpe.tokenizer_json(tokenizer), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_demo_model", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "demo-coder", help="folder to write")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "demo-coder", help="folder of tokenizer and checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=65.0, help="length of the training by the clock")
    parser.add_argument("--steps", type=int, help="length of the training in steps, instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser
