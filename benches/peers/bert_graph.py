"""A BERT encoder as an ONNX model, from its safetensors and config.json.

Inputs are `ids` and, where `mask` is asked for, `mask`, both [B, N]; the output `hidden` is [B, N, hidden].
`fused` uses the operators of com.microsoft that ONNX Runtime's own optimizer makes of a BERT: Attention,
SkipLayerNormalization, BiasGelu. Without it, operators of ONNX alone, for OpenVINO.
"""

import json
from pathlib import Path

import numpy as np

OPSET = 20
IR_VERSION = 9
LOWEST = float(np.finfo(np.float32).min)


def build(folder, fused, mask):
    from onnx import TensorProto, helper

    graph = Graph(Path(folder), fused)
    hidden = graph.encoder(mask)

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    ids = TensorProto.INT32 if fused else TensorProto.INT64
    inputs = [value(name, ids, ["B", "N"]) for name in ["ids", "mask"][: 1 + mask]]
    output = value("hidden", TensorProto.FLOAT, ["B", "N", graph.width])
    graph.node("Identity", [hidden], "hidden")
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(graph.nodes, "bert", inputs, [output], graph.constants)
    return helper.make_model(made, opset_imports=domains[: 1 + fused], ir_version=IR_VERSION)


class Graph:
    def __init__(self, folder, fused):
        from safetensors.numpy import load_file

        weights = next(folder.glob("*.safetensors"))
        self.weights = {
            name.removeprefix("bert."): array.astype(np.float32)
            for name, array in load_file(weights).items()
        }
        config = json.loads((folder / "config.json").read_text())
        self.width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.layers = config["num_hidden_layers"]
        self.epsilon = config["layer_norm_eps"]
        self.fused = fused
        self.nodes, self.constants = [], []

    def constant(self, name, array):
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind, inputs, output=None, domain="", **attributes):
        from onnx import helper

        output = output or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def encoder(self, mask):
        table = "embeddings.{}_embeddings.weight"
        words = self.constant("words", self.weights[table.format("word")])
        # Of token type 0, all of them.
        type0 = self.weights[table.format("token_type")][0]
        places = self.constant("places", self.weights[table.format("position")] + type0)
        zero, one = (self.constant(f"n{n}", np.array([n], np.int64)) for n in (0, 1))
        tokens = self.node("Shape", ["ids"], start=1)
        places = self.node("Slice", [places, zero, tokens, zero, one])
        hidden = self.node("Add", [self.node("Gather", [words, "ids"]), places])
        hidden = self.norm(hidden, None, "embeddings.LayerNorm")
        bias = None
        if mask and not self.fused:
            # 0 for tokens, very negative for padding, [B, 1, 1, N].
            bias = self.node("Cast", ["mask"], to=1)
            bias = self.node("Sub", [self.constant("1", np.float32(1)), bias])
            bias = self.node("Mul", [bias, self.constant("lowest", np.float32(LOWEST))])
            bias = self.node("Unsqueeze", [bias, self.constant("12", np.array([1, 2], np.int64))])
        for index in range(self.layers):
            hidden = self.layer(hidden, f"encoder.layer.{index}", bias, mask)
        return hidden

    def layer(self, hidden, layer, bias, mask):
        attention = self.attention_fused if self.fused else self.attention
        context = attention(hidden, f"{layer}.attention.self", mask if self.fused else bias)
        output = self.linear(context, f"{layer}.attention.output.dense")
        hidden = self.norm(output, hidden, f"{layer}.attention.output.LayerNorm")
        inner = self.gelu(hidden, f"{layer}.intermediate.dense")
        output = self.linear(inner, f"{layer}.output.dense")
        return self.norm(output, hidden, f"{layer}.output.LayerNorm")

    def product(self, x, name):
        weight = self.constant(f"{name}.weight", self.weights[f"{name}.weight"].T)
        return self.node("MatMul", [x, weight])

    def bias(self, name):
        return self.constant(f"{name}.bias", self.weights[f"{name}.bias"])

    def linear(self, x, name):
        return self.node("Add", [self.product(x, name), self.bias(name)])

    def gelu(self, x, name):
        if self.fused:
            inputs = [self.product(x, name), self.bias(name)]
            return self.node("BiasGelu", inputs, domain="com.microsoft")
        return self.node("Gelu", [self.linear(x, name)])

    def norm(self, x, residual, name):
        weight = self.constant(f"{name}.weight", self.weights[f"{name}.weight"])
        bias = self.bias(name)
        if residual is None:
            return self.node("LayerNormalization", [x, weight, bias], epsilon=self.epsilon)
        if self.fused:
            inputs, domain = [x, residual, weight, bias], "com.microsoft"
            return self.node(
                "SkipLayerNormalization", inputs, domain=domain, epsilon=self.epsilon
            )
        inputs = [self.node("Add", [x, residual]), weight, bias]
        return self.node("LayerNormalization", inputs, epsilon=self.epsilon)

    def attention_fused(self, x, name, mask):
        of = [f"{name}.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self.weights[f"{part}.weight"].T for part in of], axis=1)
        bias = np.concatenate([self.weights[f"{part}.bias"] for part in of])
        inputs = [x, self.constant(f"{name}.qkv", weight), self.constant(f"{name}.qkv.bias", bias)]
        inputs += ["mask"] if mask else []
        return self.node("Attention", inputs, domain="com.microsoft", num_heads=self.heads)

    def attention(self, x, name, bias):
        dim = self.width // self.heads
        split = self.constant(f"{name}.split", np.array([0, 0, self.heads, dim], np.int64))

        def heads(part, perm):
            split_x = self.node("Reshape", [self.linear(x, f"{name}.{part}"), split])
            return self.node("Transpose", [split_x], perm=perm)

        q, v = heads("query", [0, 2, 1, 3]), heads("value", [0, 2, 1, 3])
        scores = self.node("MatMul", [q, heads("key", [0, 2, 3, 1])])
        root = self.constant(f"{name}.scale", np.float32(dim**-0.5))
        scores = self.node("Mul", [scores, root])
        if bias:
            scores = self.node("Add", [scores, bias])
        context = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), v])
        context = self.node("Transpose", [context], perm=[0, 2, 1, 3])
        merge = self.constant(f"{name}.merge", np.array([0, 0, self.width], np.int64))
        return self.node("Reshape", [context, merge])
