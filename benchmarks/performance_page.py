"""Writes the tables of docs/performance.md, and the words that have numbers, from the files in `benchmarks/results`.

Each is between two comments of the page; text outside them is left as it is. A test compares the page with what
this script would write.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparisons import COMPARISONS
from proportions import FLOAT32_VAE, XL_HALF, true_shares
from published_flops import MODELS, pair_flops, published_flops

from trl_diffusion_sdpo.planning.plan import CARDS, USABLE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"sd15": "Stable Diffusion 1.5, 512", "sdxl": "SDXL, 1024", "sd35-medium": "SD 3.5 Medium, 1024"}
NAMES |= {"flux-dev": "FLUX.1 dev, 1024"}
TUNINGS = {"lora": "LoRA", "qlora": "QLoRA", "full": "all weights"}
ASSUMED_UTILISATION = 0.35
PEAKS = {"RTX 4090": 165.2, "A100": 312.0, "H100": 989.4}  # TFLOP/s in bf16, as in gpu_device.py
PAIRS = 100_000
# Pairs a second of published runs, from their launchers' steps, batches, hours and GPUs.
PUBLISHED = (
    (
        "Stable Diffusion 1.5, all weights",
        "Diffusion-DPO's launcher, 16 GPUs: 2000 steps of 2048 pairs in about 24 h",
        2.96,
    ),
    ("SDXL, all weights", "Diffusion-DPO's launcher, 16 GPUs: 200 steps of 2048 pairs in about 30 h", 0.237),
)
# Seconds that SimpleTuner states for a step of one image with a LoRA on one H100, caches on, without and with
# checkpointing. An image takes a forward and a backward pass; a pair, with the reference, takes three times as much.
SIMPLETUNER = (("Stable Diffusion 1.5, LoRA", 0.181, 0.305), ("SDXL, LoRA", 0.606, 1.080))


def main() -> None:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def rewritten(page: str) -> str:
    """The page with every table as it would be made now; `ValueError` on a table that it lacks or names wrongly."""
    blocks = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(blocks) != sorted(TABLES):
        raise ValueError(f"The page must have the tables {sorted(TABLES)} once each, and has {sorted(blocks)}.")
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page = re.sub(
            pattern, lambda found, table=table: f"{found[1]}\n{table()}\n\n{found[2]}", page, flags=re.DOTALL
        )
    return page


def step_report() -> dict[str, Any]:
    """What `step_time.py` has measured."""
    return json.loads((RESULTS / "step_time.json").read_text(encoding="utf-8"))


def comparisons() -> list[dict[str, Any]]:
    return [found for group in step_report()["groups"] for found in group["results"]]


def step_table() -> str:
    """The comparisons of `step_time.py`."""
    rows = []
    for found in comparisons():
        of, (low, median, high) = found["comparison"], found["quartiles"]
        if of["part"] != "overhead":
            target = "" if of["target"] is None else f"{of['target']:.2f}"
            kind = f"{of['published']}, {of['tuning']}"
            cells = (f"{median:.3f} ({low:.3f} to {high:.3f})", expected(of), target)
            rows.append((of["name"], of["against"], kind, *cells))
    return table(("Step", "Relative to", "Proportions", "Time (quartiles), measured", "Computed", "Target"), rows)


def expected(of: dict[str, Any]) -> str:
    """What a comparison would give if time were what the parts of the true size are said to take, and nothing else."""
    shares = true_shares(of["published"], of["tuning"])
    costs = []
    for name in (of["name"], of["against"]):
        absent = [
            *(["VAE", "text encoders"] if "cached" in name else []),
            *(["reference"] if "errors" in name else []),
        ]
        costs.append(sum(share for part, share in shares.items() if part not in absent))
    return f"{costs[0] / costs[1]:.2f}"


def step_words() -> str:
    """What the numbers of `step_time.py` say: how they were measured, and which targets they miss."""
    report, found = step_report(), comparisons()
    counts = sorted({len(row["ratios"]) for row in found})
    rounds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    load = report["load"]
    lines = [f"Measured in {rounds} rounds at a load average of {load} on {report['environment']['device']}."]
    targeted = [row for row in found if row["comparison"]["target"] is not None]
    missed = [row for row in targeted if row["quartiles"][1] > row["comparison"]["target"]]
    measured = [row["comparison"] for row in targeted]
    wanted = [asdict(comparison) for comparison in COMPARISONS if comparison.target is not None]
    unmeasured = [of for of in wanted if of not in measured]
    if not missed and not unmeasured:
        lines.append("All targets are reached.")
    for row in missed:
        undecided = row["quartiles"][0] <= row["comparison"]["target"]
        word = "Undecided, as the quartiles are on both sides" if undecided else "Not reached"
        lines.append(f"{word}: {targeted_words(row['comparison'], row['quartiles'][1])}")
    lines += [f"Not measured: {targeted_words(of)}" for of in unmeasured]
    loops = {
        row["comparison"]["tuning"]: row["milliseconds"][1] for row in found if row["comparison"]["part"] == "bare"
    }
    lines += [
        overhead_words(row, loops.get(row["comparison"]["tuning"]))
        for row in found
        if row["comparison"]["part"] == "overhead"
    ]
    equal = {found["difference"] for found in found if found["comparison"]["part"] in ("cached", "errors")}
    if equal == {0}:
        lines.append("Encoded pairs and stored errors gave losses equal to the bit in all steps.")
    return "\n".join(f"- {line}" for line in lines)


def targeted_words(of: dict[str, Any], ratio: float | None = None) -> str:
    """A comparison with its target."""
    found = "" if ratio is None else f" {ratio:.2f}"
    return (
        f"{of['name']} relative to {of['against']} ({of['published']}, {of['tuning']}),{found} where the target is "
        f"{of['target']:.2f}."
    )


def overhead_words(row: dict[str, Any], loop: float | None) -> str:
    """What our step, or transformers' Trainer around the passes of the bare loop, costs beside the passes. `loop` has
    the milliseconds of the bare loop with its arithmetic."""
    of, (ours, bare), (written, bytes_of_bare) = row["comparison"], row["operations"], row["written"]
    tuning = {"full": "all weights", "lora": "a LoRA"}[of["tuning"]]
    step = {"ours": "our step", "plain Trainer": "transformers' own Trainer around the passes of the bare loop"}
    share = f", {row['more'] / loop:.1%} of the loop's {loop:.0f} ms with arithmetic" if loop else ""
    return (
        f"With {tuning} and the layers of Stable Diffusion 1.5, but next to no arithmetic in them, {step[of['name']]} "
        f"takes {abs(row['more']):.1f} ms {'more' if row['more'] > 0 else 'less'} than the bare loop{share}: "
        f"{ours - bare} more operations than its {bare}, on small tensors "
        f"({written / bytes_of_bare - 1:.1%} more bytes written, which at the true size is less)."
    )


def shares_table() -> str:
    """The shares of a step's time in `step_time.py`, and of the true size."""
    parts = ("VAE", "text encoders", "reference", "policy", "optimizer")
    rows = []
    for group in step_report()["groups"]:
        of_true_size = "time" if group["published"] == "sdxl" else "FLOPs"
        for kind, shares in (
            ("time of the small size, measured", "shares"),
            (f"{of_true_size} of the true size", "true_shares"),
        ):
            if group[shares]:
                cells = (f"{group[shares][part]:.1%}" if part in group[shares] else "" for part in parts)
                rows.append((f"{group['published']}, {group['tuning']}: {kind}", *cells))
    return table(("Shares", *parts), rows)


