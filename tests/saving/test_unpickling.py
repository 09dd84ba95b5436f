"""Errors of refused pickles in a checkpoint, also those of processes that read a shard."""

import pickle

import pytest
from torch.distributed.checkpoint import CheckpointException

from trl_diffusion_sdpo.saving.unpickling import tensors_only


def of_a_process(cause: BaseException) -> CheckpointException:
    """Return the error that torch raises in all processes if the second one has failed."""
    return CheckpointException("read", {1: (cause, None)})


@pytest.mark.parametrize("raised", [pickle.UnpicklingError("os.system"), of_a_process(pickle.UnpicklingError("x"))])
def test_a_refused_pickle_is_explained(raised):
    with pytest.raises(ValueError, match="tensors, numbers and settings only"):
        with tensors_only([]):
            raise raised


@pytest.mark.parametrize("raised", [OSError("disk"), of_a_process(OSError("disk"))])
def test_other_errors_stay_what_they_are(raised):
    with pytest.raises(type(raised)) as caught:
        with tensors_only([]):
            raise raised
    assert caught.value is raised
