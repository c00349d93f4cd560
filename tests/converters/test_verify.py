"""The proof passes good files, and names what is wrong with every kind of bad one."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.gguf_file import read_head
from converters.names import gguf_name, permute
from converters.pipeline import convert
from converters.plan import ConvertOptions
from converters.proof.blame import NotTheFileError, one_line
from converters.proof.record import LATE, Proof, ProofOptions
from converters.proof.runtime import compare_tokens
from converters.runtimes import llama_cpp
from converters.targets import parse_request
from converters.tokenizer import CheckpointTokenizer
from converters.verify import Verifier, verify
from converters.vocabulary import Vocabulary
from quantize.errors import (
    CheckpointError,
    DscqError,
    RuntimeFailedError,
    TokenizerError,
    UsageError,
    VerificationError,
)
from quantize.llama import FINAL_NORM, HEAD, LlamaConfig, block_tensor
from quantize.weights import TensorSpec, Weights

MakeCheckpoint = Callable[..., Path]
Write = Callable[..., Path]

# One thread: on cores that other work shares, several wait for each other most of the time.
SHORT = ProofOptions(n_tokens=128, n_threads=1)
LONG = ProofOptions(n_tokens=5440, n_threads=1)  # the least that has a row past position 4096
needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec(llama_cpp.PACKAGE) is None, reason=f"not installed: {llama_cpp.INSTALL}"
)


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return open_checkpoint(make_checkpoint())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a converter: checkpoint and quant type to the path of the file."""

    def convert_to(checkpoint: Checkpoint, quant: str = "F16") -> Path:
        options = ConvertOptions(tmp_path / "out", force=True)
        return convert(checkpoint, [parse_request(f"gguf:{quant}")], options)[0].paths[0]

    return convert_to


@pytest.fixture
def without_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "a_package_that_is_not_installed")


def failed(proof: Proof) -> set[str]:
    return {f"{check.layer}: {check.name}" for check in proof.failures}


