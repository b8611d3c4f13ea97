"""llama.cpp's flash attention on CPUs, through the C interface of its library ggml.

The package llama-cpp-python brings ggml; nothing else of it is used, and its Python code is not loaded.
"""

import ctypes
import importlib.metadata
import math
import sys
import weakref
from pathlib import Path

import numpy as np

# Of `enum ggml_type`, and how many numbers share a scale in q8_0.
F32, F16, Q8_0 = 0, 1, 8
Q8_0_BLOCK = 32


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: a context is the memory of tensors, here without their data."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


# What is called of ggml: the result, then the arguments. Structures are only passed on, as addresses.
INT, INT64, SIZE, FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
ADDRESS = ctypes.c_void_p
FUNCTIONS = {
    "ggml_version": [ctypes.c_char_p],
    "ggml_init": [ADDRESS, InitParams],
    "ggml_free": [None, ADDRESS],
    "ggml_tensor_overhead": [SIZE],
    "ggml_graph_overhead": [SIZE],
    "ggml_new_tensor_4d": [ADDRESS, ADDRESS, INT, INT64, INT64, INT64, INT64],
    "ggml_get_data": [ADDRESS, ADDRESS],
    "ggml_quantize_chunk": [SIZE, INT, ADDRESS, ADDRESS, INT64, INT64, INT64, ADDRESS],
    "ggml_flash_attn_ext": [ADDRESS, *[ADDRESS] * 5, FLOAT, FLOAT, FLOAT],
    "ggml_new_graph": [ADDRESS, ADDRESS],
    "ggml_build_forward_expand": [None, ADDRESS, ADDRESS],
    "ggml_backend_cpu_init": [ADDRESS],
    "ggml_backend_cpu_set_n_threads": [None, ADDRESS, INT],
    "ggml_backend_alloc_ctx_tensors": [ADDRESS, ADDRESS, ADDRESS],
    "ggml_backend_buffer_free": [None, ADDRESS],
    "ggml_backend_graph_compute": [INT, ADDRESS, ADDRESS],
}


class LlamaCpp:
    """ggml_flash_attn_ext of its CPU backend, on queries in f32 and a cache in f16 or q8_0."""

    name = "llama-cpp-python"

    def __init__(self, threads):
        package = importlib.metadata.distribution(self.name)
        self.ggml = load(Path(package.locate_file("llama_cpp/lib")))
        self.version = f"{package.version} (ggml {self.ggml.ggml_version().decode()})"
        self.backend = self.ggml.ggml_backend_cpu_init()
        self.ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def attention(self, q, k, v):
        return self._attend(q, k, v, F16)

    def decode(self, q, k, v):
        return self._attend(q, k, v, F16)

    def decode_q8_0(self, q, k, v):
        return self._attend(q, k, v, Q8_0)

    def _attend(self, q, k, v, cache):
        """A graph of one operation, whose inputs and output stay where they are.

        ggml names dimensions from the last: q is [D, M, H, B], which are the same bytes as [B, H, M, D].
        """
        ggml = self.ggml
        batch, heads, queries, dim = q.shape
        if cache == Q8_0 and dim % Q8_0_BLOCK:
            raise ValueError(f"head dimension {dim}, q8_0 takes multiples of {Q8_0_BLOCK}")
        size = 4 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        context = ggml.ggml_init(InitParams(size, None, True))
        inputs = [(F32, q), (cache, k), (cache, v)]
        tensors = [ggml.ggml_new_tensor_4d(context, kind, *x.shape[::-1]) for kind, x in inputs]
        no_mask, scale, no_bias, no_softcap = None, 1 / math.sqrt(dim), 0.0, 0.0
        out = ggml.ggml_flash_attn_ext(context, *tensors, no_mask, scale, no_bias, no_softcap)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        buffer = ggml.ggml_backend_alloc_ctx_tensors(context, self.backend)
        if buffer is None:
            ggml.ggml_free(context)
            raise MemoryError("ggml has no room for the tensors")
        for tensor, (kind, x) in zip(tensors, inputs, strict=True):
            write(ggml, tensor, kind, x)

        def run():
            status = ggml.ggml_backend_graph_compute(self.backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute gives {status}")

        def output():
            run()
            numbers = (ctypes.c_float * q.size).from_address(ggml.ggml_get_data(out))
            return np.array(numbers).reshape(batch, queries, heads, dim).transpose(0, 2, 1, 3)

        weakref.finalize(run, free, ggml, context, buffer)
        return run, output


def load(folder):
    """ggml, which finds its CPU backend beside it."""
    library = ctypes.CDLL(str(folder / f"libggml.{'dylib' if sys.platform == 'darwin' else 'so'}"))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def write(ggml, tensor, kind, x):
    """Rows of f32 to the memory of a tensor, in its format."""
    x = np.ascontiguousarray(x, np.float32)
    rows, dim = math.prod(x.shape[:-1]), x.shape[-1]
    data, first, no_importance = ggml.ggml_get_data(tensor), 0, None
    ggml.ggml_quantize_chunk(kind, x.ctypes.data, data, first, rows, dim, no_importance)


def free(ggml, context, buffer):
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(context)
