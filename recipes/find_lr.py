"""The learning-rate range test of resnet18.py: a picture of the curve with its suggestions, and the numbers.

python recipes/find_lr.py --out lr_find.png
"""

from cifar_fastai.cli import find_lr_command

if __name__ == "__main__":
    find_lr_command("resnet18", __doc__)
