"""ResNet18 on CIFAR-10: 20 epochs of one cycle.

    python recipes/resnet18.py

On CIFAR-10 it is measured with --width 16, 0.7 million parameters: 90.32% ± 0.07%, with flip TTA 91.03% ± 0.12%
(three seeds, recipes/results), in 18 minutes on two threads of an AMD EPYC in bf16. The full width is measured on
CIFAR-10 (JPEG copy) only: 91.24%, with flip TTA 91.73% (one seed), at 5 minutes an epoch on such a machine.

The optimizer was selected by 3 epochs of 15,000 train images and 5,000 others for validation, one seed each
(recipes/results/sweep.csv): SGD had 64.6 %, Muon 75.1, 77.2 and 74.8 % at lr 0.025, 0.05 and 0.1. The default, for a
longer run, is a little below the best of these. At width 16, on 40,000 images in 6 epochs, 0.04 was 0.9 points better
than 0.02, and 0.06 no better (recipes/results/width16.csv).
"""

from cifar_fastai.commands import start, train

if __name__ == "__main__":
    start(train, "resnet18", __doc__)
