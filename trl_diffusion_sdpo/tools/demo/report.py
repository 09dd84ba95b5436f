"""Write the demo's report: plots, images, a table, all numbers and a summary. All but the images is made from
`results.json`."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .methods import BASE, GUIDED, GUIDED_FROM, METHODS
from .pipeline import reported_captions
from .results import Curves, DemoResult, ModelResult, Score
from .world import captions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES_FILE, CURVES_FILE, IMAGES_FILE = "scores.png", "curves.png", "images.png"
TABLE_FILE, NUMBERS_FILE = "table.md", "results.json"
FILES = (SCORES_FILE, CURVES_FILE, IMAGES_FILE, TABLE_FILE, NUMBERS_FILE)

# Key of a model -> colour and marker in plots. Colour-blind readers can distinguish the colours.
STYLES = {
    BASE.key: ("#000000", "D"),
    "sft": ("#0072B2", "s"),
    "dpo": ("#D55E00", "v"),
    "sdpo": ("#009E73", "o"),
    "sdpo_recipe": ("#AA4499", "P"),
    GUIDED.key: ("#AA4499", "*"),
}
LINEAR_UP_TO = 10.0  # per cent: errors' changes are drawn on a linear axis up to here, and on a log axis above


def write_report(result: DemoResult, images: dict[str, np.ndarray], folder: Path) -> None:
    """Write the report into the demo's folder.

    Args:
        result ([`DemoResult`]): All numbers.
        images (`dict[str, np.ndarray]`): Key of a model -> images of the reported prompts, `(36, n, 32, 32, 3)`.
        folder (`Path`): The folder.
    """
    result.write(folder / NUMBERS_FILE)
    draw_scores(result).savefig(folder / SCORES_FILE)
    draw_curves(result).savefig(folder / CURVES_FILE)
    draw_images(result, images).savefig(folder / IMAGES_FILE)
    (folder / TABLE_FILE).write_text(table(result), encoding="utf-8")


# ---- Plots ----------------------------------------------------------------------------------------------------------


def draw_scores(result: DemoResult) -> "Figure":
    """Draw the winners' error over the training steps, and the final scores with guidance. The text is large, because
    phones show the picture at a width of 360 pixels."""
    from matplotlib.figure import Figure  # takes seconds

    figure = Figure(figsize=(6.4, 8.4), dpi=200, layout="constrained")
    errors, scores = figure.subplots(2, 1)
    for panel, title in ((errors, "Error on held-out preferred images"), (scores, "Score of images, with guidance")):
        panel.set_title(title, fontsize=17, loc="left", fontweight="bold")
        panel.tick_params(labelsize=14)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    _plot_changes(errors, result, "winner_change", linewidth=2.5, markersize=9)
    errors.set_xlabel("training step", fontsize=15)
    errors.set_ylabel("change (log axis), up is worse", fontsize=15)
    ranked = sorted(_trained(result), key=lambda one: one[1].winner_change[-1])
    for rank, (model, curves) in enumerate(ranked):
        # The lowest curve has its label below, the others above, where they leave room.
        text = f"{model.label} {percent(curves.winner_change[-1])} %".replace(" as ", "\nas ")
        end = curves.steps[-1], curves.winner_change[-1]
        errors.annotate(text, end, (6, 11 if rank else -25), color=STYLES[model.key][0], ha="right", **_TEXT)

    base = result.models[BASE.key].best.mean
    shown = [model for key, model in result.models.items() if key != BASE.key]
    left = min(model.best.mean - model.best.stderr for model in shown)
    for row, model in enumerate(shown):
        colour, marker = STYLES[model.key]
        mean, stderr = model.best.mean, model.best.stderr
        scores.plot([mean - stderr, mean + stderr], [row, row], color=colour, linewidth=3)
        scores.plot(mean, row, color=colour, marker=marker, markersize=12)
        scores.annotate(f"{model.label} {mean:.3f}", (left, row), (0, 11), color=colour, **_TEXT)
    scores.axvline(base, color="black", linestyle=":", linewidth=1.5)
    scores.annotate(f"base model {base:.3f}", (base, -1), (0, 0), ha="center", **_TEXT)
    scores.set_yticks([])
    scores.set_ylim(len(shown) - 0.6, -1.5)
    scores.set_xlabel("right is better; bar: ± 1 standard error\nover prompts", fontsize=15)
    return figure


_TEXT: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 14,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
}


def draw_curves(result: DemoResult) -> "Figure":
    """Draw four quantities over the training steps, one line per method: change of the winners' error, change of the
    losers' error, score, and lambda."""
    from matplotlib.figure import Figure  # takes seconds

    scale = result.settings["curve_scale"]
    panels = (
        ("Error on held-out preferred images (winners)", "change, up is worse"),
        ("Error on held-out rejected images (losers)", "change"),
        (f"Score of images at guidance scale {scale:g}", "up is better; band: ± 1 standard error"),
        ("Factor of the losers' gradient, λ", "1: the safeguard does nothing"),
    )
    figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    for panel, (title, meaning) in zip(axes.flat, panels, strict=True):
        panel.set_title(title, fontsize=14, loc="left", fontweight="bold")
        panel.set_xlabel("training step", fontsize=13)
        panel.set_ylabel(meaning, fontsize=13)
        panel.tick_params(labelsize=12)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    _plot_changes(axes[0, 0], result, "winner_change", linewidth=2.2, markersize=7)
    _plot_changes(axes[0, 1], result, "loser_change", linewidth=2.2, markersize=7)
    for model, curves in _trained(result):
        colour, marker = STYLES[model.key]
        mean = np.array([score.mean for score in curves.score])
        stderr = np.array([score.stderr for score in curves.score])
        style: dict[str, Any] = {"color": colour, "linewidth": 2.2, "label": model.label}
        axes[1, 0].plot(curves.steps, mean, marker=marker, markersize=7, **style)
        axes[1, 0].fill_between(curves.steps, mean - stderr, mean + stderr, color=colour, alpha=0.12, linewidth=0)
        if curves.scale:
            axes[1, 1].plot(curves.scale_steps, curves.scale, **style)
    axes[1, 1].set_ylim(0, 1.05)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=13, frameon=False)
    return figure


