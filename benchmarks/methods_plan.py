"""What `methods.py` trains: losses and sources of noise as settings, one rule for their betas, and what all share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_diffusion_sdpo.demo.world import IMAGE_SIZE
from trl_diffusion_sdpo.families.loss_defaults import FALLBACK, STABLE_DIFFUSION_DEFAULTS
from trl_diffusion_sdpo.losses import LOSSES

SEEDS = range(8, 11)  # new ones: the learning rate, the schedule and mu were chosen with others
NUM_NOISE_BINS = 8
# Offset of the seed, so that generated images differ from those of other benchmarks.
IMAGE_SEEDS = {"selection": 90_000, "final": 100_000}


BASE, SFT, MAIN = "base", "sft", "sigmoid"  # MAIN is Diffusion-DPO, and safeguarded DPO with the safeguard


@dataclass(frozen=True)
class Protocol:
    """What is equal in all runs, and in all rows of a table.

    Args:
        steps (`int`): Optimizer steps.
        pairs (`int`): Of a step.
        scales (`tuple[float, ...]`): Of classifier-free guidance; each run's is chosen from them on one half of the
            prompts, and reported on the other half. 1 is none.
        selection, final (`int`): Images of each prompt of the halves.
        is_smallest (`bool`): Two prompts and few pairs: the numbers mean nothing.
    """

    steps: int = 150
    pairs: int = 16
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    selection: int = 2
    final: int = 4
    is_smallest: bool = False

    def facts(self) -> dict[str, Any]:
        """As a row of a file has them."""
        return {**asdict(self), "scales": list(self.scales), "image_seeds": IMAGE_SEEDS, "shared": SHARED}


SMALLEST = Protocol(steps=2, pairs=2, scales=(1.0, 2.0), selection=1, final=2, is_smallest=True)
SHARED = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "random_flip": False,
    "resolution": IMAGE_SIZE,
    "num_noise_bins": NUM_NOISE_BINS,
}
# The recipe for keeping winners of docs/safeguard_measurements.md and of the demo.
NO_SAFEGUARD, SAFEGUARD = "none", "parameter"
SAFEGUARDS: dict[str, dict[str, Any]] = {
    NO_SAFEGUARD: {"safeguard": "none"},
    SAFEGUARD: {"safeguard": "parameter", "safeguard_mu": 0.8},
}
ERRORS_ARE_LARGER = 50  # than those of Stable Diffusion: beta 5000 becomes the 100 of the demo and the front


def scaled_settings(loss: str) -> dict[str, Any]:
    """The rule for all losses: what multiplies a difference of errors is the package's default for Stable Diffusion
    1.5, divided by `ERRORS_ARE_LARGER`; everything else is the default.

    It is beta, but for two losses: `mapo` multiplies it with its temperature, and beta is a weight; beta of `dspo` is a
    factor of predictions.
    """
    if loss == SFT:  # has none
        return {}
    beta = STABLE_DIFFUSION_DEFAULTS.get(loss, STABLE_DIFFUSION_DEFAULTS[FALLBACK]).beta
    if loss == "mapo":
        return {"beta": beta, "mapo_temperature": LOSSES[loss].loss_kwargs["mapo_temperature"] / ERRORS_ARE_LARGER}
    return {"beta": beta if loss == "dspo" else beta / ERRORS_ARE_LARGER}


@dataclass(frozen=True)
class Method:
    """A row or two of the table.

    Args:
        loss (`str`): Whose beta is scaled.
        settings (`dict[str, Any]`): Fields of `DiffusionSDPOConfig` besides.
        has_loser (`bool`): Whether it is trained with and without the safeguard.
    """

    loss: str
    settings: dict[str, Any] = field(default_factory=dict)
    has_loser: bool = True

    def all_settings(self) -> dict[str, Any]:
        return {"loss_type": self.loss, **scaled_settings(self.loss), **self.settings}


INVERSION = {"noise_source": "inversion"}
OWN_NOISE = "own_noise"  # in rows of these: errors at the noise of training, which is not that of evaluations
LOSSES_ALONE = ("hinge", "ipo", "robust", "dspo", "dspo_sdxl", "dmpo", "mapo", "simpo", "dpop", "linear", "smpo")
METHODS: dict[str, Method] = {
    SFT: Method("sft", has_loser=False),
    MAIN: Method("sigmoid"),
    **{loss: Method(loss) for loss in LOSSES_ALONE},
    "capo": Method("capo", {"calibrated_scores": True}),
    # beta / 4 is the slope of `sigmoid` where the margin is 0: there both terms pull the winner alike.
    "sigmoid + sft": Method("sigmoid", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.5]}),
    "sft_weight": Method("sigmoid", {"sft_weight": 25.0}),
    "margin_clamp": Method("sigmoid", {"margin_clamp": 2.0}),
    "ipo + margin_clamp": Method("ipo", {"margin_clamp": 0.5}),  # at its target: nothing pulls back past it
    "auto_beta": Method("sigmoid", {"auto_beta": True}),
    "gap weights": Method("sigmoid", {"pair_weights": "gap"}),
    "gain weights": Method("sigmoid", {"pair_weights": "gain"}),
    "inverse gap weights": Method("sigmoid", {"pair_weights": "inverse_gap"}),
    "curriculum": Method("sigmoid", {"curriculum_epochs": 2.0}),  # of four
    "SUDO": Method("sigmoid", {"losers": "permute", "loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.5]}),
    "InPO": Method("sigmoid", {**INVERSION, "inversion": "ddim", "inversion_steps": 10}),
    # What the winners alone do at that noise, without any loser.
    "sft + InPO's noise": Method("sft", {**INVERSION, "inversion": "ddim", "inversion_steps": 10}, has_loser=False),
    # The oracle's scores are in [0, 1] already.
    "SmPO": Method("smpo", {**INVERSION, "inversion": "renoise", "inversion_steps": 5}),
}
ALL_NAMES = (BASE, *METHODS)


@dataclass(frozen=True)
class Run:
    """One training, or the base model."""

    method: str
    safeguard: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}|{self.safeguard}|{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Fields of `DiffusionSDPOConfig` in which methods differ; none of the base model."""
        if self.method == BASE:
            return {}
        return METHODS[self.method].all_settings() | SAFEGUARDS[self.safeguard]

    @property
    def has_own_noise(self) -> bool:
        """Whether it trains at noise by inversion, with a reference: then training logs the winners' change there."""
        return INVERSION.items() <= self.settings().items() and METHODS[self.method].has_loser

    def is_made(self, row: dict[str, Any] | None, protocol: Protocol) -> bool:
        """Whether a row is of this run, with the same settings and protocol."""
        if row is None or (OWN_NOISE in row) != self.has_own_noise:
            return False
        return (row["settings"], row["how"]) == (self.settings(), protocol.facts())


def planned(names: Sequence[str] = ALL_NAMES, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """All runs, seed by seed."""
    runs = []
    for seed in seeds:
        for name in names:
            has_loser = name != BASE and METHODS[name].has_loser
            runs += [Run(name, safeguard, seed) for safeguard in (SAFEGUARDS if has_loser else (NO_SAFEGUARD,))]
    return runs
