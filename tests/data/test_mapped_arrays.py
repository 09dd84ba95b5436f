"""A mapped array goes to a spawned worker as the name of its file; what is made of it goes with its values."""

import pickle

import numpy as np
import pytest

from trl_diffusion_sdpo.utils.mapped_arrays import map_array


def test_a_spawned_worker_maps_the_file_and_gets_copies_of_what_is_no_longer_it(tmp_path):
    file = tmp_path / "positions.npy"
    values = np.arange(40_000).reshape(-1, 4)
    np.save(file, values)
    mapped = map_array(file)
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000 and np.array_equal(pickle.loads(sent), values)
    for made in (mapped[3:], mapped[::-1], mapped.T, mapped + 1, mapped[[5, 2]], mapped.astype(np.int32), mapped[2]):
        received = pickle.loads(pickle.dumps(made))
        assert np.array_equal(received, made) and received.dtype == made.dtype
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
