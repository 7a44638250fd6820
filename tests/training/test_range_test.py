"""What a range test suggests; tests/runs has the runs that use it, and its interrupts."""

import numpy as np

from cifar_fastai.training.range_test import suggest


def test_no_rate_is_suggested_where_the_loss_has_exploded():
    """The rules find the same long fall, but after an explosion its rates are not offered."""
    start, fall = np.full(10, 2.25), 1 / (1 + np.exp(np.linspace(-4, 4, 50)))
    lrs = np.geomspace(1e-5, 10, 60).tolist()
    usual, exploded = (suggest(lrs, [*start, *(level + fall)], 60) for level in (1.2, 3))
    assert all(0 < lr < 1 for lr in usual.values())
    assert {name for name, lr in exploded.items() if lr} == {"minimum"} and exploded["minimum"] < lrs[9]


def test_a_low_first_batch_is_no_explosion_of_the_others():
    """Noise without a fall, after a first batch that happened to be easy."""
    losses = [0.9, *(1.14 + 0.01 * np.random.default_rng(0).standard_normal(99))]
    assert all(suggest(np.geomspace(1e-5, 10, 100).tolist(), losses, 100).values())
