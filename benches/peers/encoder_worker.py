"""An encoder in ONNX Runtime or OpenVINO, behind the protocol of `cargo bench --bench bert -- --serve`.

    python encoder_worker.py onnxruntime --model models/paraphrase-MiniLM-L3-v2 --threads 2

Reads a command a line from stdin and answers each with a line of JSON on stdout. `encoders.py` starts one
such process for each library.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np

import bert_graph
from answering import answer_all

# Texts of a padded batch.
BATCH = 32


class OnnxRuntime:
    """In f32, and with the weights that `quantize_dynamic` makes with its defaults."""

    name = "onnxruntime"

    def __init__(self, model, threads):
        import onnxruntime

        self.runtime = onnxruntime
        self.version = onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.sessions = {}
        for mask in (False, True):
            model_f32 = bert_graph.build(model, fused=True, mask=mask)
            self.sessions["f32", mask] = self.session(model_f32.SerializeToString())
            self.sessions["int8", mask] = self.session(self.quantized(model_f32))

    def session(self, model):
        providers = ["CPUExecutionProvider"]
        return self.runtime.InferenceSession(model, self.options, providers=providers)

    def quantized(self, model):
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # What the operators of com.microsoft give; shape inference does not know them.
        types = {"DefaultTensorType": TensorProto.FLOAT}
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "int8.onnx"))
            quantize_dynamic(model, path, weight_type=QuantType.QInt8, extra_options=types)
            return Path(path).read_bytes()

    def prepare(self, name, ids):
        """A forward pass of these ids, [B, N], without copies between NumPy and ONNX Runtime."""
        session = self.sessions[name, False]
        binding = session.io_binding()
        value = self.runtime.OrtValue.ortvalue_from_numpy(ids.astype(np.int32))
        binding.bind_ortvalue_input("ids", value)
        binding.bind_output("hidden", "cpu")

        def run():
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0]

        return run, lambda: run().numpy()

    def padded(self, name, ids, mask):
        feeds = {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32)}
        return self.sessions[name, True].run(None, feeds)[0]


class OpenVino:
    """In f32, as it compiles a model for latency."""

    name = "openvino"

    def __init__(self, model, threads):
        import openvino

        self.core = openvino.Core()
        self.version = openvino.__version__.split("-")[0]
        self.config = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # f32 where the machine has bf16 too: the same numbers as everyone's.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.model = bert_graph.build(model, fused=False, mask=False)
        masked = bert_graph.build(model, fused=False, mask=True)
        self.masked = self.compile(self.read(masked))

    def read(self, model):
        return self.core.read_model(model.SerializeToString())

    def compile(self, model):
        return self.core.compile_model(model, "CPU", self.config).create_infer_request()

    def prepare(self, _name, ids):
        """A forward pass of these ids, [B, N], compiled for their shape."""
        model = self.read(self.model)
        model.reshape({"ids": list(ids.shape)})
        request = self.compile(model)
        inputs = {"ids": ids.astype(np.int64)}

        def run():
            return request.infer(inputs, share_inputs=True, share_outputs=True)

        return run, lambda: next(iter(run().values()))

    def padded(self, _name, ids, mask):
        inputs = {"ids": ids.astype(np.int64), "mask": mask.astype(np.int64)}
        return self.masked.infer(inputs, share_inputs=True, share_outputs=True)[0]


LIBRARIES = {library.name: library for library in (OnnxRuntime, OpenVino)}


class Server:
    def __init__(self, library, model):
        from tokenizers import Tokenizer

        config = json.loads((model / "config.json").read_text())
        self.library = library
        self.vocabulary = config["vocab_size"]
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(config["max_position_embeddings"])
        self.ready = None  # which name and shape the next run can use
        self.call = None

    def answer(self, line):
        match line.split(" ", 2):
            case ["about"]:
                return {"name": self.library.name, "version": self.library.version}
            case ["run", name, rest]:
                shape, calls = rest.split()
                return self.run(name, [int(n) for n in shape.split(",")], int(calls))
            case ["compute", name, folder]:
                _, output = self.library.prepare(name, np.load(Path(folder, "ids.npy")))
                return self.write(name, folder, output())
            case ["embed", name, folder]:
                return self.embed(name, folder)
        raise ValueError(f"{line!r} is no command: about, run, compute, embed")

    def run(self, name, shape, calls):
        if self.ready != (name, shape):
            ids = np.arange(np.prod(shape)) * 7919 % self.vocabulary
            self.call, _ = self.library.prepare(name, ids.reshape(shape))
            self.ready = (name, shape)
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            self.call()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def embed(self, name, folder):
        texts = Path(folder, "texts.txt").read_text().splitlines()
        start = time.perf_counter()
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
        embeddings = [None] * len(ids)
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            longest = len(ids[batch[0]])
            padded = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros((len(batch), longest), np.int64)
            for row, text in enumerate(batch):
                padded[row, : len(ids[text])] = ids[text]
                mask[row, : len(ids[text])] = 1
            hidden = self.library.padded(name, padded, mask)
            weights = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
            for text, embedding in zip(batch, weights[:, None, :] @ hidden, strict=True):
                embeddings[text] = embedding[0]
        seconds = time.perf_counter() - start
        self.write(name, folder, np.stack(embeddings))
        return {"seconds": seconds}

    def write(self, name, folder, array):
        path = Path(folder, f"{self.library.name}-{name}.npy")
        np.save(path, array)
        return {"written": str(path)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.disable()  # of the quantizer, which asks for what the graph here does not need
    answer_all(lambda: Server(LIBRARIES[args.library](args.model, args.threads), args.model))


if __name__ == "__main__":
    main()
