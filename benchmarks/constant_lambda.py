"""A constant in the place of lambda: what the safeguard adds to training losers less than winners."""

import torch

from trl_diffusion_sdpo import UserError
from trl_diffusion_sdpo.step.pair_forward import PairForward


def constant_lambda(share: float) -> type[PairForward]:
    """Return forward passes that multiply the losers' gradients by `share`.

    Set the class as `pair_forward_class` of a trainer with `safeguard="none"`. The factor multiplies those of
    `loser_noise_range` and `winner_budget`. Losses and metrics have the values that they have without it.

    Args:
        share (`float`): Factor in `[0, 1]`. 1 is Diffusion-DPO; 0 trains winners only, with the weights of the loss.

    Raises:
        `UserError`: If `share` is not in `[0, 1]`.

    Example:

    ```python
    class ConstantTrainer(DiffusionSDPOTrainer):
        pair_forward_class = constant_lambda(0.6)
    ```
    """
    if not 0 <= share <= 1:
        raise UserError(f"`share` must be in [0, 1], got {share}. Use 1 for losers as heavy as winners.")

    class ConstantLambda(PairForward):
        def loser_weights(self, noise_levels: torch.Tensor) -> torch.Tensor:
            weights = super().loser_weights(noise_levels)
            return torch.full_like(noise_levels, share) if weights is None else share * weights

    return ConstantLambda
