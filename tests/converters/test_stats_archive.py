"""The statistics archive: what is in it, what is refused, what damage is called."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.hessians import first_tokens_of
from converters.stats.archive import Archive, open_archive
from converters.stats.members import archive_bytes
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from quantize import llama
from quantize.calibrate import Calibration, Settings
from quantize.errors import ArchiveError, CalibrationError, OutputError, UsageError
from quantize.llama import block_tensor
from quantize.reference import INPUTS, ReferenceModel
from quantize.sensitivity import mean_gradients, token_weights
from quantize.states import MemoryStates
from quantize.statistics import Statistics, merge
from tests.conftest import MakeCheckpoint

IDENTITY = {"name": "three rows", "seed": 7}


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor
    kind: str


def rows_of(*lengths: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    kinds = ("completion", "chat")
    return [
        Row(torch.randint(0, 900, (n,), generator=generator), kinds[i % 2]) for i, n in enumerate(lengths)
    ]


ROWS = rows_of(40, 3, 17)


def calibrate(source: Path, folder: Path, rows: list[Row] = ROWS, **options: object) -> Archive:
    chosen = CalibrateOptions(folder, **options)  # type: ignore[arg-type]
    return calibrate_checkpoint(open_checkpoint(source), rows, IDENTITY, chosen)


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def archive(source: Path, tmp_path: Path) -> Archive:
    return calibrate(source, tmp_path / "stats")


def in_memory(source: Path, rows: list[Row]) -> dict[str, Statistics]:
    """Statistics by tensor name with states in memory, from the engine alone."""
    checkpoint = open_checkpoint(source)
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    calibration = Calibration(model, [len(row.ids) for row in rows], Settings())
    states = MemoryStates(calibration.n_tokens, model.config.hidden_size)
    calibration.embed([row.ids for row in rows], states)
    found = {}
    for layer, moments in calibration.blocks(states):
        for linear, name in INPUTS.items():
            found[block_tensor(layer, linear)] = moments[name].statistics()
    return found | {llama.HEAD: calibration.head(states).statistics()}


def test_every_linear_has_its_statistics_and_files_change_no_bit(source: Path, archive: Archive) -> None:
    wanted = in_memory(source, ROWS)
    assert archive.linears() == list(wanted)
    for name, statistics in wanted.items():
        found = archive.statistics(name)
        assert found.n_tokens == statistics.n_tokens == 60
        assert torch.equal(found.diagonal, statistics.diagonal)
        assert found.hessian is not None and statistics.hessian is not None
        scales = statistics.diagonal.sqrt()
        error = (found.hessian - statistics.hessian).abs() / (scales * scales[:, None])
        assert error.max() < 1.6e-5
    archive.verify()


def test_rows_counts_and_identity_are_kept(archive: Archive) -> None:
    rows = archive.rows()
    assert all(torch.equal(ids, row.ids) for ids, row in zip(rows.split(), ROWS, strict=True))
    assert rows.kinds == ("completion", "chat", "completion")
    counts = torch.bincount(torch.cat([row.ids for row in ROWS]), minlength=archive.config.vocab_size)
    assert torch.equal(archive.token_counts(), counts)
    manifest = archive.manifest
    assert (manifest.n_tokens, manifest.n_rows, manifest.request.corpus) == (60, 3, IDENTITY)


def test_importances_are_the_diagonals(archive: Archive) -> None:
    importances = archive.importances()
    assert str(importances) == "stats (15 entries, 3 chunks of three rows)"
    name = block_tensor(1, "mlp.down_proj")
    assert torch.equal(importances.rows[name], archive.statistics(name).diagonal)


def test_nothing_is_left_but_the_archive_and_its_size_is_as_foretold(archive: Archive) -> None:
    names = {path.name for path in archive.folder.iterdir()}
    assert names == {*archive.manifest.members, "stats.json"}
    size = sum(path.stat().st_size for path in archive.folder.iterdir())
    foretold = archive_bytes(archive.config, 60, False)
    assert size <= foretold <= size + (1 << 20) + 4 * 4096


def test_the_embedding_stands_for_a_tied_head(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    archive = calibrate(make_checkpoint(tie_word_embeddings=True), tmp_path / "stats")
    assert archive.linears()[-1] == llama.EMBEDDING
    assert archive.statistics(llama.EMBEDDING).n_tokens == 60


def test_a_tensor_without_statistics_is_named(archive: Archive) -> None:
    for name in (
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        with pytest.raises(ArchiveError, match=r"no statistics for .*\n.*layers 0 to 1"):
            archive.statistics(name)


def test_the_diagonal_alone_is_small(source: Path, archive: Archive, tmp_path: Path) -> None:
    alone = calibrate(source, tmp_path / "alone", diagonal_only=True)
    name = block_tensor(1, "mlp.down_proj")
    assert alone.statistics(name).hessian is None
    assert torch.allclose(alone.statistics(name).diagonal, archive.statistics(name).diagonal, rtol=1e-5)
    assert (alone.folder / "block-00000.safetensors").stat().st_size < 4096


def test_another_model_is_refused_with_reasons(
    archive: Archive, source: Path, make_checkpoint: MakeCheckpoint
) -> None:
    archive.check_model(open_checkpoint(source))

    def tune(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.01

    tuned = make_checkpoint("tuned", edit=tune)
    with pytest.raises(ArchiveError) as caught:
        archive.check_model(open_checkpoint(tuned))
    assert caught.value.reasons == ("model.layers.1.mlp.up_proj.weight: other values",)
    other = make_checkpoint("other", rope_theta=5000.0, num_hidden_layers=3, dtype=torch.float16)
    with pytest.raises(ArchiveError) as caught:
        archive.check_model(open_checkpoint(other))
    text = str(caught.value)
    assert "rope_theta is 5000.0, in the archive" in text
    assert "n_layers is 3, in the archive 2" in text
    assert "F16 [64], in the archive BF16 [64]" in text
    assert "more tensors" in text


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "stats.json").read_text("utf-8"))
        change(document)
        (folder / "stats.json").write_text(json.dumps(document), "utf-8")

    return apply


def cut(name: str, n_bytes: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-n_bytes])

    return apply


def flip(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 4
        (folder / name).write_bytes(data)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder: stats.json is missing"),
    "no manifest": (lambda folder: (folder / "stats.json").unlink(), "no statistics archive: stats.json"),
    "no JSON": (cut("stats.json", 20), "stats.json: damaged: "),
    "a list": (lambda folder: (folder / "stats.json").write_text("[]"), "damaged: no JSON object"),
    "another format": (edited(lambda d: d.update(format="tar")), "format 'tar', expected 'dscq-statistics'"),
    "another version": (edited(lambda d: d.update(version=2)), "version 2, this dscq reads version 1"),
    "no request": (edited(lambda d: d.pop("request")), "damaged: KeyError: 'request'"),
    "a member unlisted": (
        edited(lambda d: d["members"].pop("head.safetensors")),
        "the manifest lists no head.safetensors",
    ),
    "a member gone": (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing"),
    "truncated": (cut("block-00001.safetensors", 9), "block-00001.safetensors has "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_when_the_archive_is_opened(archive: Archive, damage: str) -> None:
    apply, message = DAMAGE[damage]
    apply(archive.folder)
    with pytest.raises(ArchiveError) as caught:
        open_archive(archive.folder)
    assert message in str(caught.value)


def test_flipped_bits_are_found_when_they_are_read(archive: Archive) -> None:
    flip("block-00001.safetensors")(archive.folder)
    opened = open_archive(archive.folder)
    opened.statistics(block_tensor(0, "mlp.up_proj"))
    with pytest.raises(ArchiveError, match=r"block-00001.safetensors: damaged: its sha256"):
        opened.statistics(block_tensor(1, "mlp.up_proj"))
    with pytest.raises(ArchiveError, match=r"block-00001.safetensors: damaged"):
        open_archive(archive.folder).verify()


def test_a_member_without_its_tensor_is_named(archive: Archive) -> None:
    path = archive.folder / "head.safetensors"
    tensors = load_file(path)
    del tensors["token_counts"]
    save_file(tensors, path)
    trusting = Archive(archive.folder, archive.manifest, {"head.safetensors"})
    with pytest.raises(ArchiveError, match="it has no token_counts"):
        trusting.token_counts()


def test_unknown_members_are_passed_over(archive: Archive) -> None:
    note = {"n_bytes": 2, "sha256": "0" * 64}
    (archive.folder / "shifted.bin").write_bytes(b"ab")
    edited(lambda d: d["members"].update({"shifted.bin": note}))(archive.folder)
    assert open_archive(archive.folder).statistics(llama.HEAD).n_tokens == 60


def test_adding_rows_gives_the_statistics_of_all(source: Path, archive: Archive, tmp_path: Path) -> None:
    new = rows_of(25, 8, seed=1)
    added = calibrate(source, tmp_path / "sum", rows=new, add=archive.folder)
    together = calibrate(source, tmp_path / "together", rows=ROWS + new)
    assert torch.equal(added.rows().ids, together.rows().ids)
    assert torch.equal(added.token_counts(), together.token_counts())
    assert added.manifest.n_tokens == 93
    assert added.manifest.request.corpus["to"] == IDENTITY
    for name in added.linears():
        one, other = added.statistics(name), together.statistics(name)
        assert one.n_tokens == other.n_tokens == 93
        assert torch.allclose(one.diagonal, other.diagonal, rtol=1e-5)
        assert one.hessian is not None and other.hessian is not None
        scales = one.diagonal.sqrt()
        # Two packings, half a step of the correlation each.
        assert ((one.hessian - other.hessian).abs() / (scales * scales[:, None])).max() < 5e-5
    assert merge(archive.statistics(llama.HEAD), added.statistics(llama.HEAD)).n_tokens == 153


def test_adding_needs_the_same_model_and_kind(
    source: Path, archive: Archive, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = make_checkpoint("other", seed=1)
    with pytest.raises(ArchiveError, match=r"cannot be added to\n.*other values"):
        calibrate(other, tmp_path / "sum", add=archive.folder)
    with pytest.raises(ArchiveError, match="one has Hessians, the other the diagonals only"):
        calibrate(source, tmp_path / "sum", add=archive.folder, diagonal_only=True)
    with pytest.raises(UsageError, match="cannot be added to itself"):
        calibrate(source, archive.folder, add=archive.folder)


def test_rows_that_the_model_cannot_take_are_all_named(source: Path, tmp_path: Path) -> None:
    bad = [Row(torch.tensor([], dtype=torch.int64), "a"), Row(torch.tensor([5, 99999]), "a")]
    with pytest.raises(UsageError) as caught:
        calibrate(source, tmp_path / "stats", rows=bad)
    assert caught.value.reasons == ("row 0 is empty", "row 1 has token ids from 5 to 99999")
    with pytest.raises(UsageError, match="there are none"):
        calibrate(source, tmp_path / "stats", rows=[])
    with pytest.raises(UsageError, match="micro-batch of 0 tokens"):
        calibrate(source, tmp_path / "stats", micro_batch=0)


def test_somebody_elses_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not empty: .*thesis\.tex"):
        calibrate(source, tmp_path)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(OutputError, match=r"not empty: .*model\.safetensors"):
        calibrate(source, source, fresh=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_gradients_are_averaged_over_later_tokens(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint, options = open_checkpoint(source), CalibrateOptions(tmp_path / "stats")
    archive = calibrate_checkpoint(checkpoint, ROWS, {}, options, on_weights=lambda *done: seen.append(done))
    expected = mean_gradients(
        ReferenceModel(checkpoint.config, checkpoint.weights), [row.ids for row in ROWS]
    )
    found = archive.gradients()
    assert found is not None
    assert found == pytest.approx({block_tensor(*place): value for place, value in expected.means.items()})
    G, embedding = archive.statistics(llama.EMBEDDING), expected.embedding
    assert G.n_tokens == embedding.n_tokens and G.hessian is not None and embedding.hessian is not None
    assert torch.allclose(G.hessian, embedding.hessian, atol=1e-4 * float(embedding.hessian.max()))
    assert seen[-1] == (2 * checkpoint.config.n_layers, 2 * checkpoint.config.n_layers)
    more = calibrate(source, tmp_path / "more", rows=rows_of(9, seed=1), add=archive.folder)
    other = calibrate(source, tmp_path / "other", rows=rows_of(9, seed=1))
    sums, name = more.gradients(), "model.layers.0.mlp.up_proj.weight"
    own = other.gradients()
    assert own is not None and sums is not None
    n_tokens = archive.manifest.n_tokens, other.manifest.n_tokens
    mean = (found[name] * n_tokens[0] + own[name] * n_tokens[1]) / sum(n_tokens)
    assert sums[name] == pytest.approx(mean, rel=1e-5)
    joined = merge(G, other.statistics(llama.EMBEDDING)).hessian
    both = more.statistics(llama.EMBEDDING).hessian
    assert both is not None and joined is not None
    assert torch.allclose(both, joined, atol=1e-4 * float(joined.max()))


def test_archives_from_before_gradients_were_the_rule_have_none(source: Path, tmp_path: Path) -> None:
    diagonals = calibrate(source, tmp_path / "diagonals", diagonal_only=True)
    assert diagonals.gradients() is None and not diagonals.knows_embedding
    with pytest.raises(ArchiveError, match=r"no statistics for model\.embed_tokens\.weight"):
        diagonals.statistics(llama.EMBEDDING)


def test_tokens_count_by_their_gradients_where_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    archive = calibrate(source, tmp_path / "weighed", sensitivity=True)
    assert archive.sensitive and not (tmp_path / "weighed" / "weights.safetensors").exists()
    checkpoint = open_checkpoint(source)
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    found = token_weights(model, [row.ids for row in ROWS], 1000)
    states = list(model.embed([row.ids for row in ROWS]))
    for layer in range(checkpoint.config.n_layers):
        block, seen = model.widen(model.read_block(layer)), dict[str, list[torch.Tensor]]()

        def see(name: str, x: torch.Tensor, _: int, seen: dict[str, list[torch.Tensor]] = seen) -> None:
            seen.setdefault(name, []).append(x)

        with torch.no_grad():
            states = [model.forward_block(block, state, [len(state)], see) for state in states]
        for linear, name in INPUTS.items():
            x, weights = torch.cat(seen[name]), found.of(layer, name)
            assert weights is not None
            H = archive.statistics(block_tensor(layer, linear)).hessian
            assert H is not None
            assert torch.allclose(
                H, (x * weights[:, None]).T @ x / len(x), rtol=1e-3, atol=1e-4 * float(H.max())
            )
    gradients = archive.gradients()
    assert gradients is not None and gradients.keys() == set(archive.linears()) - {llama.HEAD}
    place = 1, "mlp.down_proj"
    assert gradients[block_tensor(*place)] == pytest.approx(found.gradients[place], rel=1e-4)
    # The output matrix's inputs count alike, as do all of an archive that was not asked to weigh.
    plain = calibrate(source, tmp_path / "plain")
    assert not plain.sensitive
    assert torch.equal(archive.statistics(llama.HEAD).diagonal, plain.statistics(llama.HEAD).diagonal)
    with pytest.raises(ArchiveError) as caught:
        calibrate(source, tmp_path / "sum", rows=rows_of(9, seed=1), add=plain.folder, sensitivity=True)
    assert caught.value.reasons == ("in one tokens count by their gradients, in the other alike",)
    with pytest.raises(ArchiveError, match="another request") as caught:
        calibrate(source, tmp_path / "plain", sensitivity=True)
    assert any("tokens" in reason for reason in caught.value.reasons)


def test_noise_is_in_the_hessians_and_nowhere_else(source: Path, tmp_path: Path) -> None:
    noise = [Row(row.ids, "noise") for row in rows_of(21, seed=5)]
    rows = [ROWS[0], *noise, *ROWS[1:]]
    text, both = calibrate(source, tmp_path / "text"), calibrate(source, tmp_path / "both", rows=rows)
    alone = calibrate(source, tmp_path / "alone", rows=noise)
    place = block_tensor(1, "mlp.up_proj")

    def joined(one: Archive) -> torch.Tensor:
        H = merge(one.statistics(place), alone.statistics(place)).hessian
        assert H is not None
        return H

    def close(archive: Archive, expected: torch.Tensor) -> bool:
        H = archive.statistics(place).hessian
        return H is not None and torch.allclose(H, expected, atol=1e-4 * float(expected.max()))

    assert close(both, joined(text)) and not close(both, joined(both))
    assert both.gradients() == pytest.approx(text.gradients(), rel=1e-5)
    assert torch.equal(*(a.statistics(llama.EMBEDDING).diagonal for a in (both, text)))
    assert torch.equal(both.token_counts(), text.token_counts())
    firsts = [first_tokens_of(open_checkpoint(source), archive) for archive in (both, text)]
    assert torch.equal(firsts[0].counts, firsts[1].counts) and int(firsts[0].counts.sum()) == len(ROWS)
    other = calibrate(source, tmp_path / "other", rows=rows_of(9, seed=1)).gradients()
    more = calibrate(source, tmp_path / "more", rows=rows_of(9, seed=1), add=both.folder).gradients()
    own = text.gradients()
    assert own is not None and other is not None and more is not None
    n_text = text.manifest.n_tokens
    assert more[place] == pytest.approx((own[place] * n_text + other[place] * 9) / (n_text + 9), rel=1e-5)
    # What the text's tokens count by their gradients is 1 on average, as noise does.
    weighed = calibrate(source, tmp_path / "weighed", sensitivity=True)
    both = calibrate(source, tmp_path / "weighed-both", rows=rows, sensitivity=True)
    assert close(both, joined(weighed)) and not close(both, joined(text))


def test_too_little_room_is_seen_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="not enough room"):
        calibrate(source, tmp_path / "stats")
    assert not list((tmp_path / "stats").glob("states*"))


def test_rows_left_out_are_recorded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][950, 7] = torch.nan

    source = make_checkpoint(edit=spoil)
    rows = [*ROWS, Row(torch.tensor([4, 950, 6]), "chat")]
    with pytest.raises(CalibrationError, match="layer 0, attention_input: row 3"):
        calibrate(source, tmp_path / "stats", rows=rows)
    archive = calibrate(source, tmp_path / "dropped", rows=rows, on_nonfinite="drop")
    assert archive.manifest.dropped == ((3, 0, "attention_input"),)
    assert archive.statistics(block_tensor(1, "mlp.up_proj")).n_tokens == 60
    added = calibrate(source, tmp_path / "sum", rows=rows[2:], on_nonfinite="drop", add=archive.folder)
    assert added.manifest.dropped == ((3, 0, "attention_input"), (5, 0, "attention_input"))
    weighed = calibrate(source, tmp_path / "weighed", rows=rows, on_nonfinite="drop", sensitivity=True)
    assert weighed.manifest.dropped == archive.manifest.dropped
    assert bool(weighed.statistics(block_tensor(1, "mlp.up_proj")).diagonal.isfinite().all())
    with pytest.raises(CalibrationError, match="nothing is left to calibrate on"):
        calibrate(source, tmp_path / "none", rows=rows[3:], on_nonfinite="drop")
