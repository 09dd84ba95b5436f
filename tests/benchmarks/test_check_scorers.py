from benchmarks.check_scorers import compare


def test_a_difference_above_the_tolerance_fails(capsys):
    assert compare("hpsv2.1", [0.25, 0.27], [0.25, 0.2701])
    assert not compare("hpsv2.1", [0.25, 0.27], [0.25, 0.28])
    assert "hpsv2.1" in capsys.readouterr().out
