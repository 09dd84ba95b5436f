"""The runs of `front.py`: rules for the loser's gradient, their strengths and settings, in plans."""

from dataclasses import asdict, dataclass, field
from typing import Any

from trl_diffusion_sdpo.demo.world import IMAGE_SIZE

NUM_NOISE_BINS = 8
STEPS = {"stress": 200, "gentle": 100, "lora": 200, "dmpo": 200, "smallest": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "stress": {"learning_rate": 2e-4, "beta": 100.0},
    "gentle": {"learning_rate": 1e-4, "beta": 500.0},
    "lora": {"learning_rate": 1e-3, "beta": 100.0},
    "dmpo": {"loss_type": "dmpo", "learning_rate": 2e-4, "beta": 100.0},
    "smallest": {
        "learning_rate": 2e-4,
        "beta": 100.0,
        "per_device_train_batch_size": 2,
        "winner_budget_pairs": 2,
        "winner_budget_steps": 1,
    },
}
LORA_RANK = 16
PARTS = ("selection", "final")
# Offsets of the seed, so that data differ from those of training.
PROBE_SEED, HELD_OUT_SEED, SCORE_SEED = 50_000, 30_000, 40_000
HELD_OUT_COPIES = 3  # draws of noise and timestep per held-out pair
SAMPLES_PER_PROMPT = 8
# Rows with another measurement cannot be in one table.
HOW = {"held_out": HELD_OUT_SEED, "copies": HELD_OUT_COPIES, "score": SCORE_SEED, "samples": SAMPLES_PER_PROMPT}
EMA_DECAY = 0.98
SHARED = {
    "per_device_train_batch_size": 32,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "warmup_steps": 20,
    "random_flip": False,
    "resolution": IMAGE_SIZE,
    "num_noise_bins": NUM_NOISE_BINS,
    "ema_decay": EMA_DECAY,
    "winner_budget_pairs": 32,
    "winner_budget_steps": 10,
}
UPPER = [0.62, 1.0]  # noise levels of timesteps 503 and above
DECAY = {"lr_scheduler_type": "cosine"}  # to 0 at the last step; otherwise the rate is constant after its warm-up
LONG, LONGER = {"max_steps": 400}, {"max_steps": 800}
FAST = {"learning_rate": 4e-4}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        rule (`str`): Name of the rule.
        strength (`float`): Parameter of the rule.
        settings (`dict[str, Any]`): Its fields of `DiffusionSDPOConfig`.
        seed (`int`): Seed of pairs, noise and generated images.
        pairs (`str`): `"off_policy"` or `"on_policy"`, the training pairs; held-out pairs are rendered images in both.
        push (`str`): A key of `SETTINGS`: learning rate, beta, loss, and whether a LoRA or all weights are trained.
        tried (`dict[str, Any]`): Its arguments of [`TriedTrainer`].
    """

    rule: str
    strength: float
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    pairs: str = "off_policy"
    push: str = "stress"
    tried: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.rule}|{self.strength:g}|{self.seed}|{self.pairs}|{self.push}"

    def is_made(self, row: dict[str, Any] | None) -> bool:
        """Whether a row is of this run, with the same settings and measurement."""
        return row is not None and {**asdict(self), "how": HOW} == {
            name: row.get(name) for name in (*asdict(self), "how")
        }


def rule_settings(rule: str, strength: float) -> dict[str, Any]:
    """The configuration of a rule at one strength: a margin mu, a budget, or the weight of a term.

    The name of a rule lists its parts, such as `"parameter, decay"`.
    """
    none = {"safeguard": "none"}
    output = {"safeguard": "output", "safeguard_mu": strength}
    parameter = output | {"safeguard": "parameter"}
    settings = {
        "SFT": {"loss_type": "sft"},
        "DPO": none,
        "no safeguard": none,
        "output": output,
        "parameter": parameter,
        "budget": none | {"winner_budget": strength},
        # Tried, and not in the package: see `tried_settings`.
        "winner error": none,
        "reference": none,
        "constant lambda": none,
        "fresh anchor": parameter | {"safeguard_anchor": "error"},
        "trust region": parameter | {"safeguard_mu": 0.6, "winner_budget": 1e6},
        "low pull": {},
        "relative": {},
        # Second parts of names.
        "range": {"loser_noise_range": UPPER},
        "decay": DECAY,
        "long": LONG,
        "longer": LONGER,
        "swapped": {"swap_labels": True},
        "fast": FAST,
        "pair": {"safeguard_granularity": "pair"},
        "weighted": {"safeguard_granularity": "weighted"},
        "noise bin": {"safeguard_granularity": "noise_bin"},
        "error": {"safeguard_anchor": "error"},
        "AdamW": {"safeguard_preconditioner": "adamw", "safeguard_anchor": "error"},
        "at mu 0.6": {"safeguard": "parameter", "safeguard_mu": 0.6},
        "in parameter space": {"safeguard": "parameter", "safeguard_mu": 0.1},
    }
    return {name: value for part in rule.split(", ") for name, value in settings[part].items()}


def tried_settings(rule: str, strength: float) -> dict[str, Any]:
    """Arguments of [`TriedTrainer`] for a rule; empty for rules of the package."""
    tried = {
        "winner error": {"winner_error": strength},
        "reference": {"reference_pull": strength},
        "constant lambda": {"loser_share": strength},
        "fresh anchor": {"fresh_anchor": True},
        "trust region": {"trust_region": strength},
    }.get(rule.split(", ")[0], {})
    if "low pull" in rule:  # the pull acts in the lowest two noise bins
        tried |= {"reference_pull": 1.0, "pull_below": 2 / NUM_NOISE_BINS}
    return tried | ({"relative": True} if "relative" in rule else {})


def planned(rules: dict[str, tuple[float, ...]], seeds: range, **settings: str) -> list[Run]:
    return [
        Run(rule, strength, rule_settings(rule, strength), seed, tried=tried_settings(rule, strength), **settings)
        for seed in seeds
        for rule, strengths in rules.items()
        for strength in strengths
    ]


SEEDS = range(3)
# Each rule at three strengths.
FRONT: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "output": (0.6, 0.45, 0.8),
    "SFT, decay": (0.0,),
    "parameter, decay": (0.6, 0.8, 0.9),
    "output, decay": (0.6, 0.7, 0.8),
    "output, range": (0.3, 0.45, 0.6),
    "parameter": (0.3, 0.6, 0.8),
    "DPO": (0.0,),
    "budget": (0.05, 0.1, 0.3),
    "budget, range": (0.05, 0.1, 0.3),
}
# With twice the steps.
TWICE: dict[str, tuple[float, ...]] = {
    "SFT, long": (0.0,),
    "SFT, decay, long": (0.0,),
    "output, long": (0.6,),
    "parameter, decay, long": (0.7, 0.8, 0.9),
}
# With four times the steps.
FOURFOLD: dict[str, tuple[float, ...]] = {
    "SFT, decay, longer": (0.0,),
    "output, longer": (0.6,),
    "parameter, decay, longer": (0.8, 0.9),
}
# Under other settings; with another loss than DPO's, plain is "no safeguard".
ELSEWHERE: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "SFT, decay": (0.0,),
    "output": (0.6,),
    "parameter, decay": (0.6, 0.8),
    "DPO": (0.0,),
}
OF_ANOTHER_LOSS = {"no safeguard" if rule == "DPO" else rule: strengths for rule, strengths in ELSEWHERE.items()}
# For the tests.
SMALLEST: dict[str, tuple[float, ...]] = {
    "budget, range": (0.1,),
    "winner error, low pull, decay": (1.0,),
    "fresh anchor": (0.6,),
    "trust region": (0.1,),
}
# Rules not in the package: the most promising, on all seeds.
CLOSEST: dict[str, tuple[float, ...]] = {
    "output, low pull, decay": (0.7, 0.8),
    "parameter, low pull, decay": (0.6, 0.7),
}
# The others, on one seed.
EXPLORED: dict[str, tuple[float, ...]] = {
    "winner error, decay": (0.3, 1.0, 3.0),
    "winner error, low pull, decay, long": (1.0,),
    "parameter, decay, fast": (0.8, 0.9),
    "parameter, low pull, decay, fast": (0.8,),
    "reference, at mu 0.6, decay": (0.3, 1.0),
    "constant lambda, decay": (0.3, 0.6),
    "constant lambda, range": (0.3,),
    "parameter, relative, decay": (0.6, 0.8),
    "reference, decay": (0.2, 1.0),
    "fresh anchor, decay": (0.6, 0.8),
    "trust region": (0.1,),
    "parameter, error, decay": (0.8,),
    "budget, decay": (0.05,),
    "output, pair, decay": (0.8,),
    "output, noise bin, decay": (0.8,),
    "output, weighted": (0.6,),
    "output, pair": (0.6,),
    "output, noise bin": (0.6,),
    "parameter, AdamW": (0.1,),
    "parameter, range": (0.3,),
    "budget, in parameter space": (0.1,),
}


def plans() -> dict[str, list[Run]]:
    """Named lists of runs."""
    on_policy = planned(ELSEWHERE, SEEDS, pairs="on_policy")
    gentle = planned(ELSEWHERE, SEEDS, push="gentle")
    return {
        "front": planned(FRONT, SEEDS),
        "twice": planned(TWICE, SEEDS),
        "fourfold": planned(FOURFOLD, SEEDS),
        "elsewhere": on_policy + gentle,
        "lora": planned(ELSEWHERE, SEEDS, push="lora"),
        "dmpo": planned(OF_ANOTHER_LOSS, SEEDS, push="dmpo"),
        "closest": planned(CLOSEST, SEEDS),
        "explore": planned(EXPLORED, range(1)),
        "smallest": planned(SMALLEST, range(1), push="smallest"),
    }
