"""The comparison of methods trains every method by one rule, says what helps by another one, and goes from a run to the
page."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trl_diffusion_sdpo import DiffusionSDPOConfig

ROOT = Path(__file__).parents[2]
NAMES = ("methods", "methods_plan", "methods_report")
OTHERS = ("front", "front_plan", "front_report", "front_trainers", "turns")
OTHERS += ("guided_front", "guided_plan", "guided_report", "guided_training")
PAGE = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("methods", "verdicts", "settings"))


@pytest.fixture(scope="module")
def modules():
    """`methods.py` and what belongs to it, by the end of their names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    found = {name.removeprefix("methods_"): __import__(name) for name in NAMES}
    yield SimpleNamespace(**found)
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in (*NAMES, *OTHERS):
        sys.modules.pop(name, None)


def made_row(modules, method, safeguard, seed, score, winner=0.0, **more):
    run = modules.plan.Run(method, safeguard, seed)
    images = {"score": score, "frechet": 0.3, "diversity": 0.1}
    row = {"key": run.key, "method": method, "safeguard": safeguard, "seed": seed, "settings": run.settings()}
    row |= {"how": modules.plan.Protocol().facts(), "errors": {"winner": winner}}
    return json.loads(json.dumps({**row, "plain": {"score": score - 0.1}, "best": {"scale": 2.0, **images}, **more}))


def rows_of_scores(modules, scores):
    """Rows of `{(method, safeguard): scores of the seeds}`."""
    return [
        made_row(modules, *kind, seed, score) for kind, found in scores.items() for seed, score in enumerate(found, 8)
    ]


def test_one_rule_gives_every_loss_its_beta(modules):
    """By hand: the defaults for Stable Diffusion 1.5 are 5000, 2000, 100 and 500; a fiftieth of each."""
    found = {name: method.all_settings() for name, method in modules.plan.METHODS.items()}
    assert [found[name]["beta"] for name in ("sigmoid", "hinge", "ipo", "robust", "dpop", "dspo_sdxl")] == [100] * 6
    assert [found[name]["beta"] for name in ("dmpo", "smpo", "linear", "simpo", "SmPO")] == [40, 40, 2, 10, 40]
    assert (found["mapo"]["beta"], found["mapo"]["mapo_temperature"]) == (0.1, 20)
    assert found["dspo"]["beta"] == 0.001 and "beta" not in found["sft"]


def test_every_setting_of_every_method_is_taken_and_acts(modules, tmp_path, caplog):
    for run in modules.plan.planned(seeds=[8]):
        args = DiffusionSDPOConfig(str(tmp_path), use_cpu=True, report_to="none", **run.settings())
        assert args.safeguard == run.safeguard or run.method == "base"
        found = {name: getattr(args, name) for name in run.settings()}
        assert found == run.settings()
    assert "no effect" not in caplog.text


def test_the_plan_has_each_method_with_and_without_the_safeguard_seed_by_seed(modules):
    runs = modules.plan.planned()
    of_seed = len(runs) // 3
    assert [run.seed for run in runs] == [8] * of_seed + [9] * of_seed + [10] * of_seed
    assert len({run.key for run in runs}) == len(runs)
    # Base and supervised tuning, which is there twice, have no loser.
    assert of_seed == 3 + 2 * (len(modules.plan.METHODS) - 2)
    assert [run.key for run in modules.plan.planned(["sft", "smpo"], [9])] == [
        "sft|none|9",
        "smpo|none|9",
        "smpo|parameter|9",
    ]


