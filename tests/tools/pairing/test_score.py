"""Scores for given pairs: every format, each image once, killed and resumed, and what training makes of them."""

import io
import itertools
import json
import math
import multiprocessing
import signal
import time

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from trl_diffusion_sdpo import load_pairs, score_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.tools.pairing import score
from trl_diffusion_sdpo.tools.pairing.publish import push_pairs
from trl_diffusion_sdpo.tools.rewards import FunctionScorer, load_scorer
from trl_diffusion_sdpo.utils.score_scale import SCALE_COLUMN


def image(value: int, size=(16, 16)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 0))


class Redness(FunctionScorer):
    """Scores by the red of the first pixel, and counts what it is asked."""

    def __init__(self, name="redness", missing=()):
        super().__init__(name, self.score)
        self.asked = []
        self.missing = missing

    def score(self, images, prompts):
        reds = [each.getpixel((0, 0))[0] for each in images]
        self.asked += zip(reds, prompts, strict=True)
        return [float(red) for red in reds]

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        reds = [each.getpixel((0, 0))[0] for each in images]
        return torch.where(torch.tensor([red in self.missing for red in reds]), torch.nan, scores)


def files(folder, *values):
    for value in values:
        image(value).save(folder / f"{value}.png")


def scored(folder):
    rows = load_pairs(folder)
    return [(row["chosen_score"], row["rejected_score"]) for row in rows.remove_columns(["chosen", "rejected"])]


FORMATS = {  # rows in the format, and the reds of winners and losers
    "canonical": (
        [{"prompt": "a", "chosen": image(10), "rejected": image(20)}],
        [(10, 20)],
    ),
    "branch_prompts": (
        [{"chosen_prompt": "a", "rejected_prompt": "b", "chosen": image(10), "rejected": image(20)}],
        [(10, 20)],
    ),
    "pickapic": (
        [
            {"caption": "a", "jpg_0": image(10), "jpg_1": image(20), "label_0": 0.0, "label_1": 1.0},
            {"caption": "a", "jpg_0": image(30), "jpg_1": image(40), "label_0": 1.0, "label_1": 0.0},
            {"caption": "a", "jpg_0": image(30), "jpg_1": image(40), "label_0": 0.5, "label_1": 0.5},
        ],
        [(20, 10), (30, 40)],
    ),
    "hpdv2": (
        [{"prompt": "a", "image_path": [image(10), image(20), image(30)], "rank": [2, 1, 3]}],
        [(20, 10), (10, 30), (20, 30)],
    ),
    "imagerewarddb": (
        [
            {"prompt_id": "1", "prompt": "a", "image": image(10), "rank": 2},
            {"prompt_id": "1", "prompt": "a", "image": image(20), "rank": 1},
        ],
        [(20, 10)],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_of_every_format_get_scores_and_keep_their_labels(name, tmp_path):
    rows, expected = FORMATS[name]
    lines = score_pairs(rows, [Redness()], tmp_path / "scored")
    assert sorted(scored(tmp_path / "scored")) == sorted((float(one), float(other)) for one, other in expected)
    assert f"{sum(row.get('label_0') == 0.5 for row in rows)} ties" in lines[0]
    written = load_pairs(tmp_path / "scored")
    for row in written:
        assert (row["chosen"].getpixel((0, 0))[0], row["rejected"].getpixel((0, 0))[0]) == (
            row["chosen_score"],
            row["rejected_score"],
        )
        low, high = min(map(min, expected)), max(map(max, expected))
        assert (row[SCALE_COLUMN][0]["low"], row[SCALE_COLUMN][0]["high"]) == (low, high)
    prompts = {"chosen_prompt", "rejected_prompt"} if name == "branch_prompts" else {"prompt"}
    assert prompts <= set(written.column_names)


def test_each_different_image_is_scored_once_for_each_prompt(tmp_path):
    files(tmp_path, 10, 20)
    image(10).save(tmp_path / "copy.bmp")  # the same pixels in another file
    rows = [("a", "10.png", "20.png"), ("a", "copy.bmp", "20.png"), ("b", "20.png", "10.png")]
    data = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True), weight=3.0) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in data))
    scorer = Redness()
    score_pairs(load_pairs(tmp_path / "pairs.jsonl"), [scorer], tmp_path / "scored")
    assert sorted(scorer.asked) == [(10, "a"), (10, "b"), (20, "a"), (20, "b")]
    assert scored(tmp_path / "scored") == [(10, 20), (10, 20), (20, 10)]
    written = load_pairs(tmp_path / "scored")
    assert written["weight"][:] == [3.0] * 3  # other columns stay
    stored = written.cast_column("chosen", datasets.Image(decode=False))["chosen"][0]
    assert stored["bytes"] is None and stored["path"] == str(tmp_path / "10.png")  # images stay where they are


