"""The processes that take part, and how they are asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


class Problem(Exception):
    """Something that the user can put right; its text says what."""


class Missing(Problem):
    """A library is not installed."""


class Process:
    """A program that answers a line with a line of JSON, and sleeps in between."""

    def __init__(self, name, command, threads):
        self.name = name
        env = os.environ | {
            variable: str(threads)
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        }
        # Who is not at work must not spin: libraries keep their defaults, which end after a while.
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND"):
            env.pop(variable, None)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        except OSError as error:
            raise Problem(f"{name} does not start: {error}") from None
        self.about = self.ask("about")

    def ask(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it last said is still to be read
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise Problem(f"{self.name} ended with code {code} instead of answering {line!r}")
        try:
            answer = json.loads(answer)
        except json.JSONDecodeError:
            raise Problem(f"{self.name} answers {line!r} with {answer.strip()!r}") from None
        if "missing" in answer:
            raise Missing(answer["missing"])
        if "error" in answer:
            raise Problem(f"{self.name}: {answer['error']}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Contender:
    """One way to compute `what`: a process, and the name by which it knows this way."""

    def __init__(self, what, id, title, process, bound):
        self.what, self.id, self.title, self.process = what, id, title, process
        self.bound = bound  # on the relative L1 error against float64

    def run(self, shape, calls):
        line = f"run {self.what} {self.id} {','.join(map(str, shape))} {calls}"
        return self.process.ask(line)["seconds"]

    def compute(self, folder):
        """The result for the inputs in `folder`, as a file."""
        return self.process.ask(f"compute {self.what} {self.id} {folder}")["written"]


# Relative L1 error against float64 on N(0,1) inputs: f32 sums of some hundred products, and int8
# codes of queries and keys, where 0.01 to 0.02 is usual (one scale for a whole tensor is coarser).
FLOAT = 1e-5
INT8 = 0.04


def start(args):
    """Starts everyone who takes part; returns the processes and the contenders, ours first."""
    processes, notes = {}, []
    binary = args.binary or build()
    command = [str(binary), "--serve", "--threads", str(args.threads)]
    processes["bench"] = Process("the bench", command, args.threads)
    for library in ("onnxruntime", "torch"):
        if library in args.leave_out:
            continue
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, str(worker), library, "--threads", str(args.threads)]
        try:
            processes[library] = Process(library, command, args.threads)
        except Missing as error:
            if library == "onnxruntime":
                raise Missing(f"{error}\n{install('requirements.txt')}") from None
            notes.append(f"PyTorch is left out: {error}. {install('requirements-torch.txt')}")
    everyone = [
        ("attention", "ours", "this crate", "bench", INT8),
        ("attention", "ort", "ONNX Runtime MHA f32", "onnxruntime", FLOAT),
        ("attention", "sdpa", "PyTorch SDPA f32", "torch", FLOAT),
        ("attention", "candle", "Candle unfused", "bench", FLOAT),
        ("attention", "candle-flash", "Candle flash_attn", "bench", FLOAT),
        ("scores", "ours", "this crate", "bench", INT8),
        ("scores", "ort", "ONNX Runtime int8", "onnxruntime", INT8),
        ("scores", "candle", "Candle matmul f32", "bench", FLOAT),
    ]
    contenders = [
        Contender(what, id, title, processes[process], bound)
        for what, id, title, process, bound in everyone
        if process in processes and not (id.startswith("candle") and "candle" in args.leave_out)
    ]
    return processes, contenders, notes


def install(requirements):
    path = Path(__file__).with_name(requirements)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"Install it with: {sys.executable} -m pip install -r {path}"


def build(name="attention"):
    """Builds the bench of this name with cargo; returns its path."""
    bench = ["cargo", "bench", "-p", "benches", "--bench", name]
    command = [*bench, "--no-run", "--message-format", "json"]
    try:
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        message = "cargo is not there to build the bench: install Rust, or give --binary"
        raise Problem(message) from None
    if done.returncode != 0:
        raise Problem(f"`{' '.join(bench)}` failed: its messages are above")
    messages = map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    for message in messages:
        if message.get("executable") and message["target"]["name"] == name:
            return Path(message["executable"])
    raise Problem(f"cargo built no bench `{name}`")
