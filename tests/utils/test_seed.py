"""Random draws belong to a sample."""

import torch

from utils.seed import sample_generator, sample_seed, seed_process


def test_seeds_differ_between_samples_epochs_and_runs():
    seeds = {
        sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(50)
    }
    assert len(seeds) == 450 and all(0 <= s < 2**63 for s in seeds)


def test_streams_of_one_sample_are_repeatable_and_independent():
    draw = lambda purpose: torch.rand(4, generator=sample_generator(7, purpose))  # noqa: E731
    assert torch.equal(draw("crops"), draw("crops"))
    assert not torch.equal(draw("crops"), draw("masks"))


def test_each_process_goes_on_with_a_state_of_its_own():
    def draw(seed, step, rank):
        torch.manual_seed(seed)
        seed_process(seed, step, rank)
        return torch.rand(4)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alone = torch.rand(4)
        assert torch.equal(draw(0, 0, 0), alone) and torch.equal(draw(0, 9, 0), alone)
        others = [draw(seed, step, rank) for seed in (0, 1) for step in (0, 9) for rank in (1, 2)]
        drawn = {tuple(x.tolist()) for x in (alone, *others)}
        assert len(drawn) == 1 + len(others) and torch.equal(draw(0, 9, 1), others[2])
