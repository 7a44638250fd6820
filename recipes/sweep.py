"""Every setting of a list with every seed, compared on a validation split: one line per trial in a csv file.

    python recipes/sweep.py settings.txt --seeds 1,2,3 --out sweep.csv

settings.txt holds the flags of resnet18.py, a setting a line: `--lr 0.2 --cutout 12 --epochs 4 --subset 15000`.
"""

from cifar_fastai.cli import command, read_settings


@command
def main(
    settings: str,  # A text file, flags of resnet18.py on each line; empty lines and # lines are skipped
    seeds: str = "1,2,3",  # Seeds, separated by commas
    valid_pct: float = 0.1,  # Fraction of train for validation; the test split is never read
    out: str = "sweep.csv",  # The csv file; trials that have a row in it are skipped, interrupted ones go on
    runs: str = "runs/sweep",  # Folder for the runs themselves
    workers: int = None,  # Trials that are trained side by side (default: one for each GPU)
    storage: str = None,  # The file of an Optuna journal, for machines with csv files of their own
    debug: bool = False,  # Show tracebacks
):
    "Train every setting with every seed and write its validation accuracy and seconds to a csv file."
    trials = read_settings(settings)

    from cifar_fastai.runs.sweep import sweep  # loads torch, which --help does not need

    return sweep(trials, seeds, valid_pct, out, runs, workers=workers, storage=storage)


if __name__ == "__main__":
    main()
