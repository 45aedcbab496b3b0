#!/usr/bin/env python3
"""Compares the ids of this program with those of the Hugging Face `tokenizers` library.

    compare_tokenizer.py TOKENIZER [FILE...] [--encoder COMMAND]

TOKENIZER is a tokenizer.json or a folder that holds one; both programs read the same file. Each FILE is
encoded by `COMMAND tokenizer encode --tokenizer TOKENIZER --in FILE --out IDS.npy` (COMMAND is ./train_gpt2
unless said otherwise) and by `tokenizers`; the ids must be equal, and decoding them must give the text back.
Without a FILE the texts are made here: every Unicode code point in five surroundings, and random text from
all planes and from a small alphabet that is rich in the cases of the split pattern.

Prints one line a file. Exit code 0: all equal; 1: a difference; 2: it could not be tried.
"""

import argparse
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile

try:
    import numpy
    import tokenizers
except ImportError as error:
    sys.exit(print(f"compare_tokenizer.py: error: {error}; pip install numpy tokenizers") or 2)

CHUNK = 1 << 16  # code points a generated text

# What the split pattern looks at: contractions, white space of several kinds, letters, digits, marks, symbols.
TRICKY = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "\u2019", " ", "  ", "\n", "\t", "\r\n",
          "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u3000", "a",
          "Z", "re", "l", "\xe9", "\u0436", "\u4e2d", "e\u0301", "\u0301", "0", "42", "\u0663", "\xb2",
          "\u2167", "\u0e51", ".", "!?", "_", "$", "\u20ac", "\U0001f600", "\U0001f469\u200d\U0001f4bb",
          "\ufeff", "\x00", "\x7f", "\ufffd", "\uffff", "\U0010ffff", "\U0001d7ce", "\U00020000",
          "<|endoftext|>", "<0x80>"]


def generated_texts(seed):
    """Yields (name, text)."""
    code_points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    surroundings = ["{0}", " {0}a", "a{0}1 ", "{0} {0}{0}  {0}\n", "'{0}'s{0} 9"]
    for pattern in surroundings:
        for begin in range(0, len(code_points), CHUNK):
            text = "".join(pattern.format(c) for c in code_points[begin:begin + CHUNK])
            yield f"code points {begin // CHUNK:2d}*2^16 as {pattern!r}", text
    chance = random.Random(seed)
    for plane, limit in (("the first 2^11", 0x800), ("the first 2^16", 0x10000), ("all", 0x110000)):
        drawn = (chance.randrange(limit) for _ in range(CHUNK))
        text = "".join(chr(c) for c in drawn if not 0xD800 <= c < 0xE000)
        yield f"random code points of {plane}", text
    for i in range(4):
        yield f"random tricky text {i}", "".join(chance.choices(TRICKY, k=CHUNK))


def decodable(reference, text):
    """The text without the characters that a character vocabulary can spell neither whole nor as bytes."""
    if reference.pre_tokenizer is not None:
        return text
    known = reference.get_vocab()
    lost = {c for c in set(text)
            if c not in known and not all(f"<0x{byte:02X}>" in known for byte in c.encode())}
    return "".join(c for c in text if c not in lost)


def verdict(reference, args, name, data, folder):
    """Compares one text (bytes); returns (equal, line)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"{name}: skipped: {error.reason} at byte {error.start}, and tokenizers reads UTF-8 only"
    source, target = folder / "text", folder / "ids.npy"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    command = shlex.split(args.encoder) + ["tokenizer", "encode", "--tokenizer", args.tokenizer,
                                           "--in", str(source), "--out", str(target)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        sys.exit(print(f"compare_tokenizer.py: error: {command[0]}: {error.strerror}") or 2)
    if run.returncode != 0:
        return False, f"{name}: DIFFERENT: {run.stderr.strip() or f'exit code {run.returncode}'}"
    ours = numpy.load(target).astype(numpy.int64).ravel()
    theirs = numpy.array(reference.encode(text, add_special_tokens=False).ids, dtype=numpy.int64)
    common = min(len(ours), len(theirs))
    unequal = numpy.nonzero(ours[:common] != theirs[:common])[0]
    if len(unequal) > 0 or len(ours) != len(theirs):
        at = int(unequal[0]) if len(unequal) > 0 else common
        before = reference.decode(list(ours[max(0, at - 8):at]), skip_special_tokens=False)
        return False, (f"{name}: DIFFERENT at id {at}: ours {ours[at:at + 4].tolist()}, "
                       f"tokenizers {theirs[at:at + 4].tolist()}, after {before!r}")
    if reference.decode(ours.tolist(), skip_special_tokens=False) != decodable(reference, text):
        return False, f"{name}: DIFFERENT: decoding its ids does not give the text"
    return True, f"{name}: equal ({len(data)} bytes, {len(ours)} ids)"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("files", metavar="FILE", nargs="*")
    parser.add_argument("--encoder", metavar="COMMAND", default="./train_gpt2")
    parser.add_argument("--seed", type=int, default=0, help="of the generated texts")
    args = parser.parse_args()
    path = pathlib.Path(args.tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        reference = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # from_file raises plain Exception
        sys.exit(print(f"compare_tokenizer.py: error: {path}: {error}") or 2)
    try:
        inputs = [(name, pathlib.Path(name).read_bytes()) for name in args.files]
    except OSError as error:
        sys.exit(print(f"compare_tokenizer.py: error: {error.filename}: {error.strerror}") or 2)
    reference.encode_special_tokens = True  # special tokens in the text are plain text, as here
    if not inputs:
        inputs = ((name, text.encode()) for name, text in generated_texts(args.seed))
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, data in inputs:
            equal, line = verdict(reference, args, name, data, pathlib.Path(folder))
            different += equal is False
            print(line, flush=True)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
