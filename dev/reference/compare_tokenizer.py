#!/usr/bin/env python3
"""Compares the ids of this program with those of `tiktoken` and of the Hugging Face `tokenizers` library.

    compare_tokenizer.py TOKENIZER [FILE...] [--encoder COMMAND]
    compare_tokenizer.py --patterns [FILE...] [--megabytes N] [--encoder COMMAND]
    compare_tokenizer.py --fixture FILE.json

TOKENIZER is a tokenizer.json or a folder that holds one; both programs read the same file. Each FILE is
encoded by `COMMAND tokenizer encode --tokenizer TOKENIZER --in FILE --out IDS.npy` (COMMAND is ./train_gpt2
unless said otherwise) and by `tokenizers`; the ids must be equal, and decoding them must give the text back.
Without a FILE the texts are made here: every Unicode code point in five surroundings, and random text from
all planes and from a small alphabet that is rich in the cases of the split pattern.

With --patterns a vocabulary is trained with COMMAND for each split pattern, GPT-2's, cl100k and o200k, and
given to `tiktoken`, with that pattern as it publishes it, and to `tokenizers`, as the tokenizer.json that
COMMAND wrote. Where GPT-2's own vocabulary is beside the project (../shared/data), it is compared too. The
texts are the FILEs (without any, all of ../shared/data), what is made without a FILE, and N megabytes (8
unless said otherwise) of every script, with emoji, marks, spaces, contractions, digits and controls.

--fixture writes what `make test` compares without Python: short texts, and how many bytes the pieces have
that each pattern cuts them into, by the `regex` module (which tiktoken needs) and, where it can read the
pattern as published, by `tokenizers`; the two must agree.

Prints one line a text; what is skipped is said and counted. Exit code 0: all equal; 1: a difference; 2: it
could not be tried.
"""

import argparse
import base64
import json
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile
import unicodedata

try:
    import numpy
    import tokenizers
except ImportError as error:
    sys.exit(print(f"compare_tokenizer.py: error: {error}; pip install numpy tokenizers") or 2)

CHUNK = 1 << 16  # code points a generated text
DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
PATTERNS = {"gpt2": "gpt2", "cl100k": "cl100k_base", "o200k": "o200k_base"}  # here: in tiktoken

# What the split patterns look at: contractions, white space of several kinds, letters, digits, marks, symbols.
TRICKY = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'RE", "'Ve", "'lL", "'\u017f", "'", "\u2019", " ",
          "  ", "\n", "\n\n", "\t", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u1680", "\u180e",
          "\u2003", "\u200b", "\u2028", "\u3000", "a", "Z", "re", "l", "LL", "XyZ", "\xe9", "\xc9", "\u01c5",
          "\u02b0", "\u0436", "\u0416", "\u4e2d", "e\u0301", "E\u0301", "\u0301", "\u0903", "\u20dd", "0", "42",
          "1234567", "\u0663", "\xb2", "\u2167", "\u0e51", ".", "!?", "_", "/", "//\n", "$", "\u20ac",
          "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea",
          "\ufeff", "\x00", "\x7f", "\ufffd", "\uffff", "\U0010ffff", "\U0001d7ce", "\U00020000",
          "<|endoftext|>", "<0x80>"]

# The first and last code point of scripts, and about how long a word is.
SCRIPTS = [(0x41, 0x7a, 6), (0xc0, 0x24f, 6), (0x250, 0x2ff, 5), (0x370, 0x3ff, 7), (0x400, 0x52f, 7),
           (0x531, 0x587, 7), (0x590, 0x5ff, 5), (0x600, 0x6ff, 5), (0x700, 0x7bf, 5), (0x900, 0x97f, 5),
           (0x980, 0x9ff, 5), (0xa00, 0xdff, 5), (0xe00, 0xe7f, 20), (0xe80, 0xeff, 15), (0xf00, 0xfff, 8),
           (0x1000, 0x109f, 12), (0x10a0, 0x10ff, 7), (0x1100, 0x11ff, 5), (0x1200, 0x139f, 5),
           (0x13a0, 0x13ff, 5), (0x1780, 0x17ff, 12), (0x1800, 0x18af, 6), (0x1c90, 0x1cbf, 6),
           (0x1e00, 0x1fff, 5), (0x2c00, 0x2dff, 5), (0x3040, 0x30ff, 12), (0x4e00, 0x9fff, 12),
           (0xa000, 0xa4cf, 6), (0xa640, 0xa7ff, 5), (0xac00, 0xd7a3, 4), (0xfb00, 0xfdff, 4),
           (0xff01, 0xffef, 5), (0x10000, 0x1056f, 4), (0x10400, 0x104ff, 5), (0x11000, 0x11fff, 4),
           (0x12000, 0x1254f, 3), (0x16800, 0x16fff, 4), (0x1d400, 0x1d7ff, 4), (0x1e900, 0x1e95f, 5),
           (0x1f300, 0x1faff, 1), (0x20000, 0x2a6df, 6)]