def test_pairs_that_cannot_be_scored_are_left_out_and_counted(tmp_path):
    files(tmp_path, 10, 20, 30)
    (tmp_path / "bad.png").write_bytes(b"damaged")
    rows = [("10.png", "20.png"), ("bad.png", "10.png"), ("20.png", "30.png"), ("10.png", "gone.png")]
    data = [{"prompt": "a", "chosen": str(tmp_path / a), "rejected": str(tmp_path / b)} for a, b in rows]
    scorer = Redness(missing=(30,))
    report = "\n".join(score_pairs(data, [scorer], tmp_path / "scored"))
    assert scored(tmp_path / "scored") == [(10, 20)]
    assert "2 pairs left out because an image cannot be read, 1 because" in report and "gone.png" in report
    scorer.missing = ()
    score_pairs(data, [scorer], tmp_path / "scored")  # what has no score is asked again, and nothing else
    assert scored(tmp_path / "scored") == [(10, 20), (20, 30)]
    assert sorted(scorer.asked) == [(10, "a"), (20, "a"), (30, "a"), (30, "a")]


def test_masks_sources_and_seeds_of_pairs_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, 10, 20, 250, 240)
    row = {"prompt": "a", "chosen": "10.png", "rejected": "20.png", "source_image": image(5), "chosen_noise_seed": 7}
    rows = [
        {
            **row,
            "chosen_mask": Image.new("L", (16, 16), 255),
            "rejected_mask": Image.new("L", (16, 16), 200),
            "rejected_noise_seed": 8,
        }
    ]
    score_pairs(rows, [Redness()], "scored")
    monkeypatch.chdir("/")  # relative names still hold
    options = PairOptions(PairTransform(16), noise_seeds=True)
    item = prepare_dataset(load_pairs(tmp_path / "scored"), options)[0]
    assert item["noise_seeds"] == (7, 8) and item["masks"].shape == (2, 1, 16, 16)
    assert item["sources"][0].getpixel((0, 0)) == (5, 0, 0) and item["scores"] is not None


def test_several_scorers_make_lists_and_the_first_decides(tmp_path):
    doubled = FunctionScorer("doubled", lambda images, prompts: [2.0 * i.getpixel((0, 0))[0] for i in images])
    rows, _ = FORMATS["canonical"]
    score_pairs(rows, [Redness(), doubled], tmp_path / "scored")
    (row,) = load_pairs(tmp_path / "scored")
    assert (row["chosen_score"], row["chosen_scores"], row["rejected_scores"]) == (10.0, [10.0, 20.0], [20.0, 40.0])
    assert [scale["scorer"] for scale in row[SCALE_COLUMN]] == ["redness", "doubled"]
    described = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert [scorer["name"] for scorer in described["scorers"]] == ["redness", "doubled"]


