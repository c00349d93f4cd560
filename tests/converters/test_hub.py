"""The hub, against a local one: a server of a few routes that counts what is asked of it."""

import errno
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from converters import hub
from converters.checkpoint import open_checkpoint
from converters.low_disk import RemoteWeights
from quantize.errors import CheckpointError

MakeCheckpoint = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/tiny-coder"


@dataclass
class FakeHub:
    """One model in a folder, served as the hub would. `downloads` are the files that were fetched whole."""

    folder: Path
    url: str = ""
    status: int = 200
    error_code: str = ""
    downloads: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)

    def api(self, path: str) -> tuple[int, Any]:
        """Answer `/api/models/...`: the model's files at a revision, its tree, its branches."""
        if not path.startswith(f"/api/models/{REPO}"):
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        rest = path.removeprefix(f"/api/models/{REPO}").split("?")[0]
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        if rest == "/refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}]
            return 200, {
                "branches": branches,
                "tags": [{"name": "v1", "ref": "r", "targetCommit": COMMIT}],
                "converts": [],
            }
        if rest.startswith("/tree/"):
            return 200, [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files
            ]
        if rest.startswith("/revision/") and rest.removeprefix("/revision/") not in (COMMIT, "main", "v1"):
            return 404, {"error": "Invalid rev id", "code": "RevisionNotFound"}
        siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
        nested = [{"rfilename": "original/consolidated.safetensors", "size": 10**15}]
        return 200, {"id": REPO, "sha": COMMIT, "siblings": siblings + nested}


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves one FakeHub; made for each test by subclassing."""

    fake: ClassVar[FakeHub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, *, send_body: bool) -> None:
        if self.fake.status != 200:
            self.reply(self.fake.status, b"{}", {"X-Error-Code": self.fake.error_code}, send_body)
        elif self.path.startswith("/api/"):
            status, content = self.fake.api(self.path)
            code = content.get("code", "") if isinstance(content, dict) else ""
            headers = {"X-Error-Code": code, "Content-Type": "application/json"}
            self.reply(status, json.dumps(content).encode(), headers, send_body)
        else:
            self.file(send_body)

    def file(self, send_body: bool) -> None:
        match = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/([^?]+)", self.path)
        file = self.fake.folder / match[2] if match and match[1] == COMMIT else None
        if file is None or not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, send_body)
            return
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
            self.fake.ranges.append((file.name, wanted[0]))
        elif send_body:
            self.fake.downloads.append(file.name)
        self.reply(status, content, headers, send_body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], send_body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send_body:
            self.wfile.write(content)


def serve_from(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fake(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A hub with one model in three shards, and an empty cache of this test's own."""
    folder = make_checkpoint("served")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(open_names(folder))
    weight_map: dict[str, str] = {}
    for i in range(3):
        shard = f"model-{i + 1:05d}-of-00003.safetensors"
        part = names[i * 7 : (i + 1) * 7]
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "notes.txt").write_text("never fetched", "utf-8")
    fake = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Handler,), {"fake": fake}))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    serve_from(fake.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def open_names(folder: Path) -> list[str]:
    from converters.config import read_config, read_json

    return list(read_config(read_json(folder / "config.json")).tensor_shapes())


def served_tensors(fake: FakeHub) -> dict[str, torch.Tensor]:
    return {n: t for file in fake.folder.glob("*.safetensors") for n, t in load_file(file).items()}


def refusal(source: str = REPO, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, quiet=True, **options)
    return caught.value


def test_a_model_is_fetched_and_opened(fake: FakeHub) -> None:
    checkpoint = open_checkpoint(REPO, quiet=True)
    for name, tensor in served_tensors(fake).items():
        assert torch.equal(checkpoint.weights.load(name), tensor)
    provenance = checkpoint.provenance
    assert (provenance.name, provenance.source, provenance.revision) == ("tiny-coder", REPO, COMMIT)
    assert provenance.licence == "mit"
    assert not {"pytorch_model.bin", "notes.txt"} & set(fake.downloads)


def test_a_second_run_fetches_nothing(fake: FakeHub) -> None:
    open_checkpoint(REPO, quiet=True)
    fake.downloads.clear()
    open_checkpoint(REPO, quiet=True)
    assert fake.downloads == []


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_revisions_are_resolved_to_the_commit(fake: FakeHub, revision: str) -> None:
    assert open_checkpoint(REPO, revision=revision, quiet=True).provenance.revision == COMMIT


def test_an_unknown_revision_lists_the_known_ones(fake: FakeHub) -> None:
    error = refusal(revision="nope")
    assert "no revision 'nope'" in error.message
    assert "main, v1" in error.hint


def test_an_unknown_model(fake: FakeHub) -> None:
    error = refusal("some-org/other")
    assert f"no such folder, and no such model on {fake.url}" in error.message


def test_a_gated_model(fake: FakeHub) -> None:
    fake.status, fake.error_code = 403, "GatedRepo"
    error = refusal()
    assert "a gated model" in error.message
    assert f"{fake.url}/{REPO}" in error.hint
    assert "hf auth login" in error.hint


def test_a_hub_that_is_down(fake: FakeHub) -> None:
    fake.status = 503
    assert "the hub answered 503" in refusal().message


def test_no_connection(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_from("http://127.0.0.1:1", monkeypatch)
    error = refusal()
    assert "http://127.0.0.1:1 cannot be reached" in error.message
    assert "Check the connection" in error.hint


def test_without_a_connection_the_cache_will_do(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(REPO, quiet=True)
    serve_from("http://127.0.0.1:1", monkeypatch)
    checkpoint = open_checkpoint(REPO, quiet=True)
    assert checkpoint.provenance.revision == COMMIT
    assert checkpoint.notes == (f"the hub was not reached; using the cached {COMMIT}",)


def test_offline_mode(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal()
    assert "HF_HUB_OFFLINE forbids" in error.message
    assert fake.downloads == []


def test_environment_variables_of_the_hub_hold(fake: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported, hence the process."""
    code = f"from converters.checkpoint import open_checkpoint as o; print(o({REPO!r}).provenance.revision)"
    environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True)
    assert done.stdout.strip() == COMMIT
    assert "model" in done.stderr or "%" in done.stderr  # huggingface_hub's own progress
    assert (tmp_path / "home" / "hub").is_dir()
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "elsewhere")}
    failed = subprocess.run(command, capture_output=True, text=True, cwd=root, env=offline)
    assert "HF_HUB_OFFLINE forbids" in failed.stderr


def test_a_download_that_does_not_fit(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    error = refusal()
    assert "300,000 free" in error.message
    assert "--low-disk" in error.hint
    assert not any(name.startswith("model-") for name in fake.downloads)


def test_a_disk_that_fills_up(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr(hub, "snapshot_download", full)
    assert "the disk is full: /cache/blob" in refusal().message


def test_a_model_with_bin_shards_only(fake: FakeHub) -> None:
    tensors = served_tensors(fake)
    for file in fake.folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(tensors, fake.folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(REPO, quiet=True)
    assert all(torch.equal(checkpoint.weights.load(n), t) for n, t in tensors.items())
    assert "needs safetensors" in refusal(low_disk=True).message
    assert open_checkpoint(REPO, headers_only=True, quiet=True).weights.specs().keys() == tensors.keys()


def test_a_model_in_one_file(fake: FakeHub) -> None:
    tensors = served_tensors(fake)
    for file in fake.folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, fake.folder / "model.safetensors")
    open_checkpoint(REPO, quiet=True)
    assert [n for n in fake.downloads if n.endswith((".safetensors", ".bin"))] == ["model.safetensors"]


def test_two_sets_of_weights_on_the_hub_are_refused(fake: FakeHub) -> None:
    save_file(served_tensors(fake), fake.folder / "model.safetensors")
    assert "two sets of weights, model.safetensors and the shards" in refusal().message
    assert not any(name.endswith(".safetensors") for name in fake.downloads)


def test_a_repository_without_weights(fake: FakeHub) -> None:
    for file in [*fake.folder.glob("*.safetensors*"), fake.folder / "pytorch_model.bin"]:
        file.unlink()
    (fake.folder / "adapter_config.json").write_text("{}", "utf-8")
    error = refusal()
    assert "no weights" in error.message
    assert "--lora" in error.hint


def test_an_index_on_the_hub_that_names_a_missing_shard(fake: FakeHub) -> None:
    (fake.folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in str(refusal())


def shards_on_disk(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.safetensors") if file.is_file())


def test_low_disk_fetches_headers_first_and_every_shard_once(fake: FakeHub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(REPO, low_disk=True, quiet=True)
    assert {name for name, _ in fake.ranges} == {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert not any(name.startswith("model-") for name in fake.downloads)
    tensors = served_tensors(fake)
    for name in checkpoint.weights.specs():
        assert torch.equal(checkpoint.weights.load(name), tensors[name])
        assert len(shards_on_disk(tmp_path / "cache")) <= 2
    fetched = [name for name in fake.downloads if name.startswith("model-")]
    assert fetched == sorted(set(fetched))
    assert len(fetched) == 3


def test_who_wants_headers_only_fetches_no_shard(fake: FakeHub) -> None:
    checkpoint = open_checkpoint(REPO, headers_only=True, quiet=True)
    assert set(checkpoint.weights.specs()) == set(checkpoint.config.tensor_shapes())
    assert not any(name.startswith("model-") for name in fake.downloads)


def test_low_disk_lists_tensors_shard_by_shard(fake: FakeHub) -> None:
    index = json.loads((fake.folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    checkpoint = open_checkpoint(REPO, low_disk=True, quiet=True)
    shards = [index[name] for name in checkpoint.weights.specs()]
    assert shards == sorted(shards)
    assert set(checkpoint.weights.specs()) == set(checkpoint.config.tensor_shapes())


def test_low_disk_in_any_order_keeps_two_shards_and_tensors_stay_valid(fake: FakeHub, tmp_path: Path) -> None:
    weights = open_checkpoint(REPO, low_disk=True, quiet=True).weights
    tensors = served_tensors(fake)
    one_of_each = list(weights.specs())[::7]
    kept = []
    for name in [*one_of_each, *one_of_each[:1], *reversed(one_of_each)]:
        kept.append((name, weights.load(name)))
        assert len(shards_on_disk(tmp_path / "cache")) <= 2
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in kept)


@pytest.mark.parametrize("by", ["close", "drop"])
def test_low_disk_leaves_nothing_behind(fake: FakeHub, tmp_path: Path, by: str) -> None:
    checkpoint = open_checkpoint(REPO, low_disk=True, quiet=True)
    weights = checkpoint.weights
    assert isinstance(weights, RemoteWeights)
    weights.load(next(iter(weights.specs())))
    assert shards_on_disk(tmp_path / "cache")
    if by == "close":
        weights.close()
    del checkpoint, weights
    gc.collect()
    assert shards_on_disk(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob("dscq-*"))


def test_low_disk_uses_what_the_cache_has_and_leaves_it(fake: FakeHub, tmp_path: Path) -> None:
    open_checkpoint(REPO, quiet=True)
    fake.downloads.clear()
    weights = open_checkpoint(REPO, low_disk=True, quiet=True).weights
    for name in weights.specs():
        weights.load(name)
    assert fake.downloads == []
    assert len(shards_on_disk(tmp_path / "cache" / "models--some-org--tiny-coder")) == 3


def test_low_disk_checks_everything_before_a_shard_is_fetched(fake: FakeHub) -> None:
    shard = fake.folder / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    del tensors["lm_head.weight"]
    save_file(tensors, shard)
    reasons = refusal(low_disk=True).reasons
    assert [reason.split(":")[0] for reason in reasons] == ["1 tensor missing", "1 tensor misshaped"]
    assert not any(name.startswith("model-") for name in fake.downloads)


def test_low_disk_when_the_connection_breaks_under_way(fake: FakeHub) -> None:
    weights = open_checkpoint(REPO, low_disk=True, quiet=True).weights
    fake.status = 404
    with pytest.raises(CheckpointError, match="some-org/tiny-coder"):
        weights.load(next(iter(weights.specs())))


def test_low_disk_knows_no_other_tensors(fake: FakeHub) -> None:
    weights = open_checkpoint(REPO, low_disk=True, quiet=True).weights
    with pytest.raises(KeyError):
        weights.load("model.layers.99.mlp.up_proj.weight")
