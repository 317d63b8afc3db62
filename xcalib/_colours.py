"""A colour map that terminal and report share."""

__all__ = ["cividis"]

# Reads the same with every kind of colour blindness; red, green and blue at 0, .25, .5, .75 and 1.
_CIVIDIS = ((0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 175, 111), (254, 232, 56))


def cividis(value: float) -> tuple[int, int, int]:
    """Red, green and blue, each 0 to 255, of a value in [0, 1]."""
    position = value * (len(_CIVIDIS) - 1)
    index = min(int(position), len(_CIVIDIS) - 2)
    part = position - index
    red, green, blue = (
        round(low + (high - low) * part) for low, high in zip(_CIVIDIS[index], _CIVIDIS[index + 1], strict=True)
    )
    return red, green, blue
