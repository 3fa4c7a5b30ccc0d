"""Refuses configs whose numbers contradict each other."""

from ..errors import InputError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_heads(*levels: tuple[int, int, int | None]) -> None:
    """Raise InputError unless channels can be divided among heads, in each (channels, heads, layers)."""
    for channels, heads, layers in levels:
        if layers and channels % heads:
            raise InputError(f"{channels} channels cannot be divided evenly among {heads} attention heads")


def check_prediction(kind: str, rescaled: bool) -> None:
    """Raise InputError unless a prediction type exists, and goes with `rescale_betas_zero_snr`."""
    if kind not in PREDICTIONS:
        raise InputError(f"prediction_type = {kind!r} is not supported, only {', '.join(PREDICTIONS)}")
    if rescaled and kind == "epsilon":
        raise InputError(
            "rescale_betas_zero_snr leaves nothing but noise at the last time step, where epsilon says "
            "nothing of the picture; it needs prediction_type v_prediction or sample"
        )
