"""This crate's attention beside ONNX Runtime, PyTorch and Candle, in turns within one run.

    python benches/peers/compare.py --json peers.json --markdown peers.md

Each library runs in a process of its own, with the same number of threads, and sleeps while others
have their turn. README.md in this folder says how to install what is needed.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np

    import contenders
    import report
except ImportError as error:
    here = Path(__file__).with_name("requirements.txt")
    sys.exit(f"error: {error}. Install it with: {sys.executable} -m pip install -r {here}")

SHAPES = [
    [1, 4, 1024, 256],
    [1, 12, 128, 32],
    [1, 12, 512, 32],
    [8, 12, 128, 64],
    [1, 12, 512, 64],
    [1, 12, 2048, 64],
    [1, 8, 4096, 128],
]
SWEEP = [
    [1, 12, tokens, 64] for tokens in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
]
SMALL = [2, 3, 70, 48]

TABLES = {
    "attention": ("attention", SHAPES, "Attention: softmax(q·k^T / sqrt(D))·v"),
    "scores": ("scores", SHAPES, "Scores: q·k^T"),
    "sweep": ("attention", SWEEP, "Attention against the number of tokens"),
}

# A turn, the pause after it in which the threads of a library stop spinning, and the calls that
# everyone makes at least.
TURN = 0.05
PAUSE = 0.02
FEWEST_CALLS = 3
# A first call that is shorter tells little about the second.
WARM = 1.0


def main():
    args = arguments()
    processes = {}
    try:
        processes, everyone, notes = contenders.start(args)
        for note in [*notes, *busy()]:
            print(note, file=sys.stderr)
        results = results_of(args, processes, everyone)
    except contenders.Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    finally:
        for process in processes.values():
            process.close()
    text = markdown(results)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def busy():
    """A warning if others use the machine: whoever is interrupted more often looks slower."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        return [f"The machine is busy (load {load:.1f}): times will mean little."]
    return []


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive(int), default=2, help="of everyone (default: 2)")
    parser.add_argument(
        "--only", action="append", choices=TABLES, help="one table; can be given several times"
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=shape,
        metavar="B,H,N,D",
        help="instead of the README's shapes; can be given several times; leaves the sweep out",
    )
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=6.0,
        help="of measuring for each shape (default: 6)",
    )
    parser.add_argument(
        "--longest",
        type=positive(float),
        default=8.0,
        help="seconds of a call beyond which a peer is left out (default: 8)",
    )
    parser.add_argument(
        "--leave-out", action="append", default=[], choices=["onnxruntime", "torch", "candle"]
    )
    parser.add_argument("--binary", type=Path, help="the bench, instead of building it with cargo")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the results here too")
    parser.add_argument("--markdown", type=output, metavar="FILE", help="write the tables here too")
    args = parser.parse_args()
    if args.binary and not args.binary.is_file():
        parser.error(f"--binary {args.binary}: no such file; without it, cargo builds the bench")
    return args


def results_of(args, processes, everyone):
    """Checks that all agree, and measures all tables."""
    agreement = check(everyone)
    bench = processes["bench"]
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": bench.about["machine"],
        "threads": args.threads,
        "versions": {
            "candle-int8-attention": bench.about["version"],
            **{name: p.about["version"] for name, p in processes.items() if name != "bench"},
            "python": platform.python_version(),
        },
        "peaks": bench.ask("peaks")["peaks"],
        "agreement": agreement,
        "tables": [],
    }
    for name in args.only or (["attention", "scores"] if args.shape else TABLES):
        what, shapes, title = TABLES[name]
        shapes = args.shape or shapes
        those = [contender for contender in everyone if contender.what == what]
        table = {"name": name, "what": what, "title": title, "rows": []}
        pace = {}
        for this in shapes:
            print(f"{name} {report.shape_text(this)} ..", file=sys.stderr)
            table["rows"].append(measure(args, bench, what, this, those, pace))
        table["means"] = report.means(table)
        results["tables"].append(table)
    return results


