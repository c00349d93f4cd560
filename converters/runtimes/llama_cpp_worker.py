"""llama.cpp in a process of its own: a crash there is a message here.

The library is native code that ends the process on a failed assertion. So it lives in this worker, which
`converters.runtimes.llama_cpp` starts by file name and talks to over two pipes. Nothing but the standard
library is imported: the worker is there within a tenth of a second.

    request    one line of JSON on standard input:  {"do": "decode", "ids": [...], "start": 0, "all": true}
    answer     one line of JSON on standard output: {"n_rows": 512, ...} or {"error": "..."}
               then `n_bytes` of raw f32 logits, if the answer names a number of bytes

The first request, {"do": "load", "library": "..."}, only loads the library, and is answered by {}. What the
library prints goes to standard error; the parent keeps it for the day something fails.

The C API is called by ctypes. Only `llama_batch` is spelled out, the one struct that must be filled in; it
has not changed since 2023. The two parameter structs, which do change, are passed as an opaque blob larger
than any of their versions: the C side copies its own size out of it. Of the context's parameters three are
set, n_ctx, n_batch and n_ubatch, the first three fields of every version, and the finished context is asked
what it understood. A library whose struct begins otherwise is thus refused instead of misused.
"""

import ctypes as c
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

Pointer = c.c_void_p


