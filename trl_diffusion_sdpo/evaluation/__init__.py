"""What a tuned model has become, on pictures and plots."""

from .noise_levels import draw_noise_levels, level_changes
from .scale_sweep import draw_scale_sweep, read_sweep, sweep_row, sweep_table, write_sweep

__all__ = [
    "draw_noise_levels",
    "draw_scale_sweep",
    "level_changes",
    "read_sweep",
    "sweep_row",
    "sweep_table",
    "write_sweep",
]
