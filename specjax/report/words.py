"""The words of a language, and its format of numbers, sizes, times and rates."""

import math
from datetime import UTC, datetime
from typing import Any

from specjax.report.texts import LANGUAGES, TEXT

THIN, HARD = "\u202f", "\u00a0"  # no line breaks at either

_UNITS = {"en": ("KiB", "MiB", "GiB", "TiB"), "fr": ("Kio", "Mio", "Gio", "Tio")}


class Words:
    """The words and number formats of one language.

    >>> Words("en").count(1234567), Words("fr").decimal(-0.0312)
    ('1,234,567', '−0,031')
    """

    def __init__(self, lang: str):
        self.lang = lang

    def __call__(self, key: str, **values: Any) -> str:
        r"""The text of a key, with values filled in.

        >>> Words("fr")("take plainly", method="LoRA", reasons="…")
        'Prenez LoRA\xa0: ….'
        """
        text = TEXT[key][LANGUAGES.index(self.lang)].format(**values).replace(" %", THIN + "%")
        if self.lang == "fr":  # what French writes before these never begins a line
            text = text.replace(" :", HARD + ":").replace("« ", "«" + HARD).replace(" »", HARD + "»")
            text = text.replace(" ;", THIN + ";").replace(" ?", THIN + "?").replace(" !", THIN + "!")
        return text

    def __contains__(self, key: str) -> bool:
        return key in TEXT

    def decimal(self, value: float, digits: int = 3, *, sign: bool = False) -> str:
        """A number with the given digits after the point; zero has no sign."""
        text = f"{abs(value):,.{digits}f}"
        if self.lang == "fr":
            text = text.replace(",", THIN).replace(".", ",")
        if not float(f"{abs(value):.{digits}f}"):
            return text
        return ("−" if value < 0 else "+" if sign else "") + text

    def nats(self, value: float) -> str:
        r"""A loss, or a difference of losses, with its unit.

        >>> Words("en").nats(0.01), Words("fr").nats(-2.5)
        ('0.010\u202fnats', '−2,500\u202fnats')
        """
        return f"{self.decimal(value)}{THIN}{'nat' if self.lang == 'fr' and abs(value) < 2 else 'nats'}"

    def count(self, value: float) -> str:
        """A whole number."""
        return self.decimal(value, 0)

    def share(self, value: float) -> str:
        r"""A fraction, in per cent.

        >>> [Words("en").share(value) for value in (1, 0.0363, 0.61)]
        ['100\u202f%', '3.6\u202f%', '61\u202f%']
        """
        return self.decimal(value * 100, 0 if abs(value) >= 0.1 else 1) + THIN + "%"

    def large(self, value: float) -> str:
        r"""A number of parameters or tokens, with three digits.

        >>> Words("en").large(134515008), Words("fr").large(8030261248), Words("en").large(820)
        ('135M', '8,03\u202fMd', '820')
        """
        names = ("", "k", "M", "B") if self.lang == "en" else ("", "k", "M", "Md")
        power = min(3, max(0, int(math.log10(abs(value)) // 3))) if abs(value) >= 1 else 0
        if power < 3 and abs(value) / 1000**power >= 999.5:
            power += 1
        scaled = value / 1000**power
        digits = 0 if not power or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
        gap = THIN if self.lang == "fr" and power else ""
        return self.decimal(scaled, digits) + gap + names[power]

    def bytes(self, value: float, of: float | None = None) -> str:
        r"""A size of memory or of a file; as part of another size, in the unit of that size, without writing it.

        >>> Words("en").bytes(1.5 * 2**30), Words("fr").bytes(19_600_000), Words("en").bytes(2**28, 2**34)
        ('1.50\u202fGiB', '18,7\u202fMio', '0.25')
        """
        whole = abs(of or value)
        power = min(4, max(1, int(math.log2(whole) // 10))) if whole >= 1 else 1
        scaled = value / 1024**power
        digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
        return self.decimal(scaled, digits) + ("" if of else THIN + _UNITS[self.lang][power - 1])

    def rate(self, value: float) -> str:
        """A learning rate as the field writes it.

        >>> Words("en").rate(2e-4), Words("fr").rate(1.5e-5), Words("en").rate(0)
        ('2e-4', '1,5e-5', '0')
        """
        if not value:
            return "0"
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return (mantissa.replace(".", ",") if self.lang == "fr" else mantissa) + f"e{int(exponent)}"

    def time(self, seconds: float) -> str:
        r"""A duration.

        >>> [Words("en").time(value) for value in (0.42, 42, 200, 4260)]
        ['0.4\u202fs', '42\u202fs', '3\u202fmin 20\u202fs', '1\u202fh 11\u202fmin']
        """
        if seconds < 9.95:
            return self.decimal(seconds, 1) + THIN + "s"
        whole = round(seconds)
        if whole < 60:
            return f"{whole}{THIN}s"
        if whole < 3600:
            rest = f" {whole % 60}{THIN}s" if whole % 60 else ""
            return f"{whole // 60}{THIN}min{rest}"
        return f"{self.count(whole // 3600)}{THIN}h {whole // 60 % 60:02d}{THIN}min"

    def date(self, text: str) -> str:
        """The day and the minute of an ISO time in UTC; another text is left as it is.

        >>> Words("fr").date("2026-11-28T17:00:00Z"), Words("en").date("2026-11-28T17:00:00Z"), Words("en").date("?")
        ('28/11/2026, 17:00 UTC', '2026-11-28, 17:00 UTC', '?')
        """
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            return text
        found = found.astimezone(UTC) if found.tzinfo else found
        day = "%d/%m/%Y" if self.lang == "fr" else "%Y-%m-%d"
        return found.strftime(f"{day}, %H:%M UTC")

    def listing(self, parts: list[str]) -> str:
        """Parts of a sentence: a, b, and c."""
        if len(parts) < 2:
            return "".join(parts)
        comma = "," if self.lang == "en" and len(parts) > 2 else ""
        return f"{', '.join(parts[:-1])}{comma} {self('and')} {parts[-1]}"

    def part(self, value: float) -> str:
        r"""A fraction in words if there are any, else in per cent.

        >>> Words("en").part(0.33), Words("fr").part(0.5), Words("en").part(0.42)
        ('a third', 'la moitié', '42\u202f%')
        """
        known = {1 / 10: "a tenth", 1 / 5: "a fifth", 1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half"}
        known |= {2 / 3: "two thirds", 3 / 4: "three quarters"}
        nearest = min(known, key=lambda one: abs(one - value))
        return self(known[nearest]) if abs(nearest - value) <= 0.02 else self.share(value)
