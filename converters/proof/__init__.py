"""The proof of a written file, layer by layer; `converters.verify` puts the layers together.

record.py     Check, Proof and the other plain records that the report and the terminal show
metadata.py   the file's figures and vocabulary against the checkpoint's
tensors.py    (a) every tensor against its source, block by block
forward.py    (b) the file's weights in the reference forward against the checkpoint's
blame.py      whose fault an error is: only the file's may fail a check
file.py       the kinds of written models, and what all of them have
runtime.py    (c) llama.cpp's logits and token ids against both
readers.py    (c) of a GPTQ folder: AutoGPTQ and GPTQModel
"""