JOINTS = [" ", " ", " ", " ", "  ", "\n", ", ", ". ", "'s ", "'S", "\u2019", "-", "/", "1", "12345 ", "\u0301", "\t",
          "\r\n", " \n ", "\u3000", "\u3002", "\xa0", "(", ")", "\u200d", "\ufe0f", "\x01", ""]


def code_points(first, last):
    return [chr(c) for c in range(first, last + 1) if not 0xD800 <= c < 0xE000]


def generated_texts(seed):
    """Yields (name, text)."""
    everything = code_points(0, 0x10FFFF)
    surroundings = ["{0}", " {0}a", "a{0}1 ", "{0} {0}{0}  {0}\n", "'{0}'s{0} 9"]
    for pattern in surroundings:
        for begin in range(0, len(everything), CHUNK):
            text = "".join(pattern.format(c) for c in everything[begin:begin + CHUNK])
            yield f"code points {begin // CHUNK:2d}*2^16 as {pattern!r}", text
    chance = random.Random(seed)
    for plane, limit in (("the first 2^11", 0x800), ("the first 2^16", 0x10000), ("all", 0x110000)):
        drawn = (chance.randrange(limit) for _ in range(CHUNK))
        text = "".join(chr(c) for c in drawn if not 0xD800 <= c < 0xE000)
        yield f"random code points of {plane}", text
    for i in range(4):
        yield f"random tricky text {i}", "".join(chance.choices(TRICKY, k=CHUNK))


def script_texts(seed, megabytes):
    """Yields (name, text): about so much of every script, a megabyte a text; words hardly repeat."""
    chance = random.Random(seed + 1)
    alphabets = [(code_points(first, last), length) for first, last, length in SCRIPTS]
    for i in range(megabytes):
        parts, size = [], 0
        while size < 1 << 20:
            alphabet, length = alphabets[chance.randrange(len(alphabets))]
            for _ in range(chance.randrange(1, 12)):
                word = "".join(chance.choices(alphabet, k=chance.randrange(1, 2 * length + 1)))
                if chance.random() < 0.2:
                    word = word.upper() if chance.random() < 0.5 else word.title()
                elif chance.random() < 0.5:
                    word = word.lower()
                parts += [word, chance.choice(TRICKY if chance.random() < 0.1 else JOINTS)]
                size += len(word.encode()) + 2
        yield f"every script, megabyte {i + 1} of {megabytes}", "".join(parts)


def decodable(reference, text):
    """The text without the characters that a character vocabulary can spell neither whole nor as bytes."""
    if reference.pre_tokenizer is not None:
        return text
    known = reference.get_vocab()
    lost = {c for c in set(text)
            if c not in known and not all(f"<0x{byte:02X}>" in known for byte in c.encode())}
    return "".join(c for c in text if c not in lost)


