"""The effect of the VAE's precision: the difference of latents in half precision to those in float32, and the time of
encoding.

Two VAEs: the demo's, which is trained, on the demo's images; and one in the shape of Stable Diffusion's (1.5 and XL
have the same), with random weights, on smooth random images. An encoding pass of every precision is timed in rounds, in
a new order each; reported is the median over rounds of the ratio to float32.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from trl_diffusion_sdpo.demo.pipeline import load_base_pipeline
from trl_diffusion_sdpo.demo.world import captions, render

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}
COARSE = 8  # side of the noise that is enlarged to a random image, which then is smooth


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    precisions = {kind: PRECISIONS[kind] for kind in options.precisions}
    device, generator = torch.device(options.device), torch.Generator().manual_seed(options.seed)
    demo = load_base_pipeline().vae
    torch.manual_seed(options.seed)
    shaped = shaped_vae(options.size)
    images = {"demo": demo_images(), options.size: smooth_images(options.images, options.side, generator)}
    rows = []
    for name, vae in (("demo", demo), (options.size, shaped)):
        encoders = {kind: encoder(vae, dtype, device) for kind, dtype in precisions.items()}
        latents = {kind: encode(images[name]).cpu() for kind, encode in encoders.items()}
        timed = options.rounds if name == options.size else 0
        seconds = time_rounds(encoders, images[name], timed, device, random.Random(options.seed))
        rows += [
            {
                "vae": name,
                "dtype": kind,
                "difference": difference(latents[kind], latents["float32"]),
                "finite": bool(latents[kind].isfinite().all()),
                "seconds": seconds[kind],
                "ratio": ratio(seconds[kind], seconds["float32"]),
            }
            for kind in precisions
        ]
    print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    options.output.write_text(json.dumps({"options": settings, "torch": torch.__version__, "rows": rows}, indent=2))


def shaped_vae(size: str) -> AutoencoderKL:
    shape = SHAPES[size]
    levels = len(shape["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(**shape, **blocks).eval()


def demo_images() -> torch.Tensor:
    """All of the demo's ideal images, `(72, 3, 32, 32)` in `[-1, 1]`."""
    pixels = torch.stack([torch.from_numpy(render(caption)) for caption in captions()])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def smooth_images(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Random images `(N, 3, side, side)` in `[-1, 1]`, smooth with a little noise."""
    coarse = torch.rand(count, 3, COARSE, COARSE, generator=generator) * 2 - 1
    large = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (large + 0.05 * torch.randn(large.shape, generator=generator)).clamp(-1, 1)


def encoder(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Encodes images to the mode of the posterior, float32."""
    copied = AutoencoderKL.from_config(vae.config)
    copied.load_state_dict(vae.state_dict())
    copied.eval().to(device, dtype)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        return copied.encode(images.to(device, dtype)).latent_dist.mode().float()

    return encode


def difference(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of the exact latents minus their channel means."""
    varying = exact - exact.mean(dim=(0, 2, 3), keepdim=True)
    return ((latents - exact).norm() / varying.norm()).item()


def time_rounds(
    encoders: dict[str, Callable], images: torch.Tensor, rounds: int, device: torch.device, generator: random.Random
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {kind: [] for kind in encoders}
    for _ in tqdm(range(rounds), unit="round", leave=False, disable=None):
        for kind in generator.sample(list(encoders), len(encoders)):
            seconds[kind].append(timed(lambda encode=encoders[kind]: encode(images), device))
    return seconds


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time on an accelerator; CPU time of the process on a CPU, which does not count other programs."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    started = clock()
    work()
    synchronize(device)
    return clock() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: list[float], exact: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(seconds, exact, strict=True)) if seconds else None


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| VAE | precision | difference of the latents | time of float32 |", "|---|---|---|---|"]
    for row in rows:
        apart = f"{row['difference']:.2%}" if row["finite"] else "not finite"
        took = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['vae']} | {row['dtype']} | {apart} | {took} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), default="sd", help="shape of the VAE with random weights")
    parser.add_argument("--images", type=int, default=2, help="images encoded at once")
    parser.add_argument("--side", type=int, default=256, help="side of these images in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="timed encodings of each precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=list(PRECISIONS),
        default=["float32", "bfloat16"],
        help="float32 among them; CPUs are very slow in float16",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output/vae_precision.json"), help="file for all numbers"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
