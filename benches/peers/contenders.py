"""The processes that take part, and how they are asked."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

# The libraries that worker.py serves; those that take part if they are installed have a title and a file.
LIBRARIES = ("onnxruntime", "openvino", "torch", "llama-cpp-python")
OPTIONAL = {
    "torch": ("PyTorch", "requirements-torch.txt"),
    "llama-cpp-python": ("llama.cpp", "requirements-llama.txt"),
}

# Seconds after which a process that does not answer counts as dead.
LONGEST_ANSWER = 120


class Problem(Exception):
    """Something that the user can put right; its text says what."""


class Ended(Problem):
    """A process has crashed, or does not answer."""


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
        timer = threading.Timer(LONGEST_ANSWER, self.process.kill)
        timer.start()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            if timer.finished.is_set():
                raise Ended(f"{self.name} does not answer {line!r} within {LONGEST_ANSWER} s")
            timer.cancel()
            raise Ended(f"{self.name} ended with code {code} instead of answering {line!r}")
        timer.cancel()
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
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, and someone has said so
        self.process.wait()


class Contender:
    """One way to compute `what`: a process, and the name by which it knows this way."""

    def __init__(self, what, id, title, process, bound):
        self.what, self.id, self.title, self.process = what, id, title, process
        # On the relative L1 error against float64; none for who computes nothing.
        self.bound = bound

    def run(self, shape, calls):
        line = f"run {self.what} {self.id} {','.join(map(str, shape))} {calls}"
        return self.process.ask(line)["seconds"]

    def compute(self, folder):
        """The result for the inputs in `folder`, as a file."""
        return self.process.ask(f"compute {self.what} {self.id} {folder}")["written"]


# Relative L1 error against float64 on N(0,1) inputs: f32 sums of some hundred products, and int8
# codes of queries and keys, where 0.01 to 0.02 is usual (one scale for a whole tensor is coarser). Between
# them keys and values in f16, 0.0003, and sums over 600 tokens in f16 too, 0.002.
FLOAT = 1e-5
HALF = 0.005
INT8 = 0.04


def start(args):
    """Starts everyone who takes part; returns the processes and the contenders, ours first."""
    processes, notes = {}, []
    for bench, program in (programs(args.binaries) if args.binaries else build()).items():
        command = [str(program), "--serve", "--threads", str(args.threads)]
        command += ["--level", args.level] if args.level else []
        processes[bench] = Process(f"the bench {bench}", command, args.threads)
    for library in LIBRARIES:
        if library in args.leave_out:
            continue
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, str(worker), library, "--threads", str(args.threads)]
        try:
            processes[library] = Process(library, command, args.threads)
        except Missing as error:
            if library not in OPTIONAL:
                raise Missing(f"{error}\n{install('requirements.txt')}") from None
            title, requirements = OPTIONAL[library]
            notes.append(f"{title} is left out: {error}. {install(requirements)}")
    everyone = [
        ("attention", "ours", "this crate", "attention", INT8),
        ("attention", "ort", "ONNX Runtime MHA f32", "onnxruntime", FLOAT),
        ("attention", "openvino", "OpenVINO SDPA f32", "openvino", FLOAT),
        ("attention", "sdpa", "PyTorch SDPA f32", "torch", FLOAT),
        ("attention", "llama", "llama.cpp flash f16 k/v", "llama-cpp-python", HALF),
        ("attention", "candle", "Candle unfused", "attention", FLOAT),
        ("attention", "candle-flash", "Candle flash_attn", "attention", FLOAT),
        ("scores", "ours", "this crate", "attention", INT8),
        ("scores", "ours-plain", "this crate, one scale a tensor", "attention", INT8),
        ("scores", "memory", "writing alone", "attention", None),
        ("scores", "ort", "ONNX Runtime int8", "onnxruntime", INT8),
        ("scores", "candle", "Candle matmul f32", "attention", FLOAT),
        ("decode", "ours", "this crate, f16 values", "decode", INT8),
        ("decode", "ours-int8", "this crate, int8 values", "decode", INT8),
        ("decode", "ort", "ONNX Runtime int8 cache", "onnxruntime", INT8),
        ("decode", "llama", "llama.cpp f16 cache", "llama-cpp-python", HALF),
        ("decode", "llama-q8_0", "llama.cpp q8_0 cache", "llama-cpp-python", INT8),
        ("decode", "candle", "Candle f32", "decode", FLOAT),
    ]
    contenders = [
        Contender(what, id, title, processes[process], bound)
        for what, id, title, process, bound in everyone
        if process in processes and not (id.startswith("candle") and "candle" in args.leave_out)
    ]
    return processes, contenders, notes


def busy():
    """A warning if others use the machine: whoever is interrupted more often looks slower."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        return [f"The machine is busy (load {load:.1f}): times will mean little."]
    return []


def drive(args, start, results_of, markdown):
    """Starts everyone, measures, prints the tables and writes the files that are asked for."""
    processes = {}
    try:
        processes, everyone, notes = start(args)
        for note in [*notes, *busy()]:
            print(note, file=sys.stderr)
        results = results_of(args, processes, everyone)
    except Problem as problem:
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


def install(requirements):
    path = Path(__file__).with_name(requirements)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"Install it with: {sys.executable} -m pip install -r {path}"


BENCHES = ("attention", "decode")


def programs(folder):
    """The benches in a folder."""
    return {bench: folder / bench for bench in BENCHES}


def build(benches=BENCHES):
    """Builds benches with cargo; returns their paths by name."""
    command = ["cargo", "bench", "-p", "benches", "--no-run", "--message-format", "json"]
    for bench in benches:
        command += ["--bench", bench]
    try:
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        message = "cargo is not there to build the benches: install Rust, or give --binaries"
        raise Problem(message) from None
    if done.returncode != 0:
        raise Problem(f"`{' '.join(command)}` failed: its messages are above")
    messages = map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    built = {m["target"]["name"]: Path(m["executable"]) for m in messages if m.get("executable")}
    missing = [bench for bench in benches if bench not in built]
    if missing:
        raise Problem(f"cargo built no bench {missing[0]}")
    return {bench: built[bench] for bench in benches}


def version():
    """That of this crate."""
    manifest = (PROJECT / "Cargo.toml").read_text()
    return re.search(r'^version = "(.*)"', manifest, re.MULTILINE)[1]