def call(encoder, *arguments):
    """Runs the program; returns what it says of an error, "" where there was none."""
    command = shlex.split(encoder) + ["tokenizer", *map(str, arguments)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        sys.exit(print(f"compare_tokenizer.py: error: {command[0]}: {error.strerror}") or 2)
    return "" if run.returncode == 0 else run.stderr.strip() or f"exit code {run.returncode}"


def first_difference(ours, theirs):
    """The index of the first id that differs; None where all are equal."""
    common = min(len(ours), len(theirs))
    unequal = numpy.nonzero(ours[:common] != theirs[:common])[0]
    if len(unequal) > 0:
        return int(unequal[0])
    return None if len(ours) == len(theirs) else common


def verdict(references, encoder, tokenizer, name, data, folder):
    """Compares one text (bytes) with references (name, encode, decode); returns (equal, line)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"{name}: skipped: {error.reason} at byte {error.start}, and the others read UTF-8 only"
    source, target = folder / "text", folder / "ids.npy"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    error = call(encoder, "encode", "--tokenizer", tokenizer, "--in", source, "--out", target)
    if error:
        return False, f"{name}: DIFFERENT: {error}"
    ours = numpy.load(target).astype(numpy.int64).ravel()
    for library, encode, decode, expected in references:
        theirs = numpy.array(encode(text), dtype=numpy.int64)
        at = first_difference(ours, theirs)
        if at is not None:
            before = decode(ours[max(0, at - 8):at].tolist())
            return False, (f"{name}: DIFFERENT at id {at}: ours {ours[at:at + 4].tolist()}, "
                           f"{library} {theirs[at:at + 4].tolist()}, after {before!r}")
        if decode(ours.tolist()) != expected(text):
            return False, f"{name}: DIFFERENT: {library}'s decoding of its ids does not give the text"
    return True, f"{name}: equal ({len(data)} bytes, {len(ours)} ids)"


def reference_of_tokenizers(path):
    try:
        reference = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        sys.exit(print(f"compare_tokenizer.py: error: {path}: {error}") or 2)
    reference.encode_special_tokens = True  # special tokens in the text are plain text, as here
    return ("tokenizers", lambda text: reference.encode(text, add_special_tokens=False).ids,
            lambda ids: reference.decode(ids, skip_special_tokens=False),
            lambda text: decodable(reference, text))


def published_pattern(name):
    """The regular expression of one of tiktoken's encodings, taken without fetching its vocabulary."""
    from tiktoken_ext import openai_public
    openai_public.load_tiktoken_bpe = openai_public.data_gym_to_mergeable_bpe_ranks = lambda *a, **k: {}
    return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


def bytes_of_spelling():
    """Character -> byte, for tokens as byte-level files spell them."""
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(c): b for c, b in zip(printable, printable)} | {chr(256 + i): b for i, b in enumerate(others)}


