"""Default settings of all losses, a table for each kind of model. A family names its table in `defaults`."""

from dataclasses import dataclass

FALLBACK = "default"  # key of the settings for all losses without an entry in a table
# `safeguard_mu` for every loss with `safeguard="parameter"`; no number is published. In docs/measurements.md, 0.8 kept
# the winners' error where it was, under harsh and gentle settings. On some kinds of pairs, a looser safeguard scored a
# little higher and let the error rise.
PARAMETER_MU = 0.8


@dataclass(frozen=True)
class LossDefaults:
    """Default settings of a loss for one kind of model.

    Attributes:
        beta (`float`): Strength of the pull towards the reference. As in Diffusion-DPO, the loss contains `beta / 2`.
        safeguard_mu (`float`): Strictness of the safeguard in output space, in `[0, 1]`. In parameter space, it is
            [`PARAMETER_MU`].
        beta_lora (`float`, *optional*): `beta` for LoRA training, if different.
    """

    beta: float
    safeguard_mu: float
    beta_lora: float | None = None

    def beta_for(self, *, full: bool) -> float:
        """Return the default beta for full training, or for LoRA training if `full` is `False`."""
        return self.beta if full or self.beta_lora is None else self.beta_lora


# Sources of both Stable Diffusion tables: https://huggingface.co/papers/2511.03317 for sigmoid, dspo and dmpo;
# https://huggingface.co/papers/2406.06424 for MaPO's beta; the script of https://huggingface.co/papers/2506.02698 for
# SmPO's; https://huggingface.co/papers/2404.04465 and https://huggingface.co/papers/2605.04653 for kto and tgo, whose
# factors of 1000 are beta / 2. Our choices: simpo's beta makes the slope of its logit, beta / 2, that of MaPO's at
# error 0, T s / 2 = 250. capo has half of sigmoid's beta: at margin 0, its slope then equals sigmoid's for a pair whose
# images' expected shares of wins differ by 1/2.
STABLE_DIFFUSION_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=5000.0, safeguard_mu=0.9),  # also the published numbers of sigmoid
    "capo": LossDefaults(beta=2500.0, safeguard_mu=0.9),
    "dmpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "kto": LossDefaults(beta=2000.0, safeguard_mu=0.9),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.9),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.9),
    "simpo": LossDefaults(beta=500.0, safeguard_mu=0.9),
    "smpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
    "tgo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
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
# Nothing is published for other DDPM models. We use those of SDXL, whose image sizes are similar.
DDPM_DEFAULTS = STABLE_DIFFUSION_XL_DEFAULTS
# All numbers for flow models are our choice. beta is 2000 for full training and 100 for a LoRA, as is usual for
# Diffusion-DPO there: velocity errors are larger than noise errors. mu is SDXL's, because
# https://huggingface.co/papers/2511.03317 states none for a flow model. simpo's beta is a tenth of the fallback's, as
# in the tables above; dspo, mapo and linear have the same beta as there.
FLOW_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=2000.0, safeguard_mu=0.6, beta_lora=100.0),
    "capo": LossDefaults(beta=1000.0, safeguard_mu=0.6, beta_lora=50.0),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.6),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.6),
    "simpo": LossDefaults(beta=200.0, safeguard_mu=0.6, beta_lora=10.0),
}
