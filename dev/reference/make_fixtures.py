"""Makes the golden fixtures: small GPT-2s of odd sizes with everything PyTorch says about them.

  make_fixtures.py            writes fixtures/*.safetensors
  make_fixtures.py --check    makes them again and compares; exit code 1 on a difference

A fixture holds, in float64 unless said otherwise:
  tokens            int32 (B, T+1): inputs and, one place on, targets; -1 is no target, and 0
                    where it is an input
  start.NAME        float32, the parameters
  loss, logits (B,T,V), grad.NAME
  losses (10)       of ten steps of AdamW on this batch, each before its update
  param.NAME        after them
  error32.RESULT    PyTorch's float32 error for that tensor (see reference.py); one number, or one
                    each for query, key and value
  errorbf16.RESULT  the same in bf16
  error64.RESULT    the same in float64: the spread of the reference itself
and in its metadata, under "fixture", JSON: config, adamw, made_with. Vectors of one number stand
for scalars. NAME is that of the transformers state dict.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import numpy
import safetensors
import safetensors.torch
import torch
import transformers
from transformers import GPT2Config

from reference import KINDS, Recipe, bound, build, evaluate, largest_distances, pytorch_error
from reference import random_state, random_tokens, split

EVALUATIONS = 32  # orders in which PyTorch's error is taken; the fixtures must hold on any machine
FOLDER = Path(__file__).resolve().parent / "fixtures"

# name: why it is there, GPT2Config, (B, T), share of targets that are ignored
FIXTURES = {
    "odd": (
        "nothing divides anything: prime vocabulary, heads of 5, T below the context",
        dict(vocab_size=61, n_positions=19, n_layer=2, n_head=3, n_embd=15),
        (3, 17),
        0.0,
    ),
    "least": (
        "one of everything: a layer, a head, a token",
        dict(vocab_size=2, n_positions=3, n_layer=1, n_head=1, n_embd=4),
        (1, 1),
        0.0,
    ),
    "masked": (
        "ignored targets, unevenly; vocabulary past 128; MLP of 24; T is the context",
        dict(vocab_size=131, n_positions=13, n_layer=2, n_head=2, n_embd=16, n_inner=24),
        (4, 13),
        0.4,
    ),
    "untied": (
        "an output matrix of its own; heads of 2; another layer norm epsilon",
        dict(
            vocab_size=37,
            n_positions=12,
            n_layer=1,
            n_head=7,
            n_embd=14,
            tie_word_embeddings=False,
            layer_norm_epsilon=1e-3,
        ),
        (2, 11),
        0.0,
    ),
    "long": (
        "more positions and rows than the program works on at a time",
        dict(vocab_size=11, n_positions=140, n_layer=1, n_head=2, n_embd=6),
        (2, 131),
        0.1,
    ),
}


def make(name, seed):
    """(tensors, metadata) of one fixture."""
    _, sizes, (B, T), ignored = FIXTURES[name]
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    draw = numpy.random.default_rng(seed)
    state, recipe = random_state(config, draw), Recipe()
    tokens = random_tokens(config, draw, B, T, ignored)
    batch = split(tokens)
    results = evaluate(build(config, torch.float64), state, batch, recipe)
    tensors = {"tokens": tokens.int()}
    for key, value in state.items():
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[f"start.{key}"] = value.clone()
    tensors |= results
    for kind, dtype in KINDS.items():
        errors = pytorch_error(config, state, batch, recipe, results, dtype, range(EVALUATIONS))
        for key, error in errors.items():
            tensors[f"error{kind}.{key}"] = error
    keys = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner")
    keys += ("layer_norm_epsilon", "tie_word_embeddings")
    facts = {
        "config": {key: getattr(config, key) for key in keys},
        "adamw": vars(recipe),
        "made_with": {
            "evaluations": EVALUATIONS,
            "seed": seed,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }
    return tensors, {"fixture": json.dumps(facts, sort_keys=True)}


def differs(key, old, new, tensors):
    """Why a stored tensor is not the one made now, or None."""
    if old.shape != new.shape:
        return f"shape {tuple(old.shape)}, now {tuple(new.shape)}"
    if key == "tokens" or key.startswith("start."):
        return None if torch.equal(old, new) else "differs"
    old, new = old.double(), new.double()
    if key.startswith("error"):  # they depend on the processor a little
        kind, result = key.removeprefix("error").split(".", 1)
        largest = tensors[result].abs().max()
        low, high = (bound(error, largest, kind) for error in (old, new))
        return (
            None if (torch.maximum(low, high) <= 3 * torch.minimum(low, high)).all() else "differs"
        )
    distances = largest_distances(key, old, new)
    allowed = bound(tensors[f"error64.{key}"], new.abs().max(), "64")
    return None if (distances <= allowed).all() else f"differs by {float(distances.max()):.2e}"


def check(path, tensors):
    """A line for each tensor of the file that is not what is made now: parameters and tokens
    exactly, results within the float64 spread, PyTorch's errors within a factor of 3."""
    with safetensors.safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    reasons = dict.fromkeys(stored.keys() ^ tensors.keys(), "in one only")
    for key in stored.keys() & tensors.keys():
        reasons[key] = differs(key, stored[key], tensors[key], tensors)
    return [f"{key}: {reason}" for key, reason in sorted(reasons.items()) if reason]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    differing = 0
    for seed, name in enumerate(FIXTURES, start=1):
        tensors, metadata = make(name, seed)
        path = FOLDER / f"{name}.safetensors"
        if not options.check:
            path.write_bytes(safetensors.torch.save(tensors, metadata))
            print(f"{path.name}: {path.stat().st_size} bytes, loss {float(tensors['loss']):.4f}")
            continue
        lines = check(path, tensors)
        differing += bool(lines)
        print(f"{path.name}: {'as made now' if not lines else f'{len(lines)} tensors differ'}")
        for line in lines:
            print(f"  {line}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
