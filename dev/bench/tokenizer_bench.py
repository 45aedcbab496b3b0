#!/usr/bin/env python3
"""Times the tokenizer beside `tiktoken` and Hugging Face's `tokenizers`, in turns, in one run.

    make build/g++/tokenizer_bench
    tokenizer_bench.py MERGES [FILE...] [--program build/g++/tokenizer_bench] [--rounds 5] [--train FILE]

MERGES is GPT-2's vocab.bpe. Each FILE is encoded and decoded; so is text that is made here, whose words hardly
repeat: English-like, and of other scripts. One core: time of the processor; all cores: of the clock. --train
names a text on which a vocabulary of 32,000 is trained. Rates are of the best round, in MB/s of text.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

SCRIPTS = {"Cyrillic": (0x430, 0x44f, 3, 10, " "), "Greek": (0x3b1, 0x3c9, 3, 10, " "),
           "Arabic": (0x621, 0x64a, 3, 8, " "), "Devanagari": (0x905, 0x939, 3, 9, " "),
           "Thai": (0xe01, 0xe2e, 10, 40, " "), "Han": (0x4e00, 0x9fa5, 4, 20, "\uff0c"),
           "kana": (0x3041, 0x3093, 3, 14, "\u3001"), "Hangul": (0xac00, 0xd7a3, 2, 5, " ")}


def english(chance, size):
    """Words of one to four syllables; of 100,000 of them most are met once or twice."""
    heads = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "st", "tr", "ch", "th", "br", "w", ""]
    tails = ["", "n", "r", "s", "t", "l", "m", "nd", "ck", "ng"]
    syllables = [head + vowel + tail for head in heads for vowel in "aeiou" for tail in tails]
    text, length = [], 0
    while length < size:
        word = "".join(chance.choices(syllables, k=chance.choice([1, 2, 2, 3, 3, 4])))
        word = word.capitalize() if chance.random() < 0.1 else word
        text.append(word + chance.choice([" "] * 12 + [", ", ". ", "\n"]))
        length += len(text[-1])
    return "".join(text)


def script(chance, size, first, last, least, most, joint):
    text, length = [], 0
    letters = [chr(c) for c in range(first, last + 1) if chr(c).isprintable()]
    while length < size:
        word = "".join(chance.choices(letters, k=chance.randrange(least, most + 1)))
        text.append(word + (joint if chance.random() > 0.1 else ".\n"))
        length += len(text[-1].encode())
    return "".join(text)


def peers(merges):
    """Name -> (encode, decode); where a library is missing, without it."""
    found = {}
    lines = merges.read_text(encoding="utf-8").split("\n")[1:]
    pairs = [tuple(line.split()) for line in lines if line]
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(c) for c in printable] + [chr(256 + i) for i in range(len(others))]
    byte_of = dict(zip(letters, printable + others))
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
        tokens = letters + [left + right for left, right in pairs]
        ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        found["tiktoken"] = (encoding.encode_ordinary, encoding.decode_bytes)
    except ImportError as error:
        print(f"tiktoken: skipped: {error}")
    try:
        import tokenizers
        vocabulary = {token: i for i, token in enumerate(letters + [left + right for left, right in pairs])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        found["tokenizers"] = (lambda text: tokenizer.encode(text).ids, tokenizer.decode)
    except ImportError as error:
        print(f"tokenizers: skipped: {error}")
    return found


def own(args, action, first, path, threads, rounds):
    """The seconds of the best round, and what was counted."""
    command = [args.program, action, str(first), str(path), str(threads), str(rounds)]
    *seconds, count = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return min(map(float, seconds)), int(count)


def best_s(function, argument):
    start_s = time.process_time()
    result = function(argument)
    return time.process_time() - start_s, result


def compare(args, name, text, libraries, folder):
    path = folder / "text"
    path.write_text(text, encoding="utf-8", newline="")
    size = path.stat().st_size
    rates = {}

    def note(key, seconds):
        rates[key] = max(rates.get(key, 0), size / seconds / 1e6)

    for _ in range(args.rounds):  # in turns
        # Several rounds, because each is a new process, and the libraries' has long been warm.
        seconds, tokens = own(args, "encode", args.merges, path, 1, 6)
        note("own", seconds)
        note("own, all cores", own(args, "encode", args.merges, path, 0, 6)[0])
        note("own decode", own(args, "decode", args.merges, path, 1, 6)[0])
        for library, (encode, decode) in libraries.items():
            seconds, ids = best_s(encode, text)
            if len(ids) != tokens:
                sys.exit(print(f"{name}: {library} makes {len(ids)} tokens, not {tokens}") or 1)
            note(library, seconds)
            note(f"{library} decode", best_s(decode, ids)[0])
    ratios = "".join(f"  {rates['own'] / rates[library]:5.1f} x {library}" for library in libraries)
    others = "".join(f"  {library} {rates[library]:.1f} / {rates[library + ' decode']:.0f}" for library in libraries)
    print(f"{name:28s} {size / 1e6:6.1f} MB  encode {rates['own']:6.1f} (all cores {rates['own, all cores']:6.1f})  "
          f"decode {rates['own decode']:5.0f} {others}  {ratios}", flush=True)


def compare_training(args):
    size = args.train.stat().st_size
    seconds, count = own(args, "train", 32000, args.train, 0, 1)
    print(f"training {count} tokens on {size / 1e6:.0f} MB: {seconds:.1f} s", end="", flush=True)
    try:
        import tokenizers
    except ImportError:
        return print()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=32000, min_frequency=1, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    start_s = time.monotonic()
    tokenizer.train([str(args.train)], trainer)
    print(f"; tokenizers {time.monotonic() - start_s:.1f} s (time of the clock, all cores)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("merges", metavar="MERGES", type=pathlib.Path)
    parser.add_argument("files", metavar="FILE", nargs="*", type=pathlib.Path)
    parser.add_argument("--program", default="build/g++/tokenizer_bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=4, help="of each text that is made")
    parser.add_argument("--train", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chance, size = random.Random(1), int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        folder, libraries = pathlib.Path(folder), peers(args.merges)
        for path in args.files:
            compare(args, path.name, path.read_text(encoding="utf-8"), libraries, folder)
        compare(args, "made, English, fresh words", english(chance, size), libraries, folder)
        for name, numbers in SCRIPTS.items():
            compare(args, f"made, {name}", script(chance, size, *numbers), libraries, folder)
    if args.train is not None:
        os.environ.pop("RAYON_NUM_THREADS")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        compare_training(args)


if __name__ == "__main__":
    main()
