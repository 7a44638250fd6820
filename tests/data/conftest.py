"""Each test of data has a cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The folder of the cache, which does not exist yet."""
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR10_PATH", raising=False)
    return tmp_path / "cache"
