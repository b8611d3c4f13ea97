"""This crate's BERT encoder beside ONNX Runtime, OpenVINO and Candle, in turns within one run.

    python benches/peers/encoders.py --pairs 2014-images.test.tsv --texts novel=lines.txt

Times the forward pass at some shapes, then whole files of texts from text to embedding. Each library runs
in a process of its own, with the same number of threads, and sleeps while others have their turn.
README.md in this folder says how to install what is needed.
"""

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np
    from tabulate import tabulate

    import contenders
    import report
    from compare import output, positive
except ImportError as error:
    here = Path(__file__).with_name("requirements.txt")
    sys.exit(f"error: {error}. Install it with: {sys.executable} -m pip install -r {here}")

SHAPES = [[1, 16], [1, 128], [8, 128], [32, 32], [1, 512]]

# Process, name in it, title, and the largest difference of a hidden state from ONNX Runtime's in f32 on the
# words of the check; none for those in int8, whose embeddings are compared instead.
EVERYONE = [
    ("bench", "f32", "this crate, f32", 1e-4),
    ("bench", "int16", "this crate, int16", 1e-2),
    ("bench", "int8", "this crate, int8", None),
    ("bench", "candle", "candle-transformers", 1e-4),
    ("onnxruntime", "f32", "ONNX Runtime, f32", 0.0),
    ("onnxruntime", "int8", "ONNX Runtime, int8", None),
    ("openvino", "f32", "OpenVINO, f32", 1e-4),
]
REFERENCE = ("onnxruntime", "f32")

# A turn in seconds, of whose calls the first third does not count: caches are cold and threads asleep.
TURN = 0.6
# Between turns, in which the threads of a library stop spinning.
PAUSE = 0.02


class Contender:
    """One encoder: a process, and the name by which it knows it."""

    def __init__(self, process, name, title, bound):
        self.process, self.name, self.title, self.bound = process, name, title, bound
        self.id = f"{process.name}-{name}"

    def run(self, shape, calls):
        return self.process.ask(f"run {self.name} {','.join(map(str, shape))} {calls}")["seconds"]

    def compute(self, folder):
        written = self.process.ask(f"compute {self.name} {folder}")["written"]
        return np.load(written)

    def embed(self, folder):
        """The seconds that it takes, and the embeddings."""
        answer = self.process.ask(f"embed {self.name} {folder}")
        of = f"{self.process.name}-" if self.process.name != "bench" else ""
        return answer["seconds"], np.load(Path(folder, f"{of}{self.name}.npy"))


def main():
    contenders.drive(arguments(), start, results_of, markdown)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=contenders.PROJECT / "models/paraphrase-MiniLM-L3-v2",
        help="folder of a BERT encoder (default: the one of this project)",
    )
    parser.add_argument("--threads", type=positive(int), default=2, help="of everyone (default: 2)")
    parser.add_argument(
        "--shape", action="append", type=shape, metavar="B,N", help="can be given several times"
    )
    parser.add_argument(
        "--rounds", type=positive(int), default=5, help="turns of everyone (default: 5)"
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="lines of score, text and text with tabs between: texts a second, and Spearman",
    )
    parser.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="texts a second of the lines of a file; can be given several times",
    )
    parser.add_argument("--no-forward", action="store_true", help="leave the shapes out")
    parser.add_argument("--binary", type=Path, help="the bench, instead of building it with cargo")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the results here too")
    parser.add_argument("--markdown", type=output, metavar="FILE", help="write the tables here too")
    args = parser.parse_args()
    wrong = [text for text in args.texts if not Path(text.partition("=")[2]).is_file()]
    if wrong:
        parser.error(f"--texts {wrong[0]}: expected NAME=FILE, a file that is there")
    return args


def start(args):
    """Starts everyone; returns the processes and the contenders."""
    processes = {}
    binary = args.binary or contenders.build(["bert"])["bert"]
    common = ["--model", str(args.model), "--threads", str(args.threads)]
    commands = {"bench": [str(binary), "--serve", *common]}
    worker = str(Path(__file__).with_name("encoder_worker.py"))
    for library in ("onnxruntime", "openvino"):
        commands[library] = [sys.executable, worker, library, *common]
    try:
        for name, command in commands.items():
            processes[name] = contenders.Process(name, command, args.threads)
    except contenders.Missing as error:
        raise contenders.Missing(f"{error}\n{contenders.install('requirements.txt')}") from None
    everyone = [Contender(processes[process], *rest) for process, *rest in EVERYONE]
    return processes, everyone, []


