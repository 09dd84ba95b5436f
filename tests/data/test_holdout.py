"""Pairs held out of a training set: the rows of a prompt stay together, and the seed decides which are held out."""

from collections import Counter

import datasets
import pytest

from trl_diffusion_sdpo.data import holdout


def pairs(prompts: list[str | None], **columns: list) -> datasets.Dataset:
    """Canonical pairs by file name: nothing here opens an image."""
    names = [f"{number}.png" for number in range(len(prompts))]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": names, "rejected": names, **columns})


def numbers(dataset: datasets.Dataset) -> list[int]:
    return [int(name.removesuffix(".png")) for name in dataset["chosen"]]


def hold_out(rows: datasets.Dataset, size: float, seed: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    return holdout.hold_out([rows], size, seed=seed, formats=[None])[0]


PROMPTS = [f"prompt {row % 20}" for row in range(60)]  # twenty prompts with three rows each


@pytest.mark.parametrize(("size", "held"), [(0.25, 15), (10, 9), (59, 57)])
def test_rows_are_held_out_by_prompt_up_to_the_size(size, held):
    train, test = hold_out(pairs(PROMPTS), size, seed=0)
    assert len(test) == held and len(train) == 60 - held
    assert sorted(numbers(train) + numbers(test)) == list(range(60))
    assert not set(train["prompt"]) & set(test["prompt"])
    assert set(Counter(test["prompt"]).values()) == {3}
    assert numbers(test) == sorted(numbers(test)), "the rows keep their order"


def test_rows_of_a_single_prompt_are_not_held_out():
    with pytest.raises(ValueError, match="`test_size=0.3`"):
        hold_out(pairs(["the same"] * 10), 0.3, seed=0)


@pytest.mark.parametrize("size", [60, 0.999])
def test_a_size_that_leaves_nothing_to_train_on_is_refused(size):
    with pytest.raises(ValueError, match="must leave rows to train on; the data set has 60"):
        hold_out(pairs(PROMPTS), size, seed=0)


def test_the_prompt_is_the_column_that_the_format_reads():
    """Pick-a-Pic's rows are read by `caption`."""
    rows = {
        "caption": [f"caption {row // 2}" for row in range(20)],
        "prompt": [f"prompt {row}" for row in range(20)],
        "label_0": [1.0] * 20,
        "jpg_0": [b""] * 20,
        "jpg_1": [b""] * 20,
    }
    train, test = hold_out(datasets.Dataset.from_dict(rows), 0.5, seed=0)
    assert not set(train["caption"]) & set(test["caption"])


def several():
    """Twenty prompts in each of two formats, ten of them in both; the second has five images a prompt."""
    rows = [(f"prompt {prompt}", str(prompt)) for prompt in range(10, 30) for _ in range(5)]
    ranked = {"prompt": [text for text, _ in rows], "prompt_id": [number for _, number in rows]}
    ranked |= {"image": ["a.png"] * 100, "rank": list(range(100))}
    return [pairs(PROMPTS), datasets.Dataset.from_dict(ranked)]


@pytest.mark.parametrize("size", [0.25, 40])
def test_of_several_data_sets_a_prompt_is_on_one_side_in_all(size):
    for seed in range(5):
        split = holdout.hold_out(several(), size, seed=seed, formats=[None, None])
        trained, held = ({text for part in side for text in part["prompt"]} for side in zip(*split, strict=True))
        assert not trained & held and len(trained | held) == 30
        assert 30 < sum(len(test) for _, test in split) <= 40
        assert sum(len(part) for both in split for part in both) == 160
