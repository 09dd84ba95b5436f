"""Use the installed package as a newcomer would: the demo in two steps, a folder of images, and the pick page.

Run it with the Python of an environment that has the wheel and nothing else of this project.
"""

import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

COMMAND = str(Path(sys.executable).with_name("trl-diffusion-sdpo"))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = ["demo", "--max_steps", "2", "--output_dir", "demo"]
        subprocess.run([COMMAND, *demo], cwd=folder, check=True)
        assert (folder / "demo" / "images.png").is_file(), "The demo wrote no images."
        images = folder / "images"
        images.mkdir()
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"a red bicycle ({number}).png")
        subprocess.run([COMMAND, "pairs", "from-images", "images", "--from_names"], cwd=folder, check=True)
        pick = subprocess.Popen(
            [COMMAND, "pairs", "pick", "images", "--port", "0"],
            cwd=folder,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job of a shell ignores it
        )
        try:
            address = next(match[0] for line in pick.stdout if (match := re.search(r"http://\S+", line.decode())))
            with urllib.request.urlopen(address, timeout=20) as response:
                assert b"</html>" in response.read()
        finally:
            pick.send_signal(signal.SIGINT)
            assert pick.wait(20) == 0
    print("The wheel works.")


if __name__ == "__main__":
    main()
