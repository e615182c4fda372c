"""Prices: never without date and source; the user's before the table's; what they make cheap, fast or even."""

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import paper
from tunescope.cost import prices
from tunescope.cost.prices import Offer, Price, break_even_usd_per_hour, cheapest, fastest, find_price
from tunescope.errors import UserError
from tunescope.hardware import UnknownDevice, find_device

TODAY = date(2025, 3, 4)
A40 = "NVIDIA A40"
positive = st.floats(1e-3, 1e4)
usd_rates = st.floats(0, 1e3)


def priced(usd_per_hour: float, gpu: str = A40) -> Price:
    return Price(gpu=gpu, usd_per_hour=usd_per_hour, provider="someone", date="2025-03", source="a sheet")


def read(*additions: str) -> tuple[Price, ...]:
    return prices.read_user_prices(additions, today=TODAY)


@pytest.mark.parametrize(
    ("name", "device", "usd_per_hour"),
    [
        ("a40", "NVIDIA A40", 0.79),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", 1.67),
        ("h100", "NVIDIA H100 80GB HBM3", 2.1),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", 2.1),
    ],
)
def test_the_papers_prices_answer_unasked(name: str, device: str, usd_per_hour: float) -> None:
    price = find_price(name)
    assert (price.gpu, price.usd_per_hour, price.date) == (device, usd_per_hour, "2024-08")
    assert price.provider == "CUDO Compute"
    assert "Table IV" in price.source
    assert "the quote's own is not given" in price.note


def test_the_table_is_the_papers_and_what_nothing_used_is_no_default() -> None:
    kept = {(round(price.usd_per_hour, 4), price.is_default) for price in prices.table_prices()}
    papers = {(float(row["price_usd_per_hour"]), row["used_in"] == "Table IV") for row in paper.rows("gpu_prices")}
    assert kept == papers
    assert len(prices.table_prices()) == len(paper.rows("gpu_prices")) == 11
    assert sum(price.is_default for price in prices.table_prices()) == 3


def test_no_price_is_without_date_source_and_provider() -> None:
    for price in (*prices.table_prices(), *read("a40=0.37", "l4=1")):
        assert price.date
        assert price.source
        assert price.provider
        assert price.date in str(price)
        assert price.source in str(price)
    devices = [price.gpu for price in prices.table_prices() if price.is_default]
    assert len(set(devices)) == len(devices)
    for gpu in devices:
        assert find_device(gpu).name == gpu


def test_a_user_price_wins_and_is_dated_today() -> None:
    own = read("a40=0.37", "NVIDIA H100 PCIe=1.5")
    price = find_price("A40", own)
    assert (price.usd_per_hour, price.date, price.source) == (0.37, "2025-03-04", "user, 2025-03-04")
    assert find_price("h100-pcie", own).usd_per_hour == 1.5
    assert find_price("h100", own).usd_per_hour == 2.1
    assert prices.read_user_prices(["a40=1"])[0].date == date.today().isoformat()
    assert read() == ()


def test_of_several_user_prices_the_cheapest_answers() -> None:
    own = read("a40=0.9", "a40=0.5", "a40=0.7")
    assert [price.usd_per_hour for price in own] == [0.9, 0.5, 0.7]
    assert find_price("a40", own).usd_per_hour == 0.5
    assert find_price("a40", read("a40=5")).usd_per_hour == 5  # dearer than the table's, and the user's all the same


def test_a_csv_of_prices(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffgpu,provider,usd_per_hour,date,source,note\n"
        'A40,"Own, rack",0.2,2025-01,invoice 7,with power\n'
        "L40S,,0,,,\n",
        encoding="utf-8",
    )
    first, second = read(str(path))
    assert first == Price(
        gpu=A40,
        usd_per_hour=0.2,
        provider="Own, rack",
        date="2025-01",
        source="user, 2025-03-04, mine.csv: invoice 7",
        note="with power",
    )
    assert (second.gpu, second.usd_per_hour) == ("NVIDIA L40S", 0)
    assert (second.provider, second.date, second.source) == ("user", "2025-03-04", "user, 2025-03-04, mine.csv")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("gpu,usd\na40,1\n", "line 1: no column usd_per_hour"),
        ("", "line 1: no column gpu and no column usd_per_hour"),
        ("gpu,usd_per_hour\n", "holds no price"),
        ("gpu,usd_per_hour\na40,1\nl4,-0.1\n", "line 3: '-0.1' is no price"),
        ("gpu,usd_per_hour\na40,nan\n", "line 2: 'nan' is no price"),
        ("gpu,usd_per_hour\na40,inf\n", "line 2: 'inf' is no price"),
        ("gpu,usd_per_hour\na40,$1\n", "line 2: '$1' is no price"),
        ("gpu,usd_per_hour\na40,\n", "line 2: '' is no price"),
        ("gpu,usd_per_hour\na40\n", "line 2: not as many cells"),
        ("gpu,usd_per_hour\na40,1,2\n", "line 2: not as many cells"),
        ("gpu,usd_per_hour\nvoodoo,1\n", "line 2: GPU 'voodoo' is not in the table"),
        ("gpu,usd_per_hour,date\na40,1,3.4.2025\n", "line 2: '3.4.2025' is no date"),
        ("gpu,usd_per_hour,date\na40,1,2025-02-30\n", "line 2: '2025-02-30' is no date"),
        ("gpu,usd_per_hour,date\na40,1,2025-13\n", "line 2: '2025-13' is no date"),
        ('gpu,usd_per_hour\na40,"1\n', "unexpected end of data"),
    ],
)
def test_a_fault_in_a_csv_is_named_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(str(path))
    assert what in caught.value.what
    assert caught.value.cure


