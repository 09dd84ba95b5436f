"""Which pairs are evaluated: a split of their own, another data set, or some held out; never the training pairs."""

import json

import datasets
import pytest

from trl_diffusion_sdpo.cli.pair_arguments import PairArguments, load_datasets

COUNT = 12
SPLITS = {"train": range(8), "test": range(8, 12)}


@pytest.fixture(scope="module")
def places(tmp_path_factory, make_pairs):
    """Paths of the same twelve pairs in every form."""
    folder, pairs = tmp_path_factory.mktemp("data"), make_pairs(COUNT, size=(8, 8))
    parts = datasets.DatasetDict({name: pairs.select(rows) for name, rows in SPLITS.items()})
    found = {name: folder / name for name in ("file.parquet", "saved", "saved_dict", "two", "one", "link.parquet")}
    pairs.to_parquet(found["file.parquet"])
    found["link.parquet"].symlink_to(found["file.parquet"])
    pairs.save_to_disk(str(found["saved"]))
    parts.save_to_disk(str(found["saved_dict"]))
    for name, split in (("two", "train"), ("two", "test"), ("one", "train")):
        found[name].mkdir(exist_ok=True)
        parts[split].to_parquet(found[name] / f"{split}.parquet")
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def load(places, make_args):
    """`load(name, eval_strategy=, **script_arguments)`: prompts that are trained on, and those that are evaluated."""

    def call(name, eval_strategy="steps", eval_steps=5, **words):
        given = {key: places.get(value, value) for key, value in {"dataset_name": name, **words}.items()}
        args = make_args(eval_strategy=eval_strategy, eval_steps=eval_steps)
        loaded = load_datasets(PairArguments(**given), args)
        return tuple(None if part is None else [row["prompt"] for row in part] for part in loaded)

    return call


def prompts(rows) -> list[str]:
    return [f"prompt {row}" for row in rows]


@pytest.mark.parametrize("name", ["file.parquet", "saved"])
def test_all_of_one_split_is_trained_on_without_an_evaluation(load, name):
    assert load(name, eval_strategy="no") == (prompts(range(COUNT)), None)


@pytest.mark.parametrize("name", ["saved_dict", "two"])
def test_two_splits_are_trained_and_evaluated_on(load, name):
    assert load(name) == (prompts(SPLITS["train"]), prompts(SPLITS["test"]))


@pytest.mark.parametrize(("name", "more"), [("file.parquet", {}), ("saved", {"dataset_test_split": "validation"})])
def test_one_split_is_not_evaluated_on(load, name, more):
    with pytest.raises(ValueError, match="`eval_dataset_name`"):
        load(name, **more)


def test_a_missing_test_split_is_an_error_with_advice(load):
    with pytest.raises(ValueError, match="`eval_dataset_name`"):
        load("one")


def test_the_training_split_is_not_evaluated_on(load):
    with pytest.raises(ValueError, match="`dataset_test_split`"):
        load("two", dataset_test_split="train")


def test_slices_of_one_file_are_two_splits(load):
    pairs = load("file.parquet", dataset_train_split="train[:75%]", dataset_test_split="train[75%:]")
    assert pairs == (prompts(range(9)), prompts(range(9, COUNT)))


@pytest.mark.parametrize("name", ["one", "saved"])
def test_pairs_for_evaluation_are_named(load, name):
    found = load(name, eval_dataset_name="two")
    assert found[1] == prompts(SPLITS["test"]) and len(found[0]) == (8 if name == "one" else COUNT)


@pytest.mark.parametrize(
    ("name", "other", "more"),
    [
        ("file.parquet", "file.parquet", {}),
        ("file.parquet", "link.parquet", {}),
        ("saved", "saved", {}),
        ("two", "two", {"dataset_test_split": "train"}),
    ],
)
def test_naming_the_training_pairs_for_evaluation_is_refused(load, name, other, more):
    with pytest.raises(ValueError, match="`eval_dataset_name`"):
        load(name, eval_dataset_name=other, **more)


@pytest.mark.parametrize("name", ["file.parquet", "one"])
def test_pairs_are_held_out_of_the_training_split(load, name):
    train, test = load(name, test_size=0.25)
    count = 8 if name == "one" else COUNT
    assert len(test) == count / 4 and sorted(train + test) == sorted(prompts(range(count)))
    assert load(name, test_size=0.25) == (train, test), "the run's seed decides"


