"""The learning-rate range test of resnet18.py: a picture of the curve with its suggestions, and the numbers.

python recipes/find_lr.py --out lr_find.png
"""

from cifar_fastai.commands import find_lr, start

if __name__ == "__main__":
    start(find_lr, "resnet18", __doc__, lr="find")