def with_vocabulary(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    """The checkpoint as a faulty converter would see it: some fields of its vocabulary are others."""
    old = checkpoint.tokenizer
    vocabulary: Vocabulary = replace(old.vocabulary, **changes)  # type: ignore[arg-type]
    return replace(checkpoint, tokenizer=CheckpointTokenizer(vocabulary, old.n_tokens, old.json_text))


@dataclass(frozen=True)
class Changed:
    """Weights of which some go through `change` on their way."""

    weights: Weights
    change: Callable[[str, torch.Tensor], torch.Tensor]

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.weights.specs()

    def load(self, name: str) -> torch.Tensor:
        return self.change(name, self.weights.load(name))


def flip_first_scale(path: Path, name: str) -> None:
    """Flip the sign bit of the `d` of a Q8_0 tensor's block 5."""
    head = read_head(path)
    entry = next(tensor for tensor in head.tensors if tensor.name == gguf_name(name))
    data = bytearray(path.read_bytes())
    data[head.data_start + entry.offset + 5 * 34 + 1] ^= 0x80
    path.write_bytes(data)


@needs_runtime
@pytest.mark.runtime
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_a_good_file_is_proven(checkpoint: Checkpoint, write: Write, quant: str) -> None:
    stages = []
    proof = verify(write(checkpoint, quant), checkpoint, SHORT, lambda *progress: stages.append(progress))
    assert proof.failures == ()
    assert proof.runtime.status == "proven"
    assert proof.quant_types == {quant: 2 + 7 * 2}
    assert {figure.pair for figure in proof.figures} == {
        "checkpoint -> file",
        "file -> runtime",
        "checkpoint -> runtime",
    }
    assert set(proof.seconds) == {"file", "metadata", "tensors", "forward", "runtime"}
    for stage in {stage for stage, _, _ in stages}:
        done, total = [progress[1:] for progress in stages if progress[0] == stage][-1]
        assert done == total


@needs_runtime
@pytest.mark.runtime
def test_f16_of_the_embedded_model_is_within_the_bar(demo_folder: Path, write: Write) -> None:
    demo = open_checkpoint(demo_folder)
    proof = verify(write(demo, "F16"), demo, LONG)
    assert proof.failures == ()
    in_runtime = {f.positions: f.divergence for f in proof.figures if f.pair == "checkpoint -> runtime"}
    assert max(proof.rows) > LATE
    assert in_runtime["all"].mean <= 1e-5
    assert in_runtime["late"].n_positions == max(proof.rows) - LATE


def test_one_flipped_scale_is_found(checkpoint: Checkpoint, write: Write, without_runtime: None) -> None:
    path, name = write(checkpoint, "Q8_0"), block_tensor(1, "mlp.up_proj")
    flip_first_scale(path, name)
    proof = verify(path, checkpoint, SHORT)
    assert "tensors: blocks within their tensor" in failed(proof)
    [check] = [check for check in proof.failures if check.name == "blocks within their tensor"]
    assert check.detail == f"{name} (Q8_0): 1 of 192 blocks, row 2 block 1 is off by 2 of its size"


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_swapped_permutation_is_found(
    checkpoint: Checkpoint, write: Write, without_runtime: None, quant: str
) -> None:
    def permute_once_more(name: str, tensor: torch.Tensor) -> torch.Tensor:
        rotary = "q_proj" in name or "k_proj" in name
        return permute(tensor, checkpoint.config.head_dim) if rotary else tensor

    faulty = replace(checkpoint, weights=Changed(checkpoint.weights, permute_once_more))
    proof = verify(write(faulty, quant), checkpoint, SHORT)
    tensor_checks = {"F16": "bits of float tensors", "Q8_0": "gain"}
    assert {f"tensors: {tensor_checks[quant]}", "forward: mean KL checkpoint -> file"} <= failed(proof)
    [check] = [check for check in proof.failures if check.name == tensor_checks[quant]]
    assert "q_proj" in check.detail and "k_proj" in check.detail and "v_proj" not in check.detail


@needs_runtime
@pytest.mark.runtime
def test_lost_rope_factor_is_found(checkpoint: Checkpoint, write: Write) -> None:
    assert checkpoint.config.rope_factor == 4
    lost: LlamaConfig = replace(checkpoint.config, rope_factor=1.0)
    proof = verify(write(replace(checkpoint, config=lost)), checkpoint, SHORT)
    assert {"metadata: rope_factor", "runtime: rope scale", "forward: mean KL checkpoint -> file"} <= failed(
        proof
    )
    assert "runtime: mean KL checkpoint -> runtime" in failed(proof)
    assert proof.runtime.status == "failed"
    assert "runtime: mean KL file -> runtime" not in failed(proof)


@needs_runtime
@pytest.mark.runtime
def test_rope_factor_that_only_the_runtime_loses_is_found_late(
    checkpoint: Checkpoint, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Our own reader is made to believe in the factor that the file lacks: layers (a) and (b) are content.
    path = write(replace(checkpoint, config=replace(checkpoint.config, rope_factor=1.0)))
    monkeypatch.setattr("converters.gguf_metadata._rope_factor", lambda metadata: 4.0)
    proof = verify(path, checkpoint, LONG)
    assert {name.split(":")[0] for name in failed(proof)} == {"runtime"}
    late = f", positions from {LATE}"
    assert {f"runtime: mean KL {pair} -> runtime{late}" for pair in ("file", "checkpoint")} <= failed(proof)


@needs_runtime
@pytest.mark.runtime
def test_shifted_token_ids_are_found(checkpoint: Checkpoint, write: Write) -> None:
    tokens = checkpoint.tokenizer.vocabulary.tokens
    shifted = (*tokens[:400], *tokens[401:500], tokens[400], *tokens[500:])
    proof = verify(write(with_vocabulary(checkpoint, tokens=shifted)), checkpoint, SHORT)
    assert failed(proof) == {"metadata: tokens", "runtime: token ids"}
    [check] = [check for check in proof.failures if check.name == "tokens"]
    assert check.detail == f"100 differ, first at 400: {tokens[401]!r} instead of {tokens[400]!r}"


@needs_runtime
@pytest.mark.runtime
def test_missing_bos_is_found(checkpoint: Checkpoint, write: Write) -> None:
    proof = verify(write(with_vocabulary(checkpoint, add_bos=False)), checkpoint, SHORT)
    assert failed(proof) == {"metadata: add_bos", "runtime: add_bos", "runtime: token ids"}


@needs_runtime
@pytest.mark.runtime
def test_wrong_eos_is_found(checkpoint: Checkpoint, write: Write) -> None:
    right = checkpoint.tokenizer.vocabulary.eos_id
    proof = verify(write(with_vocabulary(checkpoint, eos_id=7)), checkpoint, SHORT)
    assert failed(proof) == {"metadata: eos_id", "runtime: eos", "runtime: stop tokens"}
    assert f"the file says 7, the checkpoint {right}" in str(proof.failures[0])


@needs_runtime
@pytest.mark.runtime
def test_eos_given_at_conversion_is_the_right_one(make_checkpoint: MakeCheckpoint, write: Write) -> None:
    folder = make_checkpoint()
    completing = open_checkpoint(folder, eos="completion")
    path = write(completing)
    assert verify(path, completing, SHORT).passed
    assert "metadata: eos_id" in failed(verify(path, open_checkpoint(folder), SHORT))


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0.0])
def test_truncated_file_is_found(
    checkpoint: Checkpoint, write: Write, without_runtime: None, kept: float
) -> None:
    path = write(checkpoint)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    proof = verify(path, checkpoint, SHORT)
    assert failed(proof) == {"file: opens"}
    assert str(path) in proof.failures[0].detail