def sdxl_words() -> str:
    """What SDXL's VAE takes of a step, by FLOPs and by time, and what encoded pairs save."""
    flops = published_flops()["sdxl"]
    ratio = flops["vae"] / flops["denoiser"]
    lines = [f"- by FLOPs, as where both run in half precision: {ratio:.2f};"]
    lines.append(
        f"- with the VAE in float32: {FLOAT32_VAE * ratio:.2f}. On an RTX 4090 SDXL's VAE takes 0.142 s for an image "
        "of 1024 by 1024, and Stable Diffusion 1.5's, which has the same layers, 0.078 s "
        "([published](https://huggingface.co/docs/diffusers/hybrid_inference/vae_encode)): "
        f"{FLOAT32_VAE:.2f} times as much, by `force_upcast` as we read it;"
    )
    file = RESULTS / "sdxl_times.json"
    if file.is_file():
        measured = json.loads(file.read_text(encoding="utf-8"))
        times = measured["seconds"]
        lines.append(
            f"- measured at the true size with random weights on one core ({measured['device']}): "
            f"{times['vae float32'] / times['unet bfloat16']:.2f} with the VAE in float32 and the UNet in bf16 "
            f"({times['vae float32']:.0f} s and {times['unet bfloat16']:.0f} s)."
        )
    words = []
    for published, kind in (("sdxl", "float32"), (XL_HALF, "half precision")):
        shares = [true_shares(published, tuning)["VAE"] for tuning in ("full", "lora")]
        speeds = ", ".join(f"{1 / (1 - share):.2f}" for share in shares)
        words.append(f"{speeds} with the VAE in {kind} ({shares[0]:.0%} and {shares[1]:.0%} of a step)")
    return "\n".join(lines) + (
        "\n\nWith all weights and with a LoRA, encoded pairs then make a step so many times as fast: "
        + "; ".join(words)
        + "."
    )


