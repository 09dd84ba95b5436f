"""The benchmarks run in their smallest form and write their files. Their numbers mean nothing at this size: the tests
check that all modes are measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    """The output of the script."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.matrix
def test_the_overhead_of_every_mode_is_measured(tmp_path):
    file = tmp_path / "overhead.json"
    shown = run(
        "safeguard_overhead.py",
        *("--size", "tiny", "--rounds", "1", "--warmup", "1", "--batch", "2", "--tuning", "lora", "--reference"),
        *("--device", "cpu", "--output", str(file)),
    )
    report = json.loads(file.read_text())
    rows = {row["mode"]: row for row in report["rows"]}
    assert list(rows) == ["none", "output", "parameter", "parameter, low memory", "parameter, error anchor"]
    assert all(f"| {mode} |" in shown for mode in rows)
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows.values())
    assert rows["none"]["ratio"] == 1
    # One branch's activations at a time are less than two.
    assert 0 < rows["parameter, low memory"]["step_bytes"] < 0.8 * rows["parameter"]["step_bytes"]


def test_the_rises_of_every_kind_are_counted(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "rises.json", tmp_path / "rises.png"
    shown = run(
        "winner_rises.py",
        *("--steps", "2", "--batch", "2", "--learning_rate", "1e-4"),
        *("--output", str(file), "--plot", str(picture)),
    )
    results = json.loads(file.read_text())["results"]
    assert len(results) == 4 and all(len(found["changes"]) == 2 for found in results)
    # All kinds take their first step from the same weights on the same batch.
    assert len({found["errors_before"][0] for found in results}) == 1
    assert all(f"| {found['kind']} |" in shown for found in results)
    assert picture.stat().st_size > 10_000


def test_the_vae_is_measured_in_every_precision(tmp_path):
    file = tmp_path / "vae.json"
    shown = run(
        "vae_precision.py",
        *("--size", "tiny", "--images", "1", "--side", "16", "--rounds", "1", "--device", "cpu"),
        *("--precisions", "float32", "bfloat16", "float16", "--output", str(file)),
    )
    rows = {(row["vae"], row["dtype"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 6 and all(f"| {vae} | {dtype} |" in shown for vae, dtype in rows)
    for vae in ("demo", "tiny"):
        assert rows[vae, "float32"]["difference"] == 0
        # bfloat16 has 8 significant bits and float16 has 11; the rounding errors of layers add up.
        assert 2**-9 / 4 < rows[vae, "bfloat16"]["difference"] < 0.2
    assert rows["tiny", "float32"]["ratio"] == 1 and rows["demo", "float32"]["ratio"] is None


@pytest.mark.matrix
def test_the_front_is_made_resumed_and_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    file, folder = tmp_path / "front.jsonl", tmp_path / "report"
    make = ("front.py", "run", "--plan", "smallest", "--file", str(file), "--workers", "1")
    assert "4 runs, 4 to make" in run(*make)
    row, *tried = (json.loads(line) for line in file.read_text().splitlines())
    assert [bool(other["tried"]) for other in (row, *tried)] == [False, True, True, True]
    for part in ("selection", "final"):
        for weights in ("raw", "ema"):
            found = row["measured"][part][weights]
            assert 0 <= found["oracle"] <= 1 and len(found["winner_levels"]) == 8
    file.write_text(file.read_text() + '{"cut off')
    assert "4 runs, 0 to make" in run(*make)
    shown = run("front.py", "report", "--file", str(file), "--folder", str(folder), "--part", "final")
    assert "| budget, range | 0.1 | 1 |" in shown
    assert {path.name for path in folder.iterdir()} == {"front.png", "front_levels.png"}


@pytest.mark.matrix
def test_every_way_to_read_rows_is_measured(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "loading.json", tmp_path / "loading.png"
    shown = run("data_loading.py", *("--quick", "--output", str(file), "--plot", str(picture)))
    found = json.loads(file.read_text())
    ways = [(row["rows"], row["way"]) for row in found["start_up"]]
    assert ways == [(rows, way) for rows in (100, 3000) for way in ("first", "again", "stream")]
    assert all(row["peak"] >= row["rss"] > 0 and row["seconds"] > row["constructing"] for row in found["start_up"])
    assert all(f"| {rows} | {way} |" in shown for rows, way in ways)
    assert [row["workers"] for row in found["loading"]] == [0, 1] and found["decoding"]["ratio"] > 0
    assert picture.stat().st_size > 10_000


def test_the_usual_transforms_that_loading_is_compared_with_make_the_same_pixels(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import data_loading

    from trl_diffusion_sdpo.data import PairTransform, decode_image, pixels_as_floats

    first, second = (Path(file).read_bytes() for file in data_loading.write_images(tmp_path, 96)[:2])
    ours = data_loading.our_pair(PairTransform(48, random_flip=True), decode_image, first, first)
    usual = data_loading.usual_pair(48, first, first)
    assert ours.shape == (2, 3, 48, 48) and ours.dtype == usual.dtype and torch.equal(ours, usual)
    floats = data_loading.as_floats(lambda *_: usual, first, first)
    assert torch.equal(pixels_as_floats(ours), floats)
    assert data_loading.usual_pair(48, first, second).shape == (2, 3, 48, 48)


def test_the_first_trainer_of_a_process_is_not_in_the_rate_of_a_cache(tmp_path, monkeypatch):
    """It pays for imports. It encodes elsewhere: all that is measured must be left for the second one."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import encode_throughput

    made = []

    class Recorded(encode_throughput.DiffusionSDPOTrainer):
        def __init__(self, model, ref_model, args, data):
            made.append((args.latent_cache_dir, len(data), Path(args.latent_cache_dir).exists()))
            super().__init__(model, ref_model, args, data)

    monkeypatch.setattr(encode_throughput, "DiffusionSDPOTrainer", Recorded)
    options = encode_throughput.parse(["--smallest", "--images", "4", "--device", "cpu"])
    size = encode_throughput.size_of("sd15", "full", options)
    encode_throughput.cached_rate("images", size, options, tmp_path)
    (first, *_), (folder, *second), third = made
    assert first != folder and second == [2, False] and third == (folder, 2, True)


def test_the_rate_of_prompts_into_a_cache_is_of_prompts_alone(tmp_path, monkeypatch):
    """The trainer before the timed one encodes the images of all rows, and its own prompt: 2 images a row, not
    mirrored. The timed one encodes no image, and each row's prompt with the empty one."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import encode_throughput

    from trl_diffusion_sdpo.cache import encoder

    written = []
    for kind in ("images", "prompts"):
        function = getattr(encoder, f"encode_{kind}")

        def recorded(*given, function=function, kind=kind, **named):
            found = function(*given, **named)
            written.append((kind, found.rows))
            return found

        monkeypatch.setattr(encoder, f"encode_{kind}", recorded)
        for module in list(sys.modules.values()):
            if getattr(module, f"encode_{kind}", None) is function:
                monkeypatch.setattr(module, f"encode_{kind}", recorded)
    options = encode_throughput.parse(["--smallest", "--images", "2", "--device", "cpu"])
    size = encode_throughput.size_of("sd15", "full", options)
    encode_throughput.cached_rate("prompts", size, options, tmp_path)
    assert [count for kind, count in written if kind == "images" and count] == [32]
    assert [count for kind, count in written if kind == "prompts" and count] == [2, 17]


@pytest.mark.matrix
def test_the_rates_of_encoding_are_measured_alone_and_into_a_cache(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "encode.json", tmp_path / "encode.png"
    words = ("--smallest", "--images", "4", "--rounds", "1", "--device", "cpu")
    shown = run("encode_throughput.py", *words, "--output", str(file), "--plot", str(picture))
    found = json.loads(file.read_text())
    assert {kind: list(rates) for kind, rates in found["bare"].items()} == {
        "images": ["1", "2"],
        "prompts": ["1", "4"],
    }
    assert found["cached"].keys() == {"images", "prompts"} and all(rate > 0 for rate in found["cached"].values())
    assert all(f"| {kind} | into a cache |" in shown for kind in found["cached"]) and picture.stat().st_size > 10_000