def test_all_faults_are_named_at_once(checkpoint: Checkpoint, write: Write, without_runtime: None) -> None:
    faulty = with_vocabulary(checkpoint, eos_id=7, add_bos=False)
    faulty = replace(faulty, config=replace(checkpoint.config, rope_factor=1.0))
    proof = verify(write(faulty), checkpoint, SHORT)
    assert {"metadata: eos_id", "metadata: add_bos", "metadata: rope_factor"} <= failed(proof)


def test_file_of_another_shape_is_named_and_not_run_into(
    make_checkpoint: MakeCheckpoint, write: Write, without_runtime: None
) -> None:
    other = open_checkpoint(make_checkpoint("other", num_hidden_layers=1, intermediate_size=32))
    proof = verify(write(other), open_checkpoint(make_checkpoint()), SHORT)
    assert {"metadata: n_layers", "metadata: intermediate_size", "tensors: tensor list"} <= failed(proof)


def test_without_the_runtime_the_file_is_unproven_there(
    checkpoint: Checkpoint, write: Write, without_runtime: None
) -> None:
    path = write(checkpoint)
    proof = verify(path, checkpoint, SHORT)
    assert proof.passed
    assert proof.runtime.status == "unproven in the runtime"
    assert proof.runtime.hint == llama_cpp.INSTALL
    required = verify(path, checkpoint, replace(SHORT, require_runtime=True))
    assert failed(required) == {"runtime: installed"}


