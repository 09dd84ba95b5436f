"""Print how often the 95 % interval of a win rate contains the true win rate, in simulated evaluations.

Three kinds of evaluations are simulated: one seed per prompt; one seed per prompt, with up to a fifth of ties; and four
seeds per prompt, where some prompts are easier to win than others. The numbers are also written as JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from trl_diffusion_sdpo.utils.statistics import rate_interval

RESULTS = Path(__file__).parent / "results" / "interval_coverage.json"
RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
PROMPTS = (20, 30, 50, 100, 200)


def one_seed(generator: np.random.Generator, rate: float, shape: tuple[int, int]) -> np.ndarray:
    return (generator.random(shape) < rate).astype(float)


def with_ties(generator: np.random.Generator, rate: float, shape: tuple[int, int]) -> np.ndarray:
    ties = min(0.2, 1 - rate)
    drawn = generator.random(shape)
    return np.where(drawn < rate - ties / 2, 1.0, np.where(drawn < rate + ties / 2, 0.5, 0.0))


def four_seeds(generator: np.random.Generator, rate: float, shape: tuple[int, int]) -> np.ndarray:
    return generator.binomial(4, generator.beta(2 * rate, 2 * (1 - rate), shape)) / 4


KINDS = {"one seed": one_seed, "one seed, ties": with_ties, "four seeds": four_seeds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=10_000, help="Simulated evaluations for each number.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = []
    for kind, draw in KINDS.items():
        print(f"| {kind}, true win rate |", " | ".join(f"{prompts} prompts" for prompts in PROMPTS), "|")
        print("|---" * (1 + len(PROMPTS)) + "|")
        for rate in RATES:
            shares = []
            for prompts in PROMPTS:
                generator = np.random.default_rng(0)
                ends = [rate_interval(rates) for rates in draw(generator, rate, (options.evaluations, prompts))]
                shares.append(float(np.mean([low <= rate <= high for low, high in ends])))
                measured.append({"kind": kind, "rate": rate, "prompts": prompts, "coverage": shares[-1]})
            print(f"| {rate} |", " | ".join(f"{share:.3f}" for share in shares), "|")
        print()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"evaluations": options.evaluations, "measured": measured}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
