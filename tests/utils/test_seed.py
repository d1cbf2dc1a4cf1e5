"""Random draws belong to a sample."""

import torch

from utils.seed import sample_generator, sample_seed


def test_seeds_differ_between_samples_epochs_and_runs():
    seeds = {
        sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(50)
    }
    assert len(seeds) == 450 and all(0 <= s < 2**63 for s in seeds)


def test_streams_of_one_sample_are_repeatable_and_independent():
    draw = lambda purpose: torch.rand(4, generator=sample_generator(7, purpose))  # noqa: E731
    assert torch.equal(draw("crops"), draw("crops"))
    assert not torch.equal(draw("crops"), draw("masks"))


def test_drawing_for_a_sample_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    torch.randperm(5, generator=sample_generator(7, "crops"))
    assert torch.equal(torch.get_rng_state(), before)
