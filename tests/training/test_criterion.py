"""Every combination of loss, weighting and prediction is the formula of its paper, row by row, with the prior too."""

import math
from typing import Any, cast

import pytest
import torch

from training.criterion import Criterion, snr_weights
from training.dataplan import Role
from training.objective import dreambooth_loss
from training.objective_settings import Objective
from training.schedule import NoiseSchedule, PredictionType

SCHEDULER: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "v_prediction")
LOSSES: list[dict[str, Any]] = [
    {},
    {"loss": "huber"},
    {"loss": "huber", "huber_schedule": "exponential"},
    {"loss": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.3},
    {"loss": "smooth_l1"},
    {"loss": "l1"},
    {"loss": "log_cosh"},
]
WEIGHTINGS: list[dict[str, Any]] = [
    {},
    {"weighting": "min_snr"},
    {"weighting": "min_snr", "snr_gamma": 1.0},
    {"weighting": "debiased"},
    {"weighting": "p2", "p2_gamma": 0.5},
]


def by_hand(
    objective: Objective, prediction: str, alpha: float, t: int, ours: list[float], theirs: list[float]
) -> float:
    """The loss of one row in plain arithmetic."""
    snr, sigma = alpha / (1 - alpha), math.sqrt((1 - alpha) / alpha)
    own = {
        "none": snr if prediction == "epsilon" else snr + 1,
        "min_snr": min(snr, objective.snr_gamma),
        "debiased": math.sqrt(snr),
        "p2": snr / (1 + snr) ** objective.p2_gamma,
    }[objective.weighting]
    weight = own / (snr if prediction == "epsilon" else snr + 1)
    c = {
        "constant": objective.huber_c,
        "exponential": objective.huber_c ** (t / 1000),
        "snr": (1 - objective.huber_c) / (1 + sigma) ** 2 + objective.huber_c,
    }[objective.huber_schedule]
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        bent = math.sqrt((a - b) ** 2 + c * c) - c
        total += {
            "mse": (a - b) ** 2,
            "l1": abs(a - b),
            "huber": 2 * c * bent,
            "smooth_l1": 2 * bent,
            "log_cosh": math.log(math.cosh(a - b)),
        }[objective.loss]
    return weight * total / len(ours)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: "-".join(map(str, v.values())) or "mse")
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda v: "-".join(map(str, v.values())) or "none")
def test_the_loss_is_the_mean_of_the_subject_and_the_weighted_mean_of_the_class(
    weighting: dict[str, Any], loss: dict[str, Any], prediction: str, pairs: int
) -> None:
    objective = Objective(**weighting, **loss)
    schedule = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction})
    generator = torch.Generator().manual_seed(pairs)
    output, target = torch.randn(2, 2 * pairs, 2, 3, 3, generator=generator).unbind(0)
    timesteps = torch.randint(1000, (2 * pairs,), generator=generator)  # a row's own, whatever its role
    role = torch.tensor([Role.SUBJECT, Role.CLASS] * pairs)
    prior_weight = 0.7
    weight = torch.where(role == Role.CLASS, prior_weight, 1.0) / pairs
    losses = Criterion(objective, schedule).row_losses(output, target, timesteps)
    total, of_subject, of_class = dreambooth_loss(losses, weight, role, prior_weight)
    expected = [0.0, 0.0]
    for i, t in enumerate(timesteps.tolist()):
        alpha = float(schedule.alphas_cumprod[t])
        rows = (output[i].flatten().tolist(), target[i].flatten().tolist())
        expected[int(role[i])] += by_hand(objective, prediction, alpha, t, *rows) / pairs
    assert [float(of_subject), float(of_class)] == pytest.approx(expected, rel=1e-4)
    assert float(total) == pytest.approx(expected[0] + prior_weight * expected[1], rel=1e-4)


