"""How GPT-2 should scale over GPUs, by `train_gpt2 plan`, whose cost model is scaling.h.

  scaling.py [--program ./train_gpt2] --plot FILE.svg    efficiency from 1 to 1,024 GPUs
  scaling.py [--program ./train_gpt2] --published        the model beside what others measured

Every figure of the model is read from what `plan` prints. Published figures are those of PUBLISHED
and NODES, each with where it stands. Neither needs a GPU, nor more than Python's own library.
"""

import argparse
import math
import re
import subprocess
import sys

SIZES = [  # recipe, options of its model, sequences of a GPU
    ("GPT-2 124M", ["--model", "gpt2"], 64),
    ("GPT-2 350M", ["--model", "gpt2-medium"], 64),
    ("GPT-2 774M", ["--model", "gpt2-large"], 32),
    ("GPT-2 1558M", ["--model", "gpt2-xl"], 16),
]

# What, where it stands, options of `plan`, milliseconds of a step on 8 GPUs.
LLMC = "github.com/karpathy/llm.c"
PUBLISHED = [
    ("124M, 8 A100", LLMC + " scripts/run_gpt2_124M.sh", 300,
     "--model gpt2 --batch-size 64 --total-batch-tokens 524288 --card A100"),
    ("350M, 8 A100", LLMC + " scripts/run_gpt2_350M.sh", 820,
     "--model gpt2-medium --batch-size 64 --total-batch-tokens 524288 --card A100"),
    ("774M, 8 A100 (sets the share)", LLMC + " scripts/run_gpt2_774M.sh", 1700,
     "--model gpt2-large --batch-size 32 --total-batch-tokens 524288 --card A100"),
    ("1558M, 8 H100 (sets the share)", LLMC + " discussion 677", 2750,
     "--model gpt2-xl --batch-size 16 --total-batch-tokens 1048576 --card H100"),
    # 45 minutes for the 18,865 steps of run_gpt2_124M.sh
    ("124M, 8 H100", "github.com/KellerJordan/modded-nanogpt README.md", 45 * 60e3 / 18865,
     "--model gpt2 --batch-size 64 --total-batch-tokens 524288 --card H100"),
]

# MPT, of the same sizes as GPT-2 and GPT-3, on nodes of 8 A100 40 GB with 1,600 Gb/s between nodes:
# github.com/mosaicml/llm-foundry scripts/train/benchmarking/README.md, rows of 2,048 tokens. By
# FSDP, which moves 6 bytes for each parameter (parameters twice and gradients once, in bf16) where
# this program moves 8 (gradients twice, in float32). (GPUs, sequences of a GPU, micro-batches,
# tokens/s of a GPU)
NODES = [
    ("125M", "--layers 12 --heads 12 --channels 768",
     [(8, 26, 3, 136334), (16, 26, 1, 130535), (32, 26, 1, 127122), (64, 26, 1, 125234),
      (128, 26, 1, 123936)]),
    ("350M", "--layers 24 --heads 16 --channels 1024",
     [(8, 16, 4, 55995), (16, 18, 1, 55413), (32, 18, 1, 53811), (64, 18, 1, 52689),
      (128, 18, 1, 51934)]),
    ("760M", "--layers 24 --heads 12 --channels 1536",
     [(8, 12, 4, 30173), (16, 12, 1, 29607), (32, 12, 1, 29648), (64, 12, 1, 29344),
      (128, 12, 1, 28940)]),
    # The row of 32 GPUs, 15,555, is far below those of 16 and 64, and was left out.
    ("1.3B", "--layers 24 --heads 16 --channels 2048",
     [(8, 8, 8, 19271), (16, 8, 1, 19085), (64, 10, 1, 19001), (128, 10, 1, 18647)]),
]


def plan(program, words):
    """{step_ms, rate, rate_gpu, efficiency} of what `plan` prints for these options."""
    command = [program, "plan", "--recompute", "0"] + words
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"scaling.py: error: {' '.join(command)}: {done.stderr.strip()}")
    step = re.search(r"^step +([0-9.e+]+) ms", done.stdout, re.M)
    rate = re.search(r"^rate +([0-9,]+) tokens/s, ([0-9,]+) a GPU; efficiency ([0-9.]+)%",
                     done.stdout, re.M)
    number = lambda text: float(text.replace(",", ""))
    return {"step_ms": float(step[1]), "rate": number(rate[1]), "rate_gpu": number(rate[2]),
            "efficiency": number(rate[3])}


