"""What `guided_front.py` trains and how it samples: models, ways of sampling, and the grid from which settings are
chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from front_plan import Run, rule_settings

SEEDS = range(3, 8)  # new ones: the recipe was chosen with 0 to 2
FEW_SEEDS = range(3, 6)
PARTS = ("selection", "final")
SAMPLES_PER_PROMPT = {"selection": 2, "final": 4}
IMAGE_SEEDS = {"selection": 70_000, "final": 80_000}  # the training's seed is added
INTERVALS = {"all": None, "low": (0.0, 0.62), "high": (0.62, 1.0)}  # 0.62 is the noise level of timestep 503
STEPS = 12


@dataclass(frozen=True)
class Model:
    """What is trained, by the rules of `front_plan.py`."""

    rule: str
    strength: float = 0.0
    pairs: str = "off_policy"
    push: str = "stress"
    seeds: range = SEEDS

    def run(self, seed: int) -> Run:
        settings = rule_settings(self.rule, self.strength)
        return Run(self.rule, self.strength, settings, seed, pairs=self.pairs, push=self.push)


RECIPE, LOOSE = Model("parameter, decay", 0.8), Model("output", 0.6)
NEGATIVE = "negative"
MAIN_MODELS = {
    "SFT": Model("SFT"),
    "recipe": RECIPE,
    "loose SDPO": LOOSE,
    "DPO": Model("DPO"),
    NEGATIVE: Model("parameter, decay, swapped", 0.8, seeds=FEW_SEEDS),
}
MORE_MODELS = {
    "LoRA, recipe": replace(RECIPE, push="lora", seeds=FEW_SEEDS),
    "LoRA, loose SDPO": replace(LOOSE, push="lora", seeds=FEW_SEEDS),
    "recipe, 800 steps": Model("parameter, decay, longer", 0.8, seeds=FEW_SEEDS),
    "on-policy, recipe": replace(RECIPE, pairs="on_policy", seeds=FEW_SEEDS),
    "on-policy, loose SDPO": replace(LOOSE, pairs="on_policy", seeds=FEW_SEEDS),
    "gentle, recipe": replace(RECIPE, push="gentle", seeds=FEW_SEEDS),
    "gentle, loose SDPO": replace(LOOSE, push="gentle", seeds=FEW_SEEDS),
}
SMALLEST_MODELS = {name: replace(model, push="smallest", seeds=range(1)) for name, model in MAIN_MODELS.items()}
BASE = "base"


@dataclass(frozen=True)
class Kind:
    """A row of the table: a model and a way to go beyond it. Scales and settings are chosen for each kind.

    Args:
        model (`str`): A name of `MAIN_MODELS` or `MORE_MODELS`, or `"base"`.
        form (`str`): `"plain"`; `"prediction"` or `"both"`, the forms of `preference_guidance`, from the base;
            `"weights"`, the weights scaled from the base; `"negative"`, in the prediction from the negative model;
            `"npo"`, Diffusion-NPO's form with the negative model.
        interval (`str`): A name of `INTERVALS`.
        weights (`str`): `"raw"` or `"ema"`.
        steps (`int`): Denoising steps.
    """

    model: str
    form: str = "plain"
    interval: str = "all"
    weights: str = "raw"
    steps: int = STEPS

    @property
    def label(self) -> str:
        named = {
            "plain": "",
            "prediction": ", guided",
            "both": ", guided, both branches",
            "weights": ", weights scaled",
        }
        named |= {"negative": ", guided from the negative model", "npo": ", Diffusion-NPO"}
        parts = [self.model + named[self.form]]
        parts += (
            [{"low": "low noise only", "high": "high noise only"}[self.interval]] if self.interval != "all" else []
        )
        parts += ["EMA"] if self.weights == "ema" else []
        parts += [f"{self.steps} steps"] if self.steps != STEPS else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Setting:
    """A kind at one scale from the reference and one scale of classifier-free guidance."""

    kind: Kind
    scale: float = 1.0
    guidance: float = 1.0

    def facts(self) -> dict[str, Any]:
        """For a row."""
        return {**asdict(self.kind), "scale": self.scale, "guidance": self.guidance}


@dataclass(frozen=True)
class Sampling:
    """One row: images of a part's prompts by a model of one seed."""

    setting: Setting
    part: str
    seed: int

    @property
    def key(self) -> str:
        return "|".join(str(value) for value in (self.part, self.seed, *self.setting.facts().values()))


def grid(kind: Kind, guidance: tuple[float, ...], scales: tuple[float, ...] = (1.0,)) -> list[Setting]:
    return [Setting(kind, scale, at) for scale in scales for at in guidance]


