"""Makes metrics.json: inputs, and what NumPy and SciPy say about them.

    python3 -m venv venv && venv/bin/pip install numpy scipy
    venv/bin/python make_metrics.py > metrics.json
"""

import json

import numpy as np
import scipy
from scipy import special, stats
from scipy.spatial import distance

rng = np.random.default_rng(20261124)


def reals(reference, candidate):
    a32, b32 = reference.astype(np.float32), candidate.astype(np.float32)
    a, b = a32.astype(np.float64), b32.astype(np.float64)
    error = a - b
    return {
        "reference": [float(x) for x in a32],
        "candidate": [float(x) for x in b32],
        "cosine": 1.0 - distance.cosine(a, b),
        "relative_l1": np.linalg.norm(error, 1) / np.linalg.norm(a, 1),
        "rmse": np.sqrt(np.mean(error**2)),
        "max_abs": np.max(np.abs(error)),
        "sqnr_db": 10 * np.log10(np.sum(a**2) / np.sum(error**2)),
    }


def top(row, k):
    return set(np.argsort(-row, kind="stable")[:k].tolist())


def probabilities(scores, noise):
    p32 = special.softmax(scores).astype(np.float32)
    q32 = special.softmax(scores + noise).astype(np.float32)
    p, q = p32.astype(np.float64), q32.astype(np.float64)
    return {
        "reference": [float(x) for x in p32],
        "candidate": [float(x) for x in q32],
        "kl": float(np.sum(special.kl_div(p, q))),
        "total_variation": 0.5 * distance.cityblock(p, q),
        "top1": float(np.argmax(p) == np.argmax(q)),
        "top5": len(top(p, 5) & top(q, 5)) / 5,
        "entropy_change": float(np.sum(special.entr(q)) - np.sum(special.entr(p))),
    }


def stream(values):
    values = np.asarray(values, dtype=np.float64)
    shares = [0.01, 0.25, 0.5, 0.9, 0.99]
    return {
        "values": values.tolist(),
        "mean": np.mean(values),
        "standard_error": stats.sem(values),
        "min": np.min(values),
        "max": np.max(values),
        "quantiles": [[s, float(np.quantile(values, s, method="lower"))] for s in shares],
    }


normal = rng.normal(size=301)
heavy = rng.standard_t(2, size=128) * 1e3
json.dump(
    {
        "made_by": f"make_metrics.py, NumPy {np.__version__}, SciPy {scipy.__version__}",
        "reals": [
            reals(normal, normal + rng.normal(size=301) * 1e-2),
            reals(heavy, np.round(heavy, 0)),
            reals(np.full(17, 1e-20), np.full(17, 1.0001e-20)),
            reals(rng.normal(size=40), rng.normal(size=40)),
        ],
        "probabilities": [
            probabilities(rng.normal(size=64) * 2, rng.normal(size=64) * 1e-2),
            probabilities(rng.normal(size=200) * 6, rng.normal(size=200) * 0.5),
            probabilities(np.zeros(50), rng.normal(size=50) * 1e-1),
            probabilities(rng.normal(size=12) * 20, rng.normal(size=12)),
        ],
        "streams": [
            stream(45 + rng.normal(size=400)),
            stream(np.exp(rng.normal(size=400) * 3 - 9)),
            stream([1e9 + 0.25, 1e9 + 0.5, 1e9 + 1.5]),
        ],
    },
    open(1, "w"),
    indent=1,
)
