"""Medians, ratios, tables."""

import math

import numpy as np
from tabulate import tabulate

# Larger outputs come in fresh pages, whose first touch takes most of the time.
LARGE = 32e6


def timing(seconds):
    """What is kept of the seconds of all calls."""
    lower, median, upper = np.percentile(seconds, [25, 50, 75])
    return {
        "median": digits(median),
        "lower_quartile": digits(lower),
        "upper_quartile": digits(upper),
        "fastest": digits(min(seconds)),
        "calls": len(seconds),
    }


def digits(number):
    """Six digits: more would be noise in the JSON."""
    return float(f"{number:.6g}")


def geometric_mean(numbers):
    numbers = [number for number in numbers if number is not None]
    return digits(math.exp(sum(map(math.log, numbers)) / len(numbers))) if numbers else None


def output_bytes(shape):
    batch, heads, tokens, _ = shape
    return batch * heads * tokens * tokens * 4


def means(table):
    """Rows of geometric means: a label, a ratio for each peer, the fraction of the limit."""
    groups = {"geometric mean": table["rows"]}
    if table["what"] == "scores":
        small = [row for row in table["rows"] if output_bytes(row["shape"]) < LARGE]
        large = [row for row in table["rows"] if output_bytes(row["shape"]) >= LARGE]
        if small and large:
            groups |= {"of outputs < 32 MB": small, "of outputs >= 32 MB": large}
    return [
        {
            "of": label,
            "ratios": {
                peer["id"]: geometric_mean(row["entries"][i].get("ratio") for row in rows)
                for i, peer in enumerate(rows[0]["entries"])
            },
            "fraction_of_limit": geometric_mean(row["fraction_of_limit"] for row in rows),
        }
        for label, rows in groups.items()
    ]


def render(table):
    """The table in Markdown, with what has to be said below it."""
    titles = [entry["title"] for entry in table["rows"][0]["entries"]]
    dims = "[H, H_kv, N, D]" if table["what"] == "decode" else "[B, H, N, D]"
    header = [dims, *titles, "of the limit"]
    rows = [
        [shape_text(row["shape"]), *map(cell, row["entries"]), percent(row["fraction_of_limit"])]
        for row in table["rows"]
    ]
    for mean in table["means"]:
        ratios = [times(ratio) for id, ratio in mean["ratios"].items() if id != "ours"]
        rows.append([mean["of"], "", *ratios, percent(mean["fraction_of_limit"])])
    align = ["left"] + ["right"] * (len(header) - 1)
    lines = [tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)]
    return "\n".join([*lines, *below(table)])


def below(table):
    """Who was left out, and where a peer is faster."""
    lines = []
    for row in table["rows"]:
        for entry in row["entries"]:
            where = f"{entry['title']} at {shape_text(row['shape'])}"
            if "left_out" in entry:
                lines.append(f"{where} is left out: {entry['left_out']}.")
            elif entry.get("ratio", 1) < 1 and not entry["id"].startswith("ours"):
                lines.append(f"{where} is faster than this crate: {times(entry['ratio'])}.")
    return ["", *lines] if lines else []


def cell(entry):
    if "left_out" in entry:
        return "-"
    spread = (entry["upper_quartile"] - entry["lower_quartile"]) / 2 / entry["median"]
    time = f"{milliseconds(entry['median'])} ±{percent(spread)}"
    return time if entry["id"] == "ours" else f"{time}  {times(entry['ratio'])}"


def shape_text(shape):
    return f"[{', '.join(map(str, shape))}]"


def milliseconds(seconds):
    ms = seconds * 1e3
    decimals = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3 if ms >= 0.1 else 4
    return f"{ms:.{decimals}f}"


def percent(fraction):
    return "-" if fraction is None else f"{fraction * 100:.0f} %"


def times(ratio):
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
