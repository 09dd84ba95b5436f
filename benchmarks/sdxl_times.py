"""Times of SDXL's VAE and UNet at their true size, with random weights, for one image of 1024 by 1024.

CPU time on one thread, the smallest of some calls: 5.5 GB of memory and five minutes, in a process for each network and
precision. Writes `benchmarks/results/sdxl_times.json`, from which the page on performance is made.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published_flops import construct, denoiser_inputs
from tqdm.auto import tqdm

from trl_diffusion_sdpo.planning.published import PIPELINES

FILE = Path(__file__).parent / "results" / "sdxl_times.json"
NETWORKS = {"vae float32": torch.float32, "unet bfloat16": torch.bfloat16}


@torch.no_grad()
def seconds_of(name: str, side: int, calls: int) -> float:
    """The smallest time of a forward pass; one on a small image comes first."""
    dtype, components = NETWORKS[name], PIPELINES["sdxl"].components
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    if name.startswith("vae"):
        vae, pixels = construct(*components["vae"]).eval(), torch.randn(1, 3, side, side)
        vae.encode(pixels[:, :, :128, :128])
        return min(timed(lambda: vae.encode(pixels)) for _ in range(calls))
    unet = construct(*components["unet"]).eval()
    inputs = filled(denoiser_inputs("sdxl", unet, side)) | {"timestep": torch.tensor([500])}
    unet(**{**inputs, "sample": inputs["sample"][:, :, :16, :16]})
    return min(timed(lambda: unet(**inputs)) for _ in range(calls))


def filled(inputs: dict[str, Any]) -> dict[str, Any]:
    """Random numbers in place of all tensors."""
    return {
        name: filled(value) if isinstance(value, dict) else torch.randn(value.shape) for name, value in inputs.items()
    }


def timed(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--one", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(seconds_of(options.one, options.side, options.calls))
        return
    found: dict[str, float] = {}
    for name in tqdm(NETWORKS, unit="network"):
        words = [sys.executable, __file__, "--one", name, "--side", str(options.side), "--calls", str(options.calls)]
        found[name] = float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
    report = {
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "side": options.side,
        "seconds": found,
    }
    FILE.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