class Batch(c.Structure):
    """`llama_batch`: token i of the batch has id, position, sequences, and whether logits are wanted."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", Pointer),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class Parameters(c.Structure):
    """Any `*_params` struct, by value: 1 KiB, of which the library uses what it knows."""

    _fields_ = (("u32", c.c_uint32 * 256),)


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (Pointer, [c.c_char_p, Parameters]),
    "llama_init_from_model": (Pointer, [Pointer, Parameters]),
    "llama_n_ctx": (c.c_uint32, [Pointer]),
    "llama_n_batch": (c.c_uint32, [Pointer]),
    "llama_n_ubatch": (c.c_uint32, [Pointer]),
    "llama_set_n_threads": (None, [Pointer, c.c_int32, c.c_int32]),
    "llama_n_threads": (c.c_int32, [Pointer]),
    "llama_model_n_ctx_train": (c.c_int32, [Pointer]),
    "llama_model_rope_freq_scale_train": (c.c_float, [Pointer]),
    "llama_model_get_vocab": (Pointer, [Pointer]),
    "llama_vocab_n_tokens": (c.c_int32, [Pointer]),
    "llama_vocab_bos": (c.c_int32, [Pointer]),
    "llama_vocab_eos": (c.c_int32, [Pointer]),
    "llama_vocab_eot": (c.c_int32, [Pointer]),
    "llama_vocab_pad": (c.c_int32, [Pointer]),
    "llama_vocab_get_add_bos": (c.c_bool, [Pointer]),
    "llama_vocab_get_add_eos": (c.c_bool, [Pointer]),
    "llama_vocab_fim_pre": (c.c_int32, [Pointer]),
    "llama_vocab_fim_suf": (c.c_int32, [Pointer]),
    "llama_vocab_fim_mid": (c.c_int32, [Pointer]),
    "llama_vocab_is_eog": (c.c_bool, [Pointer, c.c_int32]),
    "llama_tokenize": (
        c.c_int32,
        [Pointer, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_batch_init": (Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c.c_int32, [Pointer, Batch]),
    "llama_get_logits": (Pointer, [Pointer]),
    "llama_get_memory": (Pointer, [Pointer]),
    "llama_memory_clear": (None, [Pointer, c.c_bool]),
    "llama_print_system_info": (c.c_char_p, []),
}


class WorkerError(Exception):
    """Something that the parent is told in words."""


class Runtime:
    """A library, and the model and context that were opened with it."""

    def __init__(self, library: str) -> None:
        try:
            self.c = c.CDLL(library, mode=os.RTLD_GLOBAL if hasattr(os, "RTLD_GLOBAL") else 0)
        except OSError as error:
            raise WorkerError(f"the library does not load: {error}") from error
        absent = [name for name in FUNCTIONS if not hasattr(self.c, name)]
        if absent:
            raise WorkerError(
                f"the library is no libllama, or one of another age: it lacks {', '.join(absent)}"
            )
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self._load_backends(library)
        self.c.llama_backend_init()

    def _load_backends(self, library: str) -> None:
        """Load the processors' variants that some builds keep as files beside the library."""
        if not hasattr(self.c, "ggml_backend_dev_count") or self.c.ggml_backend_dev_count() > 0:
            return
        self.c.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
        self.c.ggml_backend_load_all_from_path(os.fsencode(Path(library).resolve().parent))

    def open(self, path: str, n_ctx: int, n_batch: int, n_threads: int) -> dict[str, Any]:
        """Load a file and make a context; return what the runtime says of the model."""
        self.model = self.c.llama_model_load_from_file(os.fsencode(path), self.c.llama_model_default_params())
        if not self.model:
            raise WorkerError(f"it does not load {path}")
        parameters = self.c.llama_context_default_params()
        parameters.u32[0], parameters.u32[1], parameters.u32[2] = n_ctx, n_batch, n_batch
        self.context = self.c.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise WorkerError(f"it makes no context of {n_ctx} tokens for {path}")
        self._refuse_changed_struct(n_ctx, n_batch)
        self.c.llama_set_n_threads(self.context, n_threads, n_threads)
        self.vocab = self.c.llama_model_get_vocab(self.model)
        self.n_vocab = self.c.llama_vocab_n_tokens(self.vocab)
        self.n_batch = n_batch
        return self.facts()

    def _refuse_changed_struct(self, n_ctx: int, n_batch: int) -> None:
        asked = {"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_batch}
        got = {name: getattr(self.c, f"llama_{name}")(self.context) for name in asked}
        same = got["n_batch"] == got["n_ubatch"] == n_batch and n_ctx <= got["n_ctx"] < n_ctx + 1024
        if not same:
            raise WorkerError(
                f"its llama_context_params are laid out otherwise: asked for {asked}, it understood {got}"
            )

    def facts(self) -> dict[str, Any]:
        """Return the model's and the vocabulary's facts as this runtime understands them."""
        ask = {name: getattr(self.c, f"llama_vocab_{name}") for name in ("bos", "eos", "eot", "pad")}
        ask |= {name: getattr(self.c, f"llama_vocab_{name}") for name in ("fim_pre", "fim_suf", "fim_mid")}
        ids = {name: function(self.vocab) for name, function in ask.items()}
        return {
            **{name: None if token == -1 else token for name, token in ids.items()},
            "n_vocab": self.n_vocab,
            "add_bos": self.c.llama_vocab_get_add_bos(self.vocab),
            "add_eos": self.c.llama_vocab_get_add_eos(self.vocab),
            "stops": [i for i in range(self.n_vocab) if self.c.llama_vocab_is_eog(self.vocab, i)],
            "context_length": self.c.llama_model_n_ctx_train(self.model),
            "rope_scale": self.c.llama_model_rope_freq_scale_train(self.model),
            "system": (self.c.llama_print_system_info() or b"").decode("utf-8", errors="replace"),
        }

    def tokenize(self, texts: list[str], add_special: bool, parse_special: bool) -> list[list[int]]:
        """Return each text's ids by the runtime's own tokenizer."""
        return [self._tokenize(text.encode("utf-8"), add_special, parse_special) for text in texts]

    def _tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
        size = len(text) + 8
        while True:
            ids = (c.c_int32 * size)()
            n = self.c.llama_tokenize(self.vocab, text, len(text), ids, size, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            size = -n  # a negative answer is the room that it would have taken

    def decode(self, ids: list[int], start: int, want_all: bool) -> tuple[int, int]:
        """Run tokens at positions `start`...; return address and number of rows of the logits.

        `start` 0 forgets what was run before. At most n_batch tokens at once: more is an abort in there.
        """
        if not 0 < len(ids) <= self.n_batch or not all(0 <= i < self.n_vocab for i in ids):
            raise WorkerError(f"{len(ids)} ids of 0 to {self.n_vocab - 1}: want 1 to {self.n_batch}")
        if start == 0:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        batch = self.c.llama_batch_init(len(ids), 0, 1)
        try:
            self._fill(batch, ids, start, want_all)
            if (status := self.c.llama_decode(self.context, batch)) != 0:
                raise WorkerError(
                    f"llama_decode answers {status} at positions {start} to {start + len(ids) - 1}"
                )
        finally:
            self.c.llama_batch_free(batch)
        return self.c.llama_get_logits(self.context), len(ids) if want_all else 1

    def _fill(self, batch: Batch, ids: list[int], start: int, want_all: bool) -> None:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = want_all or i == len(ids) - 1


def answer(runtime: Runtime, request: dict[str, Any], out: BinaryIO) -> None:
    """Do what one request says and write its answer."""
    what = request.pop("do")
    if what == "decode":
        address, n_rows = runtime.decode(request["ids"], request["start"], request["all"])
        n_bytes = n_rows * runtime.n_vocab * 4
        send(out, {"n_rows": n_rows, "n_bytes": n_bytes})
        out.write((c.c_char * n_bytes).from_address(address))
    elif what == "tokenize":
        send(out, {"ids": runtime.tokenize(**request)})
    else:
        send(out, runtime.open(**request))


def send(out: BinaryIO, message: dict[str, Any]) -> None:
    """Write one line of JSON."""
    out.write(json.dumps(message).encode("ascii") + b"\n")


def main() -> None:
    """Serve requests until standard input closes."""
    # The library may print to standard output, which is the pipe of the answers: it gets another one.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runtime: Runtime | None = None
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            if runtime is None:
                runtime = Runtime(request["library"])
                send(out, {})
            else:
                answer(runtime, request, out)
        except WorkerError as error:
            send(out, {"error": str(error)})
        out.flush()


if __name__ == "__main__":
    main()
