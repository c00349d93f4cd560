"""Where types are encoded: the right devices, in turn, few at once; and nothing that mixes devices."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantize.codecs import CODECS, codec, encoder, tensors
from quantize.codecs.base import Codec
from quantize.codecs.encoder import Encoder, encoding_gpus
from quantize.codecs.fields import FieldCodec
from quantize.errors import DscqError, UsageError

COLUMNS = 512
ON_GPU = [name for name, kind in CODECS.items() if kind.gains_from_gpu]
# Not a GPU, but tensors of it know where they are, and mixing them with a CPU's is an error as it is there.
ELSEWHERE = "meta"


def test_which_types_gain_from_a_gpu() -> None:
    searched = {name for name, kind in CODECS.items() if isinstance(kind, FieldCodec)}
    assert set(ON_GPU) == {name for name in searched if not name.startswith(("IQ1", "IQ2", "IQ3"))} | {"Q8_0"}


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("name", ON_GPU)
def test_encoding_stays_on_the_device(monkeypatch: pytest.MonkeyPatch, name: str, importance: bool) -> None:
    # Without numbers there is no saying whether a code moved: let it have.
    monkeypatch.setattr(tensors, "bool", lambda _: True, raising=False)
    kind = codec(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(3, COLUMNS, device=ELSEWHERE)
        blocks = kind.encode(rows, torch.empty(COLUMNS) if importance else None)
    assert blocks.device.type == ELSEWHERE
    assert (blocks.shape, blocks.dtype) == ((3, kind.row_bytes(COLUMNS)), torch.uint8)


@pytest.mark.parametrize("name", list(CODECS))
def test_decoding_stays_on_the_device(name: str) -> None:
    kind = codec(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks = torch.empty(3, kind.row_bytes(COLUMNS), dtype=torch.uint8, device=ELSEWHERE)
        rows = kind.decode(blocks, COLUMNS)
    assert rows.device.type == ELSEWHERE
    assert (rows.shape, rows.dtype) == ((3, COLUMNS), torch.float32)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000, -1])
def test_every_kind_of_nan_rounds_to_zero(bits: int) -> None:
    assert tensors.nearest(torch.tensor([bits], dtype=torch.int32).view(torch.float32)).tolist() == [0]


def test_rounding_of_numbers_and_infinities() -> None:
    values = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.4999998, 4e6, torch.inf, -torch.inf])
    assert tensors.nearest(values).tolist()[:6] == [0, 2, 0, -2, 2, 4_000_000]
    # ggml's own trick on infinities: their bits have no mantissa.
    assert tensors.nearest(values).tolist()[6:] == [-0x400000, -0x400000]


@pytest.mark.parametrize(("name", "numbers"), [("cpu", []), ("cuda", [0, 1, 2]), ("cuda:1", [1])])
def test_a_name_means_devices(monkeypatch: pytest.MonkeyPatch, name: str, numbers: list[int]) -> None:
    monkeypatch.setattr(encoder, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert encoding_gpus(name) == tuple(torch.device("cuda", number) for number in numbers)


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}'"):
        encoding_gpus(name)


class _Recording(Codec):
    """Not registered: notes where rows arrive, and does what it is told."""

    ggml_type, file_type, block_size, block_bytes = 0, 0, 1, 1
    gains_from_gpu = True

    def __init__(self, do: Callable[[], object] = lambda: None) -> None:
        self.seen: list[str] = []
        self.do = do
        vars(self)["name"] = "Q9_9"  # a class with a name would be registered

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(rows.device.type)
        self.do()
        return torch.zeros(len(rows), 1, dtype=torch.uint8)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        raise NotImplementedError


GPUS = (torch.device("meta"), torch.device("meta", 1))


def test_slices_go_to_the_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, moves = _Recording(), []
    real_to = torch.Tensor.to

    def to(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        moves.append(device)
        return real_to(rows, "meta")

    monkeypatch.setattr(torch.Tensor, "to", to)
    encode = Encoder(GPUS).encode
    for _ in range(4):
        encode(kind, torch.ones(2, 4))
    assert moves == [*GPUS, *GPUS]
    assert kind.seen == ["meta"] * 4


def test_what_gains_nothing_stays_on_the_cpu() -> None:
    class Copying(_Recording):
        gains_from_gpu = False

    kind = Copying()
    Encoder(GPUS).encode(kind, torch.ones(3, 4))
    assert kind.seen == ["cpu"]


def test_few_slices_are_on_a_device_at_once() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def stay() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1

    encode, kind = Encoder(GPUS[:1]).encode, _Recording(stay)
    threads = [threading.Thread(target=encode, args=(kind, torch.ones(1, 4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kind.seen) == 8
    assert most == 2


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "meta: too little memory to encode Q9_9"),
        (torch.AcceleratorError("it fell off\nthe bus"), "device meta failed: it fell off"),
    ],
)
def test_a_device_that_fails_is_explained(error: Exception, text: str) -> None:
    def fail() -> None:
        raise error

    encode = Encoder(GPUS[:1]).encode
    for _ in range(3):  # more often than there is room: a failure must give it back
        with pytest.raises(DscqError, match=text) as caught:
            encode(_Recording(fail), torch.ones(1, 4))
        assert "--device cpu" in caught.value.hint
