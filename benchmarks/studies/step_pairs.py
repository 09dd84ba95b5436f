"""Study step pairs: preferences between two continuations of one noisy image, which the model makes while it learns.

In each iteration, the model denoises with noise in each step (DDIM, eta 1). At the first noise levels it draws `k` next
states, and a judge scores the clean image that each is heading for. The best and the worst are a pair: two targets for
one prediction. One optimizer step trains on the pairs of an iteration, and the next iteration draws anew. Beside it are
pairs of finished images, rounds of the model's own images, and a preference classifier on the frozen base's features,
as the judge and as guidance. Options, table and kept rows are those of `study.py`.

    python benchmarks/studies/step_pairs.py step_pairs
    python benchmarks/studies/step_pairs.py step_pairs --rows base "step pairs, 20 steps" --seeds 0

Sources: SPO (https://huggingface.co/papers/2406.04314) for weights and clipping, TailorPO
(https://huggingface.co/papers/2502.01667) for the judged clean image, PC-Diffusion
(https://huggingface.co/papers/2511.07806) for the classifier, whose network is ours.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from pair_kinds import GUIDANCE, pairs_of_kind
from peft import LoraConfig
from preference_classifier import Classifier
from study import Study, main
from torch.nn.functional import logsigmoid

from trl_diffusion_sdpo.losses.safeguard import output_scale, parameter_scale
from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE

STEPS = 12  # of the sampler, as when images are scored
OWN_PER_PROMPT = 14  # pairs for each prompt and round of own images


@dataclass(frozen=True)
class Settings:
    """Settings of a row's `online`."""

    iterations: int
    k: int = 4  # continuations of a state
    prompts: int = 48  # in an iteration
    levels: int = 8  # the first of the sampler's noise levels, at which pairs are made
    gap: float = 0.02  # a pair is dropped if the judge's scores differ by at most this much
    weights: Literal["even", "published"] = "even"  # errors in noise space, or of the state over twice its variance
    clip: float | None = None  # range of a half's ratio of probabilities around 1
    kl: float = 0.0  # weight of the squared distance from the reference's predictions
    beta: float = 50.0
    learning_rate: float = 3e-5
    safeguard: Literal["none", "output", "parameter"] = "none"
    mu: float = 0.8
    judge: Literal["oracle", "classifier"] = "oracle"


@dataclass(frozen=True)
class StepPairs:
    """Pairs of one noise level: states `(B, ...)`, their prompts, and each half's target in noise space."""

    level: int
    states: torch.Tensor
    prompts: torch.Tensor  # indices
    winner: torch.Tensor
    loser: torch.Tensor


