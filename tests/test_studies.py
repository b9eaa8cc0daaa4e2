"""docs/studies.md is what its JSON says, and a verdict is what the numbers say."""

import math

import pytest

from benchmarks import studies


def trial(rate, loss, seed=0, general=0.0, stopped=""):
    curve = [{"step": 0, "loss": {"d": 5.0, "g": 1.0}}, {"step": 9, "loss": {"d": loss, "g": 1.0 + general}}]
    return {"rate": rate, "seed": seed, "stopped": stopped, "curve": curve}


def bowl(best, least=3.0):
    """Trials whose losses are a parabola of the rate's logarithm, with its lowest point at `best`."""
    rates = [best * 0.8 * 3.0**n for n in range(-2, 3)]
    return {"trials": [trial(rate, least + 0.1 * math.log(rate / best) ** 2) for rate in rates]}


def test_the_page_is_made_of_what_is_kept():
    assert studies.PAGE.read_text(encoding="utf-8") == studies.page(studies.read())


def test_a_best_rate_lies_between_those_that_were_tried():
    assert studies.between(bowl(2e-3), "d") == pytest.approx(2e-3)
    falling = {"trials": [trial(1e-3, 3.0), trial(3e-3, 2.0), trial(1e-2, 9.0, stopped="halving")]}
    assert studies.between(falling, "d") == 3e-3  # the edge of what came to its end


@pytest.mark.parametrize(
    ("times", "rank", "behind", "verdicts"),
    [
        (10, 1.0, 0.0, [studies.SEEN] * 3),
        (50, 1.0, 0.05, [studies.NOT_SEEN, studies.SEEN, studies.NOT_SEEN]),
        (10, 2.0, 0.0, [studies.SEEN, studies.OPEN, studies.SEEN]),
        (10, 5.0, 0.0, [studies.NOT_SEEN, studies.NOT_SEEN, studies.SEEN]),
    ],
)
def test_rates_are_held_against_full_trainings(times, rank, behind, verdicts):
    low, high = times / math.sqrt(rank), times * math.sqrt(rank)
    loras = {"lora_r2": bowl(1e-4 * low, 3.0 + behind), "lora_r8": bowl(1e-4 * high, 3.0 + behind)}
    found = studies.rates({"full": bowl(1e-4), **loras}, "d", "g")
    if rank == 5.0:  # 10 * sqrt(5) is still within a step of the grid
        verdicts[0] = studies.SEEN
    assert [one.verdict for one in found] == verdicts


def test_methods_are_compared_seed_by_seed():
    def of(*losses):
        return {"trials": [trial(1e-3, loss, seed) for seed, loss in enumerate(losses)] + [trial(1e-2, 9.0)]}

    one, worse, mixed = of(3.0, 3.1, 3.2), of(3.11, 3.2, 3.31), of(2.9, 3.3, 3.2)
    (found,) = studies.targets({"all_maps": one, "attention": worse}, "d", "g")
    assert found.verdict == studies.SEEN and found.numbers.startswith("attention alone: +0.107 nats")
    assert next(studies.targets({"all_maps": worse, "attention": one}, "d", "g")).verdict == studies.NOT_SEEN
    assert next(studies.targets({"all_maps": one, "attention": mixed}, "d", "g")).verdict == studies.OPEN


def test_what_is_forgotten_is_read_where_all_have_learned_as_much():
    methods = {
        "full": {"trials": [trial(1e-3, 3.0, general=0.5), trial(1e-4, 3.2, general=0.3)]},
        "lora": {"trials": [trial(1e-3, 3.2, general=0.1)]},
        "full_replay": {"trials": [trial(1e-3, 3.1, general=0.2)]},
        "lora_replay": {"trials": [trial(1e-3, 3.1, general=0.099)]},
    }
    found = list(studies.forgetting(methods, "d", "g"))
    assert [one.verdict for one in found] == [studies.SEEN, studies.SEEN, studies.OPEN]
    assert "where the domain's loss is 3.200: full +0.300, lora +0.100" in found[0].numbers
