"""What tells weights from others under the same name, without reading them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.runtime.fingerprint import adapter_fingerprint, fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, size in (("a.safetensors", 10), ("b.safetensors", 20), ("config.json", 5)):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, ns=(10**18, 10**18))
    return folder


def test_equal_while_nothing_changes(model: Path) -> None:
    before = fingerprint(str(model))
    assert len(before) == 2
    json.dumps(before)
    assert fingerprint(str(model)) == before


@pytest.mark.parametrize("change", ["size", "time", "name", "more", "fewer", "swapped"])
def test_what_changes_it(model: Path, change: str) -> None:
    before = fingerprint(str(model))
    first, second = model / "a.safetensors", model / "b.safetensors"
    if change == "size":
        first.write_bytes(bytes(11))
        os.utime(first, ns=(10**18, 10**18))
    elif change == "time":
        os.utime(first, ns=(10**18, 10**18 + 1))
    elif change == "name":
        first.rename(model / "c.safetensors")
    elif change == "more":
        (model / "c.gguf").write_bytes(b"")
    elif change == "fewer":
        second.unlink()
    else:
        first.rename(model / "x")
        second.rename(first)
        (model / "x").rename(second)
    assert fingerprint(str(model)) != before


def test_what_is_no_weights_does_not_count(model: Path) -> None:
    before = fingerprint(str(model))
    (model / "config.json").write_text("other")
    (model / "README.md").write_text("read me")
    assert fingerprint(str(model)) == before


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "pth", "gguf"])
def test_kinds_of_weights(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"w.{suffix}").write_bytes(b"1")
    assert len(fingerprint(str(tmp_path))) == 1


def test_a_single_file(model: Path) -> None:
    before = fingerprint(str(model / "config.json"))
    assert len(before) == 1
    (model / "config.json").write_text("longer than before")
    assert fingerprint(str(model / "config.json")) != before


def test_a_link_into_a_hubs_cache_is_named_by_the_blob(tmp_path: Path) -> None:
    """Two revisions of equal size and time differ in the blobs that they link to."""
    digests = []
    for blob in ("blob1", "blob2"):
        (tmp_path / blob).write_bytes(bytes(10))
        os.utime(tmp_path / blob, ns=(10**18, 10**18))
        snapshot = tmp_path / f"snapshot-of-{blob}"
        snapshot.mkdir()
        (snapshot / "w.safetensors").symlink_to(Path("..") / blob)
        digests.append(fingerprint(str(snapshot)))
    assert digests[0] != digests[1]
    assert "blob1" in str(digests[0])


def test_where_it_lies_does_not_count(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model))
    model.rename(tmp_path / "elsewhere")
    assert fingerprint(str(tmp_path / "elsewhere")) == before


# ---- hubs ----


class Hub:
    commit: str | None = "abc123"
    asked: tuple[Any, ...] = ()
    fails = False

    def try_to_load_from_cache(self, model: str, file: str, revision: str | None = None) -> Any:
        self.asked = (model, file, revision)
        if self.fails:
            raise ValueError("not a name")
        return f"/cache/snapshots/{self.commit}/config.json" if self.commit else object()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    module = SimpleNamespace(try_to_load_from_cache=hub.try_to_load_from_cache)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", module)
    return hub


def test_a_models_commit(hub: Hub) -> None:
    assert fingerprint("org/model", "main") == ["org/model", "main", "abc123"]
    assert hub.asked == ("org/model", "config.json", "main")
    hub.commit = "def456"  # `main` has moved on
    assert fingerprint("org/model", "main") == ["org/model", "main", "def456"]


def test_a_model_that_is_in_no_cache(hub: Hub) -> None:
    hub.commit = None
    assert fingerprint("org/model") == ["org/model", None, None]
    hub.fails = True
    assert fingerprint("not a name") == ["not a name", None, None]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert fingerprint("org/model", "v1") == ["org/model", "v1", None]


# ---- adapters ----


def test_an_adapter_is_looked_at_once_for_each_id(tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"1")
    first = adapter_fingerprint(str(tmp_path), 1)
    weights.write_bytes(b"22")
    assert adapter_fingerprint(str(tmp_path), 1) == first
    assert adapter_fingerprint(str(tmp_path), 2) != first
