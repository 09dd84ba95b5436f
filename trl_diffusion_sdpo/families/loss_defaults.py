"""Default settings of every loss, by kind of model: the tables that families refer to as `defaults`."""

from dataclasses import dataclass

FALLBACK = "default"  # the row for losses without one of their own


@dataclass(frozen=True)
class LossDefaults:
    """Settings of a loss that apply where the user leaves them unset.

    Attributes:
        beta (`float`): Strength of the preference, in the `beta / 2` convention of Diffusion-DPO.
        safeguard_mu (`float`): Margin of the safeguard in `[0, 1]`.
        beta_lora (`float`, *optional*): `beta` with a LoRA, if it differs.
    """

    beta: float
    safeguard_mu: float
    beta_lora: float | None = None

    def beta_for(self, *, full: bool) -> float:
        """`beta` of full tuning or of a LoRA."""
        return self.beta if full or self.beta_lora is None else self.beta_lora


# Sources of both Stable Diffusion tables: https://huggingface.co/papers/2511.03317 for sigmoid, dspo and dmpo;
# https://huggingface.co/papers/2406.06424 for MaPO's beta; the published script of
# https://huggingface.co/papers/2506.02698 for SmPO's. simpo: half of its beta is MaPO's slope at 0, T s / 2 = 250.
# capo, our choice for every model: half of sigmoid's, which gives a pair with calibrated scores 1/2 apart the slope of
# sigmoid where all margins are 0, beta / 4 there and beta / 2 here.
STABLE_DIFFUSION_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=5000.0, safeguard_mu=0.9),  # also the published numbers of sigmoid
    "capo": LossDefaults(beta=2500.0, safeguard_mu=0.9),
    "dmpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.9),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.9),
    "simpo": LossDefaults(beta=500.0, safeguard_mu=0.9),
    "smpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
}
STABLE_DIFFUSION_XL_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=5000.0, safeguard_mu=0.6),  # also the published numbers of sigmoid and smpo
    "capo": LossDefaults(beta=2500.0, safeguard_mu=0.6),
    "dmpo": LossDefaults(beta=6000.0, safeguard_mu=0.6),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.6),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.6),
    "simpo": LossDefaults(beta=500.0, safeguard_mu=0.6),
}
# For DDPM models without published numbers: those of SDXL, which predicts noise at similar sizes.
DDPM_DEFAULTS = STABLE_DIFFUSION_XL_DEFAULTS
# Our choice throughout. beta of flow models: 2000 with all weights and 100 with a LoRA, as is usual for Diffusion-DPO
# on them: errors of velocities are larger than those of noise. mu is that of SDXL, the largest model of
# https://huggingface.co/papers/2511.03317, which has none of a flow model. simpo has a tenth of the fallback, as for
# UNets; dspo, mapo and linear are as there.
FLOW_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=2000.0, safeguard_mu=0.6, beta_lora=100.0),
    "capo": LossDefaults(beta=1000.0, safeguard_mu=0.6, beta_lora=50.0),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.6),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.6),
    "simpo": LossDefaults(beta=200.0, safeguard_mu=0.6, beta_lora=10.0),
}
