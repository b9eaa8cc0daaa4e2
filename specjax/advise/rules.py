"""The rules of the advice, each with its numbers, its source and the strength of the evidence. No model, no data.

The sources were read in November 2026. A number without a source is marked as specjax's own.
"""

import math
from typing import NamedTuple

import numpy as np

CONTINUED = 1e9  # tokens of raw text from which on every weight should train
MANY_PAIRS = 50_000
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0
RANKS = (16, 32, 64, 128, 256)
ALPHA = 32.0
BASE_RATE, BASE_WIDTH = 5e-5, 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}  # by the beginning of a family's name
OTHER_RATE = 2e-5  # of the families that were not measured
LORA_TIMES, LORA_TIMES_SHORT = 10, 15
SHORT, LONG = 100, 1000  # steps
DPO_RATE, DPO_BETA = 1e-5, 0.1
FEWER_THAN = 32  # examples a step
EPOCHS, EPOCHS_SHORT = 3, 15
FEW_PAIRS = 1_000
HELD_OUT = 50  # rows
MOST_HELD_OUT, LEAST_HELD_OUT = 0.1, 0.02
LENGTHS, LEAST_LENGTH, MOST_LENGTH, TEXT_LENGTH = 128, 256, 4096, 1024

SHARE_OF_PEAK = (0.15, 0.45)  # of a chip's, that training reaches
CORE = (2e10, 6e10)  # float32 operations a second of a CPU's core


class Rule(NamedTuple):
    """A rule, its source, and the strength of the evidence."""

    says: str
    source: str
    strength: str


_SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"
_TINKER = "thinking-machines-lab/tinker-cookbook"
RULES = {
    "method": Rule(
        "LoRA up to tens of thousands of pairs; every weight for a billion tokens and more of raw text",
        f"{_SCHULMAN}; Biderman et al. 2024, arXiv:2405.09673 (20 billion tokens)",
        "strong at both ends, thin between",
    ),
    "preference": Rule("pairs of a better and a worse answer: DPO, beta 0.1", _TINKER, "medium"),
    "capacity": Rule(
        "a rank is large enough while the trained tokens hold fewer bits than 2 a trained parameter; a token counts as "
        "1 bit, which is more than must be learnt of it; r16 to r64 are enough for some 50,000 pairs",
        _SCHULMAN,
        "strong at the ends, thin between",
    ),
    "alpha": Rule(
        "alpha stays 32, the update is scaled by alpha/rank, and the best rate then hardly depends on the rank",
        f"{_SCHULMAN}; otherwise arXiv:2602.06204 (by start and scaling), arXiv:2606.12883 (alpha as sqrt(rank))",
        "medium, contradicted in detail",
    ),
    "targets": Rule(
        "all linear maps: at equal parameters better than attention alone (r10 on MLPs 0.494, r32 on attention 0.478)",
        f"{_SCHULMAN}; huggingface/peft method_comparison, MetaMathQA",
        "strong",
    ),
    "variants": Rule(
        "no variant of LoRA: nine lie within 1 to 2 % of it once each one's rate is tuned; sweep the rate instead",
        "arXiv:2602.04998",
        "strong",
    ),
    "rate": Rule(
        "5e-5 * (2000 / hidden size)^p for every weight, p = 0.781 (Llama) or 0.0775 (Qwen)",
        f"{_TINKER}, hyperparam_utils.py, which states a regret under 0.5 %",
        "medium: two families only",
    ),
    "rate of others": Rule(
        "2e-5 for every weight: nobody fitted a rate for this family, so sweep around it",
        "the published 1e-5 to 2e-5 of 7B models (LIMA, arXiv:2305.11206; Alpaca)",
        "thin",
    ),
    "times": Rule(
        "LoRA's rate is 10 times that of every weight, 15 times in runs of fewer than 100 steps",
        f"{_SCHULMAN}; {_TINKER} has 10 always",
        "strong, two model families",
    ),
    "rate of DPO": Rule("1e-5 with LoRA; a tenth of it for every weight, by the rule of 10", _TINKER, "medium"),
    "batch": Rule(
        "fewer than 32 examples a step: LoRA loses more than full training at large batches, and no rank mends it",
        f"TRL's page on LoRA Without Regret; {_TINKER} takes about 128, with the rate as sqrt(batch)",
        "contradictory: small is preferred here",
    ),
    "steps": Rule("at least 100 steps, better 1,000", _TINKER, "medium"),
    "epochs": Rule(
        "as many passes as make 1,000 steps, at most 3 (Alpaca's); under 100 steps at most 15 (LIMA's, of 1,000 pairs)",
        "Alpaca; LIMA, arXiv:2305.11206",
        "examples, not a law",
    ),
    "pairs": Rule(
        "1,000 pairs chosen by hand to 52,000 generated ones", "LIMA, arXiv:2305.11206; Alpaca", "examples, not a law"
    ),
    "length": Rule(
        "the next multiple of 128 (a block of the TPU's attention) that holds the longest example, from 256 to 4,096 "
        "or what the model reads; raw text is cut anyway, 1,024",
        "specjax's own",
        "a convention",
    ),
    "held out": Rule(
        "2 % of the rows, or as many as make 50 of them, at most a tenth", "specjax's own", "a convention"
    ),
    "forgetting": Rule(
        "LoRA forgets less at equal learning, not by itself; compare curves, not points: accuracy/forgetting of full "
        "0.472/0.030, LoRA r32 0.478/0.050, r64 0.474/0.059, rsLoRA r64 0.513/0.111",
        "Biderman et al. 2024, arXiv:2405.09673; huggingface/peft method_comparison (one seed, Llama-3.2-3B)",
        "medium",
    ),
    "new directions": Rule(
        "new singular directions of the update carry the forgetting; scaling them down helps",
        "arXiv:2410.21228",
        "medium",
    ),
    "compute": Rule(
        "LoRA does 2/3 of full training's operations a token (4N against 6N): its gain is memory", "arithmetic", "exact"
    ),
    "memory": Rule(
        "Llama-3.2-3B, 20,000 pairs, GiB and seconds: full 36.2 / 2147, LoRA r32 20.8 / 942, DoRA r32 22.8 / 1191",
        "huggingface/peft method_comparison, July 2026",
        "one machine",
    ),
    "time": Rule(
        "a step's operations at 15 to 45 % of the chips' peak: 38.6 % (LoRA) and 46.9 % (every weight) were measured "
        "on one H100 at 1.2B parameters and rows of 4,096 tokens, 46.2 % by PaLM on TPUs; a layer computed a second "
        "time, small models, short rows and many chips take of it",
        "docs/measurements.md, One H100; Chowdhery et al. 2022, arXiv:2204.02311; the lower end is specjax's own",
        "a range: one machine and one paper",
    ),
    "time on a CPU": Rule(
        "a step's operations at 20 to 60 billion a second and core, measured in float32 on 2 cores with AVX2 at 4M to "
        "135M parameters",
        "docs/measurements.md, The shipped configs, The demo on a published model, Beside TRL and PEFT",
        "one kind of machine",
    ),
    "experts": Rule("the rank divided by the number of experts; not applied here", f"{_TINKER}; SkyRL", "thin"),
}


def rank(loss_tokens: int, per_rank: int) -> int | None:
    """The smallest of `RANKS` whose factors can hold the information of the trained tokens; None if none can.

    Args:
      loss_tokens: trained tokens per pass.
      per_rank: trained parameters per unit of rank.

    >>> rank(32_000, 1_000), rank(32_001, 1_000), rank(512_001, 1_000)
    (16, 32, None)
    """
    bits = loss_tokens * BITS_PER_TOKEN
    return next((r for r in RANKS if bits <= BITS_PER_PARAMETER * r * per_rank), None)