def test_two_rows_differ_by_two_standard_errors_of_the_difference_or_of_the_median_row(modules):
    """By hand, over three seeds. Differences to safeguarded DPO of 0.010, 0.020, 0.030: their deviation is 0.010, the
    standard error 0.010 / sqrt(3) = 0.00577, so that 0.020 is ahead and 0.0110 is not. Equal differences have none:
    there the median of the rows decides."""
    main = ("sigmoid", "parameter")
    scores = {
        main: (0.50, 0.51, 0.52),
        ("ipo", "none"): (0.510, 0.530, 0.550),  # +0.020, error 0.00577
        ("ipo", "parameter"): (0.501, 0.521, 0.541),  # +0.011, the same
        ("dmpo", "none"): (0.510, 0.520, 0.530),  # +0.010, none of its own
        ("dmpo", "parameter"): (0.484, 0.494, 0.504),  # -0.016, none of its own
        ("dpop", "none"): (0.46, 0.49, 0.52),  # -0.020, error 0.0115
    }
    comparison = modules.report.Comparison(rows_of_scores(modules, scores))
    found = {kind: comparison.verdict(one, comparison.main) for kind, one in comparison.measured.items()}
    # Errors 0, 0, 0.00577, 0.00577, 0.0115: the median is 0.00577.
    assert found == {
        main: "",
        ("ipo", "none"): "ahead",
        ("ipo", "parameter"): "level",
        ("dmpo", "none"): "level",
        ("dmpo", "parameter"): "behind",
        ("dpop", "none"): "level",
    }
    said = comparison.statements()
    assert "- **Ahead of** safeguarded DPO: without it ipo.\n" in said
    assert "- **Level with** safeguarded DPO: with the safeguard ipo; without it dmpo, dpop.\n" in said
    assert "- **Behind** safeguarded DPO: with the safeguard dmpo.\n" in said
    assert "- **Do not help here**, as neither of their rows is ahead: dmpo, dpop.\n" in said
    # With it minus without it: -0.009 for ipo, -0.026 for dmpo.
    assert "raises the score of 0 of 2 methods by this rule, leaves 1 level and lowers it for dmpo." in said


def test_rows_at_noise_by_inversion_say_what_the_winners_error_does_there(modules):
    """By hand: errors of 0.2 and 0.3 at the end, 1 of the base model at the same noise: -80 % and -70 %."""
    rows = [
        made_row(modules, "InPO", "none", seed, 0.5, own_noise={"winner": winner, "winner_change": change})
        for seed, winner, change in ((8, 0.2, -0.8), (9, 0.3, -0.7))
    ]
    rows += rows_of_scores(modules, {("sigmoid", "parameter"): (0.5, 0.6), ("InPO", "parameter"): (0.5, 0.6)})
    (said,) = modules.report.Comparison(rows).of_inversion()
    assert "changes against the base model by: InPO without it -75 %. *Winner change*" in said
    assert not modules.report.Comparison(rows[2:]).of_inversion()


def test_rows_are_compared_on_the_seeds_of_both(modules):
    rows = rows_of_scores(modules, {("sigmoid", "parameter"): (0.5, 0.6), ("ipo", "none"): (0.52, 0.62, 0.9)})
    comparison = modules.report.Comparison(rows)
    np.testing.assert_allclose(comparison.measured["ipo", "none"].over(comparison.main), [0.02, 0.02])
    one = modules.report.Comparison(rows[:1] + rows[2:3])  # one seed has no standard error
    assert one.verdict(one.measured["ipo", "none"], one.main) == ""
    assert one.statements() == "- **Nothing is judged yet**: every row has fewer than two seeds."
    some = modules.report.Comparison(rows[:2] + rows[2:4] + rows_of_scores(modules, {("dmpo", "none"): (0.5,)}))
    assert "- **Not judged**, with fewer than two seeds: without it dmpo." in some.statements()
    assert "Not judged" not in comparison.statements()


def test_the_report_writes_the_page_and_leaves_out_what_the_plan_does_not_make(modules, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, page, picture = tmp_path / "rows.jsonl", tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"before\n{PAGE}after\n")
    scores = {("base", "none"): (0.4, 0.4), ("sigmoid", "none"): (0.4, 0.5), ("sigmoid", "parameter"): (0.5, 0.6)}
    rows = rows_of_scores(modules, scores)
    other = made_row(modules, "ipo", "none", 8, 0.9) | {"settings": {"beta": 7}}
    cost = {"key": "cost|sigmoid|parameter", "method": "sigmoid", "safeguard": "parameter", "ratios": [1.0, 1.3, 1.1]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other, cost]))
    modules.report.report(file, page, picture)
    written, shown = page.read_text(), capsys.readouterr().out
    assert written.startswith("before\n") and written.endswith("after\n") and "0.9" not in written
    assert "Left out, as the plan does not make them: ipo|none|8." in shown
    scores = "0.450 ± 0.050 | 0.550 ± 0.050 (2) |  | "
    assert f"| sigmoid | yes | 2 | {scores} | +0.0000 ± 0.0000 | 0.30 ± 0.00 | 0.100 | 1.10 |" in written
    assert "| sigmoid |  | 2 | 0.350 ± 0.050 | 0.450 ± 0.050 (2) | -0.100 ± 0.000 | behind |" in written
    inversion = "noise_source: inversion, inversion: ddim, inversion_steps: 10"
    assert f"| InPO | `loss_type: sigmoid, beta: 100, {inversion}` |" in written
    assert picture.stat().st_size > 10_000
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], "how": {}}]))
    with pytest.raises(SystemExit, match="must be measured alike"):
        modules.report.report(file, page, picture)


