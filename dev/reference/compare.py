"""Compares train_gpt2 with PyTorch on any GPT-2: loss, logits, every gradient, steps of AdamW.

  compare.py FOLDER...               model folders that transformers can load, a table each
  compare.py --random N              N random models, a line each
  compare.py --roundtrip FOLDER...   folders that train_gpt2 wrote: they load in transformers and
                                     give the same numbers and token ids
  compare.py --autocast              100 steps in bf16, how far their losses lead from float32's
  compare.py --tests                 what `make test` runs: random models, and folders and
                                     tokenizers both ways

Each tensor that `train_gpt2 dump` gives may be at most twice as far from PyTorch's float64 as
PyTorch's own float32 is, or its bf16 with --dtype bf16 (reference.py). The last line is
`N passed, N failed, N skipped`; exit code 0 when nothing failed, 1 when something did, 2 when the
comparison cannot be made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """One line: why a comparison failed."""


def stop(message):
    print(f"compare.py: error: {message}", file=sys.stderr)
    sys.exit(2)


try:
    import numpy
    import safetensors.torch
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
    from transformers import PreTrainedTokenizerFast

    import reference
except ImportError as missing:
    stop(f"{missing.name} is missing; pip install torch transformers safetensors numpy")


# ==== our side ===================================================================================


def run(options, *words):
    """Runs train_gpt2; a non-zero exit is a Failure with its line."""
    command = [options.train_gpt2, *map(str, words)]
    # threads that wait by spinning would take the cores from each other, or from other programs
    quiet = {"OMP_WAIT_POLICY": "passive"} | os.environ
    try:
        done = subprocess.run(
            command, capture_output=True, errors="replace", env=quiet, timeout=600
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{words[0]} did not end in 600 s")
    except OSError as error:
        stop(f"{options.train_gpt2}: cannot run: {error.strerror}")
    if done.returncode != 0:
        line = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise Failure(f"{words[0]} ended with exit code {done.returncode}: {line}")


def dump(options, folder, tokens, recipe, work, dtype=None):
    numpy.save(work / "ids.npy", tokens.numpy().astype("int32"))
    words = ["--model", folder, "--tokens", work / "ids.npy", "--out", work / "dump.safetensors"]
    words += ["--dtype", dtype or options.dtype]
    for name, value in vars(recipe).items():
        words += ["--" + name.replace("_", "-"), value]
    run(options, "dump", *words)
    return safetensors.torch.load_file(work / "dump.safetensors")


def encode(options, tokenizer, text, work):
    (work / "text.txt").write_bytes(text.encode())
    words = ["--tokenizer", tokenizer, "--in", work / "text.txt", "--out", work / "text.npy"]
    run(options, "tokenizer", "encode", *words)
    return numpy.load(work / "text.npy").tolist()


# ==== one model ==================================================================================


@dataclass
class Row:
    name: str
    largest: float  # element of the float64 result
    ours: float  # distance from it
    theirs: float  # PyTorch's distance from it
    ratio: float  # of the two, for the worst of its parts

    @property
    def passes(self):
        return self.ratio <= 2  # and not for NaN


@dataclass
class Comparison:
    rows: list
    samples: int  # of PyTorch's error

    @property
    def worst(self):
        return max(self.rows, key=lambda row: row.ratio)

    @property
    def passes(self):
        return all(row.passes for row in self.rows)


def load(folder):
    """The configuration and float32 parameters of a folder, as transformers loads it."""
    model, report = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise Failure(f"transformers reports {kind}: {sorted(map(str, report[kind]))[:3]}")
    return model.config, {name: value.detach() for name, value in model.state_dict().items()}


def compare_row(name, ours, expected, errors, kind):
    if ours.numel() != expected.numel() or (ours.dim() > 1 and ours.shape != expected.shape):
        raise Failure(f"{name}: shape {tuple(ours.shape)}, PyTorch's is {tuple(expected.shape)}")
    if not torch.isfinite(ours).all():
        raise Failure(f"{name}: holds numbers that are not finite")
    largest = expected.abs().max()
    distances = reference.largest_distances(name, ours.double().reshape(expected.shape), expected)
    allowed = reference.bound(errors, largest, kind)
    # nothing may be off where nothing is allowed: 0 / 0 is a pass, anything else over 0 is not
    ratios = torch.where(distances > 0, 2 * distances / allowed, torch.zeros_like(distances))
    worst = int(ratios.argmax())
    return Row(
        name, float(largest), float(distances[worst]), float(errors[worst]), float(ratios[worst])
    )


def compare(options, folder, tokens, recipe, work):
    """dump of a folder against PyTorch's results for it.

    A maximum over few samples is a poor estimate for a small tensor: held against one more
    evaluation by PyTorch itself, a bound from 8 fails in one tensor of a thousand, and a model has
    a hundred. So a comparison that fails is made again with eight times the samples, and that one
    counts."""
    config, state = load(folder)
    ours = dump(options, folder, tokens, recipe, work)
    batch = reference.split(tokens)
    expected = reference.evaluate(reference.build(config, torch.float64), state, batch, recipe)
    for name in sorted(expected.keys() ^ ours.keys()):
        raise Failure(f"{name}: only {'PyTorch' if name in expected else 'train_gpt2'} has it")
    # a large tensor has samples enough of its own
    count = 8 if sum(value.numel() for value in state.values()) < 1_000_000 else 2
    errors = {name: torch.zeros(reference.parts(name), dtype=torch.float64) for name in expected}
    kind = "bf16" if options.dtype == "bf16" else "32"
    dtype = reference.KINDS[kind]
    for orders in (range(count), range(count, 8 * count)):
        more = reference.pytorch_error(config, state, batch, recipe, expected, dtype, orders)
        errors = {name: torch.maximum(errors[name], more[name]) for name in errors}
        rows = [compare_row(n, ours[n], expected[n], errors[n], kind) for n in expected]
        comparison = Comparison(rows, orders.stop)
        if comparison.passes or comparison.worst.ratio > 100:  # no number of samples would help
            break
    return comparison


def print_table(comparison):
    width = max(len(row.name) for row in comparison.rows)
    print(f"{'tensor':<{width}}  max |float64|  our error  PyTorch's  ratio")
    for row in comparison.rows:
        numbers = f"{row.largest:13.3e}  {row.ours:9.2e}  {row.theirs:9.2e}  {row.ratio:5.2f}"
        print(f"{row.name:<{width}}  {numbers}{'' if row.passes else '  FAIL'}")


# ==== random models ==============================================================================


@dataclass
class Case:
    what: list
    sizes: dict
    B: int
    T: int
    ignored: float = 0
    dtype: str = "float32"
    prefix: bool = True
    scale_of_weights: float = 0.3


def prime(draw, low, high):
    while True:
        n = int(draw.integers(low, high))
        if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)):
            return n


def set_width(case, channels, heads):
    case.sizes |= dict(n_head=heads, n_embd=channels)


def set_heads(case, heads, size):
    set_width(case, heads * size, heads)


def set_length(case, T):
    case.sizes["n_positions"] = T + 3
    case.T = T


# what makes a case special, in the order in which the first cases take them, one each
FEATURES = {
    "prime vocabulary": lambda case, draw: case.sizes.update(vocab_size=prime(draw, 130, 500)),
    "T = 1": lambda case, draw: setattr(case, "T", 1),
    "T = context": lambda case, draw: setattr(case, "T", case.sizes["n_positions"]),
    "one head": lambda case, draw: set_heads(case, 1, int(draw.integers(4, 30))),
    "one layer": lambda case, draw: case.sizes.update(n_layer=1),
    "heads of 5": lambda case, draw: set_heads(case, int(draw.integers(1, 6)), 5),
    "vocabulary of 1": lambda case, draw: case.sizes.update(vocab_size=1),
    "vocabulary of 2": lambda case, draw: case.sizes.update(vocab_size=2),
    "untied head": lambda case, draw: case.sizes.update(tie_word_embeddings=False),
    "float16 file": lambda case, draw: setattr(case, "dtype", "float16"),
    "bfloat16 file": lambda case, draw: setattr(case, "dtype", "bfloat16"),
    "names without prefix": lambda case, draw: setattr(case, "prefix", False),
    "another MLP width": lambda case, draw: case.sizes.update(n_inner=int(draw.integers(3, 90))),
    "another epsilon": lambda case, draw: case.sizes.update(
        layer_norm_epsilon=float(draw.choice([1e-3, 1e-6, 1e-8]))
    ),
    "ignored targets": lambda case, draw: setattr(case, "ignored", 0.4),
    "96 channels": lambda case, draw: set_width(case, 96, int(draw.choice([2, 3, 6]))),
    "160 channels": lambda case, draw: set_width(case, 160, int(draw.choice([4, 5]))),
    "heads of 1": lambda case, draw: set_heads(case, int(draw.integers(4, 12)), 1),
    "vocabulary of 128": lambda case, draw: case.sizes.update(vocab_size=128),
    "T past 64": lambda case, draw: set_length(case, int(draw.integers(65, 135))),
}


def random_case(index, seed):
    """Case `index`: one feature each for as many as there are, then three at a time."""
    draw = numpy.random.default_rng([seed, index])
    sizes = dict(
        vocab_size=int(draw.integers(3, 300)),
        n_positions=int(draw.integers(2, 40)),
        n_layer=int(draw.integers(1, 4)),
    )
    T = int(draw.integers(1, sizes["n_positions"] + 1))
    case = Case([], sizes, B=int(draw.integers(1, 5)), T=T)
    set_heads(case, int(draw.integers(1, 6)), int(draw.integers(4, 13)))
    names = list(FEATURES)
    case.what = sorted(draw.choice(names, 3, replace=False))
    if index < len(names):
        case.what = [names[index]]
    for name in case.what:
        FEATURES[name](case, draw)
    case.T = min(case.T, case.sizes["n_positions"])
    case.scale_of_weights = min(0.3, 1.2 / case.sizes["n_embd"] ** 0.5)
    return case, draw


def write_model(case, draw, folder):
    """A random model as transformers saves it, in a folder."""
    config = GPT2Config(**case.sizes, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(reference.random_state(config, draw, case.scale_of_weights))
    model = model.to(getattr(torch, case.dtype))
    if not case.prefix and config.tie_word_embeddings:
        model = model.transformer  # the first GPT-2 files were made so: no prefix, no head
    model.save_pretrained(folder)


def random_tokens(case, draw):
    tokens = reference.random_tokens(GPT2Config(**case.sizes), draw, case.B, case.T, case.ignored)
    if (tokens[:, 1:] == reference.IGNORE).all():
        tokens[0, 1] = 0  # a loss needs a target
    return tokens


def describe(case):
    s = case.sizes
    return (
        f"V={s['vocab_size']} T={case.T}/{s['n_positions']} L={s['n_layer']} NH={s['n_head']}"
        f" C={s['n_embd']} B={case.B}"
    )


# ==== folders and tokenizers, both ways ==========================================================

# runs of spaces, contractions, other scripts, an emoji, combining marks, control characters
HARD_TEXT = "I'll say  it's\tdone.\n\n  x=1234;\r\n\u00e9e\u0301 \u0416\u4e2d\u6587 \u0663\u0664 "
HARD_TEXT += "\u00a0\u2003 \U0001f600\u200d!? \x00\x7f"


def model_folder(folder):
    """A run folder stands for its last checkpoint."""
    last = Path(folder) / "last"
    return last if last.is_dir() else Path(folder)


def compare_ids(options, folder, text, work):
    theirs = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    ours = encode(options, folder, text, work)
    if ours != theirs:
        same = [a == b for a, b in zip(ours, theirs)] + [False]
        i = same.index(False)
        raise Failure(f"token {i} of {len(theirs)}: {ours[i:i + 3]}, theirs {theirs[i:i + 3]}")
    return len(ours)


def roundtrip(options, folder, text, work):
    """A folder that train_gpt2 wrote: it loads, and gives the same numbers and ids."""
    folder = model_folder(folder)
    comparison = compare(options, folder, default_tokens(options, folder), options.recipe, work)
    if not comparison.passes:
        worst = comparison.worst
        raise Failure(f"{worst.name}: {worst.ratio:.2f} times PyTorch's error")
    count = compare_ids(options, folder, text, work)
    return f"worst ratio {comparison.worst.ratio:.2f}, {count} token ids equal"


def default_tokens(options, folder):
    config = GPT2Config.from_pretrained(folder)
    T = min(options.sequence_length, config.n_positions)
    draw = numpy.random.default_rng(options.seed)
    return reference.random_tokens(config, draw, options.batch_size, T, 0.0)


def sample_text():
    return (ROOT / "gpt2.h").read_text()[:20000] + HARD_TEXT


def our_folder(options, tokenizer, text, work):
    """Trains three steps and compares the folder; text is what it trains on, so that a character
    vocabulary has every character."""
    (work / "train.txt").write_bytes(text.encode())
    words = ["--data", work / "train.txt", "--val", work / "train.txt", "--tokenizer", tokenizer]
    words += ["--layers", 2, "--heads", 3, "--channels", 15, "--context", 24, "--batch-size", 2]
    words += ["--steps", 3, "--eval-batches", 1, "--sample-every", 0, "--out", work / "run"]
    words += ["--dtype", options.dtype]
    run(options, "train", *words)
    return roundtrip(options, work / "run", text, work)


def their_tokenizer(options, text, work):
    """A byte-level BPE that the tokenizers library trained and transformers saved."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], 400, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(work / "theirs")
    return f"{compare_ids(options, work / 'theirs', text + HARD_TEXT, work)} token ids equal"


