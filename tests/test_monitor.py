"""Collapse figures against closed forms; the neighbour score against a slow loop."""

import math

import pytest
import torch

from medclr.monitor import collapse_warning, effective_rank, knn_accuracy, uniformity


def test_effective_rank_of_equal_singular_values_is_their_number():
    basis = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))[0]
    features = torch.cat([basis, -basis]) @ torch.eye(5, 12)  # centred, five equal singular values
    assert effective_rank(features) == pytest.approx(5, abs=1e-4)


def test_effective_rank_of_a_line_is_one_and_of_a_point_zero():
    line = torch.linspace(-1, 1, 20)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.full((20, 3), 0.1)) == 0


def test_uniformity_against_the_double_loop():
    x = torch.randn(17, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    terms = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(17) for j in range(i)]
    assert uniformity(x) == pytest.approx(math.log(sum(terms) / len(terms)), abs=1e-10)
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-6)


def test_knn_against_a_loop_and_blind_to_the_own_patient():
    generator = torch.Generator().manual_seed(2)
    n = 60
    patients = torch.arange(n) // 4
    labels = (patients % 3).clone()
    labels[::7] = -1
    features = torch.randn(n, 8, generator=generator) + torch.nn.functional.one_hot(labels.clamp(min=0), 8) * 1.5

    known = [i for i in range(n) if labels[i] >= 0]
    right: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for i in known:
        votes = [0.0, 0.0, 0.0]
        others = sorted((j for j in known if patients[j] != patients[i]),
                        key=lambda j: -float(torch.cosine_similarity(features[i], features[j], dim=0)))  # fmt: skip
        for j in others[:5]:
            votes[int(labels[j])] += math.exp(float(torch.cosine_similarity(features[i], features[j], dim=0)) / 0.07)
        right[int(labels[i])].append(votes.index(max(votes)) == int(labels[i]))
    expected = sum(sum(r) / len(r) for r in right.values()) / 3
    assert knn_accuracy(features, labels, patients, k=5) == pytest.approx(expected, abs=1e-6)


def test_knn_cannot_profit_from_copies_of_the_same_patient():
    features = torch.eye(6).repeat_interleave(2, 0)  # each patient's two slices are equal, patients are orthogonal
    labels = torch.tensor([0, 1, 0, 1, 0, 1]).repeat_interleave(2)
    assert knn_accuracy(features, labels, torch.arange(12) // 2, k=1) < 1


def test_knn_without_two_classes_is_nan():
    assert math.isnan(knn_accuracy(torch.randn(5, 3), torch.zeros(5, dtype=torch.long), torch.arange(5)))


def test_collapse_is_said_in_words_and_only_then():
    assert collapse_warning({"effective_rank": 60.0, "uniformity": -3.0}) is None
    sentence = collapse_warning({"effective_rank": 1.2, "uniformity": -0.001})
    assert sentence is not None
    assert "collaps" in sentence
    assert "optim.lr" in sentence
