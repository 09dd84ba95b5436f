"""The store of a reference's errors: what it reads is what was written under the same facts."""

import json

import numpy as np
import pytest
import torch

from trl_diffusion_sdpo.cache import reference_errors
from trl_diffusion_sdpo.cache.reference_errors import ReferenceErrorStore

SHAPE = {"epochs": 2, "pairs": 5, "timesteps": 3}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`store(**facts)`: shards of two pairs, so that one has a single pair."""
    monkeypatch.setattr(reference_errors, "SHARD_PAIRS", 2)
    return lambda **facts: ReferenceErrorStore(tmp_path, {"seed": 1, "data": "d", **facts}, **SHAPE)


def fill(made: ReferenceErrorStore, shards=None) -> np.ndarray:
    """Writes `100 epoch + 10 pair + timestep`, and a half more for the loser."""
    epoch, pair, timestep, side = np.indices((2, 5, 3, 2), dtype=np.float32)
    errors = 100 * epoch + 10 * pair + timestep + side / 2
    made.shards.path.mkdir(parents=True, exist_ok=True)
    for shard in made.missing() if shards is None else shards:
        made.write(shard, torch.from_numpy(errors[shard.epoch, shard.pairs.start : shard.pairs.stop]))
    return errors


def test_errors_are_read_at_the_draw_and_pair_that_they_were_written_for(store):
    errors = fill(store())
    assert not store().missing()
    found = store().read()
    assert found.dtype == np.float32 and found.shape == (2, 5, 3, 2)
    assert np.array_equal(found, errors)


def test_a_killed_computation_leaves_what_it_has_written(store):
    left = store().missing()
    assert [shard.number for shard in left] == list(range(6))
    store().shards.path.mkdir(parents=True)
    fill(store(), left[::2] + left[1:2])
    assert [shard.number for shard in store().missing()] == [3, 5]
    with pytest.raises(KeyError):
        store().read()


@pytest.mark.parametrize("other", [{"seed": 2}, {"data": "e"}, {"resolution": 8}])
def test_errors_of_other_facts_are_not_read(store, other):
    fill(store())
    (store().shards.path / "key.json").write_text(json.dumps(store().key))
    assert len(store(**other).missing()) == 6


def test_a_shard_that_was_cut_off_is_missing(store, caplog):
    fill(store())
    file = sorted(store().shards.path.glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-1])
    assert [(shard.epoch, shard.pairs) for shard in store().missing()] == [(1, range(0, 2))]
    assert str(file) in caplog.text