def test_the_page_is_what_the_rows_say(modules):
    rows = list(modules.methods.rows_of(modules.report.RESULTS).values())
    page = modules.report.PAGE.read_text(encoding="utf-8")
    assert modules.report.rewritten(page, rows) == page


def test_a_run_is_measured_and_not_made_again(modules, tmp_path, capsys):
    run, file = modules.plan.Run("smpo", "parameter", 8), tmp_path / "rows.jsonl"
    file.write_text('{"key": "cut off')
    modules.methods.make_all([run], modules.plan.SMALLEST, file)
    (row,) = modules.methods.rows_of(file).values()
    assert row["key"] == "smpo|parameter|8" and row["seconds"] > 0
    assert row["settings"]["beta"] == 40 and row["settings"]["safeguard_mu"] == 0.8 and row["how"]["steps"] == 2
    scores = dict(row["chosen_from"])
    assert list(scores) == [1.0, 2.0] and row["best"]["scale"] == max(scores, key=scores.get)
    assert all(row[part].keys() >= {"score", "diversity", "frechet"} for part in ("plain", "best"))
    assert row["errors"]["winner"] != 0 and len(row["errors"]["winner_levels"]) == 8
    written = file.read_text()
    modules.methods.make_all([run], modules.plan.SMALLEST, file)
    assert file.read_text() == written
    assert not run.is_made(row, modules.plan.Protocol())


def test_a_run_at_noise_by_inversion_is_measured_there_too(modules, tmp_path):
    run, folder = modules.plan.Run("InPO", "none", 8), tmp_path / "files"
    row = modules.methods.make(run, modules.plan.SMALLEST, folder)
    assert row["own_noise"]["winner"] > 0 and row["own_noise"].keys() == {"winner", "winner_change"}
    assert run.is_made(row, modules.plan.SMALLEST)
    del row["own_noise"]
    assert not run.is_made(row, modules.plan.SMALLEST)


def test_a_run_that_fails_leaves_the_others_and_is_reported(modules, tmp_path, monkeypatch):
    def make(run, protocol, folder):
        if run.seed == 8:
            raise RuntimeError("no")
        return made_row(modules, run.method, run.safeguard, run.seed, 0.5)

    monkeypatch.setattr(modules.methods, "make", make)
    file = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed and have no row: sft\|none\|8"):
        modules.methods.make_all(modules.plan.planned(["sft"], [8, 9]), modules.plan.Protocol(), file)
    assert list(modules.methods.rows_of(file)) == ["sft|none|9"]


def test_shards_share_the_plan_between_them(modules, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(modules.methods, "make_all", lambda runs, protocol, file: made.extend(run.key for run in runs))
    for shard in ("1/2", "2/2"):
        modules.methods.main(["run", "--shard", shard, "--file", str(tmp_path / "a.jsonl")])
    assert sorted(made) == sorted(run.key for run in modules.plan.planned())
    with pytest.raises(SystemExit):
        modules.methods.main(["run", "--shard", "3/2"])
    with pytest.raises(SystemExit):
        modules.methods.main(["run", "--smallest"])


@pytest.mark.matrix
def test_the_cost_of_a_step_is_taken_in_turns(modules, tmp_path):
    file = tmp_path / "rows.jsonl"
    runs = modules.plan.planned(["base", "sft", "sigmoid"], [8])
    for _ in range(2):  # the second call measures Diffusion-DPO alone
        modules.methods.measure_cost(runs, modules.plan.SMALLEST, 2, file)
        found = modules.methods.rows_of(file)
    assert list(found) == ["cost|sigmoid|none", "cost|sft|none", "cost|sigmoid|parameter"]
    assert found["cost|sigmoid|none"]["ratios"] == [1, 1] and all(len(row["ratios"]) == 2 for row in found.values())
