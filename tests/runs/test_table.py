"""Every number in the tables of results comes from a run that is kept, and every kept run agrees with itself."""

import os
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from cifar_fastai.cli import command_line
from cifar_fastai.errors import InputError
from cifar_fastai.files import read_json, write_json
from cifar_fastai.recipes import resolve_recipe
from cifar_fastai.runs import table
from cifar_fastai.runs.run import suit_data
from cifar_fastai.runs.table import BEGIN, END, Result, keep_result, load_results, overrides_today
from cifar_fastai.settings import Settings

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "recipes" / "results" / "digits-seed1"
RESULTS = sorted(path.parent for path in (ROOT / "recipes" / "results").glob("*/metrics.json"))

results_table = partial(table.results_table, command_line=command_line)
update_table = partial(table.update_table, command_line=command_line, summary=True)
every_kept_run = pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)


@pytest.mark.parametrize("page, summary", [("README.md", True), ("docs/evidence.md", False)])
def test_the_pages_show_what_the_kept_runs_give(page, summary):
    assert RESULTS and all((run / "curves.png").exists() for run in RESULTS)
    assert not update_table(ROOT / page, ROOT / "recipes" / "results", check=True, summary=summary)


@every_kept_run
def test_a_kept_runs_accuracy_is_the_one_its_predictions_have(folder):
    metrics, rows = read_json(folder / "metrics.json"), pd.read_csv(folder / "predictions.csv")
    assert (rows["target"] == rows["predicted"]).mean() == pytest.approx(metrics["test_accuracy"], abs=1e-9)
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == metrics["epochs"]
    assert history["valid_accuracy"].iloc[-1] == pytest.approx(metrics["valid_accuracy"])
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert "/home" not in text and "/work" not in text and "\\\\" not in text


@every_kept_run
def test_the_command_beside_a_kept_run_gives_its_parameters(folder):
    config = read_json(folder / "config.json")
    settings, overrides = resolve_recipe(config["recipe"], overrides_today(config))
    bs, lr = suit_data(settings, overrides, config["train_images"])
    then = Settings.from_dict(config["parameters"]).to_dict()  # a parameter that did not exist then was neutral
    now = settings.to_dict() | dict(bs=bs)
    assert {name for name in now if now[name] != then[name]} <= {"out", "device", "precision", "flip", "lr"}
    assert lr == ("find" if "lr_find" in config else then["lr"])


def result(seed, accuracy=0.9, epochs=20, parameters=(), **overrides):
    """A kept run of resnet18.py whose parameters were, beside `overrides`, by default `parameters` then."""
    overrides = dict(data="cifar10", seed=seed, valid_pct=0.1, no_test=True) | overrides
    parameters = resolve_recipe("resnet18", overrides)[0].to_dict() | dict(parameters)
    versions = {"git_commit": "abc1234"}
    config = dict(recipe="resnet18", given=overrides, parameters=parameters, train_images=45_000, versions=versions)
    metrics = dict(dataset="CIFAR-10", model="resnet18", epochs=epochs, seed=seed, seconds=90.0, precision="bf16")
    metrics |= dict(test_accuracy=accuracy, tta_accuracy=(accuracy or 0) + 0.01, tta_shift_accuracy=None)
    return Result(config, metrics | dict(hardware="a GPU"), Path("results"))


def test_a_default_that_has_changed_since_stands_in_the_command():
    run = result(1, parameters=dict(wd=0.123, bs=37))
    assert "resnet18.py --bs 37 --lr 0.04 --wd 0.123 --valid-pct 0.1 --no-test --seed 1`" in results_table([run])


def test_a_run_made_by_the_command_of_an_older_one_joins_its_row():
    old = result(1, parameters=dict(wd=0.123, momentum=0.8), label_smoothing=0.2)
    overrides = overrides_today(old.config) | {"seed": 2}
    new = result(parameters=old.config["parameters"] | {"seed": 2}, **overrides)
    assert "| resnet18 | 20 | 1, 2 |" in results_table([old, new])


def test_a_rate_of_a_range_test_is_searched_again_and_a_recipe_that_is_gone_is_named():
    run = result(1, parameters=dict(lr=0.003))
    assert "--lr 0.003" in results_table([run])
    run.config["lr_find"] = {"valley": 0.003}
    assert "--lr" not in results_table([run])
    run.config["recipe"] = "resnet99"
    with pytest.raises(InputError, match="recipe='resnet99': no such name"):
        results_table([run])