def draw_images(result: DemoResult, images: dict[str, np.ndarray]) -> "Figure":
    """Draw a grid of images: a row for each of six prompts, spread evenly over the reported ones, and a column for each
    model at its best guidance scale. Images of a row started from the same noise."""
    from matplotlib.figure import Figure  # takes seconds

    captioned = zip(captions(), reported_captions(), strict=True)
    prompts = [caption.text for caption, is_reported in captioned if is_reported]
    shown = np.linspace(0, len(prompts) - 1, 6).round().astype(int)
    figure = Figure(figsize=(7.2, 6.5), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    grid = figure.subplots(len(shown), len(images))
    for column, (key, of_model) in zip(grid.T, images.items(), strict=True):
        model = result.models[key]
        column[0].set_title(f"{_COLUMNS[key]}\n{model.best.mean:.3f}", fontsize=11)
        for panel, prompt in zip(column, shown, strict=True):
            panel.imshow(of_model[prompt, 0])  # (32, 32, 3)
            panel.set_xticks([])
            panel.set_yticks([])
    for panel, prompt in zip(grid[:, 0], shown, strict=True):
        label = prompts[prompt].removeprefix("a ").replace(" on", "\non")
        panel.set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center")
    return figure


_COLUMNS = {  # heads of columns, in two lines each
    BASE.key: "base\nmodel",
    "sft": "\nSFT",
    "dpo": "Diffusion-\nDPO",
    "sdpo": "Diffusion-\nSDPO",
    "sdpo_recipe": "\nrecipe",
    GUIDED.key: "recipe,\nguided",
}


def _plot_changes(panel: "Axes", result: DemoResult, name: str, **style: Any) -> None:
    """Plot the changes of an error in per cent, on an axis that is a log axis above 10 per cent."""
    for model, curves in _trained(result):
        colour, marker = STYLES[model.key]
        panel.plot(curves.steps, getattr(curves, name), color=colour, marker=marker, label=model.label, **style)
    panel.axhline(0, color="black", linestyle=":", linewidth=1.5)
    panel.set_yscale("symlog", linthresh=LINEAR_UP_TO)
    ticks = [-10, 0, 10, 100, 1000]
    panel.set_yticks(ticks, [f"{tick:+,} %" if tick else "0 %" for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(-12, 3000)


def _trained(result: DemoResult) -> list[tuple[ModelResult, Curves]]:
    return [(model, model.curves) for model in result.models.values() if model.curves is not None]


# ---- Tables and sentences -------------------------------------------------------------------------------------------


COMPARISONS = (
    "Scores with guidance, mean difference over the prompts of this one seed (the intervals hold together with 95 %)"
)


def table(result: DemoResult) -> str:
    """Return the final numbers of all models and what they show, as Markdown."""
    lines = [
        "| Model | Score with guidance (scale) | Score without guidance | Winners' error | Losers' error |",
        "|---|---|---|---|---|",
    ]
    for model in _rows(result):
        score = _scaled(model.best)
        if model.key == GUIDED_FROM:
            score += f"; guided from its reference {_scaled(result.models[GUIDED.key].best)}"
        lines.append(f"| {model.label} | {score} | {model.plain} | {_winners(model)} | {_losers(model)} |")
    settings = result.settings
    images = 36 * settings["samples_per_prompt"]
    guidance = _settings_text(result.models[GUIDED.key].settings)
    lines += [
        "",
        f"**Score**: the oracle's score in [0, 1] of {images} images of 36 prompts, mean ± "
        "standard error over prompts. All models start from the same noise. **With guidance** is how people sample: "
        "classifier-free guidance, at each model's best scale, which was chosen on 36 other prompts. **Error**: change "
        f"of the denoising error on the preferred (winners) or rejected images (losers) of {result.eval_pairs} "
        "held-out pairs, in per cent of the error before training, ± standard error over pairs. **Guided from its "
        f"reference**: with preference guidance from the base model ({guidance}).",
        "",
        f"{COMPARISONS}:",
        "",
        *(f"- {sentence}" for sentence in score_sentences(result)),
        "",
        "What became of the error on preferred images, over all noise levels and in the worst of eight bins:",
        "",
        *(f"- {sentence}" for sentence in error_sentences(result)),
        "",
        f"Each method trained all weights of the UNet for {settings['max_steps']} steps of "
        f"{settings['per_device_train_batch_size']} pairs, on {result.train_pairs} off-policy pairs, with seed "
        f"{settings['seed']}:",
        "",
        *(f"- {model.label}: {_settings_text(model.settings)}" for model, _ in _trained(result)),
    ]
    return "\n".join(lines) + "\n"


def summary(result: DemoResult) -> str:
    """Return the main numbers, and what they show, as text for a terminal."""
    rows = [("", "with guidance (scale)", "without", "winners' error", "losers' error")]
    for model in _rows(result):
        rows.append((model.label, _scaled(model.best), str(model.plain), _winners(model), _losers(model)))
        if model.key == GUIDED_FROM:
            rows.append(("  guided from its reference", _scaled(result.models[GUIDED.key].best), "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{result.settings['max_steps']} steps with a high learning rate on {result.train_pairs} off-policy pairs, "
        f"seed {result.settings['seed']}.",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
        "Score: mean ± standard error over 36 prompts; 1 is best. With guidance: classifier-free guidance, as people",
        "sample, at each model's best scale. Error: change in per cent of the error before training, on held-out",
        "preferred images (winners) and rejected images (losers).",
        "",
        *textwrap.wrap(f"{COMPARISONS}:", 110),
        *(f"  {sentence}" for sentence in score_sentences(result)),
        *(textwrap.fill(sentence, 110, subsequent_indent="  ") for sentence in error_sentences(result)),
        "",
        "This is one seed of a toy world. With gentler settings, plain Diffusion-DPO does not break down.",
    ]
    return "\n".join(lines)


def score_sentences(result: DemoResult) -> list[str]:
    """Return a sentence for each difference of scores with guidance."""
    lines = []
    for one in result.differences():
        first, second = (result.models[key].label for key in (one.first, one.second))
        verdict = "no difference shown" if one.low <= 0 <= one.high else "higher" if one.mean > 0 else "lower"
        lines.append(f"{first} against {second}: {verdict}, {one}.")
    return lines


def error_sentences(result: DemoResult) -> list[str]:
    """Return a sentence for each way in which the winners' errors changed: up, down, or by less than two standard
    errors."""
    changes: dict[str, list[str]] = {"rose": [], "fell": [], "did not clearly change": []}
    for model, curves in _trained(result):
        clear = abs(curves.winner_change[-1]) > 2 * curves.winner_stderr[-1]
        word = ("rose" if curves.winner_change[-1] > 0 else "fell") if clear else "did not clearly change"
        changes[word].append(f"{model.label} ({_winners(model)}; worst bin {percent(curves.worst_bin)} %)")
    return [f"The winners' error {word}: {', '.join(of)}." for word, of in changes.items() if of]


def percent(value: float) -> str:
    """Return a percentage with its sign and a decimal, or without decimals from 100 on. Never -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}" if abs(value) < 100 else f"{value:+.0f}"


def _rows(result: DemoResult) -> list[ModelResult]:
    return [result.models[method.key] for method in (BASE, *METHODS)]


def _scaled(score: Score) -> str:
    return f"{score} ({score.guidance_scale:g})"


def _winners(model: ModelResult) -> str:
    if model.curves is None:
        return "0"
    change, stderr = model.curves.winner_change[-1], model.curves.winner_stderr[-1]
    return f"{percent(change)} ± {percent(stderr).removeprefix('+')} %"


def _losers(model: ModelResult) -> str:
    return "0" if model.curves is None else f"{percent(model.curves.loser_change[-1])} %"


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in settings.items())
