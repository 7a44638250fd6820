"""Every number in README's table comes from a run that is kept, and every kept run agrees with itself."""

import csv
import json
from pathlib import Path

import pytest

from cifar_fastai.config import BASE, resolve
from cifar_fastai.errors import InputError
from cifar_fastai.recipe_pages import recipe_page
from cifar_fastai.runs.folder import suit_batches
from cifar_fastai.runs.table import BEGIN, END, Kept, keep_result, load_results, results_table, to_repeat, update_readme

ROOT = Path(__file__).parents[2]
RESULTS = sorted(path.parent for path in (ROOT / "recipes" / "results").glob("*/metrics.json"))


def test_readme_shows_what_the_kept_runs_give():
    assert RESULTS and all((run / "curves.png").exists() for run in RESULTS)
    assert not update_readme(ROOT / "README.md", ROOT / "recipes" / "results", check=True)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_a_kept_runs_accuracy_is_the_one_its_predictions_have(folder):
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["target"] == row["predicted"] for row in rows) / len(rows)
    assert right == pytest.approx(metrics["test_accuracy"], abs=1e-9)
    with open(folder / "history.csv", encoding="utf-8", newline="") as file:
        history = list(csv.DictReader(file))
    assert len(history) == metrics["epochs"]
    assert float(history[-1]["valid_accuracy"]) == pytest.approx(metrics["valid_accuracy"])
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert "/home" not in text and "/work" not in text and "\\\\" not in text


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_command_beside_a_kept_run_gives_its_parameters(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = to_repeat(config)["given"]
    cfg = resolve(recipe_page(config["recipe"])["RECIPE"], given)
    cfg.given = given
    suit_batches(cfg, config["train_images"])
    wanted = BASE | config["parameters"]  # those that were not there yet were as they are there
    machine = ("out", "device", "precision", "flip", "lr")
    assert {k: v for k, v in vars(cfg).items() if k in wanted and k not in machine} == {
        k: v for k, v in wanted.items() if k not in machine
    }
    assert cfg.lr == ("find" if "lr_find" in config else wanted["lr"])


def test_a_default_that_has_changed_since_stands_in_the_command():
    run = _result(1, 0.9)
    run.config["parameters"] |= {"wd": 0.123, "bs": 37}
    assert "--data cifar10 --bs 37 --lr 0.04 --wd 0.123 --valid-pct 0.1 --no-test --seed 1`" in results_table([run])


def test_a_run_made_by_the_command_of_an_older_one_joins_its_row():
    old = _result(1, 0.9)
    old.config["parameters"] |= {"wd": 0.123, "momentum": 0.8}
    old.config["given"]["label_smoothing"] = old.config["parameters"]["label_smoothing"] = 0.2
    new = _result(2, 0.9)
    new.config["given"] = to_repeat(old.config)["given"] | {"seed": 2}
    new.config["parameters"] |= old.config["parameters"] | {"seed": 2}
    assert "--seed 1 | 2`" in results_table([old, new])


def test_a_rate_that_a_range_test_found_is_found_again():
    run = _result(1, 0.9)
    run.config["parameters"]["lr"] = 0.003
    assert "--lr 0.003" in results_table([run])
    run.config["lr_find"] = {"valley": 0.003}
    assert "--lr" not in results_table([run])


def test_a_page_that_is_no_recipe_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    run = _result(1, 0.9)
    run.config["recipe"] = f"../{tmp_path}/evil"
    with pytest.raises(InputError, match="recipe .*: no such name"):
        results_table([run])


def _result(seed, accuracy, epochs=20):
    given = {"data": "cifar10", "seed": seed, "valid_pct": 0.1, "no_test": True}
    parameters = vars(resolve(recipe_page("resnet18")["RECIPE"], given))
    config = {"recipe": "resnet18", "given": given, "parameters": parameters, "train_images": 45_000}
    metrics = dict(
        dataset="CIFAR-10",
        model="resnet18",
        epochs=epochs,
        seed=seed,
        test_accuracy=accuracy,
        tta_accuracy=(accuracy or 0) + 0.01,
        tta_shift_accuracy=None,
        seconds=90.0,
        hardware="a GPU",
        precision="bf16",
    )
    return Kept(config, metrics, Path("results"))


def test_the_table_has_mean_and_deviation_over_seeds():
    table = results_table([_result(1, 0.90), _result(2, 0.92)])
    row = table.splitlines()[2]
    assert row == ("| CIFAR-10 | resnet18 | 20 | 2 | 91.00% ± 1.41% | 92.00% ± 1.41% | - | 1.5 min | a GPU, bf16 |")
    assert "`python recipes/resnet18.py --data cifar10 --valid-pct 0.1 --no-test --seed 1 | 2`" in table


def test_a_kept_run_names_no_place_on_a_disk(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = {
        "recipe": "resnet18",
        "given": {"data": "/home/ann/cifar10.tgz", "out": "/home/ann/run"},
        "parameters": {"data": "/home/ann/cifar10.tgz", "out": "/home/ann/run", "resume": None},
        "data_source": "/home/ann/cifar10.tgz",
    }
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="only a finished run"):
        keep_result(run, tmp_path / "results")
    for name in ("history.csv", "metrics.json", "predictions.csv", "curves.png"):
        (run / name).write_text("{}")
    kept = keep_result(run, tmp_path / "results")
    assert "ann" not in (kept / "config.json").read_text()
    assert load_results(tmp_path / "results")[0].config["given"]["data"] == "cifar10.tgz"


def test_the_curves_are_those_of_the_first_row(tmp_path):
    for name, accuracy in (("a", 0.7), ("b", 0.9)):
        run = tmp_path / "results" / name
        run.mkdir(parents=True)
        made = _result(1, accuracy, epochs=int(10 * accuracy))
        made.config["given"]["epochs"] = made.metrics["epochs"]
        for part, text in (("config", json.dumps(made.config)), ("metrics", json.dumps(made.metrics))):
            (run / f"{part}.json").write_text(text)
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert update_readme(readme, tmp_path / "results")
    text = readme.read_text()
    assert "![Loss and accuracy by epoch: resnet18, 9 epochs of CIFAR-10, seed 1](results/b/curves.png)" in text
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert not update_readme(readme, tmp_path / "results")


def test_a_readme_without_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(InputError, match="must stand in it once"):
        update_readme(tmp_path / "README.md", tmp_path)


def test_the_most_accurate_stands_first_in_its_data_set():
    runs = [_result(1, 0.7, epochs=3), _result(2, 0.9), _result(3, None), _result(4, 0.99)]
    for number, run in enumerate(runs):
        run.config["given"]["epochs"] = number + 1
        run.metrics["tta_accuracy"] = None
    runs[3].metrics["dataset"] = "digits"
    rows = results_table(runs).splitlines()[2:6]
    assert [row.split(" | ")[4] for row in rows] == ["90.00%", "70.00%", "-", "99.00%"]