def test_two_rows_of_a_pair_keep_the_weights_of_their_own_timesteps() -> None:
    """The trap of an unchunked weight: the mean of l w over both roles' weights, 0.0505 where 0.1 is right."""
    schedule = NoiseSchedule(torch.tensor([0.5, 0.999]), "epsilon")
    criterion = Criterion(Objective(weighting="min_snr", snr_gamma=1.0), schedule)
    losses = criterion.row_losses(
        torch.full((2, 1, 1, 1), 0.1**0.5), torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    )
    assert losses.tolist() == pytest.approx([0.1, 0.1 / 999], rel=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
def test_a_timestep_without_any_signal_has_a_finite_weight(weighting: Any, prediction: str) -> None:
    alphas = torch.tensor([0.9, 0.5, 0.0])
    weights = snr_weights(
        Objective(weighting=weighting), NoiseSchedule(alphas, cast(PredictionType, prediction))
    )
    assert weights is not None and torch.isfinite(weights).all()
    if weighting == "min_snr":
        assert weights[2] == pytest.approx(1.0 if prediction == "epsilon" else 0.0, abs=1e-6)


def test_huber_is_the_square_where_it_is_small_and_lets_go_where_it_is_large() -> None:
    schedule = NoiseSchedule.from_config(SCHEDULER)
    criterion = Criterion(Objective(loss="huber", huber_schedule="constant"), schedule)
    difference = torch.tensor([0.001, 10.0]).reshape(2, 1, 1, 1).requires_grad_()
    losses = criterion.row_losses(difference, torch.zeros(2, 1, 1, 1), torch.tensor([500, 500]))
    losses.sum().backward()
    assert losses[0].detach() == pytest.approx(1e-6, rel=0.05)
    assert difference.grad is not None and difference.grad[1] == pytest.approx(
        0.2, rel=1e-3
    )  # 2 c, and not 20


def test_the_logarithm_of_the_cosine_is_there_where_the_cosine_is_not() -> None:
    criterion = Criterion(Objective(loss="log_cosh"), NoiseSchedule.from_config(SCHEDULER))
    difference = torch.tensor([0.01, 1000.0]).reshape(2, 1, 1, 1)
    losses = criterion.row_losses(difference, torch.zeros(2, 1, 1, 1), torch.tensor([500, 500]))
    assert losses.tolist() == pytest.approx([0.5e-4, 1000 - math.log(2)], rel=5e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: "-".join(map(str, v.values())) or "mse")
@pytest.mark.parametrize("weighting", WEIGHTINGS[:2], ids=["none", "min_snr"])
@pytest.mark.parametrize("outside", [0.0, 0.25])
@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_a_masked_row_is_the_loss_of_what_is_in_the_mask_and_of_drifting_outside(
    prior: float, outside: float, weighting: dict[str, Any], loss: dict[str, Any], prediction: str
) -> None:
    objective = Objective(**weighting, **loss, mask="alpha", mask_outside=outside, mask_prior=prior)
    schedule = NoiseSchedule.from_config({**SCHEDULER, "prediction_type": prediction})
    criterion, t = Criterion(objective, schedule), torch.tensor([300, 700])
    output, target, base = torch.randn(3, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1)).unbind(0)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])[:, None]
    losses = criterion.row_losses(output, target, t, mask, base if prior else None)
    plain = criterion.row_losses(output, target, t)
    for i, step in enumerate(t.tolist()):
        alpha, inside, drift = float(schedule.alphas_cumprod[step]), 0.0, 0.0
        parts = [(c, y, x) for c in range(2) for y in range(2) for x in range(2)]
        weights = {p: float(mask[i, 0, p[1], p[2]]) for p in parts}
        for p, m in weights.items():
            at = (objective, prediction, alpha, step, [float(output[i][p])])
            inside += (m + outside * (1 - m)) * by_hand(*at, [float(target[i][p])])
            drift += (1 - m) * by_hand(*at, [float(base[i][p])])
        area, rest = (
            sum(m + outside * (1 - m) for m in weights.values()),
            sum(1 - m for m in weights.values()),
        )
        expected = inside / area + (prior * drift / rest if rest else 0.0)
        assert float(losses[i]) == pytest.approx(expected, rel=1e-4)
    assert float(losses[1]) == pytest.approx(float(plain[1]), rel=1e-6)  # a mask of everything is none
