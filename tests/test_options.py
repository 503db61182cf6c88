"""Options: what is out of range is refused when it is made, by its key and with what was expected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from eva_rl.errors import EnvironmentFailedError, UnknownNameError, UserError, close_matches
from eva_rl.options import Options, between, group, one_of, option, positive
from eva_rl.seeding import BLOCK, DEMONSTRATIONS, EVALUATION, MAX_SEED, ONLINE, ROLLOUTS, VALIDATION, episode_seeds


@dataclass
class Some(Options):
    """One of each."""

    PREFIX = "algo."

    rate: float | str = option(0.1, "a rate", above=0)
    share: float = option(0.5, "a share", low=0, high=1)
    count: int | None = option(3, "a count", low=1)
    most: float = option(1.0, "an upper end", high=2)
    kind: str = option("a", "a kind", choices=("a", "bcd"))
    names: list[str] = option(["x"], "names")
    flag: bool = option(False, "a switch", low=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0}, "algo.rate=0: expected a number above 0."),
        ({"rate": -1e-9}, "algo.rate=-1e-09: expected a number above 0."),
        ({"rate": math.inf}, "algo.rate=inf: expected a finite number."),
        ({"share": math.nan}, "algo.share=nan: expected a finite number."),
        ({"share": 1.01}, "algo.share=1.01: expected 0 to 1."),
        ({"share": -0.01}, "algo.share=-0.01: expected 0 to 1."),
        ({"count": 0}, "algo.count=0: expected at least 1."),
        ({"most": 2.5}, "algo.most=2.5: expected at most 2."),
        ({"kind": "bc"}, "Unknown algo.kind 'bc'. Did you mean 'bcd'?"),
        ({"kind": "zzzz"}, "Unknown algo.kind 'zzzz'. Known: a, bcd."),
    ],
)
def test_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Some(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "given",
    [{"rate": "auto"}, {"rate": 1e-300}, {"share": 0}, {"share": 1}, {"count": None}, {"count": 10**12}, {"most": -5}],
)
def test_in_range(given: dict[str, Any]) -> None:
    (name, value), *_ = given.items()
    assert getattr(Some(**given), name) == value


def test_lists_are_not_shared_and_switches_have_no_range() -> None:
    first, second = Some(), Some(flag=False)
    first.names.append("y")
    assert second.names == ["x"]
    assert second.flag is False


def test_a_group_is_made_for_each_config() -> None:
    @dataclass
    class Config:
        some: Some = group(Some, "some options")

    one, other = Config(), Config()
    one.some.count = 9
    assert other.some.count == 3


def test_helpers_name_the_first_that_is_wrong() -> None:
    positive(a=1, b=0.001)
    with pytest.raises(UserError, match=r"^data\.episodes=0: expected a number above 0\.$"):
        positive(a=1, data__episodes=0, c=-1)
    with pytest.raises(UserError, match="nan"):
        positive(a=math.nan)
    with pytest.raises(UserError, match=r"^eval\.share=2: expected 0 to 1\.$"):
        between(0, 1, eval__share=2)
    with pytest.raises(UnknownNameError, match="Unknown eval\\.kind 'y'"):
        one_of(("x",), a="x", eval__kind="y")


def test_close_matches_are_few_and_named_once() -> None:
    known = ["push-v3", "push-wall-v3", "push-back-v3", "pull-v3", "push-v3", "reach-v3"]
    assert close_matches("pusch-v3", known)[0] == "push-v3"
    assert len(close_matches("pusch-v3", known)) == len(set(close_matches("pusch-v3", known))) <= 3
    assert close_matches("Ünsinn", known) == []


def test_a_long_list_of_names_is_cut() -> None:
    text = str(UnknownNameError("task", "zzz", [f"{n:02d}aaaa" for n in range(20)], "Type --help."))
    assert "11aaaa, ..." in text
    assert "12aaaa" not in text
    assert text.endswith("Type --help.")
    assert str(UnknownNameError("task", "zzz", [])) == "Unknown task 'zzz'. There are none."


def test_a_failed_environment_says_what_is_saved_once() -> None:
    import pickle

    error = EnvironmentFailedError("Own-v0", "at env step 3", "ValueError: no")
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error) == "The environment Own-v0 failed at env step 3: ValueError: no."
    assert str(error.saved()).count("is saved") == 1
    assert error.cause == "ValueError: no"


def test_no_two_purposes_and_no_two_seeds_share_an_episode() -> None:
    purposes = sorted([DEMONSTRATIONS, VALIDATION, EVALUATION, ROLLOUTS, ONLINE])
    for purpose, following in pairwise(purposes):
        assert episode_seeds(purpose, MAX_SEED) + BLOCK <= following
    assert episode_seeds(ONLINE, MAX_SEED) + BLOCK < 2**32, "numpy's and Gymnasium's seeds have 32 bits"
    assert episode_seeds(VALIDATION, 7) - episode_seeds(VALIDATION, 6) == BLOCK
    for bad in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match="expected 0 to"):
            episode_seeds(EVALUATION, bad)
