"""The whole evening at its smallest: generate, pick in a browser as the world's oracle judges, train, compare."""

import json

import pytest
from PIL import Image
from tools.pairing.browser import CHROMIUM, Browser, served

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pipeline import base_pipeline_folder
from trl_diffusion_sdpo.tools.demo.world import captions

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
CALL = json.dumps({"num_inference_steps": 12, "guidance_scale": 3.0, "height": 32, "width": 32})


def pick(session, folder, browser, picks):
    """Press the key of the image that the oracle prefers, at most `picks` times, until all is judged."""
    for _ in range(picks):
        pair = browser.run("state.pair")
        if pair is None:
            return
        names = [session.codes[pair[side]] for side in ("first", "second")]
        images = [Image.open(folder / name).convert("RGB") for name in names]
        first, second = oracle_score(images, [session.images[names[0]].prompt] * 2)
        judged = browser.run("state.judged")
        browser.press("ArrowUp" if first == second else "ArrowLeft" if first > second else "ArrowRight")
        browser.wait(f"!busy && state.judged === {judged + 1}")


def look(browser, picture):
    """Take pictures of the page as a desktop and as a phone shows it. Nothing may run out of it at the right."""
    for width, height in ((1440, 900), (390, 844)):
        is_phone = width == 390
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        browser.wait(f"innerWidth === {width} && document.documentElement.scrollWidth === {width}", 5)
        browser.screenshot(picture.with_name(f"{picture.name}_{width}.png"))


def test_an_evening_with_the_oracles_taste(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [caption.text for caption in captions()]
    (tmp_path / "prompts.txt").write_text("\n".join(texts[::6]))
    (tmp_path / "others.txt").write_text("\n".join(texts[3::6]))
    base, folder = str(base_pipeline_folder()), tmp_path / "own"
    shared = ["--call_kwargs", CALL, "--device", "cpu", "--batch_size", "16"]
    generate = ["pairs", "generate", "--model", base, "--prompts", "prompts.txt", "--output_dir", "own"]
    assert main([*generate, "--images", "4", *shared]) == 0

    judged = []
    with Browser(tmp_path / "profile") as browser:
        for number, picks in enumerate((0, 20, 0, 100)):  # the server is started anew each time
            with served(folder, browser) as session:
                pick(session, folder, browser, picks)
                look(browser, tmp_path / f"evening_{number}")
                judged.append(browser.run("state.judged"))
        assert browser.errors() == []
    assert judged[:3] == [0, 20, 20] and judged[3] > 48
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 40
    for row in rows:
        chosen, rejected = (Image.open(folder / row[side]).convert("RGB") for side in ("chosen", "rejected"))
        assert oracle_score([chosen], [row["prompt"]]) > oracle_score([rejected], [row["prompt"]])

    assert main(["pairs", "check", "own", "--resolution", "32", "--sheet", "pairs.html"]) == 0
    train = ["train", "--dataset_name", "own", "--model_name_or_path", base, "--use_peft", "--output_dir", "tuned"]
    train += ["--max_steps", "60", "--learning_rate", "1e-3", "--resolution", "32", "--use_cpu"]
    train += ["--safeguard", "parameter", "--safeguard_mu", "0.8"]
    train += ["--random_flip", "false", "--per_device_train_batch_size", "16", "--report_to", "none"]
    assert main(train) == 0
    compare = ["evaluate", "--models", f"base={base}", "tuned=tuned", "--prompts", "others.txt", "--seeds", "0", "1"]
    scorer = ["--scorers", "trl_diffusion_sdpo.tools.demo.oracle:oracle", "--output_dir", "compared"]
    assert main([*compare, *scorer, *shared]) == 0
    results = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert results["comparisons"][0]["verdict"] != "worse" and (tmp_path / "compared" / "report.html").is_file()


def test_an_evening_with_thumbs(tmp_path, monkeypatch, capsys):
    """Like or dislike images by themselves, train on them, and get the verdict on held-out ones."""
    monkeypatch.chdir(tmp_path)
    texts = [caption.text for caption in captions()]
    (tmp_path / "prompts.txt").write_text("\n".join(texts[::3]))
    base, folder = str(base_pipeline_folder()), tmp_path / "own"
    generate = ["pairs", "generate", "--model", base, "--prompts", "prompts.txt", "--output_dir", "own"]
    assert main([*generate, "--images", "3", "--call_kwargs", CALL, "--device", "cpu", "--batch_size", "16"]) == 0
    with Browser(tmp_path / "profile") as browser:
        for number, presses in enumerate((0, 10, 62)):
            with served(folder, browser, thumbs=True) as session:
                for _ in range(presses):
                    name = session.codes[browser.run("state.pair.first")]
                    image = Image.open(folder / name).convert("RGB")
                    score = oracle_score([image], [session.images[name].prompt])[0]
                    judged = browser.run("state.judged")
                    browser.press("ArrowRight" if score > 0.5 else "ArrowLeft")
                    browser.wait(f"!busy && state.judged === {judged + 1}")
                look(browser, tmp_path / f"thumbs_{number}")
        assert browser.run("state.pair") is None and browser.errors() == []
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert len(rows) == 72 == len({row["image"] for row in rows})
    train = ["train", "--dataset_name", "own/images.jsonl", "--model_name_or_path", base, "--use_peft"]
    train += ["--loss_type", "tgo", "--beta", "40", "--output_dir", "tuned", "--max_steps", "40", "--test_size", "0.3"]
    train += ["--learning_rate", "1e-3", "--resolution", "32", "--use_cpu", "--eval_strategy", "steps"]
    train += ["--eval_steps", "20", "--random_flip", "false", "--per_device_train_batch_size", "16"]
    assert main([*train, "--report_to", "none"]) == 0
    verdict = json.loads((tmp_path / "tuned" / "verdict.json").read_text())
    assert verdict
    assert main(["pairs", "check", "own/images.jsonl", "--resolution", "32", "--sheet", "images.html"]) == 0
    assert "liked and" in capsys.readouterr().out
