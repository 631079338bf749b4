"""A manifest that makes no sense is refused in one sentence, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stores import bundle_store

from storage.errors import StoreError
from storage.manifest import BUNDLES, MANIFEST, ORDER
from storage.store import Store

FROZEN = Path(__file__).resolve().parent / "frozen" / "opt-fp16"  # of version 1
HUGE = 10**400


def changed(data: Any, path: str, value: Any) -> Any:
    """A copy with another value at `a/b/0/c`."""
    data = json.loads(json.dumps(data))
    *way, last = path.split("/")
    place = data
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value
    return data


def refused(store: Path, manifest: str) -> str:
    """The sentence that opening the store with this manifest ends with."""
    (store / MANIFEST).write_text(manifest, encoding="utf-8")
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    sentence = str(caught.value)
    assert MANIFEST in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", [], "format version"),
        ("version", True, "format version True"),
        ("architecture/layers", 10**12, "1000000000000 layers"),
        ("architecture/layers", HUGE, "layers with heads"),
        ("architecture/head_dim", 0, "heads of 0"),
        ("architecture/head_dim", HUGE, "heads of 1000"),
        ("architecture/norm_epsilon", HUGE, "finite"),
        ("architecture/norm_epsilon", float("nan"), "finite"),
        ("architecture/block", "x", "one of pre_norm"),
        ("architecture/heads", 0, "sizes that cannot be"),
        ("architecture/vocabulary", -1, "sizes that cannot be"),
        ("architecture/kv_heads", 3, "evenly"),
        ("architecture/eos_tokens", "", "where list"),
        ("architecture/shared_norm", None, "where bool"),
        ("alignment", 3, "alignment of 3"),
        ("files/../x", {"bytes": 1, "xxh3_128": ""}, "a file named"),
        ("files/bundles.bin/bytes", None, "where int"),
        ("files/bundles.bin/xxh3_128", 5, "where str"),
        ("order", None, "where str"),
        ("parameters", [], "where dict"),
    ],
)
def test_version_1(path: str, value: Any, words: str, tmp_path: Path) -> None:
    store = Path(shutil.copytree(FROZEN, tmp_path / "store"))
    data = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    if path.startswith("files/.."):
        data["files"]["../x"] = value
    else:
        data = changed(data, path, value)
    assert words in refused(store, json.dumps(data))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("architecture/layers", [], "different numbers of layers"),
        ("architecture/layers/0/attention/scale", float("inf"), "finite"),
        ("architecture/layers/0/norms", {"nowhere": {"epsilon": 1.0}}, "'nowhere'"),
        ("architecture/layers/0/attention/kv_heads", 0, "sizes that cannot be"),
        ("architecture/layers/0/ffn/router", {"top_k": 2}, "its experts cannot be"),
        ("architecture/layers/0/ffn/router", {"top_k": 2, "scores": "tanh"}, "'tanh'"),
        ("architecture/layers/0/ffn/shared", {"width": 0}, "its experts cannot be"),
        ("layout", None, "NoneType"),
        ("layout/0/units", 10**300, "not its architecture's"),
        ("layout/0/width", 0, "a layer of"),
        ("layout/0/alignment", 48, "alignment of 48"),
        ("layout/0/rows", {"up": "float16"}, "units that"),
    ],
)
def test_version_2(path: str, value: Any, words: str, tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store")
    assert words in refused(store.path, json.dumps(changed(store.manifest.to_json(), path, value)))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store").path
    data = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    del data["layout"]
    assert "it lacks 'layout'" in refused(store, json.dumps(data))


def test_nesting_without_end(tmp_path: Path) -> None:
    assert "cannot be read" in refused(bundle_store(tmp_path / "store").path, "[" * 100_000)


def test_rows_that_begin_within_an_element(tmp_path: Path) -> None:
    """They were read from the wrong bytes."""
    store = bundle_store(tmp_path / "store", layers=1, d_model=6)
    data = store.manifest.to_json()
    assert data["architecture"]["d_model"] == 6
    data["architecture"]["d_model"] = data["layout"][0]["d_model"] = 7
    data["layout"][0]["rows"] = {"up": "float16", "down": "float32"}
    assert "do not begin where" in refused(store.path, json.dumps(data))


def test_a_store_without_any_unit(tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store", layers=1)
    data = changed(store.manifest.to_json(), "layout/0/units", 0)
    assert "no units" in refused(store.path, json.dumps(changed(data, "architecture/layers/0/ffn/units", 0)))


def test_an_order_that_is_not_there(tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store", shuffled=True)
    data = store.manifest.to_json()
    short = changed(data, "files/" + ORDER + "/bytes", 4)
    assert f"{ORDER} does not have the size" in refused(store.path, json.dumps(short))
    del data["files"][ORDER]
    assert f"does not list {ORDER}" in refused(store.path, json.dumps(data))


def test_a_file_that_cannot_be_looked_at(tmp_path: Path) -> None:
    store = bundle_store(tmp_path / "store").path
    (store / BUNDLES).unlink()
    (store / BUNDLES).symlink_to(BUNDLES)  # of itself
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open(store)