@needs_runtime
@pytest.mark.runtime
def test_runtime_that_refuses_is_a_failed_check(
    checkpoint: Checkpoint, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeFailedError("refused", reasons=["one", "two"], hint="a hint")

    path = write(checkpoint)
    monkeypatch.setattr(llama_cpp.Session, "tokenize", refuse)
    proof = verify(path, checkpoint, SHORT)
    assert failed(proof) == {"runtime: runs the file"}
    assert proof.runtime.status == "failed"
    assert proof.failures[0].detail == "refused: one; two"


@needs_runtime
@pytest.mark.runtime
def test_without_a_forward_the_runtime_proves_nothing(
    checkpoint: Checkpoint, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise TypeError("a damaged file")

    path = write(checkpoint)
    monkeypatch.setattr("converters.verify.compare_forwards", damaged)
    proof = verify(path, checkpoint, SHORT)
    assert [check.detail for check in proof.failures] == ["a damaged file"]
    assert proof.runtime.status == "unproven in the runtime"


def broken_library(folder: Path) -> Path:
    library = folder / "libllama.so"
    library.write_text("no library")
    return library


def test_a_broken_library_is_the_users_mistake_and_not_the_files(
    checkpoint: Checkpoint, write: Write, tmp_path: Path
) -> None:
    options = replace(SHORT, llama_lib=broken_library(tmp_path))
    with pytest.raises(UsageError, match=r"--llama-lib .*does not load"):
        Verifier(checkpoint, options).check_runtime()
    with pytest.raises(UsageError, match=r"--llama-lib .*does not load"):
        verify(write(checkpoint), checkpoint, options)


def test_a_required_runtime_is_missed_at_once(checkpoint: Checkpoint, without_runtime: None) -> None:
    Verifier(checkpoint, SHORT).check_runtime()
    with pytest.raises(VerificationError) as error:
        Verifier(checkpoint, replace(SHORT, require_runtime=True)).check_runtime()
    assert error.value.hint == llama_cpp.INSTALL


@needs_runtime
@pytest.mark.runtime
def test_an_installed_runtime_is_ready(checkpoint: Checkpoint) -> None:
    Verifier(checkpoint, replace(SHORT, require_runtime=True)).check_runtime()


@pytest.mark.parametrize("name", [FINAL_NORM, HEAD], ids=["read by all layers", "read late"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(5, "Input/output error"), CheckpointError),
        (CheckpointError("the network is gone"), CheckpointError),
        (RuntimeError("anything"), RuntimeError),
    ],
    ids=["disk", "network", "other"],
)
@pytest.mark.parametrize("layers", ["all", "forward"])
def test_a_source_that_goes_away_is_no_fault_of_the_file(
    checkpoint: Checkpoint,
    write: Write,
    without_runtime: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    seen: type[Exception],
    layers: str,
) -> None:
    def gone(loaded: str, tensor: torch.Tensor) -> torch.Tensor:
        if loaded == name:
            raise error
        return tensor

    path = write(checkpoint)
    if layers == "forward":
        monkeypatch.setattr("converters.verify.prove_tensors", lambda *_, **__: None)
    source = replace(checkpoint, weights=Changed(checkpoint.weights, gone))
    with pytest.raises(seen, match=re.escape(error.args[-1])) as raised:
        verify(path, source, SHORT)
    if isinstance(error, OSError):
        assert str(raised.value).startswith(f"{checkpoint.provenance.source}: {name}")
    else:
        assert raised.value is error


def test_a_tokenizer_that_fails_is_no_fault_of_the_file(
    checkpoint: Checkpoint, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answering:
        def tokenize(self, texts: list[str]) -> list[list[int]]:
            return [[] for _ in texts]

    def fail(*_: object, **__: object) -> None:
        raise TokenizerError("cannot encode")

    monkeypatch.setattr(CheckpointTokenizer, "encode", fail)
    with pytest.raises(NotTheFileError, match="cannot encode"):
        compare_tokens(cast(llama_cpp.Session, Answering()), checkpoint.tokenizer)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.AcceleratorError("CUDA error: the launch failed", 719),
    ],
    ids=["gpu memory", "memory", "gpu"],
)
def test_a_machine_that_fails_is_no_fault_of_the_file(
    checkpoint: Checkpoint,
    write: Write,
    without_runtime: None,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = write(checkpoint)
    monkeypatch.setattr("converters.verify.compare_forwards", fail)
    with pytest.raises(DscqError) as raised:
        verify(path, checkpoint, SHORT)
    assert "--device cpu" in raised.value.hint


def test_errors_in_one_line() -> None:
    assert one_line(CheckpointError("bad", reasons=["a", "b"], hint="do this")) == "bad: a; b"
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"


def test_a_prediction_sets_the_bound(checkpoint: Checkpoint, write: Write, without_runtime: None) -> None:
    path = write(checkpoint, "Q8_0")
    kl = verify(path, checkpoint, SHORT).figures[0].divergence.mean
    assert verify(path, checkpoint, replace(SHORT, predicted_kl=kl / 2)).passed
    assert failed(verify(path, checkpoint, replace(SHORT, predicted_kl=kl / 4))) == {
        "forward: mean KL checkpoint -> file"
    }


def test_unknown_device_is_the_users_mistake(checkpoint: Checkpoint, write: Write) -> None:
    with pytest.raises(UsageError, match="device 'tpu' cannot be used"):
        verify(write(checkpoint), checkpoint, replace(SHORT, device="tpu"))