def results_of(args, processes, everyone):
    """Checks that all are the same model, and measures everything."""
    results = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "model": args.model.name,
        "threads": args.threads,
        "level": processes["bench"].about["level"],
        "versions": {"bench": contenders.version()}
        | {name: processes[name].about["version"] for name in ("onnxruntime", "openvino")},
        "differences": check(everyone),
        "forward": [],
        "texts": [],
    }
    for this in [] if args.no_forward else args.shape or SHAPES:
        print(f"{report.shape_text(this)} ..", file=sys.stderr)
        results["forward"].append({"shape": this, "entries": forward(args, this, everyone)})
    files = {}
    scores = None
    if args.pairs:
        lines = [line.split("\t") for line in args.pairs.read_text().splitlines() if line]
        scores = [float(line[0]) for line in lines]
        files[args.pairs.stem] = [text for line in lines for text in line[1:3]]
    for text in args.texts:
        name, _, path = text.partition("=")
        files[name] = [line for line in Path(path).read_text().splitlines() if line.strip()]
    for name, texts in files.items():
        print(f"{name} ..", file=sys.stderr)
        of_pairs = scores if args.pairs and name == args.pairs.stem else None
        results["texts"].append(
            {"name": name, "texts": len(texts), "entries": embed(args, texts, of_pairs, everyone)}
        )
    return results


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def check(everyone):
    """Everyone computes the same on some words, or the comparison means nothing."""
    with tempfile.TemporaryDirectory() as folder:
        # Of a whole vocabulary's first words, and no batch that is a power of 2.
        ids = (np.arange(3 * 37, dtype=np.uint32) * 7919 % 20000).reshape(3, 37)
        np.save(Path(folder, "ids.npy"), ids)
        found = {contender: contender.compute(folder) for contender in everyone}
    expected = next(x for c, x in found.items() if (c.process.name, c.name) == REFERENCE)
    differences = {}
    for contender, hidden in found.items():
        difference = float(np.abs(hidden - expected).max())
        if contender.bound is not None and not difference <= contender.bound:
            raise contenders.Problem(
                f"{contender.title}: a hidden state differs by {difference:.1e} from ONNX Runtime's, "
                f"expected at most {contender.bound:.0e}"
            )
        differences[contender.id] = difference
    return differences


def forward(args, shape, everyone):
    """Everyone at one shape, in turns."""
    first = [min(contender.run(shape, 3)) for contender in everyone]
    calls = [max(3, round(TURN / seconds)) for seconds in first]
    seconds = [[] for _ in everyone]
    for turn in range(args.rounds):
        for step in range(len(everyone)):
            i = (turn + step) % len(everyone)  # each round starts with another one
            time.sleep(PAUSE)
            seconds[i] += everyone[i].run(shape, calls[i])[calls[i] // 3 :]
    return [
        {"id": contender.id, "title": contender.title} | report.timing(times)
        for contender, times in zip(everyone, seconds, strict=True)
    ]


def embed(args, texts, scores, everyone):
    """Everyone on all texts, in turns, with how far the embeddings are from those in f32."""
    seconds = [[] for _ in everyone]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "texts.txt").write_text("\n".join(texts) + "\n")
        found = [contender.embed(folder)[1] for contender in everyone]
        for turn in range(args.rounds):
            for step in range(len(everyone)):
                i = (turn + step) % len(everyone)
                time.sleep(PAUSE)
                seconds[i].append(everyone[i].embed(folder)[0])
    exact = next(x for c, x in zip(everyone, found, strict=True) if c.id == "-".join(REFERENCE))
    entries = []
    for contender, embeddings, times in zip(everyone, found, seconds, strict=True):
        cosines = cosine(embeddings, exact)
        entry = {"id": contender.id, "title": contender.title} | report.timing(times)
        entry["texts_per_second"] = report.digits(len(texts) / entry["median"])
        entry["cosine"] = {"lowest": float(cosines.min()), "mean": float(cosines.mean())}
        if scores:
            entry["spearman"] = spearman(scores, cosine(embeddings[::2], embeddings[1::2]))
        entries.append(entry)
    return entries


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / norms


def spearman(a, b):
    """Pearson's correlation of the ranks, of which equal numbers share the mean."""

    def ranks(x):
        _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[places]

    return float(np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1])


def markdown(results):
    """All tables, and what they were measured with."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    libraries = libraries.replace("bench", "candle-int8-attention")
    parts = [
        f"{results['model']}, {results['date']}, {results['processor']}, {results['threads']} "
        f"threads; level {results['level']}; {libraries}."
    ]
    if results["forward"]:
        parts += ["Forward pass, median ms (fastest).", forward_table(results["forward"])]
    for file in results["texts"]:
        parts += [f"{file['name']}: {file['texts']} texts.", texts_table(file["entries"])]
    return "\n\n".join(parts)


def forward_table(rows):
    header = ["", *(report.shape_text(row["shape"]) for row in rows)]
    lines = []
    for i, entry in enumerate(rows[0]["entries"]):
        those = [row["entries"][i] for row in rows]
        cells = [
            f"{report.milliseconds(e['median'])} ({report.milliseconds(e['fastest'])})"
            for e in those
        ]
        lines.append([entry["title"], *cells])
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(lines, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def texts_table(entries):
    header = ["", "texts/s (most)", "cosine: lowest", "mean", "Spearman", "its change"]
    exact = next(e for e in entries if e["id"] == "-".join(REFERENCE))
    lines = []
    for entry in entries:
        rate = entry["texts_per_second"]
        most = rate * entry["median"] / entry["fastest"]
        cells = [f"{rate:.0f} ({most:.0f})"]
        cells += [f"{entry['cosine'][of]:.6f}" for of in ("lowest", "mean")]
        if "spearman" in entry:
            change = entry["spearman"] - exact["spearman"]
            cells += [f"{entry['spearman']:.4f}", f"{change:+.5f}"]
        lines.append([entry["title"], *cells])
    header = header[: len(lines[0])]
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(lines, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def shape(text):
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected two positive numbers B,N")
    return numbers


if __name__ == "__main__":
    main()
