"""Every setting of a list with every seed, compared on a validation split: one line per trial in a csv file.

    python recipes/sweep.py settings.txt --seeds 1,2,3 --out sweep.csv

settings.txt holds the flags of resnet18.py, a setting a line: `--lr 0.2 --cutout 12 --epochs 4 --subset 15000`.
"""

from cifar_fastai.commands import start, sweep

if __name__ == "__main__":
    start(sweep)
