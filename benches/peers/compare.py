"""This crate's attention beside that of other libraries, in turns within one run.

    python benches/peers/compare.py --json peers.json --markdown peers.md

Each library runs in a process of its own, with the same number of threads, and sleeps while others
have their turn. README.md in this folder says how to install what is needed.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np

    import contenders
    import report
    import worker
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
DECODE = [[12, 12, 8192, 64], [32, 8, 8192, 128]]
# Sizes that leave a rest in every tile. A cache of 600 tokens is shared by threads as a long one is, and
# 96 channels are whole blocks of all formats.
SMALL = {"attention": [2, 3, 70, 48], "scores": [2, 3, 70, 48], "decode": [4, 2, 600, 96]}

TABLES = {
    "attention": ("attention", SHAPES, "Attention: softmax(q·k^T / sqrt(D))·v"),
    "scores": ("scores", SHAPES, "Scores: q·k^T"),
    "decode": ("decode", DECODE, "Decoding: one query against a cache, shapes [H, H_kv, N, D]"),
    "sweep": ("attention", SWEEP, "Attention against the number of tokens"),
}

# A turn, of which the first third is not counted, the pause before it in which the threads of a library
# stop spinning, what a server sleeps between two requests, and the calls of everyone that are counted.
TURN = 0.6
PAUSE = 0.02
SILENCE = 0.1
FEWEST_CALLS = 3
PACES = {
    "steady state": "In a steady state.",
    "after silence": "The first call after 100 ms of silence.",
}
# A first call that is shorter tells little about the second.
WARM = 1.0


def main():
    contenders.drive(arguments(), contenders.start, results_of, markdown)


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
        "--leave-out", action="append", default=[], choices=[*contenders.LIBRARIES, "candle"]
    )
    parser.add_argument("--level", metavar="NAME", help="of the processor, for this crate alone")
    parser.add_argument(
        "--after-silence",
        action="store_true",
        help="time the first call after 100 ms in which nothing runs, not a steady state",
    )
    parser.add_argument(
        "--binaries",
        type=Path,
        metavar="FOLDER",
        help="with the benches `attention` and `decode`, instead of building them with cargo",
    )
    parser.add_argument("--json", type=output, metavar="FILE", help="write the results here too")
    parser.add_argument("--markdown", type=output, metavar="FILE", help="write the tables here too")
    args = parser.parse_args()
    programs = contenders.programs(args.binaries).values() if args.binaries else []
    for program in programs:
        if not program.is_file():
            parser.error(f"--binaries: no {program}; without it, cargo builds the benches")
    return args


def results_of(args, processes, everyone):
    """Checks that all agree, and measures all tables."""
    agreement = check(everyone)
    bench = processes["attention"]
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": bench.about["machine"],
        "threads": args.threads,
        "pace": "after silence" if args.after_silence else "steady state",
        "versions": {
            "candle-int8-attention": contenders.version(),
            **{n: p.about["version"] for n, p in processes.items() if "version" in p.about},
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
    errors = {what: {} for what in SMALL}
    random = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as parent:
        folders, expected = {}, {}
        for what, small in SMALL.items():
            folders[what] = Path(parent, what)
            folders[what].mkdir()
            qkv = [random.standard_normal(x, dtype=np.float32) for x in worker.shapes(what, small)]
            for name, array in zip("qkv", qkv, strict=True):
                np.save(folders[what] / f"{name}.npy", array)
            expected[what] = reference(what, *(x.astype(np.float64) for x in qkv))
        for contender in everyone:
            if contender.bound is None:
                continue
            output = np.load(contender.compute(folders[contender.what]))
            right = expected[contender.what]
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


def reference(what, q, k, v):
    """Scores or attention in float64; for decode, query heads share heads of keys."""
    k, v = (x.repeat(q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2)
    scaled = scores / np.sqrt(q.shape[-1])
    probs = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return scores if what == "scores" else probs @ v / probs.sum(axis=-1, keepdims=True)


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
        except contenders.Ended:
            raise
        except contenders.Problem as problem:
            if contender.id == "ours":
                raise
            entries[i]["left_out"] = str(problem)
            continue
        pace[contender.id] = first / products
        calls[i] = 1 if args.after_silence else max(1, round(TURN / first))
    start, turn = time.perf_counter(), 0
    while any(calls[i] and len(seconds[i]) < FEWEST_CALLS for i in range(len(those))) or (
        time.perf_counter() - start < args.seconds
    ):
        for step in range(len(those)):
            i = (turn + step) % len(those)  # each round starts with another one
            if calls[i]:
                time.sleep(SILENCE if args.after_silence else PAUSE)
                # The first third finds the caches of others and threads that wake up.
                seconds[i] += those[i].run(shape, calls[i])[calls[i] // 3 :]
        turn += 1
    for process in {contender.process for contender in those}:
        process.ask("release")
    for entry, times in zip(entries, seconds, strict=True):
        if times:
            entry |= report.timing(times)
            entry["ratio"] = report.digits(entry["median"] / entries[0]["median"])
    # What decoding takes is memory, of which there is no peak here.
    limit = {"seconds": None}
    if what != "decode":
        limit = bench.ask(f"limit {what} {','.join(map(str, shape))}")
    fraction = limit["seconds"] and report.digits(limit["seconds"] / entries[0]["median"])
    return {"shape": shape, "entries": entries, "limit": limit, "fraction_of_limit": fraction}


def markdown(results):
    """All tables, and what they were measured with."""
    machine, versions = results["machine"], results["versions"]
    noun = "thread" if results["threads"] == 1 else "threads"
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    cached = "llama-cpp-python" in versions
    but = "; llama.cpp's keys and values come as its cache has them" if cached else ""
    parts = [
        f"{results['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{results['threads']} {noun}; level {machine['level']}; {libraries}.",
        f"{PACES[results['pace']]} Median ms ± half of the interquartile range, and how many times as long as this crate; "
        f"f32 in and f32 out{but}.",
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
