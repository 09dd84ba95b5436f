"""The example that lets a model improve on its own images, in its smallest form, and a second call that goes on."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "self_improve.py"


def test_two_rounds_on_the_embedded_world(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("self_improve", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    prompts = tmp_path / "prompts.txt"
    from trl_diffusion_sdpo.demo.world import captions

    texts = [caption.text for caption in captions()]
    prompts.write_text("\n".join(texts[:3]))
    (tmp_path / "test.txt").write_text("\n".join(texts[3:5]))
    words = [
        "--prompts",
        str(prompts),
        "--test_prompts",
        str(tmp_path / "test.txt"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    words += [
        "--images",
        "4",
        "--max_steps",
        "2",
        "--num_inference_steps",
        "2",
        "--margin",
        "0.1",
        "--batch_size",
        "2",
    ]
    evaluation = example.main(words)
    assert evaluation.models == ("base", "round-1", "round-2")
    second = json.loads((tmp_path / "out" / "round-2" / "training_args.json").read_text())
    assert second["max_steps"] == 2 and second["safeguard"] == "parameter"
    assert (tmp_path / "out" / "evaluation" / "report.html").is_file()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/round-*/adapter_model.safetensors")}
    assert len(times) == 2
    example.main(words)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert "Round 2" in capsys.readouterr().out
