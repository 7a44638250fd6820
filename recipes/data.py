"""The cache of data sets: what is in it, where each came from and how large it is; `clear` removes it.

python recipes/data.py [list | clear]
"""

from cifar_fastai.commands import data, start

if __name__ == "__main__":
    start(data)