def check(everyone):
    """Everyone computes the same on a small input, or the comparison means nothing."""
    errors = {"scores": {}, "attention": {}}
    random = np.random.default_rng(7)
    q, k, v = (random.standard_normal(SMALL, dtype=np.float32) for _ in range(3))
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)))
    with tempfile.TemporaryDirectory() as folder:
        for name, array in (("q", q), ("k", k), ("v", v)):
            np.save(Path(folder, f"{name}.npy"), array)
        for contender in everyone:
            output, right = np.load(contender.compute(folder)), expected[contender.what]
            if output.shape != right.shape:
                raise contenders.Problem(
                    f"{contender.title}: {contender.what} of shape {output.shape}, "
                    f"expected {right.shape}"
                )
            error = float(np.abs(output - right).sum() / np.abs(right).sum())
            if not error <= contender.bound:
                raise contenders.Problem(
                    f"{contender.title}: relative L1 error {error:.2e} of {contender.what}, "
                    f"expected at most {contender.bound:.0e}"
                )
            errors[contender.what][contender.id] = error
    return errors


def reference(q, k, v):
    """Scores and attention in float64."""
    scores = q @ k.swapaxes(-1, -2)
    scaled = scores / np.sqrt(q.shape[-1])
    probs = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return {"scores": scores, "attention": probs @ v / probs.sum(axis=-1, keepdims=True)}


def measure(args, bench, what, shape, those, pace):
    """Everyone on one shape, in turns. `pace` holds everyone's seconds for each product so far."""
    products = np.prod(shape, dtype=float) * shape[2]
    entries = [{"id": contender.id, "title": contender.title} for contender in those]
    seconds = [[] for _ in those]
    calls = [0] * len(those)  # of a turn; 0 for who is left out
    for i, contender in enumerate(those):
        expected = pace.get(contender.id, 0) * products
        if expected > args.longest and contender.id != "ours":
            entries[i]["left_out"] = f"a call would take about {expected:.0f} s"
            continue
        try:
            first = contender.run(shape, 1)[0]
            if first < WARM:
                first = contender.run(shape, 1)[0]
        except contenders.Problem as problem:
            if contender.id == "ours":
                raise
            entries[i]["left_out"] = str(problem)
            continue
        pace[contender.id] = first / products
        calls[i] = max(1, min(1000, round(TURN / first)))
    start, turn = time.perf_counter(), 0
    while any(calls[i] and len(seconds[i]) < FEWEST_CALLS for i in range(len(those))) or (
        time.perf_counter() - start < args.seconds
    ):
        for step in range(len(those)):
            i = (turn + step) % len(those)  # each round starts with another one
            if calls[i]:
                time.sleep(PAUSE)
                # The first of several calls finds cold caches and sleeping threads.
                several = calls[i] > 1
                seconds[i] += those[i].run(shape, calls[i] + several)[several:]
        turn += 1
    for process in {contender.process for contender in those}:
        process.ask("release")
    for entry, times in zip(entries, seconds, strict=True):
        if times:
            entry |= report.timing(times)
            entry["ratio"] = report.digits(entry["median"] / entries[0]["median"])
    limit = bench.ask(f"limit {what} {','.join(map(str, shape))}")
    fraction = limit["seconds"] and report.digits(limit["seconds"] / entries[0]["median"])
    return {"shape": shape, "entries": entries, "limit": limit, "fraction_of_limit": fraction}


def markdown(results):
    """All tables, and what they were measured with."""
    machine, versions = results["machine"], results["versions"]
    noun = "thread" if results["threads"] == 1 else "threads"
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f"{results['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{results['threads']} {noun}; level {machine['level']}; {libraries}.",
        "Median ms ± half of the interquartile range, and how many times as long as this crate; "
        "f32 in and f32 out.",
    ]
    for table in results["tables"]:
        parts += [table["title"] + ".", report.render(table)]
    return "\n\n".join(parts)


def positive(kind):
    def parse(text):
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}, expected a number above 0")
        return number

    return parse


def shape(text):
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected four positive numbers B,H,N,D")
    return numbers


def output(text):
    """A file to write later: better to hear now than after minutes that its folder is missing."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file in an existing folder")
    return path


if __name__ == "__main__":
    main()
