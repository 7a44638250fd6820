"""ResNet18 on CIFAR-10: 20 epochs of one cycle.

    python recipes/resnet18.py

On CIFAR-10 (JPEG copy) it reaches 91.24%, with flip TTA 91.73% (one seed, recipes/results), at 5 minutes an epoch on
two threads of an AMD EPYC in bf16; with flips by chance it was 91.12%, in fp32 on one without bf16, at 17 to 20
minutes. The optimizer was selected by 3 epochs of 15,000 train images and 5,000 others for validation, one seed each
(recipes/results/sweep.csv): SGD had 64.6 %, Muon 75.1, 77.2 and 74.8 % at lr 0.025, 0.05 and 0.1. The default, for a
longer run, is a little below the best of these and was not tried there.
"""

from cifar_fastai.commands import start, train

if __name__ == "__main__":
    start(train, "resnet18", __doc__)