LOW_G = (1.0, 2.0, 3.0)
RECIPE_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)


def main_grid() -> list[Setting]:
    """What the goal is about."""
    return [
        *grid(Kind(BASE), (1.0, 2.0, 3.0, 5.0, 7.5)),
        *grid(Kind("SFT"), (1.0, 2.0, 3.0, 5.0)),
        *grid(Kind("DPO"), LOW_G),
        *grid(Kind("loose SDPO"), (1.0, 1.5, 2.0, 3.0, 5.0)),
        *grid(Kind("loose SDPO", weights="ema"), (1.0, 1.5, 2.0, 3.0, 5.0)),
        *grid(Kind("recipe"), (1.0, 1.5, 2.0, 3.0, 5.0)),
        *grid(Kind("recipe", "prediction"), LOW_G, RECIPE_SCALES),
        *grid(Kind("recipe", "prediction"), (5.0,), (1.5, 2.0, 3.0)),
        *grid(Kind("recipe", "weights"), LOW_G, (1.5, 2.0, 3.0, 4.0, 6.0)),
        *grid(Kind("recipe", "prediction", "low"), LOW_G, (2.0, 4.0, 6.0)),
        *grid(Kind("recipe", "prediction", "low"), (5.0,), (2.0, 4.0)),
        *grid(Kind("recipe", "prediction", "high"), LOW_G, (2.0, 4.0, 6.0)),
    ]


def second_grid() -> list[Setting]:
    """Other references and models, more steps."""
    both = (2.0, 3.0)
    return [
        *grid(Kind("recipe", "negative"), both, (1.5, 2.0, 3.0)),
        *grid(Kind("recipe", "npo"), (2.0, 3.0, 5.0)),
        *grid(Kind(BASE, "npo"), (2.0, 3.0, 5.0)),
        *grid(Kind("recipe", steps=18), (3.0, 5.0)),
        *grid(Kind("recipe", steps=24), (3.0, 5.0)),
        *grid(Kind(BASE, steps=24), (5.0,)),
        *grid(Kind("loose SDPO", "weights"), both, (0.5, 0.75)),
        *grid(Kind("loose SDPO", "prediction"), (1.5, 2.0), (1.5,)),
        *grid(Kind("SFT", "prediction"), both, (2.0, 4.0)),
        *grid(Kind("recipe", "both"), both, (2.0, 3.0)),
        *grid(Kind("recipe", weights="ema"), (3.0, 5.0)),
        *grid(Kind("SFT", weights="ema"), (3.0, 5.0)),
        *grid(Kind("DPO", weights="ema"), (3.0,)),
    ]


def more_grid() -> list[Setting]:
    """Under other settings of the training."""
    found, high_g = [], (3.0, 5.0)
    for model in MORE_MODELS:
        found += grid(Kind(model), high_g if "recipe" in model else (2.0, 3.0))
        if "recipe" in model:
            found += grid(Kind(model, "prediction"), high_g, (3.0, 6.0))
            found += grid(Kind(model, "prediction", "low"), high_g, (4.0, 6.0))
    return found


def smallest_grid() -> list[Setting]:
    """For the tests."""
    kinds = [Kind(BASE), Kind("SFT"), Kind("loose SDPO"), Kind("recipe"), Kind("recipe", "prediction", "low")]
    kinds += [Kind("recipe", "weights", weights="ema"), Kind("recipe", "npo"), Kind("recipe", "negative")]
    return [setting for kind in kinds for setting in grid(kind, (2.0,), (1.0 if kind.form == "plain" else 2.0,))]


@dataclass(frozen=True)
class Plan:
    """Models, and the grid of settings from which each kind's is chosen."""

    models: dict[str, Model]
    settings: list[Setting]
    few: bool = False  # whether fewer seeds than the models' are measured
    is_smallest: bool = False

    def runs(self) -> list[Run]:
        """All trainings, seed by seed."""
        trained = [(model.run(seed), seed) for model in self.models.values() for seed in model.seeds]
        return [run for run, _ in sorted(trained, key=lambda pair: pair[1])]

    def seeds(self, kind: Kind) -> range:
        """The seeds on which a kind is measured."""
        if self.few:
            return FEW_SEEDS
        model = self.models.get(kind.model, next(iter(self.models.values())))  # the base is sampled with every seed
        return model.seeds


def plans() -> dict[str, Plan]:
    """By name; later ones need the trainings of `main`."""
    return {
        "main": Plan(MAIN_MODELS, main_grid()),
        "second": Plan(MAIN_MODELS, second_grid(), few=True),
        "more": Plan(MORE_MODELS, more_grid()),
        "smallest": Plan(SMALLEST_MODELS, smallest_grid(), is_smallest=True),
    }