# ==== exported folders and files of llm.c ========================================================


def same_numbers(ours, expected):
    """Bit for bit, tensor by tensor."""
    for name in sorted(expected.keys() ^ ours.keys()):
        raise Failure(f"{name}: only {'PyTorch' if name in expected else 'the export'} has it")
    for name, value in expected.items():
        if ours[name].dtype != value.dtype:
            raise Failure(f"{name}: {ours[name].dtype}, expected {value.dtype}")
        if not torch.equal(ours[name], value):
            raise Failure(f"{name}: {int((ours[name] != value).sum())} numbers differ")


def exported_folder(options, dtype, shard_size, text, work):
    """A folder that train_gpt2 exported: transformers finds in it PyTorch's own rounding of the
    numbers, and the same token ids by tokenizer.json and by vocab.json with merges.txt."""
    our_folder(options, "bpe:300", text, work)
    _, state = load(work / "run" / "last")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    words = ["--model", work / "run", "--out", work / "out", "--export-dtype", dtype]
    run(options, "export", *words, *(["--max-shard-size", shard_size] if shard_size else []))
    files = list((work / "out").glob("*.safetensors"))
    if (len(files) > 1) != bool(shard_size):
        raise Failure(f"{len(files)} safetensors files")
    model = GPT2LMHeadModel.from_pretrained(work / "out", dtype="auto")
    same_numbers(model.state_dict(), {name: value.to(kind) for name, value in state.items()})
    fast = AutoTokenizer.from_pretrained(work / "out")
    if model.generation_config.eos_token_id != fast.eos_token_id or fast.eos_token_id is None:
        raise Failure(f"eos_token_id {model.generation_config.eos_token_id}")
    old = GPT2Tokenizer(str(work / "out" / "vocab.json"), str(work / "out" / "merges.txt"))
    ids = encode(options, work / "out", text + HARD_TEXT, work)
    for tokenizer in (fast, old):
        if tokenizer(text + HARD_TEXT, add_special_tokens=False)["input_ids"] != ids:
            raise Failure(f"{type(tokenizer).__name__} gives other ids")
    model.generate(torch.tensor([ids[:5]]), max_new_tokens=3, pad_token_id=fast.eos_token_id)
    return f"{len(state)} tensors and {len(ids)} token ids equal"


