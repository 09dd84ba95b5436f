import json
import sys

import pytest

from benchmarks import check_scorers


@pytest.mark.parametrize(("other", "status"), [(0.2701, 0), (0.28, 1)])
def test_a_difference_above_the_tolerance_fails(other, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "ours.json").write_text(json.dumps({"hpsv2.1": [0.25, 0.27]}))
    (tmp_path / "originals.json").write_text(json.dumps({"hpsv2.1": [0.25, other]}))
    arguments = ["compare", str(tmp_path / "ours.json"), str(tmp_path / "originals.json")]
    monkeypatch.setattr(sys, "argv", ["check_scorers.py", *arguments])
    assert check_scorers.main() == status
    assert "hpsv2.1" in capsys.readouterr().out
