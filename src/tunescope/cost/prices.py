"""What an hour of a GPU costs: prices.csv and the user's own. A price never travels without its date and source."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path

from tunescope.errors import UserError
from tunescope.hardware import DEVICES, Device, UnknownDevice, find_device

USER_COLUMNS = ("gpu", "usd_per_hour")
_CSV_CURE = (
    "write a CSV with the columns gpu and usd_per_hour, and provider, date (YYYY-MM or YYYY-MM-DD), source and note "
    "where you have them"
)
_MAX_USD_PER_HOUR = 10**6
_PRICE_CURE = "give one: GPU=USD_PER_HOUR, as a40=0.37, or a CSV of prices"


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one GPU costs for an hour, in USD.

    gpu: name in hardware.DEVICES, or as its table writes it where that has no such GPU. date: ISO, to the month where
    the day is not known. is_default: whether a lookup may answer with it unasked.
    """

    gpu: str
    usd_per_hour: float
    provider: str
    date: str
    source: str
    note: str = ""
    is_default: bool = True

    def __str__(self) -> str:
        return f"{self.gpu}: {self.usd_per_hour:g} USD/h ({self.provider}, {self.date}; {self.source})"


@dataclass(frozen=True)
class Offer:
    """A run on `num_gpus` GPUs of one price for `hours` hours. Raises ValueError for no time or no GPU."""

    price: Price
    hours: float
    num_gpus: int = 1

    def __post_init__(self) -> None:
        _check_hours(self.hours)
        if self.num_gpus < 1:
            raise ValueError(f"a run on {self.num_gpus} GPUs is none")

    @property
    def usd(self) -> float:
        return self.hours * self.num_gpus * self.price.usd_per_hour


def cheapest(offers: Iterable[Offer]) -> Offer:
    """The one of the lowest cost; of equal ones the fastest. Raises ValueError if there is none."""
    return min(offers, key=lambda offer: (offer.usd, offer.hours))


def fastest(offers: Iterable[Offer]) -> Offer:
    """The one of the fewest hours; of equal ones the cheapest. Raises ValueError if there is none."""
    return min(offers, key=lambda offer: (offer.hours, offer.usd))


def break_even_usd_per_hour(offer: Offer, other_hours: float, other_num_gpus: int = 1) -> float:
    """What an hour of one of the other GPUs may cost until the run there is as dear as `offer`, which above it stays
    cheaper.

    other_hours: of the same run on other_num_gpus of the other GPUs. Raises ValueError for no time or no GPU.
    """
    _check_hours(other_hours)
    if other_num_gpus < 1:
        raise ValueError(f"a run on {other_num_gpus} GPUs is none")
    return offer.usd / (other_hours * other_num_gpus)


def find_gpu(name: str) -> Device:
    """hardware.find_device, with `a100-40` understood without its GB, and a cure that names GPUs that were meant.

    Raises UnknownDevice.
    """
    short = "-".join(name.lower().split())
    try:
        return find_device(short + "gb" if short in ("a100-40", "a100-80", "h100-80") else name)
    except UnknownDevice as error:
        from difflib import get_close_matches  # a hundredth of a second that only a misspelling takes

        if short == "a100":
            raise UnknownDevice(error.what, cause=error.cause, cure="write a100-40gb or a100-80gb") from None
        known = {alias.lower(): device.name for device in DEVICES for alias in (device.name, *device.aliases)}
        nearest = dict.fromkeys(known[match] for match in get_close_matches(short, known, n=3))
        meant = f"perhaps {' or '.join(nearest)} is meant; else " if nearest else ""
        raise UnknownDevice(error.what, cause=error.cause, cure=meant + error.cure) from None


def find_price(gpu: str, user_prices: Sequence[Price] = ()) -> Price:
    """Of a GPU by any name that hardware.find_device knows: the user's, else the table's.

    Of several of the user's it is the cheapest. Raises UserError where there is no price, and for an unknown GPU.
    """
    name = find_device(gpu).name
    own = [price for price in user_prices if price.gpu == name]
    if own:
        return min(own, key=lambda price: price.usd_per_hour)
    known = [price for price in table_prices() if price.gpu == name]
    default = next((price for price in known if price.is_default), None)
    if default is not None:
        return default
    priced = ", ".join(price.gpu for price in table_prices() if price.is_default)
    unused = f"; {known[0]} is there for the record and used by nothing" if known else ""
    raise UserError(
        f"there is no price for {name}", cause=f"the table has prices for {priced}{unused}", cure=_PRICE_CURE
    )


