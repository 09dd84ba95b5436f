"""The store of a reference's errors: what it reads is what was written under the same facts."""

import numpy as np
import pytest
import torch

from trl_diffusion_sdpo.cache import reference_errors
from trl_diffusion_sdpo.cache.reference_errors import ReferenceErrorStore

SHAPE = {"draws": 2, "pairs": 5, "levels": 3}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`store(**facts)`: shards of two pairs, so that one has a single pair."""
    monkeypatch.setattr(reference_errors, "SHARD_PAIRS", 2)
    return lambda **facts: ReferenceErrorStore(tmp_path, {"seed": 1, "data": "d", **facts}, **SHAPE)


def fill(made: ReferenceErrorStore, shards=None) -> np.ndarray:
    """Writes `100 draw + 10 pair + level`, and a half more for the loser."""
    draw, pair, level, side = np.indices((2, 5, 3, 2), dtype=np.float32)
    errors = 100 * draw + 10 * pair + level + side / 2
    for shard in made.missing() if shards is None else shards:
        made.write(shard, torch.from_numpy(errors[shard.draw, shard.pairs.start : shard.pairs.stop]))
    return errors


def test_errors_are_read_at_the_draw_and_pair_that_they_were_written_for(store):
    errors = fill(store())
    assert not store().missing()
    found = store().read()
    assert found.dtype == np.float32 and found.shape == (2, 5, 3, 2)
    assert np.array_equal(found, errors)


def test_processes_divide_the_shards_and_a_killed_one_leaves_only_its_own(store):
    shares = [store().missing(process, 2) for process in (0, 1)]
    assert sorted(shard.number for share in shares for shard in share) == list(range(6))
    fill(store(), shares[0])
    fill(store(), shares[1][:1])
    assert [shard.number for shard in store().missing()] == [shard.number for shard in shares[1][1:]]
    with pytest.raises(ValueError, match="not finished"):
        store().read()


@pytest.mark.parametrize("other", [{"seed": 2}, {"data": "e"}, {"resolution": 8}])
def test_errors_of_other_facts_are_not_read(store, other, caplog):
    fill(store())
    assert len(store(**other).missing()) == 6
    store(**other).log_difference()
    named = ", ".join(other)
    assert ("data" in other) != (f"are of another {named}" in caplog.text)


def test_a_byte_that_changed_is_found_and_its_shard_is_missing(store):
    fill(store())
    file = sorted(store().path.glob("*.arrow"))[3]
    content = bytearray(file.read_bytes())
    at = content.rindex(np.float32(111.5).tobytes())  # draw 1, pair 1, level 1, loser
    content[at] ^= 1
    file.write_bytes(content)
    assert [(shard.draw, shard.pairs) for shard in store().missing()] == [(1, range(0, 2))]