def test_the_table_has_mean_and_deviation_over_seeds():
    text = results_table([result(1, 0.90), result(2, 0.92)])
    row = "| CIFAR-10 | resnet18 | 20 | 1, 2 | 91.00% ± 1.41% | 92.00% ± 1.41% | - | 1.5 min | a GPU, bf16 | abc1234 |"
    assert text.splitlines()[2].startswith(row)
    assert "`python recipes/resnet18.py --valid-pct 0.1 --no-test --seed 1`" in text


def accuracies(text):
    return [row.split(" | ")[4] for row in text.splitlines()[2:]]


def test_the_most_accurate_stands_first_in_its_data_set():
    runs = [result(n, accuracy, epochs=n) for n, accuracy in enumerate((0.7, 0.9, None, 0.99), 1)]
    for run in runs:
        run.config["given"]["epochs"] = run.metrics["epochs"]
        run.metrics["tta_accuracy"] = None
    runs[3].metrics["dataset"] = "digits"
    assert accuracies(results_table(runs)) == ["90.00%", "70.00%", "-", "99.00%"]


def test_the_summary_has_the_rows_closest_to_todays_recipe_and_not_the_most_accurate():
    default, tuned, digits = result(1, 0.9), result(2, 0.95, label_smoothing=0.2), result(3, 0.99)
    digits.metrics["dataset"] = "digits"
    assert accuracies(results_table([tuned, default, digits], summary=True)) == ["90.00%", "99.00%"]
    default.metrics["dataset"] = "CIFAR-10 (JPEG copy)"
    shown = accuracies(results_table([tuned, default, digits], summary=True))
    assert shown == ["95.00%", "99.00%"], "a copy is not shown beside CIFAR-10 itself"
    assert accuracies(results_table([default], summary=True)) == ["90.00%"]
    header = results_table([default], summary=True).splitlines()[0]
    assert "command" in header and "commit" not in header


def test_a_kept_run_names_no_place_on_a_disk(tmp_path):
    run, places = tmp_path / "run", {"data": "/home/ann/cifar10.tgz", "out": "/home/ann/run"}
    shutil.copytree(KEPT, run)
    config = read_json(KEPT / "config.json") | {
        "given": places,
        "data_source": places["data"],
        "data_path": places["data"],
    }
    config["parameters"] |= places
    write_json(run / "config.json", config)
    for name in ("history.csv", "metrics.json", "predictions.csv", "curves.png"):
        (run / name).rename(tmp_path / name)
        with pytest.raises(InputError, match=f"no {name} in it; only a finished run"):
            keep_result(run, tmp_path / "results")
        (tmp_path / name).rename(run / name)
    kept = keep_result(run, tmp_path / "results")
    assert "/home" not in (kept / "config.json").read_text()
    assert load_results(tmp_path / "results")[0].config["given"]["data"] == "cifar10.tgz"


def test_links_and_pipes_are_neither_read_nor_written_through(tmp_path):
    """In a run of a stranger, and where the results are kept."""
    run, secret = tmp_path / "run", tmp_path / "secret"
    shutil.copytree(KEPT, run)
    secret.write_text("mine")
    (run / "curves.png").unlink()
    os.mkfifo(run / "curves.png")
    with pytest.raises(InputError, match="no curves.png in it"):
        keep_result(run, tmp_path / "results")
    (run / "curves.png").unlink()
    (run / "curves.png").symlink_to(secret)
    with pytest.raises(InputError, match="no curves.png in it"):
        keep_result(run, tmp_path / "results")
    (run / "curves.png").unlink()
    (run / "curves.png").write_text("a picture")
    (tmp_path / "results" / "run").mkdir(parents=True)
    for name in ("curves.png", "config.json"):
        (tmp_path / "results" / "run" / name).symlink_to(secret)
    assert (keep_result(run, tmp_path / "results") / "curves.png").read_text() == "a picture"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "run").symlink_to(tmp_path)
    with pytest.raises(InputError, match="run: is a link"):
        keep_result(run, tmp_path / "linked")
    assert secret.read_text() == "mine"


def test_a_table_is_written_between_its_marks(tmp_path):
    for name, accuracy, epochs in (("a", 0.7, 7), ("b", 0.9, 9)):
        run = result(1, accuracy, epochs)
        run.config["given"]["epochs"] = epochs
        (folder := tmp_path / "results" / name).mkdir(parents=True)
        write_json(folder / "config.json", run.config)
        write_json(folder / "metrics.json", run.metrics)
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(InputError, match="must stand in it once"):
        update_table(readme, tmp_path / "results")
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert update_table(readme, tmp_path / "results")
    text = readme.read_text()
    assert accuracies(text.split(BEGIN)[1].split(END)[0].strip()) == ["90.00%"]
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert not update_table(readme, tmp_path / "results")
