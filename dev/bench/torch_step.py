"""Times PyTorch at the work that dev/bench/gpu.sh times of train_gpt2cu: GPT-2 124M and attention.

  torch_step.py --data IDS.npy [--batch-sizes 4,16,64] [--time-limit SECONDS] [--tiny]
  torch_step.py --cpu [--ways fp32,autocast]
  torch_step.py --turns step|token WAY SIZE        step fp32 4x64, token autocast 8

A step is forward, backward, clipping and AdamW, of a GPT-2 in plain torch.nn modules: compiled
(torch.compile), attention by F.scaled_dot_product_attention, AdamW(fused=True), vocabulary padded
to 50,304 as train_gpt2 pads it. Two ways of bf16: `autocast` (parameters in float32, as people
train) and `bf16` (parameters and optimizer in bf16 too, which is less work than train_gpt2 does).
Attention is timed alone too, by FlashAttention and by cuDNN, forward and backward, on q, k and v
that lie in one (B,T,3C) tensor.

Prints a line a result, for gpu.sh to read:
  step WAY B T ms tokens/s        attention BACKEND forward|backward B T NH HS us
A size that does not fit, or a backend that is not there, is said on a line of its own. With --tiny
it runs on the CPU at a size that exercises the flow, uncompiled; its times mean nothing. With --cpu
it times layers on the CPU, on the processors that OMP_NUM_THREADS says: PyTorch's own functions,
compiled where they are several; a backward pass alone is timed from a graph that is kept:
  layer WAY NAME ms processor-ms
With --turns it reads how many steps of B x T random tokens to make on the CPU, or tokens of some
sequences, and prints the medians of those, `ms processor-ms`, again and again; the first calls,
which compile, come before a line `ready`. So `make bench` takes turns with it. A token is one
compiled pass with a cache of keys and values, all in float32 or, for `autocast`, in bf16.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ==== the model ==================================================================================


@dataclass
class Config:
    layers: int = 12
    heads: int = 12
    channels: int = 768
    padded_vocab: int = 50304
    T: int = 1024


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.heads = config.heads
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        heads = (B, T, self.heads, C // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    def generate(self, x, cache, position, mask):
        """One position of each sequence: x (B,1,C), cache (2,B,NH,T,HS), which gets it too."""
        B, _, C = x.shape
        heads = (B, 1, self.heads, C // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, 2))
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, 1, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab, config.channels)
        self.wpe = nn.Embedding(config.T, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.lnf = nn.LayerNorm(config.channels)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs, targets):
        T = inputs.shape[1]
        x = self.wte(inputs) + self.wpe(torch.arange(T, device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def generate(self, tokens, caches, position):
        """The logits (B,V) after a token of each sequence at `position` (1)."""
        x = self.wte(tokens)[:, None] + self.wpe(position)
        mask = (torch.arange(caches[0].shape[3]) <= position)[None]
        for block, cache in zip(self.blocks, caches):
            x = block.generate(x, cache, position, mask)
        return F.linear(self.lnf(x[:, 0]), self.wte.weight)


# ==== timing =====================================================================================


class Timer:
    """Milliseconds between start() and stop(), by events where there is a GPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def start(self):
        if self.cuda:
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.begin.record()
        else:
            self.begin = time.perf_counter()

    def stop(self):
        if not self.cuda:
            return (time.perf_counter() - self.begin) * 1e3
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end)


