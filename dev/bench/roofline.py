"""What a training step of GPT-2 must take on a card, kernel by kernel, from first principles.

  roofline.py [--layers N --channels N --batch-size N --sequence-length N] [--measured layers.log]

A kernel cannot take less than its bytes need at the card's memory bandwidth, nor less than its
operations need at the rate of the tensor cores: the larger of the two is its floor. Bytes are what
the kernel of train_gpt2.cu reads and writes in bf16 training, each tensor once, whatever caches do.
Rates are those measured on cards (a large copy, and a product of 8192 x 8192 matrices of random
numbers); datasheets promise more. Prints the table of dev/bench/README.md, in Markdown. By default
GPT-2 124M, without dropout, 64 sequences of 1,024 tokens.
"""

import argparse
from dataclasses import dataclass

# bytes/s and operations/s: measured, and by the datasheet
CARDS = {"H100": (3.0e12, 800e12), "H200": (4.3e12, 790e12)}
DATASHEET = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}

NARROW, EXACT = 2, 4  # bytes of a bf16 and of a float32
CLASSIFIER_ROWS = 4096  # rows of logits that exist at a time: kClassifierRows of train_gpt2.cu


@dataclass
class Kernel:
    name: str
    calls: int  # in a step
    bytes: float  # of one call
    operations: float = 0  # of one call

    def floor_s(self, card):
        bandwidth, rate = card
        return max(self.bytes / bandwidth, self.operations / rate)

    def bound(self, card):
        return "operations" if self.operations / card[1] > self.bytes / card[0] else "bytes"


def product(name, calls, rows, inputs, outputs, extra=0):
    """out (rows,outputs) = inp (rows,inputs) weight^T; `extra` more numbers of bf16 go by."""
    numbers = rows * inputs + inputs * outputs + rows * outputs + extra
    return Kernel(name, calls, NARROW * numbers, 2 * rows * inputs * outputs)


def weight_gradient(name, calls, rows, inputs, outputs):
    """dweight (outputs,inputs) += dout^T inp, the sum in float32, read and written."""
    moved = NARROW * rows * (inputs + outputs) + 2 * EXACT * inputs * outputs
    return Kernel(name, calls, moved, 2 * rows * inputs * outputs)


def kernels(L, C, T, B, V=50257):
    """The kernels of a step, in the order of train_gpt2.cu."""
    BT, F, Vp = B * T, 4 * C, (V + 127) // 128 * 128
    N = BT * C  # numbers of a (B,T,C)
    R = min(BT, CLASSIFIER_ROWS)
    chunks = -(-BT // R)
    parameters = L * (12 * C * C + 13 * C) + (Vp + T) * C + 2 * C
    statistics = 2 * EXACT * BT  # mean and rstd
    attention = 2 * BT * (T + 1) * C  # two products, over the (T+1)/2 keys that a query sees
    rows = [
        Kernel("encoder_forward", 1, NARROW * (N + V * C + T * C)),
        Kernel("encoder_backward", 1, NARROW * 2 * N + 2 * EXACT * (V + T) * C),
        Kernel("layernorm_forward", 1, NARROW * 2 * N + statistics),
        Kernel("layernorm_backward", 2 * L + 1, NARROW * 4 * N + statistics),
        product("matmul_forward, qkv", L, BT, C, 3 * C),
        product("matmul_forward, attproj", L, BT, C, C),
        product("matmul_gelu_forward, fc", L, BT, C, F, extra=BT * F),
        product("matmul_forward, fcproj", L, BT, F, C),
        product("matmul_forward, classifier", chunks, R, C, Vp),
        product("matmul_backward, qkv: dinp", L, BT, 3 * C, C),
        weight_gradient("matmul_backward, qkv: dweight", L, BT, C, 3 * C),
        product("matmul_backward, attproj: dinp", L, BT, C, C),
        weight_gradient("matmul_backward, attproj: dweight", L, BT, C, C),
        product("matmul_backward, fc: dinp", L, BT, F, C),
        weight_gradient("matmul_backward, fc: dweight", L, BT, C, F),
        product("gelu_matmul_backward, fcproj: dpre", L, BT, C, F, extra=BT * F),
        weight_gradient("gelu_matmul_backward, fcproj: dweight", L, BT, F, C),
        product("matmul_backward, classifier: dinp", chunks, R, Vp, C),
        weight_gradient("matmul_backward, classifier: dweight", chunks, R, C, Vp),
        Kernel("bias_backward, all four", L, NARROW * BT * (3 * C + C + F + C)),
        Kernel("attention_forward", L, NARROW * 4 * N, attention),
        Kernel("attention_backward", L, NARROW * (2 * 3 * N + 2 * N), 2.5 * attention),
        Kernel("residual_layernorm_forward", 2 * L, NARROW * 4 * N + statistics),
        Kernel("classifier_forward", chunks, NARROW * 2 * R * Vp),
        Kernel("global_norm", 1, EXACT * parameters),
        Kernel("adamw_update", 1, (7 * EXACT + NARROW) * parameters),
        Kernel("zeroing the gradients", 1, EXACT * parameters),
    ]
    return rows


def read_times(path):
    """Microseconds by (kernel, size), of the lines in bf16 or of those without a product."""
    times = {}
    with open(path, encoding="utf-8") as log:
        for line in log:
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) > 5 and cells[1].startswith("`") and cells[2] in ("bf16", "fp32"):
                times.setdefault((cells[1].strip("`"), cells[2], cells[3]), float(cells[5]))
    return times


