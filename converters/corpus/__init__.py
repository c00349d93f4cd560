"""Calibration text for a code model: text in, token rows out.

    texts.py       what a source gives: documents and conversations, and the record of each file
    bundled.py     the corpus that comes with dscq
    sources.py     the user's own: source trees, .txt, .jsonl, .parquet, a dataset's id
    order.py       draws and orders that are the same on every machine
    pieces.py      a text cut to a number of tokens
    infill.py repository.py dependencies.py chat.py      the kinds of rows that are text
    noise.py       rows of random tokens
    rows.py        a row, the corpus, the options
    build.py       `build_corpus`: the budget, shared out among the kinds
    show.py        what the model will see, as lines of text

Solvers weigh the error of a weight by the inputs that it meets, so the rows should meet the model as its
users do: BOS in front, the marks of an infill where the editor puts them, files under their paths, a chat
through the model's own template, and positions past 4096. Nothing is padded, and no two texts share a row
unless they share a prompt at inference.
"""
