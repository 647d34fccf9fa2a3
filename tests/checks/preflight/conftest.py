"""What the tests of this room share."""

import pytest


def pair(n, prompt="Say {}.", chosen="Yes {}.", rejected="No {}."):
    sides = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": said.format(n)}] for name, (role, said) in sides.items()}


PAIRS = [pair(n) for n in range(10, 26)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def thumbs(true, false):
    good = [{"prompt": p["prompt"], "completion": p["chosen"], "label": True} for p in map(pair, range(true))]
    return good + [
        {"prompt": p["prompt"], "completion": p["rejected"], "label": False} for p in map(pair, range(false))
    ]
