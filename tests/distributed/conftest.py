"""Two processes on the CPU train every case that a test asks for. A walk in float64, written by hand and
without the code of the trainer's losses, says where they must arrive."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from distributed.runs import LORA
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from two_processes import done_of

WORKER = Path(__file__).with_name("worker.py")
# One level instead of two: engines take their time for every tensor.
UNET = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
COMMON_ARGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "beta": 500.0,
}


# ---- The cases, trained -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def start(make_sd_pipeline, make_pairs, tmp_path_factory) -> dict[str, str]:
    """Folders of what training starts from: `base`, the moved `policy`, a `lora` that is not zero, `pairs`, and the
    same pairs `masked`."""
    folder = tmp_path_factory.mktemp("engines")
    generator = torch.Generator().manual_seed(1)
    make_sd_pipeline(**UNET).save_pretrained(folder / "base")
    policy = make_sd_pipeline(**UNET)
    for parameter in policy.unet.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.save_pretrained(folder / "policy")
    unet = make_sd_pipeline(**UNET).unet
    unet.add_adapter(LoraConfig(**LORA))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    StableDiffusionPipeline.save_lora_weights(
        folder / "lora",
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    pairs = make_pairs(16)
    pairs.save_to_disk(str(folder / "pairs"))
    masked = [{**row, "mask": left_columns(1 + 7 * index % 24)} for index, row in enumerate(pairs)]
    datasets.Dataset.from_list(masked).save_to_disk(str(folder / "masked"))
    return {name: str(folder / name) for name in ("base", "policy", "lora", "pairs", "masked")}


def left_columns(count: int) -> Image.Image:
    """A mask of the size of `make_pairs` whose first `count` columns are white; with 24 it covers the whole image."""
    mask = Image.new("L", (24, 20))
    mask.paste(255, (0, 0, count, 20))
    return mask


@pytest.fixture(scope="session")
def trained(request, start, tmp_path_factory):
    """`trained(case)`: the folder where a case was trained. All selected cases share their processes."""
    folder = tmp_path_factory.mktemp("trained")
    selected = (item for item in request.session.items if item.path.parent == WORKER.parent)
    cases = [item.callspec.params["case"] for item in selected if "case" in item.fixturenames]
    # Sort by engine, because later cases are slower in a process that ran ZeRO-3.
    ordered = [whole(case, start) for case in sorted(cases, key=lambda case: case["engine"])]
    return done_of(WORKER, ordered, folder)


def whole(case: dict, start: dict[str, str]) -> dict:
    """A case with what the worker needs to build its trainer."""
    full = case["tuning"] == "full"
    return {
        **case,
        "model": start["policy" if full else "base"],
        "ref_model": start["base"] if full and not case.get("alone") else None,
        "lora": start["lora"] if case["tuning"] == "started" else None,
        "peft": LORA if case["tuning"] == "fresh" else None,
        "data": start["masked" if "mask_anchor" in case["args"] else "pairs"],
        "args": {**COMMON_ARGS, **case["args"]},
    }


# ---- The same by hand ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compared(trained, start, encoded):
    """`compared(case)`: lambdas and norms as logged and by hand, and the update's relative distance from that by
    hand."""
    walks = {}

    def compare(case: dict) -> dict:
        folder = trained(case)
        steps = optimizer_steps(folder, case["args"].get("gradient_accumulation_steps", 1))
        settings = {name: value for name, value in case.items() if name not in ("name", "engine")}
        seeds = [batch["seeds"] for step in steps for batch in step]
        key = json.dumps([settings, seeds], sort_keys=True)
        if key not in walks:
            walk = WalkByHand(whole(case, start), start, folder)
            walks[key] = walk.run([[encoded(batch) for batch in step] for step in steps])
        lambdas, norms, before, after = walks[key]
        saved = read_saved(folder / "saved", case["tuning"])
        assert saved.keys() == before.keys()
        logged = [entry for entry in json.loads((folder / "log.json").read_text()) if "safeguard/scale" in entry]
        return {
            "lambdas": lambdas,
            "logged": [entry["safeguard/scale"] for entry in logged],
            "norms": [entry["grad_norm"] for entry in logged],
            "norms_by_hand": norms,
            "update_error": distance({name: saved[name].double() for name in before}, before, after),
        }

    return compare


@pytest.fixture
def found(compared, record_property, case):
    """The results of a case. Its numbers go into the test report."""
    found = compared(case)
    for name in ("logged", "lambdas", "update_error"):
        record_property(name, found[name])
    return found


@pytest.fixture(scope="session")
def encoded(start, tmp_path_factory):
    """`encoded(batch)`: a collated batch's latents, noisy and clean, timesteps, prompt embeddings and targets, in
    float64.

    A pair's draws come from its own seed: the trainer of one process makes those that two have made.
    """
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    args = DiffusionSDPOConfig(str(tmp_path_factory.mktemp("single")), max_steps=1, report_to="none", use_cpu=True)
    trainer = DiffusionSDPOTrainer(start["base"], None, args)

    @torch.no_grad()
    def encode(batch: dict) -> dict[str, torch.Tensor]:
        latents, conditioning = trainer.pair_forward.encode(batch)
        timesteps, noise = trainer.pair_forward.draw_noise(batch["seeds"], latents)
        process = trainer.family.noise_process
        return {
            "noisy": process.add_noise(latents, noise, timesteps).double(),
            "timesteps": timesteps,
            "prompts": conditioning["prompt_embeds"].double(),
            "clean": latents.double(),
            "target": process.target(latents, noise, timesteps).double(),
            "inside": inside_of(batch["masks"]) if "masks" in batch else torch.ones(len(latents), 1, 8, 8).double(),
        }

    return encode


def inside_of(masks: torch.Tensor) -> torch.Tensor:
    """Which positions of the latents (of 2 x 2 pixels each) a mask covers, or which have a neighbour that it covers."""
    grid = masks.view(len(masks), 1, 8, 2, 8, 2).amax((3, 5))
    padded = F.pad(grid, (1, 1, 1, 1))
    shifted = [padded[..., row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
    return torch.stack(shifted).amax(0).double()


def optimizer_steps(folder: Path, accumulation: int) -> list[list[dict]]:
    """The batches of every optimizer step, of all processes together: no pair may come twice in a step."""
    ranks = [torch.load(folder / f"batches{rank}.pt", weights_only=False) for rank in (0, 1)]
    count = len(ranks[0]) // accumulation
    steps = [
        [batch for batches in ranks for batch in batches[index * accumulation : (index + 1) * accumulation]]
        for index in range(count)
    ]
    for step in steps:
        rows = torch.cat([batch["rows"] for batch in step]).tolist()
        assert len(set(rows)) == len(rows) == 2 * 2 * accumulation, rows
    return steps


def read_saved(folder: Path, tuning: str) -> dict[str, torch.Tensor]:
    """The weights as a user finds them; a LoRA's without its scale, as they train."""
    if tuning == "full":
        return UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    if (folder / "adapter_model.safetensors").is_file():
        weights = load_file(folder / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    weights = load_file(folder / "pytorch_lora_weights.safetensors")  # of the LoRA that training starts from
    return {name.removeprefix("unet."): tensor for name, tensor in weights.items()}


def distance(saved: dict, before: dict, after: dict) -> float:
    """`|saved - after| / |after - before|` over all weights."""
    off = sum((saved[name] - after[name]).square().sum() for name in before)
    moved = sum((after[name] - before[name]).square().sum() for name in before)
    return (off / moved).sqrt().item()


class WalkByHand:
    """Diffusion-DPO with the safeguard, in float64, one process and no engine.

    Per pair `e = mean (prediction - target)^2`, `u = -beta/2 ((e_w - r_w) - (e_l - r_l))`, and the loss is the mean of
    `log(1 + exp(-u))` over all pairs of an optimizer step, whichever process and micro-batch they were in.
    """

    def __init__(self, case: dict, start: dict[str, str], folder: Path):
        self.args, self.fresh = case["args"], case["tuning"] == "fresh"
        self.unet = UNet2DConditionModel.from_pretrained(case["model"], subfolder="unet").double()
        self.reference = UNet2DConditionModel.from_pretrained(start["base"], subfolder="unet").double()
        if case["tuning"] == "full":
            self.trained = dict(self.unet.named_parameters())
            return
        self.unet.add_adapter(LoraConfig(**LORA))
        self.unet.double()
        named = dict(self.unet.named_parameters())
        self.trained = {name.replace(".default.", "."): tensor for name, tensor in named.items() if "lora_" in name}
        stored = torch.load(folder / "start.pt") if self.fresh else read_saved(Path(start["lora"]), "lora")
        assert stored.keys() == self.trained.keys()
        for name, tensor in self.trained.items():
            tensor.data.copy_(stored[name])
        if not self.fresh:
            self.reference = copy.deepcopy(self.unet)

    def run(self, steps: list[list[dict]]) -> tuple[list[float], list[float], dict, dict]:
        """Lambda and the gradient's norm before clipping of each step; the weights before and after all of them."""
        before, lambdas, norms = self._weights(), [], []
        for step in steps:
            gradients = [self._branches(self._with_its_noise(batch)) for batch in step]
            direction, scale = self._direction(gradients)
            lambdas.append(scale)
            norms.append(direction.norm().item())
            self._step(direction)
        return lambdas, norms, before, self._weights()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.trained.items()}

    @torch.no_grad()
    def _with_its_noise(self, batch: dict) -> dict:
        """Return the batch. With `noise_source="inversion"`, its noise is that of the current policy by ReNoise: image
        by image, from clean latents (alpha 1) over the timesteps 1, 334 and 667 to the image's own timestep."""
        if self.args.get("noise_source") != "inversion":
            return batch
        assert self.args["inversion_kwargs"] == {"kind": "renoise", "steps": 3}
        alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
        rows = [self._inverted(batch, index, alphas) for index in range(len(batch["clean"]))]
        noisy, noise = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {**batch, "noisy": noisy, "target": noise}

    def _inverted(self, batch: dict, index: int, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row = slice(index, index + 1)
        clean, last, before = batch["clean"][row], int(batch["timesteps"][index]), torch.ones((), dtype=torch.float64)
        x = clean
        for t in [*(t for t in (1, 334, 667) if t < last), last]:
            told, after = {"timesteps": torch.tensor([t]), "prompts": batch["prompts"][row]}, alphas[t]

            def moved(e, x=x, before=before, after=after):
                return (after / before).sqrt() * (x - (1 - before).sqrt() * e) + (1 - after).sqrt() * e

            first = self._predict(self.unet, {**told, "noisy": x})
            second = self._predict(self.unet, {**told, "noisy": moved(first)})
            x, before = moved((first + second) / 2), after
        return x, (x - alphas[last].sqrt() * clean) / (1 - alphas[last]).sqrt()

    def _branches(self, batch: dict) -> dict[str, torch.Tensor]:
        """Gradients of a micro-batch: `winner`, `loser` (turned, so that both descend) and `error`; and residuals."""
        prediction = self._predict(self.unet, batch)
        with torch.no_grad():
            reference = self._predict(self.reference, batch)
        inside = batch["inside"]
        residuals = prediction - batch["target"]
        winner, loser = self._errors(residuals, inside).chunk(2)
        ref_winner, ref_loser = self._errors(reference - batch["target"], inside).chunk(2)

        def loss(winner, loser):
            u = -self.args["beta"] / 2 * ((winner - ref_winner) - (loser - ref_loser))
            return F.softplus(-u).mean()

        return {
            "winner": self._gradient(loss(winner, loser.detach())),
            "loser": -self._gradient(loss(winner.detach(), loser)),
            "error": self._gradient(winner.mean()),
            "outside": self._gradient(self._errors(prediction - reference, 1 - inside).mean()),
            "residuals": (residuals * (inside / inside.mean((1, 2, 3), keepdim=True).clamp(min=1e-9)).sqrt()).detach(),
        }

    def _predict(self, unet: UNet2DConditionModel, batch: dict) -> torch.Tensor:
        return unet(batch["noisy"], batch["timesteps"], encoder_hidden_states=batch["prompts"]).sample

    def _errors(self, residuals: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Mean square of each image over the positions that count, 0 without any."""
        channels = residuals.shape[1]
        return (residuals.square() * counted).sum((1, 2, 3)) / (channels * counted.sum((1, 2, 3))).clamp(min=1)

    def _gradient(self, value: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(value, list(self.trained.values()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def _direction(self, batches: list[dict]) -> tuple[torch.Tensor, float]:
        """The safeguarded gradient and lambda. The pull to the reference outside of masks is whole at both images, and
        no part of lambda."""
        safeguarded, scale = self._safeguarded(batches)
        return safeguarded + self.args.get("mask_anchor", 0.0) * _mean([batch["outside"] for batch in batches]), scale

    def _safeguarded(self, batches: list[dict]) -> tuple[torch.Tensor, float]:
        if self.args["safeguard"] == "output":
            scales = [self._output_scale(batch["residuals"]) for batch in batches]
            pairs = zip(batches, scales, strict=True)
            return _mean([batch["winner"] - scale * batch["loser"] for batch, scale in pairs]), _mean(scales).item()
        winner, loser, error = (_mean([batch[name] for batch in batches]) for name in ("winner", "loser", "error"))
        anchor = error if self.args.get("safeguard_kwargs", {}).get("anchor") == "error" else winner
        gain, dot = anchor @ winner, anchor @ loser
        if gain <= 0:
            scale = torch.zeros(())
        elif dot <= 0:
            scale = torch.ones(())
        else:
            scale = ((1 - self.args["safeguard_mu"]) * gain / dot).clamp(0, 1)
        return winner - scale * loser, scale.item()

    def _output_scale(self, residuals: torch.Tensor) -> torch.Tensor:
        winner, loser = residuals.chunk(2)
        dot = (winner * loser).sum()
        bound = (1 - self.args["safeguard_mu"]) * winner.square().sum() / dot
        return bound.clamp(0, 1) if dot > 0 else torch.ones((), dtype=dot.dtype)

    def _step(self, direction: torch.Tensor) -> None:
        limit, norm = self.args["max_grad_norm"], direction.norm()
        if limit and norm > limit:
            direction = direction * limit / norm
        sizes = [tensor.numel() for tensor in self.trained.values()]
        for tensor, part in zip(self.trained.values(), direction.split(sizes), strict=True):
            tensor.data -= self.args["learning_rate"] * part.view_as(tensor)


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean(0)