def reference_of_tiktoken(path, pattern):
    """tiktoken with the vocabulary of a byte-level tokenizer.json whose ids are in the order of its merges."""
    import tiktoken
    byte_of = bytes_of_spelling()
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    ranks = {bytes(byte_of[c] for c in token): id for token, id in vocabulary.items() if token != "<|endoftext|>"}
    encoding = tiktoken.Encoding("own", pat_str=published_pattern(PATTERNS[pattern]), mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    return ("tiktoken", encoding.encode_ordinary,
            lambda ids: encoding.decode_bytes(ids).decode("utf-8", "replace"), lambda text: text)


def pattern_references(args, folder):
    """Yields (name, tokenizer folder, references), one a pattern, and GPT-2's own vocabulary."""
    training = folder / "training.txt"
    texts = [text for _, text in script_texts(args.seed + 100, 4)] + ["".join(TRICKY) * 50]
    texts += [path.read_text(encoding="utf-8") for path in args.training]
    training.write_text("\n".join(texts), encoding="utf-8", newline="")
    for pattern in PATTERNS:
        target = folder / pattern
        error = call(args.encoder, "train", "--data", training, "--vocab-size", args.vocab_size,
                     "--pattern", pattern, "--out", target)
        if error:
            sys.exit(print(f"compare_tokenizer.py: error: training with {pattern}: {error}") or 2)
        file = target / "tokenizer.json"
        yield pattern, target, [reference_of_tiktoken(file, pattern), reference_of_tokenizers(file)]
    merges = DATA / "gpt2_vocab.bpe"
    if not merges.exists():
        print(f"GPT-2's vocabulary: skipped: {merges} is missing")
        args.skipped += 1
        return
    target = folder / "gpt2-own"
    error = call(args.encoder, "convert", "--tokenizer", merges, "--out", target)
    if error:
        sys.exit(print(f"compare_tokenizer.py: error: {merges}: {error}") or 2)
    file = target / "tokenizer.json"
    yield "GPT-2's own", target, [reference_of_tiktoken(file, "gpt2"), reference_of_tokenizers(file)]


# How tokenizer.json files spelt cl100k before tiktoken changed what it does with white space that ends the text.
CL100K_JSON = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def fixture_texts():
    """About four hundred short texts, of characters that every Unicode since 14 puts into one class."""
    yield from ("".join(c for c in text if unicodedata.category(c) != "Cn" and c != "\u0295") for text in any_texts())


def any_texts():
    chance = random.Random(3)
    tricky = [c for c in TRICKY if c not in ("\U0010ffff", "\uffff")]
    yield from ("".join(chance.choices(tricky, k=chance.randrange(1, 16))) for _ in range(300))
    yield from (text[i:i + 40] for _, text in script_texts(5, 1) for i in range(0, 2400, 40))
    for first, last, _ in SCRIPTS:
        letters = code_points(first, last)
        yield "".join(chance.choice(letters) + chance.choice(["", "", "", " ", "\u0301", "1"]) for _ in range(12))
    yield from ("", "\n", "a\n  ", "a \n", "a  ", " \n \n", "a \n \n  b", "HELLO'S World'Ll 1234567", "x\r\n\r\ny//\n/z",
                "IT'S It\u2019s", "\u4e2dA", "A\u4e2dAB", "\u0301A", "\u0301AB'd", " \u0301\u0301", "!\u0301a", "ABc'tD")


def write_fixture(path):
    import regex
    patterns = {name: published_pattern(known) for name, known in PATTERNS.items()} | {"cl100k-json": CL100K_JSON}
    texts = list(fixture_texts())
    lengths = {}
    for name, pattern in patterns.items():
        compiled = regex.compile(pattern)
        pieces = [compiled.findall(text) for text in texts]
        if name != "cl100k":  # Oniguruma reads its possessive quantifiers in another way
            spelling = pattern if name != "gpt2" else pattern.replace("$", "\\z")
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(spelling), "isolated")
            for text, own in zip(texts, pieces):
                theirs = [piece for piece, _ in split.pre_tokenize_str(text)]
                if theirs != own:
                    sys.exit(print(f"compare_tokenizer.py: error: {name}: {text!r}: {own} and {theirs}") or 2)
        lengths[name] = [[len(piece.encode()) for piece in own] for own in pieces]
    rows = ",\n".join(json.dumps(text) for text in texts)
    columns = ",\n".join(f'"{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in lengths.items())
    path.write_text(f'{{"texts": [\n{rows}\n],\n"lengths": {{\n{columns}\n}}}}\n', encoding="ascii")


def compare_patterns(args, inputs, folder):
    """Returns the number of texts that differ."""
    try:
        import tiktoken  # noqa: F401
    except ImportError as error:
        sys.exit(print(f"compare_tokenizer.py: error: {error}; pip install tiktoken") or 2)
    if not inputs and not DATA.is_dir():
        print(f"real text: skipped: {DATA} is missing")
        args.skipped += 1
    if not inputs and DATA.is_dir():
        inputs = [(path.name, path.read_bytes()) for path in sorted(DATA.iterdir()) if path.is_file()]
    args.training = [DATA / "tinyshakespeare.txt"] if (DATA / "tinyshakespeare.txt").exists() else []
    different, bytes_compared = 0, 0
    for pattern, target, references in pattern_references(args, folder):
        for source in (iter(inputs), generated_texts(args.seed), script_texts(args.seed, args.megabytes)):
            for name, data in source:
                data = data.encode() if isinstance(data, str) else data
                equal, line = verdict(references, args.encoder, target, f"{pattern}: {name}", data, folder)
                different += equal is False
                args.skipped += equal is None
                bytes_compared += len(data)
                print(line, flush=True)
    print(f"{bytes_compared} bytes compared, {different} texts different, {args.skipped} skipped")
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tokenizer", metavar="TOKENIZER", nargs="?")
    parser.add_argument("files", metavar="FILE", nargs="*")
    parser.add_argument("--encoder", metavar="COMMAND", default="./train_gpt2")
    parser.add_argument("--patterns", action="store_true")
    parser.add_argument("--fixture", metavar="FILE.json", type=pathlib.Path)
    parser.add_argument("--megabytes", type=int, default=8, help="of generated text of every script")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the vocabularies trained")
    parser.add_argument("--seed", type=int, default=0, help="of the generated texts")
    args = parser.parse_args()
    args.skipped = 0
    if args.fixture is not None:
        return write_fixture(args.fixture)
    if args.tokenizer is None and not args.patterns:
        parser.error("name a TOKENIZER, or ask for --patterns")
    files = ([args.tokenizer] if args.patterns and args.tokenizer else []) + args.files
    try:
        inputs = [(name, pathlib.Path(name).read_bytes()) for name in files]
    except OSError as error:
        sys.exit(print(f"compare_tokenizer.py: error: {error.filename}: {error.strerror}") or 2)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if args.patterns:
            sys.exit(1 if compare_patterns(args, inputs, folder) else 0)
        path = pathlib.Path(args.tokenizer)
        reference = reference_of_tokenizers(path / "tokenizer.json" if path.is_dir() else path)
        if not inputs:
            inputs = ((name, text.encode()) for name, text in generated_texts(args.seed))
        different = 0
        for name, data in inputs:
            equal, line = verdict([reference], args.encoder, args.tokenizer, name, data, folder)
            different += equal is False
            print(line, flush=True)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