@pytest.mark.parametrize(
    "addition", ["a40", "a40=", "a40=cheap", "a40=-1", "=1", "voodoo=1", "a100=1", "a40=1=2", "no such.csv", ""]
)
def test_a_bad_addition_is_refused_with_a_cure(addition: str) -> None:
    with pytest.raises(UserError) as caught:
        read(addition)
    assert caught.value.cure


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"gpu,usd_per_hour\n\xff,1\n")
    with pytest.raises(UserError, match="cannot be read"):
        read(str(tmp_path / "mine.csv"))


def test_a_gpu_without_a_price_says_which_have_one() -> None:
    with pytest.raises(UserError, match="no price for NVIDIA B200") as caught:
        find_price("b200")
    assert A40 in caught.value.cause
    assert "=" in caught.value.cure
    with pytest.raises(UserError, match="no price for NVIDIA L4") as caught:
        find_price("l4")
    assert "0.8048" in caught.value.cause  # there for the record, and no answer
    for name in ("voodoo", "v100", "a100"):  # not in the table of GPUs; or two boards
        with pytest.raises(UnknownDevice):
            find_price(name)


@pytest.mark.parametrize(
    ("gpu", "queries_per_s", "usd"),
    [("a40", 1.005476933, 32.737), ("a100-80gb", 2.74, 25.40), ("h100-80gb", 4.9, 17.86)],
)
def test_cost_of_the_papers_table_iv(gpu: str, queries_per_s: float, usd: float) -> None:
    offer = Offer(find_price(gpu), hours=15000 * 10 / queries_per_s / 3600)
    assert offer.usd == pytest.approx(usd, abs=0.005)


def test_cheapest_fastest_and_the_price_that_makes_them_even() -> None:
    slow, quick = Offer(priced(0.8), hours=40), Offer(priced(2.0, "NVIDIA H100 PCIe"), hours=8)
    dear = Offer(priced(9.0, "NVIDIA H200"), hours=4)
    assert cheapest([slow, dear, quick]) is quick
    assert fastest([slow, quick, dear]) is dear
    assert break_even_usd_per_hour(slow, other_hours=8) == pytest.approx(4.0)
    assert break_even_usd_per_hour(slow, other_hours=8, other_num_gpus=2) == pytest.approx(2.0)
    assert Offer(priced(0.8), hours=40, num_gpus=3).usd == pytest.approx(96)


def test_ties_go_to_the_faster_and_to_the_cheaper() -> None:
    free_slow, free_quick = Offer(priced(0), hours=9), Offer(priced(0), hours=3)
    assert cheapest([free_slow, free_quick]) is free_quick
    dear, fair = Offer(priced(2), hours=5), Offer(priced(1), hours=5)
    assert fastest([dear, fair]) is fair


@settings(deadline=None)
@given(usd_rates, usd_rates, positive, positive, st.integers(1, 64))
def test_cost_rises_with_price_time_and_gpus(
    rate: float, more: float, hours: float, more_hours: float, num_gpus: int
) -> None:
    offer = Offer(priced(rate), hours, num_gpus)
    assert Offer(priced(rate + more), hours, num_gpus).usd >= offer.usd >= 0
    assert Offer(priced(rate), hours + more_hours, num_gpus).usd >= offer.usd
    assert Offer(priced(rate), hours, num_gpus + 1).usd >= offer.usd


@settings(deadline=None)
@given(usd_rates, positive, positive, st.integers(1, 8), st.integers(1, 8))
def test_at_the_break_even_price_both_cost_the_same(
    rate: float, hours: float, other_hours: float, num_gpus: int, other_num_gpus: int
) -> None:
    offer = Offer(priced(rate), hours, num_gpus)
    even = break_even_usd_per_hour(offer, other_hours, other_num_gpus)
    assert Offer(priced(even), other_hours, other_num_gpus).usd == pytest.approx(offer.usd, rel=1e-12)
    # The slower the other GPU, the less it may cost.
    assert break_even_usd_per_hour(offer, other_hours * 2, other_num_gpus) <= even


@settings(deadline=None)
@given(st.lists(st.tuples(usd_rates, positive), min_size=1, max_size=8))
def test_nothing_is_cheaper_than_the_cheapest_nor_faster_than_the_fastest(made: list[tuple[float, float]]) -> None:
    offers = [Offer(priced(rate), hours) for rate, hours in made]
    assert all(cheapest(offers).usd <= offer.usd for offer in offers)
    assert all(fastest(offers).hours <= offer.hours for offer in offers)


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf")])
def test_a_run_takes_time(hours: float) -> None:
    with pytest.raises(ValueError, match="hours"):
        Offer(priced(1), hours)
    with pytest.raises(ValueError, match="hours"):
        break_even_usd_per_hour(Offer(priced(1), 1), hours)


def test_a_run_needs_a_gpu_and_a_choice_needs_offers() -> None:
    with pytest.raises(ValueError, match="0 GPUs"):
        Offer(priced(1), 1, num_gpus=0)
    with pytest.raises(ValueError, match="0 GPUs"):
        break_even_usd_per_hour(Offer(priced(1), 1), 1, other_num_gpus=0)
    for choose in (cheapest, fastest):
        with pytest.raises(ValueError, match="empty"):
            choose([])