def gpu_table() -> str:
    """The lines of `gpu_speed.py`, the latest of each case and device."""
    file = RESULTS / "gpu.jsonl"
    texts = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = [line for line in map(json.loads, texts) if not line["smallest"]]
    if not lines:
        return "Not measured yet: no GPU was at hand. `make bench-gpu` fills this table."
    latest = {(line["device"], line["case"]): line for line in lines}
    header = ("Device", "Model", "Tuning", "Checkpointing", "Pairs a step", "Pairs/s", "Utilisation", "Peak GiB")
    return table((*header, "Between steps", "Hours for 100 k pairs"), map(gpu_row, latest.values()))


def gpu_row(line: dict[str, Any]) -> tuple[str, ...]:
    model = NAMES[line["model"]] + "".join(f", {name}" for name in ("cached", "compiled") if line[name])
    case = (line["device"], model, TUNINGS[line["tuning"]], "yes" if line["checkpointing"] else "no")
    if line["outcome"] != "trained":
        return (*case, "", line["outcome"], "", "", "", "")
    memory, rate = line["memory_gib"], line["pairs_per_second"]
    share = "" if line["utilisation"] is None else f"{line['utilisation']:.0%}"
    sizes = (f"{memory['step']:.1f}", f"{memory['between steps']:.1f}")
    return (*case, str(line["pairs"]), f"{rate:.2f}", share, *sizes, hours(PAIRS / rate))


def flops_table() -> str:
    """TFLOP of a pair, and what caches save of them."""
    rows = []
    for model in MODELS:
        flops = published_flops()[model]
        for tuning in ("lora", "full"):
            live = pair_flops(flops, tuning)
            saving = [pair_flops(flops, tuning, cached=True), pair_flops(flops, tuning, cached=True, errors=True)]
            cells = [f"{part / 1e12:.1f} ({part / live:.0%})" for part in saving]
            rows.append((NAMES[model], TUNINGS[tuning], f"{live / 1e12:.1f}", *cells))
    return table(("Model", "Tuning", "TFLOP a pair", "with `precompute_latents`", "and `precompute_ref_errors`"), rows)


def hours_table() -> str:
    """Hours for 100 k pairs by FLOPs, at a utilisation that is assumed."""
    rows = []
    for model in MODELS:
        flops = published_flops()[model]
        for tuning in ("lora", "full"):
            both = [pair_flops(flops, tuning), pair_flops(flops, tuning, cached=True, errors=True)]
            cells = [
                " / ".join(hours(PAIRS * pair / (1e12 * peak * ASSUMED_UTILISATION)) for pair in both)
                for peak in PEAKS.values()
            ]
            rows.append((NAMES[model], TUNINGS[tuning], *cells))
    return table(("Model", "Tuning", *PEAKS), rows)


def published_table() -> str:
    """Hours for 100 k pairs by published figures."""
    rows = [(name, source, f"{rate:g}", hours(PAIRS / rate)) for name, source, rate in PUBLISHED]
    for name, plain, checkpointing in SIMPLETUNER:
        for words, seconds in (("without", plain), ("with", checkpointing)):
            source = f"SimpleTuner's table, one H100, {words} checkpointing: {seconds:.3f} s a step of one image"
            rows.append((name, source, f"{1 / (3 * seconds):.2f} (computed)", hours(PAIRS * 3 * seconds)))
    return table(("Run", "Source", "Pairs/s of one GPU", "Hours for 100 k pairs"), rows)


def cards_table() -> str:
    """The first set-up of `planned_cards.py`, by speed, that fits on a card."""
    file = RESULTS / "planned.json"
    if not file.is_file():
        return "Not computed yet: `python benchmarks/planned_cards.py` fills this table."
    rows = []
    for model, tunings in json.loads(file.read_text(encoding="utf-8")).items():
        for tuning, peaks in tunings.items():
            cells = []
            for card in CARDS:
                fitting = (f"{words}: {peak:.1f} GB" for words, peak in peaks.items() if peak <= USABLE * card)
                cells.append(next(fitting, "no"))
            rows.append((NAMES[model], tuning, *cells))
    return table(("Model", "Tuning", *(f"{card} GB" for card in CARDS)), rows)


def hours(seconds: float) -> str:
    found = seconds / 3600
    return f"{found:.1f}" if found < 10 else f"{found:.0f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header), *(tuple(row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "findings": step_words,
    "sdxl": sdxl_words,
    "shares": shares_table,
    "gpu": gpu_table,
    "cards": cards_table,
    "flops": flops_table,
    "hours": hours_table,
    "published": published_table,
}


if __name__ == "__main__":
    main()
