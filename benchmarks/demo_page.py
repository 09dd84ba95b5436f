"""Write what the documentation shows of the demo: the page's results and the pictures, from one committed run.

make demo && python benchmarks/demo_page.py demo_output    # from a new run, whose results and images are then committed
python benchmarks/demo_page.py                             # from the committed results; the images stay
"""

import hashlib
import shutil
import sys
import textwrap
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trl_diffusion_sdpo.tools.demo.report import IMAGES_FILE, NUMBERS_FILE, draw_curves, draw_scores, table
from trl_diffusion_sdpo.tools.demo.results import DemoResult

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/demo.json"
PAGE = ROOT / "docs/demo_results.md"
PICTURES = {  # file in docs/images -> the function that draws it
    "preferred_images.png": draw_scores,
    "demo_curves.png": draw_curves,
}
GRID = "demo_images.png"  # the images that the run itself drew


def page(result: DemoResult) -> str:
    """Return the results as Markdown, which the page of the demo includes."""
    settings = result.settings
    versions = ", ".join(f"{library} {version}" for library, version in result.versions.items())
    threads = "one thread" if result.threads == 1 else f"{result.threads} threads"
    intro = (
        f"This run (seed {settings['seed']}, {versions}) took {result.seconds / 60:.0f} minutes on {threads} of a CPU. "
        "`python benchmarks/demo_page.py` writes the numbers and both pictures from `benchmarks/results/demo.json`."
    )
    curves = (
        "These are the curves during training. They show scores at one guidance scale for all models, "
        f"{settings['curve_scale']:g}, and not at each model's best scale:"
    )
    parts = [
        intro,
        table(result).rstrip(),
        "![Error on held-out preferred images over the training steps, and final scores of all models with guidance]"
        '(images/preferred_images.png){ width="560" }',
        curves,
        "![Curves of the winners' and losers' errors, the score at one guidance scale and lambda, a line for each "
        "method](images/demo_curves.png)",
    ]
    return "\n".join(wrapped(line) for line in "\n\n".join(parts).splitlines()) + "\n"


def wrapped(line: str) -> str:
    """Wrap a line of prose at 120 columns. Rows of tables and pictures stay."""
    if line.startswith(("|", "!")):
        return line
    return textwrap.fill(line, 120, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False)


def fingerprint() -> str:
    """Return the hash of the committed run. Each picture carries it, so that a picture of another run is noticed."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


def main(run: Path | None) -> None:
    if run is not None:
        shutil.copyfile(run / NUMBERS_FILE, RESULTS)
        source = PngInfo()
        source.add_text("Source", fingerprint())
        with Image.open(run / IMAGES_FILE) as grid:
            grid.convert("RGB").save(ROOT / "docs/images" / GRID, pnginfo=source, optimize=True)
    result = DemoResult.read(RESULTS)
    PAGE.write_text(page(result), encoding="utf-8")
    for name, draw in PICTURES.items():
        draw(result).savefig(ROOT / "docs/images" / name, metadata={"Software": None, "Source": fingerprint()})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
