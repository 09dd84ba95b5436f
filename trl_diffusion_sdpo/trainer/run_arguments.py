"""Arguments about a run as such: how it stops, and from what it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that concerns a run as such: how it is interrupted and from what it resumes.

    Parameters:
        checkpoint_on_interrupt (`bool`, *optional*, defaults to `True`):
            Whether the first Ctrl-C (SIGINT) or SIGTERM lets the current step end and writes a checkpoint before
            [`~DiffusionSDPOTrainer.train`] raises `KeyboardInterrupt`. If not, the signals do what they did before.
        trust_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether to resume from a checkpoint with pickled files that could run code: files that hold more than
            tensors, numbers and settings are refused otherwise. Set it for your own checkpoints only.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new start may take an `output_dir` that holds another run, whose files are then moved into the
            folder `previous-run-1` within (`-2` and so on where there is one). Refused if not. A run that goes on from
            a checkpoint in the folder needs no leave: it moves there only what was written after that checkpoint.
    """

    checkpoint_on_interrupt: bool = field(
        default=True,
        metadata={"help": "Whether the first Ctrl-C or SIGTERM leaves a checkpoint after the current step."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Whether to resume from pickled files that could run code; for your own checkpoints only."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether a new start may take a folder that holds another run; that is moved into `previous-run-1`."
        },
    )