class Sampler:
    """Predictions with classifier-free guidance, and steps of DDIM at eta 1, for a list of prompts."""

    def __init__(self, pipeline: Any, prompts: list[str]):
        self.pipeline, self.prompts = pipeline, prompts
        with torch.no_grad():
            self.texts, self.empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(STEPS)
        self.timesteps = scheduler.timesteps
        kept = scheduler.alphas_cumprod
        self.signal = torch.cat([kept[self.timesteps], kept[:1]]).double()

    def noise_at(self, unet: torch.nn.Module, level: int, states: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Return the guided prediction of the noise."""
        texts = torch.cat([self.empty[prompts], self.texts[prompts]])
        plain, with_prompt = unet(states.repeat(2, 1, 1, 1), self.timesteps[level], texts).sample.chunk(2)
        return plain + GUIDANCE * (with_prompt - plain)

    def step(self, level: int) -> tuple[float, float, float]:
        """Return a step's factors of state and predicted noise in the mean of the next state, and its variance."""
        now, after = self.signal[level], self.signal[level + 1]
        variance = (1 - after) / (1 - now) * (1 - now / after)
        of_noise = (1 - after - variance).clamp(min=0).sqrt() - (after * (1 - now) / now).sqrt()
        return float((after / now).sqrt()), float(of_noise), float(variance)

    def clean(self, level: int, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the clean latents that a prediction means."""
        signal = float(self.signal[level])
        return (states - (1 - signal) ** 0.5 * noise) / signal**0.5

    def decode(self, latents: torch.Tensor) -> Any:
        """Return images `(N, 32, 32, 3)`, uint8."""
        vae, processor = self.pipeline.vae, self.pipeline.image_processor
        images = processor.postprocess(vae.decode(latents / vae.config.scaling_factor).sample, output_type="np")
        return (images * 255).round().astype("uint8")


class StepStudy(Study):
    """A study whose rows may also learn from step pairs, from rounds of own images, or be guided by a classifier."""

    def __init__(self, plan: dict[str, Any], weights: Path):
        super().__init__(plan, weights)
        self.live: dict[Any, tuple[int, Iterator[torch.nn.Module]]] = {}  # trainings that another row may go on with
        self.classifiers: dict[int, Classifier] = {}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        row = self.plan["rows"][name]
        cost = {"cost": self.cost(self.plan["rows"][row.get("of", name)])}
        if "classifier" in row or row.get("online", {}).get("judge") == "classifier":
            cost["agreement"] = self.classifier(seed).agreement(self.held_out(seed))
        return {**super().measure(name, seed), **cost}

    def cost(self, row: dict[str, Any]) -> int:
        """Return the predictions of the denoiser that a training needs: a backward pass counts as two."""
        if "online" in row:
            online = Settings(**row["online"])
            drawn = online.prompts * (STEPS - 1) + online.levels * online.prompts * online.k
            return 2 * online.iterations * (drawn + 4 * online.levels * online.prompts)
        if not row:
            return 0
        pairs = self.plan["shared"]["max_steps"] * self.plan["shared"]["per_device_train_batch_size"]
        own = 2 * 2 * OWN_PER_PROMPT * len(self.prompts["selection"]) * STEPS if "rounds" in row else 0
        return row.get("rounds", 1) * (2 * pairs * (3 + 1) + own)

    def train(self, row: dict[str, Any], seed: int, output: str) -> torch.nn.Module:
        if "online" in row:
            return self.train_online(Settings(**row["online"]), row.get("lora_rank"), seed)
        if "rounds" not in row:
            return super().train(row, seed, output)
        pipeline = self.load_base()
        for number in range(row["rounds"]):
            made = pairs_of_kind("on_policy", pipeline, 1000 * seed + number, OWN_PER_PROMPT)
            settings = {key: value for key, value in row.items() if key != "rounds"}
            trainer = self.trainer(settings, seed, output, pipeline, self.only("selection", made))
            trainer.train()
        return trainer.denoiser

    def train_online(self, online: Settings, rank: int | None, seed: int) -> torch.nn.Module:
        """Return the denoiser after its iterations, a copy. Another row of more iterations goes on from there."""
        key = replace(online, iterations=0), rank, seed
        done, training = self.live.get(key, (online.iterations, None))
        if training is None or done >= online.iterations:
            done, training = 0, self.online_training(online, rank, seed)
        for _ in range(done, online.iterations):
            policy = next(training)
        self.live[key] = online.iterations, training
        return copy.deepcopy(policy)

    def online_training(self, online: Settings, rank: int | None, seed: int) -> Iterator[torch.nn.Module]:
        """Train on step pairs without end, and yield the denoiser after each iteration."""
        pipeline = self.load_base()
        policy, reference = pipeline.unet, self.load_base().unet.requires_grad_(False)
        sampler = Sampler(pipeline, self.prompts["selection"])
        if rank is not None:
            policy.requires_grad_(False)
            targets = ["to_k", "to_q", "to_v", "to_out.0"]
            policy.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        weights = [weight for weight in policy.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, online.learning_rate, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        judge = self.classifier(seed) if online.judge == "classifier" else None
        while True:
            drawn = draw_pairs(sampler, policy, online, generator, judge)
            total = sum(len(pairs.states) for pairs in drawn)
            halves = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
            for pairs in drawn:
                for half, found in zip(
                    halves, gradients(sampler, policy, reference, pairs, online, weights), strict=True
                ):
                    torch._foreach_add_(half, found, alpha=len(pairs.states) / total)
            scale = 1.0
            if online.safeguard == "parameter":
                flat = torch.stack([torch.cat([one.flatten() for one in half]).double() for half in halves])
                scale = float(parameter_scale(flat @ flat.T, online.mu)[0])
            for weight, winner, loser in zip(weights, *halves, strict=True):
                weight.grad = winner - scale * loser
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if total:
                optimizer.step()
            yield policy

    # ---- The classifier -------------------------------------------------------------------------------------------

    def classifier(self, seed: int) -> "Classifier":
        """Return the classifier of a seed, trained on the off-policy pairs of the training prompts."""
        if seed not in self.classifiers:
            pairs = self.only("selection", self.pairs({}, seed, OWN_PER_PROMPT))
            sampler = Sampler(self.load_base(), [*self.prompts["selection"], *self.prompts["final"]])
            self.classifiers[seed] = Classifier(sampler, pairs, seed)
        return self.classifiers[seed]

    def guidance(self, row: dict[str, Any], seed: int) -> Any:
        if "classifier" not in row:
            return super().guidance(row, seed)
        return functools.partial(self.classifier(seed).guide, scale=row["classifier"])


@torch.no_grad()
def draw_pairs(
    sampler: Sampler, policy: torch.nn.Module, online: Settings, generator: torch.Generator, judge: "Classifier | None"
) -> list[StepPairs]:
    """Denoise once with noise in each step, and return the pairs that the judge finds on the way."""
    count, k = online.prompts, online.k
    prompts = torch.randint(len(sampler.prompts), (count,), generator=generator)
    states = torch.randn(count, *LATENT_SHAPE, generator=generator)
    found = []
    for level in range(online.levels):
        noise = sampler.noise_at(policy, level, states, prompts)
        of_state, of_noise, variance = sampler.step(level)
        mean = of_state * states + of_noise * noise
        after = mean[None] + variance**0.5 * torch.randn(k, *mean.shape, generator=generator)  # (k, count, ...)
        each, flat = prompts.repeat(k), after.flatten(0, 1)
        if judge is None:
            ahead = sampler.clean(level + 1, flat, sampler.noise_at(policy, level + 1, flat, each))
            scores = oracle_score(sampler.decode(ahead), [sampler.prompts[index] for index in each])
        else:
            scores = judge.scores(level + 1, flat, each)
        scores = torch.as_tensor(scores).view(k, count)
        best, worst, rows = scores.argmax(0), scores.argmin(0), torch.arange(count)
        kept = scores[best, rows] - scores[worst, rows] > online.gap
        targets = noise + (after - mean) / of_noise  # the noise whose prediction would have led there
        winner, loser = targets[best, rows][kept], targets[worst, rows][kept]
        found.append(StepPairs(level, states[kept], prompts[kept], winner, loser))
        states = after[torch.randint(k, (count,), generator=generator), rows]
    return [pairs for pairs in found if len(pairs.states)]


def gradients(
    sampler: Sampler,
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    pairs: StepPairs,
    online: Settings,
    weights: list[torch.nn.Parameter],
) -> list[tuple[torch.Tensor, ...]]:
    """Return the winners' part `W` of the loss gradient, and the losers' `L` of the loss gradient `W - L`."""
    noise = sampler.noise_at(policy, pairs.level, pairs.states, pairs.prompts)
    with torch.no_grad():
        before = sampler.noise_at(reference, pairs.level, pairs.states, pairs.prompts)
    leaf = noise.detach().repeat(2, 1, 1, 1).requires_grad_()
    targets = torch.cat([pairs.winner, pairs.loser])
    _, of_noise, variance = sampler.step(pairs.level)
    weight = 0.5 if online.weights == "even" else of_noise**2 / (2 * variance)
    change = weight * ((leaf - targets).square() - (before.repeat(2, 1, 1, 1) - targets).square()).flatten(1).mean(1)
    if online.clip is None:
        logits = -change
    else:
        logits = torch.exp(-change).clamp(1 - online.clip, 1 + online.clip)
    winner, loser = logits.chunk(2)
    loss = -logsigmoid(online.beta * (winner - loser)).mean()
    at_winner, at_loser = torch.autograd.grad(loss, leaf)[0].chunk(2)
    if online.safeguard == "output":
        residuals = (leaf.detach() - targets).chunk(2)
        at_loser = output_scale(*residuals, branch_gradients=(at_winner, at_loser), mu=online.mu) * at_loser
    at_winner = at_winner + online.kl * 2 * (noise.detach() - before) / noise.numel()
    return [torch.autograd.grad(noise, weights, at_half, retain_graph=True) for at_half in (at_winner, -at_loser)]


if __name__ == "__main__":
    raise SystemExit(main(study_class=StepStudy))