@cache
def table_prices() -> tuple[Price, ...]:
    """All of prices.csv, in file order; those that no lookup answers with have is_default False."""
    text = (files("tunescope.cost") / "prices.csv").read_text(encoding="utf-8")
    return tuple(
        Price(
            gpu=_name_if_known(row["gpu"]),
            usd_per_hour=float(row["usd_per_hour"]),
            provider=row["provider"],
            date=row["date"],
            source=row["source"],
            note=row["note"],
            is_default=row["is_default"] == "yes",
        )
        for row in csv.DictReader(io.StringIO(text))
    )


def read_user_prices(additions: Iterable[str], *, today: date | None = None) -> tuple[Price, ...]:
    """The user's prices, in order: each addition is GPU=USD_PER_HOUR or a CSV (see _CSV_CURE).

    today: dates the prices that name no date of their own. Raises UserError.
    """
    today_iso = (today or date.today()).isoformat()
    prices: list[Price] = []
    for position, addition in enumerate(additions, start=1):
        if addition.lower().endswith(".csv"):
            prices += _read_csv(Path(addition).expanduser(), today_iso)
            continue
        gpu, separator, usd = addition.partition("=")
        if not separator:
            raise UserError(f"{addition!r} is no price", cure=_PRICE_CURE)
        prices.append(_user_price(f"price {position} ({addition})", gpu, usd, today_iso, f"user, {today_iso}"))
    return tuple(prices)


def _read_csv(path: Path, today_iso: str) -> list[Price]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file of prices {path}", cure="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", cure=_CSV_CURE) from None
    reader = csv.DictReader(io.StringIO(text), strict=True)
    prices = []
    try:
        if missing := [column for column in USER_COLUMNS if column not in (reader.fieldnames or ())]:
            raise UserError(f"{path}, line 1: no column {' and no column '.join(missing)}", cure=_CSV_CURE)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: not as many cells as the header has columns",
                    cause="a comma within a cell, or one too few",
                    cure='write a text that holds a comma in "quotes"',
                )
            prices.append(
                _user_price(
                    where,
                    row["gpu"],
                    row["usd_per_hour"],
                    (row.get("date") or "").strip() or today_iso,
                    f"user, {today_iso}, {path.name}" + (f": {row['source']}" if row.get("source") else ""),
                    provider=row.get("provider") or "user",
                    note=row.get("note") or "",
                )
            )
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}", cure=_CSV_CURE) from None
    if not prices:
        raise UserError(f"{path} holds no price", cause="it has only its header", cure=_CSV_CURE)
    return prices


def _user_price(
    where: str, gpu: str, usd: str, iso_date: str, source: str, *, provider: str = "user", note: str = ""
) -> Price:
    try:
        name = find_gpu(gpu.strip()).name
    except UnknownDevice as error:
        raise UnknownDevice(f"{where}: {error.what}", cause=error.cause, cure=error.cure) from None
    try:
        usd_per_hour = float(usd)
    except ValueError:
        usd_per_hour = math.nan
    if not 0 <= usd_per_hour <= _MAX_USD_PER_HOUR:
        raise UserError(
            f"{where}: {usd!r} is no price",
            cure=f"write USD per hour as a number from 0 to {_MAX_USD_PER_HOUR:,}, as 0.79",
        )
    if not _is_date(iso_date):
        raise UserError(f"{where}: {iso_date!r} is no date", cure="write YYYY-MM-DD, or YYYY-MM")
    return Price(gpu=name, usd_per_hour=usd_per_hour, provider=provider, date=iso_date, source=source, note=note)


def _is_date(text: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", text, re.ASCII):
        return False
    try:
        date.fromisoformat(text if len(text) == len("YYYY-MM-DD") else f"{text}-01")
    except ValueError:
        return False
    return True


def _name_if_known(gpu: str) -> str:
    """The device's name, or the text itself: the table also keeps prices of GPUs that hardware.py does not have."""
    try:
        return find_device(gpu).name
    except UnknownDevice:
        return gpu


def _check_hours(hours: float) -> None:
    if not 0 < hours < math.inf:
        raise ValueError(f"a run of {hours} hours is none")