@pytest.mark.parametrize("groups", [[[0, 1]], [[0], [1]]])
def test_each_image_is_decoded_once_for_all_scorers_on_the_device(groups, tmp_path, monkeypatch):
    files(tmp_path, 10, 20)
    decoded = []
    decode = ImageReader.decode
    monkeypatch.setattr(ImageReader, "decode", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(score, "fitting", lambda *_: groups)

    def whitened(images, prompts):  # changes its images in place
        for each in images:
            each.paste((255, 255, 255), (0, 0, 16, 16))
        return [0.0] * len(images)

    rows = [{"prompt": "a", "chosen": str(tmp_path / "10.png"), "rejected": str(tmp_path / "20.png")}]
    score_pairs(rows, [FunctionScorer("whitened", whitened), Redness()], tmp_path / "scored")
    assert len(decoded) == 2 * len(groups)
    (row,) = load_pairs(tmp_path / "scored")
    assert (row["chosen_scores"], row["rejected_scores"]) == ([0.0, 10.0], [0.0, 20.0])


def test_the_next_call_scores_only_what_is_new_and_forgets_a_torn_line(tmp_path):
    rows, _ = FORMATS["pickapic"]
    scorer = Redness()
    score_pairs(rows[:1], [scorer], tmp_path / "scored")
    (log,) = (tmp_path / "scored" / "scores").glob("*.jsonl")
    log.write_bytes(log.read_bytes() + b'{"image": "0123')
    score_pairs(rows, [scorer], tmp_path / "scored")
    assert sorted(red for red, _ in scorer.asked) == [10, 20, 30, 40]
    assert len(log.read_text().splitlines()) == 4
    files(tmp_path, 99)
    with pytest.raises(ValueError, match=str(tmp_path)):
        score_pairs(rows, [scorer], tmp_path)  # a folder with other files
    assert [path.name for path in tmp_path.glob("*.parquet")] == []


def slow_redness(images, prompts):
    time.sleep(0.02 * len(images))
    return [float(each.getpixel((0, 0))[0]) for each in images]


def test_a_call_that_is_killed_again_and_again_ends_with_all_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")  # a fork of this process may stop at a lock of OpenMP
    server.set_forkserver_preload(["trl_diffusion_sdpo.tools.pairing.score", "diffusers", "transformers"])
    values = list(range(10, 170))
    files(tmp_path, *values)
    names = [str(tmp_path / f"{value}.png") for value in values]
    rows = [{"prompt": "a", "chosen": a, "rejected": b} for a, b in itertools.pairwise(names)]
    arguments = (rows, [FunctionScorer("slow", slow_redness)], tmp_path / "scored")

    def lines():
        logs = [*tmp_path.glob("scored/scores/*.jsonl")]
        return logs[0].read_bytes().count(b"\n") if logs else 0

    for _ in range(4):
        before = lines()
        process = server.Process(target=score_pairs, args=arguments)
        process.start()
        while process.is_alive() and lines() <= before:
            process.join(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it had not ended
    score_pairs(*arguments)
    assert scored(tmp_path / "scored") == [(float(a), float(b)) for a, b in itertools.pairwise(values)]
    assert lines() == len(values)  # nothing was scored twice


@pytest.mark.parametrize(
    ("scorers", "match"),
    [
        ([], "none"),
        ([Redness(), Redness()], "redness.*redness"),
        ([load_scorer("vlm_judge", url="http://127.0.0.1:9/v1", model="m")], "vlm_judge"),
    ],
)
def test_scorers_that_cannot_score_pairs_are_refused(scorers, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        score_pairs(FORMATS["canonical"][0], scorers, tmp_path / "scored")
    assert not (tmp_path / "scored").exists()


def test_scored_pairs_keep_their_scale_on_the_hub(tmp_path, hub_server):
    score_pairs(FORMATS["canonical"][0], [Redness()], tmp_path / "scored")
    assert push_pairs(tmp_path / "scored", "tester/scored") == 1
    repo = hub_server.repos["tester/scored"]
    (file,) = [name for name in repo.files if name.endswith(".parquet")]
    (row,) = pq.read_table(io.BytesIO(repo.files[file])).to_pylist()
    assert row[SCALE_COLUMN][0]["scorer"] == "redness" and row["chosen_score"] == 10.0
    assert "redness" in repo.files["README.md"].decode()


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickscore(tmp_path):
    folder = save_clip(tmp_path / "clip", logit_scale=math.log(100.0))
    return {"model": folder, "processor": folder}


@pytest.fixture
def pickapic(tmp_path):
    """A table like Pick-a-Pic's, as one parquet file."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (8, 2, 24, 20, 3), dtype=np.uint8)
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            **dict.fromkeys(("jpg_0", "jpg_1"), datasets.Image()),
            **dict.fromkeys(("label_0", "label_1"), datasets.Value("float64")),
        }
    )
    rows = [
        {
            "caption": f"prompt {index}",
            **{f"jpg_{side}": Image.fromarray(pixels[index, side]) for side in range(2)},
            "label_0": float(index % 2),
            "label_1": float(1 - index % 2),
        }
        for index in range(8)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pickapic.parquet")
    return tmp_path / "pickapic.parquet"


def test_smpo_trains_on_a_table_like_pick_a_pic_after_two_commands_without_a_number(
    pickapic, pickscore, sd_folder, tmp_path, capsys
):
    """The example's own settings of loss and data, with the sizes of a test."""
    scored_folder = tmp_path / "scored"
    settings = json.dumps({"pickscore": pickscore})
    words = ["--scorer", "pickscore", "--scorer_settings", settings, "--device", "cpu", "--output", str(scored_folder)]
    assert main(["pairs", "score", str(pickapic), *words]) == 0
    assert "of 8 pairs" in capsys.readouterr().out
    small = (
        "--resolution 16 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --use_cpu true"
    )
    small += (
        " --bf16 false --report_to none --save_strategy no --dataloader_num_workers 0 --activation_checkpointing false"
    )
    run = tmp_path / "run"
    words = ["--dataset_name", str(scored_folder), "--model_name_or_path", sd_folder, "--output_dir", str(run)]
    assert main(["train", "--config", "sd15_smpo", *words, *small.split()]) == 0
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(history[0]["loss"])


def test_smpo_sees_the_published_preference_of_pickscores_cosines(pickapic, pickscore, make_trainer, tmp_path):
    """By hand: `p = exp(s_w) / (exp(s_w) + exp(s_l))` with `s = (cosine - 0.115435) / (0.282016 - 0.115435)`."""
    scorer = load_scorer("pickscore", **pickscore)
    score_pairs(load_pairs(pickapic), [scorer], tmp_path / "scored")
    pairs = load_pairs(tmp_path / "scored")
    trainer = make_trainer(train=pairs, loss_type="smpo", per_device_train_batch_size=8)
    (batch,) = trainer.get_train_dataloader()
    for row, winner, loser in zip(batch["rows"].tolist(), *batch["scores"].chunk(2), strict=True):
        cosines = scorer([pairs[row]["chosen"], pairs[row]["rejected"]], [pairs[row]["prompt"]] * 2).double() / 100
        better, worse = torch.exp((cosines - 0.115435) / (0.282016 - 0.115435))
        scale = trainer.args.loss_kwargs.get("smpo_score_scale", 1.0)
        assert torch.sigmoid((winner - loser) / scale).item() == pytest.approx(
            float(better / (better + worse)), abs=1e-5
        )


def test_calibrated_scores_are_shares_by_pickscores_own_log_odds(pickapic, pickscore, make_trainer, tmp_path):
    scorer = load_scorer("pickscore", **pickscore)
    score_pairs(load_pairs(pickapic), [scorer], tmp_path / "scored")
    pairs = load_pairs(tmp_path / "scored")
    trainer = make_trainer(train=pairs, loss_type="capo", calibrated_scores=True, per_device_train_batch_size=8)
    (batch,) = trainer.get_train_dataloader()
    gaps = torch.tensor([pairs[row]["chosen_score"] - pairs[row]["rejected_score"] for row in batch["rows"].tolist()])
    torch.testing.assert_close(batch["scores"].chunk(2)[0], torch.sigmoid(gaps))  # one pair a prompt
