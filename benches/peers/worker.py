"""ONNX Runtime, OpenVINO, PyTorch or llama.cpp behind the protocol of the bench's `--serve`.

    python worker.py onnxruntime --threads 2

Reads a command a line from stdin and answers each with a line of JSON on stdout. `compare.py`
starts one such process for each library, so that its threads sleep while others have their turn.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from answering import answer_all
from ggml import LlamaCpp

# Operator set and file version of the ONNX models made here: old enough for the pinned runtime.
OPSET = 21
IR_VERSION = 10


class OnnxRuntime:
    """Models of a single operator, or of the few that int8 scores take."""

    name = "onnxruntime"

    def __init__(self, threads):
        import onnx  # noqa: F401  models are made with it
        import onnxruntime

        self.runtime = onnxruntime
        self.version = onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        # Spinning while it waits for work is ONNX Runtime's default, and stays on: it is faster.
        # Between turns nothing runs, and its threads go to sleep.

    def attention(self, q, k, v):
        """The fp32 MultiHeadAttention of com.microsoft, on its own layout [B, N, H * D]."""
        from onnx import helper

        batch, heads, tokens, dim = q.shape
        packed = [batch, tokens, heads * dim]
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=heads
        )
        session = self._session([node], {"q": packed, "k": packed, "v": packed}, packed)

        def pack(x):
            return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(packed)

        def unpacked():
            out = run().numpy()
            return out.reshape(batch, tokens, heads, dim).transpose(0, 2, 1, 3)

        run = self._bind(session, {"q": pack(q), "k": pack(k), "v": pack(v)})
        return run, unpacked

    def scores(self, q, k, _v):
        """The int8 pipeline: two DynamicQuantizeLinear, MatMulInteger, Cast, Mul.

        The keys come transposed already, which favours it; the graph optimizer may fuse the nodes.
        """
        from onnx import TensorProto, helper

        node = helper.make_node
        nodes = [
            node("DynamicQuantizeLinear", ["q"], ["q8", "q_scale", "q_zero"]),
            node("DynamicQuantizeLinear", ["k"], ["k8", "k_scale", "k_zero"]),
            node("MatMulInteger", ["q8", "k8", "q_zero", "k_zero"], ["sums"]),
            node("Cast", ["sums"], ["float_sums"], to=TensorProto.FLOAT),
            node("Mul", ["q_scale", "k_scale"], ["scale"]),
            node("Mul", ["float_sums", "scale"], ["out"]),
        ]
        keys = np.ascontiguousarray(k.transpose(0, 1, 3, 2))
        shapes = {"q": list(q.shape), "k": list(keys.shape)}
        session = self._session(nodes, shapes, [*q.shape[:3], k.shape[2]])
        run = self._bind(session, {"q": q, "k": keys})
        return run, lambda: run().numpy()

    def decode(self, q, k, v):
        """GroupQueryAttention of com.microsoft for one query, with a cache in int8, a scale a channel.

        The last key and value come as input, in f32, and are written to the cache, which is full.
        """
        from onnx import TensorProto, helper

        _, heads, _, dim = q.shape
        _, key_heads, tokens, _ = k.shape
        node = helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_k", "past_v", "last", "total", *[""] * 5, "k_scale", "v_scale"],
            ["out", "present_k", "present_v"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=key_heads,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=8,
        )

        def cache(x):
            scale = np.abs(x).max(axis=(0, 2)) / 127
            codes = np.rint(x / scale[:, np.newaxis]).astype(np.int8)
            return codes, scale.reshape(-1)

        (past_k, k_scale), (past_v, v_scale) = cache(k), cache(v)
        feeds = {
            "q": q.reshape(1, 1, heads * dim),
            "k": np.ascontiguousarray(k[:, :, -1]).reshape(1, 1, key_heads * dim),
            "v": np.ascontiguousarray(v[:, :, -1]).reshape(1, 1, key_heads * dim),
            "past_k": past_k,
            "past_v": past_v,
            "last": np.array([tokens - 1], np.int32),
            "total": np.array([tokens], np.int32),
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        integers = {
            **dict.fromkeys(("past_k", "past_v", "present_k", "present_v"), TensorProto.INT8),
            **dict.fromkeys(("last", "total"), TensorProto.INT32),
        }
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        outputs = {name: list(k.shape) for name in ("present_k", "present_v")}
        session = self._session([node], shapes, list(feeds["q"].shape), outputs, integers)
        # What it writes is the cache that it reads, as in a generation.
        run = self._bind(session, feeds, {"present_k": "past_k", "present_v": "past_v"})
        return run, lambda: run().numpy().reshape(q.shape)

    def _session(self, nodes, inputs, output, more_outputs={}, types={}):
        from onnx import TensorProto, helper

        def value(name, shape):
            kind = types.get(name, TensorProto.FLOAT)
            return helper.make_tensor_value_info(name, kind, shape)

        outputs = {"out": output, **more_outputs}
        values = [[value(*item) for item in group.items()] for group in (inputs, outputs)]
        graph = helper.make_graph(nodes, "peer", *values)
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)
        return self.runtime.InferenceSession(
            model.SerializeToString(), self.options, providers=["CPUExecutionProvider"]
        )

    def _bind(self, session, feeds, in_place={}):
        """A call without copies between NumPy and ONNX Runtime, which `session.run` would make.

        The output is allocated in every call, from ONNX Runtime's arena.
        """
        binding = session.io_binding()
        copied = self.runtime.OrtValue.ortvalue_from_numpy
        values = {name: copied(array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out", "cpu")
        for output, name in in_place.items():
            binding.bind_ortvalue_output(output, values[name])

        def run():
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0]

        return run


class OpenVino:
    """ScaledDotProductAttention of the CPU plugin in f32."""

    name = "openvino"

    def __init__(self, threads):
        import openvino
        import openvino.opset13

        self.openvino = openvino
        self.version = openvino.__version__.split("-")[0]
        self.core = openvino.Core()
        # f32 because it would take bf16 where the processor has it.
        self.config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }

    def attention(self, q, k, v):
        inputs = (q, k, v)
        operations = self.openvino.opset13
        parameters = [operations.parameter(list(x.shape), self.openvino.Type.f32) for x in inputs]
        attend = operations.scaled_dot_product_attention(*parameters)
        model = self.openvino.Model([attend], parameters, "peer")
        request = self.core.compile_model(model, "CPU", self.config).create_infer_request()
        # `infer` reads memory that it does not own: the closure keeps these tensors alive.
        tensors = [self.openvino.Tensor(x, shared_memory=True) for x in inputs]
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, tensor)

        def run(_keep=(tensors, inputs)):
            request.infer()

        def output():
            run()
            return request.get_output_tensor(0).data.copy()

        return run, output


class PyTorch:
    """scaled_dot_product_attention in f32, with the kernel that PyTorch chooses."""

    name = "torch"

    def __init__(self, threads):
        import torch

        self.torch = torch
        self.version = torch.__version__
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)

    def attention(self, q, k, v):
        tensors = [self.torch.from_numpy(x) for x in (q, k, v)]
        attend = self.torch.nn.functional.scaled_dot_product_attention

        def run():
            return attend(*tensors)

        return run, lambda: run().numpy()


LIBRARIES = {library.name: library for library in (OnnxRuntime, OpenVino, PyTorch, LlamaCpp)}


def shapes(what, shape):
    """Those of queries, keys and values: for decode, `shape` is H, H_kv, N, D and there is one query."""
    if what != "decode":
        return [shape] * 3
    heads, key_heads, tokens, dim = shape
    return [[1, heads, 1, dim], *[[1, key_heads, tokens, dim]] * 2]


class Server:
    def __init__(self, library):
        self.library = library
        self.ready = None  # what and which shape the next run can use
        self.calls = {}  # of the contenders that have run it

    def answer(self, line):
        match line.split(" ", 3):
            case ["about"]:
                return {"name": self.library.name, "version": self.library.version}
            case ["run", what, contender, rest]:
                shape, calls = rest.split()
                return self.run(what, contender, [int(n) for n in shape.split(",")], int(calls))
            case ["compute", what, contender, folder]:
                return self.compute(what, contender, Path(folder))
            case ["release"]:
                self.ready, self.calls = None, {}
                return {"released": True}
        raise ValueError(f"{line!r} is no command: about, run, compute, release")

    def prepare(self, what, contender, inputs):
        """`decode` of the contender `llama-q8_0` is the method `decode_q8_0` of its library."""
        _, _, way = contender.partition("-")
        name = f"{what}_{way}" if way else what
        method = getattr(self.library, name, None)
        if method is None:
            raise ValueError(f"{self.library.name} does not compute {name}")
        return method(*inputs)

    def run(self, what, contender, shape, calls):
        if self.ready != (what, shape):
            self.ready, self.calls = (what, shape), {}
        if contender not in self.calls:
            random = np.random.default_rng()
            inputs = [random.standard_normal(x, dtype=np.float32) for x in shapes(what, shape)]
            self.calls[contender], _ = self.prepare(what, contender, inputs)
        call = self.calls[contender]
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call()  # its result is freed at once: part of the time, as for everyone
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def compute(self, what, contender, folder):
        inputs = [np.load(folder / f"{name}.npy") for name in "qkv"]
        _, output = self.prepare(what, contender, inputs)
        path = folder / f"{contender}.npy"
        np.save(path, output())
        return {"written": str(path)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    answer_all(lambda: Server(LIBRARIES[args.library](args.threads)))


if __name__ == "__main__":
    main()
