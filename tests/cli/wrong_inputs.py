"""Some three hundred wrong inputs of the commands. Each must end in one sentence and exit code 2.

`test_wrong_inputs.py` runs them. Try some: `pytest tests/cli/test_wrong_inputs.py -m "matrix or not matrix" -k WORD`.
"""

import contextlib
import io
import json
import shlex
import signal
import traceback
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from trl_diffusion_sdpo.tools.pairing.own_images import list_images

SECONDS = 60  # an input that takes longer hangs


LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
COMMANDS = [line[2:] for line in LINES if line.startswith("= ") and line != "= "]  # which work


def inputs() -> list[str]:
    """Return all wrong inputs, as a user would type them after `trl-diffusion-sdpo`. `wrong_inputs.txt` lists them."""
    listed: list[str] = []
    command = ""
    for line in LINES:
        if line.startswith("="):
            command = line[1:].strip()
        elif line and not line.startswith("#"):
            listed.append(f"{command} {line}".strip())
    return listed


def reds(images: list, prompts: list[str]) -> list[float]:
    """A scorer that works."""
    return [float(image.getpixel((0, 0))[0]) for image in images]


class Place:
    """A folder with good and bad files, where the wrong inputs are tried in turn."""

    def __init__(self, folder: Path, model: str, pairs: str):
        self.folder = folder
        self.count = 0
        self.names = {"folder": folder, "model": model, "pairs": pairs, "images": folder / "images"}
        self.names["prompts"] = self._text("prompts.txt", "a dog\na cat\n")
        bad = {
            "empty.txt": "",
            "empty.jsonl": "",
            "ragged.csv": "prompt,chosen,rejected\na,b\nc,d,e,f\n",
            "nan.jsonl": '{"prompt": NaN}\n',
            "numbers.json": "[1, 2]",
            "deep.json": "[" * 100000,
            "list.yaml": "- beta\n",
            "brackets.yaml": "a: " + "[" * 5000,
            "digits.yaml": f"beta: {'9' * 6000}\n",
            "laughs.yaml": "a: &a [x, x]\nb: [*a, *a]\n",
        }
        for name, text in bad.items():
            self._text(name, text)
        (folder / "binary.txt").write_bytes(bytes(range(256)))
        for name in ("nothing_inside", "images", "odd_manifest", "empty_pairs"):
            (folder / name).mkdir()
        self._text("empty_pairs/pairs.jsonl", "")
        rows = [{"image": "a.png", "prompt": "x", "model": ["a"], "seed": [1]}, {"image": 3, "prompt": None}]
        self._text("odd_manifest/manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
            self._text(f"images/{index}.txt", "a dog")
        list_images(folder / "images", from_names=False)

    def _text(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def fault(self, text: str) -> str | None:
        """Run the program on a wrong input. Return what is wrong with how it ends, or `None`."""
        from trl_diffusion_sdpo.cli.main import main

        self.count += 1
        names = {**self.names, "new": self.folder / f"new{self.count}", "digits": "9" * 6000, "brackets": "[" * 5000}
        words = shlex.split(Template(text).substitute(names))
        out, err = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words)
        except SystemExit as error:
            code = error.code
        except BaseException:  # a traceback is what a user must not see
            return traceback.format_exc(limit=-3)
        finally:
            signal.alarm(0)
        lines = [line for line in err.getvalue().splitlines() if "error: " in line or ": there is no command" in line]
        if code != 2 or len(lines) != 1:
            return f"exit code {code}, {len(lines)} sentences: {(err.getvalue() or out.getvalue())[-300:]}"
        return None


def _out_of_time(number, frame):
    raise TimeoutError(f"after {SECONDS} s")
