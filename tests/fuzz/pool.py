"""A few layers, of every rule, activation and layout in turn, and many calls of them that need no further kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from fuzz.cases import ACTIVATION_NAMES, LAYOUTS, METHODS, VALUES, Case, cases
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# A kernel is made for a range of tokens: layers of few have few.
MOST_TOKENS = (12, 40, 150, 500)
FEW_TOKENS = (0, 1, 7)
DRAWS = 8  # of which the last is a layer: the first ones are the simplest that there are


def layers_of(first_seed: int, count: int) -> list[Case]:
    """`count` layers, the same for the same seed. Their `num_tokens` is the most that a call of theirs has."""
    random = Random(first_seed)
    offsets = [random.randrange(len(names)) for names in (METHODS, ACTIVATION_NAMES, LAYOUTS)]
    return [_layer(first_seed, number, offsets, random.choice(MOST_TOKENS)) for number in range(count)]


def _layer(first_seed: int, number: int, offsets: list[int], most_tokens: int) -> Case:
    method, activation, layout = (
        [names[(number + offset) % len(names)]]
        for names, offset in zip((METHODS, ACTIVATION_NAMES, LAYOUTS), offsets, strict=True)
    )
    drawn: list[Case] = []

    @seed(first_seed * 1000 + number)
    @settings(
        max_examples=DRAWS,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(cases(methods=method, activations=activation, layouts=layout))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return replace(drawn[-1].layer, num_tokens=most_tokens, weights_seed=number)


@st.composite
def calls_of(draw: st.DrawFn, layers: Sequence[Case]) -> Case:
    """Any call of one of these layers."""
    layer = draw(st.sampled_from(layers))
    return replace(
        layer,
        num_tokens=draw(st.sampled_from(FEW_TOKENS) | st.integers(0, layer.num_tokens)),
        gives_output=draw(st.booleans()),
        gives_workspace=draw(st.booleans()),
        records=draw(st.booleans()),
        is_strided=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 1 << 31)),
    )
