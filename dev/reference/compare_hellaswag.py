#!/usr/bin/env python3
"""Compares `train_gpt2 evaluate --hellaswag` with transformers and PyTorch.

  compare_hellaswag.py                                 generated sets and random models
  compare_hellaswag.py --model FOLDER --file FILE      a model and HellaSwag's own JSON lines

The published way: the tokens of the context and those of a space and the ending, encoded apart; the
loss of the ending's tokens; the lowest sum is `acc`, the lowest mean is `acc_norm`. PyTorch does it
in float64, one row at a time. Token counts must be equal; a sum may be at most twice as far from
float64 as PyTorch's own float32 is anywhere in the set; a prediction may differ only where two
endings are closer to each other than that. The .bin of llm.c's, written here from the same tokens,
must give the same numbers to the last bit. The last line is `N passed, N failed, N skipped`; exit
code 0 when nothing failed, 1 when something did, 2 when the comparison cannot be made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def stop(message):
    print(f"compare_hellaswag.py: error: {message}", file=sys.stderr)
    sys.exit(2)


try:
    import numpy
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import reference
except ImportError as missing:
    stop(f"{missing.name} is missing; pip install torch transformers safetensors numpy")


def run(options, *words):
    done = subprocess.run([options.train_gpt2, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        stop(done.stderr.strip().splitlines()[-1])
    return done.stdout


# ==== a set and a model ==========================================================================


def make_examples(count, draw):
    """Pieces of this project's text, with characters of several bytes among them, and without the
    names of special tokens, which transformers takes for the tokens."""
    words = [word for word in (ROOT / "README.md").read_text().split() if "<|" not in word]
    words += ["caf\u00e9", "\u4e2d\u6587", "\U0001f600"] * 20

    def piece(low, high):
        begin = int(draw.integers(0, len(words) - high))
        return " ".join(words[begin : begin + int(draw.integers(low, high))])

    for i in range(count):
        a, b = piece(1, 12), piece(1, 4) if i % 3 == 0 else ""
        example = {"ind": i, "ctx_a": a, "ctx_b": b, "label": int(draw.integers(0, 4))}
        example["endings"] = [piece(1, 9) for _ in range(4)]
        if i % 2 == 0:
            example["ctx"] = a + (" " + b if b else "")
        if i % 5 == 0:
            example["label"] = str(example["label"])
        yield example


def make_model(options, draw, folder):
    text = ROOT / "README.md"
    run(options, "tokenizer", "train", "--data", text, "--vocab-size", 400, "--out", folder)
    config = GPT2Config(
        vocab_size=400, n_positions=48, n_layer=2, n_head=4, n_embd=32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.load_state_dict(reference.random_state(config, draw, 0.2))
    model.save_pretrained(folder)


# ==== both sides =================================================================================


def rows_of(example, tokenizer):
    """Tokens of the context, and of each ending."""
    context = example.get("ctx")
    if context is None:
        context = example["ctx_a"] + (" " + example["ctx_b"] if example.get("ctx_b") else "")

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode(context), [encode(" " + ending) for ending in example["endings"]]


@torch.no_grad()
def score(model, context, ending, T):
    """Sum of the ending's losses, and of how many tokens, in the model's precision."""
    row = torch.tensor((context + ending)[-(T + 1) :])
    count = min(len(ending), len(row) - 1)
    logits = model(row[None, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    return float(losses[-count:].double().sum()), count


def bin_of(rows, labels):
    """llm.c's file of the same examples; None where its fields are too narrow."""
    stream, longest = [], 0
    for i, ((context, endings), label) in enumerate(zip(rows, labels)):
        body = [i, label, len(endings), len(context), *context]
        for ending in endings:
            body += [len(ending), *ending]
        size = 2 * (len(body) + 2)
        if size > 65535 or i > 65534:
            return None
        longest = max(longest, size)
        stream += [65535, size, *body]
    header = numpy.zeros(256, dtype="<i4")
    header[:4] = 20240522, 1, len(rows), longest
    return header.tobytes() + numpy.array(stream, dtype="<u2").tobytes()


def ours_of(options, folder, file, work):
    out = work / "out.jsonl"
    words = ["--model", folder, "--hellaswag", file, "--out", out, "--json"]
    total = json.loads(run(options, "evaluate", *words, "--batch-size", 16, "--dtype", "fp32"))
    return total, [json.loads(line) for line in out.read_text().splitlines()]


def compare(options, folder, file, work):
    """Prints a line, and returns what failed: a list of sentences."""
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [rows_of(example, tokenizer) for example in examples]
    labels = [int(example["label"]) for example in examples]
    total, ours = ours_of(options, folder, file, work)
    wide = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    narrow = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    T = wide.config.n_positions
    failures, exact, theirs_off, ours_off = [], [], 0.0, 0.0
    for i, (context, endings) in enumerate(rows):
        scores = [score(wide, context, ending, T) for ending in endings]
        exact.append(scores)
        if [count for _, count in scores] != ours[i]["tokens"]:
            failures.append(f"example {i}: {ours[i]['tokens']} tokens, there are {scores}")
        for e, ending in enumerate(endings):
            theirs_off = max(theirs_off, abs(score(narrow, context, ending, T)[0] - scores[e][0]))
            ours_off = max(ours_off, abs(ours[i]["losses"][e] - scores[e][0]))
    allowed = 2 * theirs_off
    if not ours_off <= allowed:
        failures.append(f"a sum is {ours_off:.2e} off, PyTorch's float32 at most {theirs_off:.2e}")
    correct = {"prediction": 0, "prediction_norm": 0}
    for key, mean in (("prediction", False), ("prediction_norm", True)):
        for i, scores in enumerate(exact):
            values = [loss / count if mean else loss for loss, count in scores]
            best = min(range(4), key=values.__getitem__)
            correct[key] += best == labels[i]
            if values[ours[i][key]] - values[best] > 2 * allowed:
                failures.append(f"example {i}: {key} {ours[i][key]}, PyTorch's is {best}")
    print(
        f"{file.name}: {len(rows)} examples, {total['rows_cut']} rows cut; acc {total['acc']:.4f}"
        f" (PyTorch {correct['prediction'] / len(rows):.4f}), acc_norm {total['acc_norm']:.4f}"
        f" (PyTorch {correct['prediction_norm'] / len(rows):.4f}); sums at most {ours_off:.1e} off,"
        f" PyTorch's float32 {theirs_off:.1e}"
    )
    packed = bin_of(rows, labels)
    if packed is not None:
        (work / "set.bin").write_bytes(packed)
        if ours_of(options, folder, work / "set.bin", work)[1] != ours:
            failures.append("the .bin of the same examples gives other numbers")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-gpt2", default=str(ROOT / "train_gpt2"))
    options = parser.parse_args()
    if (options.model is None) != (options.file is None):
        stop("--model and --file go together")
    failed = 0
    sets = 1 if options.model else options.sets
    for number in range(sets):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            folder, file = options.model, options.file
            if folder is None:
                draw = numpy.random.default_rng([options.seed, number])
                folder, file = work / "model", work / f"generated {number}.jsonl"
                make_model(options, draw, folder)
                lines = map(json.dumps, make_examples(options.examples, draw))
                file.write_text("\n".join(lines) + "\n")
            elif (folder / "last").is_dir():
                folder = folder / "last"  # a run folder stands for its last checkpoint
            failures = compare(options, folder, file, work)
        for failure in failures[:5]:
            print(f"  FAIL: {failure}")
        failed += bool(failures)
    print(f"{sets - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
