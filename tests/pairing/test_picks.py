"""Picks survive a kill, count once, and become pairs that training reads."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from pairing.folders import write_folder

from trl_diffusion_sdpo.data import PairOptions, PairTransform, load_pairs, prepare_dataset
from trl_diffusion_sdpo.pairing.session import PickSession


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(session: PickSession, verdict: str) -> dict:
    pair = session.state()["pair"]
    return session.pick(pair["first"], pair["second"], verdict)


def test_picks_become_pairs_that_training_reads(session, folder):
    names = []
    for verdict in ("first", "second", "tie", "both_bad", "skip"):
        pair = session.state()["pair"]
        names.append((session.codes[pair["first"]], session.codes[pair["second"]]))
        session.pick(pair["first"], pair["second"], verdict)
    rows = rows_of(folder / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [names[0], names[1][::-1]]
    assert rows[0]["chosen_seed"] == int(names[0][0][1])
    assert [row["verdict"] for row in rows_of(folder / "picks.jsonl")] == "first second tie both_bad skip".split()
    for path in (folder, folder / "pairs.jsonl"):
        prepared = prepare_dataset(load_pairs(path), PairOptions(PairTransform(16)))
        assert len(prepared) == 2 and prepared.report.undecodable == 0


def test_a_killed_process_loses_no_pick(folder):
    process = os.fork()
    if process == 0:
        session = PickSession(folder)
        for _ in range(3):
            judge(session, "first")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    session = PickSession(folder)
    assert session.state()["judged"] == 3 and len(rows_of(folder / "pairs.jsonl")) == 3
    judge(session, "second")
    assert len(rows_of(folder / "picks.jsonl")) == 4
    session.close()


def test_a_pair_counts_once(session):
    shown = session.state()["pair"]
    session.pick(shown["first"], shown["second"], "first")
    again = session.pick(shown["second"], shown["first"], "first")  # from a second tab
    assert "error" in again and again["judged"] == 1


def test_every_image_is_shown_before_the_first_pair_of_distant_images(session):
    pairs = []
    while pair := session.state()["pair"]:
        pairs.append(sorted(session.codes[pair[side]] for side in ("first", "second")))
        session.pick(pair["first"], pair["second"], "tie")
    near = [["a0.png", "a1.png"], ["a1.png", "a2.png"], ["b0.png", "b1.png"], ["b1.png", "b2.png"]]
    assert pairs == [*near, ["a0.png", "a2.png"], ["b0.png", "b2.png"]]


def test_an_undone_pick_is_shown_again(session, folder):
    judge(session, "first")
    shown = session.state()["pair"]
    judge(session, "first")
    undone = session.undo()
    assert {undone["pair"]["first"], undone["pair"]["second"]} == {shown["first"], shown["second"]}
    assert undone["judged"] == 1 and len(rows_of(folder / "pairs.jsonl")) == 1
    session.close()
    again = PickSession(folder)
    assert again.state()["judged"] == 1 and again.undo()["judged"] == again.undo()["judged"] == 0
    again.close()


def test_pairs_of_deleted_images_are_left_out_and_counted(session, folder):
    while session.state()["pair"]:
        judge(session, "first")
    (folder / "a0.png").unlink()
    session.close()
    again = PickSession(folder)
    state = again.state()
    assert state["left_out"] == {"without a file": 1} and state["judged"] == 6 and state["pairs"] == 4
    again.close()


def test_one_folder_has_one_page(session, folder):
    with pytest.raises(ValueError, match=str(folder)):
        PickSession(folder)


def test_left_and_right_are_drawn_at_random(session):
    first = Counter(session.state()["pair"]["first"] for _ in range(64))
    assert len(first) == 2 and min(first.values()) > 10


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "../outside.png", "prompt": "a"}, "outside of the folder"),
        ({"image": "link.png", "prompt": "a"}, "outside of the folder"),
        ({"image": "/etc/hostname", "prompt": "a"}, "outside of the folder"),
        ({"image": "a\0.png", "prompt": "a"}, "outside of the folder"),
        ({"image": "manifest.jsonl", "prompt": "a"}, "no image"),
        ({"image": "gone.png", "prompt": "a"}, "without a file"),
        ({"image": "a0.png", "prompt": "a"}, "listed twice"),
        ({"image": "a0.png", "prompt": 7}, "without a prompt of 1 to 20000 characters"),
        ({"image": "a0.png", "prompt": "x" * 30_000}, "without a prompt of 1 to 20000 characters"),
    ],
)
def test_a_bad_line_of_the_manifest_is_counted(folder, row, reason):
    (folder.parent / "outside.png").touch()
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with open(folder / "manifest.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    session = PickSession(folder)
    assert session.left_out == {reason: 1}
    session.close()


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', "[" * 9999])
def test_a_manifest_that_is_no_list_of_images_is_an_error(folder, line):
    (folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="manifest.jsonl, line 1"):
        PickSession(folder)


def test_one_image_a_prompt_is_an_error(tmp_path):
    write_folder(tmp_path, [{"prompt": str(k), "image": f"{k}.png"} for k in range(3)])
    with pytest.raises(ValueError, match="3 images of 3 prompts"):
        PickSession(tmp_path)


def blind(tmp_path, prompts=8):
    rows = [
        {"model": model, "prompt": f"p{k}", "seed": seed, "image": f"images/{model}/{k}-{seed}.png"}
        for model in ("base", "tuned")
        for k in range(prompts)
        for seed in (0, 1)
    ]
    return PickSession(write_folder(tmp_path / "evaluation", rows))


def test_models_are_compared_blindly_and_every_prompt_before_the_second_seed(tmp_path):
    session = blind(tmp_path)
    seeds = []
    while pair := session.state()["pair"]:
        assert "base" not in json.dumps(pair) and "tuned" not in json.dumps(pair)
        names = [session.codes[pair[side]] for side in ("first", "second")]
        models, cells = zip(*(name.split("/")[1:] for name in names), strict=True)
        assert set(models) == {"base", "tuned"} and cells[0] == cells[1]
        seeds.append(int(names[0][-5]))
        # The tuned model wins on prompts 0 to 6, and loses on prompt 7.
        wins = "7-" not in names[0]
        session.pick(pair["first"], pair["second"], "first" if ("tuned" in names[0]) == wins else "second")
    assert seeds == [0] * 8 + [1] * 8
    sentences = session.result()
    (numbers,) = json.loads((session.folder / "human.json").read_text())
    assert numbers["rate"] == 7 / 8 and numbers["prompts"] == 8 and numbers["p_value"] == pytest.approx(18 / 256)
    assert numbers["verdict"] == "no difference shown" and "tuned" in sentences[0]
    session.close()


def test_ties_count_half_and_skipped_pairs_nothing(tmp_path):
    session = blind(tmp_path, prompts=2)
    for verdict in ("tie", "skip", "both_bad", "skip"):
        judge(session, verdict)
    session.result()
    (numbers,) = json.loads((session.folder / "human.json").read_text())
    assert numbers["rate"] == 0.5 and numbers["ties"] == 2 and numbers["missing"] == 2
    session.close()