def median_ms(work, device, warmups, samples):
    times = []
    for i in range(warmups + samples):
        timer = Timer(device)
        timer.start()
        work()
        times.append(timer.stop())
    return sorted(times[warmups:])[samples // 2]


# ==== a training step ============================================================================


def make_step(way, B, ids, config, options):
    """A step of B sequences, to be called again and again; the first ones compile."""
    device = options.device
    torch.manual_seed(1)
    model = Model(config).to(device)
    if way == "bf16":
        model = model.to(torch.bfloat16)
    decays = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = model if options.tiny else torch.compile(model, dynamic=False)
    place = 0

    def step():
        nonlocal place
        count = B * config.T
        place = place if place + count < len(ids) else 0
        batch = torch.from_numpy(ids[place : place + count + 1].astype(numpy.int64))
        place += count
        if device == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=way == "autocast"):
            loss = forward(batch[:-1].view(B, -1), batch[1:].view(B, -1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def time_step(way, B, ids, config, options):
    """Milliseconds of a step of B sequences: the median of several, after the compiler's first."""
    step = make_step(way, B, ids, config, options)
    return median_ms(step, options.device, *((1, 1) if options.tiny else (5, 20)))


def medians(work, warmups, samples):
    """The medians of a few calls, in ms: by the clock, and the processor time of all threads."""
    wall, processor = [], []
    for _ in range(warmups + samples):
        start, start_processor = time.perf_counter(), time.process_time()
        work()
        wall.append((time.perf_counter() - start) * 1e3)
        processor.append((time.process_time() - start_processor) * 1e3)
    return [sorted(times[warmups:])[samples // 2] for times in (wall, processor)]


def layers(way):
    """(name, forward, its inputs) of each layer at the sizes of bench.cpp, the names it has there."""
    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    B, T, C, V = 4, 64, 768, 50304
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()
    for inputs, outputs in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, V)):
        x, weight, bias = make(B * T, inputs), make(outputs, inputs), make(outputs)
        yield f"matmul_{{}}/C:{inputs}/OC:{outputs}", F.linear, (x, weight, bias)
    if way != "fp32":
        return
    ids = torch.randint(0, V, (B, T))
    embed = lambda wte, wpe: F.embedding(ids, wte) + wpe
    yield "encoder_{}", torch.compile(embed), (make(V, C), make(T, C))
    norm = lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias)
    yield "layernorm_{}", norm, (make(B, T, C), make(C), make(C))
    for length in (T, 1024):
        batch = max(1, B * T // length)

        def attention(qkv, batch=batch, length=length):
            heads = (batch, length, 12, C // 12)
            q, k, v = (part.view(heads).transpose(1, 2) for part in qkv.split(C, 2))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        yield f"attention_{{}}/T:{length}", attention, (make(batch, length, 3 * C),)
    yield "gelu_{}", lambda x: F.gelu(x, approximate="tanh"), (make(B, T, 4 * C),)
    yield "dropout_{}", lambda x: F.dropout(x, 0.1), (make(B, T, C),)
    add = torch.compile(lambda x, branch, weight, bias: norm(x + branch, weight, bias))
    yield "residual_layernorm_{}", add, (make(B, T, C), make(B, T, C), make(C), make(C))


def time_cpu_layers(options):
    """Each layer, forward and backward; loss and gradient of a classifier; the norm; AdamW."""

    def show(way, name, work):
        for _ in range(3):
            work()
        start = time.perf_counter()
        work()
        calls = max(1, int(0.005 / (time.perf_counter() - start)))
        ms, cpu_ms = medians(lambda: [work() for _ in range(calls)], 1, 9)
        print(f"layer {way} {name} {ms / calls:.5f} {cpu_ms / calls:.5f}", flush=True)

    for way in options.ways.split(","):
        for name, forward, inputs in layers(way):
            with torch.no_grad():
                show(way, name.format("forward"), lambda: forward(*inputs))
            y = forward(*inputs)
            dy = torch.randn_like(y)
            backward = lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
            show(way, name.format("backward"), backward)
    logits, targets = torch.randn(256, 50304).requires_grad_(), torch.full((256,), 17)
    loss = torch.compile(F.cross_entropy)
    gradient = lambda: torch.autograd.grad(loss(logits, targets), logits)
    show("fp32", "classifier_forward", gradient)
    parameter = torch.randn(1 << 24).requires_grad_()
    parameter.grad = torch.randn(1 << 24)
    show("fp32", "global_norm", lambda: torch.nn.utils.get_total_norm([parameter.grad]))
    adamw = torch.optim.AdamW([parameter], weight_decay=0.1, fused=True)
    show("fp32", "adamw_update", adamw.step)
    torch.compiler.reset()


def make_token(way, B):
    """A token of B sequences, to be called again and again."""
    config, dtype = Config(), torch.float32 if way == "fp32" else torch.bfloat16
    torch.manual_seed(1)
    model = Model(config).to(dtype).eval()
    head = (B, config.heads, 64, config.channels // config.heads)
    caches = [torch.zeros(2, *head, dtype=dtype) for _ in range(config.layers)]
    generate, place = torch.compile(model.generate, dynamic=False), 0

    @torch.inference_mode()
    def token():
        nonlocal place
        tokens = torch.randint(0, 50257, (B,))
        generate(tokens, caches, torch.tensor([place % 64]))
        place += 1

    return token


def take_turns(what, way, size, options):
    if what == "token":
        work = make_token(way, int(size))
    else:
        B, T = map(int, size.split("x"))
        ids = numpy.random.default_rng(1).integers(0, 50257, B * T + 1)
        work = make_step(way, B, ids, Config(T=T), options)
    medians(work, 0, 4)
    print("ready", flush=True)
    for calls in sys.stdin:
        print(*medians(work, int(calls) > 1, int(calls)), flush=True)


def time_steps(config, options, deadline):
    ids = numpy.load(options.data, mmap_mode="r")
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    runs = [("autocast", B) for B in sizes] + [("bf16", max(sizes))]
    for way, B in runs:
        if time.monotonic() > deadline:
            print(f"step {way} B={B}: not timed, the time limit was reached", flush=True)
            continue
        try:
            ms = time_step(way, B, ids, config, options)
            print(f"step {way} {B} {config.T} {ms:.3f} {B * config.T / ms * 1e3:.0f}", flush=True)
        except torch.OutOfMemoryError:
            print(f"step {way} B={B}: out of memory", flush=True)
        torch.compiler.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()


# ==== attention ==================================================================================


def time_attention(backend, B, T, NH, HS, options):
    qkv = torch.randn(B, T, 3 * NH * HS, device=options.device, dtype=torch.bfloat16)
    qkv.requires_grad_()
    q, k, v = (part.view(B, T, NH, HS).transpose(1, 2) for part in qkv.split(NH * HS, 2))
    samples = (1, 1) if options.tiny else (5, 20)
    with sdpa_kernel(backend):
        attention = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        forward = median_ms(attention, options.device, *samples)
        y = attention()
        dout = torch.randn_like(y)
        backward = median_ms(
            lambda: torch.autograd.grad(y, (q, k, v), dout, retain_graph=True),
            options.device,
            *samples,
        )
    return forward, backward


def time_attentions(options):
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    shapes = [(64, 1024, 12, 64), (64, 1024, 25, 64), (16, 4096, 12, 64), (32, 1024, 16, 128)]
    if options.tiny:
        backends, shapes = {"math": SDPBackend.MATH}, [(2, 32, 2, 32)]
    for name, backend in backends.items():
        for shape in shapes:
            try:
                for way, ms in zip(
                    ("forward", "backward"), time_attention(backend, *shape, options)
                ):
                    sizes = " ".join(map(str, shape))
                    print(f"attention {name} {way} {sizes} {ms * 1e3:.1f}", flush=True)
            except RuntimeError as error:
                print(f"attention {name} {shape}: {str(error).splitlines()[0]}", flush=True)


# ==== main =======================================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--turns", nargs=3)
    parser.add_argument("--ways", default="fp32,autocast")
    parser.add_argument("--batch-sizes", default="64,16,4")
    parser.add_argument("--time-limit", type=float, default=150)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    options.device = "cpu" if options.tiny or options.cpu or options.turns else "cuda"
    if options.data is None and not (options.cpu or options.turns):
        sys.exit("torch_step.py: error: --data IDS.npy is missing")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch_step.py: error: this PyTorch sees no GPU")
    torch.set_float32_matmul_precision("high")
    if options.turns:
        return take_turns(*options.turns, options)
    print(f"PyTorch {torch.__version__}", flush=True)
    if options.cpu:
        return time_cpu_layers(options)
    time_attentions(options)  # first: it is quick
    tiny = Config(layers=1, heads=2, channels=32, padded_vocab=50304, T=32)
    time_steps(tiny if options.tiny else Config(), options, deadline)


if __name__ == "__main__":
    main()
