"""Unstructured pruning: which weights, how many, and that pruned ones stay at zero."""

import pytest
import torch
from torch import nn

from common.core.data import FixedBatches
from common.core.pruning.masks import (
    ALLOCATIONS,
    Infeasible,
    KeepMasked,
    Masks,
    erk_counts,
    layer_counts,
    norm_drop,
    prunable,
    select,
    smallest,
    squared_norm,
    uniform_plus_counts,
)
from common.core.trainer import Trainer


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    return nn.Sequential(*layers).to(dtype)


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return FixedBatches(
        [(torch.randn(8, 1, 8, 8, generator=generator).to(dtype), torch.arange(8) % 5) for _ in range(3)]
    )


def test_convolutions_and_linear_layers_are_prunable_and_nothing_else():
    assert list(prunable(network())) == ["0.weight", "3.weight", "5.weight"]
    assert list(prunable(network(), "conv")) == ["0.weight", "3.weight"]
    others = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    assert prunable(others) == {}
    assert list(prunable(nn.Linear(2, 2))) == ["weight"]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("fraction", [0.3, 0.75])
def test_every_allocation_prunes_the_asked_share(allocation, fraction):
    weights = prunable(network())
    kept = select(weights, fraction, allocation=allocation, generator=torch.Generator().manual_seed(3))
    total = sum(w.numel() for w in weights.values())
    pruned = total - sum(int(mask.sum()) for mask in kept.values())
    slack = 0 if allocation in ("global", "LAMP", "random") else len(weights)
    assert abs(pruned - round(fraction * total)) <= slack
    assert all(mask.shape == weights[name].shape for name, mask in kept.items())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_what_is_pruned_stays_pruned_in_later_cycles(allocation):
    weights, kept = prunable(network()), None
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        before, kept = kept, select(weights, 0.4, kept, allocation, generator)
        if before is not None:
            assert all(bool((before[name] | ~kept[name]).all()) for name in kept)
    density = sum(int(m.sum()) for m in kept.values()) / sum(m.numel() for m in kept.values())
    assert density == pytest.approx(0.6**3, abs=0.01)


def test_within_a_layer_the_smallest_magnitudes_go_first():
    weights = prunable(network())
    for allocation in ("global", "uniform", "uniform_plus", "ERK", "LAMP"):
        for name, mask in select(weights, 0.6, allocation=allocation).items():
            magnitudes = weights[name].detach().abs()
            if mask.any() and not mask.all():
                assert magnitudes[~mask].max() <= magnitudes[mask].min()


def test_random_pruning_is_blind_to_the_weights_and_follows_its_generator():
    one, other = prunable(network()), {n: torch.zeros_like(w) for n, w in prunable(network()).items()}
    first, again, different = (
        select(w, 0.5, allocation="random", generator=torch.Generator().manual_seed(seed))
        for w, seed in ((one, 7), (other, 7), (one, 8))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], different[name]) for name in first)


def test_equal_scores_are_pruned_in_their_order():
    scores = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0])
    assert smallest(scores, 3).tolist() == [False, True, True, True, False]
    assert not smallest(scores, 0).any() and smallest(scores, 5).all()
    with pytest.raises(ValueError):
        smallest(scores, 6)


def test_counts_are_rounded_half_to_even():
    for size, expected in ((5, 2), (7, 4), (9, 4), (11, 6)):
        assert layer_counts([(1, size)], [size], 0.5, "uniform") == [expected]


def test_lamp_of_a_layer_of_zeros_does_not_divide_by_zero():
    kept = select({"a": torch.zeros(4), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}, 0.5, allocation="LAMP")
    assert kept["a"].sum() == 0 and kept["b"].all()


def test_uniform_plus_says_what_it_cannot_do():
    with pytest.raises(Infeasible, match="hold only 10"):
        uniform_plus_counts([(8, 1, 3, 3), (10, 1, 1, 1)], 0.9)
    # the first convolution stays dense, the last linear layer keeps a fifth
    shapes = [(4, 1, 3, 3), (40, 4, 3, 3), (10, 100)]
    counts = uniform_plus_counts(shapes, 0.9)
    assert counts[0] == 0 and counts[2] == 800


def test_erk_keeps_a_layer_dense_rather_than_asking_for_more_than_it_has():
    counts = erk_counts([(4, 1, 3, 3), (64, 64, 3, 3)], 0.9)
    assert counts[0] == 0
    assert sum(counts) == pytest.approx(0.9 * (36 + 36864), abs=1)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_impossible_requests_are_refused(fraction):
    with pytest.raises(ValueError):
        select(prunable(network()), fraction)
    with pytest.raises(ValueError, match="unknown allocation 'magic'"):
        select(prunable(network()), 0.5, allocation="magic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_weights_stay_zero_through_momentum_and_weight_decay(dtype):
    model = network(dtype)
    masks = Masks.dense(model)
    trainer = Trainer(model, batches(dtype), nesterov=True, weight_decay=0.1, hooks=KeepMasked(masks))
    # momentum from before the pruning must not bring weights back
    trainer.fit([0.1] * 6)
    masks.prune(model, 0.7)
    masks.apply(model)
    trainer.fit([0.1] * 6)
    for name, weight in masks.weights(model).items():
        assert not weight[~masks.kept[name]].any()
        assert weight[masks.kept[name]].all()
    assert masks.sparsity == pytest.approx(0.7, abs=1e-3)


def test_gradients_and_momentum_can_be_masked():
    model = network()
    masks = Masks.dense(model)
    trainer = Trainer(model, batches())
    masks.apply_to_momentum(trainer)
    trainer.fit([0.1] * 3)
    masks.prune(model, 0.5)
    masks.apply_to_gradients(model)
    masks.apply_to_momentum(trainer)
    for name, weight in masks.weights(model).items():
        assert not weight.grad[~masks.kept[name]].any()
        assert not trainer.momentum_buffer(weight)[~masks.kept[name]].any()
        assert trainer.momentum_buffer(weight)[masks.kept[name]].any()


def test_masks_survive_a_checkpoint_and_follow_the_number_format():
    model = network()
    masks = Masks.dense(model)
    masks.prune(model, 0.5)
    keeper, other = KeepMasked(masks), KeepMasked(Masks.dense(model))
    other.load_state(Trainer(model, batches()), keeper.state())
    assert other.masks.counts == masks.counts
    masks.apply(model)
    assert masks.factors(model.double())["5.weight"].dtype == torch.float64


def test_effective_weights_hide_what_is_pruned_and_pass_no_gradient_to_it():
    model = network()
    masks = Masks.dense(model)
    masks.prune(model, 0.5)
    sum(w.sum() for w in masks.effective(model).values()).backward()
    for name, weight in masks.weights(model).items():
        assert torch.equal(weight.grad, masks.kept[name].float())


def test_norm_drop_is_the_relative_size_of_what_went():
    before, after = squared_norm([torch.tensor([3.0, 4.0])]), squared_norm([torch.tensor([0.0, 4.0])])
    assert norm_drop(before, after) == pytest.approx(3 / 5)
    assert norm_drop(0.0, 0.0) == 0.0
