"""The colours of all plots, in an order for lines.

The palette of Okabe and Ito (2008), which stays distinguishable with every kind of colour vision. Grey
replaces its black and yellow, which disappear on a dark or a light background.
"""

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREY = "#8C8C8C"

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, GREY)


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a colour such as '#0072B2'."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