def cluster(gpus):
    """Options for so many GPUs, 8 on a node."""
    return ["--gpus", str(min(gpus, 8)), "--nodes", str(max(gpus // 8, 1))]


def print_published(program):
    print("| step on 8 GPUs | published, ms | model, ms | error | source |")
    print("| --- | --- | --- | --- | --- |")
    errors = []
    for what, source, published_ms, options in PUBLISHED:
        model_ms = plan(program, options.split() + cluster(8))["step_ms"]
        errors.append((model_ms / published_ms - 1, what))
        print(f"| {what} | {published_ms:,.0f} | {model_ms:,.0f} | {100 * errors[-1][0]:+.1f}% "
              f"| {source} |")
    print("\n| MPT | GPUs | tokens/s a GPU | of that on 8 | model | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    differences = []
    for name, options, rows in NODES:
        first = None
        for gpus, batch, micro_batches, measured in rows:
            words = ["--card", "A100-SXM4-40GB", "--link", "25", "--context", "2048",
                     "--vocab-size", "50368", "--batch-size", str(batch), "--total-batch-tokens",
                     str(batch * 2048 * micro_batches * gpus)]
            model = plan(program, options.split() + words + cluster(gpus))["rate_gpu"]
            first = first or (measured, model)
            was, says = 100 * measured / first[0], 100 * model / first[1]
            if gpus > 8:
                differences.append(says - was)
            print(f"| {name} | {gpus} | {measured:,} | {was:.1f}% | {says:.1f}% "
                  f"| {says - was:+.1f} |")
    free = [abs(error) for error, what in errors if "share" not in what]
    print(f"\nsteps that set no share: off by {100 * max(free):.0f}% at most; scaling from 8 GPUs: "
          f"off by {min(differences):+.1f} to {max(differences):+.1f} points, on average "
          f"{sum(differences) / len(differences):+.1f}")


# ==== the plot ====================================================================================

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM, GAP = 900, 400, 60, 60, 20, 60, 50
COLOURS = ["#1b6ca8", "#2a9d5c", "#c77d0a", "#b3344c"]


def panel(lines, left, width, title, series):
    """One plot of efficiency (from 0 to 100%) over GPUs (a logarithm), in lines of SVG."""
    height = HEIGHT - TOP - BOTTOM
    x = lambda gpus: left + width * math.log2(gpus) / 10
    y = lambda percent: TOP + height * (1 - percent / 100)
    lines.append(f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{title}</text>')
    for percent in range(0, 101, 20):
        lines.append(f'<line x1="{left}" x2="{left + width}" y1="{y(percent):.1f}" '
                     f'y2="{y(percent):.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 6}" y="{y(percent) + 4:.1f}" text-anchor="end">'
                     f"{percent}%</text>")
    for power in range(0, 11, 1):
        at = x(2**power)
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(0):.1f}" y2="{y(0) + 4:.1f}" '
                     'stroke="#888"/>')
        lines.append(f'<text x="{at:.1f}" y="{y(0) + 17:.1f}" text-anchor="middle">'
                     f"{2**power}</text>")
    for index, (name, points) in enumerate(series):
        path = " ".join(f"{x(gpus):.1f},{y(percent):.1f}" for gpus, percent in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[index]}" '
                     'stroke-width="2"/>')
        at = y(0) - 14 - 16 * (len(series) - 1 - index)
        lines.append(f'<line x1="{left + 14}" x2="{left + 36}" y1="{at - 4:.1f}" '
                     f'y2="{at - 4:.1f}" stroke="{COLOURS[index]}" stroke-width="2"/>')
        lines.append(f'<text x="{left + 42}" y="{at:.1f}">{name}: {points[-1][1]:.1f}% at '
                     f"{points[-1][0]:,}</text>")


def write_plot(program, path):
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             'font-family="sans-serif" font-size="11">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             f'<text x="{LEFT}" y="22" font-size="14">Efficiency against one GPU, by the cost model '
             "of plan: H100, 8 on a node, the recipes' sequences a GPU</text>"]
    width = (WIDTH - LEFT - RIGHT - GAP) / 2
    links = [("50", "400 Gb/s between nodes for each GPU"),
             ("1.5625", "100 Gb/s between nodes for all 8 GPUs")]
    for place, (link, title) in enumerate(links):
        series = []
        for name, options, batch in SIZES:
            words = options + ["--batch-size", str(batch), "--card", "H100", "--link", link]
            points = [(gpus, plan(program, words + cluster(gpus))["efficiency"])
                      for gpus in (2**power for power in range(11))]
            series.append((name, points))
        panel(lines, LEFT + place * (width + GAP), width, title, series)
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">GPUs; one '
                 "micro-batch a step. Computed, not measured.</text>")
    lines.append("</svg>")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print(f"{path}: written")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", default="./train_gpt2")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--published", action="store_true")
    options = parser.parse_args()
    if not options.plot and not options.published:
        parser.error("give --plot FILE.svg or --published")
    if options.published:
        print_published(options.program)
    if options.plot:
        write_plot(options.program, options.plot)


if __name__ == "__main__":
    main()
