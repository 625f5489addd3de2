"""The losses' formulas as their papers write them, in numpy and float64.

Nothing is guarded here: where a formula overflows, so does this.
"""

from dataclasses import dataclass

import numpy as np

from engine.objective.interface import Divergence


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The constants of the formulas."""

    beta: float = 0.3
    eps: float = 0.0
    tau: float = 0.05
    lam: float = 50.0
    gamma: float = 0.5
    alpha: float = 1.0
    divergence: Divergence = "reverse_kl"
    power: float = 0.5


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def smoothed(x, n: Numbers):
    return -(1 - n.eps) * log_sigmoid(x) - n.eps * log_sigmoid(-x)


def score(u, n: Numbers):
    if n.divergence == "reverse_kl":
        return u
    if n.divergence == "forward_kl":
        return 1 - np.exp(-u)
    if n.divergence == "js_divergence":
        return np.log(2 * np.exp(u) / (1 + np.exp(u)))
    return (np.exp(u) ** (n.power - 1) - 1) / (n.power - 1)


def pair_loss(name, pc, pr, rc, rr, lc, lr, n: Numbers):
    """pc, pr, rc, rr: summed log-probabilities; lc, lr: numbers of tokens."""
    c, r, beta = pc - rc, pr - rr, n.beta
    sc, sr = score(c, n), score(r, n)
    x = beta * (sc - sr)
    if name == "sigmoid":
        return smoothed(x, n)
    if name == "sigmoid_norm":
        return smoothed(beta * (sc / lc - sr / lr), n)
    if name == "hinge":
        return np.maximum(0, 1 - x)
    if name == "ipo":
        return (sc / lc - sr / lr - 1 / (2 * beta)) ** 2
    if name == "exo_pair":
        p, q = np.array([sigmoid(x), sigmoid(-x)]), np.array([1 - n.eps, n.eps])
        logs = np.array([log_sigmoid(x), log_sigmoid(-x)])
        return (p * (logs - np.log(q)[:, None])).sum(axis=0)
    if name == "nca_pair":
        rewards = beta * np.array([c, r])
        return -log_sigmoid(rewards[0]) - 0.5 * log_sigmoid(-rewards).sum(axis=0)
    if name == "robust":
        right, wrong = -log_sigmoid(x), -log_sigmoid(-x)
        return ((1 - n.eps) * right - n.eps * wrong) / (1 - 2 * n.eps)
    if name == "bco_pair":
        return -log_sigmoid(beta * c) - log_sigmoid(-beta * r)
    if name == "bco_pair_shifted":
        d = np.mean([beta * c, beta * r])
        return -log_sigmoid(beta * c - d) - log_sigmoid(-(beta * r - d))
    if name == "sppo_hard":
        return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2
    if name == "aot":
        return smoothed(beta * (np.sort(pc - pr) - np.sort(rc - rr)), n)
    if name == "aot_unpaired":
        return smoothed(beta * (np.sort(c) - np.sort(r)), n)
    if name == "discopop":
        m = sigmoid(x / n.tau)
        return -(1 - m) * log_sigmoid(x) + m * np.exp(-x)
    if name == "apo_zero":
        return 1 - sigmoid(beta * c) + sigmoid(beta * r)
    if name == "apo_down":
        return sigmoid(beta * c) + 1 - sigmoid(beta * (c - r))
    if name == "sft":
        return -pc / np.mean(lc)
    if name == "dpop":
        return smoothed(beta * (c - r - n.lam * np.maximum(0, rc - pc)), n)
    if name == "cpo":
        return smoothed(beta * (pc - pr), n) - n.alpha * pc / np.mean(lc)
    if name == "simpo":
        return smoothed(beta * pc / lc - beta * pr / lr - n.gamma, n)
    if name == "orpo":
        odds = [np.exp(p / k) / -np.expm1(p / k) for p, k in ((pc, lc), (pr, lr))]
        return -pc / lc - beta * log_sigmoid(np.log(odds[0] / odds[1]))
    assert name == "kto_pair", name
    chosen = sigmoid(-beta * (c - max(0, np.mean(r))))
    rejected = sigmoid(-beta * (max(0, np.mean(c)) - r))
    return (chosen + rejected) / 2