def measured(name, times, options):
    """What was measured of a row of the table: its time, or that of several rows together."""
    L, C, B, T = options.layers, options.channels, options.batch_size, options.sequence_length
    model = {(12, 768): "124M", (48, 1600): "1558M"}.get((L, C), "")
    BT, F, Vp = B * T, 4 * C, 50304
    sizes = {
        "qkv": f"{BT} x {C} x {3 * C}",
        "attproj": f"{BT} x {C} x {C}",
        "fc": f"{BT} x {C} x {F}",
        "fcproj": f"{BT} x {F} x {C}",
        "classifier": f"{min(BT, CLASSIFIER_ROWS)} x {C} x {Vp}",
    }

    def us(kernel, size, dtype="bf16"):
        return times.get((kernel, dtype, size))

    kernel, _, rest = name.partition(", ")
    layer = rest.partition(":")[0]
    batch = f"{model}, B={B}, T={T}"
    if name.startswith("bias_backward"):
        parts = [us("bias_backward", f"{model}, {BT} x {n}") for n in (3 * C, C, F, C)]
        time = None if None in parts else sum(parts)
    elif layer in sizes:
        if rest.endswith("dweight"):
            return "with the row above"
        time = us(kernel, f"{model}, {sizes[layer]}")
        if kernel == "gelu_matmul_backward" and time is not None:  # that was timed with its bias
            time -= us("bias_backward", f"{model}, {BT} x {C}") or 0
    elif kernel.startswith("attention"):
        time = us(kernel, f"{batch}, NH={C // 64}, HS=64")
    elif kernel == "residual_layernorm_forward":
        time = us(kernel, f"{batch}, dropout 0")
    elif kernel == "classifier_forward":
        time = us("classifier_forward, gradient", f"{min(BT, CLASSIFIER_ROWS)} x 50257")
    elif kernel in ("adamw_update", "global_norm"):
        time = us(kernel, model, "fp32" if kernel == "global_norm" else "bf16")
    else:
        time = us(kernel, batch)
    return "not measured" if time is None else f"{time:,.0f}"


def print_table(rows, tokens, options):
    times = read_times(options.measured) if options.measured else {}
    cards = list(CARDS)
    floors = " | ".join(f"{card}, us" for card in cards)
    print(f"| kernel | calls a step | GB | GFLOP | bound by | {floors} | measured, us |")
    print("| --- " * (6 + len(cards)) + "|")
    for row in rows:
        floors = " | ".join(f"{row.floor_s(CARDS[card]) * 1e6:,.0f}" for card in cards)
        operations = f"{row.operations / 1e9:,.0f}" if row.operations else ""
        print(
            f"| `{row.name}` | {row.calls} | {row.bytes / 1e9:.3f} | {operations} "
            f"| {row.bound(CARDS[cards[0]])} | {floors} | {measured(row.name, times, options)} |"
        )
    print()
    for card in cards:
        for source, rates in ("measured", CARDS), ("datasheet", DATASHEET):
            step_s = sum(row.calls * row.floor_s(rates[card]) for row in rows)
            print(
                f"{card} at {source} rates ({rates[card][0] / 1e12:g} TB/s, "
                f"{rates[card][1] / 1e12:g} TFLOP/s): a step {step_s * 1e3:.1f} ms, "
                f"{tokens / step_s / 1e3:,.0f} thousand tokens/s at most"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--measured", help="what the layers' benchmarks printed")
    options = parser.parse_args()
    B, T = options.batch_size, options.sequence_length
    print_table(kernels(options.layers, options.channels, T, B), B * T, options)


if __name__ == "__main__":
    main()