def their_shards(options, work):
    """A folder that transformers wrote in many files."""
    case, draw = random_case(0, options.seed)
    write_model(case, draw, work / "one")
    model = GPT2LMHeadModel.from_pretrained(work / "one")
    model.save_pretrained(work / "many", max_shard_size="20KB")
    if not (work / "many" / "model.safetensors.index.json").is_file():
        raise Failure("transformers wrote one file")
    return judged(
        compare(options, work / "many", random_tokens(case, draw), options.recipe, work)
    )


def llmc_file(config, state, dtype):
    """A model as llm.c keeps it, written from what is known of the format alone: a header of 256
    int32, then each kind of tensor for all layers; matrices as nn.Linear has them; the vocabulary
    padded with zeros to a multiple of 128."""
    rows = -config.vocab_size % 128
    header = numpy.zeros(256, "int32")
    header[:8] = [20240326, {"fp32": 3, "bf16": 5}[dtype], config.n_positions, config.vocab_size]\
        + [config.n_layer, config.n_head, config.n_embd, config.vocab_size + rows]
    names = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"]
    names += ["attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"]
    names += ["mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    wte = state["transformer.wte.weight"]
    tensors = [torch.cat([wte, torch.zeros(rows, config.n_embd)])]
    tensors.append(state["transformer.wpe.weight"])
    for name in names:
        for layer in range(config.n_layer):
            value = state[f"transformer.h.{layer}.{name}"]
            tensors.append(value.t() if value.dim() == 2 else value)
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dtype == "bf16":
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return header.tobytes() + flat.numpy().tobytes()


def llmc_model(options, dtype, work):
    """The same file from both sides, and the same results from it as from the folder."""
    case, draw = random_case(0, options.seed)
    case.sizes["vocab_size"] = 211
    write_model(case, draw, work / "model")
    config, state = load(work / "model")
    expected = llmc_file(config, state, dtype)
    words = ["--export-dtype", dtype, "--out"]
    run(options, "export", "--model", work / "model", *words, work / "ours.bin")
    if (work / "ours.bin").read_bytes() != expected:
        raise Failure("the file differs from the format as it is described")
    (work / "theirs.bin").write_bytes(expected)
    run(options, "export", "--model", work / "theirs.bin", "--out", work / "back")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    same_numbers(load(work / "back")[1], {n: v.to(kind).float() for n, v in state.items()})
    tokens = random_tokens(case, draw)
    ours = dump(options, work / "theirs.bin", tokens, options.recipe, work)
    again = dump(options, work / "back", tokens, options.recipe, work)
    same_numbers(ours, again)
    return f"{len(expected)} bytes and {len(ours)} results equal"


# ==== bf16 over many steps =======================================================================


def compare_autocast(options, seed, work):
    """How far bf16 leads the losses of 100 steps away from those of float32, here and by
    torch.autocast: the mean over the steps and over models. One model's tells little, because it is
    luck which way a step rounds; as elsewhere, twice PyTorch's own is allowed."""
    models, recipe = 12, reference.Recipe(steps=100, learning_rate=1e-3)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    ours = theirs = 0
    for index in range(models):
        torch.manual_seed(100 * seed + index)
        model = GPT2LMHeadModel(config)
        model.save_pretrained(work / "model")
        state = {name: value.clone() for name, value in model.state_dict().items()}
        draw = numpy.random.default_rng(100 * seed + index)
        tokens = reference.random_tokens(config, draw, 4, 64, 0.0)
        batch = reference.split(tokens)
        exact, rounded = (
            dump(options, work / "model", tokens, recipe, work, dtype)["losses"].double()
            for dtype in ("fp32", "bf16")
        )
        ours += float((rounded - exact).abs().mean()) / models
        exact, rounded = (
            reference.evaluate(
                reference.build(config, torch.float32), state, batch, recipe, autocast
            )["losses"]
            for autocast in (False, True)
        )
        theirs += float((rounded - exact).abs().mean()) / models
    said = f"{ours:.2e} from float32, autocast {theirs:.2e}, ratio {ours / theirs:.2f}"
    if not ours <= 2 * theirs:
        raise Failure(said)
    return said


# ==== runs of comparisons ========================================================================


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def check(self, title, comparison):
        """Runs one comparison in a fresh folder and prints its line; comparison(work) returns what
        there is to say about a pass."""
        with tempfile.TemporaryDirectory(prefix="compare_") as work:
            try:
                said = comparison(Path(work))
                verdict = "ok"
                self.passed += 1
            except Failure as failure:
                said, verdict = failure, "FAIL"
                self.failed += 1
            except Exception as error:  # transformers refuses a folder in many ways
                said, verdict = " ".join(f"{type(error).__name__}: {error}".split())[:300], "FAIL"
                self.failed += 1
        print(f"{verdict:<4}  {title:<62}  {said}", flush=True)


def compare_folder(options, folder, work):
    folder = model_folder(folder)
    if not (folder / "config.json").is_file():
        raise Failure("no config.json in it: not a model folder")
    comparison = compare(options, folder, default_tokens(options, folder), options.recipe, work)
    print_table(comparison)
    return judged(comparison)


def compare_random(options, case, draw, work):
    write_model(case, draw, work / "model")
    return judged(compare(options, work / "model", random_tokens(case, draw), options.recipe, work))


def judged(comparison):
    worst = comparison.worst
    said = f"worst ratio {worst.ratio:.2f}, {worst.name}"
    if comparison.samples > 8:
        said += f" ({comparison.samples} samples)"
    if not comparison.passes:
        failing = sum(not row.passes for row in comparison.rows)
        raise Failure(f"{said}; {failing} of {len(comparison.rows)} tensors over 2")
    return said


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER")
    add("--random", type=int, default=0, metavar="N", help="compare N random models")
    add("--seed", type=int, default=1, help="of random models and tokens (1)")
    add("--roundtrip", action="store_true", help="the folders were written by train_gpt2")
    add("--tests", action="store_true", help="random models (20), folders and tokenizers both ways")
    add("--autocast", action="store_true", help="losses of 100 steps in bf16, beside autocast's")
    add("--train-gpt2", default=str(ROOT / "train_gpt2"), metavar="PATH", help="the program")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of program and PyTorch (fp32)")
    add("--text", metavar="FILE", help="what --roundtrip tokenizes; else the program's own text")
    add("--batch-size", type=int, default=2, help="of FOLDER (2)")
    add("--sequence-length", type=int, default=64, help="of FOLDER, at most its context (64)")
    recipe = vars(reference.Recipe())
    for name, value in recipe.items():
        add("--" + name.replace("_", "-"), type=type(value), default=value, help=f"AdamW ({value})")
    options = parser.parse_args()
    options.recipe = reference.Recipe(**{name: getattr(options, name) for name in recipe})
    if options.tests and options.random == 0:
        options.random = 20
    if not (options.folders or options.random or options.autocast):
        parser.error("a FOLDER, --random N or --tests: what should be compared?")
    if options.roundtrip and not options.folders:
        parser.error("--roundtrip needs a FOLDER that train_gpt2 wrote")
    return options


def main():
    options = parse_options()
    program = Path(options.train_gpt2).resolve()
    if not program.is_file():
        stop(f"{options.train_gpt2}: no such program; `make` builds it, --train-gpt2 PATH names it")
    options.train_gpt2 = str(program)
    tally = Tally()
    text = Path(options.text).read_text() if options.text else sample_text()
    for folder in options.folders:
        if options.roundtrip:
            tally.check(str(folder), lambda work: roundtrip(options, folder, text, work))
        else:
            tally.check(str(folder), lambda work: compare_folder(options, folder, work))
    for index in range(options.random):
        case, draw = random_case(index, options.seed)
        title = f"{', '.join(case.what)}: {describe(case)}"
        tally.check(title, lambda work: compare_random(options, case, draw, work))
    if options.tests:
        for tokenizer in ("bpe:300", "bytes", "chars"):
            title = f"folder written here, {tokenizer}, read by transformers"
            tally.check(title, lambda work: our_folder(options, tokenizer, text, work))
        title = "tokenizer written by transformers, read here"
        tally.check(title, lambda work: their_tokenizer(options, text, work))
        for dtype, size in (("fp32", ""), ("bf16", ""), ("fp16", ""), ("bf16", "4KB")):
            title = f"folder exported here, {dtype}{size and ', in files of '}{size}"
            tally.check(title, lambda work: exported_folder(options, dtype, size, text, work))
        title = "folder in many files written by transformers, read here"
        tally.check(title, lambda work: their_shards(options, work))
        for dtype in ("fp32", "bf16"):
            title = f"file of llm.c, {dtype}, both ways"
            tally.check(title, lambda work: llmc_model(options, dtype, work))
    if options.autocast:
        title = "losses of 100 steps in bf16"
        tally.check(title, lambda work: compare_autocast(options, options.seed, work))
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read the table has seen enough
        os._exit(1)
