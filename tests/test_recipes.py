"""PT_HPU_RECIPE_CACHE_CONFIG, read as the bridge reads it."""

import os
from pathlib import Path

import pytest

from lightning_hpu_infer.recipes import FolderState, RecipeCache, folder_state, parse


@pytest.mark.parametrize(
    ("value", "cache"),
    [
        ("", RecipeCache(fields=1)),
        ("/r", RecipeCache(folder="/r", fields=1)),
        ("/r,TRUE", RecipeCache(folder="/r", delete=True, fields=2)),
        ("/r,0,8192", RecipeCache(folder="/r", megabytes=8192, fields=3)),
        ("/r,,,1", RecipeCache(folder="/r", nfs=True, fields=4)),
        (",false,1024,false", RecipeCache(megabytes=1024, fields=4)),  # the default of current releases
        ("/r,0,1,", RecipeCache(folder="/r", megabytes=1, fields=3)),  # `getline` ends with the last comma
    ],
)
def test_what_the_bridge_takes(value: str, cache: RecipeCache) -> None:
    assert parse(value) == cache


@pytest.mark.parametrize("value", ["/r,2", "/r,yes", "/r,0,-1", "/r,0,1.5", "/r,0,1,no", "/r,0,1,0,9"])
def test_what_it_refuses(value: str) -> None:
    with pytest.raises(ValueError, match="it"):
        parse(value)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert folder_state(str(tmp_path)) == FolderState.USABLE
    assert folder_state(str(tmp_path / "a" / "b")) == FolderState.USABLE
    assert folder_state(str(tmp_path / "file")) == FolderState.IMPOSSIBLE
    assert folder_state(str(tmp_path / "file" / "b")) == FolderState.IMPOSSIBLE
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert folder_state(str(tmp_path)) == FolderState.READ_ONLY
    assert folder_state(str(tmp_path / "a")) == FolderState.IMPOSSIBLE