def exponent(family: str) -> float | None:
    """The exponent with which the best rate falls with a family's width; None if nobody fitted it."""
    return next((p for name, p in EXPONENTS.items() if family.startswith(name)), None)


def rate(family: str, width: int, *, adapter: bool, steps: int, dpo: bool = False) -> float:
    """The peak learning rate, to two digits.

    >>> rate("llama", 4096, adapter=True, steps=100), rate("llama", 4096, adapter=True, steps=99)
    (0.00029, 0.00043)
    >>> rate("llama", 4096, adapter=False, steps=99), rate("gemma2", 4096, adapter=True, steps=500)
    (2.9e-05, 0.0002)
    """
    if dpo:
        return DPO_RATE if adapter else DPO_RATE / LORA_TIMES
    p = exponent(family)
    found = OTHER_RATE if p is None else BASE_RATE * (BASE_WIDTH / width) ** p
    if adapter:
        found *= LORA_TIMES_SHORT if steps < SHORT else LORA_TIMES
    return float(f"{found:.1e}")


def batch(per_row: float, groups: int) -> int:
    """Packed rows per step: a power of two with fewer than 32 examples, then a multiple of `groups`.

    >>> batch(1.0, 1), batch(2.0, 1), batch(40.0, 1), batch(1.0, 12)
    (16, 8, 1, 24)
    """
    rows = 1
    while 2 * rows * max(1.0, per_row) < FEWER_THAN:
        rows *= 2
    return math.ceil(rows / groups) * groups


def course(rows: int, per_row: float, groups: int) -> tuple[int, int, int]:
    """(rows per step, epochs, steps): `batch`, halved while 3 passes make fewer than 100 steps; then the passes.

    Args:
      rows: packed rows.
      per_row: examples per row.
      groups: the number of parts into which the devices split a batch.
    """
    size = batch(per_row, groups)
    steps = lambda size, epochs: max(1, round(epochs * rows / size))  # noqa: E731
    while size % (2 * groups) == 0 and steps(size, EPOCHS) < SHORT:
        size //= 2
    epochs = next((n for n in range(1, EPOCHS) if steps(size, n) >= LONG), EPOCHS)
    if steps(size, epochs) < SHORT:
        epochs = next((n for n in range(EPOCHS, EPOCHS_SHORT) if steps(size, n) >= SHORT), EPOCHS_SHORT)
    return size, epochs, steps(size, epochs)


def seconds(work: float, chips: int, peak: float | None, cores: int) -> tuple[float, float]:
    """The least and the most seconds that an amount of work takes.

    Args:
      work: the number of operations.
      chips: the number of chips that share them.
      peak: operations per second of each chip; None: a CPU.
      cores: the number of the CPU's cores.

    >>> seconds(9e16, 2, 1e15, 1), seconds(2.4e12, 1, None, 2)
    ((100.0, 300.0), (20.0, 60.0))
    """
    slow, fast = (rate * cores for rate in CORE) if peak is None else (share * peak * chips for share in SHARE_OF_PEAK)
    return work / fast, work / slow


def length(sizes: np.ndarray, most: int, *, text: bool) -> int:
    """The tokens per row.

    Args:
      sizes: tokens of each example.
      most: the most tokens that the model reads.
      text: whether it is raw text, which is cut into pieces.
    """
    if text:
        return min(TEXT_LENGTH, most)
    longest = int(sizes.max(initial=1))
    return min(max(math.ceil(longest / LENGTHS) * LENGTHS, LEAST_LENGTH), MOST_LENGTH, most)


def held_out(rows: int) -> float:
    """The share of the different rows that is held out; 0 if there are too few.

    >>> held_out(10_000), held_out(1_000), held_out(500), held_out(20), held_out(1)
    (0.02, 0.05, 0.1, 0.1, 0.0)
    """
    if rows < 2:
        return 0.0
    return round(min(MOST_HELD_OUT, max(LEAST_HELD_OUT, HELD_OUT / rows)), 3)
