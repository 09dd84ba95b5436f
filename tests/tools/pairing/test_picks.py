"""Picks survive whatever happens, count once, and become pairs that training reads."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from tools.pairing.folders import write_folder

from trl_diffusion_sdpo.data import PairOptions, PairTransform, load_pairs, prepare_dataset
from trl_diffusion_sdpo.tools.pairing.picks import ConflictError
from trl_diffusion_sdpo.tools.pairing.session import PickSession
from trl_diffusion_sdpo.utils.statistics import TOO_FEW


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(session: PickSession, verdict: str, tab: str = "tab") -> dict:
    pair = session.state(tab)["pair"]
    return session.pick(tab, pair["first"], pair["second"], verdict)


def test_picks_become_pairs_that_training_reads(session, folder):
    names = []
    for verdict in ("first", "second", "tie", "both_bad", "skip"):
        pair = session.state("tab")["pair"]
        names.append((session.codes[pair["first"]], session.codes[pair["second"]]))
        session.pick("tab", pair["first"], pair["second"], verdict)
    rows = rows_of(folder / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [names[0], names[1][::-1]]
    assert rows[0]["chosen_seed"] == int(names[0][0][1])
    assert [row["verdict"] for row in rows_of(folder / "picks.jsonl")] == "first second tie both_bad skip".split()
    for path in (folder, folder / "pairs.jsonl"):
        prepared = prepare_dataset(load_pairs(path), PairOptions(PairTransform(16)))
        assert len(prepared) == 2 and prepared.report.undecodable == 0


def test_thumbs_become_single_images_that_training_reads(folder):
    session = PickSession(folder, thumbs=True)
    given = {}
    for verdict in ("liked", "disliked", "unsure", "liked"):
        shown = session.state("tab")["pair"]
        assert shown["first"] == shown["second"]
        given[session.codes[shown["first"]]] = verdict
        session.pick("tab", shown["first"], shown["second"], verdict)
    assert session.state("tab")["judged"] == 4 and session.state("tab")["left"] == 2
    state = session.undo("tab", session.state("tab")["last"])
    undone = session.codes[state["pair"]["first"]]
    assert given.pop(undone) == "liked" and state["judged"] == 3
    expected = {name: verdict == "liked" for name, verdict in given.items() if verdict != "unsure"}
    rows = rows_of(folder / "images.jsonl")
    assert {row["image"]: row["label"] for row in rows} == expected and not (folder / "pairs.jsonl").exists()
    with pytest.raises(ValueError, match="known verdict"):
        session.pick("tab", shown["first"], shown["second"], "first")
    session.close()
    prepared = prepare_dataset(load_pairs(folder), PairOptions(PairTransform(16)))
    assert len(prepared) == 1 and prepared.report.format == "single_images"
    pairs = PickSession(folder)  # the other page of the same folder
    assert pairs.state("tab")["judged"] == 0 and pairs.state("tab")["last"] is None
    judge(pairs, "first")
    pairs.close()
    session = PickSession(folder, thumbs=True)
    assert session.state("tab")["judged"] == 3 and rows_of(folder / "images.jsonl") == rows
    session.close()


def test_thumbs_keep_columns_of_the_manifest_but_no_label_of_it(tmp_path):
    rows = [
        {"prompt": "a", "image": f"{k}.png", "rating": k, "label": "cat", "score": k, "style": "b"} for k in range(2)
    ]
    del rows[1]["style"]
    folder = write_folder(tmp_path / "own", rows)
    session = PickSession(folder, thumbs=True)
    for _ in range(2):
        shown = session.state("tab")["pair"]["first"]
        session.pick("tab", shown, shown, "liked" if session.codes[shown] == "0.png" else "disliked")
    session.close()
    written = sorted(rows_of(folder / "images.jsonl"), key=lambda row: row["image"])
    assert written == [
        {"prompt": "a", "image": "0.png", "label": True, "score": 0, "style": "b"},
        {"prompt": "a", "image": "1.png", "label": False, "score": 1},
    ]
    loaded = load_pairs(folder)
    assert {"score", "style"} <= set(loaded.column_names)
    assert len(prepare_dataset(loaded, PairOptions(PairTransform(16)))) == 1


def test_thumbs_replace_no_pairs_of_the_folder(folder):
    """Pairs that `pairs generate` wrote stay until the first pick of a pair, and are read before single images."""
    generated = b'{"prompt": "a", "chosen": "a0.png", "rejected": "a1.png"}\n'
    (folder / "pairs.jsonl").write_bytes(generated)
    thumbs = PickSession(folder, thumbs=True)
    judge(thumbs, "liked")
    judge(thumbs, "disliked")
    thumbs.close()
    pairs = PickSession(folder)
    assert (folder / "pairs.jsonl").read_bytes() == generated and pairs.judged == 0
    pairs.close()
    assert "chosen" in load_pairs(folder).column_names
    (folder / "pairs.jsonl").write_bytes(b"")
    assert "label" in load_pairs(folder).column_names


def test_a_killed_process_loses_no_pick(folder):
    process = os.fork()
    if process == 0:
        session = PickSession(folder)
        for _ in range(3):
            judge(session, "first")
        os.write(session.log._file.fileno(), b'{"pick": 4, "fir')
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    session = PickSession(folder)
    assert session.state("t")["judged"] == 3 and len(rows_of(folder / "pairs.jsonl")) == 3
    judge(session, "second")
    assert len(rows_of(folder / "picks.jsonl")) == 4
    session.close()


def test_two_tabs_show_other_pairs_and_count_once(session):
    first, second = session.state("one")["pair"], session.state("two")["pair"]
    assert {first["first"], first["second"]} != {second["first"], second["second"]}
    session.pick("one", first["first"], first["second"], "first")
    for tab in ("one", "two"):  # a second click, or a tab that came late; the sides may differ
        with pytest.raises(ConflictError):
            session.pick(tab, first["second"], first["first"], "first")
    assert session.state("one")["judged"] == 1


def test_an_undone_pick_is_shown_again_and_is_undone_once(session, folder):
    judge(session, "first")
    shown = session.state("tab")["pair"]
    after = judge(session, "first")
    undone = session.undo("tab", after["last"])
    assert {undone["pair"]["first"], undone["pair"]["second"]} == {shown["first"], shown["second"]}
    with pytest.raises(ConflictError):
        session.undo("other tab", after["last"])
    assert undone["judged"] == 1 and len(rows_of(folder / "pairs.jsonl")) == 1
    session.close()
    again = PickSession(folder)
    assert again.state("tab")["judged"] == 1 and again.undo("tab", 1)["judged"] == 0
    again.close()


def test_a_deleted_image_is_left_out_and_counted(session, folder):
    pair = session.state("tab")["pair"]
    session.pick("tab", pair["first"], pair["second"], "first")
    judged = {session.codes[pair["first"]], session.codes[pair["second"]]}
    (unseen,) = {f"{pair['prompt']}{k}.png" for k in range(3)} - judged
    (folder / unseen).unlink()
    while session.state("tab")["pair"]:
        judge(session, "first")
    state = session.state("tab")
    assert state["gone"] == 1 and state["rows"] == state["judged"]
    (folder / judged.pop()).unlink()
    session.close()
    again = PickSession(folder)
    after = again.state("tab")
    assert after["left_out"] == {"without a file": 2}
    assert after["judged"] == state["judged"] and after["rows"] == state["rows"] - 1
    again.close()


def test_an_edited_prompt_is_that_of_all_its_pairs(session, folder):
    judge(session, "first")
    pair = session.state("tab")["pair"]
    prompt = pair["prompt"]
    session.edit_prompt("tab", pair["first"], "new words")
    while session.state("tab")["pair"]:
        judge(session, "first")
    counts = Counter(row["prompt"] for row in rows_of(folder / "pairs.jsonl"))
    assert counts["new words"] >= 2 and prompt not in counts


def test_one_folder_has_one_page(session, folder):
    with pytest.raises(ValueError, match=str(folder)):
        PickSession(folder)


def test_left_and_right_are_drawn_at_random(session):
    first = Counter(session.state("tab")["pair"]["first"] for _ in range(64))
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
    while pair := session.state("tab")["pair"]:
        assert "base" not in json.dumps(pair) and "tuned" not in json.dumps(pair)
        names = [session.codes[pair[side]] for side in ("first", "second")]
        models, cells = zip(*(name.split("/")[1:] for name in names), strict=True)
        assert set(models) == {"base", "tuned"} and cells[0] == cells[1]
        seeds.append(int(names[0][-5]))
        # The tuned model wins on prompts 0 to 6, and loses on prompt 7.
        wins = "7-" not in names[0]
        session.pick("tab", pair["first"], pair["second"], "first" if ("tuned" in names[0]) == wins else "second")
    assert seeds == [0] * 8 + [1] * 8
    sentences = session.result()
    (numbers,) = json.loads((session.folder / "human.json").read_text())
    assert numbers["rate"] == 7 / 8 and numbers["prompts"] == 8 and numbers["p_value"] == pytest.approx(18 / 256)
    assert numbers["verdict"] == TOO_FEW and "tuned" in sentences[0] and "8 prompts" in sentences[0]
    session.close()


def test_without_seeds_no_image_is_lost_and_those_without_a_counterpart_are_counted(tmp_path):
    rows = [{"model": model, "prompt": "a fox", "image": f"{model}{k}.png"} for model in "ab" for k in range(3)]
    session = PickSession(write_folder(tmp_path, [*rows, {**rows[0], "image": "more.png"}]))
    assert session.left_out.total() == 1
    shown = set()
    while pair := session.state("tab")["pair"]:
        shown |= {session.codes[pair[side]] for side in ("first", "second")}
        judge(session, "first")
    assert len(shown) == 6
    session.close()


@pytest.mark.parametrize("fact", [{"model": ["a"]}, {"seed": [1]}])
def test_a_model_or_seed_that_is_a_list_is_an_error_that_names_the_line(folder, fact):
    write_folder(folder, [{"prompt": "a", "image": "a.png"}, {"prompt": "a", "image": "b.png", **fact}])
    with pytest.raises(ValueError, match="line 2"):
        PickSession(folder)


def test_ties_count_half_and_skipped_pairs_nothing(tmp_path):
    session = blind(tmp_path, prompts=2)
    for verdict in ("tie", "skip", "both_bad", "skip"):
        judge(session, verdict)
    _, (numbers,) = session.order.result()
    assert numbers["rate"] == 0.5 and numbers["ties"] == 2 and numbers["missing"] == 2
    session.close()
