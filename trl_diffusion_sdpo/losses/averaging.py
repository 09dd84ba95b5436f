"""The decay of an exponential moving average of weights."""


def ema_decay(step: int, max_decay: float) -> float:
    """Weight of the old average in the update after optimizer step `step`, counted from 1.

    `min(max_decay, (1 + step) / (10 + step))`, the ramp of diffusers' `EMAModel`: with a constant decay near 1, the
    average of a short run would consist mostly of the initial weights.
    """
    return min(max_decay, (1 + step) / (10 + step))