@pytest.mark.parametrize("words", [{"test_size": 0.25}, {"eval_dataset_name": "two"}])
def test_pairs_for_evaluation_are_evaluated_on_without_an_eval_strategy(places, make_args, words):
    args = make_args()
    assert args.eval_strategy == "no"
    words = {name: places.get(value, value) for name, value in words.items()}
    _, evaluation = load_datasets(PairArguments(dataset_name=places["file.parquet"], **words), args)
    assert len(evaluation) in (3, 4) and args.eval_strategy == "epoch"


def test_a_stream_is_not_split(load):
    with pytest.raises(ValueError, match="`test_size=.*stream"):
        load("file.parquet", test_size=0.25, dataset_streaming=True)


@pytest.mark.parametrize("size", [0.0, 1.5])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match="`test_size` must be a share in"):
        PairArguments(test_size=size)


# ---- Several data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def sets(places, tmp_path):
    """Two data sets in two formats, as entries of `datasets`."""
    rows = {"caption": ["a", "b", "c"], "jpg_0": ["x"] * 3, "jpg_1": ["y"] * 3, "label_0": [1.0, 0.0, 1.0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "picks.parquet")
    return [
        {"path": places["two"], "split": "test", "weight": 3},
        {"path": str(tmp_path / "picks.parquet"), "weight": 1.0, "dataset_format": "pickapic"},
    ]


def load_sets(make_args, sets, evaluates=False, **words):
    args = make_args(eval_strategy="steps" if evaluates else "no", eval_steps=5)
    return load_datasets(PairArguments(datasets=sets, **words), args)


def test_several_data_sets_are_loaded_with_weights_and_formats(make_args, sets):
    for given in (sets, json.dumps(sets)):
        mixture, nothing = load_sets(make_args, given)
        assert nothing is None and mixture.weights == [3, 1.0] and mixture.formats == [None, "pickapic"]
        one, other = mixture.by_name.values()
        assert one["prompt"][:] == prompts(SPLITS["test"])
        assert other["caption"][:] == ["a", "b", "c"]
    assert load_sets(make_args, sets, dataset_streaming=True)[0].is_stream


def test_pairs_are_held_out_of_all_rows_of_several_data_sets(make_args, sets):
    """Of seven rows; each data set keeps at least one, and what has nothing held out is not evaluated."""
    for size, count in ((1, 1), (4, 4), (0.3, 2)):
        train, evaluation = load_sets(make_args, sets, evaluates=True, test_size=size)
        rows, held = ([len(part) for part in mixture.by_name.values()] for mixture in (train, evaluation))
        assert sum(rows) == 7 - count and sum(held) == count and min(rows) > 0 and min(held) > 0
        assert train.weights == [3, 1.0] and evaluation.weights is None
        for name, part in evaluation.by_name.items():
            number = int(name.partition(":")[0])
            assert evaluation.formats[list(evaluation.by_name).index(name)] == [None, "pickapic"][number]
            column = ["prompt", "caption"][number]
            assert not {*part[column]} & {*train.by_name[name][column]}


def test_other_pairs_than_those_of_several_data_sets_are_evaluated(make_args, sets, places):
    """`sets` trains on the split `test` of `two`; its split `train` has other pairs."""
    for name, split, rows in (("saved_dict", "test", SPLITS["test"]), ("two", "train", SPLITS["train"])):
        words = {"eval_dataset_name": places[name], "dataset_test_split": split}
        _, other = load_sets(make_args, sets, evaluates=True, **words)
        assert other["prompt"][:] == prompts(rows)
    with pytest.raises(ValueError, match="`eval_strategy`.*`datasets`"):
        load_sets(make_args, sets, evaluates=True)
    words = {"eval_dataset_name": places["two"]}
    with pytest.raises(ValueError, match="`eval_dataset_name`"):
        load_sets(make_args, sets, evaluates=True, dataset_test_split="test", **words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{", "must be a list of mappings, in YAML or as JSON"),
        ([{"weight": 1}], "`datasets` must be a list of mappings"),
        ([{"path": "a", "wieght": 1}], "wieght"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "`weight` must be set for all"),
    ],
)
def test_bad_entries_of_datasets_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PairArguments(datasets=given)


def test_a_file_of_options_may_list_data_sets(tmp_path, sets):
    from trl_diffusion_sdpo.cli import train

    (tmp_path / "run.yaml").write_text(json.dumps({"datasets": sets, "output_dir": str(tmp_path / "out")}))
    script_args, *_ = train.parse(["--config", str(tmp_path / "run.yaml"), "--model_name_or_path", "x"])
    assert [entry.path for entry in script_args.sets] == [entry["path"] for entry in sets]
    typed, *_ = train.parse(["--datasets", json.dumps(sets), "--model_name_or_path", "x", "--output_dir", "o"])
    assert typed.sets == script_args.sets
